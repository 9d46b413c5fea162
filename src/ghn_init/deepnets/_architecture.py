"""One architecture of DeepNets-1M: what it consists of and what makes it valid."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ghn_init._errors import ArchitectureError
from ghn_init.deepnets._count import activations, num_params
from ghn_init.deepnets._graph import graph_of, num_nodes
from ghn_init.deepnets._plan import NetworkPlan, plan_network
from ghn_init.deepnets._space import HEADS, LARGE_INPUT, OPERATIONS, Genotype

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from ghn_init._graph.graph import Graph
    from ghn_init.deepnets._space import Edge


@dataclass(frozen=True)
class Architecture:
    """An architecture; names of the fields as in the published files.

    Attributes:
        genotype: The cells.
        n_cells: Number of cells.
        norm: "bnorm" or None.
        ks: Kernel of the stem's first convolution, 3, 5 or 7.
        preproc: A 1x1 convolution brings every cell input to the cell's width.
        glob_avg: Global average pooling before the head; else the feature map is flattened.
        stem_pool: Max pooling at the end of a stem of type 0.
        stem_type: 0, one convolution, or 1, three of them (two where the newer cell input is taken).
        C_mult: Factor on the width at each reduction.
        fc_layers: Linear layers in the head, 1 or 2.
        fc_dim: Width between the two.
        C: Width of the first cell.

    Raises:
        ArchitectureError: A value outside the space, or a network without a path to its output; the
            message lists everything that is wrong.
    """

    genotype: Genotype
    n_cells: int
    norm: str | None = "bnorm"
    ks: int = 3
    preproc: bool = True
    glob_avg: bool = True
    stem_pool: bool = False
    stem_type: int = 0
    C_mult: int = 1
    fc_layers: int = 1
    fc_dim: int = 256
    C: int = 32

    def __post_init__(self) -> None:
        if of_other_types := _types(self):
            raise ArchitectureError(f"not an architecture of DeepNets-1M: {'; '.join(of_other_types)}")
        problems = [*_genotype_problems(self.genotype), *_problems(self)]
        if not problems and not self.plan.connected:
            problems.append("no path leads from the input to the output")
        if problems:
            raise ArchitectureError(f"not an architecture of DeepNets-1M: {'; '.join(problems)}")

    @cached_property
    def plan(self) -> NetworkPlan:
        """Which cells, states and layers the output depends on."""
        return plan_network(self.genotype, self.n_cells, self.stem_type)

    @property
    def transformer(self) -> bool:
        """Whether the genotype has attention."""
        return self.genotype.transformer

    def sides(self, image_size: int) -> tuple[int, int]:
        """Side of the feature map (pixels) that enters the cells (the older input), and of the last cell's.

        Raises:
            ArchitectureError: The network does not take images of this size.
        """
        large = image_size >= LARGE_INPUT
        if self.transformer:
            first = last = image_size // 16 if large else (image_size + 2) // 3
            factor = 1
        else:
            stem = (4 if large else 1) * (2 if self.stem_pool else 1)
            factor = stem * 2 ** (self.stem_type + len(self.plan.reductions))
            first, last = image_size // stem, image_size // factor
        if image_size < 1 or image_size % factor:
            raise ArchitectureError(
                f"image_size {image_size} must be a positive multiple of {factor} for this network, so that "
                f"it is halved without a remainder: {self}"
            )
        return first, last

    def supports(self, image_size: int) -> bool:
        """Whether `build` takes `image_size`: every halving on the way must come out even."""
        try:
            self.sides(image_size)
        except ArchitectureError:
            return False
        return True

    def num_params(self, num_classes: int = 10, image_size: int = 32) -> int:
        """Parameters of `build(num_classes, image_size)`, used or not, by arithmetic alone."""
        return num_params(self, num_classes, image_size)

    def num_nodes(self) -> int:
        """Nodes of the graph that `ghn_init.trace` finds, by arithmetic alone."""
        return num_nodes(self)

    def graph(self, num_classes: int = 10, image_size: int = 32) -> Graph:
        """The graph that `ghn_init.trace` finds of `build(num_classes, image_size)`, some 100 times faster.

        Written from the specification, without a network: the same nodes, with the same parameters, and the
        same edges. Only the layers that the output does not depend on are missing in `unmatched`.

        Raises:
            ArchitectureError: `image_size` does not fit (see `supports`).
        """
        return graph_of(self, num_classes, image_size)

    def activations(self) -> int:
        """Elements of all feature maps for one image of 32 x 32, roughly: what a network's time goes by."""
        return activations(self)

    def build(self, num_classes: int = 10, image_size: int = 32, *, running_stats: bool = True) -> nn.Module:
        """Make the network; under `with torch.device("meta")` nothing is allocated or initialised.

        Args:
            num_classes: Outputs.
            image_size: Side of the square images in pixels; from 128 on the stem is ImageNet's.
            running_stats: Batch norms keep running statistics; without, they have no buffers and
                always normalise with those of the batch.

        Raises:
            ArchitectureError: `image_size` does not fit (see `supports`).
        """
        from ghn_init.deepnets._network import Network

        return Network(self, num_classes, image_size, running_stats=running_stats)

    def to_net_args(self) -> dict[str, Any]:
        """The dictionary of the published files, JSON-ready."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        genotype = {f.name: _listed(getattr(self.genotype, f.name)) for f in dataclasses.fields(Genotype)}
        return {**values, "genotype": genotype}

    @staticmethod
    def from_net_args(net_args: Mapping[str, Any]) -> Architecture:
        """The architecture of a published dictionary; `num_nodes` and `num_params` are passed over.

        Raises:
            ArchitectureError: A key is unknown or missing, or a value is not valid.
        """
        if not isinstance(net_args, Mapping):
            raise ArchitectureError(f"net_args: expected a dictionary, found {type(net_args).__name__}")
        known = {f.name for f in dataclasses.fields(Architecture)}
        unknown = sorted(set(net_args) - known - {"num_nodes", "num_params"})
        missing = sorted({"genotype", "n_cells"} - set(net_args))
        if unknown or missing:
            raise ArchitectureError(f"net_args: unknown keys {unknown}, missing keys {missing}")
        values = {key: value for key, value in net_args.items() if key in known}
        return Architecture(**{**values, "genotype": _genotype(values["genotype"])})


def _listed(value: Sequence[Any]) -> list[Any]:
    return [list(item) if isinstance(item, tuple) else item for item in value]


def _genotype(value: Mapping[str, Any]) -> Genotype:
    try:
        return Genotype(
            normal=_edges(value["normal"]),
            normal_concat=tuple(map(int, value["normal_concat"])),
            reduce=_edges(value["reduce"]),
            reduce_concat=tuple(map(int, value["reduce_concat"])),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ArchitectureError(
            "genotype: expected normal, normal_concat, reduce, reduce_concat, with [operation, state] "
            f"pairs and state numbers; {type(error).__name__}: {error}"
        ) from error


def _edges(value: Sequence[Any]) -> tuple[Edge, ...]:
    return tuple((str(name), int(state)) for name, state in value)


def _genotype_problems(genotype: Genotype) -> list[str]:
    problems: list[str] = []
    if not genotype.normal or len(genotype.normal) % 2 or len(genotype.normal) != len(genotype.reduce):
        problems.append("normal and reduce need the same even number of edges")
    for reduction in (False, True):
        where = "reduce" if reduction else "normal"
        for position, (name, state) in enumerate(genotype.edges(reduction=reduction)):
            if name not in OPERATIONS:
                problems.append(f"{where}[{position}]: unknown operation {name!r}")
            if not 0 <= state < position // 2 + 2:
                problems.append(f"{where}[{position}]: state {state} does not come before it")
        concat = genotype.concat(reduction=reduction)
        if not concat or any(not 2 <= state < genotype.steps + 2 for state in concat):
            problems.append(f"{where}_concat: {concat} are not states 2 to {genotype.steps + 1}")
    return problems


def _types(arch: Architecture) -> list[str]:
    """Fields beside the genotype of other types than declared."""
    expected = {"int": int, "bool": bool, "str | None": (str, type(None))}
    return [
        f"{field.name} = {value!r}, must be {field.type}"
        for field in dataclasses.fields(arch)
        if (wanted := expected.get(str(field.type))) is not None
        if not isinstance(value := getattr(arch, field.name), wanted)
        or (wanted is int and isinstance(value, bool))
    ]


def _problems(arch: Architecture) -> list[str]:
    """What is wrong with the fields beside the genotype, with the values that are right."""
    same_width = len(arch.genotype.normal_concat) == len(arch.genotype.reduce_concat) == arch.C_mult == 1
    rules: tuple[tuple[str, bool, str], ...] = (
        ("n_cells", arch.n_cells >= 1, "at least 1"),
        ("norm", arch.norm in ("bnorm", None), "'bnorm' or None"),
        ("ks", arch.ks >= 1 and arch.ks % 2 == 1, "odd"),
        ("stem_type", arch.stem_type in (0, 1), "0 or 1"),
        ("stem_pool", not (arch.stem_pool and arch.stem_type == 1), "False with stem_type 1"),
        ("C_mult", arch.C_mult >= 1, "at least 1"),
        ("fc_layers", arch.fc_layers in (1, 2), "1 or 2"),
        ("fc_dim", arch.fc_dim >= 1, "at least 1"),
        ("C", arch.C >= HEADS and arch.C % HEADS == 0, f"a positive multiple of {HEADS}"),
        ("preproc", arch.preproc or same_width, "True unless all cells have the same width"),
    )
    return [f"{name} = {getattr(arch, name)!r}, must be {right}" for name, good, right in rules if not good]
