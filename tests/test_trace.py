"""The tracer: equal to the reference, sees through any code, and leaves no trace of itself."""

from __future__ import annotations

import gzip
import json
import random
from collections import Counter, UserDict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from ghn_init import Graph, Node, TraceError, record, trace
from ghn_init._graph.graph import graph_from_edges
from ghn_init._tracing.trace import traced
from networks import bridged, reference_network, without_initialisation

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

REFERENCE = (
    "resnet18", "resnet50", "vgg11_bn", "mobilenet_v2", "squeezenet1_0", "densenet121",
    "shufflenet_v2_x1_0", "mobilenet_v3_small", "convnext_tiny", "resnet50_cifar",
)  # fmt: skip

WANTED_DIFFERENCES = {"mobilenet_v3_small": "cse", "shufflenet_v2_x1_0": "glob_avg"}
"""Nodes that the definition asks for and the reference lacks; bridged away, the graphs are equal."""


@pytest.fixture(scope="session")
def reference(shared: Path) -> dict[str, Any]:
    with gzip.open(shared / "parity" / "torchvision.json.gz") as file:
        return json.load(file)


def signature(graph: Graph) -> Counter[Any]:
    """The graph up to node numbers: for every node what it is and all that it is computed from."""
    signatures: list[int] = []
    for node, preds in zip(graph.nodes, graph.predecessors, strict=True):
        signatures.append(
            hash((node.type, node.param, node.shape, tuple(sorted(signatures[u] for u in preds))))
        )
    return Counter(signatures)


def from_reference(entry: dict[str, Any]) -> Graph:
    nodes = [Node(n["type"], n["param"], tuple(n["shape"]) if n["shape"] else None) for n in entry["nodes"]]
    return graph_from_edges(nodes, [tuple(edge) for edge in entry["edges"]])


@pytest.mark.parametrize("name", REFERENCE)
def test_graphs_equal_the_reference(name: str, reference: dict[str, Any]) -> None:
    entry = reference[name]
    graph = trace(reference_network(name), (1, *entry["input"]))
    if name in WANTED_DIFFERENCES:
        kind = WANTED_DIFFERENCES[name]
        missing = (
            Counter(n.type for n in graph.nodes)[kind] - Counter(n["type"] for n in entry["nodes"])[kind]
        )
        assert missing == {"cse": 9, "glob_avg": 1}[kind]
        graph = bridged(graph, {i for i, node in enumerate(graph.nodes) if node.type == kind})
    assert signature(graph) == signature(from_reference(entry))
    virtual = graph.distances[graph.distances > 1]
    assert len(virtual) == entry["n_virtual_edges"]
    assert int(virtual.sum(dtype=int)) == entry["sum_virtual_distance"]


TORCHVISION = torchvision.models.list_models(module=torchvision.models)


@pytest.mark.parametrize("name", TORCHVISION)
def test_every_torchvision_classifier_is_traced(name: str) -> None:
    slow_to_build = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    with without_initialisation():
        model = torchvision.models.get_model(name, **slow_to_build)
    graph = trace(model)
    total = sum(p.numel() for p in model.parameters())
    left = sum(int(np.prod(u.shape)) for u in graph.unmatched)
    assert left / total < 0.004, [(u.name, u.role) for u in graph.unmatched]
    assert not [u for u in graph.unmatched if u.role in ("unused", "does not reach the output")]
    params = [p for node in graph.nodes for p in (node.param, node.bias) if p]
    assert sorted({*params, *(u.name for u in graph.unmatched)}) == sorted(
        n for n, _ in model.named_parameters()
    )


def test_there_are_eighty_torchvision_classifiers() -> None:
    assert len(TORCHVISION) >= 80


def types(model: nn.Module, example: Any = None) -> Counter[str]:
    return Counter(node.type for node in trace(model, example).nodes)


def roles(graph: Graph) -> dict[str, str]:
    return {parameter.name: parameter.role for parameter in graph.unmatched}


