"""Accuracy of networks with predicted parameters (arXiv 2110.13100, section 5).

Batch norms use batch statistics, because running statistics are not predicted; test batches have 64
images; accuracy is top-1.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ghn_init._errors import TrainingError
from ghn_init._trace import trace
from ghn_init.deepnets import DeepNets1M
from ghn_init.training._engine import inject
from ghn_init.training._layers import prepare
from ghn_init.training.data import Images, Normalisation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ghn_init._model import GHN

BATCH_SIZE = 64
NOISE = 0.08
"""Standard deviation of the Gaussian noise on pixels from 0 to 1 (arXiv 2110.13100, section 5.1)."""

SPLITS = ("test", "wide", "deep", "dense", "bnfree", "resnet50", "vit")


@dataclass(frozen=True)
class Score:
    """Top-1 accuracy over the networks of a split, in percent.

    Attributes:
        split: Name of the split.
        n: Networks.
        mean: Mean over the networks.
        standard_error: Of that mean; 0 for one network.
        maximum: Best network.
        images: Test images that every network saw.
        noise: Standard deviation of the noise on them.
        accuracies: Of every network.
    """

    split: str
    n: int
    mean: float
    standard_error: float
    maximum: float
    images: int
    noise: float
    accuracies: tuple[float, ...]

    @classmethod
    def of(cls, split: str, accuracies: list[float], images: int, noise: float) -> Score:
        """The score of these accuracies (fractions)."""
        values = torch.tensor(accuracies, dtype=torch.float64) * 100
        n = len(accuracies)
        error = (values.std(correction=1) / math.sqrt(n)).item() if n > 1 else 0.0
        best = values.max().item()
        return cls(split, n, values.mean().item(), error, best, images, noise, tuple(values.tolist()))

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return asdict(self) | {"accuracies": [round(value, 2) for value in self.accuracies]}


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
    on_network: Callable[[int, int, float], None] | None = None,
) -> Score:
    """Predict the parameters of every architecture of a split and measure it.

    Args:
        ghn: The hypernetwork.
        split: A split of DeepNets-1M, or "resnet50" or "vit" (those of the predefined split).
        data: Test images.
        n: Only the first n architectures.
        images: Only this many images (spread evenly over the set).
        noise: Standard deviation of Gaussian noise on the pixels, which go from 0 to 1.
        normalise: Default: mean and deviation of `data`.
        seed: Of split and noise.
        precision: Type in which networks run.
        on_network: Called with index, number of networks and accuracy after each of them.

    Raises:
        TrainingError: No images, or a number of classes that is not the GHN's.
    """
    if len(data.classes) != ghn.config.num_classes:
        raise TrainingError(f"{len(data.classes)} classes; the GHN predicts {ghn.config.num_classes}")
    if images is not None and images < len(data):
        data = data.take(torch.linspace(0, len(data) - 1, images).long())
    batches = list(_batches(data, normalise or Normalisation.of(data), noise, seed))
    networks = build_networks(split, ghn.config.num_classes, data.size, n, seed)
    accuracies: list[float] = []
    for index, (count, network) in enumerate(networks):
        accuracies.append(accuracy(ghn, network, batches, precision))
        if on_network is not None:
            on_network(index, count, accuracies[-1])
    return Score.of(split, accuracies, len(data), noise)


def build_networks(
    split: str, num_classes: int, image_size: int, n: int | None, seed: int
) -> Iterator[tuple[int, nn.Module]]:
    """(Number of networks, network on the meta device) for the networks of a split, one after another."""
    name, first = {"resnet50": ("predefined", 0), "vit": ("predefined", 1)}.get(split, (split, 0))
    networks = DeepNets1M(name, seed=seed, image_size=image_size)
    available = 1 if name != split else len(networks)
    count = min(n or available, available)
    for index in range(first, first + count):
        with torch.device("meta"):
            yield count, networks[index].build(num_classes, image_size)


def _batches(data: Images, normalise: Normalisation, noise: float, seed: int) -> list[tuple[Tensor, Tensor]]:
    rng = torch.Generator().manual_seed(seed)
    batches: list[tuple[Tensor, Tensor]] = []
    # One shuffle, because batch statistics of a single class would be another task.
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(1))
    for index in order.split(BATCH_SIZE):
        x = normalise(data.pixels[index])
        if noise:
            x = x + noise / torch.tensor(normalise.std).view(1, 3, 1, 1) * torch.randn(x.shape, generator=rng)
        batches.append((x.contiguous(memory_format=torch.channels_last), data.labels[index]))
    return batches


@torch.no_grad()
def accuracy(
    ghn: GHN,
    network: nn.Module,
    batches: list[tuple[Tensor, Tensor]],
    precision: torch.dtype = torch.float32,
) -> float:
    """Top-1 accuracy, a fraction, of a network (on meta, taken over) with predicted parameters."""
    (params,) = ghn([trace(network)])
    network = prepare(network).eval()
    inject(network, params, precision)
    hits = sum(int((network(x.to(precision)).argmax(1) == y).sum()) for x, y in batches)
    return hits / sum(len(y) for _, y in batches)
