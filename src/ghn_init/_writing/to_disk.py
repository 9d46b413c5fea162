"""`predict_to`: a network with predicted weights to disk, tensor by tensor.

The network may be on the meta device, where it takes no memory. At any time there is, besides the GHN and
its tiles, the tensor that is being written, or those kept tensors that one module initialises together.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ghn_init._errors import PredictError
from ghn_init._meta.initialise import initialising, is_pretrained
from ghn_init._meta.materialise import lost_slots
from ghn_init._network.sharded import is_sharded
from ghn_init._writing.in_place import names_of, targets_of
from ghn_init._writing.safetensors_writer import Spec, fresh_folder, write_checkpoint
from ghn_init._writing.select import listing

if TYPE_CHECKING:
    from collections.abc import Mapping
    from os import PathLike

    from ghn_init._hypernetwork.tile import Tile
    from ghn_init._meta.initialise import Initialiser
    from ghn_init._writing.in_place import Target
    from ghn_init._writing.select import Options


def save(
    network: nn.Module,
    tiles: Mapping[str, Tile],
    kinds: Mapping[str, str],
    options: Options,
    folder: str | PathLike[str],
    max_shard_size: int | str,
) -> Path:
    """Write the checkpoint of `network` with predicted weights; `network` itself is left as it is.

    Args:
        network: The network, on any device.
        tiles: Predictions by the name of the parameter or computed weight.
        kinds: What parameters are, from `kinds_of`.
        options: The caller's choices.
        folder: Where to; it must not exist, or be empty.
        max_shard_size: Of one file.

    Returns:
        What to open in `folder`.

    Raises:
        PredictError: See `ghn_init.predict_to`. Nothing is left behind.
    """
    stored = _stored(network)
    ids = {id(tensor) for tensor in stored.values()}
    lost, others = lost_slots(network, names_of(network, tiles))
    others += [slot for slot in lost if id(slot.get()) not in ids]  # buffers outside the state dict
    lost = [slot for slot in lost if id(slot.get()) in ids]
    inner = {id(tensor): name for name, tensor in reversed(_named(network))}
    inner |= {id(slot.get()): slot.name for slot in lost}
    targets = targets_of(network, tiles)
    inner |= {id(target.param): target.names[0] for target in targets if target.computed is None}
    named = {name: inner.get(id(tensor), "") for name, tensor in stored.items()}
    if made := [name for name, of in named.items() if not of]:
        raise PredictError(
            f"{type(network).__name__}: {listing(made)} in the state dict are neither parameters nor "
            "buffers, but made by a hook; use ghn_init.predict and torch.save"
        )
    specs = {name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in stored.items()}
    owners = {slot.name: slot.path for slot in lost}
    others = others if lost else []  # nothing will be initialised, so nothing needs protection from it
    with fresh_folder(folder) as partial, initialising(network, lost, others, kinds, options.seed) as initial:
        values = _Values(options, targets, owners, initial, {named[n]: t for n, t in stored.items()})
        opened = write_checkpoint(partial, specs, lambda name: values.take(named[name]), max_shard_size)
        _save_config(network, partial)
    return Path(folder) / opened.name


def _stored(network: nn.Module) -> dict[str, Tensor]:
    """The tensors of the state dict themselves, each once, under the first of its names."""
    stored: dict[int, tuple[str, Tensor]] = {}
    alien, sharded = [], []
    for name, tensor in network.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            alien.append(name)
        elif is_sharded(tensor):
            sharded.append(name)
        else:
            stored.setdefault(id(tensor), (name, tensor))
    kind = type(network).__name__
    if alien:
        raise PredictError(
            f"{kind}: the state dict holds {listing(alien)}, which are no tensors and do not fit into "
            "safetensors; use ghn_init.predict and torch.save"
        )
    if sharded:
        raise PredictError(
            f"{kind}: {listing(sharded)} are sharded over processes; write the checkpoint of the model "
            "before it is sharded, or use ghn_init.predict and torch.distributed.checkpoint"
        )
    return dict(stored.values())


def _named(network: nn.Module) -> list[tuple[str, Tensor]]:
    return [
        *network.named_parameters(remove_duplicate=False),
        *network.named_buffers(remove_duplicate=False),
    ]


class _Values:
    """The tensors of a checkpoint, made when they are asked for.

    Args:
        options: The caller's choices.
        targets: Predictions.
        owners: Name of every lost tensor, and the path of the module that owns it.
        initial: Gives lost tensors their values.
        wanted: Every tensor of the checkpoint as the network has it, by its qualified name.
    """

    def __init__(
        self,
        options: Options,
        targets: list[Target],
        owners: Mapping[str, str],
        initial: Initialiser,
        wanted: Mapping[str, Tensor],
    ) -> None:
        self._options = options
        self._targets = {name: target for target in targets for name in target.names}
        self._owners = owners
        self._initial = initial
        self._wanted = wanted
        self._waiting: dict[str, Tensor] = {}

    def take(self, name: str) -> Tensor:
        """The tensor of this name; asked once."""
        if name not in self._waiting:
            made = self._made(name)
            self._waiting |= {key: value for key, value in made.items() if key in self._wanted}
        return self._waiting.pop(name).to(self._wanted[name].dtype)

    def _made(self, name: str) -> dict[str, Tensor]:
        """The tensor of this name, and those that come with it."""
        if name in self._targets:
            return self._targets[name].values(self._options)
        if name in self._owners:
            return self._initial.values(self._owners[name])
        return {name: self._wanted[name]}


def _save_config(network: nn.Module, folder: Path) -> None:
    """Write the `config.json` that transformers' `from_pretrained` reads."""
    if not is_pretrained(network):
        return
    config: Any = copy.deepcopy(network.config)
    config.architectures = [type(network).__name__]
    config.dtype = str(network.dtype).removeprefix("torch.")
    config.save_pretrained(folder)
