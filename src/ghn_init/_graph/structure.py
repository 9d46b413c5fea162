"""What is told of a node by the nodes before and behind it, which the GHN's own features do not say.

Every function that says "for every node" gives a list with a value for each.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from ghn_init._graph.graph import LAYER_TYPES, NORM_TYPES, SLOPE, WEIGHT_TYPES

if TYPE_CHECKING:
    from ghn_init._graph.graph import Graph, Node

_FILTERS: Final = 4
"""Dimensions of the weight of a convolution over images."""

_MATRIX: Final = 2
"""Dimensions of the weight of a linear layer."""

_PASSING: Final = frozenset({"bias", "sum", "concat", "max_pool", "avg_pool"})
"""Types of node behind which a batch norm still normalises what a weight gives."""


def normalised(graph: Graph) -> list[bool]:
    """For every node whether all that it gives goes through a batch norm before another weight reads it."""
    found = [False] * len(graph)
    for index in range(len(graph) - 1, -1, -1):
        after = [(graph.nodes[target].type, found[target]) for target in graph.successors[index]]
        found[index] = bool(after) and all(
            kind == "bn" or (kind in _PASSING and is_normalised) for kind, is_normalised in after
        )
    return found


def biases_before_norms(graph: Graph) -> set[int]:
    """The biases of weights that batch norms follow: DeepNets-1M's convolutions have none.

    Straight before a batch norm a bias does nothing, since the norm takes it out again.
    """
    after = normalised(graph)
    return {index for index, node in enumerate(graph.nodes) if node.type == "bias" and after[index]}


def norms_of_input(graph: Graph) -> set[int]:
    """The norms that read images alone, which DeepNets-1M's networks get standardised."""
    return {
        index for index, node in enumerate(graph.nodes)
        if node.type in NORM_TYPES and graph.predecessors[index] == (0,)
        if node.type == "bn" or all(_is_filters(graph.nodes[target]) for target in graph.successors[index])
    }  # fmt: skip


def last_poolings(graph: Graph) -> set[int]:
    """The poolings that leave one position, for linear layers or as the network's end."""
    return {
        index for index in graph.single
        if all(is_pointwise(graph.nodes[target]) for target in graph.successors[index])
    }  # fmt: skip


def norms_of_depthwise(graph: Graph) -> set[int]:
    """The batch norms between a depthwise convolution and those of 1 x 1, as in MobileNets, gated or not.

    In DeepNets-1M nothing is between the two.
    """
    gating = gates(graph)
    return {
        index for index, node in enumerate(graph.nodes)
        if node.type == "bn" and graph.predecessors[index] and graph.successors[index]
        if all(is_depthwise(graph.nodes[source]) for source in graph.predecessors[index])
        if all(
            gating[target] or graph.nodes[target].type == "cse" or is_pointwise(graph.nodes[target])
            for target in graph.successors[index]
        )
    }  # fmt: skip


def is_linear(node: Node) -> bool:
    """Whether a node is a linear layer."""
    return node.type == "conv" and len(node.shape or ()) == _MATRIX


def is_depthwise(node: Node) -> bool:
    """Whether a node is a convolution of each channel for itself."""
    return node.type in ("sep_conv", "dil_conv") and node.shape is not None and node.shape[1] == 1


def is_grouped(node: Node) -> bool:
    """Whether a node is a convolution of several channels in each of several groups, over images."""
    return (
        node.type in ("sep_conv", "dil_conv") and len(node.shape or ()) == _FILTERS and not is_depthwise(node)
    )


def has_groups(graph: Graph) -> bool:
    """Whether there are grouped convolutions, other than depthwise ones."""
    return any(is_grouped(node) for node in graph.nodes)


def is_pointwise(node: Node) -> bool:
    """Whether a node is a convolution of 1 x 1, or a linear layer."""
    return node.type == "conv" and node.shape is not None and math.prod(node.shape[2:]) == 1


def stems(graph: Graph) -> set[int]:
    """The convolutions that read images, straight or behind norms of the images."""
    images = {0} | norms_of_input(graph)
    return {
        index for index, node in enumerate(graph.nodes)
        if _is_filters(node) and images.issuperset(graph.predecessors[index])
    }  # fmt: skip


def _is_filters(node: Node) -> bool:
    return node.type == "conv" and len(node.shape or ()) == _FILTERS


def gates(graph: Graph) -> list[bool]:
    """For every node whether it serves to compute a gate: of what a `cse` joins the one that comes last."""
    found = [False] * len(graph)
    for index in range(len(graph) - 1, -1, -1):
        after = graph.successors[index]
        found[index] = bool(after) and all(
            found[target] or (graph.nodes[target].type == "cse" and graph.predecessors[target][0] != index)
            for target in after
        )
    return found


