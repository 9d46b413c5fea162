"""The gated graph network: messages along virtual edges and a GRU, level by level.

arXiv 2110.13100, section 3 and eq. 4; GRU as in Cho et al. 2014. With h0 the features before a pass,
`m(v) = sum_{s(u,v)=1} MLP1(h(u)) + sum_{s(u,v)>=1} MLP2(h(u)) / s(u,v)` and `h(v) = GRU(m(v), h0(v))`,
where h(u) is always the newest value. `passes.py` computes it; here are the parameters and the gradient.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ghn_init._hypernetwork import passes

if TYPE_CHECKING:
    from ghn_init._hypernetwork.batch import GraphBatch


class MLP(nn.Module):
    """Linear layers with ReLU between them and, where `last_relu`, after them; widths in `sizes`."""

    def __init__(self, *sizes: int, last_relu: bool = True) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(sizes):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.fc = nn.Sequential(*layers if last_relu else layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)

    def linear(self, index: int) -> nn.Linear:
        """The linear layer number `index`."""
        return cast("nn.Linear", self.fc[2 * index])


class NodeMLP(MLP):
    """The baseline in the gated network's place: every node by itself, no edges."""

    def forward(self, x: Tensor, batch: GraphBatch | None = None) -> Tensor:  # noqa: ARG002 (sees no edges)
        return super().forward(x)


class GatedGNN(nn.Module):
    """`rounds` times a pass in topological order and one in reverse, with shared weights."""

    def __init__(self, hid: int, *, virtual_edges: bool = True, rounds: int = 1) -> None:
        super().__init__()
        hidden = hid // 2 if virtual_edges else hid
        self.rounds = rounds
        self.mlp = MLP(hid, hidden, hid)
        self.mlp_ve = MLP(hid, hidden, hid) if virtual_edges else None
        self.gru = nn.GRUCell(hid, hid)

    def forward(self, h: Tensor, batch: GraphBatch) -> Tensor:
        """Node features (R, d) in the batch's rows to their new values (R, d)."""
        mlps = 1 if self.mlp_ve is None else 2
        ways = passes.routes(batch.distances.numpy(force=True), batch.levels, mlps, _array(h).dtype)
        weights = self.weights()
        for route in ways * self.rounds:
            h = cast("Tensor", _Pass.apply(route, h, *weights))
        return h

    def weights(self) -> tuple[Tensor, ...]:
        """The parameters in the order of `passes.Weights`: both MLPs side by side."""
        mlps = [self.mlp] if self.mlp_ve is None else [self.mlp, self.mlp_ve]
        first = [mlp.linear(0) for mlp in mlps]
        second = [mlp.linear(1) for mlp in mlps]
        return (
            self.gru.weight_hh,
            self.gru.bias_hh,
            self.gru.weight_ih,
            self.gru.bias_ih,
            torch.cat([layer.weight for layer in first]),
            torch.cat([layer.bias for layer in first]),
            torch.block_diag(*(layer.weight for layer in second)),
            torch.cat([layer.bias for layer in second]),
        )


class _Pass(torch.autograd.Function):
    """One pass, on any device: its arrays are small and computed on the CPU."""

    @staticmethod
    def forward(ctx: Any, route: passes.Route, h: Tensor, *weights: Tensor) -> Tensor:
        visited = passes.forward(_array(h), passes.Weights(*map(_array, weights)), route)
        if any(ctx.needs_input_grad):
            ctx.visited, ctx.route = visited, route
            ctx.save_for_backward(h, *weights)  # torch then notices if they are changed in between
        return torch.from_numpy(visited.h).to(h.device)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _, *weights = ctx.saved_tensors
        arrays = passes.Weights(*map(_array, weights))
        dh, dweights = passes.backward(_array(grad), ctx.visited, arrays, ctx.route)
        return None, *(torch.from_numpy(values).to(grad.device) for values in (dh, *dweights))


def _array(values: Tensor) -> Any:
    return values.detach().numpy(force=True)
