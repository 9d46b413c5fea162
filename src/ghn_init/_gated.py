"""The gated graph network: messages along virtual edges and a GRU, level by level.

arXiv 2110.13100, section 3 and eq. 4; GRU as in Cho et al. 2014. With h0 the features before a pass,
`m(v) = sum_{s(u,v)=1} MLP1(h(u)) + sum_{s(u,v)>=1} MLP2(h(u)) / s(u,v)` and `h(v) = GRU(m(v), h0(v))`.

A pass visits topological levels. What depends on h0 alone (the recurrent half of the gates) is one
matrix product for all nodes; a node's messages are made once, right after its update, both MLPs in one
product; the messages to a level are one product with the prefix of nodes that were visited before. The
number of kernels is that of levels, not of nodes or edges, and it is the same for a batch of graphs.
The backward pass is written by hand in the same way: it goes through the levels once more in the
opposite order and makes the gradients of the parameters by one product each at the end.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ghn_init._gated_numpy import propagate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ghn_init._batch import GraphBatch


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
        """Node features (N, d) in visiting order to their new values (N, d)."""
        weights, gru = self.weights(), self.gru
        if not torch.is_grad_enabled() and h.dtype == torch.float32:
            new = propagate(
                h, batch.distances, batch.levels, weights, gru.weight_hh, gru.bias_hh, self.rounds
            )
            return torch.from_numpy(new).to(h.device)
        onward, backward = edge_weights(batch.distances, self.mlp_ve is not None, h.dtype)
        for _ in range(self.rounds):
            h = self._pass(h, onward, weights, batch.levels, reverse=False)
            h = self._pass(h, backward, weights, batch.levels, reverse=True)
        return h

    def weights(self) -> PassWeights:
        """The parameters in the form that a pass takes: both MLPs side by side."""
        mlps = [self.mlp] if self.mlp_ve is None else [self.mlp, self.mlp_ve]
        first = [mlp.linear(0) for mlp in mlps]
        second = [mlp.linear(1) for mlp in mlps]
        return PassWeights(
            self.gru.weight_ih,
            self.gru.bias_ih,
            torch.cat([layer.weight for layer in first]),
            torch.cat([layer.bias for layer in first]),
            torch.block_diag(*(layer.weight for layer in second)),
            torch.cat([layer.bias for layer in second]),
        )

    def _pass(
        self, h: Tensor, edges: Tensor, weights: PassWeights, levels: Sequence[int], *, reverse: bool
    ) -> Tensor:
        recurrent = F.linear(h, self.gru.weight_hh, self.gru.bias_hh)
        return _GatedPass.apply(h, recurrent, *weights, edges, levels, reverse)  # pyright: ignore


class PassWeights(NamedTuple):
    """Parameters of a pass; k = 1 or 2 MLPs with e hidden units in all, d features.

    Attributes:
        w_ih: (3d, d), input half of the GRU's gates r, z, n.
        b_ih: (3d,).
        w1: (e, d), first layers of the MLPs, one below the other.
        b1: (e,).
        w2: (kd, e), second layers as a block-diagonal matrix.
        b2: (kd,).
    """

    w_ih: Tensor
    b_ih: Tensor
    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor


def edge_weights(distances: Tensor, virtual: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weights of the messages u -> v for the two passes, each (N, kN).

    Column ku + j of row v weighs the message that MLP j makes of u: 1 for a real edge (j = 0) and 1/s
    (j = 1). In the second pass, s is the distance from v to u.
    """
    real = (distances == 1).to(dtype)
    if not virtual:
        return real.T.contiguous(), real
    inverse = distances.to(dtype).reciprocal_().masked_fill_(distances == 0, 0)
    backward = torch.stack([real, inverse], dim=-1)
    onward = backward.transpose(0, 1).contiguous()
    return onward.flatten(1), backward.flatten(1)