def test_attention_is_one_node_between_its_projections() -> None:
    with torch.device("meta"):
        graph = trace(torchvision.models.vit_b_16())
    (first, *_) = (i for i, node in enumerate(graph.nodes) if node.type == "msa")
    (before,) = graph.predecessors[first]
    assert graph.nodes[before].param == "encoder.layers.encoder_layer_0.self_attention.in_proj_bias"
    after = [graph.nodes[v].param for u, v in graph.edges if u == first]
    assert after == ["encoder.layers.encoder_layer_0.self_attention.out_proj.weight"]
    assert [node.param for node in graph.nodes if node.type == "pos_enc"] == ["encoder.pos_embedding"]
    assert roles(graph) == {"class_token": "class token"}


class HandWrittenAttention(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.qkv, self.out, self.fused = nn.Linear(16, 48), nn.Linear(16, 16), fused
        self.table = nn.Parameter(torch.zeros(1, 4, 9, 9))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(len(x), -1, 3, 4, 4).permute(2, 0, 3, 1, 4)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.table.to(x.dtype))
        else:
            y = (q @ k.transpose(-2, -1) * 0.5 + self.table).softmax(-1) @ v
        return x + self.out(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("fused", [False, True])
def test_hand_written_attention_is_the_same_block(fused: bool) -> None:
    graph = trace(HandWrittenAttention(fused), (2, 9, 16))
    assert [node.type for node in graph.nodes] == ["input", "conv", "bias", "msa", "conv", "bias", "sum"]
    assert graph.edges == ((0, 1), (0, 6), (1, 2), (2, 3), (3, 4), (4, 5), (5, 6))
    assert roles(graph) == {"table": "relative position table"}


def test_separate_projections_of_multihead_attention_are_nodes() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, kdim=4, vdim=6)

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self.attention(q, k, v)[0]

    shapes = ((3, 2, 8), (5, 2, 4), (5, 2, 6))
    graph = trace(Cross(), tuple(torch.empty(shape) for shape in shapes))
    assert Counter(node.type for node in graph.nodes) == Counter(input=1, conv=4, bias=2, msa=1)
    assert not graph.unmatched


class ControlFlow(nn.Module):
    """Shapes decide the path; `len()` and a Python loop over a shape."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 1)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.wide(x) if x.shape[-1] > 16 else self.narrow(x)
        rows = [x[..., i, :] for i in range(x.shape[2])]
        assert len(rows) == len(x[0, 0])
        return self.head(torch.stack(rows, 2).mean((2, 3)))


def test_a_structure_that_is_drawn_is_always_the_same() -> None:
    class Drawn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.end = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            times = int(torch.randint(1, 50, ())) + random.randrange(50) + int(np.random.randint(50))  # noqa: NPY002
            for _ in range(times):
                x = self.layer(x)
            return self.end(x)

    graphs, model = set(), Drawn()
    for seed in range(3):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        graphs.add(len(trace(model, (2, 8))))
        assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(seed)))
    assert len(graphs) == 1


def test_control_flow_on_shapes_is_followed() -> None:
    assert [n.param for n in trace(ControlFlow(), (1, 3, 32, 32)).nodes][1] == "wide.weight"
    graph = trace(ControlFlow(), (1, 3, 8, 8))
    assert [n.param for n in graph.nodes][1] == "narrow.weight"
    assert roles(graph) == {"wide.weight": "unused", "wide.bias": "unused"}


class BareParameters(nn.Module):
    """Layers without modules: functions of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(8, 3, 3, 3))
        self.shift = nn.Parameter(torch.zeros(8, 1, 1))
        self.matrix, self.b = nn.Parameter(torch.zeros(8, 5)), nn.Parameter(torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        x = (F.conv2d(x, self.w / 2, padding=1) + self.shift).mean((2, 3))
        return x @ self.matrix + self.b


def test_parameters_used_by_functions_are_layers() -> None:
    graph = trace(BareParameters())
    assert [(n.type, n.param) for n in graph.nodes[1:]] == [
        ("conv", "w"), ("glob_avg", None), ("conv", "matrix"), ("bias", "b"),
    ]  # fmt: skip
    matrix = graph.nodes[3]
    assert matrix.shape == (5, 8)
    assert matrix.transposed
    assert roles(graph) == {"shift": "shift"}


def test_one_incoming_edge_is_no_sum() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return F.relu(y) + torch.cat([y, y], 1)[:, :3]

    assert types(Residual(), (1, 3, 8, 8)) == Counter(input=1, conv=1)


def test_squeeze_and_excitation_is_cse() -> None:
    block = torchvision.ops.SqueezeExcitation(8, 2)
    assert types(block, (1, 8, 5, 5)) == Counter(input=1, glob_avg=1, conv=2, bias=2, cse=1)


def test_types_of_convolutions_follow_groups_and_dilation() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 3, groups=2, dilation=2),
        nn.Conv2d(4, 4, 3, dilation=2),
        nn.ConvTranspose2d(4, 6, 2, bias=False), nn.Conv2d(6, 2, 3, padding="same", padding_mode="reflect"),
    )  # fmt: skip
    nodes = trace(model, (1, 4, 16, 16)).nodes
    assert [n.type for n in nodes if n.type != "bias"] == [
        "input",
        "sep_conv",
        "dil_conv",
        "conv",
        "conv",
        "conv",
    ]
    transposed = next(n for n in nodes if n.transposed)
    assert transposed.param == "3.weight"
    assert transposed.shape == (6, 4, 2, 2)


