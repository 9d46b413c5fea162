"""`record`: a `torch.fx.GraphModule` that says all, runs again, and gives the graph that the model gives."""

from __future__ import annotations

import copy
import warnings
from collections import deque
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp, TensorMetadata

import ghn_init
from ghn_init import TraceError, plan, predict, record, register, trace
from networks import without_initialisation

if TYPE_CHECKING:
    from collections.abc import Callable

NAMES = ("resnet18", "shufflenet_v2_x0_5", "mobilenet_v3_small", "vit_b_16", "swin_t", "convnext_tiny")


def built(name: str) -> nn.Module:
    with without_initialisation():
        model = torchvision.models.get_model(name, num_classes=10)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in model.parameters():
            param.normal_(std=0.1, generator=generator)
    return model.eval()


class Masking(nn.Module):
    """Masks that are used before and after they are turned round, in every way that there is."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 8)

    def forward(self, ids: Tensor) -> Tensor:
        padding = ids.eq(0)
        kept = ~padding
        x = self.table(ids).masked_fill(padding[..., None], 1.0)
        odd = padding.logical_not()
        y = torch.where(padding[..., None], x * 2, x - 1) + kept[..., None] * 3
        odd |= padding
        return y * odd[..., None] - torch.bitwise_not(kept)[..., None].float()


def test_a_mask_stays_what_it_was_when_it_is_turned_round() -> None:
    model = Masking()
    ids = torch.tensor([[0, 3, 0, 5], [1, 0, 2, 0]])
    assert torch.equal(record(model, ids)(ids), model(ids))


class Small(nn.Module):
    """A branch on a shape, a loop over rows, a constant, a function with several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.gate = nn.Parameter(torch.ones(8, 1, 1))
        self.head = nn.Linear(8, 4)

    def forward(self, image: Tensor, *, scale: float = 1.0) -> dict[str, Tensor]:
        x = self.norm(self.conv(image)) * self.gate
        if x.shape[-1] > 4:
            x = x[..., ::2, ::2]
        first, second = (x * scale).chunk(2, 1)
        first = first + torch.arange(first.shape[-1], device=x.device)
        x = torch.cat([first, second], 1).mean((2, 3))
        return {"features": x, "logits": self.head(x)}


@pytest.mark.parametrize("name", NAMES)
def test_a_recorded_network_runs_again_and_gives_the_same_graph(name: str) -> None:
    model = built(name)
    recorded = record(model)
    recorded.graph.lint()
    image = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(recorded(image), model(image))
    assert trace(recorded) == trace(model)


def test_nodes_say_what_they_are() -> None:
    model = Small().eval()
    recorded = record(model, {"image": torch.zeros(2, 3, 8, 8), "scale": 2.0})
    assert isinstance(recorded, fx.GraphModule)
    assert type(recorded).__name__ == "Small"
    nodes = {node.name: node for node in recorded.graph.nodes}
    assert [node.target for node in nodes.values() if node.op == "placeholder"] == ["image", "scale"]
    weight = next(node for node in nodes.values() if node.target == "conv.weight")
    assert weight.op == "get_attr"
    assert recorded.get_parameter("conv.weight") is model.conv.weight
    conv = nodes["conv2d"]
    assert isinstance(conv.meta["tensor_meta"], TensorMetadata)
    assert conv.meta["tensor_meta"].shape == (2, 8, 8, 8)
    assert list(conv.meta["nn_module_stack"].values()) == [
        ("", f"{__name__}.Small"), ("conv", "torch.nn.modules.conv.Conv2d")
    ]  # fmt: skip
    assert str(recorded.graph).count("torch.conv2d") == 1
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(recorded(x, 2.0), model(x, scale=2.0), rtol=0, atol=0)


def test_shapes_are_those_of_shape_prop() -> None:
    recorded = record(Small().eval(), (2, 3, 8, 8))
    ours = {n: n.meta.get("tensor_meta") for n in recorded.graph.nodes if n.op != "output"}
    ShapeProp(recorded).propagate(torch.zeros(2, 3, 8, 8))
    for node, said in ours.items():
        found = node.meta.get("tensor_meta")
        if isinstance(found, TensorMetadata):
            assert isinstance(said, TensorMetadata)
            assert (said.shape, said.dtype) == (found.shape, found.dtype), node


