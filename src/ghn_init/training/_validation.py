"""Quick validations during a run: a few held-out architectures on a few held-out images."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import replace
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, Final

import torch

from ghn_init.deepnets import Architecture, DeepNets1M
from ghn_init.training.evaluate import Measure

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ghn_init._weights.ghn import GHN
    from ghn_init.training.data import Images, Normalisation

_NORM_FREE: Final = 4
"""One in so many validation networks is measured without its batch norms as well."""


class Validation:
    """Accuracy of the first `networks` validation architectures that take images of the size trained on.

    Args:
        images: Held-out images, of which the first ones of an even spread are taken.
        normalise: The normalisation that the GHN is trained with.
        networks: Number of architectures; a quarter of them is measured without batch norms, too.
        count: Number of images.
        image_size: Side of the images that networks see.
    """

    def __init__(
        self, images: Images, normalise: Normalisation, networks: int, count: int, image_size: int
    ) -> None:
        self.images, self.normalise, self.count, self.image_size = images, normalise, count, image_size
        split = DeepNets1M("val")
        fitting = (arch for index in range(len(split)) if (arch := split[index]).supports(image_size))
        self.architectures = [a for a in itertools.islice(fitting, networks) if isinstance(a, Architecture)]

    def __call__(self, ghn: GHN, precision: torch.dtype) -> dict[str, Any]:
        """Figures for the log."""
        started = time.monotonic()
        measure = Measure(
            ghn, self.images, images=self.count, normalise=self.normalise, precision=precision,
            image_size=self.image_size,
        )  # fmt: skip
        accuracies = [self._accuracy(measure, arch) for arch in self.architectures]
        with_norm = [
            (arch.transformer, value)
            for arch, value in zip(self.architectures, accuracies, strict=True)
            if arch.norm is not None
        ]
        few = self.architectures[: math.ceil(len(self.architectures) / _NORM_FREE)]
        mean, error = _mean_and_error(accuracies)
        return {
            "validation": mean,
            "standard_error": error,
            "maximum": round(max(accuracies), 2),
            **_figures("convolutional", [value for transformer, value in with_norm if not transformer]),
            **_figures("transformers", [value for transformer, value in with_norm if transformer]),
            **_figures("norm_free", [self._accuracy(measure, replace(arch, norm=None)) for arch in few]),
            "accuracies": [round(value, 1) for value in accuracies],
            "validation_seconds": round(time.monotonic() - started, 1),
        }

    def _accuracy(self, measure: Measure, architecture: Architecture) -> float:
        with torch.device("meta"):
            network = architecture.build(measure.ghn.config.num_classes, self.image_size)
        return measure(network)


def _figures(title: str, accuracies: Sequence[float]) -> dict[str, Any]:
    """Mean and standard error over the networks under one title; nothing where there are none."""
    if not accuracies:
        return {}
    mean, error = _mean_and_error(accuracies)
    return {title: mean, f"{title}_error": error}


def _mean_and_error(accuracies: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error, in percent; the error of one network is 0."""
    error = stdev(accuracies) / math.sqrt(len(accuracies)) if len(accuracies) > 1 else 0.0
    return round(fmean(accuracies), 2), round(error, 2)