def test_shared_modules_have_a_node_for_each_call() -> None:
    layer = nn.Linear(4, 4, bias=False)
    graph = trace(nn.Sequential(layer, nn.ReLU(), layer))
    assert [n.param for n in graph.nodes] == [None, "0.weight", "0.weight"]


def test_several_inputs_and_outputs_are_traced() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.dead = nn.Linear(3, 4), nn.Linear(5, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor, *, y: Tensor) -> dict[str, Tensor]:
            a, b = self.a(x), self.b(y)
            self.dead(a)
            return {"sum": a + b, "b": b}

    graph = trace(Two(), {"x": torch.zeros(2, 3), "y": torch.zeros(2, 5)})
    assert Counter(n.type for n in graph.nodes) == Counter(input=1, conv=2, bias=2, sum=1)
    assert roles(graph) == dict.fromkeys(("dead.weight", "dead.bias"), "does not reach the output")


IMAGES = torch.zeros(2, 3, 40, 40)


@pytest.mark.parametrize("example", [IMAGES, tuple(IMAGES.shape), [2, 3, 40, 40], (IMAGES,), {"x": IMAGES}])
def test_every_form_of_an_example_input_is_taken(example: Any) -> None:
    assert trace(torchvision.models.resnet18(num_classes=3), example).nodes[1].param == "conv1.weight"


