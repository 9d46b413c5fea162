"""GHN-3's graph network and what goes with it, each part against plain arithmetic."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from typer.testing import CliRunner

from ghn_init import GHN, ConfigError, GHNConfig, Graph, Node, load
from ghn_init._graph.graph import graph_from_edges
from ghn_init._hypernetwork import decoder, transformer
from ghn_init._hypernetwork.batch import KINDS, GraphBatch
from ghn_init._hypernetwork.decoder import _PartLinear, _places_linear
from ghn_init._hypernetwork.gates import without_gate_poolings
from ghn_init._hypernetwork.transformer import Transformer
from ghn_init.cli import app
from ghn_init.training._scaled_init import VECTOR_RMS, init_for_training
from test_model import random_graph, renumbered
from training_runs import random_images, tiny_config, tiny_trainer

if TYPE_CHECKING:
    from pathlib import Path

TINY = {"hid": 8, "layers": 2, "heads": 2, "num_classes": 5, "max_shape": (3, 4, 4, 4)}


def config(**changes: Any) -> GHNConfig:
    return GHNConfig.ghn3("t", **{**TINY, **changes})


# Configuration


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (GHNConfig.ghn3("t"), 6_906_632),
        (GHNConfig.ghn3("s"), 35_810_368),
        (GHNConfig.ghn3("l"), 214_668_960),
        (GHNConfig.ghn3("xl"), 654_365_184),
        (GHNConfig.ghn3("t", 10, max_shape=(64, 64, 11, 11)), 4_531_500),
    ],
)
def test_parameter_counts_are_the_published_ones(config: GHNConfig, count: int) -> None:
    with torch.device("meta"):
        assert sum(values.numel() for values in GHN(config).parameters()) == count


def test_heads_have_to_divide_the_width() -> None:
    with pytest.raises(ConfigError, match="heads=3 for hid=8; expected a divisor of hid"):
        config(heads=3)
    with pytest.raises(ConfigError, match="heads=0; expected an integer >= 1"):
        config(heads=0)
    with pytest.raises(ConfigError, match="GHN-3 of size 'm'; expected one of t, s, l, xl"):
        GHNConfig.ghn3("m")  # type: ignore[arg-type]
    assert GHNConfig(heads=3).heads == 3  # means nothing to a gated network


def test_published_configurations_say_gated_and_mean_the_transformer() -> None:
    values = {"max_shape": [3, 4, 4, 4], "num_classes": 5, "hid": 8, "hypernet": "gatedgnn"}
    found = GHNConfig.from_published(values, transformer=True)
    assert found == config(layers=3, heads=8, weight_norm=False, ve=False, layernorm=False)
    told = {"weight_norm": True, "ve": True, "layernorm": True, "layers": 2, "heads": 2, "is_ghn2": False}
    assert GHNConfig.from_published(values | told, transformer=True) == config()
    with pytest.raises(ConfigError, match="is_ghn2=True and a transformer's tensors"):
        GHNConfig.from_published(values | {"is_ghn2": True}, transformer=True)
    with pytest.raises(ConfigError, match="published file lacks hid"):
        GHNConfig.from_published({"max_shape": [3, 4, 4, 4], "num_classes": 5}, transformer=True)
    with pytest.raises(ConfigError, match="unknown dropout"):
        GHNConfig.from_published(values | {"dropout": 0.1}, transformer=True)


def test_a_gated_network_may_have_the_newer_form_of_configuration() -> None:
    values = {key: value for key, value in GHNConfig.imagenet().to_dict().items() if key not in TINY}
    values = {key: values[key] for key in ("hypernet", "decoder", "weight_norm", "ve", "layernorm")}
    values |= {"max_shape": (64, 64, 16, 16), "num_classes": 1000, "hid": 32}
    more = {"layers": 3, "heads": 8, "is_ghn2": True}
    assert GHNConfig.from_published(values | more) == GHNConfig.imagenet()


# The transformer


def by_the_book(network: Transformer, h: Tensor, graph: Graph) -> Tensor:
    """Every node, pair and head by itself (arXiv 2303.04143); h (n, d) in the graph's order."""
    n, d = h.shape
    first: Any = network[0]
    edge, project, heads = first.attn.edge_embed.embed.weight, first.attn.proj_e, first.attn.heads
    steps = graph.distances.astype(int)
    bias = torch.stack([
        project(torch.cat([edge[steps[u, v] + 2], edge[steps[v, u] + 2]])) for u in range(n) for v in range(n)
    ]).view(n, n, heads)  # fmt: skip
    for layer in network:
        query, key, value = layer.attn.to_qkv(layer.ln1(h)).split(d, dim=1)
        mixed = []
        for u in range(n):
            for head in range(heads):
                part = slice(head * d // heads, (head + 1) * d // heads)
                logits = key[:, part] @ query[u, part] / math.sqrt(d / heads) + bias[u, :, head]
                mixed.append(logits.softmax(0) @ value[:, part])
        h = h + layer.attn.to_out[0](torch.cat(mixed).view(n, d))
        h = h + layer.ff.net[3](F.gelu(layer.ff.net[0](layer.ln2(h))))
    return h


@pytest.mark.parametrize("pairs", [transformer._PAIRS, 40], ids=["whole", "in parts"])
def test_the_transformer_and_its_gradient_go_by_the_book(pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformer, "_PAIRS", pairs)
    network = Transformer(config()).double()
    graph = random_graph(3, length=14)
    batch = GraphBatch.from_graphs([graph], config())
    rows = list(batch.nodes[0])
    h = torch.randn(len(graph), 8, dtype=torch.double, requires_grad=True)
    weights = torch.randn(len(graph), 8, dtype=torch.double)
    inputs = [h, *network.parameters()]
    expected = by_the_book(network, h, graph)
    expected_grads = torch.autograd.grad((expected * weights).sum(), inputs)
    found = network(torch.empty_like(h).index_copy(0, torch.tensor(rows), h), batch)[rows]
    grads = torch.autograd.grad((found * weights).sum(), inputs)
    torch.testing.assert_close(found, expected)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad)


