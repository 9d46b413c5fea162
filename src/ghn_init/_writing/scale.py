"""Predictions at the scale of the layer's values before the call.

As the start of training of a network that the GHN does not know, predicted weights owe their good to their
direction, and nearly all of the harm that they can do to their scale and to predicted norm layers
(docs/starting-point.md). So a prediction is multiplied to have the scale that the network's author gave the
parameter, norm layers stay as they were, and so does a parameter whose values are all one number: a residual
branch or gate that starts at zero was meant to. `training.py` says where more than that is good. There the
norms of residual branches are predicted, too, which begin at zero by many a library's default.

Of a vector, the scale is the root mean square. Of a matrix (output channels x the rest) it is that, too,
unless the prediction is the more coherent one. The spectral norm of m x n independent values is close to
sqrt(m) + sqrt(n) times their root mean square. Predicted filters are alike, and copies of each other where
they are tiled, so at the same root mean square they amplify what they agree on many times more, layer after
layer. Then it is the spectral norm that is kept (compare Yang et al. 2023, "A Spectral Condition for Feature
Learning", arXiv 2310.17813), as estimated from the first 64 filters.

What stays is known before anything is decoded (`with_own_scales`), so that it need not be.

A parameter on the meta device has no values; its scale is the one that its module's own initialisation would
give it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Final

import torch

from ghn_init._graph.graph import LAYER_TYPES, NORM_TYPES
from ghn_init._hypernetwork.channels import axis_of, per_place
from ghn_init._meta.scales import initial_scales, usual_scale
from ghn_init._network.scale import Magnitude, constants_of, rounded, scales_of
from ghn_init._network.sharded import is_sharded
from ghn_init._writing.entry import Cause, Decision, to_write

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from torch import Tensor, nn

    from ghn_init._graph.graph import Graph
    from ghn_init._hypernetwork.tile import Tile
    from ghn_init._writing.entry import Entry
    from ghn_init._writing.options import Options

ROWS: Final = 64
"""Filters from which a spectral norm is estimated: the decoder's blocks have no more, so they hold all that a
tiled weight consists of."""

COHERENT: Final = 0.9
"""Ratio of spectral norms at equal root mean square, below which the prediction is the more coherent one."""

_ROUNDED: Final = 1.01
"""More than a factor by which rounding a scale changes it, see `Magnitude.rms`."""

NORM: Final = "norm layer"

_SQUARINGS: Final = 7
"""Of a Gram matrix: its largest eigenvalue is then exact to 3.3 % at worst, 64 equal ones."""

_NORMALISED: Final = 4
"""Squarings after which a trace is made 1 again: of 64 equal eigenvalues the power 16 is then 1e-29 each."""


def with_own_scales(
    network: nn.Module,
    graph: Graph,
    entries: Sequence[Entry],
    options: Options,
    strange: Mapping[str | None, str],
    norms: Collection[str] = NORM_TYPES,
    *,
    silenced: bool = True,
) -> list[Entry]:
    """The same entries; kept are norm layers, what is strange, and values that are all one number.

    Nothing has to be decoded for what is kept. Entries on the meta device get their scale (`Entry.own`), and
    are not kept if nobody would give them a value. Where the ranks of a sharded network hold parts of a
    parameter, all have to call this: they exchange a few numbers.

    Args:
        network: The network, with the values whose scale counts.
        graph: Its graph.
        entries: From `select`.
        options: The caller's choices.
        strange: What `scale="auto"` keeps beside that, by `Entry.key`, with the reason.
        norms: Types of the norm layers that are kept.
        silenced: Of other norm layers those are kept, with their biases, whose weight is zero.
    """
    predicted = {entry.source: entry for entry in entries if entry.decision.predict}
    initial = _initial_scales(network, predicted, options.seed)
    kept = {
        source: Decision(Cause.OWN, NORM) if entry.node in norms else Decision(Cause.AUTO, strange[entry.key])
        for source, entry in predicted.items()
        if entry.node in norms or entry.key in strange
        if source not in initial or initial[source] is not None
    }
    read = {source: _own_values(e) for source, e in predicted.items() if source not in kept | initial}
    constants = dict(zip(read, constants_of(list(read.values())), strict=True))
    constants |= {source: scale.constant for source, scale in initial.items() if scale is not None}
    for source, constant in constants.items():
        if constant is not None and predicted[source].node not in NORM_TYPES:  # if still there, it is wanted
            kept.setdefault(source, Decision(Cause.OWN, f"all its values are {constant:g}"))
    kept |= _alone(predicted, constants)
    if silenced:
        kept |= _silenced(graph, predicted, constants)
    shapes = {node.param: node.shape for node in reversed(graph.nodes)} if initial else {}
    for source in [source for source, scale in initial.items() if scale is None]:
        shape, norm = shapes.get(predicted[source].key), predicted[source].node in NORM_TYPES
        if shape is not None and len(shape) > 1 and not norm:  # a norm or bias is as predicted
            initial[source] = usual_scale(shape)
    return [
        entry
        if not entry.decision.predict
        else _settled(entry, kept.get(entry.source), initial.get(entry.source))
        for entry in entries
    ]


def _silenced(
    graph: Graph, predicted: Mapping[str, Entry], constants: Mapping[str, float | None]
) -> dict[str, Decision]:
    """Norms whose weight is zero, and their biases, by `Entry.source`: branches that begin silent."""
    sources = {entry.key: source for source, entry in predicted.items() if entry.node in NORM_TYPES}
    found: dict[str, Decision] = {}
    for node in graph.nodes:
        if node.param in sources and constants.get(sources[node.param]) == 0:
            both = [sources[name] for name in (node.param, node.bias) if name in sources]
            found |= dict.fromkeys(both, Decision(Cause.OWN, "its norm layer begins at zero"))
    return found


def _alone(predicted: Mapping[str, Entry], constants: Mapping[str, float | None]) -> dict[str, Decision]:
    """Biases beside a weight of zeros, by `Entry.source`: they are all that the layer gives, and meant."""
    zero = {
        id(location.module)
        for source, entry in predicted.items()
        if constants.get(source) == 0 and entry.node in LAYER_TYPES
        for location in entry.locations
    }
    return {
        source: Decision(Cause.OWN, "its layer's weight begins at zero")
        for source, entry in predicted.items()
        if entry.node == "bias" and any(id(location.module) in zero for location in entry.locations)
    }


def _settled(entry: Entry, kept: Decision | None, scale: Magnitude | None) -> Entry:
    """The entry kept, if that was decided, or with this scale."""
    if kept is not None:
        return replace(entry, decision=kept)
    return entry if scale is None else replace(entry, own=scale.rms)


def _initial_scales(
    network: nn.Module, entries: Mapping[str, Entry], seed: int
) -> dict[str, Magnitude | None]:
    """Scales that modules give what is on the meta device, by `Entry.source`; None where nobody does."""
    lost = {entry.name: entry for entry in entries.values() if _is_lost(entry)}
    initial = initial_scales(network, lost, seed) if lost else {}
    return {entry.source: initial.get(name) for name, entry in lost.items()}


def _is_lost(entry: Entry) -> bool:
    """Whether it is on the meta device, without values that could be kept."""
    return any(location.get().is_meta for location in entry.locations)


def _own_values(entry: Entry) -> Tensor:
    return entry.param if entry.computed is None else entry.computed.value()


def at_own_scale(entries: Sequence[Entry], options: Options) -> list[Entry]:
    """The same entries, predictions multiplied to have the parameter's own scale, where it has one (not NaN).

    Where the ranks of a sharded network hold parts of a parameter, all have to call this.

    Args:
        entries: From `with_predictions`, of what `with_own_scales` gave.
        options: The caller's choices.
    """
    wanted, own = to_write(entries), _own_scales(entries)
    found = [
        _Pair(entry.source, entry.tile, own[entry.source], _own_gram(entry, entry.tile))
        for entry in wanted
        if entry.tile is not None and 0 < own.get(entry.source, 0.0) < math.inf
    ]
    written = _rescaled(found, options)
    return [
        replace(entry, rms=written[entry.source][0], tile=written[entry.source][1])
        if entry.tile is not None and entry.source in written
        else entry
        for entry in entries
    ]


def at_most_own_scale(entries: Sequence[Entry], keys: Collection[str | None]) -> list[Entry]:
    """The same entries; predictions of these parameters are made smaller where their own values are.

    Where the ranks of a sharded network hold parts of a parameter, all have to call this.

    Args:
        entries: From `with_predictions`.
        keys: Of the parameters, see `Entry.key`.
    """
    own = _own_scales([entry for entry in entries if entry.key in keys])
    return [_at_most(entry, own.get(entry.source, math.inf)) for entry in entries]


def at_most_usual_scale(entries: Sequence[Entry], keys: Collection[str | None]) -> list[Entry]:
    """The same entries; predictions of these parameters are no larger than torch's layers initialise them.

    A network's own values are no measure where a prediction is made smaller once more (`features.py`): every
    further call would begin from that.

    Args:
        entries: From `with_predictions`.
        keys: Of the parameters, see `Entry.key`.
    """
    return [entry if entry.key not in keys else _at_most_usual(entry) for entry in entries]


def _at_most_usual(entry: Entry) -> Entry:
    if entry.tile is None or (rms := float(_rms(entry.tile))) <= (usual := usual_scale(entry.tile.shape).rms):
        return entry
    return replace(entry, factor=entry.factor * usual / rms, tile=entry.tile.scaled(usual / rms))


def _at_most(entry: Entry, own: float) -> Entry:
    """The same, at the scale `own` if that is less (and not 0 or NaN).

    Less than it is rounded by does not count, so that predicting again gives the same bits.
    """
    if entry.tile is None or not 0 < own < math.inf or (rms := float(_rms(entry.tile))) <= _ROUNDED * own:
        return entry
    return replace(entry, rms=own, tile=entry.tile.scaled(own / rms))


def _own_scales(entries: Sequence[Entry]) -> dict[str, float]:
    """Root mean squares of the values before the call, of what is written, by `Entry.source`."""
    wanted = to_write(entries)
    present = [entry for entry in wanted if not _is_lost(entry)]
    own = {entry.source: entry.own for entry in wanted if entry.own is not None}
    scales = scales_of(list(map(_own_values, present)))
    return own | {entry.source: scale.rms for entry, scale in zip(present, scales, strict=True)}


@dataclass(frozen=True)
class _Pair:
    """A prediction and what is to be known of the values before it.

    Attributes:
        source: `Entry.source`.
        tile: The prediction.
        own: Root mean square of the values.
        gram: Of their first filters, see `_gram`; None for a vector or if they are not at hand.
    """

    source: str
    tile: Tile
    own: float
    gram: Tensor | None


def _rescaled(pairs: Sequence[_Pair], options: Options) -> dict[str, tuple[float, Tile]]:
    """Root mean square and tile that predictions other than zeros get, by `Entry.source`."""
    if not pairs:
        return {}
    found = torch.stack([_rms(pair.tile).cpu() for pair in pairs]).tolist()
    matrices = [
        index
        for index, pair in enumerate(pairs)
        if len(pair.tile.shape) > 1 and found[index] and options.diversify != "orthogonal"
    ]
    grams, squares = [], []
    for index in matrices:
        grams += [_gram(_filters(pairs[index].tile)), pairs[index].gram]
        squares += [found[index] ** 2, pairs[index].own ** 2]
    norms = _relative_norms(grams, squares, [pairs[index].tile.shape for index in matrices for _ in range(2)])
    ratios = {index: norms[2 * i + 1] / norms[2 * i] for i, index in enumerate(matrices)}
    written = {}
    for index, (pair, rms) in enumerate(zip(pairs, found, strict=True)):
        if rms:  # else there is no direction, and zeros they stay
            ratio = ratios.get(index, 1.0)
            own = rounded(pair.own * (ratio if ratio < COHERENT else 1.0))
            written[pair.source] = own, pair.tile.scaled(own / rms)
    return written


def _relative_norms(
    grams: Sequence[Tensor | None], squares: Sequence[float], shapes: Sequence[tuple[int, ...]]
) -> list[float]:
    """Estimated spectral norms of matrices of root mean square 1, see the module's docstring.

    What the first filters have beyond independent values is taken to grow with the number of filters, as it
    does where they repeat.

    Args:
        grams: Of the first filters of each matrix, see `_gram`; None: as those of independent values.
        squares: Mean square of each matrix.
        shapes: Of the whole parameters, output channels first.
    """
    largest = iter(_largest_eigenvalues([gram for gram in grams if gram is not None]))
    norms = []
    for gram, square, (m, *rest) in zip(grams, squares, shapes, strict=True):
        n, few = math.prod(rest), min(m, ROWS)
        excess = 0.0
        if gram is not None:
            excess = max(0.0, next(largest) / square - (math.sqrt(few) + math.sqrt(n)) ** 2)
        norms.append(math.sqrt((math.sqrt(m) + math.sqrt(n)) ** 2 + m / few * excess))
    return norms


def _gram(rows: Tensor) -> Tensor:
    """The product of a matrix with its transpose, whichever is smaller."""
    return rows @ rows.T if len(rows) <= rows.shape[1] else rows.T @ rows


def _largest_eigenvalues(grams: Sequence[Tensor]) -> list[float]:
    """The largest eigenvalue of each positive semi-definite matrix, by the trace of a high power."""
    groups: dict[tuple[torch.device, int], list[int]] = {}
    for index, gram in enumerate(grams):
        groups.setdefault((gram.device, len(gram)), []).append(index)
    found = [0.0] * len(grams)
    for indices in groups.values():
        power = torch.stack([grams[index] for index in indices])
        logarithm = torch.zeros(len(indices), device=power.device, dtype=power.dtype)
        for step in range(_SQUARINGS + 1):
            last = step == _SQUARINGS  # the trace of a symmetric matrix's square takes no product
            if last or step % _NORMALISED == 0:
                trace = power.square().sum((1, 2)) if last else power.diagonal(dim1=1, dim2=2).sum(1)
                trace = trace.clamp_min(torch.finfo(power.dtype).tiny)
                logarithm += trace.log() / 2**step
            if step % _NORMALISED == 0:
                power = power / trace[:, None, None]
            if step < _SQUARINGS - 1:
                power = power @ power
        for index, value in zip(indices, logarithm.exp().tolist(), strict=True):
            found[index] = value
    return found


def _own_gram(entry: Entry, tile: Tile) -> Tensor | None:
    """That of a parameter's first filters; None for a vector, or without all values."""
    if len(tile.shape) < 2 or _is_lost(entry) or is_sharded(values := _own_values(entry)):
        return None
    outputs_first = values.detach()
    if tile.transposed:
        swapped = (tile.shape[1], tile.shape[0], *tile.shape[2:])
        outputs_first = outputs_first.reshape(swapped).transpose(0, 1)
    return _gram(outputs_first.reshape(tile.shape)[:ROWS].flatten(1).float())


