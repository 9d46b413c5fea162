"""A fourth panel for `starting_point.py`: classifiers that are made in other ways than DeepNets-1M's.

They compute the same, or nearly so, as networks that a hypernetwork has learned from, but it would not know
them as they are written: depthwise convolutions with a norm behind them, groups, a classifier of all places
or one whose scores are pooled, images of more channels, slopes that are learned.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch.nn.functional as F
from starting_panel import Member, Residual, conv
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_SIZES: Final = ((32, 32, 1), (32, 64, 2), (64, 128, 2))
"""Inputs, outputs and stride of three blocks."""


def _depthwise(channels: int, stride: int) -> tuple[nn.Module, ...]:
    layer = nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False)
    return layer, nn.BatchNorm2d(channels), nn.ReLU()


def _pooled(width: int) -> tuple[nn.Module, ...]:
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)


def mobile(_: int) -> nn.Module:
    """Depthwise convolutions and such of 1 x 1, each with a norm and a ReLU (arXiv 1704.04861)."""
    sizes = ((32, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 128, 1))
    layers = [
        nn.Sequential(*_depthwise(inputs, stride), conv(inputs, outputs, 1))
        for inputs, outputs, stride in sizes
    ]
    return nn.Sequential(conv(3, 32), *layers, *_pooled(128))


class Gate(nn.Module):
    """Squeeze and excitation (arXiv 1709.01507)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, channels // 4, 1)
        self.excite = nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Features to features."""
        mean = F.adaptive_avg_pool2d(x, 1)
        return x * self.excite(F.relu(self.squeeze(mean))).sigmoid()


class Inverted(nn.Module):
    """An inverted residual block with a gate (arXiv 1905.02244)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        wide = 4 * inputs
        last = nn.Conv2d(wide, outputs, 1, bias=False)
        self.body = nn.Sequential(
            conv(inputs, wide, 1), *_depthwise(wide, stride), Gate(wide), last, nn.BatchNorm2d(outputs)
        )
        self.adds = inputs == outputs and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        """Features to features."""
        return x + self.body(x) if self.adds else self.body(x)


class Aggregated(nn.Module):
    """A residual block with a convolution in eight groups (arXiv 1611.05431)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        groups = nn.Conv2d(outputs, outputs, 3, stride, 1, groups=8, bias=False)
        last = nn.Conv2d(outputs, outputs, 1, bias=False)
        self.body = nn.Sequential(
            conv(inputs, outputs, 1),
            groups,
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            last,
            nn.BatchNorm2d(outputs),
        )
        short = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        self.shortcut = nn.Sequential(short, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Features to features."""
        return F.relu(self.body(x) + self.shortcut(x))


class Sloped(nn.Module):
    """A residual block whose activations have slopes that are learned (arXiv 1502.01852)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        first, second = nn.Conv2d(inputs, outputs, 3, stride, 1), nn.Conv2d(outputs, outputs, 3, 1, 1)
        norms = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.body = nn.Sequential(first, norms[0], nn.PReLU(outputs), second, norms[1])
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride)
        self.activation = nn.PReLU(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Features to features."""
        return self.activation(self.body(x) + self.shortcut(x))


def residual(block: Callable[[int, int, int], nn.Module]) -> Callable[[int], nn.Module]:
    """Three blocks, 32 to 128 channels."""
    return lambda _: nn.Sequential(conv(3, 32), *(block(*size) for size in _SIZES), *_pooled(128))


def unshuffled(_: int) -> nn.Module:
    """Three residual blocks for images of 12 channels, four pixels of three."""
    blocks = (Residual(*size) for size in ((32, 32, 1), (32, 64, 1), (64, 128, 2)))
    return nn.Sequential(nn.PixelUnshuffle(2), conv(12, 32), *blocks, *_pooled(128))


def scores_pooled(_: int) -> nn.Module:
    """Three residual blocks and a convolution for classifier, whose scores are pooled (arXiv 1312.4400)."""
    ends = (nn.Conv2d(128, 10, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(conv(3, 32), *(Residual(*size) for size in _SIZES), *ends)


def flat(*, hidden: bool) -> Callable[[int], nn.Module]:
    """Three convolutions with biases and norms, and a linear layer over all places of their maps."""

    def ends(features: int) -> Iterable[nn.Module]:
        if hidden:
            return nn.Linear(features, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10)
        return (nn.Linear(features, 10),)

    def build(side: int) -> nn.Module:
        layers: list[nn.Module] = []
        for inputs, outputs in ((3, 32), (32, 64), (64, 64)):
            layer = nn.Conv2d(inputs, outputs, 3, 1, 1)
            layers += [layer, nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]
        return nn.Sequential(*layers, nn.Flatten(), *ends(64 * (side // 8) ** 2))

    return build


FOURTH: Final = (
    Member("mobile", "classify", mobile),
    Member("inverted", "classify", residual(Inverted)),
    Member("aggregated", "classify", residual(Aggregated)),
    Member("sloped", "classify", residual(Sloped)),
    Member("unshuffled", "classify", unshuffled),
    Member("scores-pooled", "classify", scores_pooled, known=True),
    Member("flat", "classify", flat(hidden=False)),
    Member("flat-hidden", "classify", flat(hidden=True)),
)
"""The fourth panel."""
