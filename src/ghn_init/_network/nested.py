"""Tensors in nested arguments and outputs of functions."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

_ATOMS: Final = frozenset({int, float, bool, str, type(None), torch.Size, torch.dtype, torch.device, slice})
"""Types of arguments without tensors in them: most arguments, looked through very often."""


def tensors_in(value: object) -> list[Tensor]:
    """The tensors in nested tuples, lists, dicts and dataclass-like outputs, in order."""
    found: list[Tensor] = []
    _collect(value, found)
    return found


def _collect(value: object, found: list[Tensor]) -> None:
    """Append the tensors in `value` to `found`."""
    if type(value) in _ATOMS:
        return
    if isinstance(value, Tensor):
        found.append(value)
    elif isinstance(value, (tuple, list)):
        for item in value:
            _collect(item, found)
    elif isinstance(value, dict):
        for item in value.values():
            _collect(item, found)
    elif hasattr(value, "__dataclass_fields__") and not isinstance(value, type):
        for item in vars(value).values():
            _collect(item, found)


def replaced(value: Any, resolved: dict[int, Tensor]) -> Any:
    """`value` with the tensors in its tuples, lists and dicts replaced by id."""
    if type(value) in _ATOMS:
        return value
    if isinstance(value, Tensor):
        return resolved[id(value)]
    if type(value) in (tuple, list):
        return type(value)([replaced(item, resolved) for item in value])
    if isinstance(value, tuple) and hasattr(value, "_fields"):  # a named tuple
        return type(value)(*[replaced(item, resolved) for item in value])
    if isinstance(value, dict):
        return {key: replaced(item, resolved) for key, item in value.items()}
    return value