class _GatedPass(torch.autograd.Function):
    """One pass over the levels, forward and backward by hand. See the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any,
        h0: Tensor,
        recurrent: Tensor,
        w_ih: Tensor,
        b_ih: Tensor,
        w1: Tensor,
        b1: Tensor,
        w2: Tensor,
        b2: Tensor,
        edges: Tensor,
        levels: Sequence[int],
        reverse: bool,
    ) -> Tensor:
        n, d = h0.shape
        k = w2.shape[0] // d
        spans = _spans(levels, reverse)
        # Before the loop a row of `gates` holds what the messages are added to: the recurrent halves of
        # r and z, and the bias of n. After it, it holds the gates themselves.
        gates = recurrent.clone()
        gates[:, 2 * d :] = 0
        gates += b_ih
        recurrent_n = recurrent[:, 2 * d :]
        received = h0.new_empty(n, d)
        hidden = h0.new_empty(n, w1.shape[0])
        messages = h0.new_empty(n, k * d)
        h = h0.new_empty(n, d)
        w_ih_t, w1_t, w2_t = w_ih.T, w1.T, w2.T
        flat = messages.view(n * k, d)
        for start, stop, seen in spans:
            gate = gates[start:stop]
            m = received[start:stop]
            torch.mm(
                edges[start:stop, k * seen.start : k * seen.stop], flat[k * seen.start : k * seen.stop], out=m
            )
            gate.addmm_(m, w_ih_t)
            rz = gate[:, : 2 * d].sigmoid_()
            new = gate[:, 2 * d :].addcmul_(rz[:, :d], recurrent_n[start:stop]).tanh_()
            now = h[start:stop]
            torch.lerp(new, h0[start:stop], rz[:, d:], out=now)
            x = hidden[start:stop]
            torch.addmm(b1, now, w1_t, out=x).relu_()
            torch.addmm(b2, x, w2_t, out=messages[start:stop]).relu_()
        ctx.save_for_backward(h0, recurrent_n, w_ih, w1, w2, edges, gates, received, hidden, messages, h)
        ctx.spans = spans
        return h

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h0, recurrent_n, w_ih, w1, w2, edges, gates, received, hidden, messages, h = ctx.saved_tensors
        n, d = h0.shape
        k = w2.shape[0] // d
        r, z, new = gates.view(n, 3, d).unbind(1)
        # d h / d (pre-activation) of r, z, n; the factors of all nodes at once.
        by_new = (1 - z) * (1 - new * new)
        by_r = by_new * recurrent_n * r * (1 - r)
        factors = torch.stack([by_r, (h0 - new) * z * (1 - z), by_new], dim=1)

        dh = grad.contiguous().clone()
        dgates = h0.new_empty(n, 3, d)
        dreceived = h0.new_empty(n, d)
        dhidden = torch.empty_like(hidden)
        dmessages = torch.empty_like(messages)
        flat = dmessages.view(n * k, d)
        edges_t = edges.T
        alive_hidden, alive_messages = hidden > 0, messages > 0
        for start, stop, later in reversed(_receivers(ctx.spans)):
            torch.mm(edges_t[k * start : k * stop, later], dreceived[later], out=flat[k * start : k * stop])
            dm = dmessages[start:stop].mul_(alive_messages[start:stop])
            dx = dhidden[start:stop]
            torch.mm(dm, w2, out=dx).mul_(alive_hidden[start:stop])
            now = dh[start:stop].addmm_(dx, w1)
            dgate = dgates[start:stop]
            torch.mul(now.unsqueeze(1), factors[start:stop], out=dgate)
            torch.mm(dgate.flatten(1), w_ih, out=dreceived[start:stop])

        drecurrent = dgates.clone()
        drecurrent[:, 2] *= r
        dgates = dgates.flatten(1)
        return (
            dh * z,
            drecurrent.flatten(1),
            dgates.T @ received,
            dgates.sum(0),
            dhidden.T @ h,
            dhidden.sum(0),
            dmessages.T @ hidden,
            dmessages.sum(0),
            None,
            None,
            None,
        )


def _spans(levels: Sequence[int], reverse: bool) -> list[tuple[int, int, slice]]:
    """For every level in the order of the pass: its start, its stop, the nodes visited before it."""
    pairs = list(itertools.pairwise(levels))
    if reverse:
        return [(start, stop, slice(stop, levels[-1])) for start, stop in reversed(pairs)]
    return [(start, stop, slice(0, start)) for start, stop in pairs]


def _receivers(spans: list[tuple[int, int, slice]]) -> list[tuple[int, int, slice]]:
    """For every level in the order of the pass: its start, its stop, the nodes visited after it."""
    first, last = spans[0], spans[-1]
    if first[0] > last[0]:
        return [(start, stop, slice(0, start)) for start, stop, _ in spans]
    return [(start, stop, slice(stop, last[1])) for start, stop, _ in spans]
