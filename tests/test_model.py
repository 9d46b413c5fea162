"""The GHN: agreement with the published model, and each of its parts against plain arithmetic."""

from __future__ import annotations

import gzip
import json
import math
import pickle
import random
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ghn_init import GHN, ConfigError, GHNConfig, Graph, GraphError, Node, load, trace
from ghn_init._graph.graph import graph_from_edges
from ghn_init._hypernetwork.batch import KINDS, GraphBatch, canonical_shape
from ghn_init._hypernetwork.config import channel_sizes, spatial_sizes
from ghn_init._hypernetwork.gated import GatedGNN
from ghn_init._hypernetwork.tile import Tile, full_size, sum_repeats, tile_to
from ghn_init.training._scaled_init import VECTOR_RMS, init_for_training

if TYPE_CHECKING:
    from pathlib import Path

AGREEING = (
    "resnet18", "resnet50", "vgg11_bn", "mobilenet_v2", "squeezenet1_0", "densenet121", "convnext_tiny",
    "resnet50_cifar",
)  # fmt: skip
TINY = {"hid": 4, "max_shape": (3, 4, 3, 3), "num_classes": 5}


@pytest.fixture(scope="module")
def reference(shared: Path) -> dict[str, Any]:
    with gzip.open(shared / "parity" / "torchvision.json.gz") as file:
        return json.load(file)


@pytest.fixture(scope="module")
def published(shared: Path) -> GHN:
    return load(shared / "parity" / "ghn2_cifar10_random.pt")


def reference_graph(entry: dict[str, Any], name: str) -> Graph:
    nodes = []
    for found in entry["nodes"]:
        bias = (found["param"] or "").removesuffix("weight") + "bias"
        norm = found["type"] in ("bn", "ln") and bias in entry["params"]
        shape = None if found["shape"] is None else tuple(found["shape"])
        nodes.append(Node(found["type"], found["param"], shape, bias if norm else None))
    return graph_from_edges(nodes, [tuple(edge) for edge in entry["edges"]], name=name)


def random_graph(seed: int, length: int = 12, classes: int = 5) -> Graph:
    """A DAG with every kind of parameter, skip connections, and a classifier at its end."""
    rng = random.Random(seed)
    shapes: dict[str, list[tuple[int, ...]]] = {
        "conv": [(4, 3, 3, 3), (2, 2, 1, 1), (7, 5), (9, 9, 5, 5), (6, 2, 3), (4, 3, 2, 3, 3)],
        "sep_conv": [(8, 1, 3, 3)], "bias": [(3,), (9,)], "bn": [(4,), (10,)], "ln": [(5,)],
        "pos_enc": [(1, 10, 6)], "sum": [], "max_pool": [(1, 1, 2, 2)], "glob_avg": [],
    }  # fmt: skip
    nodes, edges = [Node("input")], []
    for index in range(1, length):
        kind = rng.choice(list(shapes))
        shape = rng.choice(shapes[kind]) if shapes[kind] else None
        name = f"p{index}" if shape and kind != "max_pool" else None
        nodes.append(Node(kind, name, shape, f"b{index}" if kind in ("bn", "ln") else None))
        edges += [(u, index) for u in rng.sample(range(index), min(index, rng.choice([1, 1, 2, 3])))]
    nodes += [Node("conv", "fc.weight", (classes, 6)), Node("bias", "fc.bias", (classes,))]
    edges += [(length - 1, length), (length, length + 1)]
    return graph_from_edges(nodes, edges, name=f"random{seed}")


def renumbered(graph: Graph, seed: int) -> Graph:
    """The graph in another topological order; the classifier stays at the end."""
    rng, order = random.Random(seed), [0]
    free = set(range(1, len(graph) - 2))
    while free:
        order.append(rng.choice([v for v in sorted(free) if free.isdisjoint(graph.predecessors[v])]))
        free.remove(order[-1])
    order += [len(graph) - 2, len(graph) - 1]
    place = {v: index for index, v in enumerate(order)}
    return graph_from_edges([graph.nodes[v] for v in order], [(place[u], place[v]) for u, v in graph.edges])


# Agreement with the published model


@pytest.mark.parametrize("network", AGREEING)
def test_predictions_agree_with_the_published_model(
    network: str, reference: dict[str, Any], published: GHN
) -> None:
    entry = reference[network]
    tiles = published.predict_tiles(reference_graph(entry, network))
    unpredicted = [name for name in entry["params"] if name not in tiles]
    assert all(name.endswith("layer_scale") for name in unpredicted)
    for name, wanted in entry["params"].items():
        if name in unpredicted:
            continue
        values = tiles[name].expand()
        assert list(values.shape) == wanted["shape"], name
        flat = values.flatten().double()
        found = [flat.norm(), flat.sum(), *flat[:4], *flat[-4:]]
        expected = [wanted["norm"], wanted["sum"], *wanted["first"], *wanted["last"]]
        assert torch.tensor(found).tolist() == pytest.approx(expected, abs=1e-4 * wanted["norm"], rel=0), name