def test_the_recorded_graph_prints_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tabulate", reason="print_tabular needs tabulate")
    record(Small().eval(), (2, 3, 8, 8)).graph.print_tabular()
    printed = capsys.readouterr().out
    assert "conv.weight" in printed
    assert "placeholder" in printed


def test_the_recorded_graph_can_be_drawn() -> None:
    pytest.importorskip("pydot", reason="fx's drawer needs pydot")
    from torch.fx.passes.graph_drawer import FxGraphDrawer

    drawn = FxGraphDrawer(record(Small().eval(), (2, 3, 8, 8)), "small").get_dot_graph().to_string()
    assert "conv.weight" in drawn
    assert "conv2d" in drawn
    assert "(2, 8, 8, 8)" in drawn  # the shapes, of tensor_meta


def test_a_layer_with_a_rule_is_one_node_and_runs() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Bilinear(4, 4, 4))

    class Twice(nn.Bilinear):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x, x)

    model[1] = Twice(4, 4, 4)
    with register(Twice, {"bias": "bias"}):
        recorded = record(model, (2, 4))
        graph = trace(recorded)
    (call,) = (node for node in recorded.graph.nodes if node.op == "call_module")
    assert call.target == "1"
    assert [node.param for node in graph.nodes] == [None, "0.weight", "0.bias", "1.bias"]
    x = torch.randn(2, 4)
    torch.testing.assert_close(recorded(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["resnet18", "vit_b_16", "mobilenet_v3_small"])
def test_graphs_of_torch_export_are_read(name: str) -> None:
    model = built(name)
    program = torch.export.export(model, (torch.zeros(1, 3, 224, 224),))
    graph = trace(model)
    for module in (program.module(), program.run_decompositions().module()):
        found = trace(module)
        assert (found.nodes, found.edges) == (graph.nodes, graph.edges)


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "densenet121"])
def test_graphs_of_symbolic_trace_are_read(name: str) -> None:
    model = built(name)
    symbolic = fx.symbolic_trace(model)
    graph, found = trace(model), trace(symbolic)
    assert (found.nodes, found.edges) == (graph.nodes, graph.edges)


def test_a_graph_of_the_users_is_not_run() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))
    symbolic = fx.symbolic_trace(model)
    wanted = trace(model, (1, 3, 8, 8))

    def forward(*_: object) -> None:
        raise AssertionError("run")

    symbolic.forward = forward  # type: ignore[method-assign]
    found = trace(symbolic, (1, 3, 8, 8))
    assert (found.nodes, found.edges) == (wanted.nodes, wanted.edges)
    before = [str(node.meta) for node in symbolic.graph.nodes]
    ShapeProp(fx.GraphModule(symbolic, symbolic.graph)).propagate(torch.zeros(1, 3, 8, 8))
    assert trace(symbolic).nodes == wanted.nodes  # the placeholder says the shape now
    assert before != [str(node.meta) for node in symbolic.graph.nodes]


def test_what_a_recording_predicts_is_the_models_own() -> None:
    model, twin = built("resnet18"), built("resnet18")
    predict(record(model), head="predict")
    predict(twin, head="predict")
    for name, param in model.named_parameters():
        torch.testing.assert_close(param, twin.get_parameter(name), rtol=0, atol=0)
    planned = plan(fx.symbolic_trace(copy.deepcopy(twin)), head="predict")
    assert {row.name for row in planned.rows} == {name for name, _ in twin.named_parameters()}


HISTORY: list[Tensor] = []


class Keeper(nn.Module):
    """Appends activations wherever there is a list."""

    def __init__(self, elsewhere: list[Any]) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.seen: list[Any] = [1]
        self.by_name: dict[str, list[Any]] = {"all": []}
        self.queue = deque([2], maxlen=3)
        self.layer.register_forward_hook(lambda _module, _args, output: elsewhere.append(output))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        self.seen.append(x)
        self.by_name["all"].append(x)
        self.by_name["more"] = [x]
        self.queue.append(x)
        HISTORY.append(x)
        return x


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_containers_get_back_what_they_had(error: type[BaseException] | None) -> None:
    elsewhere: list[Any] = []
    model = Keeper(elsewhere)

    def fail(*_: object) -> None:
        if error is not None:
            raise error("on purpose")

    model.register_forward_hook(fail)
    if error is None:
        trace(model)
    else:
        with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else TraceError):
            trace(model)
    assert (model.seen, model.by_name, list(model.queue)) == ([1], {"all": []}, [2])
    assert elsewhere == HISTORY == []


