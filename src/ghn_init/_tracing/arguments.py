"""Functions and arguments of fx nodes, whoever wrote them: we, `symbolic_trace` or `torch.export`."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import fx

if TYPE_CHECKING:
    from collections.abc import Mapping

_OVERLOADS: Final = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)  # noqa: SLF001  # no public names

_OTHERWISE: Final = {"dim": ("axis",), "keepdim": ("keepdims",), "input": ("x", "a", "x1"), "other": ("x2",)}
"""Keywords of torch -> those of numpy that its functions take, too."""


def as_tuple(value: Any, n: int) -> tuple[int, ...]:
    """`value` as a tuple; one number stands for `n`."""
    values = value if type(value) is tuple else tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return values * n if len(values) == 1 else values


def function_name(node: fx.Node) -> str:
    """The name of the function that a node calls, as torch's functions are called: `conv2d`, `__add__`."""
    return str(node.target) if node.op == "call_method" else _name(node.target)


@lru_cache(maxsize=4096)
def _name(function: Any) -> str:
    if isinstance(function, _OVERLOADS):
        return function.__name__.partition(".")[0]  # pyright: ignore[reportFunctionMemberAccess]
    if function is getattr:
        return "__get__"
    name = function.__name__
    return f"__{name.strip('_')}__" if function.__module__ == "_operator" else name


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """The argument of a node at position `index` or of this keyword, see `keyword`.

    Of an overload of torch.ops the position is that in its schema, where the first tensor is called `self`.
    """
    places = _places(node.target) if isinstance(node.target, _OVERLOADS) else None
    if places is not None:
        index = places.get(name, 0 if name == "input" and "self" in places else -1)
        if index < 0:
            return keyword(node.kwargs, name, default)
    return node.args[index] if index < len(node.args) else keyword(node.kwargs, name, default)


def keyword(kwargs: Mapping[str, Any], name: str, default: Any = None) -> Any:
    """The argument of this keyword, or of numpy's, which torch takes as well: `axis` for `dim`."""
    if name not in kwargs:
        name = next((other for other in _OTHERWISE.get(name, ()) if other in kwargs), name)
    return kwargs.get(name, default)


@lru_cache(maxsize=4096)
def _places(function: Any) -> Mapping[str, int] | None:
    schema = getattr(function, "_schema", None)
    return None if schema is None else {arg.name: index for index, arg in enumerate(schema.arguments)}


def layout(node: fx.Node) -> Any:
    """The tensor that a node gives, or its `TensorMetadata`: with shape and dtype; None where it gives none.

    Several of them in a tuple or a list.
    """
    found = node.meta.get("val")
    return node.meta.get("tensor_meta") if found is None else found


def shape_of(node: fx.Node) -> torch.Size:
    """The shape of the tensor that a node gives."""
    return layout(node).shape


def stride_of(node: fx.Node) -> tuple[int, ...]:
    """The strides of the tensor that a node gives."""
    found = layout(node)
    return found.stride() if isinstance(found, torch.Tensor) else found.stride
