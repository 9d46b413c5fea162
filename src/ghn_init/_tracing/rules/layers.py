"""Convolutions, linear layers, and layers that have no node."""

from __future__ import annotations

from typing import Any

from torch import fx

from ghn_init._tracing.arguments import as_tuple
from ghn_init._tracing.carried import Carried, Flow, merged
from ghn_init._tracing.rules.nodes import add_layer, note_others
from ghn_init._tracing.sketch import Operation, rule


@rule("conv1d", "conv2d", "conv3d")
def convolution(op: Operation) -> Carried:
    """A convolution: `conv`, grouped `sep_conv`, grouped and dilated `dil_conv`; then `bias`."""
    node_type = conv_type(op.arg(5, "dilation", 1), op.arg(6, "groups", 1))
    return add_layer(op, op.arg(0, "input"), op.arg(1, "weight"), op.arg(2, "bias"), node_type)


def conv_type(dilation: Any, groups: int) -> str:
    """The type of a convolution's node."""
    if groups == 1:
        return "conv"
    return "dil_conv" if min(as_tuple(dilation, 1)) > 1 else "sep_conv"


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def transposed_convolution(op: Operation) -> Carried:
    """A transposed convolution: its weight is stored (in, out, ...)."""
    node_type = conv_type(op.arg(7, "dilation", 1), op.arg(6, "groups", 1))
    x, weight, bias = op.arg(0, "input"), op.arg(1, "weight"), op.arg(2, "bias")
    return add_layer(op, x, weight, bias, node_type, transposed=True)


@rule("deform_conv2d")
def deformable_convolution(op: Operation) -> Carried:
    """Torchvision's: a `conv` of the feature map and the offsets that are computed beside it."""
    x, weight, offset, mask, bias = op.args[:5]
    flow = merged([op.carried(part) for part in (x, offset, mask)])
    return add_layer(op, flow, weight, bias, "conv")


@rule("linear")
def linear(op: Operation) -> Carried:
    """A linear layer: a `conv` whose kernel is 1x1; then `bias`."""
    return add_layer(op, op.arg(0, "input"), op.arg(1, "weight"), op.arg(2, "bias"), "conv")


@rule("addmm")
def addmm(op: Operation) -> Carried:
    """`torch.addmm(bias, x, w)`, a linear layer whose weight is stored (in, out)."""
    bias, x, weight = op.arg(0, "input"), op.arg(1, "mat1"), op.arg(2, "mat2")
    return add_layer(op, x, weight, bias, "conv", transposed=True)


@rule("interpolate", "upsample", "pixel_shuffle",
      "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d",
      "upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d")  # fmt: skip
def resized(op: Operation) -> Carried:
    """No node; the sketch notes it where a feature map (N, C, *sizes) becomes larger."""
    value, sizes = op.passed_on(), op.shape(op.operands()[0])[2:]
    if isinstance(value, Flow) and op.shape(op.node)[2:].numel() > sizes.numel():
        op.sketch.enlarged.update(value.sources)
    return value


@rule("embedding", "embedding_bag")
def embedding(op: Operation) -> Carried:
    """A table of embeddings: no node type fits; positions looked up in it are a positional encoding."""
    inputs = op.inputs()
    value = merged(inputs)
    if isinstance(value, Flow):
        note_others(op, inputs, "embedding table")
    return value


@rule("__getitem__")
def chosen(op: Operation) -> Carried:
    """Known positions choose from a weight as numbers do."""
    x, index = op.args
    items = index if isinstance(index, tuple) else (index,)
    indices = [item for item in items if isinstance(item, fx.Node)]
    of_x = op.carried(x)
    if not isinstance(of_x, Flow) and indices and all(item.meta.get("known") for item in indices):
        return of_x
    return op.passed_on()


@rule("_is_all_true")
def asserted(op: Operation) -> Carried:
    """Only assertions ask this, and nothing is computed with it."""
    return merged(op.inputs())
