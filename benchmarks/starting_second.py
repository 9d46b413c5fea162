"""A second panel for `starting_point.py`: kinds of networks that the first one has not.

Rules that were made by looking at a panel say little about what is not in it. These were chosen before any
of them was measured, as what else users train, but for the denoiser, which followed from what the
super-resolution network had shown. What went wrong in them is in docs/starting-point.md.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.nn.functional as F
import torchvision
from starting_panel import LEVELS, SCAN, Member
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable


class Around(nn.Module):
    """A branch beside its input, and what is made of their sum."""

    def __init__(self, inner: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.inner, self.shortcut = inner, nn.Identity() if shortcut is None else shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Features to features."""
        return self.inner(x) + self.shortcut(x)


def _pooled(*layers: nn.Module, width: int) -> nn.Sequential:
    """A classifier of the mean over all places."""
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


# Without norm


def mlp(size: int) -> nn.Module:
    """Three linear layers over all pixels."""
    widths = (3 * size**2, 512, 256)
    hidden = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(256, 10))


def discriminator(size: int) -> nn.Module:
    """A DCGAN's without norm: strided convolutions, leaky ReLUs, all places read (arXiv 1511.06434)."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 48), (48, 96), (96, 192)):
        layers += [nn.Conv2d(inputs, outputs, 4, 2, 1), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(192 * (size // 8) ** 2, 10))


def residual(_: int) -> nn.Module:
    """Three residual blocks without norm, 32 to 128 channels, shortcuts with biases."""
    layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, 1, 1), nn.ReLU()]
    for inputs, outputs, stride in ((32, 32, 1), (32, 64, 2), (64, 128, 2)):
        inner = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1), nn.ReLU(), nn.Conv2d(outputs, outputs, 3, 1, 1)
        )
        same = inputs == outputs and stride == 1
        layers += [Around(inner, None if same else nn.Conv2d(inputs, outputs, 1, stride)), nn.ReLU()]
    return _pooled(*layers, width=128)


def super_resolution(_: int) -> nn.Module:
    """An EDSR of four blocks and 32 channels, without enlarging (arXiv 1707.02921)."""
    first = nn.Conv2d(3, 32, 3, 1, 1)
    blocks = [
        Around(nn.Sequential(nn.Conv2d(32, 32, 3, 1, 1), nn.ReLU(), nn.Conv2d(32, 32, 3, 1, 1)))
        for _ in range(4)
    ]
    body = Around(nn.Sequential(*blocks, nn.Conv2d(32, 32, 3, 1, 1)))
    return nn.Sequential(first, body, nn.Conv2d(32, 3, 3, 1, 1))


def denoiser(_: int) -> nn.Module:
    """Five convolutions in a row, as in an SRCNN (arXiv 1501.00092)."""
    layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, 1, 1), nn.ReLU()]
    for _ in range(3):
        layers += [nn.Conv2d(32, 32, 3, 1, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(32, 3, 3, 1, 1))


class VAE(nn.Module):
    """A convolutional autoencoder with a code of 64 numbers and how sure it is of them (arXiv 1312.6114)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        side = size // 4
        down = [nn.Conv2d(3, 32, 4, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 4, 2, 1), nn.ReLU(), nn.Flatten()]
        self.encoder = nn.Sequential(*down)
        self.mean, self.deviation = nn.Linear(64 * side**2, 64), nn.Linear(64 * side**2, 64)
        up = [nn.Linear(64, 64 * side**2), nn.ReLU(), nn.Unflatten(1, (64, side, side))]
        up += [nn.ConvTranspose2d(64, 32, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(32, 3, 4, 2, 1)]
        self.decoder = nn.Sequential(*up)

    def forward(self, x: Tensor) -> Tensor:
        """From images to images; the sampled noise is left out, so that both starts see the same."""
        code = self.encoder(x)
        return self.decoder(self.mean(code) + 0.1 * torch.tanh(self.deviation(code)))


# With batch norm


def preactivated(_: int) -> nn.Module:
    """Three pre-activated residual blocks, 32 to 128 channels (arXiv 1603.05027)."""
    layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, 1, 1, bias=False)]
    for inputs, outputs, stride in ((32, 32, 1), (32, 64, 2), (64, 128, 2)):
        layers.append(Preactivated(inputs, outputs, stride))
    return _pooled(*layers, nn.BatchNorm2d(128), nn.ReLU(), width=128)


