"""Weights in products of more than two dimensions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ghn_init import plan, predict, trace


class Einsum(nn.Module):
    """A projection to heads and one back, as XLNet has them."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Parameter(torch.randn(12, 2, 5))
        self.o = nn.Parameter(torch.randn(12, 2, 5))

    def forward(self, x: Tensor) -> Tensor:
        heads = torch.einsum("bti,ihd->bthd", x, self.q)
        return torch.einsum("bthd,ohd->bto", heads, self.o)


class Experts(nn.Module):
    """Three experts, all of which see everything."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.weight = nn.Parameter(torch.randn(3, 8, 4))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "bmm":
            return torch.bmm(x.expand(3, -1, -1), self.weight.transpose(1, 2))
        if self.how == "one by one":
            return sum((nn.functional.linear(x, self.weight[i]) for i in range(3)), torch.zeros(()))
        if self.how == "stored (experts, in, out)":
            return torch.bmm(x.expand(3, -1, -1), self.weight)
        return sum((x @ self.weight[i] for i in range(3)), torch.zeros(()))


def test_einsum_with_a_weight_is_a_layer() -> None:
    q, o = [node for node in trace(Einsum(), (1, 6, 12)).nodes if node.type == "conv"]
    assert (q.param, q.shape, q.transposed, q.stored) == ("q", (10, 12), True, (12, 2, 5))
    assert (o.param, o.shape, o.transposed, o.stored) == ("o", (12, 10), False, (12, 2, 5))


def test_einsum_is_the_linear_layer_of_the_same_weight() -> None:
    """What is predicted for (in, heads, d) is what is predicted for the matrix, rearranged."""

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.o = nn.Linear(12, 10, bias=False), nn.Linear(10, 12, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.o(self.q(x))

    einsum, linear = Einsum(), Linear()
    for model in (einsum, linear):
        predict(model, example_input=(1, 6, 12), head="predict")
    x = torch.randn(1, 6, 12)
    torch.testing.assert_close(einsum(x), linear(x))


@pytest.mark.parametrize("how", ["bmm", "one by one"])
def test_weights_of_experts_are_one_matrix(how: str) -> None:
    node = next(node for node in trace(Experts(how), (1, 6, 4)).nodes if node.type == "conv")
    assert (node.param, node.shape, node.stored) == ("weight", (24, 4), (3, 8, 4))


@pytest.mark.parametrize("how", ["stored (experts, in, out)", "one by one, stored (experts, in, out)"])
def test_experts_stored_the_other_way_are_kept(how: str) -> None:
    (row,) = plan(Experts(how), example_input=(1, 6, 8)).rows
    assert row.reason.startswith("no node type fits")


def test_a_table_that_is_projected_is_no_weight() -> None:
    class Relative(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(2, 5, 4))
            self.key = nn.Linear(4, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return torch.bmm(x.expand(2, -1, -1), self.key(self.table).transpose(1, 2))

    graph = trace(Relative(), (1, 6, 4))
    assert [node.type for node in graph.nodes] == ["input"]
    assert {param.name for param in graph.unmatched} == {"table", "key.weight"}


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_recurrent_layers_pass_on_without_a_node(layer: type[nn.RNNBase], bidirectional: bool) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.recurrent = layer(5, 7, 2, bidirectional=bidirectional)
            self.head = nn.Linear(7 * (1 + bidirectional), 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y, states = self.recurrent(x)
            of_states = [states] if torch.is_tensor(states) else states
            assert {tuple(state.shape) for state in of_states} == {(2 * (1 + bidirectional), 2, 7)}
            return self.head(y), y

    graph = trace(Recurrent(), (4, 2, 5))
    assert [node.type for node in graph.nodes] == ["input", "conv", "bias"]
    assert {param.role.split()[0] for param in graph.unmatched} == {"used"}
