"""The networks and tasks on which `starting_point.py` compares initialisations.

Small enough for a CPU, each of a kind that users train: torchvision's and transformers' own networks at full
or reduced width, and a few of our own where a kind has no small one. Every task is made of the same labelled
images.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from ghn_init.deepnets import DeepNets1M

if TYPE_CHECKING:
    from collections.abc import Callable

    from ghn_init.training.data import Images, Normalisation

Kind = Literal[
    "classify", "grey", "restore", "segment", "next pixel",
    "number", "rotation", "brightness", "actions", "pairs", "triplets",
]  # fmt: skip
"""The last six, in the second row, have values for targets, or classes of which an embedding is to tell."""

LEVELS: Final = 32
"""Grey levels that the next-pixel task tells apart; segmentation tells a quarter as many."""
NOISE: Final = 0.5
"""Standard deviation of the noise that is to be removed, in units of the pixels' own."""
ACTIONS: Final = 6
"""Actions of which one is worth something, by the image's class."""
MARGIN: Final = 0.2
"""By which the most distant image of a class is to be nearer than the nearest of another one."""
SCAN: Final = 8
"""Side of the reduced image whose pixels are predicted one after the other."""


@dataclass(frozen=True)
class Member:
    """A network of the panel.

    Attributes:
        name: What `--networks` calls it.
        kind: Its task.
        build: Makes it, from the side of the images.
        known: Like the networks that the hypernetwork has learned from.
        enlarged: Side of the images below which the network cannot work.
    """

    name: str
    kind: Kind
    build: Callable[[int], nn.Module]
    known: bool = False
    enlarged: int = 0


@dataclass(frozen=True)
class Task:
    """Batches of a kind of task from labelled images of one side.

    Attributes:
        kind: Which.
        images: Labelled images.
        normalise: From pixels to network inputs.
        size: Side of the images that the network sees.
    """

    kind: Kind
    images: Images
    normalise: Normalisation
    size: int

    def batch(self, index: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the images at these places."""
        clean = self.normalise(self.images.pixels[index])
        if clean.shape[-1] != self.size:
            clean = F.interpolate(clean, (self.size, self.size), mode="bilinear", antialias=True)
        if self.kind == "classify":
            return clean, self.images.labels[index]
        if self.kind == "grey":
            return clean.mean(1, keepdim=True), self.images.labels[index]
        if self.kind == "restore":
            return clean + NOISE * torch.randn(clean.shape, generator=generator), clean
        if self.kind in _OF_LABELS:
            return clean, self._wanted(self.images.labels[index])
        if self.kind == "rotation":
            return _turned(clean, 2 * math.pi * torch.rand(len(clean), generator=generator))
        grey = clean.mean(1)
        if self.kind == "brightness":
            return clean, grey.mean((1, 2))[:, None]
        if self.kind == "segment":
            return clean, _levels(grey, LEVELS // 4)
        tokens = _levels(F.adaptive_avg_pool2d(grey, SCAN), LEVELS).flatten(1)
        return tokens[:, :-1], tokens[:, 1:]

    def _wanted(self, labels: Tensor) -> Tensor:
        """The targets that follow from classes."""
        if self.kind == "number":
            return labels[:, None].float() / 5 - 0.9
        if self.kind == "actions":
            return F.one_hot(labels % ACTIONS, ACTIONS).float()
        return labels

    def loss(self, output: Any, target: Tensor) -> Tensor:
        """What is minimised: a cross-entropy, an error of values, or that of distances."""
        output = getattr(output, "logits", output)
        if self.kind in ("restore", "number", "rotation", "brightness"):
            return F.mse_loss(output, target)
        if self.kind == "actions":
            return F.smooth_l1_loss(output, target) * ACTIONS
        if self.kind in ("pairs", "triplets"):
            return _contrast(output, target) if self.kind == "pairs" else _triplets(output, target)
        if self.kind == "segment" and output.shape[-2:] != target.shape[-2:]:
            output = F.interpolate(output, target.shape[-2:], mode="bilinear")
        return F.cross_entropy(output.transpose(1, -1) if self.kind == "next pixel" else output, target)

    def quality(self, output: Any, target: Tensor) -> float:
        """Accuracy in percent; of restored images the share of the noise that is gone.

        Of values it is the share of their variance that is explained, of embeddings that of the images whose
        nearest other one is of their class.
        """
        output = getattr(output, "logits", output)
        if self.kind == "restore":
            return 100 * (1 - float(F.mse_loss(output, target)) / NOISE**2)
        if self.kind in ("number", "rotation", "brightness"):
            return 100 * (1 - float(F.mse_loss(output, target) / target.var(0).mean()))
        if self.kind in ("pairs", "triplets"):
            nearest = torch.cdist(output, output).fill_diagonal_(math.inf).argmin(1)
            return 100 * float((target[nearest] == target).float().mean())
        target = target.argmax(1) if self.kind == "actions" else target
        if self.kind == "segment" and output.shape[-2:] != target.shape[-2:]:
            output = F.interpolate(output, target.shape[-2:], mode="bilinear")
        classes = output.argmax(-1 if self.kind == "next pixel" else 1)
        return 100 * float((classes == target).float().mean())


_OF_LABELS: Final = ("number", "actions", "pairs", "triplets")


def _turned(images: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
    """The images turned by these angles, and (N, 2) their cosines and sines."""
    cosine, sine, zero = angles.cos(), angles.sin(), torch.zeros_like(angles)
    matrices = torch.stack((cosine, -sine, zero, sine, cosine, zero), 1).view(-1, 2, 3)
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False), torch.stack((cosine, sine), 1)


def _contrast(embedded: Tensor, labels: Tensor) -> Tensor:
    """The contrastive loss of all pairs, with a margin of 1 (Hadsell et al. 2006)."""
    distance = torch.cdist(embedded, embedded) + 1e-6  # the root has no gradient at 0
    same = (labels[:, None] == labels).float()
    return (same * distance.square() + (1 - same) * F.relu(1 - distance).square()).mean()


def _triplets(embedded: Tensor, labels: Tensor) -> Tensor:
    """The hardest triplets of a batch (arXiv 1703.07737), by squared distances."""
    distance = (embedded[:, None] - embedded).square().sum(-1)
    same = labels[:, None] == labels
    farthest = distance.masked_fill(~same, 0).amax(1)
    nearest = distance.masked_fill(same, math.inf).amin(1)
    return F.relu(farthest - nearest + MARGIN)[nearest.isfinite()].mean()


def _levels(grey: Tensor, count: int) -> Tensor:
    """Normalised brightness as one of `count` numbers, darkest first."""
    return ((grey + 2) / 4 * count).long().clamp(0, count - 1)


# Networks of our own


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, *, norm: bool = True) -> nn.Sequential:
    """Convolution, batch norm if so wanted, ReLU."""
    layers = [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=not norm)]
    return nn.Sequential(*layers, *([nn.BatchNorm2d(outputs)] if norm else []), nn.ReLU())


class Residual(nn.Module):
    """Two convolutions with batch norm beside a shortcut (arXiv 1512.03385)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv(inputs, outputs, 3, stride), nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        )
        self.norm = nn.BatchNorm2d(outputs)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Features to features."""
        return F.relu(self.norm(self.body(x)) + self.shortcut(x))


def small_resnet(_: int) -> nn.Module:
    """Three stages of one block, 32 to 128 channels."""
    blocks = [Residual(32, 32, 1), Residual(32, 64, 2), Residual(64, 128, 2)]
    return nn.Sequential(conv(3, 32), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


def vgg(_: int) -> nn.Module:
    """Six convolutions and two linear layers, no norm (arXiv 1409.1556)."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 32), (32, 64), (64, 128)):
        layers += [conv(inputs, outputs, norm=False), conv(outputs, outputs, norm=False), nn.MaxPool2d(2)]
    head = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10)]
    return nn.Sequential(*layers, *head)


