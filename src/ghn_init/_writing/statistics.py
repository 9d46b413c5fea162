"""Running statistics of batch norms for weights that no data has passed through.

A batch norm that has seen no data says of its input: mean 0, variance 1. For independent weights of the
usual scale that is near enough, and evaluation mode works at once. Predicted filters are alike, and copies
of each other where they are tiled: what they agree on grows from layer to layer, up to 1e9 at the end of
ResNet-50. So the statistics that belong to them are computed from the weights alone, by a mean-field
argument (compare Poole et al. 2016, arXiv 1606.05340) with a sample in the place of a formula, because
channels that are copies vary together: some dozens of vectors of activations, without the image's extent,
go through the graph, and through the blocks of predicted weights as they are, before they are repeated.

What comes out is the variance relative to that which the layer's own values would have given, so that
activations keep the size that the network's own initialisation gives them in evaluation mode, whatever it
is.

The graph tells of no activation functions. Every convolution is taken to read what a ReLU lets through,
except of the input; that is so of both, the predicted and the own values, and errors cancel to first order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import starmap
from typing import TYPE_CHECKING, Final

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from ghn_init._graph.graph import WEIGHT_TYPES
from ghn_init._network.sharded import is_sharded

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ghn_init._graph.graph import Graph, Node
    from ghn_init._hypernetwork.tile import Tile
    from ghn_init._writing.entry import Entry

SAMPLES: Final = 64
"""Vectors of activations from which a variance is estimated: to a sixth, in one standard deviation."""

SMOOTHNESS: Final = 0.9
"""Correlation of an activation with its neighbour's in the image, which a filter of several pixels sees."""

COLOURS: Final = 0.7
"""Correlation of the input's channels, as the colours of an image have."""

_LEAST: Final = 1e-3
"""Of a layer's mean variance: no channel's variance is taken to be less."""


def running_statistics(graph: Graph, entries: Sequence[Entry]) -> dict[str, Tensor]:
    """Values of the running means and variances, on the CPU in the buffers' dtype, by their qualified names.

    Of those batch norms that have seen no data and whose input depends on a predicted weight.

    Args:
        graph: The network's graph.
        entries: What is written, at its final scale, with the scale of the values before (`Entry.own`).
    """
    weights = {entry.key: entry for entry in entries if entry.tile is not None and entry.own is not None}
    norms = _untouched(entries) if weights else {}
    if not norms:
        return {}
    signals: list[_Signal] = []
    found: dict[str, Tensor] = {}
    for node, sources in zip(graph.nodes, graph.predecessors, strict=True):
        inputs = [signals[source] for source in sources]
        if node.type == "bn" and inputs:
            signal, statistics = _normalised(inputs[0])
            if statistics is not None and node.param in norms:
                prefix, dtype = norms[node.param]
                for name, value in zip(("running_mean", "running_var"), statistics, strict=True):
                    whole = _repeated(value, signal.channels or len(value))
                    found[prefix + name] = whole.double().clamp(max=torch.finfo(dtype).max).to(dtype)
        else:
            signal = _through(node, inputs, weights)
        signals.append(replace(signal, seed=len(signals)))
    return found


def _untouched(entries: Sequence[Entry]) -> dict[str | None, tuple[str, torch.dtype]]:
    """Batch norms without data so far, by the weight's name: the path of their buffers, and the dtype."""
    norms: dict[str | None, tuple[str, _BatchNorm]] = {}
    for entry in entries:
        place = entry.locations[0]
        alone = len({id(location.module) for location in entry.locations}) == 1
        if entry.node == "bn" and alone and isinstance(place.module, _BatchNorm):
            norms[entry.key] = f"{place.path}." if place.path else "", place.module
    return {
        key: (prefix, norm.running_var.dtype)
        for key, (prefix, norm) in norms.items()
        if norm.running_var is not None and not is_sharded(norm.running_var) and _is_fresh(norm)
    }


def _is_fresh(norm: _BatchNorm) -> bool:
    """Whether the statistics are those that a batch norm begins with; on the meta device they will be."""
    mean, variance = norm.running_mean, norm.running_var
    if mean is None or variance is None:
        return False
    return variance.is_meta or (not mean.any() and bool((variance == 1).all()))


