"""Give the tensors of a model on the meta device storage, and values to those that are not predicted.

`nn.Module.to_empty` leaves every value undefined and breaks ties; here a model ends up complete: its
predicted parameters are about to be written, and what is kept gets a value as `initialise` says.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ghn_init._meta.initialise import initialising
from ghn_init._network.locations import Location, locations_of
from ghn_init._network.sharded import home_of, is_sharded, like_sharded
from ghn_init._network.walk import modules_of, tensors_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator


@contextmanager
def materialised(model: nn.Module, predicted: Collection[str], seed: int) -> Iterator[None]:
    """Inside, every tensor of `model` that was on the meta device is on the CPU, or its mesh's devices.

    Tensors whose names are in `predicted` are uninitialised: the caller fills them. The others get
    values as `initialise` says, seeded by `seed`; the global random state is left alone. Parameters keep
    dtype, strides, requires_grad, ties and Python attributes, but they are new objects: an optimizer made
    before refers to the old ones. After an error the model is on the meta device again, as it was. Does
    nothing without meta tensors.

    Args:
        model: The model; only some of its tensors may be on the meta device.
        predicted: Names of the parameters that the caller fills.
        seed: Seeds what is not predicted.

    Raises:
        PredictError: Tensors that are neither predicted nor initialised by anybody.
    """
    if not any(tensor.is_meta for tensor in tensors_of(modules_of(model))):
        yield
        return
    before = [(location, location.get()) for location in locations_of(model) if location.get().is_meta]
    values = kept_values(model, predicted, seed)
    olds = {id(old): old for _, old in before}
    home = home_of(list(olds.values()))
    # Each value goes when it is copied, so that none but the largest is there twice.
    made = {key: _in_place_of(old, values.pop(key, None), home) for key, old in olds.items()}
    try:
        for location, old in before:
            location.put(made[id(old)])
        yield
    except BaseException:
        for location, old in before:
            location.put(old)
        raise


def kept_values(model: nn.Module, predicted: Collection[str], seed: int) -> dict[int, Tensor]:
    """Values of the meta tensors that are not predicted, by the tensor's id."""
    lost = lost_locations(model, predicted)
    ids = {location.name: id(location.get()) for location in lost}
    values = {}
    with initialising(model, lost, seed) as initialiser:
        for path in initialiser.owners:
            values |= {ids[name]: value for name, value in initialiser.values(path).items()}
    return values


def lost_locations(model: nn.Module, predicted: Collection[str]) -> list[Location]:
    """The places, one for each tensor, whose values the meta device has lost.

    Args:
        model: The model.
        predicted: Names of parameters that get a value elsewhere; their ties are not lost either.
    """
    locations = list(locations_of(model))
    names = set(predicted)
    seen = {id(location.get()) for location in locations if location.name in names}
    lost = []
    for location in locations:
        tensor = location.get()
        if tensor.is_meta and id(tensor) not in seen:
            seen.add(id(tensor))
            lost.append(location)
    return lost


def _in_place_of(old: Tensor, value: Tensor | None, home: str) -> Tensor:
    """A tensor like `old` on the device `home`, with its attributes; empty without a value."""
    if is_sharded(old):
        new: Tensor = like_sharded(old, value)
    else:
        new = torch.empty_like(old, device=home, requires_grad=False)
        if value is not None:
            new.copy_(value)
    if isinstance(old, nn.Parameter):
        new = _as_parameter(new, old)
    vars(new).update({key: item for key, item in vars(old).items() if key not in vars(new)})
    return new


def _as_parameter(new: Tensor, old: nn.Parameter) -> Tensor:
    if is_sharded(old):
        return nn.Parameter(new, old.requires_grad)
    return torch.Tensor._make_subclass(type(old), new, old.requires_grad)  # noqa: SLF001 as nn.Parameter does
