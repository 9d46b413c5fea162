"""Learning rate over a run."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ghn_init.training._config import TrainConfig


def progress(config: TrainConfig, step: int, seconds: float) -> float:
    """How much of the run is over, 0 to 1, after `step` steps and `seconds` of training."""
    done = step / config.steps if config.steps else seconds / (config.duration or 1.0)
    return min(done, 1.0)


def learning_rate(config: TrainConfig, step: int, seconds: float) -> float:
    """The learning rate of step `step` (from 0) that begins after `seconds` of training.

    "cosine" and "linear" are zero at the last step of a run of `steps`; of a run of `duration` nobody
    knows which step is the last, so they end as low as one step's part of the run.
    """
    last = config.steps and max(config.steps - 1, 1)
    done = min(step / last, 1.0) if last else progress(config, step, seconds)
    factor = {
        "constant": 1.0,
        "step": 10.0 ** -((done >= 2 / 3) + (done >= 5 / 6)),
        "cosine": 0.5 * (1 + math.cos(math.pi * done)),
        "linear": 1 - done,
    }[config.schedule]
    return config.lr * min(1.0, (step + 1) / max(config.warmup, 1)) * factor