def test_names_are_those_of_the_published_checkpoint(shared: Path) -> None:
    state = torch.load(shared / "parity" / "ghn2_cifar10_random.pt", weights_only=True)["state_dict"]
    ours = GHN().state_dict()
    assert {name: values.shape for name, values in ours.items()} == {n: v.shape for n, v in state.items()}


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (GHNConfig.ghn2(), 1_620_764),
        (GHNConfig.ghn1(), 1_620_668),
        (GHNConfig.mlp(), 1_614_396),
        (GHNConfig.imagenet(), 2_319_720),
    ],
)
def test_parameter_counts_are_the_published_ones(config: GHNConfig, count: int) -> None:
    with torch.device("meta"):
        assert sum(values.numel() for values in GHN(config).parameters()) == count


# Configuration


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hids": 32, "foo": 1}, "unknown keys foo, hids"),
        ({"max_shape": (64, 64, 11)}, r"max_shape=\(64, 64, 11\); expected four"),
        ({"max_shape": (64, 64, 11, 9)}, "max_shape"),
        ({"max_shape": (64, 0, 11, 11)}, "max_shape"),
        ({"num_classes": 0}, "num_classes=0; expected an integer >= 1"),
        ({"num_classes": True}, "num_classes=True"),
        ({"hid": 30}, "hid=30; expected a multiple of 4"),
        ({"ve": 1}, "ve=1; expected true or false"),
        ({"hypernet": "gcn"}, "hypernet='gcn'; expected one of"),
        ({"decoder": "mlp"}, "decoder='mlp'"),
        ({"depth_buckets": 3}, "depth_buckets=3; expected an even number"),
        ({"rounds": 0}, "rounds=0"),
    ],
)
def test_impossible_configurations_are_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GHNConfig.from_dict(values)


def test_published_configuration_is_complete_and_nothing_else() -> None:
    values = {name: getattr(GHNConfig.imagenet(), name) for name in list(GHNConfig.imagenet().to_dict())[:8]}
    assert GHNConfig.from_published(values) == GHNConfig.imagenet()
    with pytest.raises(ConfigError, match="unknown rounds"):
        GHNConfig.from_published({**values, "rounds": 1})
    with pytest.raises(ConfigError, match="lacks ve"):
        GHNConfig.from_published({name: value for name, value in values.items() if name != "ve"})


def test_configuration_survives_json() -> None:
    config = GHNConfig.ghn2(depth_buckets=32, rounds=2)
    assert GHNConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


# Batches


def test_shape_tables_have_the_published_sizes() -> None:
    assert len(channel_sizes(10)) + 1 == 392
    assert spatial_sizes(11) == (1, 3, 5, 7, 9, 11, 14, 16)
    assert spatial_sizes(16) == (1, 3, 5, 7, 9, 11, 13, 14, 15, 16)


@pytest.mark.parametrize(
    ("shape", "counts_as"),
    [
        ((64, 3, 7, 7), (64, 3, 7, 7)),
        ((2, 5, 2, 2), (1, 8, 3, 3)),  # tie to the smaller; 4 to 7 count as 8; 2 x 2 as 3 x 3
        ((9, 60, 4, 6), (8, 56, 3, 5)),  # ties to the smaller
        ((4096, 25088), (4096, 8192, 1, 1)),  # past the end: the last entry
        ((71, 97, 12, 40), (64, 96, 11, 16)),
        ((96, 7, 5), (96, 8, 1, 5)),
        ((32, 16, 3, 5, 5), (32, 16, 5, 5)),
    ],
)
def test_shapes_take_the_nearest_entry(shape: tuple[int, ...], counts_as: tuple[int, ...]) -> None:
    graph = graph_from_edges([Node("input"), Node("conv", "w", shape)], [(0, 1)])
    batch = GraphBatch.from_graphs([graph], GHNConfig())
    tables = [channel_sizes(10)] * 2 + [spatial_sizes(11)] * 2
    dummy, found = batch.shapes[list(batch.nodes[0])].tolist()
    assert dummy == [391, 391, 8, 8]
    assert tuple(table[index] for table, index in zip(tables, found, strict=True)) == counts_as


def shape_rows(shape: tuple[int, ...], config: GHNConfig) -> list[int]:
    graph = graph_from_edges([Node("input"), Node("conv", "w", shape)], [(0, 1)])
    batch = GraphBatch.from_graphs([graph], config)
    return batch.shapes[batch.nodes[0][1]].tolist()


