"""Measures architectures on real images: with predicted weights, and trained for a while."""

from __future__ import annotations

import dataclasses
import math
import time
from collections import deque
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn

from ghn_init._errors import ArchitectureError, TrainingError
from ghn_init._threads import drawing_from
from ghn_init.deepnets import Architecture, DeepNets1M
from ghn_init.search._recipe import PRECISIONS, Measurement, Recipe
from ghn_init.training._engine import Engine, inject
from ghn_init.training._layers import prepare
from ghn_init.training.data import Images, Normalisation, augment, batch_indices, generator, sized
from ghn_init.training.evaluate import NOISE, Measure

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ghn_init._weights.ghn import GHN

_MOMENTUM: Final = 0.9
_DECAY: Final = 3e-4
_CLIP: Final = 5.0
"""SGD as in DARTS (arXiv 1806.09055, appendix A.3), which the cells come from."""

_RUNNING: Final = 20
"""Steps over which training accuracy and loss are averaged."""

_REPEATS: Final = 5
"""Forward passes of which the fastest counts as the speed."""

_CROP_PADDING: Final = 4


@dataclass(frozen=True)
class Candidate:
    """Architecture `index` of a split."""

    index: int
    architecture: Architecture


def candidates(
    split: str,
    recipe: Recipe,
    *,
    max_params: float | None = None,
    max_activations: float | None = None,
    num_classes: int = 10,
    seed: int = 0,
    start: int = 0,
) -> Iterator[Candidate]:
    """The architectures of a split that take such images and keep to the limits, in order.

    Args:
        split: The split of DeepNets-1M.
        recipe: Gives their width and the size of images.
        max_params: Most parameters, in millions, at that width and size.
        max_activations: Most elements of all feature maps, in millions, by `Architecture.activations`: what a
            network's time goes by.
        num_classes: Outputs of the networks.
        seed: Of the split.
        start: Place of the first one in the split.

    Raises:
        ArchitectureError: There is no such split, or it has networks that are not drawn from the space.
        TrainingError: A limit that no network keeps to.
    """
    for name, millions in (("max_params", max_params), ("max_activations", max_activations)):
        if millions is not None and not millions > 0:  # NaN is not, too
            raise TrainingError(f"{name}={millions} millions; expected a number above 0")
    networks = DeepNets1M(split, seed=seed, image_size=recipe.image_size)
    most_params, most_activations = (
        math.inf if millions is None else 1e6 * millions for millions in (max_params, max_activations)
    )
    for index in range(start, len(networks)):
        architecture = networks[index]
        if not isinstance(architecture, Architecture):
            raise ArchitectureError(f"split {split!r}: {architecture!r} has no genotype; take another split")
        if recipe.width is not None:
            architecture = dataclasses.replace(architecture, C=recipe.width)
        if (
            architecture.supports(recipe.image_size)
            and architecture.activations() <= most_activations
            and architecture.num_params(num_classes, recipe.image_size) <= most_params
        ):
            yield Candidate(index, architecture)


