"""How architectures are measured, and what is found of one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch

from ghn_init._errors import ArchitectureError, ConfigError, TrainingError
from ghn_init.deepnets import Architecture

if TYPE_CHECKING:
    from collections.abc import Mapping

PRECISIONS: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Recipe:
    """How every architecture is measured; what two files of measurements must share to be comparable.

    Attributes:
        steps: Steps of SGD, from the architecture's own initialisation.
        batch_size: Images a step.
        lr: First learning rate; it falls to zero along half a cosine.
        target: Training accuracy in percent that counts for convergence, as the mean over 20 steps.
        images: Images on which accuracies are measured, held out from training; None: all.
        image_size: Side of the images that networks see, in pixels: that of the data or half of it.
        width: Channels of the first cell (`Architecture.C`); None: the architecture's own.
        precision: "float32" or "bfloat16", in which networks run.
        seed: Of initialisation, order and augmentation of the images, dropout and noise.

    Raises:
        ConfigError: A value that is not possible.
    """

    steps: int = 400
    batch_size: int = 64
    lr: float = 0.05
    target: float = 25.0
    images: int | None = 1000
    image_size: int = 32
    width: int | None = None
    precision: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        rules = (
            ("steps", self.steps >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 2, "at least 2: batch norms use the statistics of a batch"),
            ("lr", 0 < self.lr < math.inf, "positive and finite"),
            ("target", 0 < self.target < 100, "between 0 and 100"),
            ("precision", self.precision in PRECISIONS, f"one of {tuple(PRECISIONS)}"),
        )
        if wrong := [
            f"{name}={getattr(self, name)!r}, must be {rule}" for name, good, rule in rules if not good
        ]:
            raise ConfigError(f"cannot measure architectures: {'; '.join(wrong)}")


@dataclass(frozen=True)
class Measurement:
    """What was found of one architecture; accuracies are top-1 on held-out images, in percent.

    Attributes:
        index: Its place in the split; -1 where it was given without one.
        architecture: The architecture, at the width that was measured.
        params: Its parameters at the size of images that was measured.
        nodes: Nodes of its graph.
        predicted: Accuracy with predicted weights, never trained.
        predicted_noise: The same under Gaussian noise (deviation 0.08) on pixels from 0 to 1.
        trained: Accuracy after training.
        trained_noise: The same under noise.
        convergence: Steps until the training accuracy reached the target; None: it did not.
        speed: Images a second of the processor's time, forward only: one thread, batches of 64, the
            fastest of several.
        loss: Mean cross-entropy over the last 20 steps, infinite if training diverged.
        seconds: The processor's time that measuring took.
    """

    index: int
    architecture: Architecture
    params: int
    nodes: int
    predicted: float
    predicted_noise: float
    trained: float
    trained_noise: float
    convergence: int | None
    speed: float
    loss: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values: the architecture as in the published files, an infinite loss as null."""
        loss = self.loss if math.isfinite(self.loss) else None
        return {**vars(self), "loss": loss, "architecture": self.architecture.to_net_args()}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Measurement:
        """What `to_dict` wrote.

        Raises:
            TrainingError: A field is missing or unknown, or the architecture is none.
        """
        try:
            architecture = Architecture.from_net_args(values["architecture"])
            loss = math.inf if values["loss"] is None else values["loss"]
            return Measurement(**{**values, "architecture": architecture, "loss": loss})
        except (KeyError, TypeError, ArchitectureError) as error:
            raise TrainingError(f"not a measurement ({error!r})") from error
