"""Tensors in nested arguments and outputs of functions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterable

_ATOMS: Final = frozenset({int, float, bool, str, type(None), torch.Size, torch.dtype, torch.device, slice})
"""Types of arguments without tensors in them: most arguments, looked through very often."""

_TENSORS: Final = frozenset({Tensor, nn.Parameter})
"""Types of most tensors; a subclass is one, too."""


def tensors_in(value: object) -> list[Tensor]:
    """The tensors in nested tuples, lists, dicts and dataclass-like outputs, in order."""
    found: list[Tensor] = []
    _collect((value,), found)
    return found


def _collect(values: Iterable[Any], found: list[Tensor]) -> None:
    """Append the tensors in `values` to `found`."""
    for value in values:
        kind = type(value)
        if kind in _ATOMS:
            continue
        if kind in _TENSORS or isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            _collect(value, found)
        elif isinstance(value, dict):
            _collect(value.values(), found)
        elif hasattr(value, "__dataclass_fields__") and not isinstance(value, type):
            _collect(vars(value).values(), found)


def replaced(value: Any, resolved: dict[int, Tensor]) -> Any:
    """`value` with the tensors in its tuples, lists and dicts replaced by id."""
    kind = type(value)
    if kind in _ATOMS:
        return value
    if kind in _TENSORS or isinstance(value, Tensor):
        return resolved[id(value)]
    if kind is tuple or kind is list:
        return kind([
            resolved[id(item)] if type(item) in _TENSORS
            else item if type(item) in _ATOMS
            else replaced(item, resolved)
            for item in value
        ])  # fmt: skip
    if isinstance(value, tuple) and hasattr(value, "_fields"):  # a named tuple
        return type(value)(*[replaced(item, resolved) for item in value])
    if isinstance(value, dict):
        return {key: replaced(item, resolved) for key, item in value.items()}
    return value
