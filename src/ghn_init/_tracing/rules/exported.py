"""Functions of torch.ops.aten that only graphs of torch.export have."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ghn_init._tracing.rules.attention import attention
from ghn_init._tracing.rules.layers import conv_type
from ghn_init._tracing.rules.nodes import add_layer
from ghn_init._tracing.rules.norms import norm
from ghn_init._tracing.sketch import Operation, rule

if TYPE_CHECKING:
    from ghn_init._tracing.carried import Carried


@rule("convolution")
def convolution(op: Operation) -> Carried:
    """A convolution or a transposed one."""
    node_type = conv_type(op.arg(5, "dilation"), op.arg(8, "groups"))
    x, weight, bias = op.arg(0, "input"), op.arg(1, "weight"), op.arg(2, "bias")
    return add_layer(op, x, weight, bias, node_type, transposed=bool(op.arg(6, "transposed")))


@rule("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
      "_native_batch_norm_legit_functional", "cudnn_batch_norm")  # fmt: skip
def batch_norm(op: Operation) -> Carried:
    """A `bn` node; further outputs are statistics."""
    return norm(op, "bn", op.arg(1, "weight"), op.arg(2, "bias"))


@rule("native_layer_norm", "native_group_norm", "_fused_rms_norm")
def layer_norm(op: Operation) -> Carried:
    """An `ln` node; further outputs are statistics."""
    return norm(op, "ln", op.arg(2, "weight"), op.arg(3, "bias"))


# Further outputs are for the backward pass.
rule("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
     "_scaled_dot_product_efficient_attention", "_scaled_dot_product_fused_attention_overrideable",
     "_scaled_dot_product_attention_math")(attention)  # fmt: skip
