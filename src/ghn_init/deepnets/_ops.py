"""The operations of DeepNets-1M as modules.

Most of them begin with a ReLU (DARTS). It is not here but in the cell, which rectifies a state once
for all the operations that read it: `RECTIFIED` names them.
"""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghn_init.deepnets._space import HEADS, OPERATIONS

RECTIFIED: Final = frozenset(name for name in OPERATIONS if "conv" in name)
"""Operations whose argument has passed a ReLU already (`skip_connect` too, where it has a stride)."""


class _Quick:
    """A layer that spends no time initialising meta tensors."""

    weight: Tensor

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()  # pyright: ignore[reportAttributeAccessIssue]


class _Conv2d(_Quick, nn.Conv2d):
    """A convolution without bias."""

    def __init__(self, c_in: int, c_out: int, kernel: int | tuple[int, int], **options: object) -> None:
        super().__init__(c_in, c_out, kernel, bias=False, **options)  # type: ignore[arg-type]


class _Linear(_Quick, nn.Linear):
    """A linear layer."""


class _BatchNorm2d(_Quick, nn.BatchNorm2d):
    """Batch norm."""


class _LayerNorm(_Quick, nn.LayerNorm):
    """Layer norm."""


class Layers:
    """Makes layers with one choice of norm.

    Args:
        norm: "bnorm" or None.
        running_stats: Whether batch norms keep running statistics.
    """

    def __init__(self, norm: str | None, *, running_stats: bool = True) -> None:
        self.norm = norm
        self.running_stats = running_stats

    def normed(self, width: int, *layers: nn.Module) -> nn.Sequential:
        """`layers`, then the norm of `width` channels, if there is one."""
        if self.norm is None:
            return nn.Sequential(*layers)
        return nn.Sequential(*layers, _BatchNorm2d(width, track_running_stats=self.running_stats))

    def conv(self, c_in: int, c_out: int, kernel: int, stride: int = 1) -> nn.Sequential:
        """Convolution, norm."""
        return self.normed(c_out, _Conv2d(c_in, c_out, kernel, stride=stride, padding=kernel // 2))

    def depthwise(self, width: int, kernel: int, stride: int, dilation: int = 1) -> nn.Sequential:
        """Depthwise convolution, 1x1 convolution, norm."""
        padding = dilation * (kernel - 1) // 2
        options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": width}
        return self.normed(width, _Conv2d(width, width, kernel, **options), _Conv2d(width, width, 1))

    def operation(self, name: str, width: int, stride: int) -> nn.Module | None:
        """The operation `name`, width -> width channels; None for `none`."""
        if name == "none":
            return None
        convolution, _, size = name.rpartition("_")
        if convolution in ("conv", "sep_conv", "dil_conv"):
            return self._convolution(convolution, int(size[0]), width, stride)
        if name == "conv_7x1_1x7":
            row = _Conv2d(width, width, (1, 7), stride=(1, stride), padding=(0, 3))
            return self.normed(width, row, _Conv2d(width, width, (7, 1), stride=(stride, 1), padding=(3, 0)))
        if name == "skip_connect":
            return FactorizedReduction(self, width, width) if stride == 2 else nn.Identity()
        if name == "max_pool_3x3":
            return nn.MaxPool2d(3, stride, padding=1)
        if name == "avg_pool_3x3":
            return nn.AvgPool2d(3, stride, padding=1, count_include_pad=False)
        return Attention(width, stride) if name == "msa" else ChannelGate(width, stride)

    def _convolution(self, name: str, kernel: int, width: int, stride: int) -> nn.Module:
        if name == "conv":
            return self.conv(width, width, kernel, stride)
        if name == "dil_conv":
            return self.depthwise(width, kernel, stride, dilation=2)
        first, second = self.depthwise(width, kernel, stride), self.depthwise(width, kernel, 1)
        return nn.Sequential(first, nn.ReLU(inplace=True), second)


class FactorizedReduction(nn.Module):
    """Halves a rectified feature map: two 1x1 convolutions of stride 2, one pixel apart."""

    def __init__(self, layers: Layers, c_in: int, c_out: int) -> None:
        super().__init__()
        self.even = _Conv2d(c_in, c_out // 2, 1, stride=2)
        self.odd = _Conv2d(c_in, c_out - c_out // 2, 1, stride=2)
        self.norm = layers.normed(c_out)

    def forward(self, x: Tensor) -> Tensor:
        """(N, c_in, H, W), H and W even, -> (N, c_out, H/2, W/2)."""
        return self.norm(torch.cat([self.even(x), self.odd(x[:, :, 1:, 1:])], 1))


class ChannelGate(nn.Module):
    """`cse`, squeeze and excitation: every channel is scaled by a function of all channels' means."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.squeeze = _Linear(width, width // 2)
        self.excite = _Linear(width // 2, width)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H/stride, W/stride)."""
        # A sum, not mean() or pooling: those are `glob_avg` nodes to the tracer, and here the mean is
        # part of the `cse` node (arXiv 2110.13100, appendix A).
        mean = x.sum((2, 3)) / (x.shape[2] * x.shape[3])
        gate = F.hardswish(self.excite(F.relu(self.squeeze(mean))))
        return subsampled(x, self.stride) * gate[:, :, None, None]


class Attention(nn.Module):
    """`msa`, a transformer block on the pixels of a feature map."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.norm1 = _LayerNorm(width)
        self.qkv = _Linear(width, 3 * width, bias=False)
        self.out = _Linear(width, width)
        self.norm2 = _LayerNorm(width)
        self.fc1 = _Linear(width, width)
        self.fc2 = _Linear(width, width)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H/stride, W/stride)."""
        size = x.shape[2:]
        tokens = x.flatten(2).transpose(1, 2)  # (N, H·W, C)
        # (N, H·W, 3·C) -> 3 x (N, heads, H·W, C/heads)
        q, k, v = self.qkv(self.norm1(tokens)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = _attention(q, k, v)
        tokens = tokens + self.out(attended.transpose(1, 2).flatten(2))
        tokens = tokens + self.fc2(F.gelu(self.fc1(self.norm2(tokens))))
        return subsampled(tokens.transpose(1, 2).unflatten(2, size), self.stride)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention; on CPUs in float32, because bfloat16's backward is six times slower."""
    if q.dtype == torch.float32 or q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v)
    return F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(q.dtype)


def subsampled(x: Tensor, stride: int) -> Tensor:
    """Every `stride`-th row and column."""
    return x if stride == 1 else x[:, :, ::stride, ::stride]