def test_transformer_passes_gradcheck_on_a_batch() -> None:
    network = Transformer(config(hid=4, layers=1)).double()
    batch = GraphBatch.from_graphs([random_graph(0, 5), random_graph(1, 4)], config())
    names = [name for name, _ in network.named_parameters()]
    h = torch.randn(len(batch.types), 4, dtype=torch.double, requires_grad=True)

    def run(h: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(network, dict(zip(names, values, strict=True)), (h, batch))

    assert torch.autograd.gradcheck(run, (h, *network.parameters()))


def test_gradients_reach_every_parameter() -> None:
    ghn = GHN(config())
    sum(values.square().sum() for values in ghn([random_graph(0), random_graph(1)])[0].values()).backward()
    dead = [name for name, values in ghn.named_parameters() if values.grad is None or not values.grad.any()]
    assert dead == []


def test_predictions_do_not_depend_on_the_numbering() -> None:
    ghn = GHN(config()).double()
    graph = random_graph(5)
    other, (expected,) = renumbered(graph, 1), ghn(graph)
    assert other.nodes != graph.nodes
    (found,) = ghn(other)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values)


def test_a_batch_predicts_what_its_graphs_alone_do() -> None:
    ghn = GHN(config()).double()
    graphs = [random_graph(seed, length) for seed, length in enumerate((12, 5, 17))]
    for graph, found in zip(graphs, ghn(graphs), strict=True):
        (alone,) = ghn(graph)
        assert found.keys() == alone.keys()
        for name, values in alone.items():
            torch.testing.assert_close(found[name], values)


def test_without_virtual_edges_only_real_ones_are_seen() -> None:
    nodes = [Node("input"), *[Node("sum")] * 3]
    chain = graph_from_edges(nodes, list(pairwise(range(4))))
    for ve, distances, steps in ((True, [0, 1, 2, 3], 7), (False, [0, 1, 0, 0], 3)):
        ghn = GHN(config(ve=ve))
        batch = ghn.batch(chain)
        assert batch.degrees[:, 2].tolist() == distances
        (path_bias,) = ghn.gnn.biases(batch)
        ((_, bias),) = path_bias.parts()
        assert len({tuple(pair) for pair in bias.flatten(1).T.tolist()}) == steps


