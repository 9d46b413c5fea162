"""Outputs of slow meta kernels without running them.

torch has many of its meta kernels in Python. They find out nothing but a shape, and take 0.1 ms for a product
with a number, 1 ms for an activation and 10 ms for sampling a feature map at a grid: more than all else that
is recorded of a call. Networks call them with the same few shapes again and again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping, Sequence

_PURE: Final = frozenset({
    "add", "sub", "mul", "div", "rsub", "__radd__", "__rsub__", "__rmul__", "__rdiv__", "__rtruediv__",
    "true_divide", "divide", "multiply", "subtract", "pow", "__rpow__", "square", "sqrt", "rsqrt", "exp",
    "log", "sin", "cos", "neg", "abs", "floor", "ceil", "round", "maximum", "minimum", "where", "mean", "sum",
    "var", "gt", "ge", "lt", "le", "eq", "ne", "__gt__", "__ge__", "__lt__", "__le__", "__eq__", "__ne__",
    "logical_and", "logical_or", "logical_not", "interpolate", "upsample",
})  # fmt: skip
"""Functions that give one new tensor, never a view of an argument, whose shape, strides and dtype follow from
those of their arguments. None of them casts under autocast."""

_PLAIN: Final = frozenset({int, float, bool, complex, str, type(None), torch.dtype})

META: Final = torch.device("meta")

_Layout = tuple[torch.Size, tuple[int, ...], torch.dtype]


class Memo:
    """Meta outputs of `_PURE` functions, each found out once. One for each trace, so that it ends with it."""

    def __init__(self) -> None:
        self._known: dict[Hashable, _Layout] = {}

    def run(self, func: Callable[..., Any], name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What `func` gives, or a tensor like what it gave for such arguments before."""
        if name not in _PURE or "out" in kwargs:
            return func(*args, **kwargs)
        try:
            key = func, tuple(map(_described, args)), tuple((k, _described(v)) for k, v in kwargs.items())
        except _UnknownKindError:
            return func(*args, **kwargs)
        known = self._known.get(key)
        if known is not None:
            shape, stride, dtype = known
            return torch.empty_strided(shape, stride, dtype=dtype, device=META)
        output = func(*args, **kwargs)
        if type(output) is Tensor and output.is_meta:
            self._known[key] = _layout(output)
        return output


class _UnknownKindError(Exception):
    """An argument of which more than its kind may count: a tensor with values, an object of another class."""


def _described(value: Any) -> Hashable:
    """All of an argument that a meta kernel can see. Numbers with their type, because 1 == 1.0 == True."""
    if type(value) is Tensor and value.is_meta:
        return _layout(value)
    if type(value) in _PLAIN:
        return type(value), value
    if type(value) in (tuple, list, torch.Size):
        return tuple(map(_described, value))
    raise _UnknownKindError


def _layout(tensor: Tensor) -> _Layout:
    return tensor.shape, tensor.stride(), tensor.dtype


def like(x: Tensor) -> Tensor:
    """`torch.empty_like(x)`."""
    if x.is_meta and x.is_contiguous():
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=META)
    return torch.empty_like(x)


def empty(x: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """`x.new_empty(shape)`, whose meta kernel is in Python and takes six times longer."""
    return torch.empty(shape, dtype=dtype or x.dtype, device=META if x.is_meta else x.device)
