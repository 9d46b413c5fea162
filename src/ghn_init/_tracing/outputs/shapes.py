"""Outputs whose shape follows from the arguments' shapes: empty tensors, faster than torch's meta kernels."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from ghn_init._tracing.arguments import as_tuple
from ghn_init._tracing.functions import ADDING, ELEMENTWISE, JOINING, MULTIPLYING, is_in_place
from ghn_init._tracing.kernels import empty, like
from ghn_init._tracing.outputs.call import Call, output_of

if TYPE_CHECKING:
    from collections.abc import Sequence


@output_of("conv1d", "conv2d", "conv3d")
def convolved(call: Call) -> Any:
    """Of a convolution's output shape: the meta kernel takes ten times longer."""
    x, weight = call.arg(0, "input"), call.arg(1, "weight")
    stride, padding = call.arg(3, "stride", 1), call.arg(4, "padding", 0)
    dilation, groups = call.arg(5, "dilation", 1), call.arg(6, "groups", 1)
    n = weight.ndim - 2
    # Where the channels do not agree, the real kernel raises its own error.
    fits = x.ndim == n + 2 and x.shape[1] == weight.shape[1] * groups
    if isinstance(padding, str) or not fits:
        return call.run()
    sizes = _convolved_sizes(
        x.shape[2:], weight.shape[2:], as_tuple(stride, n), as_tuple(padding, n), as_tuple(dilation, n)
    )
    return empty(x, (x.shape[0], weight.shape[0], *sizes)) if min(sizes) > 0 else call.run()