@pytest.mark.parametrize(
    ("shape", "widest", "counts_as"),
    [
        ((512, 2048, 3, 3), 192, (192, 192, 3, 3)),
        ((192, 64, 3, 3), 192, (192, 64, 3, 3)),
        ((1000, 512), 192, (1000, 192, 1, 1)),  # classes are no width
        ((512, 1000, 1, 1), 0, (512, 992, 1, 1)),
        ((7, 3, 3, 3), 6, (6, 3, 3, 3)),
    ],
)
def test_wide_layers_are_shown_as_the_widest_that_training_meets(
    shape: tuple[int, ...], widest: int, counts_as: tuple[int, ...]
) -> None:
    config = GHNConfig(num_classes=1000 if 1000 in shape[:1] else 10, widest=widest)
    plain = replace(config, widest=0)
    assert shape_rows(shape, config) == shape_rows(counts_as, plain)


def test_widths_that_no_training_met_do_not_matter_with_a_widest_one() -> None:
    shapes = [(128, 64, 3, 3), (256, 128, 3, 3), (512, 256, 3, 3), (10, 512)]
    nodes = [Node("input"), *(Node("conv", f"w{i}", shape) for i, shape in enumerate(shapes))]
    nodes.insert(2, Node("bn", "norm", (128,), bias="shift"))
    graph = graph_from_edges(nodes, [(i, i + 1) for i in range(5)])
    torch.manual_seed(0)
    limited = GHN(GHNConfig(widest=128))
    before = limited([graph])[0]
    with torch.no_grad():
        limited.shape_enc.embed_channel.weight[channel_sizes(10).index(128) + 1 : -1] += 1
    after = limited([graph])[0]
    assert all(torch.equal(before[name], after[name]) for name in before)
    unlimited = GHN(GHNConfig())
    unlimited.load_state_dict(limited.state_dict())
    other = unlimited([graph])[0]
    assert not torch.equal(other["w1"], after["w1"])


@pytest.mark.parametrize("identity", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_a_network_of_any_width_does_what_one_of_the_widest_does(identity: bool, norm: bool) -> None:
    """Four times as wide, it gives the same scores."""

    def network(width: int) -> nn.Sequential:
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, width, 3), nn.Conv2d(width, width, 3, 2), nn.Conv2d(width, 2 * width, 1)]
        norms = [nn.BatchNorm2d(layer.out_channels) if norm else nn.Identity() for layer in layers]
        body = [part for pair in zip(layers, norms, strict=True) for part in (*pair, nn.ReLU())]
        head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, width), nn.ReLU()
        return nn.Sequential(*body, *head, nn.Linear(width, 10))

    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    for widest, alike in ((16, True), (0, False)):
        # Zeros as channel embeddings: these are what another test is about.
        ghn = GHN(GHNConfig(max_shape=(16, 16, 3, 3), identity=identity, aligned=True, widest=widest))
        torch.nn.init.zeros_(ghn.shape_enc.embed_channel.weight)
        scores = []
        for width in (16, 64):
            net = network(width)
            net.load_state_dict(ghn(trace(net, x))[0], strict=False)
            scores.append(net(x))
        same = torch.allclose(scores[0], scores[1], rtol=1e-3, atol=1e-4 * scores[0].abs().max().item())
        assert same is alike


@pytest.mark.parametrize("widest", [-1, 1.5, True])
def test_a_widest_layer_of_no_size_is_refused(widest: object) -> None:
    with pytest.raises(ConfigError, match="widest="):
        GHNConfig(widest=widest)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("node", "shape"),
    [
        (Node("conv", "w", (10, 20)), (10, 20, 1, 1)),
        (Node("bias", "w", (10,)), (10, 1, 1, 1)),
        (Node("pos_enc", "w", (1, 197, 768)), (1, 768, 14, 14)),
        (Node("pos_enc", "w", (50, 16)), (1, 16, 7, 7)),
        (Node("pos_enc", "w", (1, 16, 8, 8)), (1, 16, 8, 8)),
        (Node("max_pool", None, (1, 1, 3, 3)), (1, 1, 3, 3)),
        (Node("conv", "w", (0, 3)), (1, 3, 1, 1)),  # of a layer without elements, which is kept
        (Node("sum"), None),
    ],
)
def test_every_node_has_its_canonical_shape(node: Node, shape: tuple[int, ...] | None) -> None:
    assert canonical_shape(node) == shape


@pytest.mark.parametrize(
    "node",
    [Node("conv", "w", (3,)), Node("bn", "w", (3, 3)), Node("bias", "w", ())],
)
def test_shapes_that_no_decoder_makes_are_refused(node: Node) -> None:
    with pytest.raises(GraphError, match=rf"{node.type} node of w: shape .* expected"):
        GraphBatch.from_graphs([graph_from_edges([Node("input"), node], [(0, 1)])], GHNConfig())


