"""Give the tensors of a model on the meta device storage, and values to those that are not predicted.

`nn.Module.to_empty` leaves every value undefined and breaks ties; here a model ends up complete: its
predicted parameters are about to be written, and what is kept comes from its module's own
`reset_parameters`. A tensor that nobody gives a value is an error, not garbage.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn

from ghn_init._errors import PredictError
from ghn_init._select import listing

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

_INITIALISERS: Final = ("reset_parameters", "_reset_parameters")
"""Methods that initialise a module's own tensors; nn.MultiheadAttention's has the underscore."""


@dataclass(frozen=True, slots=True)
class _Slot:
    """A place in a module where a parameter or buffer is registered."""

    module: nn.Module
    path: str
    attribute: str

    @property
    def name(self) -> str:
        return f"{self.path}.{self.attribute}" if self.path else self.attribute

    def get(self) -> Tensor:
        return getattr(self.module, self.attribute)

    def put(self, tensor: Tensor) -> None:
        # Through __setattr__: recurrent modules keep a list of their weights up to date there.
        setattr(self.module, self.attribute, tensor)


@contextmanager
def materialised(model: nn.Module, predicted: Collection[str], seed: int) -> Iterator[None]:
    """Inside, every tensor of `model` that was on the meta device is on the CPU.

    Tensors whose names are in `predicted` are uninitialised: the caller fills them. The others get
    values from their module's `reset_parameters`, seeded by `seed`, which sees no other tensor of the
    model and leaves the global random state alone. Parameters keep dtype, strides, requires_grad, ties
    and Python attributes, but they are new objects: an optimizer made before refers to the old ones.
    After an error the model is on the meta device again, as it was. Does nothing without meta tensors.

    Raises:
        PredictError: Tensors that are neither predicted nor initialised by their module.
    """
    if not any(tensor.is_meta for tensor in chain(model.parameters(), model.buffers())):
        yield
        return
    slots = list(_slots(model))
    meta = [slot for slot in slots if slot.get().is_meta]
    before = [(slot, slot.get()) for slot in meta]
    names = set(predicted)
    filled = {id(slot.get()) for slot in meta if slot.name in names}
    lost = [slot for slot in meta if id(slot.get()) not in filled]
    others = [slot for slot in slots if not slot.get().is_meta or id(slot.get()) in filled]
    try:
        _install(lost)
        _initialise(model, lost, others, seed)
        _install([slot for slot in meta if slot.get().is_meta])
        yield
    except BaseException:
        for slot, tensor in before:
            slot.put(tensor)
        raise


def _slots(model: nn.Module) -> Iterator[_Slot]:
    for path, module in model.named_modules():
        for attribute, _ in module.named_parameters(recurse=False, remove_duplicate=False):
            yield _Slot(module, path, attribute)
        for attribute, _ in module.named_buffers(recurse=False, remove_duplicate=False):
            yield _Slot(module, path, attribute)


def _install(slots: list[_Slot]) -> None:
    """Put empty tensors on the CPU into `slots`, one for each tensor that they share."""
    made: dict[int, Tensor] = {}
    olds = [slot.get() for slot in slots]
    for slot, old in zip(slots, olds, strict=True):
        if id(old) not in made:
            made[id(old)] = _empty_on_cpu(old)
        slot.put(made[id(old)])


def _empty_on_cpu(old: Tensor) -> Tensor:
    new = torch.empty_like(old, device="cpu", requires_grad=False)
    if isinstance(old, nn.Parameter):
        new = torch.Tensor._make_subclass(type(old), new, old.requires_grad)  # noqa: SLF001 as nn.Parameter does
    vars(new).update(vars(old))
    return new


def _initialise(model: nn.Module, lost: list[_Slot], others: list[_Slot], seed: int) -> None:
    """Run the initialisers of the modules that own `lost`, everything else being on the meta device."""
    for slot in lost:
        _mark(slot.get())
    marked = [(slot, slot.get(), _version(slot.get())) for slot in lost]
    owners = {id(slot.module): slot for slot in reversed(lost)}  # the first of each module
    with _hidden(others), torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would seed the accelerators as well.
        torch.default_generator.manual_seed(seed)
        for slot in reversed(owners.values()):
            _reset(type(model).__name__, slot)
    missing = [slot.name for slot, tensor, version in marked if not _written(slot, tensor, version)]
    if missing:
        raise PredictError(
            f"{type(model).__name__} is on the meta device, and {listing(missing, 40)} would have no value: "
            "neither predicted nor set by a reset_parameters of its module. Give it one first (e.g. "
            "`module.name = nn.Parameter(torch.zeros(...))`), or build the model on the CPU"
        )


def _reset(model: str, slot: _Slot) -> None:
    for method in _INITIALISERS:
        if callable(initialise := getattr(slot.module, method, None)):
            try:
                initialise()
            except Exception as error:
                place = f"{model}: {slot.path or 'the model'}.{method}()"
                raise PredictError(f"{place} failed to initialise {slot.name}: {error}") from error
            return


@contextmanager
def _hidden(slots: list[_Slot]) -> Iterator[None]:
    """Inside, `slots` hold meta tensors, on which initialisation costs and changes nothing."""
    before = [(slot, tensor) for slot in slots if not (tensor := slot.get()).is_meta]
    for slot, tensor in before:
        stand_in = tensor.detach().to("meta")
        slot.put(nn.Parameter(stand_in, False) if isinstance(tensor, nn.Parameter) else stand_in)
    try:
        yield
    finally:
        for slot, tensor in before:
            slot.put(tensor)


def _mark(tensor: Tensor) -> None:
    """Fill with a value that no initialiser leaves, so that an untouched tensor is found."""
    with torch.no_grad():
        if tensor.is_floating_point() or tensor.is_complex():
            tensor.fill_(float("nan"))
        elif tensor.dtype != torch.bool:
            tensor.fill_(torch.iinfo(tensor.dtype).max)


def _version(tensor: Tensor) -> int:
    """The number of in-place changes that autograd counted."""
    return tensor._version  # noqa: SLF001 documented for exactly this, no public name


def _written(slot: _Slot, tensor: Tensor, version: int) -> bool:
    """The initialiser replaced the tensor or wrote all of it, in place or through `.data`."""
    now = slot.get()
    if now.is_floating_point() or now.is_complex():
        return not bool(now.isnan().any())
    if now is not tensor or _version(now) != version:
        return True
    return now.dtype != torch.bool and not bool((now == torch.iinfo(now.dtype).max).all())
