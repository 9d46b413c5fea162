"""Outputs that are hardly larger than a network's own initialisation would give, so that training can begin.

A network that begins by being sure of what it does not know has first to unlearn it, and at high rates its
first steps lead far away. Of classifiers at the layer's own scale it is known how much predicted features
agree with them, and they are made smaller by that. Of a network without norm layers the whole prediction is,
by equal factors of its layers, which all later activations share, since ReLUs, poolings and sums pass a
factor on. docs/starting-point.md has the trials.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import torch

from ghn_init._network.scale import rounded
from ghn_init._network.sharded import is_sharded
from ghn_init._writing.known import scales_are_known
from ghn_init._writing.levels import rises

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence, Set

    from ghn_init._graph.graph import Graph
    from ghn_init._writing.entry import Entry
    from ghn_init._writing.statistics import Followed

_OUTPUTS: Final = 0.15
"""Root mean square of the outputs, as it is estimated, of a network without norm layers: in truth up to
twice that, 0.5 to 3 times as much as from its own initialisation: the first loss is that of guessing."""

_READ: Final = 7.0
"""Squared length of what a classifier of such a network reads, as it is estimated. The curvature of the loss
in its weights grows with it, and beyond 2 (1 + momentum) / rate training diverges: with 30 a CNN of two 5x5
layers was at chance again after 300 steps of SGD at its best rate."""

_COMPARED: Final = 16
"""Rows of a classifier that are compared with its prediction."""

_THE_SAME: Final = 0.7
"""Cosine from which on they are that, noise of `diversify` included; those of independent values are 0.1."""

_SHALLOW: Final = 8
"""Layers in a row up to which that holds; what is estimated is about half their number times too large."""


def calmed(graph: Graph, entries: Sequence[Entry], told: Followed) -> list[Entry]:
    """The same entries, their predictions made smaller where outputs would be larger than a network's own.

    Args:
        graph: The network's graph.
        entries: From `ready_to_train`.
        told: What activations say of them.
    """
    whole = bool(told.outputs) and scales_are_known(graph, entries)
    entries = [
        _less_amplified(entry, told.amplified.get(entry.key or "", 1.0), lasting=not whole)
        for entry in entries
    ]
    if not whole:
        return entries
    predicted = {entry.key for entry in entries if entry.tile is not None}
    factors = _factors(graph, predicted, told)
    return [multiplied(entry, factors.get(entry.key, 1.0)) for entry in entries]


def _less_amplified(entry: Entry, factor: float, *, lasting: bool) -> Entry:
    """The entry of a classifier at own scale, so many times smaller; only once, if that is its scale then.

    A spectral norm says what a weight does at most. Predicted features agree with the predicted classifier
    that reads them, up to nine times more than independent ones would. So a ShuffleNet would begin at a loss
    of 3.0 instead of 2.5.
    """
    if entry.tile is None or entry.rms is None or not 1 < factor < math.inf:
        return entry
    if lasting and is_there(entry):
        return entry
    rms = rounded(entry.rms / factor)
    return replace(entry, rms=rms, tile=entry.tile.scaled(rms / entry.rms))


def is_there(entry: Entry) -> bool:
    """Whether the parameter has this prediction already, so that its own scale is that of an earlier call.

    Every further call would make it smaller by the factor again.
    """
    assert entry.tile is not None
    param = entry.param
    if (
        param.is_meta
        or is_sharded(param)
        or entry.computed is not None
        or param.ndim != len(entry.tile.sizes)
    ):
        return False
    values = entry.tile.first(_COMPARED)
    if entry.tile.stretches and values.ndim > 1:
        values = values[:, : entry.tile.stretches[0]]
    own = param.detach()[tuple(slice(size) for size in values.shape)].to(values.device, values.dtype)
    return float(torch.nn.functional.cosine_similarity(own.flatten(), values.flatten(), 0)) > _THE_SAME


def multiplied(entry: Entry, factor: float) -> Entry:
    """The entry with its prediction multiplied by a factor."""
    if entry.tile is None or factor == 1:
        return entry
    rms = None if entry.rms is None else rounded(entry.rms * factor)
    return replace(entry, rms=rms, factor=entry.factor * factor, tile=entry.tile.scaled(factor))


def _factors(graph: Graph, predicted: Set[str | None], told: Followed) -> Mapping[str | None, float]:
    """What parameters are multiplied by, by their names, so that outputs are no larger than is good.

    All layers in a row have the same share of it (in logarithms): where it is that of the first or the last
    one alone, the others' gradients stay as large as before, and at high rates lead the first steps far away.
    But classifiers take upon themselves what their inputs have to be smaller than that.
    """
    steps, levels = rises(graph, predicted)
    shares = _shares(steps, levels, {weight for weight, _ in graph.heads}, told)
    products = [math.prod(shares[:level]) for level in range(len(shares) + 1)]
    factors = {
        graph.nodes[index].param: products[levels[index]] / products[levels[index] - count]
        for index, count in steps.items()
    }
    return factors | {
        node.param: products[levels[index]]
        for index, node in enumerate(graph.nodes)
        if node.type in ("bias", "pos_enc")
    }


def _shares(
    steps: Mapping[int, int], levels: Sequence[int], heads: Set[int], told: Followed
) -> Sequence[float]:
    """The factor of each layer in a row.

    Args:
        steps: From `rises`, as the next.
        levels: For every node.
        heads: The nodes of the classifiers' weights.
        told: What activations say.
    """
    last = max((levels[index] for index in steps), default=0)
    largest = max(rms / told.amplified.get(key, 1.0) for key, rms in told.outputs.items())
    if not last or not 0 < largest < math.inf:
        return [1.0] * last
    deeper = max(1, last / _SHALLOW)
    each = min(1.0, _OUTPUTS * deeper / largest) ** (1 / last)
    ending = {index for index in steps if levels[index] == last}
    before = last - 1 if ending <= heads else last  # a classifier that is kept cannot make up for it
    length = math.sqrt(max(told.read.values())) * each**before
    excess = length / (math.sqrt(_READ) * deeper)
    if not before or not 1 < excess < math.inf:
        return [each] * last
    return [each / excess ** (1 / before)] * before + [each * excess] * (last - before)
