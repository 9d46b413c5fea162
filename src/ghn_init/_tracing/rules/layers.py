"""Convolutions, linear layers, and layers that have no node."""

from __future__ import annotations

import math
from typing import Any, Final

from torch import fx

from ghn_init._tracing.arguments import as_tuple
from ghn_init._tracing.carried import Carried, Flow, merged
from ghn_init._tracing.rules.nodes import add_layer, note_others
from ghn_init._tracing.sketch import Operation, rule

_WHOLE: Final = 0.75
"""Share of a filter that is in the image, on average, from which on it counts as all of it."""

_WIDE: Final = 4
"""Of an image that is so many times wider than the filters there is no need to count."""


@rule("conv1d", "conv2d", "conv3d")
def convolution(op: Operation) -> Carried:
    """A convolution: `conv`, grouped `sep_conv`, grouped and dilated `dil_conv`; then `bias`.

    The sketch notes what lies in the image of filters of which much lies beside it.
    """
    node_type = conv_type(op.arg(5, "dilation", 1), op.arg(6, "groups", 1))
    index = len(op.sketch.nodes)
    value = add_layer(op, op.arg(0, "input"), op.arg(1, "weight"), op.arg(2, "bias"), node_type)
    if index < len(op.sketch.nodes) and (rows := _rows_in_the_image(op)):
        op.sketch.cropped[index] = rows
    return value


def _rows_in_the_image(op: Operation) -> tuple[tuple[tuple[int, int], ...], ...]:
    """What `Graph.cropped` has of a convolution; nothing where hardly anything of its filter lies outside."""
    padding, taps = op.arg(4, "padding", 0), op.shape(op.arg(1, "weight"))[2:]
    n = len(taps)
    sizes, places = op.shape(op.arg(0, "input"))[-n:], op.shape(op.node)[-n:]
    strides, dilations = (as_tuple(op.arg(i, k, 1), n) for i, k in ((3, "stride"), (5, "dilation")))
    extents = [d * (k - 1) for d, k in zip(dilations, taps, strict=True)]
    if not any(extents) or all(size > _WIDE * extent for size, extent in zip(sizes, extents, strict=True)):
        return ()
    if isinstance(padding, str):  # torch pads "same" less at the front where the sum is odd
        same = padding == "same"
        pads = tuple(extent // 2 if same else 0 for extent in extents)
    else:
        pads = as_tuple(padding, n)
    axes = zip(sizes, taps, places, strides, dilations, pads, strict=True)
    rows = tuple(_rows(*map(int, axis)) for axis in axes)
    seen = (sum(end - start for start, end in axis) / max(1, len(axis)) for axis in rows)
    return () if math.prod(seen) > _WHOLE * taps.numel() else rows


def _rows(
    size: int, taps: int, places: int, stride: int, dilation: int, padding: int
) -> tuple[tuple[int, int], ...]:
    """Along an axis, for every place of the output: the first tap in the image, the one after the last."""
    found = []
    for start in range(-padding, places * stride - padding, stride):
        first = min(taps, max(0, -(start // dilation)))
        found.append((first, max(first, min(taps, -((start - size) // dilation)))))
    return tuple(found)


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
