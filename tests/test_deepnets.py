"""DeepNets-1M: exact counts, one sampler for all machines, networks that run and have the right graphs."""

from __future__ import annotations

import dataclasses
import gzip
import json
from collections import Counter
from hashlib import sha256
from statistics import mean, pstdev
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ghn_init._errors import ArchitectureError
from ghn_init._tracing.trace import trace
from ghn_init.deepnets import (
    OPERATIONS,
    SPLITS,
    Architecture,
    DeepNets1M,
    Genotype,
    ResNet50,
    Stream,
    evaluation_width,
    read_published,
    sample,
    training_width,
)
from ghn_init.deepnets._count import operation_params
from ghn_init.deepnets._ops import FactorizedReduction, Layers
from ghn_init.deepnets._plan import plan_cell
from networks import bridged
from published_order import recognised_gates

if TYPE_CHECKING:
    from pathlib import Path

    from ghn_init import Graph

SAMPLED = ("train", "val", "test", "deep", "dense", "bnfree", "search")

SEEN_MSA: dict[int, tuple[int, ...]] = {
    0: (0, 1, 2, 3, 5), 23: (0, 1, 2, 3), 40: (0, 1, 2, 3), 44: (0, 1, 2, 4, 6, 7, 9), 67: (0, 1, 2, 4),
    75: (0, 1), 80: (0, 1, 2, 5, 7), 95: (0, 1, 2, 3), 100: (0, 1, 5, 9), 103: (0, 1, 2, 3, 5, 7), 112:
    (0, 2), 113: (10, 11, 15, 16, 19), 120: (0, 1, 2, 3, 5),
}  # fmt: skip
"""The `msa` nodes that the reference has, by their order, where it lacks some.

The published code overlooks some operations (see `published_order`). The definition knows no such
exception, and neither do our graphs; with the overlooked nodes bridged away all figures agree. Which `msa`
it overlooks follows a rule that we do not know. These are from trying: no other choice of as many nodes
gives the reference's edges and distances (architecture 113 has too many choices to try them all).
"""


@pytest.fixture(scope="session")
def visible(shared: Path) -> list[dict[str, Any]]:
    with gzip.open(shared / "parity" / "deepnets_visible.json.gz") as file:
        return json.load(file)


def on_meta(arch: Architecture, **options: Any) -> nn.Module:
    with torch.device("meta"):
        return arch.build(**options)


def size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def genotype(*normal: tuple[str, int], concat: tuple[int, ...] = (2,), reduce: Any = None) -> Genotype:
    return Genotype(normal, concat, reduce or normal, concat)


SIMPLE = Architecture(genotype(("conv_3x3", 0), ("skip_connect", 1)), n_cells=4)


# -- agreement with the published implementation ------------------------------------------------------


def test_parameter_counts_equal_the_reference(visible: list[dict[str, Any]]) -> None:
    for entry in visible:
        arch = Architecture.from_net_args(entry["net_args"])
        for name, image_size in (("cifar10", 32), ("imagenet", 224)):
            assert size(on_meta(arch, image_size=image_size)) == entry["num_params"][name]
            assert arch.num_params(10, image_size) == entry["num_params"][name]


def overlooked(graph: Graph, arch: Architecture, index: int) -> set[int]:
    """Nodes of the graph of `arch`, which is architecture `index`, that the reference lacks."""
    attention = [number for number, node in enumerate(graph.nodes) if node.type == "msa"]
    seen = SEEN_MSA.get(index, range(len(attention)))
    dropped = {number for order, number in enumerate(attention) if order not in seen}
    gates = {
        gate_path(graph, number): number for number, node in enumerate(graph.nodes) if node.type == "cse"
    }
    if gates:
        dropped |= {gates[path] for path in gates.keys() - recognised_gates(arch)}
    return dropped