def test_empty_batches_are_refused() -> None:
    with pytest.raises(GraphError, match="a batch of 0 graphs"):
        GraphBatch.from_graphs([], GHNConfig())
    with pytest.raises(GraphError, match="one of them empty"):
        GraphBatch.from_graphs([random_graph(0), Graph((), ())], GHNConfig())


def test_levels_hold_nodes_that_do_not_reach_each_other() -> None:
    batch = GraphBatch.from_graphs([random_graph(seed) for seed in range(4)], GHNConfig())
    levels, count = batch.levels, len(batch)
    assert levels[0] == 0
    assert levels[-1] * count == len(batch.types)
    assert len({row for rows in batch.nodes for row in rows}) == sum(batch.num_nodes)
    assert all(row % count == index for index, rows in enumerate(batch.nodes) for row in rows)
    for start, stop in pairwise(levels):
        assert start < stop
        assert not batch.distances[:, start:stop, start:stop].any()
        assert not batch.distances[:, start:, :start].any()


def test_batches_survive_pickling() -> None:
    ghn = GHN(GHNConfig.ghn2(**TINY)).eval()
    batch = GraphBatch.from_graphs([random_graph(0), random_graph(1)], ghn.config)
    first, second = ghn(batch), ghn(pickle.loads(pickle.dumps(batch)))
    assert all(torch.equal(a[name], b[name]) for a, b in zip(first, second, strict=True) for name in a)


def test_batch_of_another_configuration_is_refused() -> None:
    batch = GraphBatch.from_graphs([random_graph(0)], GHNConfig())
    with pytest.raises(ConfigError, match=r"was made for .*expected that of the GHN"):
        GHN(GHNConfig.ghn1())(batch)


def test_depth_buckets_are_exact_then_logarithmic() -> None:
    chain = graph_from_edges([Node("input"), *[Node("sum")] * 1999], list(pairwise(range(2000))))
    batch = GraphBatch.from_graphs([chain], GHNConfig(depth_buckets=16))
    places = batch.places[list(batch.nodes[0])]
    depths = places[:, 0].tolist()
    assert depths[:8] == list(range(8))
    assert depths == sorted(depths)
    assert set(depths) == set(range(16))
    assert depths[8:1024].count(15) < depths[1024:].count(15) == 976
    assert places[:, 1].tolist() == depths[::-1]


# The gated network


def by_the_book(gnn: GatedGNN, h: Tensor, graph: Graph) -> Tensor:
    """Section 3 of the specification, node by node; h (n, d) in the graph's order."""
    rows = list(h.unbind())
    lengths = graph.distances.astype(int)
    for _ in range(gnn.rounds):
        for matrix, order in ((lengths, range(len(rows))), (lengths.T, range(len(rows) - 1, -1, -1))):
            for v in order:
                message = torch.zeros_like(rows[v])
                for u in np.flatnonzero(matrix[:, v]):
                    if matrix[u, v] == 1:
                        message = message + gnn.mlp(rows[u])
                    if gnn.mlp_ve is not None:
                        message = message + gnn.mlp_ve(rows[u]) / matrix[u, v].item()
                rows[v] = gnn.gru(message[None], rows[v][None])[0]
    return torch.stack(rows)


@pytest.mark.parametrize("virtual_edges", [True, False])
@pytest.mark.parametrize("rounds", [1, 2])
def test_the_gated_network_and_its_gradient_go_by_the_book(virtual_edges: bool, rounds: int) -> None:
    gnn = GatedGNN(8, virtual_edges=virtual_edges, rounds=rounds).double()
    graph = random_graph(3, length=20)
    batch = GraphBatch.from_graphs([graph], GHNConfig())
    rows = list(batch.nodes[0])
    h = torch.randn(len(graph), 8, dtype=torch.double, requires_grad=True)
    weights = torch.randn(len(graph), 8, dtype=torch.double)
    inputs = [h, *gnn.parameters()]
    expected = by_the_book(gnn, h, graph)
    expected_grads = torch.autograd.grad((expected * weights).sum(), inputs)
    found = gnn(torch.empty_like(h).index_copy(0, torch.tensor(rows), h), batch)[rows]
    grads = torch.autograd.grad((found * weights).sum(), inputs)
    torch.testing.assert_close(found, expected)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad)


