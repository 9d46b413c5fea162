"""`predict_to`: a network with predicted weights to disk, tensor by tensor.

The network may be on the meta device, where it takes no memory. At any time there is, besides the GHN and
its tiles, the tensor that is being written, or those kept tensors that one module initialises together.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ghn_init._errors import PredictError, listing
from ghn_init._meta.initialise import initialising
from ghn_init._meta.materialise import lost_locations
from ghn_init._network.pretrained import is_pretrained
from ghn_init._network.sharded import is_sharded
from ghn_init._writing.safetensors_writer import Spec, fresh_folder, write_checkpoint
from ghn_init._writing.values import values_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from os import PathLike

    from ghn_init._meta.initialise import Initialiser
    from ghn_init._network.locations import Location
    from ghn_init._writing.entry import Entry
    from ghn_init._writing.options import Options


def save(
    network: nn.Module,
    entries: Sequence[Entry],
    options: Options,
    folder: str | PathLike[str],
    max_shard_size: int | str,
    statistics: Mapping[str, Tensor],
) -> Path:
    """Write the checkpoint of `network` with predicted weights; `network` itself is left as it is.

    Args:
        network: The network, on any device.
        entries: Those with a prediction, see `to_write`.
        options: The caller's choices.
        folder: Where to; it must not exist, or be empty.
        max_shard_size: Size of a file at most.
        statistics: Values of buffers, by their names.

    Returns:
        What to open in `folder`.

    Raises:
        PredictError: See `ghn_init.predict_to`. Nothing is left behind.
    """
    stored = _stored(network)
    ids = {id(tensor) for tensor in stored.values()}
    lost = lost_locations(network, [name for entry in entries for name in entry.written])
    lost = [place for place in lost if id(place.get()) in ids]  # without buffers outside the state dict
    sources = _sources(network, stored, entries, lost)
    sources |= {
        key: _Source(source.name, statistics[source.name], None, None)
        for key, source in sources.items()
        if source.name in statistics
    }
    specs = {name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in stored.items()}
    with fresh_folder(folder) as partial, initialising(network, lost, options.seed) as initialiser:
        values = _Values(options, initialiser, sources)
        opened = write_checkpoint(partial, specs, values.take, max_shard_size)
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
    model = type(network).__name__
    if alien:
        raise PredictError(
            f"{model}: the state dict holds {listing(alien)}, which are no tensors and do not fit into "
            "safetensors; use ghn_init.predict and torch.save"
        )
    if sharded:
        raise PredictError(
            f"{model}: {listing(sharded)} are sharded over processes; write the checkpoint of the model "
            "before it is sharded, or use ghn_init.predict and torch.distributed.checkpoint"
        )
    return dict(stored.values())


@dataclass(frozen=True, slots=True)
class _Source:
    """Where the values of one tensor of the checkpoint come from.

    Attributes:
        name: The tensor's qualified name in the network.
        tensor: The tensor as the network has it, which is what is stored if there is nothing else.
        entry: The entry whose prediction gives its values, or None.
        owner: Path of the module that has to initialise it, because the meta device has lost it; or None.
    """

    name: str
    tensor: Tensor
    entry: Entry | None
    owner: str | None


def _sources(
    network: nn.Module, stored: Mapping[str, Tensor], entries: Sequence[Entry], lost: Sequence[Location]
) -> dict[str, _Source]:
    """Where the values of every tensor of the checkpoint come from, by its name there.

    Raises:
        PredictError: A tensor of the state dict that is registered nowhere.
    """
    named = (
        *network.named_parameters(remove_duplicate=False),
        *network.named_buffers(remove_duplicate=False),
    )
    # Tied tensors go by their first name, or by the one under which they are initialised or predicted.
    name_of = {id(tensor): name for name, tensor in reversed(named)}
    name_of |= {id(location.get()): location.name for location in lost}
    name_of |= {id(entry.param): entry.name for entry in entries if entry.computed is None}
    if made := [name for name, tensor in stored.items() if id(tensor) not in name_of]:
        raise PredictError(
            f"{type(network).__name__}: {listing(made)} in the state dict are neither parameters nor "
            "buffers, but made by a hook; use ghn_init.predict and torch.save"
        )
    entry_of = {name: entry for entry in entries for name in entry.written}
    owner_of = {location.name: location.path for location in lost}
    sources = {}
    for key, tensor in stored.items():
        name = name_of[id(tensor)]
        sources[key] = _Source(name, tensor, entry_of.get(name), owner_of.get(name))
    return sources


class _Values:
    """The tensors of a checkpoint, made when they are asked for.

    Args:
        options: The caller's choices.
        initialiser: Gives lost tensors their values.
        sources: Where the values come from, by the tensor's name in the checkpoint.
    """

    def __init__(self, options: Options, initialiser: Initialiser, sources: Mapping[str, _Source]) -> None:
        self._options = options
        self._initialiser = initialiser
        self._sources = sources
        self._made_together = {s.name for s in sources.values() if s.entry is not None or s.owner is not None}
        self._waiting: dict[str, Tensor] = {}

    def take(self, key: str) -> Tensor:
        """The tensor of this name in the checkpoint; asked once."""
        source = self._sources[key]
        if source.name not in self._waiting:
            made = self._made(source)
            self._waiting |= {
                name: value
                for name, value in made.items()
                if name == source.name or name in self._made_together
            }
        return self._waiting.pop(source.name).to(source.tensor.dtype)

    def _made(self, source: _Source) -> dict[str, Tensor]:
        """The tensor, and those that come with it, by their names in the network."""
        if source.entry is not None:
            return values_of(source.entry, self._options)
        if source.owner is not None:
            return self._initialiser.values(source.owner)
        return {source.name: source.tensor}


def _save_config(network: nn.Module, folder: Path) -> None:
    """Write the `config.json` that transformers' `from_pretrained` reads."""
    if not is_pretrained(network):
        return
    config: Any = copy.deepcopy(network.config)
    config.architectures = [type(network).__name__]
    config.dtype = str(network.dtype).removeprefix("torch.")
    config.save_pretrained(folder)