def attending(graph: Graph) -> list[bool]:
    """For every node whether it is part of a block of attention.

    That is behind a layer norm or an `msa`, up to the sum with what the block reads.
    """
    found: list[bool] = []
    for node, sources in zip(graph.nodes, graph.predecessors, strict=True):
        inside = node.type in ("ln", "msa") or any(found[source] for source in sources)
        found.append(inside and node.type != "sum")
    return found


def behind_skips(graph: Graph) -> list[bool]:
    """For every node whether it reads, or is, a join of feature maps that were enlarged with others.

    There a U-Net's decoder begins. A GHN has learned from classifiers, whose maps only become smaller.
    """
    enlarged = graph.enlarged - {0}  # images that are enlarged before anything reads them are images
    decoding: list[bool] = []
    behind: list[bool] = []
    for node, sources in zip(graph.nodes, graph.predecessors, strict=True):
        branches = {decoding[s] or s in enlarged for s in sources if graph.nodes[s].type != "pos_enc"}
        decoding.append(True in branches or (node.transposed and len(node.shape or ()) > 2))
        behind.append(len(branches) > 1 or any(behind[s] for s in sources))
    return behind


def one_pixel_wide(graph: Graph) -> list[bool]:
    """For every node whether it is, or is behind, a filter wider than its image that gives one pixel."""
    found: list[bool] = []
    for index, sources in enumerate(graph.predecessors):
        rows = graph.cropped.get(index)
        gives_one = rows is not None and all(len(places) == 1 for places in rows)
        found.append(gives_one or any(found[source] for source in sources))
    return found


def reads_places(graph: Graph) -> list[bool]:
    """For every node whether it is a linear layer with a weight for every place of the feature maps it reads.

    That is, it has more inputs than they have channels. Of images nobody knows how many channels they have.
    """
    return [
        is_linear(node) and node.shape is not None and node.shape[1] > channels
        and not (is_pooled(graph, index) and places_read(graph, index, channels) == 1)
        for index, (node, channels) in enumerate(zip(graph.nodes, channels_read(graph), strict=True))
    ]  # fmt: skip


def places_read(graph: Graph, index: int, channels: float) -> int:
    """How many inputs a linear layer has of every channel: more than one where it reads flattened maps.

    Behind a global pooling there are none, or a square grid of them. Other numbers are of what has no node:
    parts of a concatenation that are all zeros, as a state without operations gives in DeepNets-1M.

    Args:
        graph: Any.
        index: Of any node; it is 1 for those that are no linear layers.
        channels: How many it reads, infinity or 0 where nobody knows.
    """
    node = graph.nodes[index]
    if not is_linear(node) or node.transposed or node.shape is None or not 0 < channels < math.inf:
        return 1
    places, rest = divmod(node.shape[1], int(channels))
    if rest or (is_pooled(graph, index) and math.isqrt(places) ** 2 != places):
        return 1
    return max(places, 1)


def is_pooled(graph: Graph, index: int) -> bool:
    """Whether all that a node reads is pooled over all places, or over each of a grid."""
    sources = graph.predecessors[index]
    return bool(sources) and all(graph.nodes[source].type == "glob_avg" for source in sources)


def channels_read(graph: Graph) -> list[float]:
    """For every node how many channels it reads; infinity where nobody knows, as of images."""
    given: list[float] = []
    found: list[float] = []
    for node, sources in zip(graph.nodes, graph.predecessors, strict=True):
        read = [given[source] for source in sources]
        found.append(sum(read) if node.type == "concat" else max(read, default=math.inf))
        given.append(node.shape[0] if node.type in LAYER_TYPES | NORM_TYPES and node.shape else found[-1])
    return found


def has_batch_norms(graph: Graph) -> bool:
    """Whether there is a batch norm, so that the scale of what most layers give is taken out."""
    return any(node.type == "bn" for node in graph.nodes)


def predicted_for_means(graph: Graph) -> bool:
    """Whether what is predicted for a linear layer that `reads_places` is for the means of its feature maps.

    So it is in networks with batch norms; in others it made some train worse (docs/starting-point.md). What a
    layer without a node gives, a recurrent one say, are no places of feature maps.
    """
    return has_batch_norms(graph) and not has_strangers(graph)


def reads_weights_alone(graph: Graph, index: int) -> bool:
    """Whether all that a node reads comes straight from convolutions, those of a factorised reduction too."""
    sources = graph.predecessors[index]
    return bool(sources) and all(
        graph.nodes[source].type in WEIGHT_TYPES
        or (graph.nodes[source].type in ("bias", "concat") and reads_weights_alone(graph, source))
        for source in sources
    )


def has_strangers(graph: Graph) -> bool:
    """Whether there are parameters that no node stands for and that count; an activation's slope does not."""
    return any(stranger.used and stranger.role != SLOPE for stranger in graph.unmatched)


def head_params(graph: Graph) -> set[str | None]:
    """The parameters of the layers that end the network, weights and biases: see `Graph.heads`."""
    return {graph.nodes[index].param for indices in graph.heads for index in indices if index is not None}
