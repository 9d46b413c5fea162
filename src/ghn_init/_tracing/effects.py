"""What a chain of functions of each element does to an activation: whether it is an activation function.

Those that torch has are known by their names (`rules/joins.py`). Others are written by hand, such as
`x * sigmoid(x)`, `x.clamp(min=0)` and `torch.where(x > 0, x, 0.2 * x)`, and told by what they make of three
numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from ghn_init._tracing.arguments import function_name, layout
from ghn_init._tracing.carried import CONSTANT, Flow
from ghn_init._tracing.functions import ADDING, CASTING, DIVIDING, MULTIPLYING, SUBTRACTING

if TYPE_CHECKING:
    from ghn_init._tracing.carried import Carried
    from ghn_init._tracing.sketch import Sketch

_DECIDING: Final = MULTIPLYING | {
    "clamp", "clamp_", "clamp_min", "clamp_min_", "clip", "clip_", "threshold", "threshold_", "_threshold",
    "max", "maximum", "where", "prelu", "masked_fill", "masked_fill_",
}  # fmt: skip
"""Functions with which an activation function that is written by hand ends."""

_KEEPING: Final = CASTING | {"float", "half", "bfloat16", "double", "contiguous", "clone", "detach"}
"""Functions that change no value."""

_OF_ELEMENTS: Final = _DECIDING | ADDING | SUBTRACTING | DIVIDING | {
    "neg", "__neg__", "rsub", "__rdiv__", "reciprocal", "pow", "__pow__", "__rpow__", "square", "exp",
    "sigmoid", "sigmoid_", "tanh", "tanh_", "erf", "relu", "relu_", "relu6", "softplus", "hardtanh",
    "hardsigmoid", "leaky_relu", "log", "log1p", "sqrt", "abs", "sign", "min", "minimum", "clamp_max", "gt",
    "ge", "lt", "le", "__gt__", "__ge__", "__lt__", "__le__", "logical_not", "__invert__",
}  # fmt: skip
"""Functions of each element that are run on the three numbers; none of them draws random ones."""

_OF_TWO: Final = ("max", "min")
"""Functions of each element of two tensors, and of one along an axis."""

_CALLS: Final = ("call_function", "call_method")

_LONGEST: Final = 64
"""Calls that an activation function is made of at most. GELU by hand has nine."""

_PLACES: Final = (-2.0, 0.0, 2.0)
_SLOPE: Final = 0.25
"""Of a `prelu`, as torch initialises it."""


class _UnknownError(Exception):
    """An argument that is no function of the one activation."""


def rectified(sketch: Sketch, node: fx.Node, name: str, value: object) -> set[int]:
    """The graph nodes whose output a call rectifies: positive values pass, negative ones hardly do.

    Args:
        sketch: What is drawn.
        node: The call.
        name: The function's name.
        value: What it carries.
    """
    if name not in _DECIDING or not isinstance(value, Flow) or value.role:
        return set()
    if name in MULTIPLYING and len(node.all_input_nodes) < 2:  # by a number
        return set()
    try:
        y = _Chain(sketch, value.sources).computed(node, name)
    except _UnknownError:
        return set()
    below, above = (y[1] - y[0]).abs(), (y[2] - y[1]).abs()
    return set(value.sources) if above >= 1 and below <= above / 2 else set()


class _Chain:
    """Values of activations where the one that they are computed from, element by element, is -2, 0 and 2."""

    def __init__(self, sketch: Sketch, sources: tuple[int, ...]) -> None:
        self._sketch, self._sources = sketch, sources
        self._first: fx.Node | None = None
        self._known: dict[fx.Node, Any] = {}
        self._left = _LONGEST

    def at(self, node: fx.Node) -> Tensor:
        """The values of `node`.

        Raises:
            _UnknownError: It is something else.
        """
        if node not in self._known:
            self._left -= 1
            if not self._left:
                raise _UnknownError
            self._known[node] = self._value(node)
        return self._known[node]

    def _value(self, node: fx.Node) -> Tensor:
        value, name = self._sketch.carried(node), function_name(node) if node.op in _CALLS else ""
        if not isinstance(value, Flow):
            return _constant(node, value)
        if value.sources != self._sources or value.role:
            raise _UnknownError
        if name in _KEEPING:
            x = self.at(node.args[0])  # pyright: ignore[reportArgumentType]
            return x.bool() if _dtype(node) == torch.bool else x.float()
        if name in _OF_ELEMENTS:
            return self.computed(node, name)
        if self._first is None:
            self._first = node
        dtype = _dtype(node)
        if node is not self._first or dtype is None or not dtype.is_floating_point:
            raise _UnknownError
        return torch.tensor(_PLACES, dtype=torch.float32)

    def computed(self, node: fx.Node, name: str) -> Tensor:
        """What the call gives, element by element.

        Raises:
            _UnknownError: It gives something else.
        """
        args: Any = node.args
        if name == "prelu":
            return torch.nn.functional.leaky_relu(self.at(args[0]), _SLOPE)
        if name in _OF_TWO and not (len(args) == 2 and isinstance(args[1], fx.Node)):  # along an axis
            raise _UnknownError
        given: Any = map_arg((args, dict(node.kwargs)), lambda x: self.at(x).clone())
        function = getattr(Tensor, node.target) if isinstance(node.target, str) else node.target
        try:
            output = function(*given[0], **given[1])  # type: ignore[operator]
        except (RuntimeError, TypeError, IndexError) as error:  # three numbers are not all that it takes
            raise _UnknownError from error
        if not isinstance(output, Tensor) or output.shape != (len(_PLACES),):
            raise _UnknownError
        return output


def _dtype(node: fx.Node) -> torch.dtype | None:
    return getattr(layout(node), "dtype", None)


def _constant(node: fx.Node, value: Carried) -> Tensor:
    """A constant that is one number."""
    made = node.meta.get("val")
    if value != CONSTANT or not isinstance(made, Tensor) or made.is_meta or made.numel() != 1:
        raise _UnknownError
    return made.detach().reshape(()).float()
