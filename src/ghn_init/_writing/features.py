"""Features no longer than a classifier, or what is no classifier, can learn from at usual rates.

The gradient of a classifier's weights, and its noise, grow with the length of what it reads. In wide networks
that is long: the squared length of a ResNet-18's features is 850 in its own initialisation and 2,300 from
predictions, where a small ResNet's have 120. At rates that are a little too large the classifier then swings,
and all layers below with it. So the norms that features come from are predicted smaller, and a predicted
classifier is larger by as much. The network is the same function: ReLUs, poolings, sums and concatenations
pass a factor on, and norms behind other readers take it out. Where something does not, features stay. A kept
classifier gives smaller outputs. docs/starting-point.md has the trials.

A squared error is curved in the last layer's weights as what it reads is long, ten times more than the
cross-entropy of classes is, and a margin means a length. So a last layer that is kept, and has as many
outputs as nobody counts classes, reads features that are no longer than the network's own: values to
regress, actions or coordinates are few, and the width of an embedding is a power of two.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from ghn_init._graph import structure
from ghn_init._graph.graph import LAYER_TYPES, NORM_TYPES, WEIGHT_TYPES
from ghn_init._network.scale import rounded
from ghn_init._network.sharded import is_sharded
from ghn_init._writing.calm import is_there, multiplied
from ghn_init._writing.known import scales_are_known

if TYPE_CHECKING:
    from collections.abc import Container, Sequence, Set

    from ghn_init._graph.graph import Graph, Node
    from ghn_init._writing.entry import Entry
    from ghn_init._writing.statistics import Followed

_LONGEST: Final = 500.0
"""Squared length that features have at most, as it is estimated, if they are not more than so many."""

_FEW: Final = 10
"""Outputs below which they are taken for values that are no classes."""

_NARROWEST: Final = 16
"""Width from which on a power of two is taken for that of an embedding."""

_OF_VALUES: Final = 0.5
"""Squared length of what values are made from, in those that the network's own features have as they are
estimated here: outputs then begin as large as its own, since predicted features are more alike over an
image's extent, which estimates are without."""

_OF_EMBEDDINGS: Final = 0.25
"""The same for an embedding: distances, too, are then no larger than from the network's own features."""

_OF_DEPTHWISE: Final = 0.5
"""The same for networks with batch norms behind depthwise convolutions, such as MobileNets. These train best
at higher rates than others, at which a classifier of longer features swings."""

_LINEAR: Final = 1 / 3
"""Mean square of what torch's layers give, relative to that of what they read."""

_PASSING: Final = frozenset({"sum", "concat", "max_pool", "avg_pool", "glob_avg"})
"""Types of node that pass a factor on."""


def shortened(graph: Graph, entries: Sequence[Entry], told: Followed) -> tuple[list[Entry], Followed | None]:
    """The same entries with shorter features, of a network with batch norms that the GHN knows.

    As they are where features are short enough, where not all that makes them is predicted, or where a factor
    of it would make another function.

    Args:
        graph: The network's graph.
        entries: From `ready_to_train`.
        told: What activations say of them.

    Returns:
        The entries, and what activations say of these; None where that has to be found out anew.
    """
    tiles = {entry.key: entry for entry in entries if entry.tile is not None}
    excess = _excess(graph, told, tiles) if structure.has_batch_norms(graph) else 0.0
    if not 1 < excess < math.inf or not scales_are_known(graph, entries):
        return list(entries), told
    # Where the classifier is the network's own, another function will do, if it is nearly the same.
    kept = not any(graph.nodes[weight].param in tiles for weight, _ in graph.heads)
    params, features = _making_features(graph, graph.absolute - graph.rectified if kept else graph.absolute)
    makers = [tiles.get(name) for name in params]
    if not makers or not all(map(_is_multiplied, makers)) or not _is_read_by_norms(graph, features):
        return list(entries), told
    ends = [tiles[key] for weight, _ in graph.heads if (key := graph.nodes[weight].param) in tiles]
    if not all(map(_is_multiplied, ends)):
        return list(entries), told
    factor = 1 / math.sqrt(excess)
    factors: dict[str | None, float] = dict.fromkeys(params, factor)
    for entry in ends:
        if entry.rms is None:
            factors[entry.key] = 1 / factor
        elif not is_there(entry):
            larger = rounded(entry.rms / factor)  # so that predicting again gives the same bits
            factors[entry.key] = larger / entry.rms
    shorter = [multiplied(entry, factors.get(entry.key, 1.0)) for entry in entries]
    if features & graph.absolute and not _is_read_by_heads_alone(graph, features):
        return shorter, None
    return shorter, _told_of(graph, entries, told, features, factor)


