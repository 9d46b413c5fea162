"""What the recorder knows of a tensor, and where tensors are in what a function gave."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import fx


class UnknownValueError(Exception):
    """The forward pass reads a value of an activation, which has none while it is recorded."""


@dataclass(slots=True, eq=False)
class Value:
    """One tensor of the recording.

    Attributes:
        tensor: The tensor; kept, so that no other gets its identity.
        varies: It depends on the network's input.
        constant: It depends neither on the input nor on a parameter.
        inside: It was made while recording, so functions may have it as it is.
        known: It depends on the input in name only: its values, on the CPU, can be relied on.
        node: Its node; None until one is needed.
        origin: Of one of several outputs of a function, the function's node and the path to it.
        name: Its name in the model; None of a constant.
        twin: What functions get instead of it: a copy, or a meta tensor of its shape.
    """

    tensor: Tensor
    varies: bool
    constant: bool
    inside: bool = True
    known: bool = False
    node: fx.Node | None = None
    origin: tuple[fx.Node, tuple[Any, ...]] | None = None
    name: str | None = None
    twin: Tensor | None = None


@dataclass(slots=True)
class Made:
    """What is known of a call's outputs: see `Value`. Without a node, what was computed from constants."""

    varies: bool = False
    constant: bool = True
    known: bool = False
    node: fx.Node | None = None

    @classmethod
    def of(cls, inputs: Sequence[Value]) -> Made:
        """What is known of the outputs of a function of `inputs`."""
        made = cls()
        for value in inputs:  # any() and all() take longer, and this is done for every call
            if value.varies:
                made.varies = True
            if not value.constant:
                made.constant = False
        return made


def paths_in(value: object, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    """The tensors in nested tuples, lists, dicts and dataclass-like objects, each with the keys to it."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from paths_in(item, (*path, index))
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from paths_in(item, (*path, key))
    elif hasattr(value, "__dataclass_fields__") and not isinstance(value, type):
        for key, item in vars(value).items():
            yield from paths_in(item, (*path, Attribute(key)))


class Attribute(str):
    """The name of an attribute in a path; any other string there is the key of a dictionary."""

    __slots__ = ()