@lru_cache(maxsize=4096)
def _convolved_sizes(
    sizes: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, ...]:  # fmt: skip
    """Sizes of a convolution's output; networks have the same few layers again and again."""
    axes = zip(sizes, kernel, stride, padding, dilation, strict=True)
    return tuple((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in axes)


@output_of("linear")
def linear(call: Call) -> Any:
    """(*, in) to (*, out)."""
    x, weight = call.arg(0, "input"), call.arg(1, "weight")
    fits = weight.ndim == 2 and x.ndim >= 1 and x.shape[-1] == weight.shape[1]
    return empty(x, (*x.shape[:-1], weight.shape[0])) if fits else call.run()


@output_of(*ELEMENTWISE)
def elementwise(call: Call) -> Any:
    """Like the input."""
    if not call.varies:
        return call.run()
    x = call.arg(0, "input")
    in_place = is_in_place(call.name) or call.kwargs.get("inplace", False)
    return x if in_place else like(x)


@output_of("batch_norm", "instance_norm", "layer_norm", "group_norm", "rms_norm")
def normalised(call: Call) -> Any:
    """Like the input."""
    return like(call.arg(0, "input")) if call.varies else call.run()


@output_of("grid_sample", "grid_sampler")
def sampled(call: Call) -> Any:
    """Features (N, C, ...) at the places of a grid (N, *places, 2 or 3) are (N, C, *places)."""
    x, grid = call.arg(0, "input"), call.arg(1, "grid")
    fits = (
        x.is_meta
        and x.dtype == grid.dtype
        and x.ndim == grid.ndim == grid.shape[-1] + 2
        and x.shape[0] == grid.shape[0]
        and min(x.shape[2:]) > 0
    )
    return empty(x, (*x.shape[:2], *grid.shape[1:-1])) if fits else call.run()


@output_of("interpolate", "upsample")
def resized(call: Call) -> Any:
    """Features (N, C, *sizes) at other places are (N, C, *wanted sizes)."""
    x, wanted = call.arg(0, "input"), call.arg(1, "size")
    n = x.ndim - 2
    known = call.arg(3, "mode", "nearest") in _MODES.get(n, ()) and call.arg(2, "scale_factor") is None
    if wanted is None or not known or not (x.is_meta and x.is_contiguous()):
        return call.run()
    sizes = as_tuple(wanted, n)
    fits = len(sizes) == n and all(type(size) is int and size > 0 for size in (*sizes, *x.shape))
    return empty(x, (*x.shape[:2], *sizes)) if fits else call.run()


_MODES: Final = {
    1: ("nearest", "nearest-exact", "linear"),
    2: ("nearest", "nearest-exact", "bilinear", "bicubic"),
    3: ("nearest", "nearest-exact", "trilinear"),
}
"""Axes of places -> the interpolations that there are."""


@output_of(*ADDING, *MULTIPLYING)
def combined(call: Call) -> Any:
    """A sum or product, known from the operands' shapes, but for constants and scalars."""
    a, b = call.arg(0, "input"), call.arg(1, "other")
    if (
        not (isinstance(a, Tensor) and isinstance(b, Tensor) and a.is_meta)
        or a.dtype != b.dtype
        or "out" in call.kwargs
    ):
        return call.run()
    if is_in_place(call.name):
        return a
    return empty(a, a.shape if a.shape == b.shape else torch.broadcast_shapes(a.shape, b.shape))


@output_of(*JOINING)
def concatenated(call: Call) -> Any:
    """Of a concatenation's shape where its parts agree; else what torch says."""
    parts, dim = list(call.arg(0, "tensors")), call.arg(1, "dim", 0)
    first = parts[0]
    alike = all(
        part.is_meta
        and part.dtype == first.dtype
        and part.ndim == first.ndim
        and _but(part, dim) == _but(first, dim)
        for part in parts
    )
    if not alike or "out" in call.kwargs:
        return call.run()
    shape = list(first.shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    return empty(first, shape)


def _but(tensor: Tensor, dim: int) -> Sequence[int]:
    """The sizes of `tensor` without that of `dim`."""
    sizes = list(tensor.shape)
    if -len(sizes) <= dim < len(sizes):
        del sizes[dim]
    return sizes


@output_of("scaled_dot_product_attention")
def attended(call: Call) -> Any:
    """(*, queries, features of a value)."""
    query, value = call.arg(0, "query"), call.arg(2, "value")
    return empty(query, (*query.shape[:-1], value.shape[-1]))


@output_of("multi_head_attention_forward")
def attended_and_weights(call: Call) -> Any:
    """Of `F.multi_head_attention_forward`: (L, N, E), and the weights where wanted."""
    query, key = call.arg(0, "query"), call.arg(1, "key")
    if call.arg(7, "bias_k") is not None or call.arg(9, "add_zero_attn") or query.ndim != 3:
        return call.run()  # longer keys, or no batch: rare enough to ask the real function
    if query.shape[-1] != call.arg(3, "embed_dim_to_check"):
        return call.run()  # raises its own error
    weights = None
    if call.arg(15, "need_weights", True):
        heads = () if call.arg(24, "average_attn_weights", True) else (call.arg(4, "num_heads"),)
        weights = empty(query, (query.shape[1], *heads, query.shape[0], key.shape[0]))
    return like(query), weights


@output_of("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d")
def pooled(call: Call) -> Any:
    """(N, C, *wanted sizes)."""
    x = call.arg(0, "input")
    n = int(call.name[-2])
    wanted = as_tuple(call.arg(1, "output_size"), n)
    sizes = [have if want is None else want for have, want in zip(x.shape[-n:], wanted, strict=True)]
    return empty(x, (*x.shape[:-n], *sizes))


@output_of("grouped_mm", "_grouped_mm")
def of_experts(call: Call) -> Any:
    """Rows (T, in) or (E, T, in) times the weights of E experts (E, in, out).

    torch up to 2.14 refuses float32 for them on the meta device.
    """
    x, weight = call.arg(0, "input"), call.arg(1, "mat2")
    fits = x.is_meta and weight.dim() == 3 and x.dim() in (2, 3) and x.shape[-1] == weight.shape[-2]
    return empty(x, (*x.shape[:-1], weight.shape[-1])) if fits else call.run()


@output_of("registered_layer")
def of_registered_layer(call: Call) -> Any:
    """What the rule says that the layer gives: see `ghn_init.register`."""
    layer, args, kwargs = call.args[:3]
    return layer.rule.output(layer.module, *args, **kwargs)
