"""Places in a model where parameters and buffers are registered."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


@dataclass(frozen=True, slots=True)
class Slot:
    """A place in a module where a parameter or buffer is registered."""

    module: nn.Module
    path: str
    attribute: str

    @property
    def name(self) -> str:
        """The tensor's qualified name."""
        return f"{self.path}.{self.attribute}" if self.path else self.attribute

    @property
    def is_buffer(self) -> bool:
        """A buffer rather than a parameter."""
        return self.attribute in self.module._buffers  # noqa: SLF001 no public way to tell

    @property
    def is_persistent(self) -> bool:
        """Whether the tensor is part of the state dict."""
        return self.attribute not in self.module._non_persistent_buffers_set  # noqa: SLF001

    def get(self) -> Tensor:
        """The tensor that is there now."""
        return getattr(self.module, self.attribute)

    def put(self, tensor: Tensor) -> None:
        """Register another tensor there."""
        # Through __setattr__: recurrent modules keep a list of their weights up to date there.
        setattr(self.module, self.attribute, tensor)


def slots_of(model: nn.Module) -> Iterator[Slot]:
    """All places of `model`, modules in order, a module's parameters before its buffers."""
    for path, module in model.named_modules():
        for attribute, _ in module.named_parameters(recurse=False, remove_duplicate=False):
            yield Slot(module, path, attribute)
        for attribute, _ in module.named_buffers(recurse=False, remove_duplicate=False):
            yield Slot(module, path, attribute)


@contextmanager
def hidden(slots: Iterable[Slot]) -> Iterator[None]:
    """Inside, `slots` hold meta tensors, on which initialisation costs and changes nothing."""
    before = [(slot, slot.get()) for slot in slots]
    for slot, tensor in before:
        if not tensor.is_meta:
            stand_in = torch.empty_like(tensor, device="meta", requires_grad=False)
            slot.put(nn.Parameter(stand_in, False) if isinstance(tensor, nn.Parameter) else stand_in)
    try:
        yield
    finally:
        for slot, tensor in before:
            if slot.get() is not tensor:
                slot.put(tensor)