def _excess(graph: Graph, told: Followed, predicted: Container[str | None]) -> float:
    """How much too long the features are, as a ratio of squared lengths.

    Thousands of features may have a mean square of 1: a network that has so many is trained at lower rates.
    """
    excess = 0.0
    depthwise = _OF_DEPTHWISE if structure.norms_of_depthwise(graph) else 0.0
    for weight, _ in graph.heads:
        node = graph.nodes[weight]
        outputs, *inputs = node.shape or (0,)
        read = math.prod(inputs)
        longest = max(_LONGEST, read)
        share = (_share(outputs) if node.param not in predicted else 0.0) or depthwise
        if share:
            squares = [_own_square(graph, source) for source in graph.predecessors[weight]]
            longest = min(longest, share * read * max(squares, default=1.0))
        if longest:
            excess = max(excess, told.read.get(node.param or "", 0.0) / longest)
    return excess


def _share(outputs: int) -> float:
    """How long what a kept last layer reads may be, in squared lengths of the network's own; 0: classes."""
    if outputs < _FEW:
        return _OF_VALUES
    return _OF_EMBEDDINGS if outputs >= _NARROWEST and outputs & (outputs - 1) == 0 else 0.0


def _own_square(graph: Graph, last: int) -> float:
    """Mean square of features as the network's author has them: norms give 1, and ReLUs half of it.

    As estimates from predictions are, it is without the image's extent, over which poolings take means.
    """
    wanted, found = {last}, dict[int, float]()
    for index in range(last, -1, -1):
        if index in wanted and graph.nodes[index].type not in NORM_TYPES:
            wanted.update(graph.predecessors[index])
    for index in sorted(wanted):
        node = graph.nodes[index]
        inputs = [found[source] for source in graph.predecessors[index] if source in found]
        square = max(inputs, default=1.0)
        if node.type in NORM_TYPES:
            square = 1.0
        elif node.type == "sum":
            square = sum(inputs)
        elif node.type in LAYER_TYPES:
            square *= _LINEAR
        found[index] = square / 2 if index in graph.rectified else square
    return found[last]


def _is_passing(node: Node) -> bool:
    """Whether features are in proportion to what it reads: a classifier's hidden layers are, with biases."""
    return node.type in _PASSING or node.type == "bias" or _is_hidden(node)


def _is_hidden(node: Node) -> bool:
    return node.type in LAYER_TYPES and len(node.shape or ()) == 2


def _is_multiplied(entry: Entry | None) -> bool:
    """Whether a parameter is predicted, and what its layer uses is as many times larger as it is.

    A parametrisation may take a factor out again. Of a classifier at own scale that is sharded nobody could
    tell whether it has been multiplied before, see `is_there`.
    """
    return entry is not None and entry.computed is None and (entry.rms is None or not is_sharded(entry.param))


