"""Networks made ready to run with predicted parameters: batch statistics, and layers that are fast on CPUs.

The networks are ours (made by `deepnets` for one use), so their modules may be changed in place. All
replacements compute what the original layer computes.

torch's backward of a depthwise convolution on the CPU is 10 to 60 times slower than its forward, but for
undilated 3 x 3 kernels. The others are brought to that case: dilation by space-to-batch, a larger kernel's
weight gradient in blocks of 3 x 3. The backward of a batch norm is 3 to 8 times slower where the gradient is
not channels last and whole, as it is where outputs are concatenated or sliced. A 1 x 1 convolution of a small
feature map takes up to twice as long as the same product of matrices.
"""

from __future__ import annotations

import types
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghn_init.deepnets._ops import FactorizedReduction


def prepare(network: nn.Module, *, seed: int = 0, fast: bool = True) -> nn.Module:
    """Make `network` ready: batch norm on batch statistics, dropout from a seed, fast CPU layers.

    Args:
        network: Changed in place; may be on the meta device.
        seed: The seed of dropout, which has a generator of its own, so that runs repeat whatever threads do.
        fast: Use the layers below for depthwise and 1 x 1 convolutions, average pooling and factorised
            reductions.
    """
    for index, module in enumerate(network.modules()):
        if isinstance(module, nn.modules.batchnorm._BatchNorm):  # noqa: SLF001 (the class has no public name)
            module.track_running_stats = False
            for name in ("running_mean", "running_var", "num_batches_tracked"):
                module.register_buffer(name, None)
            if fast:
                module.register_forward_hook(_with_whole_gradient)
        elif isinstance(module, nn.Dropout):
            generator = torch.Generator().manual_seed(seed * 1009 + index)
            module.forward = partial(_seeded_dropout, module, generator)  # pyright: ignore
        elif fast and isinstance(module, nn.Conv2d) and _is_slow_depthwise(module):
            module.forward = types.MethodType(_depthwise_forward, module)
        elif fast and isinstance(module, nn.Conv2d) and _is_pointwise(module):
            module.forward = types.MethodType(_pointwise_forward, module)
        elif fast and isinstance(module, nn.AvgPool2d) and _is_plain_average(module):
            module.forward = types.MethodType(_average_forward, module)
        elif fast and isinstance(module, FactorizedReduction):
            module.forward = types.MethodType(_reduction_forward, module)
    return network


def _with_whole_gradient(_module: nn.Module, _args: Any, out: Tensor) -> None:
    """A forward hook: the gradient that comes to `out` is brought to the layout of `out`."""
    if out.requires_grad and out.ndim == 4:
        out.register_hook(lambda grad: grad.contiguous(memory_format=torch.channels_last))


def _seeded_dropout(module: nn.Dropout, generator: torch.Generator, x: Tensor) -> Tensor:
    if not module.training:
        return x
    kept = torch.rand(x.shape, generator=generator) >= module.p
    return x * (kept.to(x.device, x.dtype) / (1 - module.p))