def gate_path(graph: Graph, number: int) -> str:
    """The module of a `cse` node: the last parameter before it is its second bias."""
    params = [graph.nodes[pred].param or "" for pred in graph.predecessors[number]]
    (bias,) = [param for param in params if param.endswith(".excite.bias")]
    return bias.removesuffix(".excite.bias")


def test_graphs_equal_the_reference(visible: list[dict[str, Any]]) -> None:
    for index, entry in enumerate(visible):
        arch = Architecture.from_net_args(entry["net_args"])
        graph = trace(on_meta(arch), (1, 3, 32, 32))
        graph = bridged(graph, overlooked(graph, arch, index))
        virtual = graph.distances[graph.distances > 1]
        assert Counter(node.type for node in graph.nodes) == entry["node_types"]
        assert len(graph) == entry["num_nodes"]
        assert len(graph.edges) == entry["n_edges"]
        assert len(virtual) == entry["n_virtual_edges"]
        assert int(virtual.sum(dtype=int)) == entry["sum_virtual_distance"]


def test_net_args_round_trip(visible: list[dict[str, Any]]) -> None:
    for entry in visible:
        arch = Architecture.from_net_args(entry["net_args"])
        assert json.loads(json.dumps(arch.to_net_args())) == entry["net_args"]
        assert len({arch, Architecture.from_net_args(arch.to_net_args())}) == 1


# -- the two ways to count, built and by arithmetic ---------------------------------------------------


@pytest.mark.parametrize("split", SAMPLED)
def test_counting_equals_building(split: str) -> None:
    for index in range(12):
        arch = dataclasses.replace(sample(split, index, seed=7), C=48, fc_dim=96)
        for image_size in (16, 32, 224):
            if arch.supports(image_size):
                built = on_meta(arch, num_classes=7, image_size=image_size)
                assert arch.num_params(7, image_size) == size(built)
        assert_same_graph(arch)


def assert_same_graph(arch: Architecture, image_size: int = 32) -> None:
    """What the specification says is what tracing finds, node by node."""
    traced = trace(on_meta(arch, num_classes=7, image_size=image_size), (1, 3, image_size, image_size))
    written = arch.graph(7, image_size)
    assert (written.nodes, written.edges, written.name) == (traced.nodes, traced.edges, traced.name)
    assert not written.unmatched
    assert {parameter.role for parameter in traced.unmatched} <= {"unused"}
    assert arch.num_nodes() == len(traced)


@pytest.mark.parametrize("image_size", [16, 32, 224])
@pytest.mark.parametrize("stem_type", [0, 1])
def test_graphs_of_every_operation_are_written_as_traced(stem_type: int, image_size: int) -> None:
    for name in OPERATIONS[1:]:
        cells = genotype((name, 0), ("conv_1x1", 1), ("conv_3x3", 2), ("none", 0), concat=(2, 3))
        for norm in ("bnorm", None):
            assert_same_graph(Architecture(cells, 3, norm, stem_type=stem_type, C_mult=2), image_size)
    flat = dataclasses.replace(SIMPLE, glob_avg=False, fc_layers=2, stem_pool=stem_type == 0)
    assert_same_graph(dataclasses.replace(flat, stem_type=stem_type), image_size)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("norm", ["bnorm", None])