def test_gated_network_passes_gradcheck_on_a_batch() -> None:
    gnn = GatedGNN(4).double()
    batch = GraphBatch.from_graphs([random_graph(0, 5), random_graph(1, 4)], GHNConfig())
    names = [name for name, _ in gnn.named_parameters()]
    h = torch.randn(len(batch.types), 4, dtype=torch.double, requires_grad=True)

    def run(h: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(gnn, dict(zip(names, values, strict=True)), (h, batch))

    assert torch.autograd.gradcheck(run, (h, *gnn.parameters()))


@pytest.mark.parametrize("config", [GHNConfig.ghn2(), GHNConfig.ghn1(), GHNConfig.mlp()])
def test_predictions_do_not_depend_on_the_numbering(config: GHNConfig) -> None:
    ghn = GHN(config).double()
    graph = random_graph(5)
    other, (expected,) = renumbered(graph, 1), ghn(graph)
    assert other.nodes != graph.nodes
    (found,) = ghn(other)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values)


@pytest.mark.parametrize("config", [GHNConfig.ghn2(depth_buckets=8), GHNConfig.ghn1(), GHNConfig.mlp()])
def test_a_batch_predicts_what_its_graphs_alone_do(config: GHNConfig) -> None:
    ghn = GHN(config).double()
    graphs = [random_graph(seed) for seed in range(3)]
    for graph, found in zip(graphs, ghn(graphs), strict=True):
        (alone,) = ghn(graph)
        assert found.keys() == alone.keys()
        for name, values in alone.items():
            torch.testing.assert_close(found[name], values)


def test_edges_matter_except_to_the_mlp() -> None:
    nodes = [Node("input"), Node("conv", "a", (4, 4, 1, 1)), Node("conv", "b", (8, 4, 1, 1)), Node("sum")]
    chain = graph_from_edges(nodes, [(0, 1), (1, 2), (2, 3)])
    skip = graph_from_edges(nodes, [(0, 1), (1, 2), (2, 3), (1, 3)])
    for config, differ in ((GHNConfig.ghn2(), True), (GHNConfig.ghn1(), True), (GHNConfig.mlp(), False)):
        ghn = GHN(config)
        one, two = ghn.predict_tiles(chain)["a"].expand(), ghn.predict_tiles(skip)["a"].expand()
        assert torch.equal(one, two) is not differ


def test_depth_embeddings_tell_places_apart() -> None:
    nodes = [Node("input"), *(Node("conv", name, (4, 4, 1, 1)) for name in "abc")]
    graph = graph_from_edges(nodes, [(0, 1), (1, 2), (2, 3)])
    plain, placed = GHN(GHNConfig.mlp()), GHN(GHNConfig.mlp(depth_buckets=8))
    assert torch.equal(*(plain.predict_tiles(graph)[name].values for name in "ab"))
    assert not torch.equal(*(placed.predict_tiles(graph)[name].values for name in "ab"))
    assert set(placed.state_dict()) - set(plain.state_dict()) == {
        "place_enc.embed_depth.weight", "place_enc.embed_height.weight",
    }  # fmt: skip


# Decoders


def decoded_by_the_book(ghn: GHN, h: Tensor, node: Node, *, classifier: bool = False) -> Tensor:
    """Section 4 of the specification for one weight of two or four dimensions; h (d,)."""
    assert node.shape is not None
    decoder, (most_out, most_in, side, _) = ghn.decoder, ghn.config.max_shape
    shape = (*node.shape, 1, 1)[:4]
    height, width = min(shape[2], side), min(shape[3], side)
    x = decoder.fc(h).view(1, -1, side, side)[:, :, :height, :width]
    x = decoder.conv(x).view(most_out, most_in, height, width)
    if classifier:
        x = decoder.class_layer_predictor(x.permute(2, 0, 1, 3))[0].unsqueeze(-1)
    rows, columns, ys, xs = (
        torch.arange(size) % have for size, have in zip(shape, x.shape, strict=True)
    )  # fmt: skip
    full = x[rows][:, columns][:, :, ys][:, :, :, xs]
    single = len(node.shape) == 4 and shape[1] == 1
    beta = 1 if single or shape[2] < shape[3] else 2
    return (full * math.sqrt(beta / math.prod(shape[1:]))).view(node.shape)


@pytest.mark.parametrize(
    "shape",
    [
        (3, 4, 3, 3), (2, 2, 1, 1), (7, 9, 3, 3), (6, 8, 1, 1), (8, 1, 3, 3), (5, 6, 1, 3), (5, 6, 3, 1),
        (4, 4, 7, 5), (11, 9), (2, 3),
    ],
)  # fmt: skip
def test_weights_are_decoded_by_the_book(shape: tuple[int, ...]) -> None:
    ghn = GHN(GHNConfig.mlp(**TINY)).double()
    node = Node("conv", "w", shape)
    graph = graph_from_edges([Node("input"), node, Node("sum")], [(0, 1), (1, 2)])
    h = ghn.encode(ghn.batch(graph))[1]
    torch.testing.assert_close(ghn(graph)[0]["w"], decoded_by_the_book(ghn, h, node))


