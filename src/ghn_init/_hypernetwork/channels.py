"""Which place of the decoded block every channel has: what makes weights of any width fit together.

A decoded block has 64 x 64 channels at most and repeats along both axes of a larger weight. So channel c of
what a layer gives has place c mod 64, and a layer behind it reads it with the column of that place. Behind a
concatenation channels are counted on: those of a second part of 80 begin at place 16, and whatever a GHN has
learned to carry through a network at the place where a feature stands is lost. Networks whose width is no
multiple of 32 were up to ten points less accurate for that (docs/experiments.md).

With `GHNConfig.aligned` a part of a concatenation that does not fit into what is left of a block begins a
block of its own, and all channels keep the places that they had. They then stand in *stretches*, each of
which begins at place 0: a tuple of their lengths, `(80, 80)` of two parts of 80 channels, `(128,)` of two of
64. Where some places have more channels than others, each place's share in a sum is made the same (`shares`).
A linear layer that reads flattened feature maps has as many inputs of each channel as they have pixels, and
is predicted for their means (`structure.places_read`): counted on, the columns of a block would stand for
pixels, and all channels would be added up.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from ghn_init._graph.graph import LAYER_TYPES, NORM_TYPES

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Sequence

    from torch import Tensor

    from ghn_init._graph.graph import Graph, Node


def stretches_read(graph: Graph, most: int, counted_on: Container[int]) -> list[tuple[int, ...]]:
    """For every node the stretches of the channels that it reads; () where nobody knows them.

    Args:
        graph: Any.
        most: Channels of the largest block.
        counted_on: The concatenations whose parts are one output in pieces, as those of a factorised
            reduction are.
    """
    given: list[tuple[int, ...]] = []
    found: list[tuple[int, ...]] = []
    for index, (node, sources) in enumerate(zip(graph.nodes, graph.predecessors, strict=True)):
        read = [given[source] for source in sources]
        if node.type != "concat":
            found.append(_agreed(read))
        elif index in counted_on:
            found.append((sum(map(sum, read)),))
        else:
            found.append(side_by_side(read, most))
        given.append(_given(node, found[-1]))
    return found


def side_by_side(parts: Sequence[tuple[int, ...]], most: int) -> tuple[int, ...]:
    """The stretches of a concatenation; () if those of a part are not known."""
    if not all(parts):
        return ()
    whole: list[int] = []
    for part in parts:
        used = whole[-1] % most if whole else 0
        fits = bool(whole) and (used == 0 or (len(part) == 1 and used + part[0] <= most))
        if fits:
            whole[-1] += part[0]
        whole += part[int(fits) :]
    return tuple(whole)


def _agreed(read: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    """Those of several inputs that are added up: where they differ, channels count as a layer's own do."""
    known = {stretches for stretches in read if stretches}
    if len(known) == 1:
        return next(iter(known))
    sums = {sum(stretches) for stretches in known}
    return (next(iter(sums)),) if len(sums) == 1 else ()


def _given(node: Node, read: tuple[int, ...]) -> tuple[int, ...]:
    """The stretches of what a node gives, of what it reads."""
    if node.shape is None or node.type not in LAYER_TYPES | NORM_TYPES | {"bias"}:
        return read
    return read if axis_of(node.shape) == 0 and sum(read) == node.shape[0] else (node.shape[0],)


def axis_of(shape: Sequence[int]) -> int:
    """The axis of a parameter along which the channels stand that its layer reads.

    Its first, if the layer gives as many as it reads, each by itself: a vector, a depthwise convolution.
    """
    return 0 if len(shape) == 1 or shape[1] == 1 else 1


def of_parameter(shape: Sequence[int], read: tuple[int, ...]) -> tuple[int, ...]:
    """The stretches along a parameter's `axis_of`, () where it is one: `read`, if it is about this axis."""
    return read if len(read) > 1 and sum(read) == shape[axis_of(shape)] else ()


@lru_cache(maxsize=1024)
def per_place(stretches: tuple[int, ...], size: int) -> tuple[int, ...]:
    """How many channels each place of a block of so many has."""
    return tuple(sum(len(range(place, length, size)) for length in stretches) for place in range(size))


@lru_cache(maxsize=256)
def shares(stretches: tuple[int, ...], size: int) -> Tensor | None:
    """What the columns of a block are multiplied by so that all places have the same share; None: as it is.

    Places with two channels count no more than those with one then. The mean over the channels is 1.
    """
    counts = torch.tensor(per_place(stretches, size), dtype=torch.float32)
    if bool((counts == counts[0]).all()):
        return None
    return counts.sum() / size / counts