def test_operations_have_their_size_and_shape(name: str, stride: int, norm: str | None) -> None:
    module = Layers(norm).operation(name, 16, stride)
    if module is None:
        assert name == "none"
        return
    assert size(module) == operation_params(name, 16, stride, 2 if norm else 0)
    assert module(torch.randn(2, 16, 8, 8)).shape == (2, 16, 8 // stride, 8 // stride)


def test_factorized_reduction_sees_every_second_pixel_and_its_neighbours() -> None:
    module = FactorizedReduction(Layers(None), 2, 4)
    x = torch.zeros(1, 2, 4, 4)
    x[:, :, 1::2, 1::2] = 1
    even, odd = module(x).split(2, dim=1)
    assert (even == 0).all()
    assert (odd != 0).all()


def test_average_pooling_does_not_count_padding() -> None:
    module = Layers(None).operation("avg_pool_3x3", 2, 1)
    assert isinstance(module, nn.AvgPool2d)
    assert torch.equal(module(torch.ones(1, 2, 4, 4)), torch.ones(1, 2, 4, 4))


def test_channel_gate_scales_channels() -> None:
    module = Layers(None).operation("cse", 8, 2)
    assert module is not None
    x = torch.randn(2, 8, 4, 4)
    gate = F.hardswish(module.excite(F.relu(module.squeeze(x.mean((2, 3))))))  # type: ignore[operator]
    torch.testing.assert_close(module(x), x[:, :, ::2, ::2] * gate[:, :, None, None])


def test_attention_is_a_transformer_block() -> None:
    module = Layers(None).operation("msa", 16, 1)
    assert isinstance(module, nn.Module)
    reference = nn.TransformerEncoderLayer(16, 8, 16, 0.0, "gelu", batch_first=True, norm_first=True)
    state = {
        "self_attn.in_proj_weight": module.qkv.weight, "self_attn.in_proj_bias": torch.zeros(48),
        "self_attn.out_proj.weight": module.out.weight, "self_attn.out_proj.bias": module.out.bias,
    }  # fmt: skip
    names = {"fc1": "linear1", "fc2": "linear2", "norm1": "norm1", "norm2": "norm2"}
    for ours, theirs in names.items():
        state |= {f"{theirs}.{k}": v for k, v in getattr(module, ours).state_dict().items()}
    reference.load_state_dict(state)
    x = torch.randn(2, 16, 3, 5)
    expected = reference(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(module(x), expected)


# -- networks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_size", [16, 32])
def test_networks_can_be_trained(image_size: int) -> None:
    for index in range(8):
        arch = dataclasses.replace(sample("train", index, seed=3), C=16, fc_dim=32)
        network = arch.build(num_classes=5, image_size=image_size)
        logits = network(torch.randn(4, 3, image_size, image_size))
        assert logits.shape == (4, 5)
        logits.logsumexp(1).sum().backward()
        used = {name for node in trace(network).nodes for name in (node.param, node.bias) if name}
        trained = {name for name, p in network.named_parameters() if p.grad is not None}
        assert used == trained


def test_networks_take_imagenet_images() -> None:
    for index in range(3):
        network = dataclasses.replace(sample("val", index), C=16).build(num_classes=3, image_size=224)
        assert network.eval()(torch.randn(1, 3, 224, 224)).shape == (1, 3)


@pytest.mark.parametrize("image_size", [16, 32, 224])
def test_positional_encodings_fit_the_tokens(image_size: int) -> None:
    arch = Architecture(genotype(("msa", 0), ("conv_1x1", 1)), n_cells=4, preproc=False)
    side = {16: 6, 32: 11, 224: 14}[image_size]
    network = on_meta(arch, image_size=image_size)
    shapes = {name: tuple(p.shape) for name, p in network.named_parameters()}
    assert shapes["stem.pos_enc"] == (1, 32, side, side)


def test_running_statistics_are_optional() -> None:
    assert not list(on_meta(SIMPLE, running_stats=False).buffers())
    assert list(on_meta(SIMPLE).buffers())


def test_flattened_heads_fit_one_image_size() -> None:
    arch = dataclasses.replace(SIMPLE, glob_avg=False)
    for image_size, side in ((16, 4), (32, 8), (224, 14)):
        assert on_meta(arch, image_size=image_size).head[0].in_features == 32 * side * side  # type: ignore[index,union-attr]


def test_missing_states_are_zeros_when_concatenated_and_feed_nothing() -> None:
    cells = (("none", 0), ("none", 1), ("conv_1x1", 0), ("conv_1x1", 2))
    plan = plan_cell(cells, (2, 3))
    assert plan.terms == ((), (2,))
    assert plan.uses == (True, False)
    arch = Architecture(genotype(*cells, concat=(2, 3)), n_cells=1)
    assert_same_graph(arch)
    network = arch.build(num_classes=2)
    seen: list[torch.Tensor] = []
    network.head.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))  # type: ignore[union-attr]
    network(torch.randn(2, 3, 32, 32))
    assert (seen[0][:, :32] == 0).all()
    assert (seen[0][:, 32:] != 0).any()


