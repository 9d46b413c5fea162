"""GHN-3: agreement with the published model, and its files in every form."""

from __future__ import annotations

import argparse
import gzip
import json
import pickle
from collections import OrderedDict
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torchvision
from torch.nn import functional as F
from typer.testing import CliRunner

import ghn_init
from ghn_init import GHN, CheckpointError, ConfigError, GHNConfig, Graph, load
from ghn_init._hypernetwork.batch import GraphBatch
from ghn_init._hypernetwork.tile import Tile
from ghn_init.cli import app
from test_model import reference_graph

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

NETWORKS = (
    "resnet18", "resnet50", "mobilenet_v2", "densenet121", "vgg11", "convnext_tiny", "vit_b_16", "vit_b_32",
    "regnet_y_400mf", "resnet18_10_classes", "resnet18_1500_classes", "deepnets_visible_86",
)  # fmt: skip
TINY = GHNConfig.ghn3("t", 5, hid=8, layers=2, heads=2, max_shape=(3, 4, 4, 4))
TABLES = ("centrality_embed_in.weight", "centrality_embed_out.weight", "input_dist_embed.weight")
LINEAR = ("decoder.conv.0.weight", "decoder.conv.2.weight", "decoder.class_layer_predictor.1.weight")


@pytest.fixture(scope="module")
def reference(shared: Path) -> dict[str, Any]:
    with gzip.open(shared / "parity" / "ghn3_torchvision.json.gz") as file:
        return json.load(file)


@pytest.fixture(scope="module")
def published(shared: Path) -> GHN:
    return load(shared / "parity" / "ghn3_random.pt")


# Agreement with the published model


def assert_agreement(tiles: dict[str, Tile], expected: dict[str, Any]) -> None:
    """Norm and single values within 1e-4 of the norm, sums over all within 1e-4 norm sqrt(elements)."""
    for name, wanted in expected.items():
        values = tiles[name].expand()
        assert list(values.shape) == wanted["shape"], name
        flat = values[:, wanted.get("skipped_tokens", 0) :].flatten().double() if values.ndim > 1 else values
        found = [flat.norm(), flat.abs().max(), *flat[:4], *flat[-4:]]
        singles = [wanted["norm"], wanted["absmax"], *wanted["first"], *wanted["last"]]
        near = pytest.approx(singles, abs=1e-4 * wanted["norm"], rel=0)
        assert torch.tensor(found).tolist() == near, name
        weights = (7919 * torch.arange(flat.numel())) % 1009 / 504 - 1
        sums = [flat.double().sum().item(), (flat.double() @ weights.double()).item()]
        bound = 1e-4 * wanted["norm"] * flat.numel() ** 0.5
        assert sums == pytest.approx([wanted["sum"], wanted["dot"]], abs=bound, rel=0), name


@pytest.mark.parametrize("network", NETWORKS)
def test_predictions_agree_with_the_published_model(
    network: str, reference: dict[str, Any], published: GHN
) -> None:
    entry = reference[network]
    tiles = published.predict_tiles(reference_graph(entry, network))
    assert set(tiles) == set(entry["params"])
    assert_agreement(tiles, entry["params"])


def test_predictions_of_the_form_on_the_hub_agree(shared: Path) -> None:
    with gzip.open(shared / "parity" / "ghn3_random_hub.json.gz") as file:
        entry = json.load(file)["resnet18"]
    ghn = load(shared / "parity" / "ghn3_random_hub.pt")
    assert ghn.config == GHNConfig.ghn3("t", hid=16, layers=2, max_shape=(16, 16, 16, 16))
    assert_agreement(ghn.predict_tiles(reference_graph(entry, "resnet18")), entry["params"])


@pytest.mark.parametrize("network", ["resnet18", "vit_b_16", "vit_b_32", "convnext_tiny"])
def test_networks_that_we_trace_get_the_published_values(
    network: str, reference: dict[str, Any], published: GHN
) -> None:
    model = ghn_init.predict(torchvision.models.get_model(network), published, head="predict")
    written = {
        name: Tile(values.detach(), tuple(values.shape), tuple(values.shape))
        for name, values in model.named_parameters()
    }
    assert set(written) == {*reference[network]["params"], *reference[network]["left"]}
    assert_agreement(written, reference[network]["params"])


def test_the_graph_of_grouped_convolutions_gets_the_published_values(
    reference: dict[str, Any], published: GHN
) -> None:
    """`predict` shows them as convolutions of all channels."""
    entry = reference["regnet_y_400mf"]
    tiles = published.predict_tiles(ghn_init.trace(torchvision.models.regnet_y_400mf()))
    assert tiles.keys() >= entry["params"].keys()
    assert_agreement(tiles, entry["params"])


def test_gates_as_we_trace_them_give_what_the_published_model_does(
    reference: dict[str, Any], published: GHN
) -> None:
    entry = reference["regnet_y_400mf"]
    graph = ghn_init.trace(torchvision.models.regnet_y_400mf())
    assert len(graph) - len(published.reads(graph)) == entry["traced"]["extra_nodes"]["glob_avg"]
    batch = GraphBatch.from_graphs([graph], published.config)  # with the poolings that GHN.batch leaves out
    tiles = {}
    with torch.no_grad():
        for values, group in zip(published.blocks(batch), batch.groups, strict=True):
            for (_, name), block in zip(group.members, values, strict=True):
                tiles[name] = Tile(block, group.key.shape, group.key.stored)
    assert_agreement(tiles, entry["traced"]["params"])


