"""Graphs of the user's: `torch.fx.GraphModule`s from `symbolic_trace`, `record` or `torch.export`."""

from __future__ import annotations

from operator import attrgetter
from typing import Final

import torch
from torch import Tensor, fx

from ghn_init._tracing.arguments import function_name, layout
from ghn_init._tracing.functions import is_in_place
from ghn_init._tracing.inputs import ExampleInput
from ghn_init._tracing.recorder import Recording

_VIEWS: Final = frozenset({
    "__getitem__", "slice", "select", "view", "reshape", "transpose", "permute", "unsqueeze", "squeeze", "t",
    "narrow", "expand", "flatten", "unflatten", "chunk", "split", "unbind", "diagonal", "swapaxes", "movedim",
    "detach", "alias", "as_strided", "view_as", "__get__",
})  # fmt: skip
"""Functions whose output may share the memory of their first argument."""


def is_complete(graph: fx.Graph) -> bool:
    """Whether the graph says every tensor's shape and calls no modules, but for an effect."""
    for node in graph.nodes:
        if node.op == "call_module" and node.users:
            return False
        says = layout(node) is not None or "type" in node.meta
        if node.op == "placeholder" and not says:
            return False
        if node.op in ("call_function", "call_method") and node.users and not says:
            return False
    return True


def inputs_of(graph: fx.Graph) -> ExampleInput | None:
    """What the graph's placeholders say of its inputs, on meta; None if they do not."""
    found: list[Tensor] = []
    for node in graph.find_nodes(op="placeholder"):
        said = layout(node)
        if said is None or not hasattr(said, "shape"):
            return None
        sizes = [int(size) for size in said.shape]
        found.append(torch.empty(sizes, dtype=said.dtype, device="meta"))
    described = ", ".join(str(tuple(tensor.shape)) for tensor in found)
    return ExampleInput(tuple(found), {}, described, "graph")


def recording_of(model: fx.GraphModule) -> Recording:
    """The user's graph as if it had been recorded: a copy that says which of its nodes are parameters."""
    shapes = {name: tuple(param.shape) for name, param in model.named_parameters()}
    first = {id(param): name for name, param in model.named_parameters()}
    names = {name: first[id(param)] for name, param in model.named_parameters(remove_duplicate=False)}
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in model.graph.nodes:
        if node.op == "call_module":  # for an effect
            continue
        copy = copies[node] = graph.node_copy(node, copies.__getitem__)
        copy.meta.pop("parameter", None)
        if node.op == "get_attr":
            copy.meta.setdefault("val", attrgetter(str(node.target))(model))
            if node.target in names:
                copy.meta["parameter"] = names[str(node.target)]
        base = copies[node.meta["base"]] if "base" in node.meta else _base(copy)
        if base is not None:
            copy.meta["base"] = base
    return Recording(graph, {}, shapes)


def _base(node: fx.Node) -> fx.Node | None:
    """What the first argument of a function that changes it in place is a view of."""
    if node.op not in ("call_function", "call_method") or not node.args:
        return None
    name = function_name(node)
    base = node.args[0]
    if not (isinstance(base, fx.Node) and is_in_place(name)):
        return None
    while base.op in ("call_function", "call_method") and function_name(base) in _VIEWS:
        (above,) = base.args[:1] or (None,)
        if not isinstance(above, fx.Node):
            break
        base = above
    return None if base is node.args[0] else base
