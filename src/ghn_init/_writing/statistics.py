"""Running statistics of batch norms for weights that no data has passed through.

A batch norm that has seen no data says of its input: mean 0, variance 1. In evaluation mode it then
normalises nothing, and what its weights do to the scale of activations goes on from layer to layer: predicted
filters, which are alike, up to 1e9 at the end of ResNet-50, the initialisation of depthwise convolutions down
to 1e-10 in a MobileNet. So the statistics that belong to the weights are computed from the weights alone, by
a mean-field argument (compare Poole et al. 2016, arXiv 1606.05340) with a sample in the place of a formula,
because channels that are copies vary together (`signals.py`). Evaluation mode then gives what training mode
gives, up to a factor that docs/starting-point.md has.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from ghn_init._graph.graph import LAYER_TYPES, NORM_TYPES
from ghn_init._network.locations import Location
from ghn_init._network.scale import ends_of, scales_of
from ghn_init._network.sharded import is_sharded
from ghn_init._writing.signals import (
    SAMPLES,
    Signal,
    groups_of,
    read_from,
    rectified,
    repeated,
    taps_of,
    through,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from torch import Tensor, nn

    from ghn_init._graph.graph import Graph
    from ghn_init._writing.entry import Entry

_LEAST: Final = 0.03
"""Of a layer's mean variance: no channel's is taken to be less. Behind a GELU a channel that a ReLU would
have silenced still varies, and what is normalised by too small a variance is far too large: with 0.001 a
ConvMixer's outputs were 178 times its own."""


@dataclass(frozen=True, slots=True)
class Followed:
    """What activations that went through the graph say of the weights.

    Attributes:
        statistics: Values of the running means and variances, on the CPU in the buffers' dtype, by their
            qualified names: of batch norms whose input depends on a predicted weight, if they have seen no
            data or are next behind that weight. Of those that had counted batches, the count, too: 0.
        amplified: For every classifier at the layer's own scale how much larger its outputs are than those
            of independent weights of this scale would be, by `Entry.key`.
        outputs: For every classifier of a network without norm layers the root mean square of what it gives.
        read: For every classifier the squared length of what it reads, the mean over images, if anything is
            predicted.
    """

    statistics: Mapping[str, Tensor]
    amplified: Mapping[str, float]
    outputs: Mapping[str, float]
    read: Mapping[str, float]


def followed(network: nn.Module, graph: Graph, entries: Sequence[Entry]) -> Followed:
    """Follow activations through the graph.

    Where the ranks of a sharded network hold parts of a parameter, all have to call this.

    Args:
        network: The network, without wrappers.
        graph: Its graph.
        entries: What is written, at its scale.
    """
    weights: dict[str | None, Entry] = {entry.key: entry for entry in entries if entry.key is not None}
    heads = {graph.nodes[weight].param for weight, _ in graph.heads}
    bare = not any(node.type in NORM_TYPES for node in graph.nodes)
    anything = any(entry.tile is not None for entry in entries)
    heads = {key for key in heads if key in weights and (bare or anything)}
    norms = _norms(network, graph, entries, _next_behind(graph, weights)) if anything else {}
    statistics: dict[str, Tensor] = {}
    amplified: dict[str, float] = {}
    outputs: dict[str, float] = {}
    read: dict[str, float] = {}
    readers = _readers(graph, heads | {key for key, norm in norms.items() if norm.ours})
    scales = _layer_scales(graph, entries) if readers and graph.reads else {}
    signals: dict[int, Signal] = {}
    for index in sorted(readers):
        node, sources = graph.nodes[index], graph.predecessors[index]
        if (reads := graph.reads.get(index)) is None:
            inputs = [signals[source] for source in sources]
        else:
            inputs = [read_from(parts, signals, scales) for parts in reads]
        if node.type == "bn" and inputs:
            norm = norms.get(_name(graph, index))
            signal, found = _normalised(inputs[0], norm)
            if found is not None and norm is not None and norm.ours:
                statistics |= norm.buffers(found)
        else:
            signal = through(node, inputs, weights, taps_of(graph, index), _rms_of(graph, index))
        if node.param in heads and node.param is not None:
            amplified[node.param] = _amplification(
                weights[node.param], inputs[0], signal, _rms_of(graph, index)
            )
            read[node.param] = inputs[0].mean_square * math.prod((node.shape or ())[1:])
            if bare:
                outputs[node.param] = math.sqrt(signal.mean_square)
        told = signal.told or any(x.told for x in inputs)
        signal = rectified(signal) if index in graph.rectified else signal
        if signal.values is None or told != signal.told:
            signal = replace(signal, told=told, seed=index)
        signals[index] = signal
        for source in sources:  # of a wide network all of them together would be larger than a layer
            readers[source] -= 1
            if not readers[source]:
                del signals[source]
    return Followed(statistics, amplified, outputs, read)