@pytest.mark.parametrize("classes", [5, 3, 12])
def test_classifiers_are_decoded_by_the_book(classes: int) -> None:
    ghn = GHN(GHNConfig.mlp(**TINY)).double()
    nodes = [Node("input"), Node("conv", "w", (classes, 9)), Node("bias", "b", (classes,))]
    graph = graph_from_edges(nodes, [(0, 1), (1, 2)])
    assert graph.classifier == (1, 2)
    _, weight, bias = ghn.encode(ghn.batch(graph))
    (found,) = ghn(graph)
    torch.testing.assert_close(found["w"], decoded_by_the_book(ghn, weight, nodes[1], classifier=True))
    row = ghn.bias_class(ghn.decoder_1d(bias).view(2, -1))[1]
    torch.testing.assert_close(found["b"], torch.tanh(row[torch.arange(classes) % 5] / 5))


def test_last_convolution_with_a_kernel_is_no_classifier() -> None:
    ghn = GHN(GHNConfig.mlp(**TINY)).double()
    nodes = [Node("input"), Node("conv", "w", (5, 4, 3, 3)), Node("bias", "b", (5,))]
    graph = graph_from_edges(nodes, [(0, 1), (1, 2)])
    h = ghn.encode(ghn.batch(graph))[1]
    torch.testing.assert_close(ghn(graph)[0]["w"], decoded_by_the_book(ghn, h, nodes[1]))


def test_vectors_are_decoded_by_the_book() -> None:
    ghn = GHN(GHNConfig.mlp(**TINY)).double()
    nodes = [Node("input"), Node("bn", "w", (9,), "b"), Node("bias", "c", (3,)), Node("sum")]
    graph = graph_from_edges(nodes, [(0, 1), (1, 2), (2, 3)])
    _, norm, bias, _ = ghn.decoder_1d(ghn.encode(ghn.batch(graph))).view(4, 2, 4)
    (found,) = ghn(graph)
    where = torch.arange(9) % 4
    torch.testing.assert_close(found["w"], 2 * torch.sigmoid(norm[0][where] / 2))
    torch.testing.assert_close(found["b"], torch.tanh(norm[1][where] / 5))
    torch.testing.assert_close(found["c"], torch.tanh(bias[1][:3] / 5))


def test_without_normalisation_vectors_and_weights_are_raw() -> None:
    ghn = GHN(GHNConfig.ghn1(**TINY))
    batch = ghn.batch(random_graph(0))
    for found, raw in zip(ghn.blocks(batch), ghn.blocks(batch, raw=True), strict=True):
        assert torch.equal(found, raw)


def single_node(ghn: GHN, node: Node) -> Tensor:
    graph = graph_from_edges([Node("input"), node, Node("sum")], [(0, 1), (1, 2)])
    return ghn(graph)[0][node.param or ""]


def test_one_and_three_dimensional_convolutions_are_decoded_as_flat_ones() -> None:
    ghn = GHN(GHNConfig.mlp(**TINY)).double()
    line = single_node(ghn, Node("conv", "w", (6, 5, 3)))
    flat = single_node(ghn, Node("conv", "w", (6, 5, 1, 3)))
    torch.testing.assert_close(line, flat[:, :, 0] * math.sqrt(2))  # 1 x k halves only a 2-d kernel
    solid = single_node(ghn, Node("conv", "w", (6, 5, 4, 3, 3)))
    plane = single_node(ghn, Node("conv", "w", (6, 5, 3, 3)))
    torch.testing.assert_close(solid, plane[:, :, None].expand_as(solid) / 2)  # fan_in counts t


def test_transposed_and_reshaped_parameters_get_the_same_values() -> None:
    ghn = GHN(GHNConfig.mlp(**TINY)).double()
    plain = single_node(ghn, Node("conv", "w", (6, 5, 3, 3)))
    swapped = single_node(ghn, Node("conv", "w", (6, 5, 3, 3), transposed=True))
    assert torch.equal(swapped, plain.transpose(0, 1))
    norm = single_node(ghn, Node("ln", "w", (6,), stored=(6, 1, 1)))
    assert torch.equal(norm.flatten(), single_node(ghn, Node("ln", "w", (6,))))
    assert norm.shape == (6, 1, 1)


def test_positional_encodings_follow_the_grid() -> None:
    ghn = GHN(GHNConfig.mlp(**TINY)).double()
    grid = single_node(ghn, Node("pos_enc", "p", (1, 6, 3, 3)))
    tokens = single_node(ghn, Node("pos_enc", "p", (1, 9, 6)))
    assert torch.equal(tokens, grid.flatten(2).transpose(1, 2))
    with_class = single_node(ghn, Node("pos_enc", "p", (1, 10, 6)))
    assert torch.equal(with_class[:, 1:], tokens)  # patches keep their places, the class token comes first
    assert torch.equal(with_class[:, 0], tokens[:, -1])
    assert torch.equal(single_node(ghn, Node("pos_enc", "p", (10, 6))), with_class[0])
    larger = single_node(ghn, Node("pos_enc", "p", (1, 25, 6))).view(5, 5, 6)  # wider than K = 3
    torch.testing.assert_close(larger[3:, :3], larger[:2, :3])


