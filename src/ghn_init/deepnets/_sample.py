"""Sampling architectures (arXiv 2110.13100, appendix A)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ghn_init._errors import ArchitectureError
from ghn_init.deepnets._architecture import Architecture
from ghn_init.deepnets._plan import plan_network
from ghn_init.deepnets._random import Stream
from ghn_init.deepnets._space import OPERATIONS, Edge, Genotype

if TYPE_CHECKING:
    from collections.abc import Sequence

CONVOLUTIONS: Final = frozenset(name for name in OPERATIONS if "conv" in name)
LARGE_KERNELS: Final = frozenset({"conv_5x5", "conv_7x7"})
_PASSIVE: Final = ("none", "max_pool_3x3", "avg_pool_3x3", "skip_connect")


@dataclass(frozen=True)
class Space:
    """The ranges that a split draws from, both ends included.

    Attributes:
        family: Number of the family of random streams that the split draws from; never reused.
        n_cells: Cells.
        deep: The threshold in cells past which networks have fewer steps and always global pooling.
        steps: Sum nodes a cell, at most, up to the threshold and past it.
        min_steps: Sum nodes a cell, at least.
        max_params: More parameters than this, at C = 32 and 10 classes, are rejected.
        bn_free: Never a norm.
        search: The rules of the SEARCH split for norm and preprocessing.
    """

    family: int
    n_cells: tuple[int, int] = (4, 18)
    deep: tuple[int, int] = (7, 10)
    steps: tuple[int, int] = (4, 2)
    min_steps: int = 1
    max_params: int = 10_000_000
    bn_free: bool = False
    search: bool = False


SPACES: Final = {
    "train": Space(0),
    "val": Space(1),
    "test": Space(2),
    "deep": Space(3, n_cells=(10, 36), deep=(18, 18), max_params=100_000_000),
    "dense": Space(4, steps=(10, 6), min_steps=2, max_params=100_000_000),
    "bnfree": Space(5, bn_free=True),
    "search": Space(6, n_cells=(6, 20), deep=(10, 10), steps=(6, 3), search=True),
}
"""The splits that are sampled; `wide` is made from `test`."""


def sample(split: str, index: int, seed: int = 0) -> Architecture:
    """Architecture `index` of a sampled split, with C = 32 and fc_dim = 256.

    Depends on nothing but its arguments: not on other indices, the machine, or library versions.

    Raises:
        ArchitectureError: `split` is not one of the sampled splits.
    """
    if split not in SPACES:
        raise ArchitectureError(f"split {split!r} is not sampled; expected one of {tuple(SPACES)}")
    space = SPACES[split]
    stream = Stream(seed, space.family, index)
    size = _Size.draw(space, stream)
    while True:
        arch = _draw(space, size, stream)
        if arch is not None:
            return arch


@dataclass(frozen=True, slots=True)
class _Size:
    """What is drawn once; only the rest is drawn again when a network is rejected.

    Drawn again as well, it would favour cells of few steps, which are rejected less often, and the
    networks would have 6 to 8 % fewer nodes than the published ones.
    """

    n_cells: int
    deep: int
    steps: int

    @staticmethod
    def draw(space: Space, stream: Stream) -> _Size:
        n_cells = stream.between(*space.n_cells)
        deep = stream.between(*space.deep)
        return _Size(n_cells, deep, stream.between(space.min_steps, space.steps[n_cells > deep]))


def _draw(space: Space, size: _Size, stream: Stream) -> Architecture | None:
    """One draw, or None if it is rejected."""
    genotype = _genotype(size.steps, stream)
    if _is_rejected(genotype):
        return None
    ks = stream.choice((3, 5, 7))
    c_mult = stream.choice((1, 2))
    preproc = _preproc(space, size.steps, c_mult, genotype.transformer, stream)
    glob_avg = genotype.transformer or size.n_cells > size.deep or stream.chance(9, 10)
    norm = _norm(space, size, stream)
    stem_type = stream.choice((0, 1))
    stem_pool = stem_type == 0 and stream.chance(1, 2)
    fc_layers = stream.choice((1, 2))
    if not plan_network(genotype, size.n_cells, stem_type).connected:
        return None
    arch = Architecture(
        genotype, size.n_cells, norm, ks, preproc, glob_avg, stem_pool, stem_type, c_mult, fc_layers
    )
    # Either input size may be the larger network: the stem is wider for small images, the kernel of
    # the patches and the flattened feature map for large ones.
    return arch if all(arch.num_params(10, side) <= space.max_params for side in (32, 224)) else None


def _preproc(space: Space, steps: int, c_mult: int, transformer: bool, stream: Stream) -> bool:
    """Without preprocessing all cells must have one width."""
    if steps > 1 or c_mult > 1:
        return True
    if transformer:
        return stream.chance(1, 5)
    return stream.chance(4, 5) if space.search else True


def _norm(space: Space, size: _Size, stream: Stream) -> str | None:
    """Only small networks train without normalisation, so only those are drawn without."""
    if space.bn_free:
        return None
    small = size.n_cells <= space.n_cells[0] + 1 and size.steps <= space.steps[1]
    return None if small and not space.search and stream.chance(1, 2) else "bnorm"


def _genotype(steps: int, stream: Stream) -> Genotype:
    allowed = OPERATIONS if steps > 1 else OPERATIONS[1:]
    passive = _PASSIVE if steps > 1 else _PASSIVE[1:]
    normal = _edges(steps, allowed, stream)
    reduce = _edges(steps, passive if stream.chance(1, 2) else allowed, stream)
    concat = tuple(range(2, steps + 2))
    if steps > 1 and stream.chance(1, 2):
        concat = tuple(state for state in concat if state == steps + 1 or stream.chance(1, 2))
    return Genotype(normal, concat, reduce, concat)


def _edges(steps: int, operations: Sequence[str], stream: Stream) -> tuple[Edge, ...]:
    """Two edges for every sum node.

    The two earlier states with the best of independent, equally distributed scores, each with its
    best operation: that is two different states in random order, and any operation for each.
    """
    edges: list[Edge] = []
    for n_states in range(2, steps + 2):
        first = stream.below(n_states)
        second = stream.below(n_states - 1)
        second += second >= first
        edges += [(stream.choice(operations), state) for state in (first, second)]
    return tuple(edges)


def _is_rejected(genotype: Genotype) -> bool:
    convolutional = not CONVOLUTIONS.isdisjoint(genotype.operations)
    if not convolutional and ("cse" in genotype.operations or not genotype.transformer):
        return True
    for edges in (genotype.normal, genotype.reduce):
        names = [name for name, _ in edges]
        if names.count("cse") > 1 or sum(name in LARGE_KERNELS for name in names) > 1:
            return True
    return False