def test_a_cell_without_output_feeds_nothing() -> None:
    nothing = (("none", 0), ("none", 1), ("none", 0), ("none", 1))
    something = (("conv_3x3", 0), ("conv_3x3", 1), ("conv_3x3", 0), ("conv_3x3", 1))
    arch = Architecture(genotype(*something, concat=(2, 3), reduce=nothing), n_cells=5)
    assert arch.plan.used == (True, False, True, False, True)
    assert_same_graph(arch)
    assert arch.build()(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    with pytest.raises(ArchitectureError, match="no path leads from the input to the output"):
        Architecture(genotype(*nothing, concat=(2, 3)), n_cells=5)


# -- what is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_cells": 0}, "n_cells = 0, must be at least 1"),
        ({"norm": "lnorm"}, "norm = 'lnorm', must be 'bnorm' or None"),
        ({"ks": 4}, "ks = 4, must be odd"),
        ({"stem_type": 1, "stem_pool": True}, "stem_pool = True, must be False with stem_type 1"),
        ({"C": 30}, "C = 30, must be a positive multiple of 8"),
        ({"preproc": False, "C_mult": 2}, "preproc = False, must be True unless"),
        ({"fc_layers": 3, "fc_dim": 0}, "fc_layers = 3.*fc_dim = 0"),
        ({"genotype": genotype(("conv", 0), ("msa", 1))}, r"normal\[0\]: unknown operation 'conv'"),
        ({"genotype": genotype(("msa", 0), ("msa", 2))}, r"normal\[1\]: state 2 does not come before it"),
        (
            {"genotype": genotype(("msa", 0), ("msa", 1), concat=(3,))},
            r"normal_concat: \(3,\) are not states",
        ),
        ({"genotype": genotype(("msa", 0))}, "same even number of edges"),
    ],
)
def test_invalid_architectures_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ArchitectureError, match=message):
        dataclasses.replace(SIMPLE, **change)


@pytest.mark.parametrize(("image_size", "factor"), [(0, 4), (30, 4), (33, 4), (132, 16)])
def test_image_sizes_that_do_not_halve_are_refused(image_size: int, factor: int) -> None:
    assert not SIMPLE.supports(image_size)
    with pytest.raises(ArchitectureError, match=f"{image_size} must be a positive multiple of {factor} for"):
        SIMPLE.build(image_size=image_size)


def test_net_args_with_wrong_keys_are_refused() -> None:
    net_args = SIMPLE.to_net_args()
    with pytest.raises(ArchitectureError, match=r"unknown keys \['depth'\], missing keys \['n_cells'\]"):
        Architecture.from_net_args({"genotype": net_args["genotype"], "depth": 3})
    with pytest.raises(ArchitectureError, match=r"genotype: expected normal.*KeyError: 'normal_concat'"):
        Architecture.from_net_args({**net_args, "genotype": {"normal": [["msa", 0]]}})
    with pytest.raises(ArchitectureError, match="net_args: expected a dictionary, found NoneType"):
        Architecture.from_net_args(None)  # type: ignore[arg-type]
    for key, value in (("n_cells", "5"), ("n_cells", None), ("C", 32.0), ("ks", True), ("stem_pool", "no")):
        with pytest.raises(ArchitectureError, match=f"{key} = {value!r}, must be (int|bool)"):
            Architecture.from_net_args({**net_args, key: value})


# -- the random stream and the sampler ----------------------------------------------------------------


