"""What `scale="auto"` means: as much of the predictions as is good for training the network.

`scale.py` takes the directions alone, at the layers' own scale, which is the least harm to networks of
every kind. A GHN also knows the scales of what it has learned from, and there they are worth as much again:
in image classifiers of plain convolutions, batch norms and poolings, and of DARTS' cells, as in DeepNets-1M.
In layers that it has not learned from the directions are noise that repeats, and worse than the independent
values of an initialisation. The graph tells the one and the other; docs/familiarity.md has
the measurements, docs/starting-point.md the trials.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from ghn_init._graph.graph import NORM_TYPES, WEIGHT_TYPES
from ghn_init._writing.entry import spare
from ghn_init._writing.familiarity import UNUSED, reads_images
from ghn_init._writing.levels import rises
from ghn_init._writing.scale import NORM, at_most_own_scale, at_own_scale, with_own_scales

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from ghn_init._graph.graph import Graph, Node
    from ghn_init._writing.entry import Entry
    from ghn_init._writing.options import Options

_PLAIN: Final = frozenset(
    {"input", "conv", "bias", "bn", "sum", "concat", "max_pool", "avg_pool", "glob_avg"}
)
"""Types of node of plain networks."""

_CELLS: Final = _PLAIN | {"sep_conv", "dil_conv", "cse", "msa", "ln", "pos_enc"}
"""Types of node of the networks whose scales are predicted, if they are used as DeepNets-1M does."""

_PASSING: Final = frozenset({"bias", "sum", "concat", "max_pool", "avg_pool"})
"""Types of node behind which a batch norm still normalises what a weight gives."""

_MOST_BARE: Final = 8
"""Weights without batch norm in a network whose scales are predicted: errors of scale multiply. More are
allowed where no way leads around them, see `_is_in_rows`."""

_MOST_COPIES: Final = 64
"""How often the prediction of a weight without batch norm repeats at most, in such a network, because copies
add up to one another. Where no way leads around the weights it may repeat as often as it does."""

_FEW_COPIES: Final = 4
"""How often the prediction of a classifier repeats at most, to be at predicted scale: 256 features."""

_EARLY: Final = 1 / 3
"""Share of the weights, from the input on, whose features are good for any task: of those before batch norms
the ones that are as large as predicted (large weights turn slowly), and in unknown networks whose branches
meet the ones that are predicted."""

_BEHIND_SKIP: Final = "it is behind a skip connection to a decoder (scale='auto')"
_BEHIND_LAYER_NORM: Final = "it reads a layer norm (scale='auto')"
_BEHIND_ATTENTION: Final = "it reads an attention (scale='auto')"
_BEFORE_LAYER_NORMS: Final = "it reads the input of a network with layer norms (scale='auto')"
_GATE: Final = "it is a gate (scale='auto')"
_ONE_PIXEL: Final = "its feature maps are one pixel wide (scale='auto')"
_NO_IMAGES: Final = "its network reads no images (scale='auto')"
_LATE: Final = "it is behind the first third of a network whose branches meet (scale='auto')"
_NOTHING_TAKES_SCALE: Final = "no batch norm takes its scale out of what it gives (scale='auto')"
_NOT_BEHIND_WEIGHTS: Final = "a norm that reads no convolution (scale='auto')"
_BARE_TRANSPOSED: Final = "a transposed convolution without batch norm (scale='auto')"


def worth_predicting(
    network: nn.Module, graph: Graph, entries: Sequence[Entry], options: Options
) -> list[Entry]:
    """The same entries; those are kept that had better not be predicted, so that nothing is decoded for them.

    Where the ranks of a sharded network hold parts of a parameter, all have to call this.

    Args:
        network: The network, with the values whose scale counts.
        graph: Its graph.
        entries: From `select`.
        options: The caller's choices.
    """
    if options.scale == "own":
        return with_own_scales(network, graph, entries, options, {})
    known = options.diversify != "orthogonal" and _is_known(graph)
    strange = _strange(graph, known=known)
    if known:
        return with_own_scales(network, graph, entries, options, {**strange, **_elsewhere(graph)}, ())
    return with_own_scales(network, graph, entries, options, strange)


def ready_to_train(graph: Graph, entries: Sequence[Entry], options: Options) -> list[Entry]:
    """The same entries, their predictions at the scale that is good for training.

    Where the ranks of a sharded network hold parts of a parameter, all have to call this.

    Args:
        graph: The network's graph.
        entries: From `with_predictions`, of what `worth_predicting` gave.
        options: The caller's choices.
    """
    if options.scale == "own" or options.diversify == "orthogonal":
        return at_own_scale(entries, options)
    if not scales_are_known(graph, entries):
        return at_own_scale([_with_own_norm(entry) for entry in entries], options)
    return at_most_own_scale(_with_own_classifiers(graph, entries, options), _late(graph))


def _late(graph: Graph) -> set[str | None]:
    """Weights before batch norms behind the first `_EARLY` of them.

    A batch norm takes the scale of a weight out of what it gives, but the same step turns a larger weight
    less: a prediction of six times the own scale, as in a small ResNet, learns as at a rate of a 36th.
    Features of the first layers are good for other tasks too, those of the last ones less (compare Yosinski
    et al. 2014, arXiv 1411.1792), and so these are to turn as fast as from the network's own initialisation.
    """
    normalised = _normalised(graph)
    weights = [
        n.param for n, after in zip(graph.nodes, normalised, strict=True) if after and n.type in WEIGHT_TYPES
    ]
    return set(weights[math.ceil(_EARLY * len(weights)) :])


def _with_own_norm(entry: Entry) -> Entry:
    """The same, kept if it is a norm layer's and there are values to keep: it is not of a known network."""
    lost = entry.own is None and entry.param.is_meta
    if entry.node not in NORM_TYPES or entry.tile is None or lost:
        return entry
    return replace(entry, decision=spare(NORM), tile=None)


