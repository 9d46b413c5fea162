"""The tape: a `torch.fx.Graph`, written one call after the other.

`fx.Graph.create_node` takes 25 us, nearly all of it to look through arguments for symbolic numbers, which a
recording does not have, and to make a name of the function. Where nobody reads the names, nodes are put into
the graph without it, in 2 us.
"""

from __future__ import annotations

import enum
import operator
from collections.abc import Mapping
from functools import lru_cache
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, fx, nn

from ghn_init._tracing.values import Attribute, Value, paths_in

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_ATOMS: Final = frozenset({
    int, float, bool, complex, str, type(None), type(...), range, torch.dtype, torch.layout,
    torch.memory_format,
})  # fmt: skip
"""Types of arguments that fx writes out as they are."""

_OPERATORS: Final = {
    f"__{name.strip('_')}__": getattr(operator, name)
    for name in (
        "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "neg", "and_", "or_", "xor",
        "invert", "lt", "le", "gt", "ge", "eq", "ne", "getitem", "setitem",
        "iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow", "iand", "ior", "ixor",
    )
}  # fmt: skip
"""Methods of tensors that Python has a function for, which reads better in a graph: `operator.add`."""


class Tape:
    """An fx graph that grows at its end.

    Args:
        home: The device of the model: where code asks for the device of an activation, it gets the meta
            device while recording, and the graph says this one.
        readable: Whether the graph is for users, with names that say what nodes are and are told apart.

    Attributes:
        home: That device.
        graph: The graph.
        objects: What a `get_attr` or `call_module` node's target stands for.
    """

    def __init__(self, home: torch.device, *, readable: bool) -> None:
        self.graph = fx.Graph()
        self._readable = readable
        self.objects: dict[str, Any] = {}
        self.home = home

    def append(
        self,
        op: str,
        target: Any,
        name: str,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> fx.Node:
        """A node; `args` and `kwargs` have nodes for tensors."""
        graph = self.graph
        if self._readable:
            node = graph.create_node(op, target, name=name)
            node.args, node.kwargs = args, kwargs or {}
            return node
        # What `create_node` does at its end.
        node = fx.Node(graph, f"n{graph._len}", op, target, args, kwargs or {})  # noqa: SLF001
        graph._insert(node)  # noqa: SLF001
        graph._find_nodes_lookup_table.insert(node)  # noqa: SLF001
        graph._len += 1  # noqa: SLF001
        return node

    def attribute(self, name: str, value: object) -> fx.Node:
        """A node that gets `value`, called `name` in the model."""
        self.objects[name] = value
        return self.append("get_attr", name, name)

    def constant(self, value: object) -> fx.Node:
        """A node that gets `value`, which has no name in the model."""
        return self.attribute(f"_constant{len(self.objects)}", value)

    def node_of(self, value: Value) -> fx.Node:
        """The node of a tensor.

        Those of the model's tensors, of constants, and of one among several outputs of a function are made
        when they are needed.
        """
        if value.node is None:
            if value.origin is not None:
                value.node = self._part(*value.origin)
            elif value.name is None:
                value.node = self.constant(value.tensor)
            else:
                value.node = self.attribute(value.name, value.tensor)
            value.node.meta["val"] = value.tensor
            if value.known:
                value.node.meta["known"] = True
        return value.node

    def _part(self, node: fx.Node, path: tuple[Any, ...]) -> fx.Node:
        for key in path:
            if type(key) is Attribute:
                node = self.append("call_function", getattr, "getattr", (node, str(key)))
            else:
                node = self.append("call_function", operator.getitem, "getitem", (node, key))
        return node

    def argument(self, value: Any, node_of: Callable[[Tensor], fx.Node]) -> Any:
        """`value` as fx has arguments: nodes for tensors, and for objects that cannot be written out."""
        cls = type(value)
        if cls in _ATOMS:
            return value
        if cls is Tensor or cls is nn.Parameter or isinstance(value, Tensor):
            return node_of(value)
        if cls is tuple or cls is torch.Size:
            return tuple([
                item if type(item) in _ATOMS else self.argument(item, node_of) for item in value
            ])  # fmt: skip
        if cls is list:
            return [self.argument(item, node_of) for item in value]
        if cls is torch.device:
            return self.home if value.type == "meta" else value
        if cls is slice:
            return slice(*(self.argument(part, node_of) for part in (value.start, value.stop, value.step)))
        if isinstance(value, dict):
            return {key: self.argument(item, node_of) for key, item in value.items()}
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return cls(*(self.argument(item, node_of) for item in value))
        if isinstance(value, enum.Enum):
            return value
        return self.constant(value)

    def result(self, value: Any, node_of: Callable[[Tensor], fx.Node], around: tuple[int, ...] = ()) -> Any:
        """What a forward pass returns, as fx has it: objects of other classes are dicts of their fields.

        `around` are the identities of the containers that hold `value`; one that holds itself is left out.
        """
        if isinstance(value, Tensor):
            return node_of(value)
        if type(value) in _ATOMS or id(value) in around:
            return value if type(value) in _ATOMS else None
        around = (*around, id(value))
        if isinstance(value, (tuple, list, set, frozenset)):
            items = [self.result(item, node_of, around) for item in value]
            if hasattr(value, "_fields"):
                return type(value)(*items)
            return tuple(items) if isinstance(value, tuple) else items
        fields = _fields(value)
        return None if fields is None else {key: self.result(fields[key], node_of, around) for key in fields}

    def placeholders(self, inputs: Iterable[tuple[str, Any]]) -> list[Value]:
        """Nodes of the arguments of the forward pass; the tensors in them."""
        found = []
        for name, value in inputs:
            node = self.append("placeholder", name, name.lstrip("*"))
            node.meta["val"] = value
            for path, tensor in paths_in(value):
                found.append(Value(tensor, varies=True, constant=False))
                if path:
                    found[-1].origin = node, path
                else:
                    found[-1].node = node
        return found


def _fields(value: object) -> Mapping[Any, Any] | None:
    """What an object holds; None of modules, classes, functions and whatever else has no fields."""
    if isinstance(value, Mapping):
        return value
    if isinstance(value, (nn.Module, type, FunctionType, ModuleType)):
        return None
    return getattr(value, "__dict__", None)


@lru_cache(maxsize=4096)
def written(func: Callable[..., Any], name: str) -> tuple[str, Any, str]:
    """Of a node that calls `func`: what sort it is, its target and its name."""
    plain = name.strip("_") or name
    if getattr(Tensor, name, None) is not func:
        return "call_function", func, plain
    if name in _OPERATORS:
        return "call_function", _OPERATORS[name], plain
    return "call_method", name, plain
