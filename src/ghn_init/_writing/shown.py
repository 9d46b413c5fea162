"""What a GHN is shown of a network, and what of it stands for what it is not shown.

DeepNets-1M's networks read standardised images of three channels, their convolutions have no biases, and
their classifiers read what is pooled. A GHN that sees anything else predicts worse, even where the function
is the same: a small ResNet is right for 46 instead of 62 % of the test images untrained if it has biases
before its batch norms, for 9 if its classifier is a convolution whose scores are pooled. So the graph is
shown to it as it would be in DeepNets-1M:

- Biases before batch norms, norms of the images, and batch norms between a depthwise convolution and one of
  1 x 1 are left out, and get the values with which they do nothing more (straight before a batch norm a bias
  never does anything).
- A convolution that reads images of other channels is one that reads three, a grouped one reads all channels,
  and in networks with batch norms a linear layer that reads all places of feature maps reads their means.
  What is predicted for those inputs is written for the layer's own.
- A pooling of a classifier's scores is one of what it reads.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import torch

from ghn_init._graph import structure
from ghn_init._graph.graph import NORM_TYPES, Node, without
from ghn_init._hypernetwork.tile import Tile

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from ghn_init._graph.graph import Graph

_COLOURS: Final = 3
"""Channels of the images that GHNs have learned from."""


@dataclass(frozen=True)
class Shown:
    """A graph as a GHN is shown it.

    Attributes:
        graph: What it is shown.
        neutral: Tiles of the parameters that it is not shown, by name.
        refitted: The nodes whose weight it is shown with other inputs, as they are, by name.
    """

    graph: Graph
    neutral: Mapping[str, Tile]
    refitted: Mapping[str, Node]

    def as_used(self, tiles: Mapping[str, Tile]) -> dict[str, Tile]:
        """The GHN's tiles, with the inputs that the weights have."""
        return dict(tiles) | {
            name: _refitted(tiles[name], self.refitted[name]) for name in tiles.keys() & self.refitted
        }


def shown(graph: Graph, *, separable: bool = True) -> Shown:
    """What a GHN is shown of this graph.

    Args:
        graph: From `as_learned`.
        separable: Norms between a depthwise convolution and one of 1 x 1 are left out: not where directions
            alone are used, of a network that the GHN does not know.
    """
    unseen = structure.biases_before_norms(graph) | structure.norms_of_input(graph)
    if separable:
        unseen |= structure.norms_of_depthwise(graph)
    uses = Counter(node.param for node in graph.nodes)
    inputs = {index: count for index, count in _other_inputs(graph) if uses[graph.nodes[index].param] == 1}
    poolings = {
        index: Node("glob_avg") for index in inputs
        if structure.is_linear(graph.nodes[index])
        if not structure.is_pooled(graph, index)
    }  # fmt: skip
    nodes = tuple(
        _with_inputs(node, inputs[index]) if index in inputs else node
        for index, node in enumerate(graph.nodes)
    )
    left = without(replace(graph, nodes=nodes), unseen, poolings)
    return Shown(
        _pooled_first(left, _before_pooling(graph)),
        {
            name: Tile(
                torch.full(node.shape, value, dtype=torch.float32), node.shape, node.stored or node.shape
            )
            for node in (graph.nodes[index] for index in unseen)
            for name, value in ((node.param, float(node.type in NORM_TYPES)), (node.bias, 0.0))
            if name is not None and node.shape is not None
        },
        {node.param: node for node in (graph.nodes[index] for index in inputs) if node.param is not None},
    )


# Other inputs


def _other_inputs(graph: Graph) -> Iterator[tuple[int, int]]:
    """The weights that are shown with another number of inputs than theirs, by index, with that number."""
    stems = structure.stems(graph)
    means = structure.predicted_for_means(graph)
    for index, read in enumerate(structure.channels_read(graph)):
        node = graph.nodes[index]
        if node.shape is None or node.transposed:
            continue
        if index in stems:
            if node.shape[1] != _COLOURS:
                yield index, _COLOURS
        elif math.isfinite(read) and (
            (means and structure.places_read(graph, index, read) > 1)
            or (structure.is_grouped(node) and _divides(node.shape[1], read)
                and _divides(read // node.shape[1], node.shape[0]))
        ):  # fmt: skip
            yield index, int(read)


def _divides(part: float, whole: float) -> bool:
    return part < whole and whole % part == 0


def _with_inputs(node: Node, count: int) -> Node:
    assert node.shape is not None  # see `_other_inputs`
    return replace(node, type="conv", shape=(node.shape[0], count, *node.shape[2:]))


def _refitted(tile: Tile, node: Node) -> Tile:
    """A prediction for other inputs, for those of the node."""
    assert node.shape is not None  # see `_other_inputs`
    if structure.is_linear(node):
        places = node.shape[1] // tile.shape[1]
        values = tile.values.repeat_interleave(places, 1) / places
    elif node.type == "conv":
        values = _for_channels(tile.values, node.shape[1])
    else:
        values = _in_groups(tile.values, node.shape, tile.shape[1])
    return Tile(values, node.shape, node.stored or node.shape)


def _for_channels(values: Tensor, count: int) -> Tensor:
    """Filters for three channels, summed for one; for more they repeat, smaller by as much."""
    return values.sum(1, keepdim=True) if count == 1 else values[:, :count] * (_COLOURS / count)


def _in_groups(values: Tensor, shape: tuple[int, ...], channels: int) -> Tensor:
    """Of filters for all channels those that read an output's own group, larger for the others' sake.

    Args:
        values: What repeats of the weight for all channels, (a, b, k, k).
        shape: The grouped weight's, (out, in, k, k).
        channels: How many there are, of which a group has `in`.

    Returns:
        What repeats of the grouped weight: rows until both the outputs and the groups' first channels begin
        again.
    """
    outputs, inputs = shape[:2]
    rows, columns = values.shape[:2]
    groups = channels // inputs
    of_group = outputs // groups
    period = math.lcm(rows, of_group * columns // math.gcd(columns, inputs))
    output = torch.arange(min(outputs, period), device=values.device)
    first = output // of_group * inputs
    column = torch.arange(min(inputs, columns), device=values.device)
    return values[(output % rows)[:, None], (first[:, None] + column) % columns] * math.sqrt(groups)


# The classifier


def _before_pooling(graph: Graph) -> int:
    """How many nodes of a classifier, its weight and its bias, stand before the last pooling of its scores.

    0 if its scores go through an activation before, or anything else is between.
    """
    last = len(graph) - 1
    weight = last - 2 if graph.nodes[last - 1].type == "bias" else last - 1
    chain = range(max(0, weight), last)
    if graph.nodes[last].type != "glob_avg" or not structure.is_pointwise(graph.nodes[weight]):
        return 0
    in_a_row = all(graph.successors[index] == (index + 1,) for index in chain)
    return len(chain) if in_a_row and not graph.rectified.intersection(chain) else 0


def _pooled_first(graph: Graph, count: int) -> Graph:
    """The graph with its last node before the so many before it, which stand in a row, so that edges stay."""
    first = len(graph) - 1 - count
    return replace(graph, nodes=(*graph.nodes[:first], graph.nodes[-1], *graph.nodes[first:-1]))
