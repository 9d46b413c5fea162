"""Outputs that are hardly larger than a network's own initialisation would give, so that training can begin.

A network that begins by being sure of what it does not know has first to unlearn it, and at high rates its
first steps lead far away. Of classifiers at the layer's own scale it is known how much predicted features
agree with them, and they are made smaller by that. Of a network without norm layers the whole prediction is
instead, by equal factors of its layers, which all later activations share, since ReLUs, poolings and sums
pass a factor on. docs/starting-point.md has the trials.
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
    from collections.abc import Container, Mapping, Sequence

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
    if not told.outputs or not scales_are_known(graph, entries):
        return [_less_amplified(entry, told.amplified.get(entry.key or "", 1.0)) for entry in entries]
    predicted = {entry.key for entry in entries if entry.tile is not None}
    steps, levels = rises(graph, predicted)
    last = max((levels[index] for index in steps), default=0)
    again = {entry.key for entry in entries if entry.tile and entry.rms is not None and is_there(entry)}
    undone = {key: _undone(rms, last, told) for key, rms in told.outputs.items() if key in again}
    outputs = {key: rms * undone.get(key, 1.0) for key, rms in told.outputs.items()}
    shares = _shares(steps, levels, graph, replace(told, outputs=outputs))
    factors = {**_factors(graph, steps, levels, shares), **_biases_there(graph, entries, again)}
    return [
        multiplied(entry, factors.get(entry.key, 1.0) * undone.get(entry.key or "", 1.0)) for entry in entries
    ]


def _biases_there(
    graph: Graph, entries: Sequence[Entry], again: Container[str | None]
) -> Mapping[str | None, float]:
    """What biases of classifiers whose prediction is there are multiplied by: to stay as large as they are.

    They share what outputs were made smaller by, which their classifier does not tell a second time.
    """
    ends = {
        graph.nodes[bias].param
        for weight, bias in graph.heads
        if bias is not None and graph.nodes[weight].param in again
    }
    factors: dict[str | None, float] = {}
    for entry in entries:
        if entry.key in ends and entry.tile is not None and is_there(entry):
            values = entry.tile.first(len(entry.param))
            factors[entry.key] = float(entry.param.detach()[: len(values)].norm()) / float(values.norm())
    return factors


def _undone(outputs: float, last: int, told: Followed) -> float:
    """What a classifier at own scale is multiplied by to be what it was before an earlier call.

    That call gave it a share of what made outputs as large as is good, or made it larger, for what it reads
    to be smaller (`_shares`). With this factor the next call gives all layers what that one gave them.

    Args:
        outputs: Root mean square of what it gives.
        last: Number of layers in a row.
        told: What activations say.
    """
    if last == 1 or not 0 < outputs < math.inf:
        return 1.0
    made_up = max(1.0, _excess(told, last))
    times = outputs / _good(last)
    return times ** (1 / (last - 1)) if times > made_up else 1 / made_up


def _good(last: int) -> float:
    """Root mean square of the outputs that is good, as it is estimated, behind so many layers in a row."""
    return _OUTPUTS * max(1, last / _SHALLOW)


def _excess(told: Followed, last: int) -> float:
    """How many times longer than is good it is what a classifier reads, if all layers stay as they are."""
    length = math.sqrt(max(told.read.values()) / _READ) / max(1, last / _SHALLOW)
    return length if length < math.inf else 1.0


def _less_amplified(entry: Entry, factor: float) -> Entry:
    """The entry of a classifier at own scale, so many times smaller; only once, if that is its scale then.

    A spectral norm says what a weight does at most. Predicted features agree with the predicted classifier
    that reads them, up to nine times more than independent ones would. So a ShuffleNet would begin at a loss
    of 3.0 instead of 2.5.
    """
    if entry.tile is None or entry.rms is None or not 1 < factor < math.inf:
        return entry
    if is_there(entry):
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


def _factors(
    graph: Graph, steps: Mapping[int, int], levels: Sequence[int], shares: Sequence[float]
) -> Mapping[str | None, float]:
    """What parameters are multiplied by, by their names, of the `shares` of layers in a row."""
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


def _shares(steps: Mapping[int, int], levels: Sequence[int], graph: Graph, told: Followed) -> Sequence[float]:
    """The factor of each layer in a row, so that outputs are no larger than is good.

    All have the same share of it (in logarithms): where it is that of the first or the last one alone, the
    others' gradients stay as large as before, and at high rates lead the first steps far away. But
    classifiers take upon themselves what their inputs have to be smaller than that.

    Args:
        steps: From `rises`, as the next.
        levels: For every node.
        graph: The network's.
        told: What activations say.
    """
    heads = {weight for weight, _ in graph.heads}
    last = max((levels[index] for index in steps), default=0)
    largest = max(told.outputs.values())
    if not last or not 0 < largest < math.inf:
        return [1.0] * last
    each = min(1.0, _good(last) / largest) ** (1 / last)
    ending = {index for index in steps if levels[index] == last}
    before = last - 1 if ending <= heads else last  # a classifier that is kept cannot make up for it
    excess = _excess(told, last) * each**before
    if not before or excess <= 1:
        return [each] * last
    return [each / excess ** (1 / before)] * before + [each * excess] * (last - before)
