"""Normalisation, by a function or written by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import fx

from ghn_init._graph.graph import Node
from ghn_init._tracing.arguments import as_tuple
from ghn_init._tracing.carried import Carried, Derived, Flow, merged
from ghn_init._tracing.functions import DIVIDING, SUBTRACTING
from ghn_init._tracing.rules.nodes import SHIFTED, add_norm, main_parameter
from ghn_init._tracing.sketch import Operation, rule

_MAPS = 4
"""Dimensions of feature maps: images, channels, rows and columns."""


@rule("batch_norm")
def batch_norm(op: Operation) -> Carried:
    """A `bn` node for weight and bias."""
    carried = norm(op, "bn", *_after_statistics(op))
    mean = op.arg(3 if op.node.target is torch.batch_norm else 1, "running_mean")
    if isinstance(carried, Flow) and isinstance(mean, fx.Node) and mean.op == "get_attr":
        index = carried.sources[0]
        path, _, _ = str(mean.target).rpartition(".")
        if op.sketch.nodes[index].type == "bn" and op.sketch.nodes[index].param is None:
            op.sketch.bare[index] = path
    return carried


@rule("instance_norm")
def instance_norm(op: Operation) -> Carried:
    """Statistics of one example: an `ln` node."""
    return norm(op, "ln", *_after_statistics(op))


def _after_statistics(op: Operation) -> tuple[Any, Any]:
    """Weight and bias of a function that takes running statistics: before them in torch, after them in F."""
    first = 1 if op.node.target in (torch.batch_norm, torch.instance_norm) else 3
    return op.arg(first, "weight"), op.arg(first + 1, "bias")


@rule("group_norm")
def group_norm(op: Operation) -> Carried:
    """As `layer_norm`; the graph says which are group norms of feature maps."""
    carried, shape = layer_norm(op), op.shape(op.arg(0, "input"))
    groups = op.arg(1, "num_groups")
    of_maps = len(shape) == _MAPS and isinstance(groups, int) and 2 * groups <= shape[1]
    if isinstance(carried, Flow) and of_maps:
        op.sketch.grouped.update(index for index in carried.sources if op.sketch.nodes[index].type == "ln")
    return carried


@rule("layer_norm", "rms_norm")
def layer_norm(op: Operation) -> Carried:
    """An `ln` node for weight and bias; group norm and RMS norm, of one example too, are alike."""
    return norm(op, "ln", op.arg(2, "weight"), op.arg(3, "bias") if op.name != "rms_norm" else None)


def norm(op: Operation, node_type: str, weight: Any, bias: Any) -> Carried:
    """The node of a normalisation by a function."""
    flow = op.carried(op.arg(0, "input"))
    if not isinstance(flow, Flow):
        return op.passed_on()
    node = add_norm(op, node_type, op.carried(weight), op.carried(bias), flow.sources)
    complete = op.sketch.nodes[node].param or op.sketch.nodes[node].bias
    return Flow((node,), "" if complete else "normalised")


# -- written by hand ----------------------------------------------------------------------------


@rule("pow", "pow_", "__pow__", "square")
def power(op: Operation) -> Carried:
    """A square may become a moment, the mean of squares that a normalisation divides by."""
    exponent = 2 if op.name == "square" else op.arg(1, "exponent")
    if isinstance(exponent, fx.Node) or exponent != 2:
        return op.passed_on()
    value = op.carried(op.arg(0, "input"))
    return Flow(value.sources, "square") if isinstance(value, Flow) else value


@rule("var", "std")
def variance(op: Operation) -> Carried:
    """A moment."""
    return moment(op, op.arg(1, "dim"))


@rule("var_mean", "std_mean")
def variance_and_mean(op: Operation) -> tuple[Carried, Carried]:
    """A moment, and a mean that has no node: it is there to be subtracted."""
    return moment(op, op.arg(1, "dim")), op.carried(op.arg(0, "input"))


def moment(op: Operation, dims: Any) -> Carried:
    """What a mean of squares or a variance carries."""
    x = op.arg(0, "input")
    value = op.carried(x)
    if not isinstance(value, Flow):
        return value
    ndim = len(op.shape(x))
    over = {dim % ndim for dim in as_tuple(dims, 1)} if dims is not None and ndim else {0}
    return Flow(value.sources, "batch moment" if 0 in over else "moment")


@rule(*SUBTRACTING)
def subtract(op: Operation) -> Carried:
    """What is left after its own mean was subtracted is the tensor itself: the mean is no `glob_avg`."""
    of_x, of_mean = op.carried(op.arg(0, "input")), op.carried(op.arg(1, "other"))
    if not (isinstance(of_x, Flow) and isinstance(of_mean, Flow) and of_mean.role == "mean"):
        return op.passed_on()
    own = len(of_mean.sources) == 1 and op.sketch.predecessors[of_mean.sources[0]] == of_x.sources
    return of_x if own else merged((of_x, of_mean))


@rule(*DIVIDING)
def divide(op: Operation) -> Carried:
    """Divided by a moment of its own, a tensor is normalised."""
    value = normalised(op, op.carried(op.arg(0, "input")), op.carried(op.arg(1, "other")))
    return op.passed_on() if value is None else value


def normalised(op: Operation, of_x: Carried, of_moment: Carried) -> Flow | None:
    """The node of a normalisation, its weight and bias still to come; None if it is not one."""
    if not (isinstance(of_x, Flow) and isinstance(of_moment, Flow)) or of_x.sources != of_moment.sources:
        return None
    if of_moment.role not in ("moment", "batch moment") or of_x.role == of_moment.role:
        return None
    node_type = "bn" if of_moment.role == "batch moment" else "ln"
    return Flow((op.sketch.add_node(Node(node_type), of_x.sources),), "normalised")


def takes_vector(op: Operation, flow: Flow, derived: Carried, part: Literal["param", "bias"]) -> bool:
    """Whether a parameter is weight or bias of the normalisation that `flow` comes from; its node is told."""
    if flow.role != "normalised" or len(flow.sources) != 1:
        return False
    if not isinstance(derived, Derived) or not derived.params:
        return False
    index = flow.sources[0]
    node, name = op.sketch.nodes[index], main_parameter(op, derived)
    shape = op.sketch.shapes[name]
    taken = node.bias or (part == "param" and node.param)
    if taken or sum(size > 1 for size in shape) > 1:
        return False
    if derived.shifted:
        op.sketch.note_role((name,), SHIFTED)
        return True
    if part == "bias":
        op.sketch.nodes[index] = replace(node, bias=name, shape=node.shape or shape)
    else:
        flat = (torch.Size(shape).numel(),)
        stored = None if flat == shape else shape
        op.sketch.nodes[index] = replace(node, param=name, shape=flat, stored=stored)
    return True
