"""Convolutions and linear layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ghn_init._tracing.record import Flow, merged
from ghn_init._tracing.rules.nodes import add_layer, as_tuple, note_others
from ghn_init._tracing.rules.table import rule

if TYPE_CHECKING:
    from torch import Tensor

    from ghn_init._tracing.record import Call


@rule("conv1d", "conv2d", "conv3d")
def convolution(call: Call) -> Any:
    """A convolution: `conv`, grouped `sep_conv`, grouped and dilated `dil_conv`; then `bias`."""
    x, weight = call.arg(0, "input"), call.arg(1, "weight")
    stride, padding = call.arg(3, "stride", 1), call.arg(4, "padding", 0)
    dilation, groups = call.arg(5, "dilation", 1), call.arg(6, "groups", 1)
    output = _convolved(x, weight, stride, padding, dilation)
    if output is None or not _matches(x, weight, groups):
        output = call.run()
    return add_layer(call, output, x, weight, call.arg(2, "bias"), _conv_type(dilation, groups))


def _conv_type(dilation: Any, groups: int) -> str:
    if groups == 1:
        return "conv"
    return "dil_conv" if min(as_tuple(dilation, 1)) > 1 else "sep_conv"


def _convolved(x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any) -> Tensor | None:
    """An empty tensor of a convolution's output shape: the meta kernel takes ten times longer."""
    n = weight.ndim - 2
    if isinstance(padding, str) or x.ndim != n + 2:
        return None
    sizes = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(
            x.shape[2:], weight.shape[2:], as_tuple(stride, n), as_tuple(padding, n), as_tuple(dilation, n),
            strict=True,
        )
    ]  # fmt: skip
    return x.new_empty(x.shape[0], weight.shape[0], *sizes) if min(sizes) > 0 else None


def _matches(x: Tensor, weight: Tensor, groups: int) -> bool:
    """Whether the channels agree; where they do not, the real kernel raises its own error."""
    return x.ndim == weight.ndim and x.shape[1] == weight.shape[1] * groups


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def transposed_convolution(call: Call) -> Any:
    """A transposed convolution: its weight is stored (in, out, ...)."""
    x, weight = call.arg(0, "input"), call.arg(1, "weight")
    kind = _conv_type(call.arg(7, "dilation", 1), call.arg(6, "groups", 1))
    return add_layer(call, call.run(), x, weight, call.arg(2, "bias"), kind, transposed=True)


@rule("deform_conv2d")
def deformable_convolution(call: Call) -> Any:
    """Torchvision's: a `conv` of the feature map and the offsets that are computed beside it."""
    x, weight, offset, mask, bias = call.args[:5]
    both = torch.empty_like(x)
    call.recorder.carry(both, merged(map(call.carried, (x, offset, mask))))
    return add_layer(call, call.run(), both, weight, bias, "conv")


@rule("linear")
def linear(call: Call) -> Any:
    """A linear layer: a `conv` whose kernel is 1x1; then `bias`."""
    x, weight = call.arg(0, "input"), call.arg(1, "weight")
    fits = weight.ndim == 2 and x.ndim >= 1 and x.shape[-1] == weight.shape[1]
    output = x.new_empty(*x.shape[:-1], weight.shape[0]) if fits else call.run()
    return add_layer(call, output, x, weight, call.arg(2, "bias"), "conv")


@rule("addmm")
def addmm(call: Call) -> Any:
    """`torch.addmm(bias, x, w)`, a linear layer whose weight is stored (in, out)."""
    bias, x, weight = call.arg(0, "input"), call.arg(1, "mat1"), call.arg(2, "mat2")
    return add_layer(call, call.run(), x, weight, bias, "conv", transposed=True)


@rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def recurrent(call: Call) -> Any:
    """No node fits: the weights are kept. The output's shape is known without going through all steps."""
    x, states, weights = call.args[:3]
    value = merged(call.inputs())
    if not isinstance(value, Flow) or not isinstance(weights, (list, tuple)):
        return call.passed_on()  # constants; a packed sequence, which has batch sizes before its states
    note_others(call, call.inputs(), f"used by {call.name}")
    hidden = states if isinstance(states, torch.Tensor) else states[0]
    bidirectional = call.args[7]
    output = x.new_empty(*x.shape[:-1], hidden.shape[-1] * (2 if bidirectional else 1))
    last = [states] if isinstance(states, torch.Tensor) else states
    return call.gives((output, *(torch.empty_like(state, device=x.device) for state in last)), value)
