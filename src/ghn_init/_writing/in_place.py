"""Predictions into the parameters of a network, in place."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from ghn_init._errors import PredictError, listing
from ghn_init._network.locations import parameters_of
from ghn_init._network.pretrained import mark_initialised
from ghn_init._network.sharded import is_sharded, part_of
from ghn_init._network.walk import modules_of
from ghn_init._writing.values import is_diversified, value_of, values_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

    from ghn_init._writing.entry import Entry
    from ghn_init._writing.options import Options

Way = Literal["repeated", "made", "cut", "solved"]


def check_unchanged(network: nn.Module, entries: Sequence[Entry], statistics: Mapping[str, Tensor]) -> None:
    """Check that a network still has the parameters that it was planned with, where they were.

    Args:
        network: The network.
        entries: All rows of the plan.
        statistics: Buffers that are written, by their qualified names.

    Raises:
        PredictError: A module or parameter came, went or was replaced, or a parameter has another shape or
            is tied to others, or a buffer that is written is gone or has another shape; the message names
            them.
    """
    modules = dict(modules_of(network, every_path=True))
    now = {locations: locations[0].get() for locations in parameters_of(network)}
    planned = {entry.locations: entry for entry in entries}
    changed = [locations for locations in now if locations not in planned]
    for locations, entry in planned.items():
        replaced = any(modules.get(place.path) is not place.module for place in locations)
        if locations not in now or replaced or tuple(now[locations].shape) != entry.shape:
            changed.append(locations)
    names = list(dict.fromkeys(place.name for locations in changed for place in locations))
    for name, values in statistics.items():
        path, _, attribute = name.rpartition(".")
        buffer = modules[path]._buffers.get(attribute) if path in modules else None  # noqa: SLF001
        if buffer is None or buffer.shape != values.shape:
            names.append(name)
    if names:
        raise PredictError(
            f"{type(network).__name__} changed since it was planned: {listing(names)}; make a new plan"
        )


def write(network: nn.Module, entries: Sequence[Entry], options: Options) -> None:
    """Copy every prediction into its parameter.

    Args:
        network: The network.
        entries: Those with a prediction, see `to_write`.
        options: The caller's choices.

    Raises:
        PredictError: A device refused a write.
    """
    ways: list[Way] = [_way(entry, options) for entry in entries]
    todo: list[tuple[Entry, Way]] = [
        (_prepared(entry, way), way) for entry, way in zip(entries, ways, strict=True)
    ]
    if any(way != "repeated" for _, way in todo):
        # The largest first, so that memory that does not suffice is found before anything is written.
        todo.sort(key=lambda one: -one[0].param.numel())
    written, tensors = 0, {}
    if any(way == "solved" for _, way in todo):
        tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    try:
        for entry, way in todo:
            _write_one(entry, way, tensors, options)
            written += 1
    except RuntimeError as error:
        failed = todo[written][0]
        raise PredictError(
            f"{type(network).__name__}: {failed.param.device} refused to write {failed.source} "
            f"{tuple(failed.param.shape)}: {error}; {written} of {len(todo)} parameters were written "
            "before, apply the plan again"
        ) from error
    mark_initialised(network, [entry.param for entry, way in todo if way != "solved"])


def write_buffers(network: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy values into buffers, by their qualified names."""
    buffers = dict(network.named_buffers(remove_duplicate=False)) if values else {}
    for name, value in values.items():
        buffers[name].copy_(value)


def _way(entry: Entry, options: Options) -> Way:
    """How a prediction is written.

    "repeated": its block is copied as often as it fits, without a second tensor; "made": the full tensor is
    made first, because it is changed; "cut": the full tensor is made and this rank's part of it copied;
    "solved": it is made and the parameters behind it are solved for.
    """
    assert entry.tile is not None  # see `to_write`
    if entry.computed is not None:
        return "solved"
    if is_sharded(entry.param):
        return "cut"
    return "made" if is_diversified(entry.tile, options) else "repeated"


def _prepared(entry: Entry, way: Way) -> Entry:
    """The same with the block on the parameter's device and in its dtype, if it is written as it is."""
    tile = entry.tile
    if way != "repeated" or tile is None or tile.prior is not None:  # a sum is only made to be read
        return entry
    block = tile.block.to(entry.param.device, entry.param.dtype)
    return entry if block is tile.block else replace(entry, tile=replace(tile, block=block))


def _write_one(entry: Entry, way: Way, tensors: Mapping[str, Tensor], options: Options) -> None:
    """Write a prediction; `tensors` are the network's, by name, for those that are solved for."""
    tile = entry.tile
    param: Any = entry.param  # a DTensor, too
    if way == "solved":
        for name, value in values_of(entry, options).items():
            tensors[name].copy_(value)
    elif way == "cut":
        param.to_local().copy_(part_of(value_of(entry, options), param))
    elif way == "made":
        param.copy_(value_of(entry, options))
    elif tile is not None:
        tile.copy_into(param)