def test_only_large_positional_encodings_are_left_as_they_are() -> None:
    config = GHNConfig(max_shape=(4, 8, 11, 11))
    graph = graph_from_edges(
        [Node("input"), Node("pos_enc", "a", (1, 8, 11, 11)), Node("pos_enc", "b", (1, 82, 8)), Node("sum")],
        [(0, 3), (1, 3), (2, 3)],
    )
    batch = GraphBatch.from_graphs([graph], config)
    names = [name for group in batch.groups for _, name in group.members]
    scales = dict(zip(names, batch.scales.tolist(), strict=True))
    assert scales == pytest.approx({"a": 1.0, "b": math.sqrt(2 / (8 * 9 * 9))})


@pytest.mark.parametrize("config", [GHNConfig.ghn2(**TINY, depth_buckets=4), GHNConfig.ghn1(**TINY)])
def test_gradients_of_the_whole_model_are_right(config: GHNConfig) -> None:
    ghn = GHN(config).double()
    batch = GraphBatch.from_graphs([random_graph(0), random_graph(2)], config)
    names, values = zip(*ghn.named_parameters(), strict=True)

    def run(*values: Tensor) -> tuple[Tensor, ...]:
        found = torch.func.functional_call(ghn, dict(zip(names, values, strict=True)), (batch,))
        # A smooth function of every predicted parameter, so that gradcheck's cost stays small.
        return tuple(
            torch.stack([v.square().sum() + v.flatten()[-1] for v in d.values()]).sum() for d in found
        )

    assert torch.autograd.gradcheck(run, values, fast_mode=True, atol=1e-4)


def test_same_graph_and_weights_give_the_same_bits() -> None:
    ghn, graph = GHN(), random_graph(7, 30)
    first, again = ghn.predict_tiles(graph), ghn.predict_tiles(graph)
    assert all(torch.equal(tile.values, again[name].values) for name, tile in first.items())
    (full,), (full_again,) = ghn(graph), ghn(graph)
    assert all(torch.equal(values, full_again[name]) for name, values in full.items())


def test_tiles_are_the_full_tensors() -> None:
    ghn, graph = GHN(GHNConfig.ghn2(**TINY)), random_graph(8, 40)
    tiles, (full,) = ghn.predict_tiles(graph), ghn(graph)
    assert tiles.keys() == full.keys()
    for name, tile in tiles.items():
        torch.testing.assert_close(tile.expand(), full[name].detach(), rtol=1e-5, atol=1e-6)
        assert tile.tiled == (tile.values.numel() < full[name].numel())


def test_named_parameters_alone_are_predicted() -> None:
    ghn, graph = GHN(GHNConfig.ghn2(**TINY)), random_graph(8, 40)
    everything = ghn.predict_tiles(graph)
    names = ["fc.bias", *list(everything)[::3]]
    some = ghn.predict_tiles(graph, names=names)
    assert some.keys() == set(names)
    for name, tile in some.items():
        torch.testing.assert_close(tile.values, everything[name].values)
    assert ghn.predict_tiles(graph, names=[]) == {}


def test_autocast_does_not_reach_the_model() -> None:
    ghn, graph = GHN(GHNConfig.ghn2(**TINY)), random_graph(1)
    (expected,) = ghn(graph)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (found,) = ghn(graph)
        sum(values.sum() for values in found.values()).backward()
    assert all(torch.equal(found[name], values) for name, values in expected.items())
    assert ghn.embed.weight.grad is not None


# Tiles


SHAPES = [
    ((7,), (3,)), ((6,), (3,)), ((2,), (2,)), ((7, 5), (3, 4)), ((6, 8, 3, 3), (3, 4, 3, 3)),
    ((7, 9, 5, 2), (3, 4, 3, 2)), ((4, 6, 3, 2, 2), (2, 6, 1, 2, 2)), ((1, 10, 7), (1, 9, 6)),
]  # fmt: skip