def test_the_random_stream_is_pinned() -> None:
    stream = Stream(2021, 3, 14)
    assert [stream.below(1000) for _ in range(8)] == [350, 912, 379, 167, 241, 684, 819, 947]
    assert len({Stream(*key).below(2**62) for key in ((0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0, 0))}) == 4


def test_draws_are_uniform() -> None:
    stream = Stream(0)
    counts = Counter(stream.between(3, 7) for _ in range(5000))
    assert set(counts) == {3, 4, 5, 6, 7}
    assert max(abs(n - 1000) for n in counts.values()) < 120
    assert abs(sum(stream.chance(1, 4) for _ in range(4000)) - 1000) < 110
    assert {stream.choice("abc") for _ in range(50)} == set("abc")


def test_samples_are_pinned() -> None:
    """A change here changes every architecture that a training run or a result refers to by index."""
    drawn = [sample(split, index).to_net_args() for split in SAMPLED for index in (0, 1, 77_777)]
    assert sha256(json.dumps(drawn, sort_keys=True).encode()).hexdigest()[:16] == "208b42311cf76889"


@pytest.mark.parametrize("split", SAMPLED)
def test_samples_keep_the_rules(split: str) -> None:
    lowest, highest = {"deep": (10, 36), "search": (6, 20)}.get(split, (4, 18))
    largest = 10**8 if split in ("deep", "dense") else 10**7
    for index in range(60):
        arch = sample(split, index, seed=11)
        operations = arch.genotype.operations
        assert lowest <= arch.n_cells <= highest
        assert max(arch.num_params(10, 32), arch.num_params(10, 224)) <= largest
        assert any("conv" in name for name in operations) or arch.transformer
        assert "cse" not in operations or any("conv" in name for name in operations)
        assert "none" not in operations or arch.genotype.steps > 1
        assert arch.glob_avg or not arch.transformer
        assert arch.norm is None or split != "bnfree"
        assert arch.genotype.steps >= (2 if split == "dense" else 1)
        for edges in (arch.genotype.normal, arch.genotype.reduce):
            names = Counter(name for name, _ in edges)
            assert names["cse"] <= 1
            assert names["conv_5x5"] + names["conv_7x7"] <= 1
            assert all(edges[k][1] != edges[k + 1][1] for k in range(0, len(edges), 2))


def test_node_statistics_stand_beside_the_published_ones() -> None:
    nodes = [sample("train", index).num_nodes() for index in range(1000)]
    assert mean(nodes) == pytest.approx(192, rel=0.07)
    assert pstdev(nodes) == pytest.approx(95, rel=0.07)


# -- splits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
def test_splits_give_any_index_by_itself(split: str) -> None:
    data = DeepNets1M(split, seed=5)
    assert len(data) == SPLITS[split]
    assert data[len(data) - 1] == data[-1] == DeepNets1M(split, seed=5)[-1]
    assert data[0] != data[1]
    with pytest.raises(IndexError, match="has no index"):
        data[len(data)]


def test_seeds_and_splits_differ() -> None:
    seen = {DeepNets1M(split, seed)[0] for split in ("train", "val", "test", "bnfree") for seed in (0, 1)}
    assert len(seen) == 8
    assert "1,000,000 architectures" in repr(DeepNets1M("train"))


def test_wide_is_test_made_wider() -> None:
    test, wide, large = DeepNets1M("test")[3], DeepNets1M("wide")[3], DeepNets1M("wide", image_size=224)[3]
    assert isinstance(test, Architecture)
    assert wide == dataclasses.replace(test, C=4 * test.C)
    assert large == dataclasses.replace(test, C=2 * test.C)


def test_evaluation_networks_have_the_published_size() -> None:
    for split in ("val", "test", "deep", "dense", "bnfree"):
        arch = DeepNets1M(split)[4]
        assert isinstance(arch, Architecture)
        assert arch.C % 16 == 0
        assert arch.num_params() >= 2_500_000
        narrower = dataclasses.replace(arch, C=arch.C - 16) if arch.C > 32 else None
        assert narrower is None or narrower.num_params() < 2_500_000


