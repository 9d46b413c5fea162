"""Weights in products of more than two dimensions: einsum, and the weights of several experts in one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ghn_init._tracing.record import Call, Derived, Flow, merged
from ghn_init._tracing.rules.nodes import IN_FIRST, add_layer, note_others
from ghn_init._tracing.rules.table import rule


def is_whole_parameter(call: Call, weight: Tensor) -> bool:
    """Whether `weight` is one whole parameter; a table that was projected, say, is computed from two."""
    value = call.carried(weight)
    if not isinstance(value, Derived) or len(value.params) != 1:
        return False
    return weight.numel() == torch.Size(call.recorder.shapes[value.params[0]]).numel()


def weight_in_einsum(call: Call, output: Any) -> Any | None:
    """The node of the weight in `einsum("bti,ihd->bthd", x, weight)`; None if this is no layer.

    It is one if the weight's dimensions are those that are summed over followed by those that stay, or the
    other way round: then it is a matrix, (in, out) or (out, in).
    """
    operands = call.args[1] if isinstance(call.args[1], (list, tuple)) else call.args[1:]
    terms, _, result = str(call.args[0]).replace(" ", "").partition("->")
    if len(operands) != 2 or not result or "." in terms.split(",")[0] + result:
        return None
    names = terms.split(",")
    if isinstance(call.carried(operands[0]), Derived):
        operands, names = operands[::-1], names[::-1]
    x, weight = operands
    if not is_whole_parameter(call, weight):
        return None
    summed = [name for name in names[1] if name in names[0] and name not in result]
    stays = [name for name in names[1] if name in result and name not in names[0]]
    order = list(names[1])
    if not summed or not stays or order not in (summed + stays, stays + summed):
        return None
    rows = len(order) - len(stays) if order[0] == summed[0] else len(stays)
    matrix = weight.reshape(weight.shape[:rows].numel(), -1)
    call.recorder.carry(matrix, call.carried(weight))
    return add_layer(call, output, x, matrix, None, "conv", transposed=order[0] == summed[0])


def weight_of_experts(call: Call, output: Any, x: Tensor, weight: Tensor) -> Any | None:
    """The node of the weights (experts, out, in) of a product of `x` and (experts, in, out), their transpose.

    Below one another they are one matrix, (experts * out, in). None if they are stored as (experts, in, out).
    """
    if weight.ndim != 3 or not is_whole_parameter(call, weight):
        return None
    if weight.stride(-2) != 1 or weight.shape[-2] == 1:  # not transposed on the way
        return None
    matrix = weight.transpose(1, 2).reshape(-1, weight.shape[1])
    call.recorder.carry(matrix, call.carried(weight))
    return add_layer(call, output, x, matrix, None, "conv")


@rule("grouped_mm", "_grouped_mm")
def grouped_product(call: Call) -> Any:
    """The products of several experts at once, each with its share of the rows."""
    x, weight = call.args[:2]
    inputs, output = call.inputs(), call.run()
    if isinstance(call.carried(x), Flow) and isinstance(call.carried(weight), Derived):
        layer = weight_of_experts(call, output, x, weight)
        if layer is not None:
            return layer
        note_others(call, inputs, IN_FIRST)
    return call.gives(output, merged(inputs))
