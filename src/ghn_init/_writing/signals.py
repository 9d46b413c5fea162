"""What activations become from node to node: a sample of them, without the image's extent.

Some dozens of vectors of activations go through the blocks of predicted weights as they are, before they are
repeated, so that channels that are copies vary together. Of a filter that is wider than its image those
places count that lie in it. Activation functions are ReLUs here, weights that are kept independent values of
their scale, and where all activations are independent only their mean square is kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import starmap
from typing import TYPE_CHECKING, Final

import torch

from ghn_init._graph.graph import LAYER_TYPES
from ghn_init._meta.scales import usual_scale
from ghn_init._network.scale import scales_of
from ghn_init._network.sharded import is_sharded

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from ghn_init._graph.graph import Graph, Node, Part, Parts
    from ghn_init._hypernetwork.tile import Tile
    from ghn_init._writing.entry import Entry

SAMPLES: Final = 64
"""Vectors of activations from which a variance is estimated: to a sixth, in one standard deviation."""

SMOOTHNESS: Final = 0.7
"""Correlation of activations at the places of the image that a filter sees. With 0.9, as in images, variances
behind depthwise filters come out too small, because many of those are differences; with 0.5 too large."""

COLOURS: Final = 0.7
"""Correlation of the input's channels, as the colours of an image have."""

_LARGEST, _LARGEST_POSITIVE = 1.47, 2.78
"""What the largest of 3 x 3 values makes of their mean square: of normally distributed ones, and of their
positive parts. (Those of a place share sqrt(SMOOTHNESS) of their deviation.)"""


@dataclass(frozen=True, slots=True)
class Signal:
    """What a node gives.

    Attributes:
        square: Mean square of the activations, where they are independent of each other.
        values: (samples, period) where they are not, repeated over the channels as blocks are; or None.
        channels: Their number, where it is known.
        colours: It is the network's input, perhaps pooled.
        positive: An activation function has been there.
        told: A predicted weight is among what they depend on.
        seed: Of values that stand for independent ones.
    """

    square: float = 1.0
    values: Tensor | None = None
    channels: int | None = None
    colours: bool = False
    positive: bool = False
    told: bool = False
    seed: int = 0

    @property
    def mean_square(self) -> float:
        """Of all activations, whatever is known of them."""
        return self.square if self.values is None else float(self.values.square().mean())

    def sampled(self, channels: int) -> Tensor:
        """(samples, channels): the values, or independent ones in their place."""
        if self.values is not None:
            return _flattened(repeated(self.values, self.channels or channels), channels)
        generator = torch.Generator().manual_seed(self.seed)
        values = torch.randn(SAMPLES, channels, generator=generator, dtype=torch.float32)
        if self.colours:
            common = torch.randn(SAMPLES, 1, generator=generator, dtype=torch.float32)
            values = math.sqrt(COLOURS) * common + math.sqrt(1 - COLOURS) * values
        if self.positive:  # half of the squares are gone
            values = math.sqrt(2) * values.relu()
        return math.sqrt(self.square) * values


def rectified(x: Signal) -> Signal:
    """What a ReLU gives."""
    if x.values is None:
        return replace(x, square=x.square / 2, positive=True)
    return replace(x, values=x.values.relu())


def read_from(parts: Parts, signals: Mapping[int, Signal], scales: Mapping[str, float]) -> Signal:
    """The signal of channels of several nodes side by side; `scales` are those of parameters by name."""
    signal = _joined([_part(signals[part.node], part, scales) for part in parts])
    return replace(signal, told=any(signals[part.node].told for part in parts))


def _part(x: Signal, part: Part, scales: Mapping[str, float]) -> Signal:
    """Some of the channels, if there are as many in all as are said, times a number."""
    first, end, channels = part.cut or (0, 0, None)
    if channels is not None and x.channels == channels and (first, end) != (0, channels):
        values = None if x.values is None else x.sampled(channels)[:, first:end]
        x = replace(x, values=values, channels=end - first)
    scale = 1.0 if part.scale is None else scales.get(part.scale, 1.0)
    if scale == 1:
        return x
    return replace(x, square=x.square * scale**2, values=None if x.values is None else x.values * scale)


