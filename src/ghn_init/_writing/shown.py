"""What a GHN is shown of a network, and what of it stands for what it is not shown.

DeepNets-1M's networks read standardised images of three channels, and their convolutions have no biases. A
GHN that sees anything else predicts worse, even where the function is the same: a small ResNet is right for
46 instead of 62 % of the test images untrained if it has biases before its batch norms, for 16 if there is a
batch norm of the images, for 14 instead of 51 if these are grey. So the graph is shown to it as it would be
in DeepNets-1M:

- Biases before batch norms, and batch norms that read the images, are left out, and get the values with which
  they do nothing (straight before a batch norm a bias never does anything).
- A convolution that reads grey images is one that reads three channels. Its prediction is summed over them,
  which is what that one does with the same image in all three.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import torch

from ghn_init._graph import structure
from ghn_init._graph.graph import without
from ghn_init._hypernetwork.tile import Tile

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ghn_init._graph.graph import Graph, Node

_COLOURS: Final = 3
"""Channels of the images that GHNs have learned from."""


@dataclass(frozen=True)
class Shown:
    """A graph as a GHN is shown it.

    Attributes:
        graph: What it is shown.
        neutral: Tiles of the parameters that it is not shown, by name.
        grey: The nodes of the convolutions that are shown with three channels for one, by name.
    """

    graph: Graph
    neutral: Mapping[str, Tile]
    grey: Mapping[str, Node]

    def as_used(self, tiles: Mapping[str, Tile]) -> dict[str, Tile]:
        """The GHN's tiles, those of convolutions that read grey images for the one channel that they read."""
        return dict(tiles) | {
            name: _summed(tiles[name], self.grey[name]) for name in tiles.keys() & self.grey
        }


def shown(graph: Graph) -> Shown:
    """What a GHN is shown of this graph."""
    unseen = structure.biases_before_norms(graph) | structure.norms_of_input(graph)
    uses = Counter(node.param for node in graph.nodes)
    grey = {
        index: graph.nodes[index]
        for index in structure.grey_stems(graph)
        if uses[graph.nodes[index].param] == 1
    }
    nodes = tuple(
        replace(node, shape=_coloured(node.shape or ())) if index in grey else node
        for index, node in enumerate(graph.nodes)
    )
    return Shown(
        without(replace(graph, nodes=nodes) if grey else graph, unseen),
        {
            name: Tile(
                torch.full(node.shape, value, dtype=torch.float32), node.shape, node.stored or node.shape
            )
            for node in (graph.nodes[index] for index in unseen)
            for name, value in ((node.param, float(node.type == "bn")), (node.bias, 0.0))
            if name is not None and node.shape is not None
        },
        {node.param: node for node in grey.values() if node.param is not None},
    )


def _coloured(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0], _COLOURS, *shape[2:])


def _summed(tile: Tile, node: Node) -> Tile:
    assert node.shape is not None  # see `structure.grey_stems`
    return Tile(tile.values.sum(1, keepdim=True), node.shape, node.stored or node.shape)