class Measurer:
    """Measures architectures on one set of images, all in the same way, on the CPU.

    Args:
        ghn: The hypernetwork that predicts weights.
        train: Images to train on.
        validation: Images to measure accuracies on.
        recipe: How to train and measure.

    Raises:
        TrainingError: Images that do not fit the recipe or the hypernetwork.
    """

    def __init__(self, ghn: GHN, train: Images, validation: Images, recipe: Recipe | None = None) -> None:
        self.recipe = recipe = recipe or Recipe()
        if len(train) < recipe.batch_size:
            raise TrainingError(
                f"{len(train)} training images; expected at least batch_size={recipe.batch_size}"
            )
        self.train, self.precision = train, PRECISIONS[recipe.precision]
        self.scorer = Measure(
            ghn,
            validation,
            images=recipe.images,
            normalise=Normalisation.of(train),
            seed=recipe.seed,
            precision=self.precision,
            image_size=recipe.image_size,
        )

    def __call__(self, candidate: Candidate) -> Measurement:
        """Everything about one architecture."""
        started, size = time.process_time(), self.recipe.image_size
        architecture, classes = candidate.architecture, len(self.train.classes)
        with torch.device("meta"):
            network = architecture.build(classes, size)
        predicted, predicted_noise = self.scorer(network), self.scorer.accuracy(network, NOISE)
        with drawing_from(self.recipe.seed):
            network = architecture.build(classes, size)
        convergence, loss = train(network, self)
        network.eval()
        return Measurement(
            index=candidate.index,
            architecture=architecture,
            params=architecture.num_params(classes, size),
            nodes=architecture.num_nodes(),
            predicted=predicted,
            predicted_noise=predicted_noise,
            trained=self.scorer.accuracy(network),
            trained_noise=self.scorer.accuracy(network, NOISE),
            convergence=convergence,
            speed=_speed(network, self.scorer.batches()[0][0]),
            loss=loss,
            seconds=round(time.process_time() - started, 2),
        )

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Augmented and normalised images (B, 3, H, W) of a step of training, and their labels."""
        seed, recipe = self.recipe.seed, self.recipe
        batch = self.train.take(batch_indices(len(self.train), recipe.batch_size, step, seed))
        rng = generator(seed, "measuring", step)
        x = self.scorer.normalise(augment(batch.pixels, rng, _CROP_PADDING))
        return sized(x, recipe.image_size), batch.labels


def train(network: nn.Module, measurer: Measurer) -> tuple[int | None, float]:
    """Train a network by SGD from its own initialisation; afterwards it has the trained parameters.

    Returns:
        Steps until the mean accuracy of the last 20 batches reached the target, or None; and the mean loss of
        the last 20 steps, infinite if it was not finite once, which ends the training.
    """
    recipe, precision, engine = measurer.recipe, measurer.precision, Engine(measurer.precision)
    params = {name: nn.Parameter(param.detach().clone()) for name, param in network.named_parameters()}
    prepare(network, seed=recipe.seed).train()
    optimizer = torch.optim.SGD(params.values(), lr=recipe.lr, momentum=_MOMENTUM, weight_decay=_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.steps)
    losses, accuracies = deque[float](maxlen=_RUNNING), deque[float](maxlen=_RUNNING)
    convergence = None
    for step in range(1, recipe.steps + 1):
        x, labels = measurer.batch(step - 1)
        leaves = inject(network, params, precision, gradients=True)
        result = engine.backward(engine.forward(network, x), leaves, labels)
        losses.append(result.loss)
        accuracies.append(100 * result.correct / len(labels))
        if not math.isfinite(result.loss):
            break
        for name, param in params.items():
            gradient = result.gradients.get(name)  # unused layers have none
            param.grad = None if gradient is None else gradient.to(param.dtype)
        torch.nn.utils.clip_grad_norm_(params.values(), _CLIP)
        optimizer.step()
        schedule.step()
        if convergence is None and len(accuracies) == _RUNNING and fmean(accuracies) >= recipe.target:
            convergence = step
    inject(network, params, precision)
    loss = fmean(losses)
    return convergence, loss if math.isfinite(loss) else math.inf


@torch.no_grad()
def _speed(network: nn.Module, x: Tensor) -> float:
    """Images a second of the processor's time, which other work disturbs less than the clock's."""
    network(x)  # compiles kernels
    times: list[float] = []
    for _ in range(_REPEATS):
        started = time.process_time()
        network(x)
        times.append(time.process_time() - started)
    return round(len(x) / max(min(times), 1e-9), 1)


def measure(
    architecture: Architecture,
    ghn: GHN,
    train: Images,
    validation: Images,
    recipe: Recipe | None = None,
) -> Measurement:
    """Measure one architecture on real images, on the CPU.

    Properties as in arXiv 2110.13100, section 5.3, but trained for `recipe.steps` steps: accuracy, accuracy
    under noise, speed and convergence, beside the accuracies with predicted weights.

    Args:
        architecture: Its own width counts unless the recipe has another.
        ghn: The hypernetwork that predicts weights.
        train: Images to train on.
        validation: Images to measure accuracies on; `ghn_init.training.hold_out` gives both.
        recipe: How to train and measure.

    Raises:
        TrainingError: Images that do not fit the recipe or the hypernetwork.
        ArchitectureError: The architecture does not take images of this size.
    """
    measurer = Measurer(ghn, train, validation, recipe)
    if (width := measurer.recipe.width) is not None:
        architecture = dataclasses.replace(architecture, C=width)
    return measurer(Candidate(-1, architecture))
