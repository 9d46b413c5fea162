"""Training a GHN on images and DeepNets-1M, and measuring what it predicts.

Not loaded by `import ghn_init`; reading images needs the `train` extra.
"""

from __future__ import annotations

from ghn_init.training._config import TrainConfig
from ghn_init.training._curve import draw_curve
from ghn_init.training._reading import load_images
from ghn_init.training._run import RunOptions
from ghn_init.training._transfer import LowShot, TransferConfig, transfer
from ghn_init.training.data import Images, Normalisation, hold_out
from ghn_init.training.evaluate import Score, evaluate
from ghn_init.training.trainer import Trainer

__all__ = [
    "Images",
    "LowShot",
    "Normalisation",
    "RunOptions",
    "Score",
    "TrainConfig",
    "Trainer",
    "TransferConfig",
    "draw_curve",
    "evaluate",
    "hold_out",
    "load_images",
    "transfer",
]