def plain_cnn(_: int) -> nn.Module:
    """LeNet's kind: two 5x5 convolutions and two linear layers."""
    layers = [conv(3, 32, 5, norm=False), nn.MaxPool2d(2), conv(32, 64, 5, norm=False)]
    head = [nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(1024, 128), nn.ReLU(), nn.Linear(128, 10)]
    return nn.Sequential(*layers, *head)


class ViT(nn.Module):
    """A vision transformer with a class token, pre-norm (arXiv 2010.11929)."""

    def __init__(self, size: int, patch: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2 + 1, width))
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that pre-norm has no fast path
            self.encoder = nn.TransformerEncoder(layer, depth, nn.LayerNorm(width))
        for module in self.encoder.layers:  # the copies that TransformerEncoder makes are all alike
            for part in module.modules():
                if isinstance(part, nn.Linear):
                    part.reset_parameters()
            nn.init.xavier_uniform_(module.self_attn.in_proj_weight)  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """From images to class scores, or to images."""
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        return self.head(self.encoder(x)[:, 0])


class UNet(nn.Module):
    """Two levels with batch norm, transposed convolutions on the way up (arXiv 1505.04597)."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([self._pair(3, 24), self._pair(24, 48)])
        self.bottom = self._pair(48, 96)
        self.up = nn.ModuleList([nn.ConvTranspose2d(96, 48, 2, 2), nn.ConvTranspose2d(48, 24, 2, 2)])
        self.joined = nn.ModuleList([self._pair(96, 48), self._pair(48, 24)])
        self.last = nn.Conv2d(24, 3, 1)

    @staticmethod
    def _pair(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(conv(inputs, outputs), conv(outputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """From images to class scores, or to images."""
        kept = []
        for block in self.down:
            kept.append(x := block(x))
            x = F.max_pool2d(x, 2)
        x = self.bottom(x)
        for up, block in zip(self.up, self.joined, strict=True):
            x = block(torch.cat([up(x), kept.pop()], 1))
        return self.last(x)


def autoencoder(_: int) -> nn.Module:
    """Strided convolutions down, transposed ones up as in the generator of a DCGAN (arXiv 1511.06434)."""
    down = [conv(3, 32, 3, 2), conv(32, 64, 3, 2), conv(64, 128, 3, 2)]
    up: list[nn.Module] = []
    for inputs, outputs in ((128, 64), (64, 32)):
        up += [nn.ConvTranspose2d(inputs, outputs, 4, 2, 1), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*down, *up, nn.ConvTranspose2d(32, 3, 4, 2, 1))


class Recurrent(nn.Module):
    """Convolutions, then an LSTM over the rows of what they make."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(conv(3, 32), nn.MaxPool2d(2), conv(32, 64), nn.MaxPool2d(2))
        self.lstm = nn.LSTM(64, 96, batch_first=True)
        self.head = nn.Linear(96, 10)

    def forward(self, x: Tensor) -> Tensor:
        """From images to class scores, or to images."""
        rows = self.features(x).mean(3).transpose(1, 2)
        return self.head(self.lstm(rows)[0][:, -1])


