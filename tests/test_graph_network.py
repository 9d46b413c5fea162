"""A graph network of the user's own in the gated network's place: made, trained, saved and loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_model
from torch import Tensor, nn

import ghn_init
from ghn_init import GHN, CheckpointError, ConfigError, GHNConfig, GraphBatch
from ghn_init.training import RunOptions, Trainer
from training_runs import TINY_GHN, random_images, tiny_config

if TYPE_CHECKING:
    from ghn_init import Graph


class Sums(nn.Module):
    """One layer on the sums of neighbours, which counts its calls."""

    def __init__(self, config: GHNConfig) -> None:
        super().__init__()
        self.layer = nn.Linear(config.hid, config.hid)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.calls: Tensor

    def forward(self, h: Tensor, batch: GraphBatch) -> Tensor:
        self.calls += 1
        (source, target), _ = batch.edges()
        return h + self.layer(torch.zeros_like(h).index_add(0, target, h[source]))


def config(**changes: Any) -> GHNConfig:
    return GHNConfig.from_dict({**TINY_GHN, **changes})


def with_network(gnn: nn.Module | None = None, **changes: Any) -> GHN:
    """A GHN with a graph network assigned."""
    ghn = GHN(config(**changes))
    ghn.gnn = gnn or Sums(ghn.config)
    return ghn


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
    )


@pytest.fixture
def graph() -> Graph:
    return ghn_init.trace(network(), (1, 3, 8, 8))


def test_edges_of_a_batch_are_those_of_its_graphs(graph: Graph) -> None:
    deeper = ghn_init.trace(nn.Sequential(nn.Conv2d(3, 3, 1), network()), (1, 3, 8, 8))
    graphs = [graph, deeper]
    batch = GraphBatch.from_graphs(graphs, config())
    ends, lengths = batch.edges()
    expected = {(rows[u], rows[v]) for g, rows in zip(graphs, batch.nodes, strict=True) for u, v in g.edges}
    assert set(map(tuple, ends.T.tolist())) == expected
    assert set(lengths.tolist()) == {1}
    ends, lengths = batch.edges(longest=3)
    virtual = {
        (rows[u], rows[v]): int(g.distances[u, v])
        for g, rows in zip(graphs, batch.nodes, strict=True)
        for u, v in np.argwhere((g.distances > 0) & (g.distances <= 3))
    }
    assert dict(zip(map(tuple, ends.T.tolist()), lengths.tolist(), strict=True)) == virtual


def test_the_network_is_what_maps_the_features(graph: Graph) -> None:
    gnn = Sums(config())
    ghn = with_network(gnn, layernorm=False)
    batch = ghn.batch(graph)
    torch.testing.assert_close(ghn.encode(batch), gnn(ghn.node_features(batch), batch))
    loss = sum(value.square().sum() for value in ghn(graph)[0].values())
    loss.backward()
    assert gnn.layer.weight.grad is not None
    assert gnn.layer.weight.grad.abs().max() > 0


def test_features_of_another_shape_are_refused(graph: Graph) -> None:
    class Narrow(nn.Module):
        def forward(self, h: Tensor, batch: GraphBatch) -> Tensor:
            return h[:, :2]

    ghn = with_network(Narrow())
    with pytest.raises(ConfigError, match=r"network Narrow made features of shape \(\d+, 2\) .* \(\d+, 8\)"):
        ghn(graph)


def test_saved_weights_are_read_into_a_ghn_with_the_network(graph: Graph, tmp_path: Path) -> None:
    ghn = with_network().eval()
    expected = ghn(graph)[0]
    ghn.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"not the weights of a GHN .*: gnn\.\S+ is missing"):
        ghn_init.load(tmp_path)
    loaded = with_network().eval()
    load_model(loaded, tmp_path / "model.safetensors")
    torch.testing.assert_close(loaded(graph)[0], expected, rtol=0, atol=0)
    assert loaded.gnn.calls == 2  # a buffer of integers: called once before it was saved, once here


def test_predict_takes_a_ghn_around_it() -> None:
    model, ghn = network(), with_network().eval()
    expected = ghn(ghn_init.trace(model))[0]
    ghn_init.predict(model, weights=ghn, scale="predicted")
    torch.testing.assert_close(
        dict(model.named_parameters())["0.weight"].detach(), expected["0.weight"].detach()
    )


def test_training_starts_from_a_ghn_around_it(tmp_path: Path) -> None:
    start = with_network()
    first = start.gnn.layer.weight.detach().clone()
    training, images = tiny_config(steps=2, ghn=start.config.to_dict()), random_images(64)
    options = RunOptions(output=tmp_path, validation_networks=1, validation_images=8)
    trainer = Trainer(training, images, images, options, start=start)
    trainer.run()
    assert isinstance(trainer.ghn.gnn, Sums)
    assert not torch.equal(trainer.ghn.gnn.layer.weight, first)
    assert torch.equal(start.gnn.layer.weight, first)
    load_model(start, tmp_path / "ghn" / "model.safetensors")
    assert not torch.equal(start.gnn.layer.weight, first)


@pytest.mark.source
def test_the_example_runs() -> None:
    script = Path(__file__).parent.parent / "examples" / "custom_graph_network.py"
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "step 3: loss" in done.stdout
    assert "predicted weights: mean square 0.0" in done.stdout
