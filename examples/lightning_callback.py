"""Predicted weights as a Lightning callback: the network is initialised when a fit starts.

Run: `pip install pytorch-lightning && python examples/lightning_callback.py`
"""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

import ghn_init

try:
    import pytorch_lightning as pl
except ImportError:
    print("pytorch-lightning is not installed, so there is nothing to show: pip install pytorch-lightning")
    sys.exit()

if TYPE_CHECKING:
    from ghn_init import Plan


class PredictedWeights(pl.Callback):
    """Replace the random initialisation of one network by predicted weights.

    It works on every rank alike, without communication: before DDP wraps the network and before FSDP
    shards it. A fit that resumes from a checkpoint keeps the checkpoint's weights.

    Args:
        network: Name of the network in the LightningModule, e.g. "net"; "" for the LightningModule itself.
        options: Keyword arguments of `ghn_init.plan`.
    """

    def __init__(self, network: str = "net", **options: Any) -> None:
        self.network = network
        self.options = options
        self.plan: Plan | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Predict once, before the optimizers and the strategy see the parameters."""
        if stage == "fit" and trainer.ckpt_path is None and self.plan is None:
            self.plan = ghn_init.plan(pl_module.get_submodule(self.network), **self.options)
            self.plan.apply()


class Classifier(pl.LightningModule):
    """A classifier of CIFAR-10-sized images."""

    def __init__(self) -> None:
        super().__init__()
        self.net: nn.Module = resnet18(num_classes=10)

    def training_step(self, batch: tuple[Tensor, Tensor], _index: int) -> Tensor:
        """Cross-entropy of one batch of images (n, 3, 32, 32) and labels (n,)."""
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.01)


def main() -> None:
    warnings.simplefilter("ignore")  # Lightning's advice about workers and loggers
    images, labels = torch.randn(64, 3, 32, 32), torch.randint(10, (64,))
    callback = PredictedWeights("net")
    trainer = pl.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[callback],
    )  # fmt: skip
    trainer.fit(Classifier(), DataLoader(TensorDataset(images, labels), batch_size=32))

    assert callback.plan is not None
    for action, (parameters, elements) in callback.plan.counts().items():
        print(f"{action:9} {parameters:3} parameters, {elements:11,} elements")
    print("trained for", trainer.global_step, "steps from predicted weights")


if __name__ == "__main__":
    main()
