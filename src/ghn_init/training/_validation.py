"""Quick validations during a run: a few held-out architectures on a few held-out images."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from ghn_init.training.evaluate import evaluate

if TYPE_CHECKING:
    import torch

    from ghn_init._hypernetwork.model import GHN
    from ghn_init.training.data import Images, Normalisation


class Validation:
    """Accuracy of the first `networks` validation architectures on `count` of the images."""

    def __init__(self, images: Images, normalise: Normalisation, networks: int, count: int) -> None:
        self.images, self.normalise, self.networks, self.count = images, normalise, networks, count

    def __call__(self, ghn: GHN, precision: torch.dtype) -> dict[str, Any]:
        """Figures for the log."""
        started = time.monotonic()
        score = evaluate(
            ghn, "val", self.images, n=self.networks, images=self.count,
            normalise=self.normalise, precision=precision,
        )  # fmt: skip
        return {
            "validation": round(score.mean, 2),
            "standard_error": round(score.standard_error, 2),
            "maximum": round(score.maximum, 2),
            "accuracies": [round(value, 1) for value in score.accuracies],
            "validation_seconds": round(time.monotonic() - started, 1),
        }
