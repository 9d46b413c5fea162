"""A hypernetwork around a graph network of your own: make it, train it, save it, load it, predict.

Any module with the signature of `Convolutions.forward` can be assigned to `GHN.gnn`. This one is made of
torch_geometric's layers (`pip install torch_geometric`).
Run: `python examples/custom_graph_network.py`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.nn import GraphConv

import ghn_init
from ghn_init.training import Images, RunOptions, TrainConfig, Trainer


class Convolutions(nn.Module):
    """Residual graph convolutions, against and along virtual edges, which count 1 / length."""

    def __init__(self, config: ghn_init.GHNConfig, layers: int = 3, longest: int = 8) -> None:
        super().__init__()
        self.longest = longest
        self.onward = nn.ModuleList(GraphConv(config.hid, config.hid) for _ in range(layers))
        self.back = nn.ModuleList(GraphConv(config.hid, config.hid) for _ in range(layers))

    def forward(self, h: Tensor, batch: ghn_init.GraphBatch) -> Tensor:
        """Features (R, d) of the nodes of all graphs of a batch to new ones (R, d)."""
        ends, lengths = batch.edges(self.longest)
        weights = 1 / lengths.to(h.dtype)
        for onward, back in zip(self.onward, self.back, strict=True):
            h = h + F.relu(onward(h, ends, weights)) + F.relu(back(h, ends.flip(0), weights))
        return h


def random_images(count: int) -> Images:
    """Noise in ten classes, in the place of a data set."""
    pixels = torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8)
    return Images(pixels, torch.arange(count) % 10, tuple("abcdefghij"))


def custom(config: ghn_init.GHNConfig) -> ghn_init.GHN:
    """A hypernetwork with this graph network, not trained."""
    ghn = ghn_init.GHN(config)
    ghn.gnn = Convolutions(config)
    return ghn


def main() -> None:
    torch.manual_seed(0)
    config = ghn_init.GHNConfig(hid=16)
    training = TrainConfig(
        ghn=config, steps=3, meta_batch=2, batch_size=16, max_params=1.5, max_nodes=200, prefetch=0
    )
    with tempfile.TemporaryDirectory() as folder:
        options = RunOptions(output=Path(folder), validation_networks=2, validation_images=32)
        trainer = Trainer(training, random_images(64), random_images(64), options, start=custom(config))
        trainer.run(lambda record: print(f"step {record.step}: loss {record.loss:.3f}"))

        ghn = custom(config)
        load_model(ghn, Path(folder) / "ghn" / "model.safetensors")

    model = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)
    )
    ghn_init.predict(model, weights=ghn)
    print(f"predicted weights: mean square {next(model.parameters()).square().mean().item():.4f}")


if __name__ == "__main__":
    main()
