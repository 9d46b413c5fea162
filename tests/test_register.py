"""Rules that users add for their own layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghn_init import RegistrationError, TraceError, plan, predict, register, trace

if TYPE_CHECKING:
    from collections.abc import Iterator


class Kernel(torch.autograd.Function):
    """A linear layer by a kernel that reads memory: it cannot run on meta tensors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        if x.is_meta:
            raise RuntimeError("the kernel needs memory")
        return torch.from_numpy(x.detach().numpy() @ weight.detach().numpy().T)


class Fast(nn.Module):
    """The layer around the kernel."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = Kernel.apply(x, self.weight)
        return y if self.bias is None else y + self.bias  # pyright: ignore[reportOperatorIssue]


class Own(Fast):
    """A subclass with a forward pass of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def width(layer: Fast, x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], layer.weight.shape[0])


@pytest.fixture
def fast() -> Iterator[None]:
    with register(Fast, {"weight": "conv", "bias": "bias"}, width):
        yield


def types(model: nn.Module, example: object = None) -> list[str]:
    return [node.type for node in trace(model, example).nodes]


def test_without_a_rule_the_error_says_where_and_how() -> None:
    with pytest.raises(TraceError, match=r"in 0 \(Fast\).*ghn_init\.register"):
        trace(nn.Sequential(Fast(8, 8)), (1, 8))


@pytest.mark.usefixtures("fast")
def test_a_registered_layer_gives_the_nodes_of_its_rule() -> None:
    graph = trace(nn.Sequential(Fast(8, 6), nn.ReLU(), Fast(6, 4, bias=False)), (1, 8))
    found = [(node.type, node.param, node.shape) for node in graph.nodes]
    assert found == [
        ("input", None, None),
        ("conv", "0.weight", (6, 8)),
        ("bias", "0.bias", (6,)),
        ("conv", "2.weight", (4, 6)),
    ]
    assert graph.edges == ((0, 1), (1, 2), (2, 3))


@pytest.mark.usefixtures("fast")
def test_it_is_predicted_as_the_same_network_of_usual_layers() -> None:
    torch.manual_seed(0)
    fast, linear = (nn.Sequential(kind(64, 32), nn.ReLU(), kind(32, 10)) for kind in (Fast, nn.Linear))
    ours, usual = (predict(model, example_input=(1, 64), scale="predicted") for model in (fast, linear))
    for name, value in usual.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)
    assert ours(torch.randn(2, 64)).shape == (2, 10)  # runs its kernel again


@pytest.mark.usefixtures("fast")
def test_a_subclass_with_a_forward_of_its_own_is_followed() -> None:
    class Named(Fast):
        pass

    assert types(Named(4, 4), (1, 4)) == ["input", "conv", "bias"]
    assert types(Own(4, 4), (1, 4)) == ["input", "conv"]


def test_a_second_rule_is_refused_unless_it_replaces_and_removing_puts_back() -> None:
    first = register(Fast, {"weight": "conv", "bias": "bias"}, width)
    try:
        with pytest.raises(
            RegistrationError, match=r"Fast is registered already.*'weight': 'conv'.*replace=True"
        ):
            register(Fast, {"weight": "conv"}, width)
        with register(Fast, {"weight": "conv"}, width, replace=True):
            graph = trace(Fast(4, 4), (1, 4))
            assert [(p.name, p.role) for p in graph.unmatched] == [("bias", "not in the rule of Fast")]
        assert types(Fast(4, 4), (1, 4)) == ["input", "conv", "bias"]
    finally:
        first.remove()
    first.remove()  # once more does nothing
    with pytest.raises(TraceError, match="the kernel needs memory"):
        trace(Fast(4, 4), (1, 4))


def test_a_failure_inside_the_block_undoes_the_registration() -> None:
    with pytest.raises(KeyError), register(Fast, {"weight": "conv"}, width):
        raise KeyError
    with register(Fast, {"weight": "conv"}, width):
        assert types(Fast(4, 4), (1, 4)) == ["input", "conv"]


class Norm(nn.Module):
    """A normalisation whose forward pass cannot be followed."""

    def __init__(self, *, affine: bool = True) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8)) if affine else None
        self.shift = nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(x.numpy())