class LeNet(nn.Module):
    """Takes 32 x 32 images only: the flattened size is fixed."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 6, 5), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.MaxPool2d(2)
        )
        self.head = nn.Linear(16 * 5 * 5, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).flatten(1))


def test_the_image_size_is_found() -> None:
    assert types(LeNet()) == Counter(input=1, conv=3, bias=3, max_pool=2)


def test_an_input_size_in_default_cfg_is_believed() -> None:
    model = LeNet()
    model.default_cfg = {"input_size": (1, 32, 32)}  # type: ignore[assignment]
    assert traced(model).example.origin == "default_cfg"
    assert len(trace(model)) == 9


@pytest.mark.parametrize(
    "said",
    [
        {"default_cfg": {"input_size": 224}},
        {"default_cfg": {"input_size": "3x224"}},
        {"image_size": -1},
        {"image_size": 10**10},
        {"image_size": (None, None)},
        {"image_size": True},
        {"image_size": torch.tensor([32, 32])},
        {"config": {"image_size": 10**10, "num_channels": [3, 64]}},
    ],
)
def test_a_size_that_no_input_has_is_passed_over(said: dict[str, Any]) -> None:
    model = LeNet()
    for name, value in said.items():
        setattr(model, name, value)
    assert traced(model).example.origin == "first layer"


def test_channels_that_are_no_number_are_those_of_the_first_layer() -> None:
    model = LeNet()
    model.config = {"image_size": 32, "num_channels": [3, 64]}  # type: ignore[assignment]
    assert traced(model).example.described == "(1, 1, 32, 32)"


@pytest.mark.parametrize("name", ["config", "image_size", "default_cfg", "main_input_name"])
def test_a_property_that_fails_says_nothing_of_the_input(name: str) -> None:
    def fails(model: nn.Module) -> None:
        raise RuntimeError("not attached to a trainer")

    model = type("Unattached", (LeNet,), {name: property(fails)})()
    assert traced(model).example.origin == "first layer"


def test_a_wrong_input_names_the_module_and_the_remedy() -> None:
    with pytest.raises(
        TraceError, match=r"LeNet: the forward pass failed in head \(Linear\).*\(1, 1, 40, 40\)"
    ):
        trace(LeNet(), (1, 1, 40, 40))


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({1: IMAGES}, r"expected their names, found 1 \(int\); give a tuple"),
        (((1, 3, -1, 32),), r"there is no input of shape \(1, 3, -1, 32\): .*negative dimension"),
        ({"x": (1, 3, -1, 32)}, r"there is no input of shape \(1, 3, -1, 32\)"),
        ({"x": [{"y": (10**12, 10**12)}]}, r"there is no input of shape \(10{12}, 10{12}\): .*overflow"),
    ],
)
def test_examples_that_no_network_takes_are_refused(example: Any, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        trace(LeNet(), example)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_a_nested_example_is_refused(layout: torch.layout) -> None:
    nested = torch.nested.nested_tensor([torch.zeros(4, 8), torch.zeros(5, 8)], layout=layout)
    with pytest.raises(TraceError, match="a nested tensor, whose parts differ in shape; give a padded"):
        trace(nn.Linear(8, 2), nested)


def test_an_error_says_that_no_input_fits() -> None:
    class Strange(nn.Module):
        def forward(self, sides: dict[str, Tensor]) -> Tensor:
            return sides["left"] + sides["right"]

    with pytest.raises(TraceError, match=r"^Strange: the forward pass failed.*Pass example_input="):
        trace(Strange())


@pytest.mark.parametrize(
    ("model", "found"), [(nn.Linear, "the class Linear"), ("resnet", "str"), (None, "NoneType")]
)
def test_only_modules_are_traced(model: Any, found: str) -> None:
    with pytest.raises(TraceError, match=f"expected an nn.Module instance, found {found}"):
        trace(model)


def test_lazy_parameters_are_refused_with_the_remedy() -> None:
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(TraceError, match=r"2 lazy parameters.*run the model once"):
        trace(model)


def test_data_dependent_code_is_an_error_with_its_place() -> None:
    class Gate(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(TraceError, match=r"in 0 \(Gate\)"):
        trace(nn.Sequential(Gate(), nn.Linear(3, 3)), (1, 3))


class Meddler(nn.Module):
    """Does in its forward pass what a trace must not let through."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1)
        self.cache: Tensor | None = None
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor, fail: bool = False) -> Tensor:
        random.random(), np.random.rand(), torch.rand(3)  # noqa: NPY002
        self.count += 1
        self.conv.weight.data.mul_(2)
        self.cache = self.conv(self.norm(self.norm(x)))
        self.new_attribute = 1
        self.norm.register_forward_hook(lambda *_: None)
        if fail:
            raise RuntimeError("on purpose")
        return self.cache


