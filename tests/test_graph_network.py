"""A graph network of the user's own in the gated network's place: made, trained, saved and loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import ghn_init
from ghn_init import GHN, CheckpointError, ConfigError, GHNConfig, GraphBatch
from ghn_init.cli import app
from ghn_init.training._scaled_init import init_for_training
from training_runs import TINY_GHN, random_images, tiny_config

if TYPE_CHECKING:
    from ghn_init import Graph

NAME = "my_networks:Sums"


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
    return GHNConfig.from_dict({**TINY_GHN, "hypernet": NAME, **changes})


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
    ghn = GHN(config(layernorm=False), gnn=gnn)
    batch = ghn.batch(graph)
    torch.testing.assert_close(ghn.encode(batch), gnn(ghn.node_features(batch), batch))
    loss = sum(value.square().sum() for value in ghn(graph)[0].values())
    loss.backward()
    assert gnn.layer.weight.grad is not None
    assert gnn.layer.weight.grad.abs().max() > 0


def test_a_network_is_given_exactly_where_the_configuration_names_one() -> None:
    with pytest.raises(ConfigError, match=r"network hypernet='my_networks:Sums' is not part .* gnn=module"):
        GHN(config())
    with pytest.raises(ConfigError, match=r"hypernet='gatedgnn' and a Sums .* leave the module out"):
        GHN(GHNConfig.from_dict(TINY_GHN), gnn=Sums(config()))
    with pytest.raises(ConfigError, match="expected only one of them"):
        ghn_init.load(GHN(GHNConfig.from_dict(TINY_GHN)), gnn=Sums(config()))


@pytest.mark.parametrize("name", ["", "gcn", ":Net", "module:", "module:not a name", 3])
def test_names_of_networks(name: Any) -> None:
    with pytest.raises(ConfigError, match="MODULE:CLASS of a graph network of your own"):
        config(hypernet=name)


def test_features_of_another_shape_are_refused(graph: Graph) -> None:
    class Narrow(nn.Module):
        def forward(self, h: Tensor, batch: GraphBatch) -> Tensor:
            return h[:, :2]

    ghn = GHN(config(), gnn=Narrow())
    with pytest.raises(ConfigError, match=r"network Narrow made features of shape \(\d+, 2\) .* \(\d+, 8\)"):
        ghn(graph)


def test_saved_weights_say_what_they_need(graph: Graph, tmp_path: Path) -> None:
    ghn = GHN(config(), gnn=Sums(config())).eval()
    expected = ghn(graph)[0]
    ghn.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["hypernet"] == NAME
    assert f"{NAME} is not part of ghn-init" in (tmp_path / "README.md").read_text()
    with pytest.raises(
        ConfigError, match=r"model\.safetensors: .*'my_networks:Sums' is not part of ghn-init"
    ):
        ghn_init.load(tmp_path)
    given = Sums(config())
    for loaded in (ghn_init.load(tmp_path, gnn=given), GHN.from_pretrained(tmp_path, gnn=Sums(config()))):
        torch.testing.assert_close(loaded(graph)[0], expected, rtol=0, atol=0)
        assert loaded.gnn.calls == 2  # a buffer of integers: called once before it was saved, once here
    assert ghn_init.load(tmp_path, gnn=given).gnn is given


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    GHN(config(), gnn=Sums(config())).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"gnn\.weight is missing; .*gnn\.layer\.weight is unknown"):
        ghn_init.load(tmp_path, gnn=nn.Linear(8, 8))
    published = dict(list(GHNConfig().to_dict().items())[:8])
    torch.save({"state_dict": {}, "config": published}, tmp_path / "weights.pt")
    with pytest.raises(ConfigError, match=r"weights\.pt: .*hypernet='gatedgnn' and a Sums"):
        ghn_init.load(tmp_path / "weights.pt", gnn=Sums(config()))


def test_predict_takes_a_ghn_around_it() -> None:
    model, ghn = network(), GHN(config(), gnn=Sums(config())).eval()
    expected = ghn(ghn_init.trace(model))[0]
    ghn_init.predict(model, weights=ghn)
    torch.testing.assert_close(
        dict(model.named_parameters())["0.weight"].detach(), expected["0.weight"].detach()
    )


def test_scaled_first_weights_keep_the_network(graph: Graph) -> None:
    ghn = GHN(config(), gnn=Sums(config()))
    before = ghn.gnn.layer.weight.detach().clone()
    init_for_training(ghn, [graph], seed=3)
    assert torch.equal(ghn.gnn.layer.weight, before)
    blocks = [values.flatten() for values in ghn.blocks(ghn.batch(graph), raw=True)]
    assert blocks[0].square().mean().sqrt().item() == pytest.approx(1, rel=0.2)


def test_the_command_trains_a_network_in_a_file(tmp_path: Path) -> None:
    """Stopped once, then to the end."""
    images = random_images(5_048)  # 5,000 are held out
    arrays = {
        "train_images": images.pixels.permute(0, 2, 3, 1).numpy(),
        "train_labels": images.labels.numpy(),
    }
    np.savez(tmp_path / "set.npz", **arrays, classes=np.array(images.classes))
    source = Path(__file__).read_text()
    body = source[source.index("class Sums") : source.index("def config(")]
    head = "import torch\nfrom torch import Tensor, nn\nfrom ghn_init import GHNConfig, GraphBatch\n\n\n"
    (tmp_path / "mine.py").write_text(head + body)
    values = tiny_config(steps=2, ghn=config(hypernet=f"{tmp_path / 'mine.py'}:Sums").to_dict()).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(values))
    arguments = ["train", str(tmp_path / "set.npz"), "--config", str(tmp_path / "config.json")]
    arguments += ["-o", str(tmp_path / "run"), "--validation-networks", "1", "--validation-images", "8"]
    for message in ("stopped; run again", "done: step 2, 4 networks"):
        done = CliRunner().invoke(app, [*arguments, "--time-limit", "0"])
        assert done.exit_code == 0, done.output
        assert message in done.output
    given = Sums(config())
    first = given.layer.weight.detach().clone()
    trained = ghn_init.load(tmp_path / "run" / "ghn", gnn=given)
    assert not torch.equal(trained.gnn.layer.weight, first)


@pytest.mark.source
def test_the_example_runs() -> None:
    script = Path(__file__).parent.parent / "examples" / "custom_graph_network.py"
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "step 3: loss" in done.stdout
    assert "is not part of ghn-init" in done.stdout
    assert "predicted weights: mean square 0.0" in done.stdout