def _making_features(graph: Graph, absolute: Set[int]) -> tuple[set[str], set[int]]:
    """The parameters that all features are proportional to, and the nodes from these to the classifiers.

    `absolute` are the nodes behind which a factor is not passed on.

    Those of the last norms, weights of convolutions without one, as in a shortcut, and biases behind these.
    A hidden layer of a classifier passes a factor on, if its bias has it too. None where something does not,
    or where one of the parameters is used elsewhere, too.
    """
    params: set[str | None] = set()
    features: set[int] = set()
    waiting = [source for weight, _ in graph.heads for source in graph.predecessors[weight]]
    while waiting:
        index = waiting.pop()
        if index in features:
            continue
        features.add(index)
        node = graph.nodes[index]
        if node.type == "bn":
            params |= {node.param, node.bias}
        elif node.type in LAYER_TYPES and not _is_hidden(node):
            params.add(node.param)
        elif _is_passing(node):
            params |= {node.param} if node.type == "bias" else set()
            waiting += graph.predecessors[index]
        else:
            return set(), set()
    uses = Counter(name for node in graph.nodes for name in (node.param, node.bias))
    found = {name for name in params if name is not None and uses[name] == 1}
    return (found, features) if found == params and not features & absolute else (set(), set())


def unmeasured_branches(graph: Graph) -> set[str]:
    """Weights without a norm that features come from, but for those beside a norm, in networks with norms.

    As at the end of a pre-activated ResNet without a last norm: nothing there tells how large features are to
    be. What is added to what a norm gives, as a shortcut is, is measured by that. A norm behind a ReLU is no
    such one, but the stem's that branches are added to.
    """
    if not structure.has_batch_norms(graph):
        return set()
    params, features = _making_features(graph, graph.absolute)
    found = set[str]()
    for index in features:
        node, last = graph.nodes[index], index
        if node.type not in LAYER_TYPES or node.param not in params:
            continue
        while (after := _only(graph.successors[last])) is not None and graph.nodes[after].type == "bias":
            last = after
        beside = {source for target in graph.successors[last] for source in graph.predecessors[target]}
        if not any(graph.nodes[source].type in NORM_TYPES for source in beside - graph.rectified):
            found.add(node.param)
    return found


def _only(items: Sequence[int]) -> int | None:
    return items[0] if len(items) == 1 else None


def _is_read_by_norms(graph: Graph, features: set[int]) -> bool:
    """Whether all else that reads features is a weight before batch norms, which take a factor out."""
    normalised = structure.normalised(graph)
    heads = {weight for weight, _ in graph.heads}
    return all(
        target in features
        or target in heads
        or (graph.nodes[target].type in WEIGHT_TYPES and normalised[target])
        for index in features
        for target in graph.successors[index]
    )


def _is_read_by_heads_alone(graph: Graph, features: set[int]) -> bool:
    """Whether nothing but classifiers reads features, so that no norm sees others."""
    ends = features | {weight for weight, _ in graph.heads}
    return all(ends.issuperset(graph.successors[index]) for index in features)


def _told_of(
    graph: Graph, entries: Sequence[Entry], told: Followed, features: set[int], factor: float
) -> Followed | None:
    """What activations say once features are so many times longer; None where that is not known by now.

    Norms that read what is proportional to features see a mean and a variance in proportion.
    """
    names = {entry.key: entry.locations[0].path for entry in entries if entry.node == "bn"}
    proportional = set(features)
    statistics = dict(told.statistics)
    for index, node in enumerate(graph.nodes):
        sources = [source in proportional for source in graph.predecessors[index]]
        if not any(sources) or (index in features and node.type != "bn"):
            continue
        if not all(sources):
            return None
        if node.type == "bn":
            prefix = f"{path}." if (path := names.get(node.param)) else ""
            for name, power in (("running_mean", 1), ("running_var", 2)):
                if (value := statistics.get(prefix + name)) is not None:
                    statistics[prefix + name] = value * factor**power
        elif node.type in LAYER_TYPES or node.type in _PASSING:
            proportional.add(index)
        elif not any(index == bias for _, bias in graph.heads):
            return None
    return replace(told, statistics=statistics)
