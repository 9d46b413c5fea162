"""Accuracy of networks with predicted parameters (arXiv 2110.13100, section 5).

Batch norms use batch statistics, because running statistics are not predicted; test batches have 64
images; dropout is off; accuracy is top-1.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ghn_init._errors import ArchitectureError, TrainingError
from ghn_init._tracing.trace import trace
from ghn_init.deepnets import SPLITS as DEEPNETS_SPLITS
from ghn_init.deepnets import DeepNets1M
from ghn_init.training._engine import inject
from ghn_init.training._layers import prepare
from ghn_init.training.data import Images, Normalisation, check_side, sized

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ghn_init._weights.ghn import GHN
    from ghn_init.deepnets import Architecture
    from ghn_init.deepnets._splits import ResNet50

BATCH_SIZE = 64
NOISE = 0.08
"""Standard deviation of the Gaussian noise on pixels from 0 to 1 (arXiv 2110.13100, section 5.1)."""

SPLITS = ("test", "wide", "deep", "dense", "bnfree", "resnet50", "vit")
"""What is measured by default: splits of DeepNets-1M, the two predefined networks each by itself."""

_SHUFFLE_SEED = 1
_PREDEFINED = {"resnet50": 0, "vit": 1}


@dataclass(frozen=True)
class Score:
    """Top-1 accuracy over networks of a split, in percent.

    Attributes:
        split: Name of the split.
        n: Number of networks.
        mean: Mean over the networks.
        standard_error: The standard error of that mean, from the spread over networks; 0 for one network.
        image_error: The error of that mean from measuring on some of the test images only, which all networks
            share: `sqrt(p (1 - p) / images * (1 - images / available))`, an upper bound; 0 for all images.
        maximum: Accuracy of the best network.
        images: Number of test images that every network saw.
        noise: Standard deviation of the noise on them.
        accuracies: The accuracy of every network.
    """

    split: str
    n: int
    mean: float
    standard_error: float
    image_error: float
    maximum: float
    images: int
    noise: float
    accuracies: tuple[float, ...]

    @classmethod
    def of(
        cls, split: str, accuracies: Sequence[float], images: int, noise: float, available: int | None = None
    ) -> Score:
        """The score of these accuracies, in percent, at least one, on so many of the `available` images."""
        values = torch.tensor(accuracies, dtype=torch.float64)
        n, mean = len(accuracies), values.mean().item()
        left_out = 1 - images / (available or images)
        return cls(
            split=split,
            n=n,
            mean=mean,
            standard_error=(values.std(correction=1) / math.sqrt(n)).item() if n > 1 else 0.0,
            image_error=math.sqrt(mean * (100 - mean) / images * left_out),
            maximum=values.max().item(),
            images=images,
            noise=noise,
            accuracies=tuple(accuracies),
        )

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return asdict(self) | {"accuracies": list(self.accuracies)}


@dataclass(frozen=True, order=True)
class Case:
    """Network `index` of a split of DeepNets-1M, or "resnet50" or "vit", as it is to be measured.

    `noise` is the standard deviation of the noise on the pixels, which go from 0 to 1.
    """

    split: str
    index: int
    noise: float = 0.0

    @classmethod
    def of(cls, split: str, n: int | None = None, noise: float = 0.0) -> list[Case]:
        """The networks of a split, or its first `n`.

        Raises:
            ArchitectureError: There is no such split.
        """
        sizes = DEEPNETS_SPLITS | dict.fromkeys(_PREDEFINED, 1)
        if split not in sizes:
            raise ArchitectureError(f"no split {split!r}; expected one of {', '.join(sizes)}")
        available = sizes[split]
        return [cls(split, index, noise) for index in range(min(n or available, available))]

    @classmethod
    def fitting(
        cls, split: str, image_size: int, n: int | None = None, noise: float = 0.0, seed: int = 0
    ) -> tuple[list[Case], int]:
        """The networks of a split that take images of this size, or the first `n` of them.

        Returns:
            They, and how many were passed over.

        Raises:
            ArchitectureError: There is no such split.
        """
        found: list[Case] = []
        unfit = 0
        for network in cls.of(split, noise=noise):
            if n and len(found) == n:
                break
            if network.architecture(image_size, seed).supports(image_size):
                found.append(network)
            else:
                unfit += 1
        return found, unfit

    def architecture(self, image_size: int, seed: int = 0) -> Architecture | ResNet50:
        """Its specification, at the split's width for evaluation."""
        name = "predefined" if self.split in _PREDEFINED else self.split
        return DeepNets1M(name, seed=seed, image_size=image_size)[_PREDEFINED.get(self.split, self.index)]

    def build(self, num_classes: int, image_size: int, seed: int = 0) -> nn.Module:
        """The network on the meta device."""
        with torch.device("meta"):
            return self.architecture(image_size, seed).build(num_classes, image_size)