def _with_own_classifiers(graph: Graph, entries: Sequence[Entry], options: Options) -> list[Entry]:
    """The same entries, classifiers of many copies at their own scale, for `calmed` to lessen.

    They read copies of the features, which agree, and so at predicted scale a ResNet-50 begins at a loss of
    4.1, sure of what it does not know. Untrained accuracy is no reason for that scale, since the largest
    output stays the largest.
    """
    ends = {graph.nodes[weight].param for weight, _ in graph.heads}
    many = [entry for entry in entries if entry.key in ends and _copies(entry) > _FEW_COPIES]
    own = {entry.source: entry for entry in at_own_scale(many, options)}
    return [own.get(entry.source, entry) for entry in entries]


def _copies(entry: Entry) -> float:
    """How often the prediction repeats in the parameter; 1 without one."""
    return 1.0 if entry.tile is None else math.prod(entry.tile.shape) / entry.tile.values.numel()


def scales_are_known(graph: Graph, entries: Sequence[Entry]) -> bool:
    """Whether a network is of the kind whose scales a GHN has learned, well enough to train from them.

    Those are image classifiers made as DeepNets-1M's, with batch norm, shallow or without ways around.
    The last layer itself may be kept, because the GHN knows none of its width say.

    Args:
        graph: The network's graph.
        entries: With what is predicted.
    """
    if not _is_known(graph):
        return False
    if _is_in_rows(graph):  # the outputs are made small, however they came to be large
        return True
    bare = _bare(graph)
    return all(_copies(entry) <= _MOST_COPIES for entry in entries if entry.key in bare)


def _is_known(graph: Graph) -> bool:
    """The same before anything is predicted: whatever does not depend on how often predictions repeat."""
    return _is_made_of_cells(graph) and (len(_bare(graph)) <= _MOST_BARE or _is_in_rows(graph))


def _is_in_rows(graph: Graph) -> bool:
    """Whether there are no norm layers, and no way around a weight, so that outputs can be made small.

    Then errors of scale multiply, too, but each layer takes its share of a factor against them (`calm.py`).
    Residual networks without norm grow from block to block, whatever their first and last layer are.
    """
    if any(node.type in NORM_TYPES for node in graph.nodes):
        return False
    gates = _gates(graph)
    weights = {
        index
        for index, node in enumerate(graph.nodes)
        if node.type in WEIGHT_TYPES - {"pos_enc"} and not gates[index]
    }
    steps, _ = rises(graph, {graph.nodes[index].param for index in weights})
    return steps.keys() == weights and all(steps.values())


def _ends(graph: Graph) -> set[str | None]:
    """The parameters of the classifiers."""
    return {graph.nodes[index].param for indices in graph.heads for index in indices if index is not None}