def test_two_parameters_of_one_norm_are_one_node_and_the_output_is_like_the_input() -> None:
    with register(Norm, {"scale": "ln", "shift": "ln"}):
        graph = trace(nn.Sequential(Norm(), nn.Linear(8, 2), Norm(affine=False)), (3, 8))
    assert (graph.nodes[1].type, graph.nodes[1].param, graph.nodes[1].bias) == ("ln", "0.scale", "0.shift")
    assert (graph.nodes[-1].type, graph.nodes[-1].param, graph.nodes[-1].bias) == ("ln", None, "2.shift")


class Block(nn.Module):
    """Attention in one kernel: weights stored (in, out), parameters in modules inside, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(16, 8))
        self.qkv = nn.Parameter(torch.zeros(8, 24))
        self.out = nn.Linear(8, 8)

    def forward(self, x: Tensor, *, scale: float) -> tuple[Tensor, dict[str, Tensor]]:
        raise RuntimeError("no kernel")


def test_rules_may_have_several_nodes_transposed_weights_inner_modules_and_several_outputs() -> None:
    nodes = {
        "positions": "pos_enc",
        "qkv": "conv",
        "attention": "msa",
        "out.weight": "conv",
        "out.bias": "bias",
    }

    def output(_: Block, x: Tensor, *, scale: float) -> tuple[Tensor, dict[str, Tensor]]:
        assert scale == 0.5
        return torch.empty_like(x), {"weights": x.new_empty(1, 16, 16)}

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.block, self.last = nn.Linear(8, 8), Block(), nn.Linear(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            _, extra = self.block(self.first(x), scale=0.5)
            return self.last(extra["weights"])

    with register(Block, nodes, output, transposed=["qkv"]):
        graph = trace(Net(), (1, 16, 8))
    assert [node.type for node in graph.nodes] == [
        "input", "conv", "bias", "pos_enc", "sum", "conv", "msa", "conv", "bias", "conv", "bias",
    ]  # fmt: skip
    qkv = graph.nodes[5]
    assert (qkv.shape, qkv.transposed, qkv.stored) == ((24, 8), True, None)
    assert not graph.unmatched


@pytest.mark.usefixtures("fast")
def test_tracing_leaves_no_trace_on_a_registered_layer() -> None:
    model = nn.Sequential(Fast(4, 4))
    before = dict(vars(model[0]))
    trace(model, (1, 4))
    assert vars(model[0]) == before
    plan(model, example_input=(1, 4))
    assert "forward" not in vars(model[0])


@pytest.mark.parametrize(
    ("nodes", "match"),
    [
        (
            {"weights": "conv"},
            r"0 \(Fast\).*'weights'.*conv node, found no such attribute; the layer has weight \(4, 4\)",
        ),
        ({"bias": "conv"}, r"'bias'.*found a tensor of shape \(4,\)"),
        ({"training": "bias"}, r"'training'.*found bool"),
    ],
)
def test_a_rule_that_does_not_fit_the_layer(nodes: dict[str, str], match: str) -> None:
    with register(Fast, nodes, width), pytest.raises(TraceError, match=match):
        trace(nn.Sequential(Fast(4, 4)), (1, 4))


@pytest.mark.parametrize(
    ("layer", "nodes", "options", "match"),
    [
        (Fast(2, 2), {"weight": "conv"}, {}, "expected a subclass of torch.nn.Module"),
        (int, {"weight": "conv"}, {}, "expected a subclass of torch.nn.Module, found <class 'int'>"),
        (Fast, {"weight": "linear"}, {}, "'weight': 'linear'; expected .* bias, bn, conv"),
        (Fast, {"weight": "sum"}, {}, "'weight': 'sum'"),
        (Fast, {}, {}, "no nodes"),
        (Fast, {"weight": "conv"}, {"output": 3}, "output must be a function"),
        (Fast, {"weight": "conv"}, {"transposed": ["w"]}, r"transposed names \['w'\]"),
    ],
)
def test_what_is_not_a_rule_is_refused(layer: Any, nodes: dict[str, str], options: Any, match: str) -> None:
    with pytest.raises(RegistrationError, match=match):
        register(layer, nodes, **options)
    with register(Fast, {"weight": "conv"}, width):  # nothing was left behind
        pass