def _filters(tile: Tile) -> Tensor:
    """The first filters of the full tensor; what repeats stands there once, times the root of its number."""
    rows = tile.first(ROWS)
    if len(rows) < (few := min(tile.shape[0], ROWS)):
        rows = rows[torch.arange(few, device=rows.device) % len(rows)]
    rows = rows.float()
    for axis, times in _repeats(tile.sizes, tile.shape, tile.stretches):
        if axis:
            times = times if isinstance(times, int) else _along(axis, times.to(rows), rows)
            rows = rows * times**0.5
    return rows.flatten(1)


def _rms(tile: Tile) -> Tensor:
    """Root mean square of the full tensor, float64."""
    square = _mean_square(tile.block, tile.shape, tile.stretches)
    if tile.prior is not None:
        channels = tile.shape[: len(tile.shape) - len(tile.prior.place)]
        before, after = tile.block[(..., *tile.prior.place)], tile.prior.where_added(tile.block)
        change = _mean_square(after, channels, tile.stretches) - _mean_square(
            before, channels, tile.stretches
        )
        square = square + change * math.prod(channels) / math.prod(tile.shape)
    return square.clamp_min(0).sqrt()


def _mean_square(values: Tensor, shape: tuple[int, ...], stretches: tuple[int, ...]) -> Tensor:
    """Mean square of values that repeat in a tensor of this shape, float64: each as often as it repeats."""
    repeats = _repeats(tuple(values.shape), shape, stretches)
    unequal = [(axis, times) for axis, times in repeats if not isinstance(times, int)]
    if not unequal:
        return torch.linalg.vector_norm(values, dtype=torch.float64).square() / values.numel()
    squares = values.double().square()
    for axis, times in unequal:
        squares = squares * _along(axis, times.to(squares) / times.mean(), squares)
    return squares.mean()


@lru_cache(maxsize=1024)
def _repeats(
    sizes: tuple[int, ...], shape: tuple[int, ...], stretches: tuple[int, ...]
) -> list[tuple[int, int | Tensor]]:
    """The axes along which a block repeats, and how often: of each place where not all do equally often."""
    found: list[tuple[int, int | Tensor]] = []
    for axis, (size, want) in enumerate(zip(sizes, shape, strict=True)):
        if want != size:
            along = stretches if stretches and axis == axis_of(shape) else (want,)
            times = per_place(along, size)
            equal = min(times) == max(times)
            found.append((axis, times[0] if equal else torch.tensor(times, dtype=torch.float64)))
    return found


def _along(axis: int, numbers: Tensor, values: Tensor) -> Tensor:
    """A vector as factors along an axis of `values`."""
    return numbers.view(-1, *(1,) * (values.ndim - axis - 1))