def _is_slow_depthwise(module: nn.Conv2d) -> bool:
    """Depthwise, odd square kernel, stride 1, same padding, and not the case that torch does fast."""
    k, d = module.kernel_size[0], module.dilation[0]
    return (
        module.groups == module.in_channels == module.out_channels > 1
        and module.bias is None
        and module.kernel_size == (k, k)
        and k % 4 in (1, 3)
        and module.stride == (1, 1)
        and module.dilation == (d, d)
        and module.padding == (d * (k // 2), d * (k // 2))
        and (k > 3 or d > 1)
    )


def _depthwise_forward(self: Any, x: Tensor) -> Tensor:
    dilation = self.dilation[0]
    if not x.requires_grad and not self.weight.requires_grad:
        return F.conv2d(x, self.weight, None, 1, self.padding, dilation, self.groups)
    if dilation == 1:
        return _depthwise(x, self.weight)
    height, width = x.shape[2:]
    rows, columns = -height % dilation, -width % dilation
    if rows or columns:
        x = F.pad(x, (0, columns, 0, rows))
    phases = _depthwise(_space_to_batch(x, dilation), self.weight)
    return _batch_to_space(phases, dilation)[:, :, :height, :width]


def _space_to_batch(x: Tensor, d: int) -> Tensor:
    """(N, C, H, W) to (d·d·N, C, H/d, W/d): the d x d phases of an image as images of their own."""
    n, c, h, w = x.shape
    x = x.permute(0, 2, 3, 1).reshape(n, h // d, d, w // d, d, c)
    return x.permute(2, 4, 0, 1, 3, 5).reshape(d * d * n, h // d, w // d, c).permute(0, 3, 1, 2)


def _batch_to_space(x: Tensor, d: int) -> Tensor:
    """The inverse of `_space_to_batch`."""
    n, c, h, w = x.shape
    x = x.permute(0, 2, 3, 1).reshape(d, d, n // (d * d), h, w, c)
    return x.permute(2, 3, 0, 4, 1, 5).reshape(n // (d * d), h * d, w * d, c).permute(0, 3, 1, 2)


def _depthwise(x: Tensor, weight: Tensor) -> Tensor:
    if weight.shape[2] == 3:
        return F.conv2d(x, weight, None, 1, 1, 1, weight.shape[0])
    return _Depthwise.apply(x, weight)  # pyright: ignore[reportReturnType]


class _Depthwise(torch.autograd.Function):
    """Depthwise convolution, odd k x k, stride 1, same padding; both gradients by fast kernels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, None, 1, weight.shape[2] // 2, 1, weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grads[0].contiguous(memory_format=torch.channels_last)
        channels, _, k, _ = weight.shape
        # The gradient of the input is the correlation with the flipped kernel.
        grad_x = F.conv2d(grad, weight.flip(2, 3), None, 1, k // 2, 1, channels)
        return grad_x, _weight_gradient(x, grad, k)


def _weight_gradient(x: Tensor, grad: Tensor, k: int) -> Tensor:
    """Gradient (C, 1, k, k) of a depthwise kernel in blocks of 3 x 3 that overlap by one."""
    channels, (height, width) = x.shape[1], x.shape[2:]
    padded = F.pad(x, (k // 2,) * 4)
    block = x.new_empty((channels, 1, 3, 3))
    result = x.new_empty((channels, 1, k, k))
    for i in range(0, k - 1, 2):
        for j in range(0, k - 1, 2):
            shifted = padded[:, :, i : i + height + 2, j : j + width + 2]
            shifted = shifted.contiguous(memory_format=torch.channels_last)
            _, part, _ = torch.ops.aten.convolution_backward(
                grad, shifted, block, None, [1, 1], [0, 0], [1, 1], False, [0, 0], channels,
                [False, True, False],
            )  # fmt: skip
            result[:, :, i : i + 3, j : j + 3] = part
    return result


def _is_pointwise(module: nn.Conv2d) -> bool:
    """1 x 1, not strided, no groups, no bias."""
    sizes = (module.kernel_size, module.stride, module.padding, module.groups)
    return sizes == ((1, 1), (1, 1), (0, 0), 1) and module.bias is None


def _pointwise_forward(self: Any, x: Tensor) -> Tensor:
    return _pointwise(x, self.weight)


def _pointwise(x: Tensor, weight: Tensor) -> Tensor:
    """A 1 x 1 convolution (O, C, 1, 1) of (N, C, H, W), channels last, as a product of matrices."""
    return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1)).permute(0, 3, 1, 2)


def _is_plain_average(module: nn.AvgPool2d) -> bool:
    sizes = (module.kernel_size, module.stride, module.padding)
    return (
        all(size in (expected, (expected, expected)) for size, expected in zip(sizes, (3, 1, 1), strict=True))
        and not module.count_include_pad
        and not module.ceil_mode
        and module.divisor_override is None
    )


def _average_forward(self: Any, x: Tensor) -> Tensor:  # noqa: ARG001 (a method)
    """3 x 3 averages as a depthwise convolution, divided by the number of pixels under the window."""
    ones = x.new_ones((x.shape[1], 1, 3, 3))
    counts = F.avg_pool2d(x.new_ones((1, 1, *x.shape[2:]), dtype=torch.float32), 3, 1, 1, divisor_override=1)
    return F.conv2d(x, ones, None, 1, 1, 1, x.shape[1]) * counts.reciprocal().to(x.dtype)


def _reduction_forward(self: Any, x: Tensor) -> Tensor:
    """A `FactorizedReduction` whose convolutions see only the pixels that they read."""
    even, odd = _Diagonal.apply(x)  # pyright: ignore[reportGeneralTypeIssues]
    return self.norm(torch.cat([_pointwise(even, self.even.weight), _pointwise(odd, self.odd.weight)], 1))


class _Diagonal(torch.autograd.Function):
    """Pixels (2i, 2j) and (2i + 1, 2j + 1) of (N, C, H, W), H and W even, each (N, C, H/2, W/2).

    In one function because the backward of a slice fills a tensor that is not channels last.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, ...]:
        ctx.channels_last = (x.shape[0], *x.shape[2:], x.shape[1])
        parts = (x[:, :, ::2, ::2], x[:, :, 1::2, 1::2])
        return tuple(part.contiguous(memory_format=torch.channels_last) for part in parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        even, odd = grads
        grad = even.new_zeros(ctx.channels_last).permute(0, 3, 1, 2)
        grad[:, :, ::2, ::2] = even
        grad[:, :, 1::2, 1::2] = odd
        return grad