class Masked(nn.Module):
    """Makes constants on the input's device, writes into them and reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.register_buffer("padding", torch.tensor(1))

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[-2:], device=x.device)
        padding = int(self.padding) if bool(mask.all()) else 0
        padded = torch.zeros(1, 3, *(size + 2 * padding for size in x.shape[-2:]), device=x.device)
        padded[:, :, padding:-padding, padding:-padding] = x
        return self.conv(padded)


def test_constants_and_buffers_can_be_read_and_written_into() -> None:
    graph = trace(Masked(), (1, 3, 6, 6))
    assert [node.type for node in graph.nodes] == ["input", "conv", "bias"]
    assert graph.edges == ((0, 1), (1, 2))


def test_layers_that_are_dropped_in_training_are_in_the_graph() -> None:
    class LayerDrop(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            for layer in self:
                x = x if self.training else layer(x)
            return x

    model = LayerDrop(nn.Linear(4, 4), nn.Linear(4, 4)).train()
    assert [node.type for node in trace(model).nodes] == ["input", "conv", "bias", "conv", "bias"]
    assert model.training


def random_states() -> tuple[Any, ...]:
    numpy = np.random.get_state()[1].tolist()  # type: ignore[index,union-attr]  # noqa: NPY002
    return random.getstate(), numpy, torch.get_rng_state().tolist()


@pytest.mark.parametrize("fail", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_the_model_and_the_random_states_are_untouched(fail: bool, training: bool) -> None:
    model = Meddler().train(training)
    state = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    attributes = dict(vars(model))
    states = random_states()
    if fail:
        with pytest.raises(TraceError, match="on purpose"):
            trace(model, {"x": torch.zeros(2, 3, 4, 4), "fail": True})
    else:
        trace(model, (2, 3, 4, 4))
    assert states == random_states()
    assert vars(model) == attributes
    assert model.training is training
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert tensor is state[name][0]
        assert torch.equal(tensor, state[name][1])
    assert not model._forward_hooks
    assert not model.norm._forward_hooks


class Once(nn.Module):
    """Takes images of 64 pixels, and breaks when it is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.calls: int = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        assert self.calls == 1
        assert x.shape[-1] == 64
        return self.conv(x)


class Tracker:
    def __init__(self) -> None:
        self.count, self.seen = 0, [1]
        self.inner: Tracker | None = None


class Collecting(nn.Module):
    """Changes what it holds, what its class holds, and what its generators draw next."""

    total = 0

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.tracker, self.lists = Tracker(), ([1], {"a": 2})
        self.tracker.inner = self.inner = Tracker()
        self.layers = [Tracker()]
        self.torchs, self.pythons = torch.Generator().manual_seed(1), random.Random(1)
        self.numpys = [np.random.default_rng(1), np.random.RandomState(1)]

    def forward(self, x: Tensor) -> Tensor:
        self.tracker.count += 1
        self.tracker.seen.append(2)
        for tracker in (self.inner, *self.layers):
            tracker.count += 1
        self.lists[0].append(2)
        self.lists[1]["b"] = 3
        Collecting.total += 1
        Collecting.extra = 1  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
        self.draw()
        return self.conv(x)

    def draw(self) -> tuple[float, ...]:
        numpys = [generator.random() if hasattr(generator, "random") else 0 for generator in self.numpys]
        return (float(torch.rand((), generator=self.torchs)), self.pythons.random(), *map(float, numpys))


def test_what_a_model_holds_is_put_back_with_its_classes_and_generators() -> None:
    model, everywhere = Collecting(), list[Any]()
    hook = nn.modules.module.register_module_forward_hook(lambda *args: everywhere.append(args))
    try:
        trace(model, (2, 3, 4, 4))
    finally:
        hook.remove()
    assert (model.tracker.count, model.tracker.seen, model.lists) == (0, [1], ([1], {"a": 2}))
    assert [tracker.count for tracker in (model.inner, *model.layers)] == [0, 0]
    assert Collecting.total == 0
    assert not hasattr(Collecting, "extra")
    assert model.draw() == Collecting().draw()
    assert not everywhere


