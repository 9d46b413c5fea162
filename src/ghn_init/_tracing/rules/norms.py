"""Normalisation, by a function or written by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from ghn_init._graph.graph import Node
from ghn_init._tracing.kernels import like
from ghn_init._tracing.record import Call, Carried, Derived, Flow, merged
from ghn_init._tracing.rules.nodes import SHIFTED, add_norm, as_tuple, main_parameter
from ghn_init._tracing.rules.table import rule


@rule("batch_norm")
def batch_norm(call: Call) -> Any:
    """A `bn` node for weight and bias."""
    return _norm(call, "bn", call.arg(3, "weight"), call.arg(4, "bias"))


@rule("instance_norm")
def instance_norm(call: Call) -> Any:
    """Statistics of one example: an `ln` node."""
    return _norm(call, "ln", call.arg(3, "weight"), call.arg(4, "bias"))


@rule("layer_norm", "group_norm", "rms_norm")
def layer_norm(call: Call) -> Any:
    """An `ln` node for weight and bias; group norm and RMS norm, of one example too, are alike."""
    return _norm(call, "ln", call.arg(2, "weight"), call.arg(3, "bias") if call.name != "rms_norm" else None)


def _norm(call: Call, kind: str, weight: Tensor | None, bias: Tensor | None) -> Any:
    x = call.arg(0, "input")
    flow = call.carried(x)
    if not isinstance(flow, Flow):
        return call.passed_on()
    node = add_norm(call, kind, call.carried(weight), call.carried(bias), flow.sources)
    complete = call.recorder.nodes[node].param or call.recorder.nodes[node].bias
    return call.gives(like(x), Flow((node,), "" if complete else "normalised"))


# -- written by hand ----------------------------------------------------------------------------


@rule("pow", "pow_", "__pow__", "square")
def power(call: Call) -> Any:
    """A square may become a moment, the mean of squares that a normalisation divides by."""
    exponent = 2 if call.name == "square" else call.arg(1, "exponent")
    if isinstance(exponent, Tensor) or exponent != 2:
        return call.passed_on()
    value = call.carried(call.arg(0, "input"))
    return call.gives(call.run(), Flow(value.sources, "square") if isinstance(value, Flow) else value)


@rule("var", "std")
def variance(call: Call) -> Any:
    """A moment."""
    return call.gives(call.run(), _moment(call, call.arg(1, "dim")))


@rule("var_mean", "std_mean")
def variance_and_mean(call: Call) -> Any:
    """A moment, and a mean that has no node: it is there to be subtracted."""
    value = call.carried(call.arg(0, "input"))
    moment, mean = call.run()
    call.gives(mean, value)
    return call.gives(moment, _moment(call, call.arg(1, "dim"))), mean


def mean_of_squares(call: Call) -> Any:
    """A moment."""
    return call.gives(call.run(), _moment(call, call.arg(1, "dim")))


def _moment(call: Call, dims: Any) -> Carried:
    x = call.arg(0, "input")
    value = call.carried(x)
    if not isinstance(value, Flow):
        return value
    over = {dim % x.ndim for dim in as_tuple(dims, 1)} if dims is not None and x.ndim else {0}
    return Flow(value.sources, "batch moment" if 0 in over else "moment")


@rule("sub", "sub_", "__sub__", "__isub__", "subtract")
def subtract(call: Call) -> Any:
    """What is left after its own mean was subtracted is the tensor itself: the mean is no `glob_avg`."""
    of_x, of_mean = call.carried(call.arg(0, "input")), call.carried(call.arg(1, "other"))
    if not (isinstance(of_x, Flow) and isinstance(of_mean, Flow) and of_mean.role == "mean"):
        return call.passed_on()
    own = len(of_mean.sources) == 1 and call.recorder.predecessors[of_mean.sources[0]] == of_x.sources
    return call.gives(call.run(), of_x if own else merged((of_x, of_mean)))


@rule("div", "div_", "__truediv__", "__itruediv__", "divide", "true_divide")
def divide(call: Call) -> Any:
    """Divided by a moment of its own, a tensor is normalised."""
    value = normalised(call, call.carried(call.arg(0, "input")), call.carried(call.arg(1, "other")))
    return call.passed_on() if value is None else call.gives(call.run(), value)


def normalised(call: Call, of_x: Carried, of_moment: Carried) -> Flow | None:
    """The node of a normalisation, its weight and bias still to come; None if it is not one."""
    if not (isinstance(of_x, Flow) and isinstance(of_moment, Flow)) or of_x.sources != of_moment.sources:
        return None
    if of_moment.role not in ("moment", "batch moment") or of_x.role == of_moment.role:
        return None
    kind = "bn" if of_moment.role == "batch moment" else "ln"
    return Flow((call.recorder.add_node(Node(kind), of_x.sources),), "normalised")


def takes_vector(call: Call, flow: Flow, derived: Carried, part: Literal["param", "bias"]) -> bool:
    """Whether a parameter is weight or bias of the normalisation that `flow` comes from; its node is told."""
    if flow.role != "normalised" or len(flow.sources) != 1:
        return False
    if not isinstance(derived, Derived) or not derived.params:
        return False
    index = flow.sources[0]
    node, name = call.recorder.nodes[index], main_parameter(call, derived)
    shape = call.recorder.shapes[name]
    taken = node.bias or (part == "param" and node.param)
    if taken or sum(size > 1 for size in shape) > 1:
        return False
    if derived.shifted:
        call.recorder.note_role((name,), SHIFTED)
        return True
    if part == "bias":
        call.recorder.nodes[index] = replace(node, bias=name, shape=node.shape or shape)
    else:
        flat = (torch.Size(shape).numel(),)
        stored = None if flat == shape else shape
        call.recorder.nodes[index] = replace(node, param=name, shape=flat, stored=stored)
    return True
