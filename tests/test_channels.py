"""`Graph.reads`: which channels of which nodes a layer reads, compared with what it gets when it runs.

Two convolutions give channels that are constant, each its own number, so that the numbers that arrive at the
third say which channels those are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from ghn_init import Graph, plan, trace
from ghn_init._graph.graph import Part

if TYPE_CHECKING:
    from collections.abc import Callable

A, B = 12, 8
"""Channels of the two convolutions, with the numbers from 1 and from 101 on."""


class Network(nn.Module):
    """Two convolutions, what `middle` makes of them, and a third that reads that."""

    def __init__(self, middle: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.middle = nn.Conv2d(3, A, 1), nn.Conv2d(3, B, 1), middle
        with torch.no_grad():
            for layer, first in ((self.a, 1), (self.b, 101)):
                layer.weight.zero_()
                numbers = torch.arange(first, first + layer.out_channels, dtype=torch.float32)
                layer.bias = nn.Parameter(numbers)
        self.arrived = torch.empty(0)
        self.c = nn.LazyConv2d(4, 1)
        self.c.register_forward_pre_hook(self._note)
        self(torch.zeros(1, 3, 8, 8))

    def _note(self, _: nn.Module, inputs: tuple[Tensor]) -> None:
        if not inputs[0].is_meta and not torch.is_grad_enabled():
            self.arrived = inputs[0][0, :, 2, 2]

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.middle(self.a(x), self.b(x)))


def arriving(network: Network) -> list[int]:
    """The numbers of the channels that the third convolution gets."""
    with torch.no_grad():
        network(torch.zeros(1, 3, 8, 8))
    return network.arrived.int().tolist()


def resolved(graph: Graph) -> list[int]:
    """What the third convolution reads, through all joins."""
    found: dict[int, list[int]] = {}
    for index, node in enumerate(graph.nodes):
        read: list[int] = []
        operands = graph.reads.get(index, [[Part(source)] for source in graph.predecessors[index]])
        for parts in operands:
            for part in parts:
                first, end, channels = part.cut or (0, len(found[part.node]), len(found[part.node]))
                assert channels == len(found[part.node])
                read += found[part.node][first:end]
        if node.param == "c.weight":
            return read
        biases = {"a.bias": range(1, A + 1), "b.bias": range(101, 101 + B)}
        found[index] = list(biases[node.param]) if node.param in biases else read
    raise AssertionError


@pytest.mark.parametrize(
    "middle",
    [
        lambda a, b: a.chunk(2, 1)[1],
        lambda a, b: torch.relu(torch.chunk(a, 3, dim=-3)[0]),
        lambda a, b: a[:, :5],
        lambda a, b: a[:, 5:, 1:, :4],
        lambda a, b: a[..., -4:, :, :],
        lambda a, b: a.narrow(1, 2, 3),
        lambda a, b: a.split([3, 4, 5], 1)[1].contiguous(),
        lambda a, b: torch.split(a, 5, dim=1)[2],
        lambda a, b: a.tensor_split(5, 1)[3],
        lambda a, b: a[:, 2:10][:, 3:].clone()[:, :4],
        lambda a, b: torch.cat([b, a], 1),
        lambda a, b: torch.cat([b, a], 1)[:, :B],  # of a node that is none of theirs
        lambda a, b: torch.cat((a[:, :3], b, a[:, 3:]), 1),
        lambda a, b: torch.cat((*a.chunk(2, 1), b[:, 1:]), -3),
        lambda a, b: torch.cat(a.chunk(4, 1)[::-1], 1),
        lambda a, b: torch.cat((a[:, 6:], a[:, :6]), 1).chunk(3, 1)[1],
        lambda a, b: F.interpolate(a[:, 1:3], scale_factor=2.0),
        lambda a, b: a[:, 4:8].reshape(-1, 4, 64).view(-1, 4, 8, 8),
        lambda a, b: F.pad(F.dropout(a, 0.0)[:, 7:], (1, 1, 1, 1), value=8.0),
        lambda a, b: torch.multiply(a[:, 2:6], 1).sub_(0).divide(1),
    ],
)  # fmt: skip
def test_a_graph_says_which_channels_are_read(middle: Callable[[Tensor, Tensor], Tensor]) -> None:
    network = Network(middle)
    for module in (network, torch.export.export(network, (torch.zeros(1, 3, 8, 8),)).module()):
        assert resolved(trace(module, (1, 3, 8, 8))) == arriving(network)


@pytest.mark.parametrize(
    "middle",
    [
        lambda a, b: a.view(-1, 2, A // 2, 8, 8).transpose(1, 2).reshape(-1, A, 8, 8)[:, :5],
        lambda a, b: a.flip(1)[:, :5],
        lambda a, b: a.roll(1, 1)[:, :5],
        lambda a, b: a[:, torch.randperm(A)][:, :5],
        lambda a, b: a[:, ::2],
        lambda a, b: a[:, 3],
        lambda a, b: a.transpose(1, 2)[:, :5],
        lambda a, b: (a[:, :B] * b)[:, :5],
        lambda a, b: F.pixel_shuffle(a[:, :8], 2)[:, 1:],
        lambda a, b: a.index_select(1, torch.tensor([4, 2, 3]))[:, 1:],
    ],
)  # fmt: skip
def test_nothing_is_said_of_channels_that_are_mixed(middle: Callable[[Tensor, Tensor], Tensor]) -> None:
    class Mixed(Network):
        def forward(self, x: Tensor) -> Tensor:
            y = self.middle(self.a(x), self.b(x))
            return self.c(y if y.ndim == 4 else y[:, None])

    assert not trace(Mixed(middle), (1, 3, 8, 8)).reads


@pytest.mark.parametrize(
    "middle",
    [
        lambda a, b: a,
        lambda a, b: torch.cat((a, b), 1),
        lambda a, b: torch.cat(a.chunk(3, 1), 1),
        lambda a, b: a[:, :, 1:, ::2],
        lambda a, b: b + b,
        lambda a, b: a[:, :],
    ],
)  # fmt: skip
def test_nothing_need_be_said_of_whole_nodes(middle: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert not trace(Network(middle), (1, 3, 8, 8)).reads


@pytest.mark.parametrize(
    "middle",
    [
        lambda a, b: torch.cat(torch.chunk(a, 2, 1), 1),
        lambda a, b: torch.stack(torch.chunk(a, 2, 1), 2).flatten(1, 2),
        lambda a, b: torch.max(a, 1, keepdim=True)[0].expand(-1, 4, -1, -1)[:, 1:],
        lambda a, b: torch.cat((a.mean((2, 3)), b.mean((2, 3))), 1)[:, 1:, None, None].expand(-1, -1, 8, 8),
        lambda a, b: torch.where(a[:, :B] > 0, a[:, :B], b),
        lambda a, b: torch.cat((torch.zeros_like(b), a), 1),
        lambda a, b: torch.cat((a[:, 4:], b), 2),
        lambda a, b: torch.cat((a, b[:, :4], b[:, 4:]), 1).chunk(2, 0)[0],
        lambda a, b: a.unbind(1)[2][:, None].repeat(1, 3, 1, 1),
        lambda a, b: a.new_ones(A)[:, None, None] * a[:, :],
    ],
)  # fmt: skip
@pytest.mark.parametrize("written", [False, True])
def test_whatever_code_does_with_channels_can_be_traced(
    middle: Callable[[Tensor, Tensor], Tensor], *, written: bool
) -> None:
    network: nn.Module = Network(middle)
    if written:
        try:
            network = fx.symbolic_trace(network)
        except TypeError as error:
            if not torch.__version__.startswith("2.6."):
                raise
            pytest.skip(f"symbolic_trace of torch 2.6: {error}")
    assert trace(network, (1, 3, 8, 8)).nodes[-1].param == "c.bias"


@given(st.data())
def test_random_cuts_and_joins(data: st.DataObject) -> None:
    program: list[tuple[Any, ...]] = []

    def cut(x: Tensor) -> Tensor:
        first = data.draw(st.integers(0, x.shape[1] - 1))
        end = data.draw(st.integers(first + 1, x.shape[1]))
        program.append(("cut", first, end))
        return x[:, first:end]

    pieces = [torch.zeros(1, A, 1, 1), torch.zeros(1, B, 1, 1)]
    for _ in range(data.draw(st.integers(1, 5))):
        if data.draw(st.booleans()):
            which = data.draw(st.integers(0, len(pieces) - 1))
            program.append(("take", which))
            pieces.append(cut(pieces[which]))
        else:
            chosen = data.draw(st.lists(st.integers(0, len(pieces) - 1), min_size=1, max_size=3))
            program.append(("join", chosen))
            pieces.append(torch.cat([pieces[i] for i in chosen], 1))

    def middle(a: Tensor, b: Tensor) -> Tensor:
        made, steps = [a, b], iter(program)
        for kind, argument in (step for step in steps if step[0] != "cut"):
            if kind == "take":
                _, first, end = next(steps)
                made.append(torch.relu(made[argument])[:, first:end])
            else:
                made.append(torch.cat([made[i] for i in argument], 1))
        return made[-1]

    network = Network(middle)
    graph = trace(network, (1, 3, 8, 8))
    assert resolved(graph) == arriving(network)


# -- branches that are multiplied ---------------------------------------------------------------


class Scaled(nn.Module):
    """A residual branch that begins nearly at zero."""

    def __init__(self, value: float = 1e-3, *, difference: bool = False) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.branch, self.gamma = nn.Conv2d(16, 16, 3, padding=1), nn.Parameter(torch.full((16, 1, 1), value))
        self.last, self.after = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.fc, self.difference = nn.Linear(16, 10), difference

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        branch = self.branch(x) - x if self.difference else self.branch(x)
        x = x + self.gamma * branch
        return self.fc(torch.relu(self.after(self.last(x))).mean((2, 3)))


@pytest.mark.parametrize("difference", [False, True])
def test_a_graph_says_by_what_a_branch_is_multiplied(*, difference: bool) -> None:
    graph = trace(Scaled(difference=difference), (1, 3, 8, 8))
    (operands,) = graph.reads.values()
    named = {graph.nodes[part.node].param: part.scale for parts in operands for part in parts}
    assert named.pop("branch.bias") == "gamma"
    assert len(operands) == 2 + difference


@pytest.mark.parametrize("difference", [False, True])
def test_running_statistics_know_by_what_a_branch_is_multiplied(*, difference: bool) -> None:
    def variance(value: float) -> Tensor:
        torch.manual_seed(0)
        model = Scaled(value, difference=difference)
        return plan(model, example_input=(1, 3, 8, 8)).statistics["after.running_var"]

    nothing, next_to_nothing, something = map(variance, (0.0, 1e-5, 2.0))
    torch.testing.assert_close(nothing, next_to_nothing, rtol=1e-3, atol=0)
    assert something.mean() > 1.3 * nothing.mean()