@pytest.mark.parametrize("network", ["resnet18", "vit_b_16"])
def test_every_stage_agrees(network: str, reference: dict[str, Any], published: GHN) -> None:
    entry = reference[network]
    graph = reference_graph(entry, network)
    batch = published.batch(graph)
    rows = list(batch.nodes[0])
    network_: Any = published.gnn
    with torch.no_grad():
        first = published.embed(batch.types) + published.shape_enc(batch.shapes)
        h = published.node_features(batch)
        stages = {"types and shapes": first[rows], "degrees and distance added": h[rows]}
        x, biases = h[rows], network_.biases(batch)
        for index, layer in enumerate(network_, 1):
            stages[f"layer {index}"] = x = layer(x, biases)
        stages["final"] = published.encode(batch)[rows]
        table = network_[0].attn.table()
    assert stages.keys() == entry["features"]["stages"].keys()
    for stage, wanted in entry["features"]["stages"].items():
        for values, (norm, *start) in zip(stages[stage], wanted, strict=True):
            assert values.norm().item() == pytest.approx(norm, rel=1e-4), stage
            assert values[:4].tolist() == pytest.approx(start, abs=1e-4 * norm), stage
    assert len(entry["features"]["edge_bias"]) == 11
    for pair in entry["features"]["edge_bias"]:
        kind = pair["forward"] or (50 + pair["backward"] if pair["backward"] else 0)
        assert table[:, kind].tolist() == pytest.approx(pair["heads"], abs=1e-4)


def test_values_do_not_depend_on_the_batch(reference: dict[str, Any], published: GHN) -> None:
    graphs = [reference_graph(reference[name], name) for name in ("resnet18", "densenet121", "vgg11")]
    with torch.no_grad():
        for graph, found in zip(graphs, published(graphs), strict=True):
            alone = published(graph)[0]
            for name, values in alone.items():
                torch.testing.assert_close(found[name], values, rtol=1e-4, atol=1e-5 * values.norm().item())


# Files


@pytest.fixture
def ghn() -> GHN:
    return GHN(TINY).eval()


def in_published_form(ghn: GHN, *, within_layer: bool) -> OrderedDict[str, Tensor]:
    """The state dict as GHN-3's code names and shapes it: of a training checkpoint, or of the hub."""
    state = OrderedDict()
    for name, values in ghn.state_dict().items():
        outer = "gnn.0." + name if name in TABLES and within_layer else name
        state[outer] = values.flatten(1) if name in LINEAR else values
    return state


def write_joblib(state: object, path: Path) -> Path:
    """What joblib.dump writes for values without numpy arrays: a plain pickle."""
    path.write_bytes(pickle.dumps(state, protocol=4))
    return path


def same(one: GHN, two: GHN) -> bool:
    states = one.state_dict(), two.state_dict()
    return one.config == two.config and all(torch.equal(states[0][n], states[1][n]) for n in states[0])


def checkpoint_of(ghn: GHN, **more: Any) -> dict[str, Any]:
    """A training checkpoint, with the arguments of the script in it."""
    config = ghn.config.to_dict()
    names = (
        "max_shape",
        "num_classes",
        "decoder",
        "weight_norm",
        "ve",
        "layernorm",
        "hid",
        "layers",
        "heads",
    )
    told = {name: config[name] for name in names} | {"hypernet": "gatedgnn", "is_ghn2": False}
    state = in_published_form(ghn, within_layer=True)
    return {"state_dict": state, "config": told, "optimizer": {}, "epoch": 1, "step": 5, **more}


def test_training_checkpoints_load(ghn: GHN, tmp_path: Path) -> None:
    arguments = argparse.Namespace(lr=1e-3, name="x")
    torch.save(checkpoint_of(ghn, args=arguments), tmp_path / "a.pt")
    assert same(load(tmp_path / "a.pt"), ghn)
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_state_dicts_load_whoever_wrote_them(ghn: GHN, tmp_path: Path) -> None:
    for within_layer in (False, True):
        state = in_published_form(ghn, within_layer=within_layer)
        torch.save(state, tmp_path / "torch.pt")
        torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
        torch.save({"state_dict": state, "epoch": 3}, tmp_path / "epoch.pt")
        write_joblib(state, tmp_path / "joblib.pt")
        for name in ("torch.pt", "old.pt", "epoch.pt", "joblib.pt"):
            assert same(load(tmp_path / name), ghn), name