class Measure:
    """Measures networks whose parameters a GHN predicts on one set of images.

    Args:
        ghn: The hypernetwork.
        data: Test images.
        images: How many of them are used, spread evenly over the set; None for all.
        normalise: The normalisation of the images; by default mean and deviation of `data`.
        seed: The seed of the architectures and of the noise.
        precision: Type in which networks run.
        image_size: Side of the images that networks see: that of `data`, the default, or half of it.

    Raises:
        TrainingError: No images, a number of classes that is not the GHN's, another `image_size`.
    """

    def __init__(
        self,
        ghn: GHN,
        data: Images,
        *,
        images: int | None = None,
        normalise: Normalisation | None = None,
        seed: int = 0,
        precision: torch.dtype = torch.float32,
        image_size: int | None = None,
    ) -> None:
        self.image_size = image_size or data.size
        check_side(data, self.image_size)
        if len(data.classes) != ghn.config.num_classes:
            raise TrainingError(f"{len(data.classes)} classes; the GHN predicts {ghn.config.num_classes}")
        if len(data) < 2 or (images is not None and images < 2):
            raise TrainingError("expected at least 2 images: batch norms use the statistics of a batch")
        self.ghn, self.normalise, self.available = ghn, normalise or Normalisation.of(data), len(data)
        self.data = data if images is None else data.spread(images)
        self.seed, self.precision = seed, precision
        self._batches: dict[float, list[tuple[Tensor, Tensor]]] = {}

    def batches(self, noise: float = 0.0) -> list[tuple[Tensor, Tensor]]:
        """Normalised images (64, 3, H, W) under Gaussian noise of this deviation, and their labels.

        They are on the GHN's device.
        """
        if noise not in self._batches:
            rng = torch.Generator().manual_seed(self.seed)
            std = torch.tensor(self.normalise.std).view(1, 3, 1, 1)
            made: list[tuple[Tensor, Tensor]] = []
            for index in self._order():
                x = self.normalise(self.data.pixels[index])
                if noise:
                    x = x + noise / std * torch.randn(x.shape, generator=rng)
                x = (
                    sized(x, self.image_size)
                    .to(self.ghn.device, self.precision)
                    .contiguous(memory_format=torch.channels_last)
                )
                made.append((x, self.data.labels[index].to(self.ghn.device)))
            self._batches[noise] = made
        return self._batches[noise]

    def _order(self) -> list[Tensor]:
        """Places of the images of every batch: shuffled, because one class has other batch statistics."""
        generator = torch.Generator().manual_seed(_SHUFFLE_SEED)
        parts = list(torch.randperm(len(self.data), generator=generator).split(BATCH_SIZE))
        if len(parts[-1]) == 1:  # has no variance
            parts[-2:] = [torch.cat(parts[-2:])]
        return parts

    @torch.no_grad()
    def __call__(self, network: Case | nn.Module) -> float:
        """Top-1 accuracy in percent; a module has to be on the meta device and is taken over."""
        size, noise = self.image_size, 0.0
        if isinstance(network, Case):
            noise = network.noise
            network = network.build(self.ghn.config.num_classes, size, self.seed)
        (params,) = self.ghn([trace(network, (1, 3, size, size))])
        inject(prepare(network, fast=self.ghn.device.type == "cpu").eval(), params, self.precision)
        return self.accuracy(network, noise)

    @torch.no_grad()
    def accuracy(self, network: nn.Module, noise: float = 0.0) -> float:
        """Top-1 accuracy in percent of a network that has its parameters already, on the GHN's device."""
        hits = sum(int((network(x).argmax(1) == y).sum()) for x, y in self.batches(noise))
        return 100 * hits / len(self.data)


def evaluate(
    ghn: GHN,
    split: str,
    data: Images,
    *,
    n: int | None = None,
    images: int | None = None,
    noise: float = 0.0,
    normalise: Normalisation | None = None,
    seed: int = 0,
    precision: torch.dtype = torch.float32,
) -> Score:
    """Predict the parameters of the architectures of a split and measure them, one after another.

    Args:
        ghn: The hypernetwork.
        split: A split of DeepNets-1M, or "resnet50" or "vit".
        data: Test images.
        n: How many architectures are measured, the first ones that take images of this size; None for all.
        images: How many images are used, spread evenly over the set; None for all.
        noise: Standard deviation of Gaussian noise on the pixels, which go from 0 to 1.
        normalise: The normalisation of the images; by default mean and deviation of `data`.
        seed: The seed of split and noise.
        precision: Type in which networks run.

    Raises:
        ArchitectureError: There is no such split.
        TrainingError: No images, or a number of classes that is not the GHN's.
    """
    measure = Measure(ghn, data, images=images, normalise=normalise, seed=seed, precision=precision)
    networks, _ = Case.fitting(split, measure.image_size, n, noise, seed)
    if not networks:
        raise TrainingError(
            f"no network of {split} takes images of {measure.image_size} x {measure.image_size} pixels; "
            "those of DeepNets-1M want a multiple of 8"
        )
    accuracies = [measure(network) for network in networks]
    return Score.of(split, accuracies, len(measure.data), noise, measure.available)