def _layer_scales(graph: Graph, entries: Sequence[Entry]) -> dict[str, float]:
    """Root mean squares of the parameters that branches are multiplied by, where they are at hand."""
    wanted = {part.scale for operands in graph.reads.values() for parts in operands for part in parts}
    named = {name: entry for entry in entries for name in entry.names if name in wanted}
    at_hand = {name: entry.param for name, entry in named.items() if entry.numel and not entry.param.is_meta}
    scales = scales_of(list(at_hand.values()))
    return {name: scale.rms for name, scale in zip(at_hand, scales, strict=True)}


def _next_behind(graph: Graph, weights: Mapping[str | None, Entry]) -> set[str | None]:
    """The batch norms that read what predicted weights give, with no kept one in between."""
    giving: set[int] = set()
    for index, node in enumerate(graph.nodes):
        entry = weights.get(node.param)
        if node.type in LAYER_TYPES:
            gives = entry is not None and entry.tile is not None
        else:
            gives = any(source in giving for source in graph.predecessors[index])
        if gives:
            giving.add(index)
    return {_name(graph, index) for index in giving if graph.nodes[index].type == "bn"}


def _name(graph: Graph, index: int) -> str | None:
    """What a node is told by: its parameter, or the path of a batch norm that has none."""
    return graph.nodes[index].param or graph.bare.get(index)


def _readers(graph: Graph, wanted: Collection[str | None]) -> Counter[int]:
    """The nodes that those of wanted parameters depend on, these too, and how many of them read each."""
    readers: Counter[int] = Counter()
    for index in range(len(graph) - 1, -1, -1):
        if index in readers or _name(graph, index) in wanted:
            readers[index] += 0
            readers.update(graph.predecessors[index])
    return readers


@dataclass(frozen=True, slots=True)
class _Norm:
    """A batch norm.

    Attributes:
        prefix: Of its buffers' names.
        channels: Their number.
        dtype: Of its running statistics.
        ours: Its statistics are ours to set, once more too: it has seen no data, or data that went through
            weights that are no more.
        counted: It has counted batches.
        gain: Its weight, as it will be: one number, or float32 on the CPU, (channels,) or what repeats.
        shift: Its bias, likewise.
        eps: What it adds to a variance. In a MobileNet that is 30 times what depthwise filters give.
    """

    prefix: str
    channels: int
    dtype: torch.dtype
    ours: bool
    counted: bool
    gain: Tensor | float
    shift: Tensor | float
    eps: float

    def buffers(self, statistics: Tensor) -> dict[str, Tensor]:
        """Mean and variance, (2, period), by name and as the buffers have them, and that no batch counts."""
        values, largest = repeated(statistics, self.channels), torch.finfo(self.dtype).max
        if largest < torch.finfo(values.dtype).max:
            values = values.clamp(-largest, largest)
        found = dict(zip((f"{self.prefix}{name}" for name in _BUFFERS), values.to(self.dtype), strict=True))
        return found | ({f"{self.prefix}num_batches_tracked": torch.tensor(0)} if self.counted else {})


_BUFFERS: Final = ("running_mean", "running_var")


def _norms(
    network: nn.Module, graph: Graph, entries: Sequence[Entry], next_behind: Collection[str | None]
) -> dict[str | None, _Norm]:
    """Batch norms that stand at one place and keep running statistics, by the weight's name, or their own.

    Those `next_behind` predicted weights have seen no data of theirs.
    """
    alone = [entry for entry in entries if entry.node == "bn" and _is_alone(entry)]
    places = {entry.key: entry.locations[0] for entry in alone} | _without_weight(network, graph)
    tiles = {(e.locations[0].module, e.locations[0].attribute): e.tile for e in alone if e.tile is not None}
    affine = {
        (key, name): param.detach() if tile is None else tile.values.flatten()
        for key, place in places.items()
        for name in ("weight", "bias")
        if (param := getattr(place.module, name)) is not None
        if (tile := tiles.get((place.module, name))) is not None
        or not (param.is_meta or is_sharded(param))  # else nobody knows yet
    }
    ends = ends_of(list(affine.values()))
    numbers = {
        name: low if low == high else values.to("cpu", torch.float32)
        for (name, values), (low, high) in zip(affine.items(), ends, strict=True)
    }
    found = {}
    for key, place in places.items():
        norm = place.module
        assert isinstance(norm, _BatchNorm)  # see `_is_alone` and `_without_weight`
        variance, count = norm.running_var, norm.num_batches_tracked
        if variance is not None and not is_sharded(variance):
            counted = count is not None and not count.is_meta and bool(count)
            fresh = variance.is_meta or (_is_initial(norm) if count is None else not counted)
            prefix = f"{place.path}." if place.path else ""
            gain, shift = numbers.get((key, "weight"), 1.0), numbers.get((key, "bias"), 0.0)
            ours = fresh or key in next_behind
            found[key] = _Norm(prefix, len(variance), variance.dtype, ours, counted, gain, shift, norm.eps)
    return found