@pytest.mark.parametrize(
    "config",
    [replace(TINY, heads=4, layers=1), replace(TINY, hid=80, heads=16, layernorm=False, num_classes=7)],
)
def test_the_configuration_follows_from_the_tensors_or_is_given(config: GHNConfig, tmp_path: Path) -> None:
    file = write_joblib(in_published_form(GHN(config), within_layer=False), tmp_path / "x.pt")
    assert load(file).config == config
    other = replace(config, weight_norm=False, ve=False)  # which no tensor tells
    assert load(file, config=other).config == other
    with pytest.raises(CheckpointError, match=r"proj_e\.2\.bias is \(\d+,\), expected \(2,\)"):
        load(file, config=replace(config, heads=2))


def test_a_configuration_is_given_only_where_there_is_none(ghn: GHN, tmp_path: Path) -> None:
    torch.save(checkpoint_of(ghn), tmp_path / "a.pt")
    ghn.save_pretrained(tmp_path / "saved")
    for source in (tmp_path / "a.pt", tmp_path / "saved", "ghn3-cifar10"):
        with pytest.raises(ConfigError, match=r"(its|their) own; leave config out"):
            load(source, config=TINY)
    with pytest.raises(ConfigError, match="the GHN has its own"):
        load(ghn, config=TINY)
    state = in_published_form(ghn, within_layer=False)
    write_joblib(state, tmp_path / "b.pt")
    with pytest.raises(CheckpointError, match=r"b\.pt: not the weights of a GHN with its configuration: gnn"):
        load(tmp_path / "b.pt", config=replace(TINY, layers=3))


@pytest.mark.parametrize(
    "config",
    [GHNConfig.ghn2(5, hid=8, max_shape=(3, 4, 7, 7)), GHNConfig.ghn1(5, hid=8), GHNConfig.mlp(hid=8)],
    ids=["ghn2", "ghn1", "mlp"],
)
def test_older_models_without_configuration_are_told_apart(config: GHNConfig, tmp_path: Path) -> None:
    original = GHN(config).eval()
    file = write_joblib(OrderedDict(original.state_dict()), tmp_path / "x.pt")
    assert same(load(file), original)


def test_older_models_in_the_newer_form_load(tmp_path: Path) -> None:
    original = GHN(GHNConfig.ghn2(5, hid=8)).eval()
    names = ("max_shape", "num_classes", "hypernet", "decoder", "weight_norm", "ve", "layernorm", "hid")
    told = {name: original.config.to_dict()[name] for name in names}
    told |= {"layers": 3, "heads": 8, "is_ghn2": True}
    state = in_published_form(original, within_layer=False)
    torch.save({"state_dict": state, "config": told}, tmp_path / "x.pt")
    assert same(load(tmp_path / "x.pt"), original)


def test_what_is_missing_without_a_configuration_is_named(ghn: GHN, tmp_path: Path) -> None:
    state = in_published_form(ghn, within_layer=False)
    del state["embed.weight"]
    write_joblib(state, tmp_path / "x.pt")
    with pytest.raises(
        CheckpointError, match=r"x\.pt: expected a configuration or .* no tensor embed\.weight"
    ):
        load(tmp_path / "x.pt")
    state = OrderedDict((n, v) for n, v in GHN(TINY).state_dict().items() if not n.startswith("gnn"))
    write_joblib(state, tmp_path / "x.pt")
    with pytest.raises(
        CheckpointError, match=r"x\.pt: expected the tensors of a GHN, found neither gnn\.gru"
    ):
        load(tmp_path / "x.pt")
    write_joblib({"a": 1}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"expected a dictionary .*, or a state dict, found \['a'\]"):
        load(tmp_path / "x.pt")


def test_a_transformer_that_calls_itself_a_ghn2_is_refused(ghn: GHN, tmp_path: Path) -> None:
    document = checkpoint_of(ghn)
    document["config"]["is_ghn2"] = True
    torch.save(document, tmp_path / "x.pt")
    with pytest.raises(ConfigError, match=r"x\.pt: .*is_ghn2=True and a transformer's tensors"):
        load(tmp_path / "x.pt")


def test_converted_files_predict_the_same(shared: Path, tmp_path: Path) -> None:
    source = shared / "parity" / "ghn3_random_hub.pt"
    done = CliRunner().invoke(app, ["convert", str(source), str(tmp_path / "out")])
    assert done.exit_code == 0, done.stderr
    numel = sum(values.numel() for values in load(source).parameters())
    assert f"GHN-3 for 1000 classes, tensors up to 16x16x16x16, {numel:,} parameters" in done.stderr
    layer = torch.nn.Conv2d(3, 8, 3)
    weights = [
        ghn_init.predict(layer, ghn, head="predict").weight.clone() for ghn in (source, tmp_path / "out")
    ]
    assert torch.equal(*weights)


def test_attention_needs_no_matrix_of_logits(published: GHN, reference: dict[str, Any]) -> None:
    """Without gradients the fused kernel is used, which takes the bias as it is."""
    graph: Graph = reference_graph(reference["resnet18"], "resnet18")
    network: Any = published.gnn
    with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        (path_bias,) = network.biases(published.batch(graph))
        ((_, bias),) = path_bias.parts()
        query = torch.randn(1, 4, len(graph), 8)
        F.scaled_dot_product_attention(query, query, query, attn_mask=bias.unsqueeze(0))  # raises otherwise
        published.predict_tiles(graph)
