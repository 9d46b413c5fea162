"""A third panel for `starting_point.py`: networks that are no classifiers, or made in other ways than those.

What a last layer gives is a value, an action's worth or an embedding as often as scores of classes, and the
graph hardly tells. They are like those of a sweep over some ninety networks that predictions then harmed, or
that gained less than networks that compute the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch.nn.functional as F
from starting_panel import ACTIONS, Member, Residual, conv
from starting_second import Preactivated
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable


def residual(outputs: int) -> Callable[[int], nn.Module]:
    """Two residual blocks, 16 to 64 channels, and so many outputs."""

    def build(_: int) -> nn.Module:
        blocks = (Residual(16, 32, 2), Residual(32, 64, 2))
        return nn.Sequential(
            conv(3, 16), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, outputs)
        )

    return build


def siamese(_: int) -> nn.Module:
    """Three convolutions and an embedding of 64 numbers."""
    layers = (conv(3, 32), nn.MaxPool2d(2), conv(32, 64), nn.MaxPool2d(2), conv(64, 96))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(384, 64))


def actions(side: int) -> nn.Module:
    """Three convolutions as in a deep Q-network, with batch norms, and the worth of six actions."""
    layers: list[nn.Module] = []
    for inputs, outputs, kernel, stride in ((3, 16, 5, 2), (16, 32, 5, 2), (32, 32, 3, 1)):
        layers += [nn.Conv2d(inputs, outputs, kernel, stride), nn.BatchNorm2d(outputs), nn.ReLU()]
        side = (side - kernel) // stride + 1
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * side**2, ACTIONS))


def steering(side: int) -> nn.Module:
    """Convolutions and linear layers with ELUs, without norm, that end in one value (arXiv 1604.07316)."""
    layers: list[nn.Module] = []
    for inputs, outputs, kernel, stride in ((3, 16, 5, 2), (16, 24, 5, 2), (24, 32, 3, 1)):
        layers += [nn.Conv2d(inputs, outputs, kernel, stride), nn.ELU()]
        side = (side - kernel) // stride + 1
    ends = (nn.Linear(32 * side**2, 50), nn.ELU(), nn.Linear(50, 10), nn.ELU(), nn.Linear(10, 1))
    return nn.Sequential(*layers, nn.Flatten(), *ends)


class Unnormalised(nn.Module):
    """Pre-activated residual blocks, 32 to 128 channels, and no norm between them and the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, 1, 1, bias=False)
        sizes = ((32, 32, 1), (32, 64, 2), (64, 128, 2), (128, 128, 1))
        self.blocks = nn.Sequential(*(Preactivated(*size) for size in sizes))
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images to scores."""
        return self.head(F.adaptive_avg_pool2d(self.blocks(self.stem(x)), 1).flatten(1))


def late_norms(side: int) -> nn.Module:
    """Batch norms behind ReLUs, the first over the images, the last over a hidden layer."""
    layers: list[nn.Module] = [nn.BatchNorm2d(3)]
    for inputs, outputs in ((3, 32), (32, 64)):
        layers += [nn.Conv2d(inputs, outputs, 3, 1, 1), nn.ReLU(), nn.BatchNorm2d(outputs), nn.MaxPool2d(2)]
    hidden = nn.Linear(64 * (side // 4) ** 2, 64)
    return nn.Sequential(*layers, nn.Flatten(), hidden, nn.ReLU(), nn.BatchNorm1d(64), nn.Linear(64, 10))


def flat_norm(side: int) -> nn.Module:
    """Three convolutions and a hidden layer over all places of their maps, with batch norms."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 32), (32, 64), (64, 64)):
        layers += [conv(inputs, outputs), nn.MaxPool2d(2)]
    hidden = nn.Linear(64 * (side // 8) ** 2, 128)
    return nn.Sequential(*layers, nn.Flatten(), hidden, nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 10))


def biased(channels: int) -> Callable[[int], nn.Module]:
    """Four convolutions with batch norms, and with biases before them, as torch's have by default."""

    def build(_: int) -> nn.Module:
        layers: list[nn.Module] = []
        for inputs, outputs in ((channels, 32), (32, 64), (64, 128), (128, 128)):
            layer = nn.Conv2d(inputs, outputs, 3, 1, 1)
            layers += [layer, nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))

    return build


def grey_plain(side: int) -> nn.Module:
    """Two convolutions and two linear layers for grey images, without norm, as in many a first example."""
    features = 64 * ((side - 4) // 2) ** 2
    layers = (
        nn.Conv2d(1, 32, 3),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout(0.25),
    )
    ends = (nn.Linear(features, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10))
    return nn.Sequential(*layers, nn.Flatten(), *ends)


class Grouped(nn.Module):
    """A residual block with group norms, eight groups."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        short = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        norms = (nn.GroupNorm(8, outputs) for _ in range(3))
        self.body = nn.Sequential(first, next(norms), nn.ReLU(), second, next(norms))
        self.shortcut = nn.Sequential(short, next(norms))

    def forward(self, x: Tensor) -> Tensor:
        """Features to features."""
        return F.relu(self.body(x) + self.shortcut(x))


def group_norms(_: int) -> nn.Module:
    """Three residual blocks with group norms, 32 to 128 channels (arXiv 1803.08494)."""
    stem = (nn.Conv2d(3, 32, 3, 1, 1, bias=False), nn.GroupNorm(8, 32), nn.ReLU())
    blocks = (Grouped(32, 32, 1), Grouped(32, 64, 2), Grouped(64, 128, 2))
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


THIRD: Final = (
    Member("number", "number", residual(1)),
    Member("rotation", "rotation", residual(2)),
    Member("brightness", "brightness", residual(1)),
    Member("steering", "number", steering),
    Member("actions", "actions", actions),
    Member("siamese", "pairs", siamese),
    Member("triplets", "triplets", residual(32)),
    Member("unnormalised", "classify", lambda _: Unnormalised(), known=True),
    Member("late-norms", "classify", late_norms),
    Member("flat-norm", "classify", flat_norm),
    Member("biased", "classify", biased(3), known=True),
    Member("grey", "grey", biased(1), known=True),
    Member("grey-plain", "grey", grey_plain),
    Member("group-norms", "classify", group_norms),
)
"""The third panel."""