# Networks of others


def _vision(name: str, **extra: Any) -> Callable[[int], nn.Module]:
    return lambda _: torchvision.models.get_model(name, num_classes=10, **extra)


def _convnext(_: int) -> nn.Module:
    """ConvNeXt at a third of the width of ConvNeXt-T (arXiv 2201.03545)."""
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    widths = (32, 64, 128, 256)
    after = (*widths[1:], None)
    return ConvNeXt(
        [CNBlockConfig(w, n, d) for w, n, d in zip(widths, after, (1, 1, 3, 1), strict=True)], num_classes=10
    )


def _densenet(_: int) -> nn.Module:
    """DenseNet-BC with growth 16 and four blocks of three layers (arXiv 1608.06993)."""
    return torchvision.models.DenseNet(16, (3, 3, 3, 3), 32, num_classes=10)


def _gpt(_: int) -> nn.Module:
    """GPT-2 of three layers, its embedding tied to its last layer."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=LEVELS, n_positions=SCAN**2, n_embd=96, n_layer=3, n_head=4,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def _segformer(_: int) -> nn.Module:
    """SegFormer with half the layers of B0 (arXiv 2105.15203)."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    config = SegformerConfig(depths=[1, 1, 1, 1], decoder_hidden_size=64)
    config.num_labels = LEVELS // 4
    return SegformerForSemanticSegmentation(config)


def _deepnets(split: str, index: int) -> Callable[[int], nn.Module]:
    """A network of a split of DeepNets-1M, with the values of its own initialisation."""

    def build(size: int) -> nn.Module:
        return DeepNets1M(split, image_size=size)[index].build(10, size)

    return build


PANEL: Final = (
    Member("small-resnet", "classify", small_resnet, known=True),
    Member("resnet18", "classify", _vision("resnet18"), known=True),
    Member("resnet50", "classify", _vision("resnet50"), known=True),
    Member("deepnets-bn", "classify", _deepnets("test", 0), known=True),
    Member("deepnets-attention", "classify", _deepnets("test", 7), known=True),
    Member("deepnets-gates", "classify", _deepnets("test", 8), known=True),
    Member("deepnets-bnfree", "classify", _deepnets("bnfree", 0)),
    Member("densenet", "classify", _densenet),
    Member("mobilenet-v3", "classify", _vision("mobilenet_v3_small")),
    Member("efficientnet-b0", "classify", _vision("efficientnet_b0")),
    Member("shufflenet", "classify", _vision("shufflenet_v2_x0_5")),
    Member("convnext", "classify", _convnext),
    Member("vgg", "classify", vgg),
    Member("plain-cnn", "classify", plain_cnn),
    Member("alexnet", "classify", _vision("alexnet"), enlarged=64),
    Member("vgg11", "classify", _vision("vgg11")),
    Member("vit", "classify", lambda size: ViT(size, size // 8, 96, 4, 4)),
    Member("vit-tiny", "classify", lambda size: ViT(size, size // 4, 192, 12, 3)),
    Member("lstm", "classify", lambda _: Recurrent()),
    Member("unet", "restore", lambda _: UNet()),
    Member("autoencoder", "restore", autoencoder),
    Member("segformer", "segment", _segformer, enlarged=64),
    Member("gpt-tied", "next pixel", _gpt),
)
"""The panel, in the order in which it is measured."""