def _without_weight(network: nn.Module, graph: Graph) -> dict[str | None, Location]:
    """Batch norms that have no parameters, by path; somebody's own may do with buffers what it likes."""
    modules = ((path, network.get_submodule(path)) for path in set(graph.bare.values()))
    return {path: Location(path, "", module) for path, module in modules if isinstance(module, _BatchNorm)}


def _is_alone(entry: Entry) -> bool:
    """Whether it belongs to one batch norm and to nothing else."""
    modules = {id(location.module) for location in entry.locations}
    return len(modules) == 1 and isinstance(entry.locations[0].module, _BatchNorm)


def _is_initial(norm: _BatchNorm) -> bool:
    """Whether the statistics are those that a batch norm begins with, if it does not count its batches."""
    mean, variance = norm.running_mean, norm.running_var
    return mean is not None and variance is not None and not mean.any() and bool((variance == 1).all())


def _normalised(x: Signal, norm: _Norm | None) -> tuple[Signal, Tensor | None]:
    """What a batch norm gives, and the statistics that belong to its input; None where its own are right."""
    gain, shift, eps = (1.0, 0.0, 0.0) if norm is None else (norm.gain, norm.shift, norm.eps)
    if x.values is None:
        ours = norm is not None and norm.ours and x.told and 0 < x.square < math.inf
        square = x.square / (x.square + eps) if ours else x.square
        if norm is not None and not norm.ours:
            square = 1.0
        statistics = torch.tensor([[0.0], [x.square]], dtype=torch.float32) if ours else None
        return Signal(square * _square(gain) + _square(shift), None, x.channels), statistics
    mean = x.values.mean(0)
    values = x.values - mean
    variance = values.square().sum(0) / (SAMPLES - 1)  # ten times faster than `var`
    usual = float(variance.mean())
    if not 0 < usual < math.inf:
        return Signal(0.0, None, x.channels), None
    variance = variance.clamp_min(_LEAST * usual)
    values /= (variance + eps).sqrt()
    if not isinstance(gain, float) or gain != 1:
        values = torch.mul(*_together(values, gain, norm))
    if not isinstance(shift, float) or shift:
        values = torch.add(*_together(values, shift, norm))
    cut = norm is not None and x.channels not in (None, norm.channels)
    statistics = _of_all(mean, variance) if cut else torch.stack((mean, variance))
    return Signal(values=values, channels=x.channels), statistics


def _of_all(mean: Tensor, variance: Tensor) -> Tensor:
    """(2, 1): those of all channels together, where the graph does not say which of them a norm reads.

    Some channels vary 90 times more than others in a DPN, which cuts and joins feature maps. Taken for one
    another, they come out of its norms so many times too large.
    """
    usual = mean.mean()
    return torch.stack((usual, (variance + (mean - usual).square()).mean()))[:, None]


def _together(values: Tensor, number: Tensor | float, norm: _Norm | None) -> tuple[Tensor, Tensor | float]:
    """Both repeated until they begin anew together, or over all channels."""
    if norm is None or not isinstance(number, torch.Tensor) or len(number) == values.shape[1]:
        return values, number
    period = min(math.lcm(values.shape[1], len(number)), norm.channels)
    return repeated(values, period), repeated(number, period)


def _square(number: Tensor | float) -> float:
    """Mean square."""
    return float(number.square().mean()) if isinstance(number, torch.Tensor) else number**2


def _rms_of(graph: Graph, index: int) -> float | None:
    """The root mean square of a weight that its layer rescales; None of others.

    Where the graph does not say it, activations are taken to keep theirs: 1 / sqrt(fan-in).
    """
    if index not in graph.rescaled:
        return None
    fan_in = math.prod((graph.nodes[index].shape or ())[1:])
    return graph.rescaled[index] or 1 / math.sqrt(max(fan_in, 1))


def _amplification(entry: Entry, x: Signal, y: Signal, rms: float | None) -> float:
    """How much larger a weight's outputs `y` of `x` are than those of independent weights of its scale."""
    if entry.tile is None or entry.rms is None or y.values is None:
        return 1.0
    outputs, inputs, *kernel = entry.tile.shape
    read = x.sampled(groups_of(x.channels, outputs, inputs) * inputs).square().mean()
    independent = (rms or entry.rms) ** 2 * inputs * math.prod(kernel) * float(read)
    return math.sqrt(float(y.values.square().mean()) / independent) if independent > 0 else 1.0
