"""Locations in a network: where parameters and buffers are registered."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ghn_init._network.walk import modules_of
from ghn_init._threads import uninterrupted

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


@dataclass(frozen=True, slots=True)
class Location:
    """A module's attribute where a parameter or buffer is registered; two are equal if their names are."""

    path: str
    attribute: str
    module: nn.Module = field(compare=False, repr=False)

    @property
    def name(self) -> str:
        """The tensor's qualified name."""
        return f"{self.path}.{self.attribute}" if self.path else self.attribute

    @property
    def parameter(self) -> nn.Parameter | None:
        """The parameter that is registered there now, or None if there is none any more."""
        return self.module._parameters.get(self.attribute)  # noqa: SLF001 getattr finds other things too

    def get(self) -> Tensor:
        """The tensor that is there now."""
        return getattr(self.module, self.attribute)

    def put(self, tensor: Tensor) -> None:
        """Register another tensor there."""
        # Through __setattr__: recurrent modules keep a list of their weights up to date there.
        setattr(self.module, self.attribute, tensor)


def locations_of(model: nn.Module) -> Iterator[Location]:
    """All locations of `model`, modules in order, a module's parameters before its buffers."""
    for path, module in modules_of(model):
        for attribute, _ in module.named_parameters(recurse=False, remove_duplicate=False):
            yield Location(path, attribute, module)
        for attribute, _ in module.named_buffers(recurse=False, remove_duplicate=False):
            yield Location(path, attribute, module)


def parameters_of(model: nn.Module) -> list[tuple[Location, ...]]:
    """The locations of every parameter, in the order of `named_parameters`; several where it is tied.

    A module that stands at two paths gives its parameters two locations.
    """
    found: dict[int, list[Location]] = {}
    for path, module in modules_of(model, every_path=True):
        for attribute, param in module._parameters.items():  # noqa: SLF001 named_parameters makes more of it
            if param is not None:
                found.setdefault(id(param), []).append(Location(path, attribute, module))
    return [tuple(locations) for locations in found.values()]


@contextmanager
def hidden(locations: Iterable[Location]) -> Iterator[None]:
    """Inside, `locations` hold meta tensors, on which initialisation costs and changes nothing."""
    before = [(location, location.get()) for location in locations]
    try:
        for location, tensor in before:
            if not tensor.is_meta:
                stand_in = torch.empty_like(tensor, device="meta", requires_grad=False)
                location.put(nn.Parameter(stand_in, False) if isinstance(tensor, nn.Parameter) else stand_in)
        yield
    finally:
        with uninterrupted():
            for location, tensor in before:
                if location.get() is not tensor:
                    location.put(tensor)