def test_the_features_see_degrees_and_distances() -> None:
    nodes = [Node("input"), *[Node("sum")] * 120, Node("concat")]
    fan = [(0, v) for v in range(1, 121)] + [(v, 121) for v in range(1, 121)]
    batch = GraphBatch.from_graphs([graph_from_edges(nodes, fan)], config())
    assert batch.degrees.tolist() == [[0, 100, 0], *[[1, 1, 1]] * 120, [100, 0, 2]]
    chain = GraphBatch.from_graphs(
        [graph_from_edges([Node("input"), *[Node("sum")] * 59], list(pairwise(range(60))))], config()
    )
    assert chain.degrees[:, 2].tolist() == [*range(51), *[0] * 9]


# The poolings inside gates


def gated_block(*, beside: bool = False) -> Graph:
    """input, conv, pooling, weight and bias of the gate, product, pooling, classifier."""
    nodes = [
        Node("input"), Node("conv", "a", (8, 3, 1, 1)), Node("glob_avg"), Node("conv", "b", (8, 8, 1, 1)),
        Node("bias", "c", (8,)), Node("cse"), Node("glob_avg"), Node("conv", "d", (5, 8)),
    ]  # fmt: skip
    edges = [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (1, 5), (5, 6), (6, 7)]
    return graph_from_edges(nodes, edges + ([(2, 7)] if beside else []))


def test_the_pooling_inside_a_gate_is_left_out() -> None:
    whole = replace(gated_block(), rectified=frozenset({7}), absolute=frozenset({7}), name="a network")
    graph = without_gate_poolings(whole)
    assert (graph.name, graph.rectified, graph.absolute) == ("a network", frozenset(), frozenset())
    assert [node.type for node in graph.nodes] == ["input", "conv", "conv", "bias", "cse", "glob_avg", "conv"]
    assert graph.edges == ((0, 1), (1, 2), (1, 4), (2, 3), (3, 4), (4, 5), (5, 6))
    assert GHN(config()).batch(gated_block()).num_nodes == (7,)
    assert GHN(GHNConfig.ghn2()).batch(gated_block()).num_nodes == (8,)


def test_poolings_outside_gates_stay() -> None:
    graph = gated_block(beside=True)
    assert without_gate_poolings(graph) == graph
    plain = graph_from_edges([Node("input"), Node("glob_avg"), Node("conv", "a", (5, 3))], [(0, 1), (1, 2)])
    assert without_gate_poolings(plain) is plain


# Decoding


@pytest.mark.parametrize(
    ("size", "places"), [(1, [8]), (2, [7, 8]), (3, [7, 8, 9]), (7, [*range(5, 12)]), (14, [*range(1, 15)]),
                         (16, [*range(16)])],
)  # fmt: skip
def test_kernels_are_the_middle_of_what_is_decoded(size: int, places: list[int]) -> None:
    whole = {"num_classes": 5, "hid": 8, "heads": 2, "max_shape": (2, 2, 16, 16)}
    ghn = GHN(GHNConfig.ghn3("t", **whole))
    x = torch.randn(1, 8)
    every, part = ghn.decoder.features([x, x], [(16, 16), (size, 1)])
    torch.testing.assert_close(part, every[:, places][:, :, [8]])


def test_places_of_several_kernels_have_the_gradients_that_autograd_gives() -> None:
    weight, bias = (torch.randn(shape, requires_grad=True) for shape in ((5, 5, 3, 2), (5, 5, 3)))
    inputs = [torch.randn(n, 2, requires_grad=True) for n in (4, 1)]
    spans = [(slice(1, 4), slice(0, 5)), (slice(2, 3), slice(2, 4))]
    found = _PartLinear.apply(_places_linear, weight, bias, spans, *inputs)
    whole = [torch.einsum("nd,hwcd->nhwc", x, weight) + bias for x in inputs]
    wanted = [x[:, rows, columns] for x, (rows, columns) in zip(whole, spans, strict=True)]
    torch.testing.assert_close(found, tuple(wanted))
    weights = [torch.randn_like(x) for x in wanted]
    leaves = [weight, bias, *inputs]
    ours, theirs = (torch.autograd.grad(list(values), leaves, weights) for values in (found, wanted))
    torch.testing.assert_close(ours, theirs)


