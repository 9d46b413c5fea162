"""From predicted tiles to the full tensors that are written."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ghn_init._errors import PredictError
from ghn_init._hypernetwork.tile import copy_tiled, stored_form
from ghn_init._writing.diversify import diversify
from ghn_init._writing.entry import Cause, Decision, to_write

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ghn_init._hypernetwork.tile import Tile
    from ghn_init._writing.entry import Entry
    from ghn_init._writing.options import Options


def values_of(entry: Entry, options: Options) -> dict[str, Tensor]:
    """Names (`Entry.written`) and full tensors of what is written for an entry.

    Raises:
        PredictError: A computed weight that cannot be made what was predicted.
    """
    value = value_of(entry, options)
    return {entry.name: value} if entry.computed is None else entry.computed.solve(value, options.seed)


def value_of(entry: Entry, options: Options) -> Tensor:
    """The full predicted tensor in its own shape, diversified if so wanted.

    It has the dtype of the entry's parameter, and is on its device or, of a meta network, on the CPU.
    """
    tile, param = entry.tile, entry.param
    assert tile is not None  # see `to_write`
    device = torch.device("cpu") if param.is_meta else param.device
    if not is_diversified(tile, options):
        full = torch.empty(tile.stored, dtype=param.dtype, device=device)
        tile.copy_into(full)
        return full
    block = tile.values.cpu()
    full = torch.empty(tile.shape, dtype=block.dtype)
    copy_tiled(full, block)
    assert options.diversify is not None  # see `is_diversified`
    diversify(full, block, options.diversify, name=entry.source, seed=options.seed)
    if entry.rms is not None and (norm := float(torch.linalg.vector_norm(full))):
        full *= entry.rms * full.numel() ** 0.5 / norm
    return stored_form(full.unsqueeze(0), tile.stored, tile.transposed)[0].to(device, param.dtype)


def is_diversified(tile: Tile, options: Options) -> bool:
    """Whether the prediction is changed before it is written: full, in float32, on the CPU."""
    return options.diversify is not None and len(tile.shape) > 1


def without_unsolvable(entries: Sequence[Entry], options: Options) -> list[Entry]:
    """The same entries; kept are those of computed weights that cannot be made what was predicted."""
    refused: dict[str, str] = {}
    for entry in to_write(entries):
        if entry.computed is not None:
            try:
                values_of(entry, options)
            except PredictError as error:
                refused[entry.source] = str(error).removeprefix(f"{entry.source}: ")
    if not refused:
        return list(entries)
    return [
        replace(entry, decision=Decision(Cause.UNWRITABLE, refused[entry.source]), tile=None)
        if entry.tile is not None and entry.source in refused
        else entry
        for entry in entries
    ]