def repeated(values: Tensor, channels: int) -> Tensor:
    """(..., period) over all the channels."""
    period = values.shape[-1]
    if period == channels:
        return values
    times = -(-channels // period)
    return values.repeat(*(1,) * (values.ndim - 1), times)[..., :channels]


def _flattened(values: Tensor, channels: int) -> Tensor:
    """The same where the image's places have become channels, each as often as it goes; or fewer are read.

    Of those the graph does not say which. Taken are some of all parts, as after a shuffle.
    """
    have = values.shape[1]
    if have == channels:
        return values
    if have > channels:
        return values[:, torch.arange(channels) * have // channels]
    return values.repeat_interleave(-(-channels // have), 1)[:, :channels]


def taps_of(graph: Graph, index: int) -> Tensor | None:
    """(samples, taps): 1 for what lies in the image at a sample's place; None if (nearly) all of it does."""
    if index not in graph.cropped:
        return None
    sizes, masks = (graph.nodes[index].shape or ())[2:], torch.ones(1, 1, dtype=torch.float32)
    for size, rows in zip(sizes, graph.cropped[index], strict=True):
        first, end = torch.tensor(rows).T[..., None]
        axis = (torch.arange(size) >= first) & (torch.arange(size) < end)
        masks = (masks[:, None, :, None] * axis[:, None]).flatten(2).flatten(0, 1)
    return masks[torch.arange(SAMPLES) * len(masks) // SAMPLES]


def through(
    node: Node, inputs: Sequence[Signal], weights: Mapping[str | None, Entry], taps: Tensor | None,
    rms: float | None,
) -> Signal:  # fmt: skip
    """What a node that is no batch norm gives.

    Args:
        node: The node.
        inputs: What it reads.
        weights: What is predicted or kept, by the name of the node's parameter.
        taps: Of its filter those that are in the image, see `taps_of`.
        rms: The root mean square of the weight that it uses, where that is not the parameter's.
    """
    if not inputs:
        return Signal(colours=True)
    x, entry = inputs[0], weights.get(node.param)
    if node.type in LAYER_TYPES:
        return _convolved(node, x, entry, taps, rms)
    if node.type == "bias":
        return _biased(x, entry)
    if node.type == "sum":
        return _added(inputs)
    if node.type == "concat":
        return _joined(inputs)
    if node.type == "cse" and len(inputs) > 1:
        return _gated(x, inputs[-1])
    if node.type in ("max_pool", "avg_pool") and not x.colours:
        return _pooled(x, math.prod((node.shape or ())[2:]), largest=node.type == "max_pool")
    if node.type == "ln":
        return _layer_normalised(node, x, weights)
    return x


def _convolved(node: Node, x: Signal, entry: Entry | None, taps: Tensor | None, rms: float | None) -> Signal:
    """A convolution or linear layer; one that is kept has independent weights, whatever their scale."""
    if node.shape is None:
        return x
    if entry is not None and entry.tile is not None:
        tile = entry.tile
        if rms is not None:
            tile = tile.scaled(rms / max(float(tile.values.square().mean().sqrt()), 1e-30))
        return Signal(values=_product(tile, x, taps), channels=node.shape[0], told=True)
    square = x.mean_square
    read = math.prod(node.shape[1:]) * (1.0 if taps is None else float(taps.mean()))
    weight = _mean_square(node.shape, entry) if rms is None else rms**2
    return Signal(square * read * weight, None, node.shape[0])


def _mean_square(shape: tuple[int, ...], entry: Entry | None) -> float:
    """Of a weight that is kept; where it is not at hand, as layers usually have it."""
    at_hand = entry is not None and entry.computed is None and not entry.param.is_meta
    scale = scales_of([entry.param])[0] if at_hand and entry is not None else usual_scale(shape)
    return scale.rms**2


def _product(tile: Tile, x: Signal, taps: Tensor | None) -> Tensor:
    """(samples, period) of a weight's outputs; the channels may be several groups of its inputs.

    Copies of a block's columns read the sum of their channels, and copies of its rows give the same. A
    kernel's places see the same value, up to what neighbours in an image differ by: what another sample has.
    Those beside the image see nothing: of a 5x5 filter on one pixel 24.
    """
    outputs, inputs = tile.shape[:2]
    block = _kernels(tile)
    rows, columns, size = block.shape
    groups = groups_of(x.channels, outputs, inputs)
    if inputs == 1 and groups == outputs == x.channels and (period := _common_period(x, rows)):  # depthwise
        groups = outputs = period
        x = replace(x, channels=period)
    values = _folded(x, groups, inputs, columns)
    of_group = outputs // groups
    if groups > 1 and rows < outputs:
        block = block[(torch.arange(groups)[:, None] * of_group + torch.arange(min(of_group, rows))) % rows]
    matrices = block.view(groups, -1, columns, size)
    y = _read(values, matrices[..., 0]) if size == 1 else _convolution(values, matrices, taps)
    return y[:, 0] if groups == 1 else repeated(y, of_group).flatten(1)


def _common_period(x: Signal, rows: int) -> int | None:
    """After how many channels values and so many filters, one for each, begin anew together; None if late."""
    if x.values is None:
        return None
    period = x.values.shape[1]
    longer, shorter = max(period, rows), min(period, rows)
    return longer if longer % shorter == 0 else None


def _convolution(values: Tensor, kernels: Tensor, seen: Tensor | None = None) -> Tensor:
    """(samples, groups, rows) of (samples, groups, columns) and (groups, rows, columns, taps), taps > 1.

    `seen` are the taps that count, (samples, taps); None: all.
    """
    taps = kernels.shape[3]
    everywhere, others = _neighbours(values, taps)
    if seen is not None:
        windows = (everywhere[..., None] + others.unfold(0, taps, 1)) * seen[:, None, None]
        return _read(windows.flatten(2), kernels.flatten(2))
    y = _read(everywhere, kernels.sum(3))
    if kernels.shape[1:3] == (1, 1):  # depthwise, where products of matrices are slow
        for tap, weights in enumerate(kernels[:, 0].permute(2, 0, 1).contiguous()):
            y.addcmul_(others[tap : tap + SAMPLES], weights)
        return y
    return y.add_(_read(others.unfold(0, taps, 1).flatten(2), kernels.flatten(2)))


def _pooled(x: Signal, places: int, *, largest: bool) -> Signal:
    """The largest value or the average of a window, whose places differ as those of a filter do."""
    places = min(places, SAMPLES)
    if x.values is None:
        factor = SMOOTHNESS + (1 - SMOOTHNESS) / places
        if largest and places > 1:
            factor = _LARGEST_POSITIVE if x.positive else _LARGEST
        return replace(x, square=x.square * factor)
    everywhere, others = _neighbours(x.values, places)
    windows = others.unfold(0, places, 1)
    return replace(x, values=everywhere + (windows.amax(-1) if largest else windows.mean(-1)))


def _neighbours(values: Tensor, places: int) -> tuple[Tensor, Tensor]:
    """What all places of a window have in common, and what each has of its own: samples i to i + places - 1.

    Their sum is the mean + common * (values - mean) + own * (what another sample has - mean).
    """
    common, own = math.sqrt(SMOOTHNESS), math.sqrt(1 - SMOOTHNESS)
    everywhere = common * values + (1 - common - own) * values.mean(0)
    return everywhere, own * values[torch.arange(1, SAMPLES + places) % SAMPLES]


def _read(values: Tensor, matrices: Tensor) -> Tensor:
    """(samples, groups, rows) of (samples, groups, columns) and (groups, rows, columns)."""
    if matrices.shape[1:] == (1, 1):
        return values * matrices[:, 0]
    return torch.bmm(values.movedim(1, 0), matrices.transpose(1, 2)).movedim(0, 1)


def groups_of(channels: int | None, outputs: int, inputs: int) -> int:
    """In how many groups a layer reads so many channels."""
    if channels == inputs:
        return 1
    if channels is not None and channels % inputs == 0 and outputs % (channels // inputs) == 0:
        return channels // inputs
    return outputs if inputs == 1 else 1  # the graph does not say which of the channels are read


def _folded(x: Signal, groups: int, inputs: int, columns: int) -> Tensor:
    """(samples, groups, columns): what a layer reads, summed over the copies of a column."""
    if x.values is not None and groups == 1 and x.channels == inputs and x.values.shape[1] == columns:
        times = inputs // columns
        if rest := inputs % columns:
            return (x.values * (times + (torch.arange(columns) < rest)))[:, None]
        return (x.values if times == 1 else x.values * times)[:, None]
    values = x.sampled(groups * inputs).view(SAMPLES, groups, inputs)
    if inputs == columns:
        return values
    return torch.nn.functional.pad(values, (0, -inputs % columns)).unflatten(2, (-1, columns)).sum(2)


def _kernels(tile: Tile) -> Tensor:
    """The block as (rows, columns, places of the kernel), float32 on the CPU."""
    block = tile.values.to("cpu", torch.float32)
    for axis in range(2, block.ndim):
        if (size := tile.shape[axis]) != (have := block.shape[axis]):
            block = block.index_select(axis, torch.arange(size) % have)
    return block.reshape(*block.shape[:2], -1)


def _biased(x: Signal, entry: Entry | None) -> Signal:
    """A bias; one that is kept and not at hand, or that no prediction is before, is taken to be zero."""
    if entry is None:
        return x
    if entry.tile is not None:
        bias = entry.tile.values
    elif x.told and entry.computed is None and not (entry.param.is_meta or is_sharded(entry.param)):
        bias = entry.param.detach()
    else:
        return x
    bias, outputs = bias.to("cpu", torch.float32).flatten(), entry.numel
    if not bias.any():  # copies stay copies
        return x
    if outputs == 1:  # of all channels, as where a layer learns one factor and one shift
        return _shifted(x, float(bias))
    values = x.values
    if values is None or values.shape[1] != len(bias) or x.channels != outputs:
        values, bias = x.sampled(outputs), repeated(bias, outputs)
    return Signal(values=values + bias, channels=outputs)


def _shifted(x: Signal, number: float) -> Signal:
    """The same number added to all activations."""
    if not number:
        return x
    if x.values is None:
        return replace(x, square=x.square + number**2)
    return replace(x, values=x.values + number)


def _added(inputs: Sequence[Signal]) -> Signal:
    channels = max((x.channels or 0 for x in inputs), default=0) or None
    if channels is None or all(x.values is None for x in inputs):
        square = sum(x.square for x in inputs)
        return Signal(square, None, channels, all(x.colours for x in inputs))
    values = [x.values for x in inputs if x.channels == channels and x.values is not None]
    if len(values) < len(inputs) or len({value.shape for value in values}) > 1:
        values = [x.sampled(channels) for x in inputs]
    return Signal(values=torch.stack(values).sum(0), channels=channels)


def _layer_normalised(node: Node, x: Signal, weights: Mapping[str | None, Entry]) -> Signal:
    """What a layer norm gives, with its weight and bias where they are predicted."""
    values = None if x.values is None else torch.nn.functional.layer_norm(x.values, x.values.shape[1:])
    gain = weights.get(node.param)
    if gain is None or gain.tile is None:
        return Signal(1.0, values, x.channels)
    shift, channels = weights.get(node.bias), gain.numel
    signal = Signal(1.0, values, x.channels or channels)
    scaled = signal.sampled(channels) * repeated(gain.tile.values.to("cpu", torch.float32), channels)
    if shift is not None and shift.tile is not None:
        scaled += repeated(shift.tile.values.to("cpu", torch.float32), channels)
    return Signal(values=scaled, channels=channels)


def _joined(inputs: Sequence[Signal]) -> Signal:
    """Channels side by side; the input's own are too few to count."""
    parts = [(x, x.channels) for x in inputs if x.channels is not None]
    if not parts:
        return inputs[0]
    channels = sum(count for _, count in parts)
    if all(x.values is None for x, _ in parts):
        square = sum(x.square * count for x, count in parts) / channels
        return Signal(square, None, channels, positive=all(x.positive for x, _ in parts))
    return Signal(values=torch.cat(list(starmap(Signal.sampled, parts)), 1), channels=channels)


def _gated(x: Signal, gate: Signal) -> Signal:
    """Channels times the sigmoid of others."""
    channels = x.channels or (len(x.values[0]) if x.values is not None else None)
    if channels is None or x.values is None:
        return replace(x, square=x.square / 4)
    return Signal(values=x.sampled(channels) * gate.sampled(channels).sigmoid(), channels=channels)
