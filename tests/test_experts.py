"""Mixtures of experts: which of them sees which token is decided by values, of which tracing has none."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

import pytest
import torch
from torch import Tensor, nn

from ghn_init import TraceError, trace

if TYPE_CHECKING:
    from collections.abc import Callable

EXPERTS: Final = 3
WIDTH: Final = 8


class Mixture(nn.Module):
    """A router, and experts that add to what they are given; how they are chosen is the caller's."""

    def __init__(self, choose: Callable[[Mixture, Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.choose = choose
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ModuleDict(
            {f"expert_{i}": nn.Linear(WIDTH, WIDTH, bias=False) for i in range(EXPERTS)}
        )
        self.stacked = nn.Parameter(torch.ones(EXPERTS, WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        weights, chosen = self.router(x).softmax(-1).max(-1, keepdim=True)
        mask = nn.functional.one_hot(chosen, EXPERTS).permute(2, 1, 0)
        return self.choose(self, x, weights, mask)


def by_name(model: Mixture, x: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for expert in mask.sum((1, 2)).gt(0).nonzero():
        place, token = torch.where(mask[expert].squeeze(0))
        y = model.experts[f"expert_{expert[0]}"](x[token]) * weights[token, place, None]
        out.index_add_(0, token, y)
    return out


def by_number(model: Mixture, x: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    layers, out = list(model.experts.values()), torch.zeros_like(x)
    for expert in mask.sum((1, 2)).gt(0).nonzero(as_tuple=True)[0].to(torch.int32).cpu().tolist():
        place, token = torch.where(mask[expert])
        out = out.index_add(0, token, layers[expert](x[token]) * weights[token, place, None])
    return out


def by_scatter(model: Mixture, x: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    layers, out = list(model.experts.values()), torch.zeros_like(x)
    for expert in mask.sum((1, 2)).nonzero().flatten():
        if int(expert) + 1 > len(layers):
            continue
        _, token = mask[expert].nonzero(as_tuple=True)
        y = layers[expert.item()](x[token]) * weights[token]
        out.scatter_add_(0, token[:, None].expand(-1, WIDTH), y)
    return out


@pytest.mark.parametrize("choose", [by_name, by_number, by_scatter])
def test_every_expert_sees_the_tokens_and_their_sum_goes_on(choose: Any) -> None:
    graph = trace(Mixture(choose), (5, WIDTH))
    number = {node.param: i for i, node in enumerate(graph.nodes) if node.param is not None}
    sources: dict[int, set[int]] = {i: {u for u, v in graph.edges if v == i} for i in range(len(graph))}
    stem, router = number["stem.weight"] + 1, number["router.weight"]  # + 1: its bias
    assert sources[router] == {stem}
    sums = []
    for i in range(EXPERTS):
        expert = number[f"experts.expert_{i}.weight"]
        assert sources[expert] == {stem, router}
        joins = [v for u, v in graph.edges if u == expert]
        assert [graph.nodes[join].type for join in joins] == ["sum"]
        sums.append(joins[0])
    assert len(set(sums)) == EXPERTS
    assert all(before in sources[after] for before, after in pairwise(sums))
    assert [param.name for param in graph.unmatched] == ["stacked"]


def test_a_part_of_a_stacked_weight_that_a_known_number_chooses_is_a_weight() -> None:
    def stacked(model: Mixture, x: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for (expert,) in mask.sum((1, 2)).gt(0).nonzero():
            place, token = torch.where(mask[expert])
            y = nn.functional.linear(x[token], model.stacked[expert])
            out.index_add_(0, token, y * weights[token, place, None])
        return out

    graph = trace(Mixture(stacked), (5, WIDTH))
    assert [node.type for node in graph.nodes if node.param == "stacked"] == ["conv"] * EXPERTS


def overwritten(_model: Mixture, x: Tensor, _weights: Tensor, mask: Tensor) -> Tensor:
    hit = mask.sum((1, 2)).nonzero().flatten()
    part = hit[1:]
    hit[:] = mask.sum((1, 2))
    return x * part.tolist()[0]


def filled(_model: Mixture, x: Tensor, _weights: Tensor, mask: Tensor) -> Tensor:
    seen = torch.zeros(EXPERTS)
    seen[mask.sum((1, 2)).nonzero().flatten()] = x.mean()
    return x * float(seen[0])


def mixed(_model: Mixture, x: Tensor, _weights: Tensor, mask: Tensor) -> Tensor:
    hit = mask.sum((1, 2)).nonzero().flatten()
    return x * float((hit * mask.sum()).clamp(min=0)[0])


def clamped(_model: Mixture, x: Tensor, _weights: Tensor, mask: Tensor) -> Tensor:
    return x * mask.sum((1, 2)).clamp(max=3).tolist()[0]


@pytest.mark.parametrize("choose", [overwritten, filled, mixed, clamped])
def test_values_that_depend_on_activations_are_never_read(choose: Any) -> None:
    with pytest.raises(TraceError, match="needs the values of activations"):
        trace(Mixture(choose), (5, WIDTH))


def test_what_is_computed_from_known_places_is_known() -> None:
    found = []

    def choose(_model: Mixture, x: Tensor, _weights: Tensor, mask: Tensor) -> Tensor:
        hit = mask.sum((1, 2)).nonzero().flatten()
        seen = torch.zeros(5)
        seen[hit + 1] = 1
        found.extend([hit.relu().clamp(min=1).tolist(), seen.tolist(), hit.cumsum(0).flip(0).tolist()])
        return x[hit]

    trace(Mixture(choose).eval(), (5, WIDTH))
    assert found == [[1, 1, 2], [0, 1, 1, 1, 0], [3, 1, 0]]