class Preactivated(nn.Module):
    """Norm and ReLU before each of two convolutions."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.before, self.first = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.between, self.second = nn.BatchNorm2d(outputs), nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        same = inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Features to features."""
        y = self.first(F.relu(self.before(x)))
        return self.shortcut(x) + self.second(F.relu(self.between(y)))


def convmixer(_: int) -> nn.Module:
    """Four blocks of a ConvMixer, 64 channels (arXiv 2201.09792)."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 2, 2), nn.GELU(), nn.BatchNorm2d(64)]
    for _ in range(4):
        spatial = nn.Sequential(nn.Conv2d(64, 64, 5, padding=2, groups=64), nn.GELU(), nn.BatchNorm2d(64))
        layers += [Around(spatial), nn.Conv2d(64, 64, 1), nn.GELU(), nn.BatchNorm2d(64)]
    return _pooled(*layers, width=64)


class Video(nn.Module):
    """Convolutions over time and space, of a clip that is an image moved by up to three pixels."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs, stride in ((3, 16, (1, 2, 2)), (16, 32, 1), (32, 32, 2), (32, 64, 2)):
            layers += [
                nn.Conv3d(inputs, outputs, 3, stride, 1, bias=False),
                nn.BatchNorm3d(outputs),
                nn.ReLU(),
            ]
        self.features, self.head = nn.Sequential(*layers), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """From images to class scores."""
        clip = torch.stack([x, *(x.roll(shift, -1) for shift in (1, 2, 3))], 2)
        return self.head(self.features(clip).mean((2, 3, 4)))


class Audio(nn.Module):
    """Convolutions along one axis, over an image's pixels one after another (as arXiv 1610.00087)."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs, kernel in ((3, 32, 9), (32, 64, 3), (64, 128, 3), (128, 128, 3)):
            conv = nn.Conv1d(inputs, outputs, kernel, padding=kernel // 2)
            layers += [conv, nn.BatchNorm1d(outputs), nn.ReLU(), nn.MaxPool1d(4)]
        self.features, self.head = nn.Sequential(*layers[:-1]), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """From images to class scores."""
        return self.head(self.features(x.flatten(2)).mean(2))


class Pyramid(nn.Module):
    """A feature pyramid on the first three stages of a ResNet-18, for segmentation (arXiv 1612.03144)."""

    def __init__(self) -> None:
        super().__init__()
        trunk = torchvision.models.resnet18()
        self.stem = nn.Sequential(nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        self.stages = nn.ModuleList([trunk.layer1, trunk.layer2, trunk.layer3])
        self.lateral = nn.ModuleList([nn.Conv2d(width, 48, 1) for width in (64, 128, 256)])
        self.out, self.head = nn.Conv2d(48, 48, 3, 1, 1), nn.Conv2d(48, LEVELS // 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        """From images to class scores of every pixel."""
        x = self.stem(x)
        maps = [x := stage(x) for stage in self.stages]
        y = self.lateral[2](maps[2])
        for level in (1, 0):
            y = F.interpolate(y, scale_factor=2) + self.lateral[level](maps[level])
        return self.head(F.relu(self.out(y)))


# With other norms


def generator(_: int) -> nn.Module:
    """A CycleGAN's with three residual blocks, 32 and 64 channels, instance norm (arXiv 1703.10593)."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((3, 32, 1), (32, 64, 2)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1), nn.InstanceNorm2d(outputs), nn.ReLU()]
    for _ in range(3):
        inner = [nn.Conv2d(64, 64, 3, 1, 1), nn.InstanceNorm2d(64), nn.ReLU()]
        layers.append(Around(nn.Sequential(*inner, nn.Conv2d(64, 64, 3, 1, 1), nn.InstanceNorm2d(64))))
    layers += [nn.ConvTranspose2d(64, 32, 3, 2, 1, 1), nn.InstanceNorm2d(32), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(32, 3, 7, 1, 3))


class GroupNormed(nn.Module):
    """Group norm and SiLU before each of two convolutions."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.before, self.first = nn.GroupNorm(8, inputs), nn.Conv2d(inputs, outputs, 3, 1, 1)
        self.between, self.second = nn.GroupNorm(8, outputs), nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Features to features."""
        y = self.first(F.silu(self.before(x)))
        return self.shortcut(x) + self.second(F.silu(self.between(y)))


