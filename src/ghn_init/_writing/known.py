"""Which networks a GHN knows, well enough to train from its predictions at nearly their own scale.

Those are image classifiers of plain convolutions, batch norms and poolings, and of DARTS' cells, as in
DeepNets-1M: with batch norm, but for a few weights, or without ways around any weight.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from ghn_init._graph import structure
from ghn_init._graph.graph import LAYER_TYPES, NORM_TYPES
from ghn_init._writing.entry import Cause
from ghn_init._writing.familiarity import reads_images
from ghn_init._writing.levels import rises

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from ghn_init._graph.graph import Graph
    from ghn_init._writing.entry import Entry

PLAIN: Final = frozenset({"input", "conv", "bias", "bn", "sum", "concat", "max_pool", "avg_pool", "glob_avg"})
"""Types of node of plain networks."""

_CELLS: Final = PLAIN | {"sep_conv", "dil_conv", "cse", "msa", "ln", "pos_enc"}
"""Types of node of the networks whose scales are predicted, if they are used as DeepNets-1M does."""

_MOST_BARE: Final = 8
"""Weights without batch norm in a network whose scales are predicted: errors of scale multiply. More are
allowed where no way leads around them, see `_is_in_rows`."""

_BLOCK: Final = 64 * 64
"""Elements of a prediction for a linear layer, at most, in usual GHNs."""

_MOST_COPIES: Final = 64
"""How often the prediction of a weight without batch norm repeats at most, in such a network, because copies
add up to one another. Where no way leads around the weights it may repeat as often as it does."""


def as_learned(graph: Graph) -> Graph:
    """The graph as a GHN reads it, where other types of node mean the same to it. They keep their numbers.

    A pooling before the classifier that leaves one position is a global one, and norms of the images are
    batch norms. Group norms of feature maps, which take the scale out of what they read too, are batch norms,
    if the network is of the kind that a GHN knows then; `Graph.grouped` still says which they are.
    """
    graph = _retyped(graph, structure.last_poolings(graph), "glob_avg", shape=None)
    graph = _retyped(graph, structure.norms_of_input(graph), "bn")
    learned = _retyped(graph, graph.grouped, "bn")
    return learned if is_of_the_kind(learned) else graph


def _retyped(graph: Graph, indices: Collection[int], kind: str, **changes: None) -> Graph:
    """The graph with these nodes of another type."""
    if not indices:
        return graph
    nodes = enumerate(graph.nodes)
    return replace(
        graph, nodes=tuple(replace(n, type=kind, **changes) if i in indices else n for i, n in nodes)
    )


def is_known(graph: Graph, entries: Sequence[Entry]) -> bool:
    """Whether a network is of the kind whose scales a GHN has learned, before anything is predicted.

    Args:
        graph: The network's graph.
        entries: From `select`.
    """
    return is_of_the_kind(graph) and not _is_too_sure(graph, entries)


def is_of_the_kind(graph: Graph) -> bool:
    """The same as far as the graph alone tells."""
    return _is_made_of_cells(graph) and (_is_in_rows(graph) or _has_few(graph, _bare(graph)))


def _is_too_sure(graph: Graph, entries: Sequence[Entry]) -> bool:
    """Whether a classifier is kept that reads what group norms give, at predicted scale.

    They leave all images' features much in common, which a predicted classifier expects.
    """
    ends = {graph.nodes[weight].param for weight, _ in graph.heads} if graph.grouped else set()
    return any(entry.key in ends and not entry.decision.predict for entry in entries)


def scales_are_known(graph: Graph, entries: Sequence[Entry]) -> bool:
    """The same once predictions are there, which must not repeat too often where no norm follows them.

    But for group norms the last layer itself may be kept, because the GHN knows none of its width say.

    Args:
        graph: The network's graph.
        entries: With what is predicted.
    """
    if not _is_made_of_cells(graph) or _is_too_sure(graph, entries) or _begins_silent(graph, entries):
        return False
    if _is_in_rows(graph):  # the outputs are made small, however they came to be large
        return True
    bare = _bare(graph)
    few = all(copies(entry) <= _MOST_COPIES for entry in entries if entry.key in bare)
    return few and _has_few(graph, bare)


def _begins_silent(graph: Graph, entries: Sequence[Entry]) -> bool:
    """Whether norms are kept, because they begin at zero, in a network with grouped convolutions.

    A RegNet-Y whose branches begin silent was at 1.05 with SGD at predicted scale, at 0.98 at its own.
    """
    silent = any(entry.node == "bn" and entry.decision.cause is Cause.OWN for entry in entries)
    return silent and structure.has_groups(graph)


def _has_few(graph: Graph, bare: Collection[str | None]) -> bool:
    """Whether activations meet so few weights without batch norm that errors of scale do not grow.

    One that reads, however far behind, what it gives multiplies them again and again, and cannot take a
    factor against them at each of its places.
    """
    above: list[frozenset[str | None]] = []
    for node, sources in zip(graph.nodes, graph.predecessors, strict=True):
        met = frozenset().union(*(above[source] for source in sources))
        if node.param is not None and node.param in met:
            return False
        above.append(met | {node.param} if node.param in bare else met)
    return len(bare) <= _MOST_BARE


def copies(entry: Entry) -> float:
    """How often the prediction repeats in the parameter; 1 without one."""
    return 1.0 if entry.tile is None else math.prod(entry.tile.shape) / entry.tile.values.numel()


def _is_made_of_cells(graph: Graph) -> bool:
    """Whether the network is of the kind that a GHN has learned from, a classifier made as DeepNets-1M's are.

    Those have depthwise convolutions, gates and attention, too, but only as DARTS' cells do: a depthwise
    convolution goes into one of 1 x 1, straight or with what a GHN is not shown between, and attention is a
    block with layer norms amid convolutions with batch norms. Grouped convolutions are shown as usual ones.
    What becomes of a scale that the network itself changes again, no GHN has learned.
    """
    if graph.rescaled:
        return False
    kinds = {node.type for node in graph.nodes}
    if not kinds <= _CELLS or any(node.transposed for node in graph.nodes):
        return False
    if not reads_images(graph) or not _classifies(graph) or structure.has_strangers(graph):
        return False
    if kinds & {"msa", "ln"} and not {"msa", "ln", "bn"} <= kinds:
        return False
    between = structure.norms_of_depthwise(graph)
    if between and not _fit(graph):
        return False
    return all(
        structure.is_grouped(node)
        or all(
            target in between or structure.is_pointwise(graph.nodes[target])
            for target in graph.successors[index]
        )
        for index, node in enumerate(graph.nodes)
        if node.type in ("sep_conv", "dil_conv")
    )


def _fit(graph: Graph) -> bool:
    """Whether predictions do not repeat too often in weights without batch norm, as far as shapes tell.

    `scales_are_known` sees the predictions. But how a network with norms behind depthwise convolutions is
    shown has to be decided before: a MobileNet-V3, whose hidden layer is too wide, is better shown as it is.
    """
    bare = _bare(graph)
    sizes = [math.prod(node.shape or ()) for node in graph.nodes if node.param in bare]
    return max(sizes, default=0) <= _MOST_COPIES * _BLOCK


def _classifies(graph: Graph) -> bool:
    """Whether it ends in linear layers, or in convolutions whose scores, or what they read, are pooled."""
    last = {graph.nodes[weight].param for weight, _ in graph.heads}
    pooled = graph.nodes[-1].type == "glob_avg"
    return bool(last) and all(
        pooled or _gives_one_position(graph, index)
        for index, node in enumerate(graph.nodes)
        if node.param in last and node.type == "conv"
    )


def _gives_one_position(graph: Graph, index: int) -> bool:
    """Whether a layer is linear, or a convolution of what a global pooling gives."""
    pooled = all(graph.nodes[source].type == "glob_avg" for source in graph.predecessors[index])
    return pooled or structure.is_linear(graph.nodes[index])


def _is_in_rows(graph: Graph) -> bool:
    """Whether there are no norm layers, and no way around a weight, so that outputs can be made small.

    Then errors of scale multiply, too, but each layer takes its share of a factor against them (`calm.py`).
    Residual networks without norm grow from block to block, whatever their first and last layer are.
    """
    if any(node.type in NORM_TYPES for node in graph.nodes):
        return False
    gates = structure.gates(graph)
    weights = {
        index for index, node in enumerate(graph.nodes) if node.type in LAYER_TYPES and not gates[index]
    }
    steps, _ = rises(graph, {graph.nodes[index].param for index in weights})
    return steps.keys() == weights and all(steps.values())


def _bare(graph: Graph) -> set[str | None]:
    """Weights of convolutions and linear layers whose scale nothing takes out of what they give.

    That is neither a batch norm, if need be behind a second convolution, nor a gate or a block of attention.
    """
    normalised, attending = structure.normalised(graph), structure.attending(graph)
    gates, ends = structure.gates(graph), structure.head_params(graph)
    return {
        node.param
        for index, node in enumerate(graph.nodes)
        if node.type == "conv" and node.param not in ends
        if not (normalised[index] or gates[index] or attending[index])
        if not graph.successors[index]
        or not all(
            normalised[after] and graph.nodes[after].type == "conv" for after in graph.successors[index]
        )
    }