def periodic(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    for axis, size in enumerate(shape):
        values = values.index_select(axis, torch.arange(size) % values.shape[axis])
    return values


@pytest.mark.parametrize(("shape", "block"), SHAPES)
def test_tiles_repeat_and_are_cut(shape: tuple[int, ...], block: tuple[int, ...]) -> None:
    values = torch.randn(block)
    tile = Tile(values, shape, shape)
    assert torch.equal(tile.expand(), periodic(values, shape))
    assert tile.tiled == (shape != block)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        param = torch.nn.Parameter(torch.full(shape, torch.nan, dtype=dtype))
        version = param.data_ptr()
        tile.copy_into(param)
        assert torch.equal(param, periodic(values, shape).to(dtype))
        assert (param.data_ptr(), param.requires_grad) == (version, True)


def test_tiles_are_written_through_any_strides() -> None:
    values = torch.randn(3, 4, 3, 3)
    expected = periodic(values, (7, 9, 3, 3))
    last = torch.empty(7, 9, 3, 3).to(memory_format=torch.channels_last)
    Tile(values, (7, 9, 3, 3), (7, 9, 3, 3)).copy_into(last)
    assert torch.equal(last, expected)
    assert last.is_contiguous(memory_format=torch.channels_last)
    swapped = torch.empty(9, 7, 3, 3)
    tile = Tile(values, (7, 9, 3, 3), (9, 7, 3, 3), transposed=True)
    tile.copy_into(swapped)
    assert torch.equal(swapped, expected.transpose(0, 1))
    assert torch.equal(tile.expand(), swapped)
    spread = torch.empty(7, 2, 2)[:, :1, :1]
    Tile(torch.randn(3), (7,), (7, 1, 1)).copy_into(spread)
    flat = torch.empty(14)[::2].view(7, 1)
    vector = Tile(torch.randn(3), (7,), (7, 1))
    vector.copy_into(flat)
    assert torch.equal(flat, vector.expand())


@pytest.mark.parametrize(("shape", "block"), SHAPES)
def test_sum_over_tiles_is_the_adjoint_of_tiling(shape: tuple[int, ...], block: tuple[int, ...]) -> None:
    x = torch.randn(2, *block, dtype=torch.double)
    y = torch.randn(2, *shape, dtype=torch.double)
    torch.testing.assert_close((tile_to(x, shape) * y).sum(), (x * sum_repeats(y, block)).sum())


@pytest.mark.parametrize("transposed", [False, True])
def test_full_size_parameters_pass_gradcheck(transposed: bool) -> None:
    values = torch.randn(2, 3, 2, 1, dtype=torch.double, requires_grad=True)
    stored = (5, 7, 2) if transposed else (7, 5, 2)

    def run(values: Tensor) -> tuple[Tensor, ...]:
        return full_size(values, (7, 5, 2), stored, transposed=transposed)

    assert [tuple(full.shape) for full in run(values)] == [stored] * 2
    assert torch.autograd.gradcheck(run, values)


# Starting weights


@pytest.mark.parametrize("config", [GHNConfig.ghn2(), GHNConfig.ghn1(), GHNConfig.mlp()])
def test_initial_predictions_have_the_wanted_spread(config: GHNConfig) -> None:
    graphs = [random_graph(seed, 30, classes=10) for seed in range(4)]
    state, (one, two) = torch.get_rng_state(), (GHN(config), GHN(config))
    drawn = torch.get_rng_state()
    init_for_training(one, graphs, seed=3)
    init_for_training(two, graphs, seed=3)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert not torch.equal(drawn, state)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    batch = one.batch(graphs)
    squares: dict[str, list[Tensor]] = {}
    for values, group in zip(one.blocks(batch, raw=True), batch.groups, strict=True):
        squares.setdefault(KINDS[group.key.kind], []).append(values.detach().square().flatten())
    rms = {kind: torch.cat(parts).mean().sqrt().item() for kind, parts in squares.items()}
    wanted = dict.fromkeys(KINDS, VECTOR_RMS) | {"weight": 1.0, "class_weight": 1.0}
    assert rms == pytest.approx(wanted, rel=1e-3)


def test_a_shared_module_is_decoded_from_its_first_call() -> None:
    nodes = [Node("input"), Node("conv", "a.weight", (4, 4)), Node("conv", "b.weight", (4, 4))]
    edges = [(0, 1), (1, 2), (2, 3), (3, 4)]
    tail = Node("glob_avg")
    once = graph_from_edges([*nodes, Node("sum"), tail], edges)
    twice = graph_from_edges([*nodes, nodes[1], tail], edges)
    ghn = GHN(GHNConfig(hypernet="mlp"))
    assert set(ghn(twice)[0]) == {"a.weight", "b.weight"}
    torch.testing.assert_close(ghn(twice)[0]["a.weight"], ghn(once)[0]["a.weight"])


def test_a_norm_layer_may_have_a_bias_alone() -> None:
    graph = graph_from_edges([Node("input"), Node("ln", None, (6,), bias="norm.bias")], [(0, 1)])
    assert {name: tuple(t.shape) for name, t in GHN(GHNConfig())(graph)[0].items()} == {"norm.bias": (6,)}