def _bare(graph: Graph) -> set[str | None]:
    """Weights of convolutions and linear layers whose scale nothing takes out of what they give.

    That is neither a batch norm, if need be behind a second convolution, nor a gate or a block of attention.
    """
    normalised, gates, attending = _normalised(graph), _gates(graph), _attending(graph)
    followers, ends = _followers(graph), _ends(graph)
    return {
        node.param
        for index, node in enumerate(graph.nodes)
        if node.type == "conv" and node.param not in ends
        if not (normalised[index] or gates[index] or attending[index])
        if not followers[index]
        or not all(normalised[after] and graph.nodes[after].type == "conv" for after in followers[index])
    }


def _is_made_of_cells(graph: Graph) -> bool:
    """Whether the network is of the kind that a GHN has learned from, a classifier made as DeepNets-1M's are.

    Those have depthwise convolutions, gates and attention, too, but only as DARTS' cells do: a depthwise
    convolution goes straight into one of 1 x 1, where MobileNets have a norm between them, and attention
    is a block with layer norms amid convolutions with batch norms.
    """
    kinds = {node.type for node in graph.nodes}
    if not kinds <= _CELLS or any(node.transposed for node in graph.nodes):
        return False
    if not reads_images(graph) or not _classifies(graph) or _has_strangers(graph):
        return False
    if kinds & {"msa", "ln"} and not {"msa", "ln", "bn"} <= kinds:
        return False
    followers = _followers(graph)
    return all(
        _is_depthwise(node) and all(_is_pointwise(graph.nodes[target]) for target in followers[index])
        for index, node in enumerate(graph.nodes)
        if node.type in ("sep_conv", "dil_conv")
    )


def _is_depthwise(node: Node) -> bool:
    return node.shape is not None and node.shape[1] == 1


def _is_pointwise(node: Node) -> bool:
    return node.type == "conv" and node.shape is not None and math.prod(node.shape[2:]) == 1


def _attending(graph: Graph) -> list[bool]:
    """For every node whether it is part of a block of attention.

    That is behind a layer norm or an `msa`, up to the sum with what the block reads.
    """
    found: list[bool] = []
    for node, sources in zip(graph.nodes, graph.predecessors, strict=True):
        inside = node.type in ("ln", "msa") or any(found[source] for source in sources)
        found.append(inside and node.type != "sum")
    return found


def _strange(graph: Graph, *, known: bool) -> Mapping[str | None, str]:
    """Layers that are left alone, weight and bias, by parameter with the reason.

    Args:
        graph: The network's graph.
        known: See `_is_known`.
    """
    found: dict[str | None, str] = {}
    reasons = _harmed(graph) if known else _unknown(graph) | _harmed(graph)
    for index, node in enumerate(graph.nodes):
        if node.type == "bias":
            layer = next((graph.nodes[source].param for source in graph.predecessors[index]), None)
            if layer in found:
                found[node.param] = found[layer]
        elif node.param is not None and index in reasons:
            found[node.param] = reasons[index]
    return found


def _weights(graph: Graph) -> list[tuple[int, Node]]:
    return [(index, node) for index, node in enumerate(graph.nodes) if node.type in WEIGHT_TYPES]


def _harmed(graph: Graph) -> dict[int, str]:
    """The weights that predictions harm in any network, and why."""
    normalised, behind, gates = _normalised(graph), _behind_skips(graph), _gates(graph)
    found = {}
    for index, node in _weights(graph):
        if behind[index]:
            found[index] = _BEHIND_SKIP
        elif gates[index]:
            found[index] = _GATE
        elif node.transposed and len(node.shape or ()) > 2 and not normalised[index]:
            found[index] = _BARE_TRANSPOSED
    return found


def _unknown(graph: Graph) -> dict[int, str]:
    """The weights that predictions do no good, or harm, in networks that the GHN does not know, and why.

    Where no batch norm takes the scale out of what a weight gives, predictions are too coherent at any scale:
    units of an MLP or an autoencoder are silent for all images, and a super-resolution network diverges at
    its best rate. Layer norms do not help: there predictions make no difference, or a SegFormer worse. Sums
    and concatenations of predicted branches agree likewise, and what is behind the first third of a feature
    pyramid or a ConvMixer is better left alone. Classifiers of networks with batch norms are not among them:
    `calmed` lessens those.
    """
    normalised, one_pixel = _normalised(graph), _of_one_pixel(graph)
    images = reads_images(graph, volumes=True)
    layer_norms, batch_norms = (any(node.type == kind for node in graph.nodes) for kind in ("ln", "bn"))
    ends = {weight for weight, _ in graph.heads}
    predicted_ends = ends if batch_norms else set()
    late = _behind_the_first(graph) - ends
    found = {}
    for index, _ in _weights(graph):
        sources = graph.predecessors[index]
        reads = {graph.nodes[source].type for source in sources}
        if not images:
            found[index] = _NO_IMAGES
        elif "ln" in reads:
            found[index] = _BEHIND_LAYER_NORM
        elif "msa" in reads:
            found[index] = _BEHIND_ATTENTION
        elif layer_norms and 0 in sources:
            found[index] = _BEFORE_LAYER_NORMS
        elif index not in ends and one_pixel[index]:
            found[index] = _ONE_PIXEL
        elif not normalised[index] and index not in predicted_ends:
            found[index] = _NOTHING_TAKES_SCALE
        elif index in late:
            found[index] = _LATE
    return found


