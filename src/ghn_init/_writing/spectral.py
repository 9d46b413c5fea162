"""Weights that layers do not use as they are stored, and the vectors of the older spectral norm.

`torch.nn.utils.spectral_norm` is a hook that divides a weight W by u W v, and improves u and v by one power
iteration in every forward pass in training mode. Those that it has after another weight say nothing of the
new one's norm: in evaluation mode its outputs would be thousands of times too large.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch.nn.utils.spectral_norm import SpectralNorm

from ghn_init._network.parametrised import POWER_ITERATIONS
from ghn_init._network.sharded import is_sharded
from ghn_init._threads import seeded
from ghn_init._writing.entry import to_write
from ghn_init._writing.values import value_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from ghn_init._hypernetwork.tile import Tile
    from ghn_init._network.locations import Location
    from ghn_init._writing.entry import Entry
    from ghn_init._writing.options import Options


@dataclass(frozen=True, slots=True)
class Divided:
    """What becomes of a weight that a hook divides.

    Attributes:
        norm: It is divided by this.
        vectors: The hook's buffers, by their qualified names, on the CPU.
    """

    norm: float
    vectors: Mapping[str, Tensor]


@torch.no_grad()
def divided(entries: Sequence[Entry], options: Options) -> dict[str, Divided]:
    """The predicted weights that such a hook divides, by name."""
    found = {}
    for entry in to_write(entries):
        hooks = [(place, hook) for place in entry.locations if (hook := _hook_of(place)) is not None]
        if hooks and entry.computed is None and not is_sharded(entry.param):
            weight = value_of(entry, options).to("cpu", torch.float32)
            with seeded(entry.name, options.seed):
                found[entry.source] = _divided(weight, hooks)
    return found


def _hook_of(place: Location) -> SpectralNorm | None:
    hooks = place.module._forward_pre_hooks.values()  # noqa: SLF001 (where torch's own function looks for it)
    for hook in hooks:
        if isinstance(hook, SpectralNorm) and place.attribute == f"{hook.name}_orig":
            return hook
    return None


def _divided(weight: Tensor, hooks: Sequence[tuple[Location, SpectralNorm]]) -> Divided:
    """Of a weight, which is divided alike at all its places."""
    (_, first), vectors = hooks[0], {}
    matrix = first.reshape_weight_to_matrix(weight)
    u = F.normalize(torch.randn(len(matrix), dtype=matrix.dtype), dim=0, eps=first.eps)
    v = F.normalize(torch.mv(matrix.T, u), dim=0, eps=first.eps)
    for _ in range(POWER_ITERATIONS):
        u = F.normalize(torch.mv(matrix, v), dim=0, eps=first.eps)
        v = F.normalize(torch.mv(matrix.T, u), dim=0, eps=first.eps)
    norm = float(torch.dot(u, torch.mv(matrix, v)))
    for place, hook in hooks:
        prefix = f"{place.path}.{hook.name}" if place.path else hook.name
        for name, vector in ((f"{prefix}_u", u), (f"{prefix}_v", v)):
            vectors[name] = vector.to(place.module.get_buffer(name.rpartition(".")[2]).dtype)
    return Divided(norm, vectors)


def as_used(entries: Sequence[Entry], norms: Mapping[str, Divided], options: Options) -> list[Entry]:
    """The same entries with the weights that layers will use, where these are others than are predicted.

    What a hook divides is divided. An orthogonal parametrisation, or one with a spectral norm, makes of a
    prediction what it can.
    """
    used: dict[str, Tile] = {}
    for entry in to_write(entries):
        if entry.tile is not None and entry.source in norms and norms[entry.source].norm > 0:
            used[entry.source] = entry.tile.scaled(1 / norms[entry.source].norm)
        elif entry.tile is not None and entry.computed is not None and not entry.tile.transposed:
            weight = entry.computed.made_of(value_of(entry, options), options.seed)
            used[entry.source] = replace(entry.tile, block=weight.reshape(entry.tile.shape), prior=None)
    return [
        replace(entry, tile=used[entry.source]) if entry.tile is not None and entry.source in used else entry
        for entry in entries
    ]