def test_predefined_networks_are_those_of_the_paper() -> None:
    resnet, vit = DeepNets1M("predefined")
    assert isinstance(resnet, ResNet50)
    assert isinstance(vit, Architecture)
    with torch.device("meta"):
        assert resnet.build().conv1.kernel_size == (3, 3)  # type: ignore[union-attr]
        assert resnet.build(image_size=224).conv1.kernel_size == (7, 7)  # type: ignore[union-attr]
    assert len(trace(on_meta(vit), (1, 3, 32, 32))) == vit.num_nodes() == 129  # as published


def test_unknown_splits_are_refused() -> None:
    with pytest.raises(ArchitectureError, match="no split 'holdout' in DeepNets-1M; expected one of"):
        DeepNets1M("holdout")
    with pytest.raises(ArchitectureError, match="split 'wide' is not sampled"):
        sample("wide", 0)


# -- widths -------------------------------------------------------------------------------------------


def widths(arch: Architecture) -> set[tuple[int, int]]:
    stream = Stream(1)
    return {training_width(arch, stream) for _ in range(400)}


def test_training_widths_follow_the_size() -> None:
    small = widths(SIMPLE)
    assert {c for c, _ in small} == {32, 48, 64, 80, 96, 112, 128}
    assert {fc for c, fc in small if c <= 64} == set(range(64, 513, 64))
    assert {fc for c, fc in small if c > 64} == {64, 128, 192, 256}
    for n_cells, largest in ((9, 64), (11, 48), (13, 32)):
        drawn = widths(dataclasses.replace(SIMPLE, n_cells=n_cells))
        assert max(c for c, _ in drawn) == largest
        assert {fc for _, fc in drawn} == {64, 128, 192, 256}
    assert {c for c, _ in widths(dataclasses.replace(SIMPLE, glob_avg=False))} == {32}
    assert {c for c, _ in widths(Architecture(genotype(("conv_5x5", 0), ("cse", 1)), 4))} == {32}


def test_evaluation_width_of_a_large_network_is_the_smallest() -> None:
    big = Architecture(genotype(("conv_7x7", 0), ("conv_3x3", 1)), n_cells=18, C_mult=2)
    assert big.num_params() > 2_500_000
    assert evaluation_width(big) == 32


# -- the published files ------------------------------------------------------------------------------


def test_published_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "deepnets1m_eval_meta.json"
    nets = [sample("test", index) for index in range(3)]
    # What the published entries have beside the arguments is not read.
    entries = [{**net.to_net_args(), "num_nodes": 3, "num_params": {"cifar10": 1}} for net in nets]
    unsized = [{key: value for key, value in entry.items() if key != "C"} for entry in entries]
    splits = {"test": entries, "val": entries[:1], "train": unsized}
    path.write_text(json.dumps({split: {"nets": nets, "meta": {}} for split, nets in splits.items()}))
    assert read_published(path, "test") == tuple(nets)
    assert read_published(path, "val") == tuple(nets[:1])
    assert [dataclasses.replace(net, C=nets[0].C) for net in read_published(path, "train")] == [
        dataclasses.replace(net, C=nets[0].C) for net in nets
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as a meta file"),
        ("[]", "has no split 'test'; found list"),
        ('{"val": {}}', r"has no split 'test'; found \['val'\]"),
        ('{"test": []}', "split 'test' is not"),
        ('{"test": {"nets": [{"n_cells": 4}]}}', r"test\[0\]: net_args: .*missing keys \['genotype'\]"),
        ('{"test": {"nets": [3]}}', r"test\[0\]"),
    ],
)
def test_a_damaged_published_file_is_refused_with_the_place(
    content: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "meta.json"
    path.write_text(content)
    with pytest.raises(ArchitectureError, match=message):
        read_published(path, "test")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArchitectureError, match=r"none\.json cannot be read"):
        read_published(tmp_path / "none.json", "test")