@dataclass(frozen=True, slots=True)
class _Signal:
    """What a node gives.

    Attributes:
        square: Mean square of the activations with the values that the network had.
        values: (samples, period) with those that are written, repeated over the channels as blocks are;
            None: they are as before, independent.
        channels: Their number, where it is known.
        raw: It is the network's input, perhaps pooled: no activation function comes after it.
        seed: Of values that stand for others.
    """

    square: float
    values: Tensor | None = None
    channels: int | None = None
    raw: bool = False
    seed: int = 0

    def sampled(self, channels: int) -> Tensor:
        """(samples, channels): the values, or independent ones in their place."""
        if self.values is not None:
            return _flattened(_repeated(self.values, self.channels or channels), channels)
        generator = torch.Generator().manual_seed(self.seed)
        values = torch.randn(SAMPLES, channels, generator=generator)
        if self.raw:
            common = torch.randn(SAMPLES, 1, generator=generator)
            values = math.sqrt(COLOURS) * common + math.sqrt(1 - COLOURS) * values
        return math.sqrt(self.square) * values


def _repeated(values: Tensor, channels: int) -> Tensor:
    """(..., period) over all the channels."""
    period = values.shape[-1]
    return values if period == channels else values[..., torch.arange(channels) % period]


def _flattened(values: Tensor, channels: int) -> Tensor:
    """The same where the image's places have become channels: each as often as it goes."""
    have = values.shape[1]
    if have == channels:
        return values
    return values.repeat_interleave(-(-channels // have), 1)[:, :channels]


def _normalised(x: _Signal) -> tuple[_Signal, tuple[Tensor, Tensor] | None]:
    """What a batch norm gives with the right statistics, and these; None where its own are right."""
    if x.values is None or not x.square > 0:
        return _Signal(x.square, None, x.channels, x.raw), None
    mean, variance = x.values.mean(0), x.values.var(0) / x.square
    if not 0 < float(variance.mean()) < math.inf:
        return _Signal(x.square, None, x.channels), None
    variance = variance.clamp_min(_LEAST * float(variance.mean()))
    return _Signal(x.square, (x.values - mean) / variance.sqrt(), x.channels), (mean, variance)


def _through(node: Node, inputs: Sequence[_Signal], weights: dict[str | None, Entry]) -> _Signal:
    """What a node that is no batch norm gives."""
    if not inputs:
        return _Signal(1.0, raw=True)
    x, entry = inputs[0], weights.get(node.param)
    if node.type in WEIGHT_TYPES - {"pos_enc"}:
        return _convolved(node, x, entry)
    if node.type == "bias":
        return _biased(x, entry)
    if node.type == "sum":
        return _added(inputs)
    if node.type == "concat":
        return _joined(inputs)
    if node.type == "cse" and len(inputs) > 1:
        return _gated(x, inputs[-1])
    if node.type == "ln" and x.square > 0:
        values = None if x.values is None else torch.nn.functional.layer_norm(x.values, x.values.shape[1:])
        return _Signal(1.0, values, x.channels)
    return x


def _convolved(node: Node, x: _Signal, entry: Entry | None) -> _Signal:
    """A convolution or linear layer."""
    if node.shape is None:
        return x
    outputs, inputs, *kernel = (*node.shape, 1)[: max(2, len(node.shape))]
    if entry is None or entry.tile is None or entry.own is None:
        return _Signal(x.square, None, outputs)
    square = math.prod((inputs, *kernel)) * entry.own**2 * x.square * (1 if x.raw else 0.5)
    return _Signal(square, _product(entry.tile, x), outputs)


def _product(tile: Tile, x: _Signal) -> Tensor:
    """(samples, period) of a weight's outputs; the channels may be several groups of its inputs.

    Copies of a block's columns read the sum of their channels, and copies of its rows give the same. A
    kernel's places see the same value, up to what neighbours in an image differ by.
    """
    outputs, inputs = tile.shape[:2]
    block = _kernels(tile)
    rows, columns, taps = block.shape
    groups = _groups(x.channels, outputs, inputs)
    values = _folded(x, groups, inputs, columns)
    if taps > 1:
        mean = values.mean(0)
        varied = values - mean
        others = (torch.arange(SAMPLES) + torch.arange(1, taps + 1)[:, None]) % SAMPLES
        varied = math.sqrt(SMOOTHNESS) * varied + math.sqrt(1 - SMOOTHNESS) * varied[others]
        values = (mean + varied).permute(1, 2, 3, 0)  # samples, groups, columns, taps
    of_group = outputs // groups
    distinct = min(of_group, rows)
    index = (torch.arange(groups)[:, None] * of_group + torch.arange(distinct)) % rows
    matrices = block[index].flatten(2)  # groups, distinct rows, columns x taps
    y = torch.einsum("sgc,gdc->sgd", values.reshape(SAMPLES, groups, -1), matrices)
    return y[:, 0] if groups == 1 else _repeated(y, of_group).flatten(1)


def _groups(channels: int | None, outputs: int, inputs: int) -> int:
    """In how many groups a layer reads so many channels."""
    if channels is None:
        return outputs if inputs == 1 else 1
    groups = channels // inputs
    return groups if channels % inputs == 0 and groups > 1 and outputs % groups == 0 else 1


def _folded(x: _Signal, groups: int, inputs: int, columns: int) -> Tensor:
    """(samples, groups, columns): what a layer reads, summed over the copies of a column."""
    if x.values is not None and groups == 1 and x.channels == inputs and x.values.shape[1] == columns:
        values = x.values if x.raw else x.values.relu()
        times = inputs // columns + (torch.arange(columns) < inputs % columns)
        return (values * times)[:, None]
    values = x.sampled(groups * inputs).view(SAMPLES, groups, inputs)
    values = values if x.raw else values.relu()
    return torch.nn.functional.pad(values, (0, -inputs % columns)).unflatten(2, (-1, columns)).sum(2)


def _kernels(tile: Tile) -> Tensor:
    """The block as (rows, columns, places of the kernel), float32 on the CPU."""
    block = tile.values.to("cpu", torch.float32)
    for axis in range(2, block.ndim):
        if (size := tile.shape[axis]) != (have := block.shape[axis]):
            block = block.index_select(axis, torch.arange(size) % have)
    return block.reshape(*block.shape[:2], -1)


def _biased(x: _Signal, entry: Entry | None) -> _Signal:
    """A bias; one that is kept is taken to be zero."""
    if entry is None or entry.tile is None or entry.own is None:
        return x
    bias, outputs = entry.tile.values.to("cpu", torch.float32).flatten(), entry.numel
    values = x.values
    if values is None or values.shape[1] != len(bias) or x.channels != outputs:
        values, bias = x.sampled(outputs), _repeated(bias, outputs)
    return _Signal(x.square + entry.own**2, values + bias, outputs)


def _added(inputs: Sequence[_Signal]) -> _Signal:
    square = sum(x.square for x in inputs)
    channels = max((x.channels or 0 for x in inputs), default=0) or None
    raw = all(x.raw for x in inputs)
    if channels is None or all(x.values is None for x in inputs):
        return _Signal(square, None, channels, raw)
    values = [x.values for x in inputs if x.channels == channels and x.values is not None]
    if len(values) < len(inputs) or len({value.shape for value in values}) > 1:
        values = [x.sampled(channels) for x in inputs]
    return _Signal(square, torch.stack(values).sum(0), channels, raw)


def _joined(inputs: Sequence[_Signal]) -> _Signal:
    """Channels side by side; the input's own are too few to count."""
    parts = [(x, x.channels) for x in inputs if x.channels is not None]
    if not parts:
        return inputs[0]
    channels = sum(count for _, count in parts)
    square = sum(x.square * count for x, count in parts) / channels
    if all(x.values is None for x, _ in parts):
        return _Signal(square, None, channels)
    return _Signal(square, torch.cat(list(starmap(_Signal.sampled, parts)), 1), channels)


def _gated(x: _Signal, gate: _Signal) -> _Signal:
    """Channels times the sigmoid of others; own gates are half open."""
    if x.values is None:
        return _Signal(x.square / 4, None, x.channels)
    channels = x.channels or x.values.shape[1]
    return _Signal(x.square / 4, x.sampled(channels) * gate.sampled(channels).sigmoid(), channels)