def _behind_the_first(graph: Graph) -> set[int]:
    """The weights behind the first `_EARLY` of them, where branches meet."""
    if not any(node.type in ("sum", "concat") for node in graph.nodes):
        return set()
    weights = [index for index, node in _weights(graph) if node.type != "pos_enc"]
    return set(weights[math.ceil(_EARLY * len(weights)) :])


def _normalised(graph: Graph) -> list[bool]:
    """For every node whether all that it gives goes through a batch norm before another weight reads it."""
    followers = _followers(graph)
    found = [False] * len(graph)
    for index in range(len(graph) - 1, -1, -1):
        after = [(graph.nodes[target].type, found[target]) for target in followers[index]]
        found[index] = bool(after) and all(
            follower == "bn" or (follower in _PASSING and normalised) for follower, normalised in after
        )
    return found


def _elsewhere(graph: Graph) -> Mapping[str | None, str]:
    """Batch norms that do not follow a convolution, as in DenseNets; DeepNets-1M has none of them."""
    return {
        name: _NOT_BEHIND_WEIGHTS
        for index, node in enumerate(graph.nodes)
        if node.type == "bn" and not _follows_weights(graph, index)
        for name in (node.param, node.bias)
    }


def _follows_weights(graph: Graph, index: int) -> bool:
    """Whether all that a node reads comes straight from convolutions, those of a factorised reduction too."""
    sources = graph.predecessors[index]
    return bool(sources) and all(
        graph.nodes[source].type in WEIGHT_TYPES
        or (graph.nodes[source].type in ("bias", "concat") and _follows_weights(graph, source))
        for source in sources
    )


def _followers(graph: Graph) -> list[list[int]]:
    """For every node the indices of the nodes that its edges lead to."""
    followers: list[list[int]] = [[] for _ in graph.nodes]
    for source, target in graph.edges:
        followers[source].append(target)
    return followers


def _gates(graph: Graph) -> list[bool]:
    """For every node whether it serves to compute a gate: of what a `cse` joins the one that comes last."""
    found = [False] * len(graph)
    for index, after in reversed(list(enumerate(_followers(graph)))):
        found[index] = bool(after) and all(
            found[target] or (graph.nodes[target].type == "cse" and graph.predecessors[target][0] != index)
            for target in after
        )
    return found


def _of_one_pixel(graph: Graph) -> list[bool]:
    """For every node whether it is, or is behind, a filter that is wider than its image and gives one pixel.

    Only in networks of other layers than plain ones: a ResNet's last stage is worth predicting there, too.
    """
    found = [False] * len(graph)
    if all(node.type in _PLAIN for node in graph.nodes):
        return found
    for index, sources in enumerate(graph.predecessors):
        rows = graph.cropped.get(index)
        gives_one = rows is not None and all(len(places) == 1 for places in rows)
        found[index] = gives_one or any(found[source] for source in sources)
    return found


def _behind_skips(graph: Graph) -> list[bool]:
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


def _classifies(graph: Graph) -> bool:
    """Whether the network ends in linear layers, or pools what its last convolution gives."""
    last = {graph.nodes[indices[0]].param for indices in graph.heads}
    pooled = graph.nodes[-1].type == "glob_avg"
    return bool(last) and all(
        pooled or (node.shape is not None and len(node.shape) == 2)
        for node in graph.nodes
        if node.param in last and node.type == "conv"
    )


def _has_strangers(graph: Graph) -> bool:
    """Whether there are parameters that no node stands for and that count."""
    return any(not stranger.role.endswith(UNUSED) for stranger in graph.unmatched)