def test_larger_kernels_are_interpolated_along_the_axes_that_are_too_long() -> None:
    ghn = GHN(config(weight_norm=False))
    shapes = {"square": (3, 4, 9, 9), "wide": (3, 4, 1, 7), "long": (3, 4, 7), "fits": (3, 4, 4, 4)}
    nodes = [Node("input"), *(Node("conv", name, shape) for name, shape in shapes.items()), Node("sum")]
    graph = graph_from_edges(nodes, [(0, v) for v in range(1, 5)] + [(v, 5) for v in range(1, 5)])
    batch = ghn.batch(graph)
    features = ghn.encode(batch)
    (found,) = ghn(graph)
    for index, (name, shape) in enumerate(shapes.items(), 1):
        x = features[batch.nodes[0][index]][None]
        kernel = (4 if name in ("square", "fits") else 1, 4)
        (hidden,) = ghn.decoder.features([x], [kernel])
        last: Any = ghn.decoder.conv[2]
        small = F.conv2d(hidden.permute(0, 3, 1, 2), last.weight, last.bias).view(3, 4, *kernel)
        size = (1, *shape[2:]) if len(shape) == 3 else shape[2:]
        wanted = small if name == "fits" else F.interpolate(small, size, mode="bilinear")
        torch.testing.assert_close(found[name], wanted.view(shape))


def test_positional_encodings_of_three_dimensions_are_not_normalised() -> None:
    for channels, shape in ((12, (1, 5, 12)), (11, (1, 5, 11))):
        node = Node("pos_enc", "p", shape)
        graph = graph_from_edges([Node("input"), node, Node("sum")], [(0, 2), (1, 2)])
        assert GraphBatch.from_graphs([graph], config()).scales.tolist() == [1.0]
        gated = GraphBatch.from_graphs([graph], GHNConfig()).scales.item()
        assert gated == pytest.approx(math.sqrt(2 / (channels * 4)))


# Training


def test_initial_predictions_have_the_wanted_spread() -> None:
    ghn = GHN(config(num_classes=10))
    graphs = [random_graph(seed, 30, classes=10) for seed in range(4)]
    init_for_training(ghn, graphs, seed=3)
    batch = ghn.batch(graphs)
    squares: dict[str, list[Tensor]] = {}
    for values, group in zip(ghn.blocks(batch, raw=True), batch.groups, strict=True):
        squares.setdefault(KINDS[group.key.kind], []).append(values.detach().square().flatten())
    rms = {kind: torch.cat(parts).mean().sqrt().item() for kind, parts in squares.items()}
    wanted = dict.fromkeys(KINDS, VECTOR_RMS) | {"weight": 1.0, "class_weight": 1.0}
    assert rms == pytest.approx(wanted, rel=1e-3)


def test_names_are_the_published_ones() -> None:
    names = {name for name, _ in GHN(config()).named_parameters()}
    layers = {
        f"gnn.{layer}.{name}" for layer in range(2) for name in (
            "ln1.weight", "ln1.bias", "attn.to_qkv.weight", "attn.to_out.0.weight", "attn.to_out.0.bias",
            "ln2.weight", "ln2.bias", "ff.net.0.weight", "ff.net.0.bias", "ff.net.3.weight", "ff.net.3.bias",
        )
    }  # fmt: skip
    first = {
        f"gnn.0.attn.{name}" for name in (
            "edge_embed.embed.weight", "proj_e.0.weight", "proj_e.0.bias", "proj_e.2.weight", "proj_e.2.bias",
        )
    }  # fmt: skip
    tables = {
        f"{name}.weight" for name in ("centrality_embed_in", "centrality_embed_out", "input_dist_embed")
    }
    gated = {name for name, _ in GHN(GHNConfig.ghn2()).named_parameters() if not name.startswith("gnn")}
    assert names == layers | first | tables | gated


