"""From predicted tiles to full tensors, and into a model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ghn_init._errors import PredictError
from ghn_init._hypernetwork.tile import copy_tiled, stored_form
from ghn_init._meta.initialise import is_pretrained
from ghn_init._network.parametrised import computed_weights
from ghn_init._network.sharded import is_sharded, part_of
from ghn_init._writing.diversify import diversify
from ghn_init._writing.select import listing

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ghn_init._hypernetwork.tile import Tile
    from ghn_init._network.parametrised import Computed
    from ghn_init._writing.select import Options


@dataclass(frozen=True, slots=True)
class Target:
    """A prediction and where it goes.

    Attributes:
        name: The parameter's name, or that of a computed weight.
        tile: The prediction.
        param: The parameter; of a computed weight the last one that is solved for.
        computed: The computed weight that is written through, or None.
    """

    name: str
    tile: Tile
    param: Tensor
    computed: Computed | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Qualified names of all tensors that get a value."""
        return (self.name,) if self.computed is None else self.computed.solved

    def value(self, options: Options) -> Tensor:
        """The full tensor in the parameter's dtype, on its device or, for a meta model, on the CPU."""
        device = torch.device("cpu") if self.param.is_meta else self.param.device
        return full_value(self.name, self.tile, options, self.param.dtype, device)

    def values(self, options: Options) -> dict[str, Tensor]:
        """The full tensors of all `names`."""
        value = self.value(options)
        return {self.name: value} if self.computed is None else self.computed.solve(value, options.seed)


def targets_of(model: nn.Module, tiles: Mapping[str, Tile]) -> list[Target]:
    """Every tile with the parameter or computed weight of its name.

    Raises:
        PredictError: Parameters that are gone or have another shape since the tiles were made.
    """
    params, computed = dict(model.named_parameters()), computed_weights(model)
    targets, changed = [], []
    for name, tile in tiles.items():
        weight = computed.get(name)
        param = params.get(name if weight is None else weight.parts[-1])
        if param is None or (weight is None and param.shape != tile.stored):
            changed.append(name)
        else:
            targets.append(Target(name, tile, param, weight))
    if changed:
        kind = type(model).__name__
        raise PredictError(f"{kind} changed since it was planned: {listing(changed)}; make a new plan")
    return targets


def names_of(model: nn.Module, tiles: Iterable[str]) -> list[str]:
    """Qualified names of all tensors that get a value from tiles of these names."""
    computed = computed_weights(model)
    return [inner for name in tiles for inner in (computed[name].solved if name in computed else (name,))]


def full_value(
    name: str, tile: Tile, options: Options, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Tensor:
    """The full tensor of a prediction in its own shape, diversified if so wanted."""
    if not diversified(tile, options):
        full = torch.empty(tile.stored, dtype=dtype, device=device)
        tile.copy_into(full)
        return full
    block = tile.values.cpu()
    full = torch.empty(tile.shape, dtype=block.dtype)
    copy_tiled(full, block)
    assert options.diversify is not None  # see `diversified`
    diversify(full, block, options.diversify, name=name, seed=options.seed)
    return stored_form(full.unsqueeze(0), tile.stored, tile.transposed)[0].to(device, dtype)


def diversified(tile: Tile, options: Options) -> bool:
    """The prediction is changed before it is written: full, in float32, on the CPU."""
    return options.diversify is not None and len(tile.shape) > 1


def write(model: nn.Module, targets: list[Target], options: Options) -> None:
    """Copy every prediction into its parameter.

    Raises:
        PredictError: A device refused a write.
    """
    targets = [_prepared(target, options) for target in targets]
    if any(_needs_memory(target, options) for target in targets):
        # The largest first, so that memory that does not suffice is found before anything is written.
        targets = sorted(targets, key=lambda target: -target.param.numel())
    written = 0
    try:
        for target in targets:
            _write_one(model, target, options)
            written += 1
    except RuntimeError as error:
        failed = targets[written]
        raise PredictError(
            f"{type(model).__name__}: {failed.param.device} refused to write {failed.name} "
            f"{tuple(failed.param.shape)}: {error}; {written} of {len(targets)} parameters were written "
            "before, apply the plan again"
        ) from error
    _mark_initialised(model, targets)


def _needs_memory(target: Target, options: Options) -> bool:
    """The full tensor is made before it is written."""
    return target.computed is not None or is_sharded(target.param) or diversified(target.tile, options)


def _prepared(target: Target, options: Options) -> Target:
    """The tile on the parameter's device and in its dtype, if it is written as it is."""
    tile = target.tile
    if diversified(tile, options):
        return target
    values = tile.values.to(target.param.device, target.param.dtype)
    return target if values is tile.values else replace(target, tile=replace(tile, values=values))


def _write_one(model: nn.Module, target: Target, options: Options) -> None:
    if target.computed is not None:
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        for name, value in target.values(options).items():
            tensors[name].copy_(value)
        target.computed.refresh()
    elif is_sharded(target.param):
        target.param.to_local().copy_(part_of(target.value(options), target.param))
    elif diversified(target.tile, options):
        target.param.copy_(target.value(options))
    else:
        target.tile.copy_into(target.param)


def _mark_initialised(model: nn.Module, targets: Iterable[Target]) -> None:
    """Mark predicted parameters for transformers, whose `init_weights` overwrites what has no mark."""
    if not any(is_pretrained(module) for module in model.modules()):
        return
    written = {id(target.param) for target in targets if target.computed is None}
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        for param in own:
            if id(param) in written:
                param._is_hf_initialized = True  # noqa: SLF001 # pyright: ignore[reportAttributeAccessIssue]
        if own and all(id(param) in written for param in own):
            module._is_hf_initialized = True  # noqa: SLF001 # pyright: ignore[reportArgumentType]
