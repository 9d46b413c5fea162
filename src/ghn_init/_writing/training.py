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
from typing import TYPE_CHECKING, Final, TypeVar

from ghn_init._graph import structure
from ghn_init._graph.graph import NORM_TYPES, WEIGHT_TYPES
from ghn_init._writing.entry import Cause, Decision
from ghn_init._writing.familiarity import reads_images
from ghn_init._writing.features import unmeasured_branches
from ghn_init._writing.known import PLAIN, copies, is_known, scales_are_known
from ghn_init._writing.scale import (
    NORM,
    at_most_own_scale,
    at_most_usual_scale,
    at_own_scale,
    with_own_scales,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from ghn_init._graph.graph import Graph, Node
    from ghn_init._writing.entry import Entry
    from ghn_init._writing.options import Options

T = TypeVar("T")

_FEW_COPIES: Final = 4
"""How often the prediction of a classifier repeats at most, to be at predicted scale: 256 features."""

_EARLY: Final = 1 / 3
"""Share of the weights, from the input on, whose features are good for any task: of those before batch norms
the ones that are as large as predicted (large weights turn slowly), and in unknown networks whose branches
meet the ones that are predicted."""

_BEHIND_SKIP: Final = "it is behind a skip connection to a decoder"
_BEHIND_LAYER_NORM: Final = "it reads a layer norm"
_BEHIND_ATTENTION: Final = "it reads an attention"
_BEFORE_LAYER_NORMS: Final = "it reads the input of a network with layer norms"
_GATE: Final = "it is a gate"
_ONE_PIXEL: Final = "its feature maps are one pixel wide"
_NO_IMAGES: Final = "its network reads no images"
_LATE: Final = "it is behind the first third of a network whose branches meet"
_NOTHING_TAKES_SCALE: Final = "no batch norm takes its scale out of what it gives"
_NOT_BEHIND_WEIGHTS: Final = "a norm that reads neither a convolution nor a sum"
_RECTIFIED: Final = "its classes' scores go through an activation"
_READS_PLACES: Final = "a norm follows it, and it reads all places of feature maps"
_BEHIND_PLACES: Final = "a norm of a layer that reads all places of feature maps"
_BARE_TRANSPOSED: Final = "a transposed convolution without batch norm"


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
    known = options.diversify != "orthogonal" and is_known(graph, entries)
    strange = _strange(graph, known=known)
    if known:
        strange = {**strange, **_elsewhere(graph)}
        grouped = structure.has_groups(graph)  # see `known.scales_are_known`
        return with_own_scales(network, graph, entries, options, strange, (), silenced=grouped)
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
    entries = at_most_usual_scale(entries, unmeasured_branches(graph))
    return at_most_own_scale(_with_own_classifiers(graph, entries, options), _late(graph))


def _late(graph: Graph) -> set[str | None]:
    """Weights before batch norms behind the first `_EARLY` of them.

    A batch norm takes the scale of a weight out of what it gives, but the same step turns a larger weight
    less: a prediction of six times the own scale, as in a small ResNet, learns as at a rate of a 36th.
    Features of the first layers are good for other tasks too, those of the last ones less (compare Yosinski
    et al. 2014, arXiv 1411.1792), and so these are to turn as fast as from the network's own initialisation.
    """
    normalised = structure.normalised(graph)
    weights = [
        n.param for n, after in zip(graph.nodes, normalised, strict=True) if after and n.type in WEIGHT_TYPES
    ]
    return _behind_the_early(weights)


def _behind_the_early(weights: Sequence[T]) -> set[T]:
    """All but the first `_EARLY` of them."""
    return set(weights[math.ceil(_EARLY * len(weights)) :])


def _with_own_norm(entry: Entry) -> Entry:
    """The same, kept if it is a norm layer's and there are values to keep: it is not of a known network."""
    lost = entry.own is None and entry.param.is_meta
    if entry.node not in NORM_TYPES or entry.tile is None or lost:
        return entry
    return replace(entry, decision=Decision(Cause.OWN, NORM), tile=None)


def _with_own_classifiers(graph: Graph, entries: Sequence[Entry], options: Options) -> list[Entry]:
    """The same entries, classifiers of many copies at their own scale, for `calmed` to lessen.

    They read copies of the features, which agree, and so at predicted scale a ResNet-50 begins at a loss of
    4.1, sure of what it does not know. Untrained accuracy is no reason for that scale, since the largest
    output stays the largest.
    """
    ends = {graph.nodes[weight].param for weight, _ in graph.heads}
    many = [entry for entry in entries if entry.key in ends and copies(entry) > _FEW_COPIES]
    own = {entry.name: entry for entry in at_own_scale(many, options)}
    return [own.get(entry.name, entry) for entry in entries]


def _strange(graph: Graph, *, known: bool) -> Mapping[str | None, str]:
    """Layers that are left alone, weight and bias, by parameter with the reason.

    Args:
        graph: The network's graph.
        known: See `is_known`.
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
    norms = [graph.nodes[index] for index in _norms_of(graph, _flattening(graph))]
    names = {name for norm in norms for name in (norm.param, norm.bias)} - {None}
    return found | dict.fromkeys(names, _BEHIND_PLACES)


def _weights(graph: Graph) -> list[tuple[int, Node]]:
    return [(index, node) for index, node in enumerate(graph.nodes) if node.type in WEIGHT_TYPES]


def _harmed(graph: Graph) -> dict[int, str]:
    """The weights that predictions harm in any network, and why."""
    normalised, gates = structure.normalised(graph), structure.gates(graph)
    behind, flattening = structure.behind_skips(graph), _flattening(graph)
    silenced = {
        weight for weight, bias in graph.heads if graph.rectified.intersection((weight, bias or weight))
    }
    found = {}
    for index, node in _weights(graph):
        if behind[index]:
            found[index] = _BEHIND_SKIP
        elif gates[index]:
            found[index] = _GATE
        elif index in silenced:  # an offset that all classes have is nothing to a softmax, and all to a ReLU
            found[index] = _RECTIFIED
        elif index in flattening:
            found[index] = _READS_PLACES
        elif node.transposed and len(node.shape or ()) > 2 and not normalised[index]:
            found[index] = _BARE_TRANSPOSED
    return found


def _flattening(graph: Graph) -> set[int]:
    """Weights of linear layers, before a batch norm, that read all places of feature maps.

    The same prediction for every place is a mean over them. What is left of it are few directions, which the
    norm makes as large as if they were many; without one the layer's output is as small as they are few.
    """
    places, normalised = structure.reads_places(graph), structure.normalised(graph)
    return {index for index, _ in _weights(graph) if places[index] and normalised[index]}


def _norms_of(graph: Graph, weights: set[int]) -> set[int]:
    """The batch norms that read what these weights give, with their biases."""
    read = weights | {
        index for index in range(len(graph)) if graph.nodes[index].type == "bias"
        if weights.intersection(graph.predecessors[index])
    }  # fmt: skip
    return {
        index for index in range(len(graph)) if graph.nodes[index].type == "bn"
        if read.intersection(graph.predecessors[index])
    }  # fmt: skip


def _unknown(graph: Graph) -> dict[int, str]:
    """The weights that predictions do no good, or harm, in networks that the GHN does not know, and why.

    Where no batch norm takes the scale out of what a weight gives, predictions are too coherent at any scale:
    units of an MLP or an autoencoder are silent for all images, and a super-resolution network diverges at
    its best rate. Layer norms do not help: there predictions make no difference, or a SegFormer worse. Sums
    and concatenations of predicted branches agree likewise, and what is behind the first third of a feature
    pyramid or a ConvMixer is better left alone. Classifiers of networks with batch norms are not among them:
    `calmed` lessens those.
    """
    normalised, one_pixel = structure.normalised(graph), structure.one_pixel_wide(graph)
    plain = all(node.type in PLAIN for node in graph.nodes)  # there a ResNet's last stage is worth it, too
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
        elif one_pixel[index] and index not in ends and not plain:
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
    return _behind_the_early([index for index, node in _weights(graph) if node.type != "pos_enc"])


def _elsewhere(graph: Graph) -> Mapping[str | None, str]:
    """Batch norms that follow neither a convolution nor a sum, as in DenseNets.

    DeepNets-1M has none that follow a sum either, but those of pre-activated ResNets are worth predicting.
    """
    return {
        name: _NOT_BEHIND_WEIGHTS
        for index, node in enumerate(graph.nodes)
        if node.type == "bn"
        if not structure.reads_weights_alone(graph, index)
        if {graph.nodes[source].type for source in graph.predecessors[index]} != {"sum"}
        for name in (node.param, node.bias)
    }