def test_the_command_trains_one(tmp_path: Path) -> None:
    images = random_images(5_048)  # 5,000 are held out
    arrays = {
        "train_images": images.pixels.permute(0, 2, 3, 1).numpy(),
        "train_labels": images.labels.numpy(),
    }
    np.savez(tmp_path / "set.npz", **arrays, classes=np.array(images.classes))
    (tmp_path / "config.json").write_text(json.dumps(tiny_config(steps=2).to_dict()))
    arguments = ["train", str(tmp_path / "set.npz"), "--config", str(tmp_path / "config.json")]
    arguments += ["--set", "ghn.hypernet=transformer", "--set", "ghn.layers=2", "--set", "ghn.heads=2"]
    arguments += ["-o", str(tmp_path / "run"), "--validation-networks", "1", "--validation-images", "8"]
    for message in ("stopped; run again", "done: step 2, 4 networks"):
        done = CliRunner().invoke(app, [*arguments, "--time-limit", "0"])
        assert done.exit_code == 0, done.output
        assert message in done.output
    trained = load(tmp_path / "run" / "ghn")
    assert trained.config == GHNConfig.from_dict(
        {**tiny_config().ghn.to_dict(), "hypernet": "transformer", "layers": 2, "heads": 2}
    )


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_moves_all_weights_and_repeats(optimizer: str, tmp_path: Path) -> None:
    ghn = {"hypernet": "transformer", "hid": 8, "layers": 2, "heads": 2, "max_shape": [16, 16, 11, 11]}
    run = tiny_config(ghn=ghn, optimizer=optimizer, ema=0.0)
    losses: list[list[float]] = [[], []]
    for index in range(2):
        trainer = tiny_trainer(tmp_path / str(index), run)
        before = {name: values.detach().clone() for name, values in trainer.ghn.named_parameters()}
        assert trainer.run(lambda record, found=losses[index]: found.append(record.loss))
        after = dict(trainer.ghn.named_parameters())
        still = [name for name, values in before.items() if torch.equal(values, after[name])]
        assert still == []
    assert losses[0] == losses[1]
    assert all(math.isfinite(loss) for loss in losses[0])


# Large weights


@pytest.mark.parametrize("part", [1, 300, 1 << 24])
@pytest.mark.parametrize("settings", [config(), GHNConfig.ghn2(5, hid=8, max_shape=(3, 4, 4, 4))])
def test_decoding_in_parts_gives_what_all_at_once_does(
    part: int, settings: GHNConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    ghn = GHN(settings).double()
    graph = random_graph(2, 30)
    (expected,) = ghn(graph)
    monkeypatch.setattr(decoder, "_PART", part)
    tiles = ghn.predict_tiles(graph)
    assert tiles.keys() == expected.keys()
    for name, tile in tiles.items():
        torch.testing.assert_close(tile.expand(), expected[name].detach())


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from Linux's /proc")
def test_predicting_copies_no_large_weight() -> None:
    """A GHN-3 whose largest weights have 354 and 151 MB, of which whole and partial blocks are used."""
    code = """
import torch
from ghn_init import GHN, GHNConfig, Node
from ghn_init._graph.graph import graph_from_edges
from pathlib import Path

torch.set_num_threads(1)
shapes = [(240, 200, 3, 3), (200, 240, 1, 1), (1000, 1000, 1, 1), (240, 3, 7, 7), (240, 3, 16, 16), (64, 240)]
nodes = [Node("input"), *(Node("conv", f"p{i}", shape) for i, shape in enumerate(shapes))]
graph = graph_from_edges(nodes, [(i, i + 1) for i in range(len(shapes))])
with torch.device("meta"):
    ghn = GHN(GHNConfig.ghn3("l", hid=192, max_shape=(240, 240, 16, 16), layers=1))
ghn = ghn.to_empty(device="cpu")
for values in ghn.parameters():
    values.data.fill_(0.01)

def resident(key):
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) / 1e3

before = resident("VmHWM")
ghn.predict_tiles(graph)
print("grown by", resident("VmHWM") - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 100