class Sure(nn.Module):
    """Looks for values that are not finite."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        if torch.isnan(x).any() or x.isinf().any().item():
            raise ValueError("not finite")
        assert torch.isfinite(x).all()
        assert not torch.isnan(x.sum())
        return x


def test_checks_for_finite_values_pass() -> None:
    assert [node.type for node in trace(Sure()).nodes] == ["input", "conv", "bias"]


@pytest.mark.parametrize(("shape", "types"), [
    ((8, 5, 3, 3), ["input", "conv", "glob_avg", "conv", "bias"]),
    ((8, 5, 3), ["input", "conv", "glob_avg", "conv", "bias"]),
    ((8, 5), ["input", "conv", "conv", "bias"]),
])  # fmt: skip
def test_the_input_of_a_bare_first_weight_is_found(shape: tuple[int, ...], types: list[str]) -> None:
    function = {4: F.conv2d, 3: F.conv1d, 2: F.linear}[len(shape)]

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.head = nn.Parameter(torch.zeros(shape)), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = function(x, self.weight)
            return self.head(x.mean(tuple(range(2, x.ndim))) if x.ndim > 2 else x)

    assert [node.type for node in trace(Bare()).nodes] == types


@pytest.mark.parametrize("function", [trace, plan, predict, record])
def test_torchscript_is_named(function: Callable[[nn.Module], object]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch.jit is on its way out
        scripted = torch.jit.trace(nn.Linear(3, 4), torch.zeros(1, 3))
    with pytest.raises(TraceError, match="the model is a TorchScript module"):
        function(scripted)
    with pytest.raises(TraceError, match="0 of Sequential is a TorchScript module"):
        function(nn.Sequential(scripted, nn.Linear(4, 2)))


class Packed(nn.Module):
    """Sequences of several lengths."""

    def __init__(self, kind: type[nn.Module], *, in_order: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 8)
        self.layer, self.head = kind(8, 8, batch_first=True, bidirectional=True), nn.Linear(16, 3)
        self.in_order = in_order

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        x = nn.utils.rnn.pack_padded_sequence(
            self.table(ids), lengths, batch_first=True, enforce_sorted=self.in_order
        )
        y, found = nn.utils.rnn.pad_packed_sequence(self.layer(x)[0], batch_first=True)
        assert found.tolist() == lengths.tolist()
        return self.head(y)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize(("lengths", "in_order"), [([7, 5, 3], True), ([3, 7, 5], False)])
def test_packed_sequences_are_traced(kind: type[nn.Module], lengths: list[int], in_order: bool) -> None:
    ids = torch.zeros(3, 7, dtype=torch.long)
    graph = trace(Packed(kind, in_order=in_order), (ids, torch.tensor(lengths)))
    assert [node.param for node in graph.nodes] == [None, "head.weight", "head.bias"]
    name = kind.__name__.lower()
    roles = {param.name: param.role for param in graph.unmatched}
    assert roles["layer.weight_hh_l0"] == f"used by {name}"


def test_a_layer_without_outputs_does_not_refuse_the_model() -> None:
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is nothing to initialise
        model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 0))
    planned = plan(model, head="predict")
    assert [(row.name, row.action) for row in planned.rows] == [
        ("0.weight", "predicted"), ("0.bias", "predicted"), ("1.weight", "kept"), ("1.bias", "kept")
    ]  # fmt: skip


def test_an_error_of_the_forward_pass_comes_first() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("my own")

    with pytest.raises(TraceError, match=r"^Own: the forward pass failed on .*ValueError: my own") as caught:
        trace(Own())
    assert "nor does it take (1, 3, 32, 32)" in str(caught.value)
    assert isinstance(caught.value.__cause__, ValueError)


def test_the_same_tensor_twice_is_two_inputs() -> None:
    class Two(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a - b

    x = torch.zeros(2)
    recorded = record(Two(), (x, x))
    torch.testing.assert_close(
        recorded(torch.tensor([3.0, 2]), torch.tensor([1.0, 1])), torch.tensor([2.0, 1])
    )


@pytest.mark.parametrize("make", [lambda: nn.Linear(4, 4), lambda: built("shufflenet_v2_x0_5")])
def test_record_leaves_the_model_as_it_was(make: Callable[[], nn.Module]) -> None:
    model = make()
    before = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    ghn_init.record(model)
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert tensor is before[name][0]
        assert torch.equal(tensor, before[name][1])