class Hooking(nn.Module):
    """Says what is to become of gradients, of its weights once."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.hooked = nn.Conv2d(3, 4, 1), False

    def forward(self, x: Tensor) -> Tensor:
        if not self.hooked:
            self.hooked = True
            self.conv.weight.register_hook(lambda gradient: 2 * gradient)
            self.conv.weight.register_post_accumulate_grad_hook(lambda _: None)
        y = self.conv(x)
        y.register_hook(lambda gradient: gradient).remove()
        y.retain_grad()
        return y


def test_no_hook_stays_on_a_parameter() -> None:
    model = Hooking()
    assert [node.type for node in trace(model, (2, 3, 4, 4)).nodes] == ["input", "conv", "bias"]
    assert not model.hooked
    model(torch.ones(1, 3, 1, 1)).sum().backward()
    assert model.conv.weight.grad is not None
    assert model.conv.weight.grad.eq(2).all()  # and not 4


def test_every_attempt_finds_the_model_as_it_was() -> None:
    model = Once()
    assert [node.type for node in trace(model).nodes] == ["input", "conv", "bias"]
    assert model.calls == 0


def _detector() -> nn.Module:
    return torchvision.models.detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None)


@pytest.mark.parametrize(
    ("make", "example", "found"),
    [
        (Once, None, ("(1, 3, 64, 64)", "first layer", "as it is")),
        (lambda: nn.Linear(3, 4), (7, 3), ("(7, 3)", "given", "as it is")),
        (lambda: nn.Embedding(5, 4), None, ("(1, 16)", "first layer", "as it is")),
        (_detector, None, ("[(3, 224, 224)]", "first layer, a list", "evaluating")),
    ],
    ids=["image", "given", "tokens", "detector"],
)
def test_how_the_input_was_found_is_told(
    make: Callable[[], nn.Module], example: object, found: tuple[str, str, str]
) -> None:
    with without_initialisation():
        model = make()
    result = traced(model, example)
    assert (result.example.described, result.example.origin, result.mode) == found
    assert result.graph == trace(model, example)


def test_a_model_on_meta_gives_the_same_graph() -> None:
    with torch.device("meta"):
        on_meta = torchvision.models.resnet18(num_classes=10)
    assert trace(on_meta) == trace(torchvision.models.resnet18(num_classes=10))


@pytest.mark.parametrize("classes", [4, 2**16])
def test_places_written_out_one_hot_take_no_memory(classes: int) -> None:
    made: tuple[Tensor, ...] = ()

    class Places(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.zeros(classes, 3, device="meta"))

        def forward(self, x: Tensor) -> Tensor:
            places = nn.functional.one_hot(torch.arange(x.shape[1]).clamp(max=3), num_classes=classes)
            nonlocal made  # a list would get back what it had
            made = (*made, places)
            return x + places.to(x) @ self.table

    graph = trace(Places(), (2, 32, 3))
    assert [(places.shape, places.is_meta) for places in made] == [((32, classes), classes > 4)]
    assert [node.param for node in graph.nodes if node.param] == ["table"]


# Transforms, and what forward passes return ------------------------------------------------------------


class Small(nn.Module):
    """Two convolutions, a head, and a place in between where `middle` comes."""

    def __init__(
        self, middle: Callable[[Tensor], Tensor] = torch.relu, given: Callable[[Any], Any] = list
    ) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.fc, self.middle, self.given = nn.Linear(8, 10), middle, given

    def forward(self, x: Tensor) -> Any:
        return self.given([self.fc(self.second(self.middle(self.first(x))).mean((2, 3)))])


@pytest.mark.parametrize(
    "middle",
    [
        torch.vmap(lambda t: t * torch.sigmoid(t)),
        torch.vmap(torch.relu, in_dims=1, out_dims=-3),
        torch.vmap(torch.vmap(torch.relu), chunk_size=2),
        torch.vmap(lambda t: (torch.relu(t), t.sum()))  # several outputs
    ],
)  # fmt: skip
def test_what_is_mapped_over_is_in_the_graph(middle: Any) -> None:
    network = Small(lambda x: middle(x)[0] if isinstance(middle(x), tuple) else middle(x))
    graph = trace(network, (2, 3, 8, 8))
    assert signature(graph) == signature(trace(Small(), (2, 3, 8, 8)))
    assert torch.equal(torch.vmap(torch.sin)(torch.ones(3, 1)), torch.ones(3, 1).sin())


def test_an_ensemble_of_weights_is_in_the_graph_and_maps_of_constants_are_computed() -> None:
    class Ensemble(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            self.weight, self.bias = nn.Parameter(torch.ones(4, 10, 8)), nn.Parameter(torch.ones(4, 10))

        def forward(self, x: Tensor) -> Tensor:
            later = torch.vmap(lambda i: torch.vmap(lambda j: i >= j)(torch.arange(4)))(torch.arange(4))
            assert later.sum() == 10
            return torch.vmap(F.linear, (None, 0, 0))(self.conv(x).mean((2, 3)), self.weight, self.bias).mean(
                0
            )

    graph = trace(Ensemble(), (2, 3, 8, 8))
    assert not graph.unmatched
    assert [node.param for node in graph.nodes if node.type == "conv"] == ["conv.weight", "weight"]


@pytest.mark.parametrize(
    "middle",
    [
        torch.func.grad(lambda t: (t**3).sum()),
        lambda x: torch.func.jvp(torch.sin, (x,), (torch.ones_like(x),))[1],
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by torch, on the first jvp
def test_transforms_that_cannot_be_followed_are_an_error(middle: Any) -> None:
    with pytest.raises(TraceError, match=r"torch\.func\.grad, jvp.*ghn_init\.register"):
        trace(Small(middle), (2, 3, 8, 8))


def test_numbers_that_are_printed_have_no_value() -> None:
    said: list[str] = []

    def middle(x: Tensor) -> Tensor:
        said.append(f"{x.mean():.2f} {x.argmax():d}")
        return torch.relu(x)

    assert trace(Small(middle), (2, 3, 8, 8)) == trace(Small(), (2, 3, 8, 8))
    assert said == ["nan 0"]


def test_autocast_on_the_device_of_an_activation() -> None:
    def middle(x: Tensor) -> Tensor:
        with (
            torch.autocast(x.device.type, dtype=torch.bfloat16),
            torch.autocast(x.device.type, enabled=False),
        ):
            return torch.relu(x)

    for device in ("cpu", "meta"):
        assert trace(Small(middle).to(device), (2, 3, 8, 8)) == trace(Small(), (2, 3, 8, 8))
    record(Small(middle), (2, 3, 8, 8))(torch.zeros(2, 3, 8, 8))
    with pytest.raises(RuntimeError):  # as ever
        torch.autocast("meta")


@dataclass
class Result:
    logits: Tensor


class Slots:
    __slots__ = ("logits",)

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


def containing_itself(outputs: list[Tensor]) -> dict[str, Any]:
    found: dict[str, Any] = {"logits": outputs[0]}
    found["all"] = found
    return found


@pytest.mark.parametrize(
    "given",
    [
        tuple, set, containing_itself,
        lambda outputs: Result(outputs[0]),
        lambda outputs: Slots(outputs[0]),
        lambda outputs: SimpleNamespace(logits=outputs),
        lambda outputs: UserDict(logits=outputs[0]),
        lambda _: 3,
    ],
)  # fmt: skip
def test_whatever_a_forward_pass_returns_the_graph_is_whole(given: Any) -> None:
    assert trace(Small(given=given), (2, 3, 8, 8)) == trace(Small(), (2, 3, 8, 8))
    record(Small(given=given), (2, 3, 8, 8))


def test_a_forward_pass_that_freezes_parts_does_not_reach_the_model() -> None:
    class Warming(Small):
        steps = 0

        def forward(self, x: Tensor) -> Any:
            self.steps += 1
            self.first.requires_grad_(self.steps > 100)
            return super().forward(x.requires_grad_(True))

    network = Warming()
    trace(network, (2, 3, 8, 8))
    assert network.steps == 0
    assert all(param.requires_grad for param in network.parameters())


def test_what_no_input_mends_is_told_with_its_line_and_without_other_inputs() -> None:
    def branching(x: Tensor) -> Tensor:
        return x if x.mean() > 0 else -x

    with pytest.raises(TraceError, match=r"test_trace\.py:\d+: Tensor\.__bool__ needs") as caught:
        trace(Small(branching))
    assert "example_input" not in str(caught.value)


def test_a_forward_pass_that_takes_its_input_by_name_is_traced() -> None:
    class Named(Small):
        def forward(self, *, image: Tensor) -> Any:  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]
            return super().forward(image)

    assert signature(trace(Named())) == signature(trace(Small()))
    with pytest.raises(TraceError, match=r"on an input of shape image \(1, 5, 8, 8\)"):
        trace(Named(), {"image": (1, 5, 8, 8)})
