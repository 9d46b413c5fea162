"""Weights in products of more than two dimensions: einsum, and the weights of several experts in one."""

from __future__ import annotations

import torch
from torch import fx

from ghn_init._tracing.arguments import stride_of
from ghn_init._tracing.carried import Carried, Derived, Flow, merged
from ghn_init._tracing.rules.nodes import IN_FIRST, add_layer, is_whole_parameter, note_others
from ghn_init._tracing.sketch import Operation, rule


def weight_in_einsum(op: Operation) -> Carried | None:
    """The node of the weight in `einsum("bti,ihd->bthd", x, weight)`; None if this is no layer.

    It is one if the weight's dimensions are those that are summed over followed by those that stay, or the
    other way round: then it is a matrix, (in, out) or (out, in).
    """
    equation, *rest = op.args
    operands = tuple(rest[0]) if isinstance(rest[0], (list, tuple)) else tuple(rest)
    terms, _, result = str(equation).replace(" ", "").partition("->")
    if len(operands) != 2 or not result or "." in terms.split(",")[0] + result:
        return None
    names = terms.split(",")
    if isinstance(op.carried(operands[0]), Derived):
        operands, names = operands[::-1], names[::-1]
    x, weight = operands
    if not is_whole_parameter(op, weight):
        return None
    summed = [name for name in names[1] if name in names[0] and name not in result]
    stays = [name for name in names[1] if name in result and name not in names[0]]
    order = list(names[1])
    if not summed or not stays or order not in (summed + stays, stays + summed):
        return None
    rows = len(order) - len(stays) if order[0] == summed[0] else len(stays)
    shape = op.shape(weight)
    matrix = (torch.Size(shape[:rows]).numel(), torch.Size(shape[rows:]).numel())
    return add_layer(op, x, weight, None, "conv", transposed=order[0] == summed[0], shape=matrix)


def repeated_weight(op: Operation, x: fx.Node, weight: fx.Node) -> Carried | None:
    """The node of a weight (in, out) that is there once for every example; None if it is anything else.

    So decompositions of torch.export write a linear layer whose input is not contiguous.
    """
    shape, derived = op.shape(weight), op.carried(weight)
    if len(shape) != 3 or not isinstance(derived, Derived) or len(derived.params) != 1:
        return None
    stored = op.sketch.shapes[derived.params[0]]
    if len(stored) != 2 or torch.Size(stored).numel() != shape[1] * shape[2]:
        return None
    return add_layer(op, x, weight, None, "conv", transposed=True, shape=tuple(shape[1:]))


def weight_of_experts(op: Operation, x: fx.Node, weight: fx.Node) -> Carried | None:
    """The node of the weights (experts, out, in) of a product of `x` and (experts, in, out), their transpose.

    Below one another they are one matrix, (experts * out, in). None if they are stored as (experts, in, out).
    """
    shape = op.shape(weight)
    if len(shape) != 3 or not is_whole_parameter(op, weight):
        return None
    if stride_of(weight)[-2] != 1 or shape[-2] == 1:  # not transposed on the way
        return None
    return add_layer(op, x, weight, None, "conv", shape=(shape[0] * shape[2], shape[1]))


@rule("grouped_mm", "_grouped_mm")
def grouped_product(op: Operation) -> Carried:
    """The products of several experts at once, each with its share of the rows."""
    x, weight = op.args[:2]
    inputs = op.inputs()
    if isinstance(op.carried(x), Flow) and isinstance(op.carried(weight), Derived):
        layer = weight_of_experts(op, x, weight)
        if layer is not None:
            return layer
        note_others(op, inputs, IN_FIRST)
    return merged(inputs)
