"""Normalisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ghn_init._ops._nodes import add_norm
from ghn_init._ops._table import rule
from ghn_init._record import Call, Flow


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
    return call.gives(torch.empty_like(x), Flow((node,)))
