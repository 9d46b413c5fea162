"""Outputs that are hardly larger than a network's own initialisation would give, so that training can begin.

A network that begins by being sure of what it does not know has first to unlearn it, and at high rates its
first steps lead far away. Of classifiers at the layer's own scale it is known how much predicted features
agree with them, and they are made smaller by that. Of a network without norm layers the whole prediction is:
half of it (in logarithms) by its first layers, whose factor all later activations share, since ReLUs,
poolings and sums pass a factor on, and half by its classifier. docs/starting-point.md has the trials.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from ghn_init._graph.graph import WEIGHT_TYPES
from ghn_init._network.scale import rounded
from ghn_init._writing.training import scales_are_known

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence, Set

    from ghn_init._graph.graph import Graph
    from ghn_init._writing.entry import Entry
    from ghn_init._writing.statistics import Followed

_OUTPUTS: Final = 0.15
"""Root mean square of the outputs, as it is estimated, of a network without norm layers: in truth about half
of that, 1 to 2 times as much as from its own initialisation, so that the first loss is that of guessing."""


def calmed(graph: Graph, entries: Sequence[Entry], told: Followed) -> list[Entry]:
    """The same entries, their predictions made smaller where outputs would be larger than a network's own.

    Args:
        graph: The network's graph.
        entries: From `ready_to_train`.
        told: What activations say of them.
    """
    entries = [_less_amplified(entry, told.amplified.get(entry.key or "", 1.0)) for entry in entries]
    if not told.outputs or not scales_are_known(graph, entries):
        return entries
    largest = max(rms / told.amplified.get(key, 1.0) for key, rms in told.outputs.items())
    if not _OUTPUTS < largest < math.inf:
        return entries
    predicted = {entry.key for entry in entries if entry.tile is not None}
    factors = _factors(graph, predicted, _OUTPUTS / largest)
    return [_multiplied(entry, factors.get(entry.key, 1.0)) for entry in entries]


def _less_amplified(entry: Entry, factor: float) -> Entry:
    """The entry of a classifier at own scale, so many times smaller.

    A spectral norm says what a weight does at most. Predicted features agree with the predicted classifier
    that reads them, up to nine times more than independent ones would. So a ShuffleNet would begin at a loss
    of 3.0 instead of 2.5.
    """
    if entry.tile is None or entry.rms is None or not 1 < factor < math.inf:
        return entry
    rms = rounded(entry.rms / factor)
    return replace(entry, rms=rms, tile=entry.tile.scaled(rms / entry.rms))


def _multiplied(entry: Entry, factor: float) -> Entry:
    if entry.tile is None or factor == 1:
        return entry
    rms = None if entry.rms is None else rounded(entry.rms * factor)
    return replace(entry, rms=rms, factor=entry.factor * factor, tile=entry.tile.scaled(factor))


def _factors(graph: Graph, predicted: Set[str | None], factor: float) -> Mapping[str | None, float]:
    """What each parameter is multiplied by for outputs that are `factor` times as large, by its name.

    Where a first layer is not predicted, or stands at a later place too, it is the classifier alone.
    """
    first = _first(graph)
    stems = {graph.nodes[index].param for index in first}
    later = {node.param for index, node in enumerate(graph.nodes) if index not in first}
    early = math.sqrt(factor) if stems and stems <= predicted - later else 1.0
    factors: defaultdict[str | None, float] = defaultdict(lambda: 1.0)
    heads = {index for pair in graph.heads for index in pair if index is not None}
    for index, node in enumerate(graph.nodes):
        if index in first or (node.type in ("bias", "pos_enc") and index not in heads):
            factors[node.param] = early
    for weight, bias in graph.heads:
        factors[graph.nodes[weight].param] *= factor / early
        if bias is not None:
            factors[graph.nodes[bias].param] *= factor
    return factors


def _first(graph: Graph) -> set[int]:
    """Weights that no other weight is before; none at all if another one reads the same as one of these.

    That is, where a layer reads what the network is given and something computed from it side by side.
    """
    found: set[int] = set()
    fresh: list[bool] = []  # nothing but the input
    whole: list[bool] = []  # nothing of the input as it is
    for index, (node, sources) in enumerate(zip(graph.nodes, graph.predecessors, strict=True)):
        before = all(fresh[source] for source in sources)
        if node.type in WEIGHT_TYPES - {"pos_enc"}:
            if before:
                found.add(index)
            elif not all(whole[source] for source in sources):
                return set()
            fresh.append(False)
            whole.append(True)
        else:
            fresh.append(before)
            whole.append(bool(sources) and all(whole[source] for source in sources))
    return found