class Attending(nn.Module):
    """Attention between all places of a feature map, beside it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.attention = nn.GroupNorm(8, width), nn.MultiheadAttention(width, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Features to features."""
        y = self.norm(x).flatten(2).transpose(1, 2)
        y = self.attention(y, y, y, need_weights=False)[0]
        return x + y.transpose(1, 2).reshape(x.shape)


class Diffusion(nn.Module):
    """The U-Net of a diffusion model, 32 and 64 channels, without the time (arXiv 2006.11239)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.high = nn.Conv2d(3, 32, 3, 1, 1), GroupNormed(32, 32)
        self.to_middle, self.middle = nn.Conv2d(32, 32, 3, 2, 1), GroupNormed(32, 64)
        self.to_low = nn.Conv2d(64, 64, 3, 2, 1)
        self.low = nn.Sequential(GroupNormed(64, 64), Attending(64), GroupNormed(64, 64))
        self.up_middle, self.joined_middle = nn.Conv2d(64, 64, 3, 1, 1), GroupNormed(128, 64)
        self.up_high, self.joined_high = nn.Conv2d(64, 32, 3, 1, 1), GroupNormed(64, 32)
        self.last = nn.Sequential(nn.GroupNorm(8, 32), nn.SiLU(), nn.Conv2d(32, 3, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """From images to images."""
        high = self.high(self.first(x))
        middle = self.middle(self.to_middle(high))
        y = self.up_middle(F.interpolate(self.low(self.to_low(middle)), scale_factor=2))
        y = self.up_high(F.interpolate(self.joined_middle(torch.cat([y, middle], 1)), scale_factor=2))
        return self.last(self.joined_high(torch.cat([y, high], 1)))


class MixerBlock(nn.Module):
    """Linear layers over the places, then over the channels."""

    def __init__(self, places: int, width: int) -> None:
        super().__init__()
        self.places_norm = nn.LayerNorm(width)
        self.over_places = nn.Sequential(
            nn.Linear(places, 2 * places), nn.GELU(), nn.Linear(2 * places, places)
        )
        self.channels_norm = nn.LayerNorm(width)
        self.over_channels = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(batch, places, width) to the same."""
        x = x + self.over_places(self.places_norm(x).transpose(1, 2)).transpose(1, 2)
        return x + self.over_channels(self.channels_norm(x))


class Mixer(nn.Module):
    """Four blocks of an MLP-Mixer, 96 channels (arXiv 2105.01601)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 96, 4, 4)
        self.blocks = nn.Sequential(*[MixerBlock((size // 4) ** 2, 96) for _ in range(4)])
        self.norm, self.head = nn.LayerNorm(96), nn.Linear(96, 10)

    def forward(self, x: Tensor) -> Tensor:
        """From images to class scores."""
        return self.head(self.norm(self.blocks(self.patches(x).flatten(2).transpose(1, 2))).mean(1))


class Language(nn.Module):
    """A transformer of three layers with norms behind them, embedding and last layer apart."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(LEVELS, 96)
        self.position = nn.Parameter(0.02 * torch.randn(1, SCAN**2, 96))
        layer = nn.TransformerEncoderLayer(96, 4, 384, 0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(96, LEVELS)
        for module in self.encoder.modules():  # the copies that TransformerEncoder makes are all alike
            if isinstance(module, nn.Linear):
                module.reset_parameters()

    def forward(self, tokens: Tensor) -> Tensor:
        """From tokens to scores of the next ones."""
        length = tokens.shape[1]
        later = torch.triu(torch.full((length, length), float("-inf")), 1)
        return self.head(self.encoder(self.embedding(tokens) + self.position[:, :length], mask=later))


def _of(kind: Callable[[], nn.Module]) -> Callable[[int], Any]:
    return lambda _: kind()


SECOND: Final = (
    Member("mlp", "classify", mlp),
    Member("discriminator", "classify", discriminator),
    Member("residual", "classify", residual),
    Member("super-resolution", "restore", super_resolution),
    Member("denoiser", "restore", denoiser),
    Member("vae", "restore", VAE),
    Member("preactivated", "classify", preactivated, known=True),
    Member("convmixer", "classify", convmixer),
    Member("video", "classify", _of(Video)),
    Member("audio", "classify", _of(Audio)),
    Member("pyramid", "segment", _of(Pyramid)),
    Member("generator", "restore", generator),
    Member("diffusion", "restore", _of(Diffusion)),
    Member("mixer", "classify", Mixer),
    Member("language", "next pixel", _of(Language)),
)
"""The second panel."""
