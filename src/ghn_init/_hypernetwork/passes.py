"""A pass of the gated network over the levels of a batch, forward and backward by hand, in numpy.

Most levels have one node a graph, whose vectors of 32 numbers are too short for anything but the cost of
a call to count. numpy's calls cost a third of torch's, and they never wait for a pool of threads, which
takes ten times longer than the work wherever a core is shared. A GPU would start twenty kernels a level.

Arrays over nodes are (S B, ...), row `slot * B + graph`, so that a level is one contiguous block of all
graphs; messages are (B, S, ...), so that one product per graph adds them up. What depends on the old
features alone is one product for all nodes, as are the gradients of the parameters, at the end.

Folded into the weights for the forward loop:

- the biases of the messages' MLPs, as one more row against a constant 1;
- sigmoid(x) = (1 + tanh(x / 2)) / 2, so that both gates are one tanh and twice the new state is
  `(h0 + new) + tanh(z / 2) (h0 - new)`; the half of it goes into the layer that reads it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    Array = npt.NDArray[np.floating[Any]]


class Weights(NamedTuple):
    """Parameters of a pass; k = 1 or 2 MLPs with e hidden units in all, d features.

    Attributes:
        w_hh: (3d, d), recurrent half of the GRU's gates r, z, n.
        b_hh: (3d,).
        w_ih: (3d, d), input half of the gates.
        b_ih: (3d,).
        w1: (e, d), first layers of the MLPs, one below the other.
        b1: (e,).
        w2: (kd, e), second layers as a block-diagonal matrix.
        b2: (kd,).
    """

    w_hh: Array
    b_hh: Array
    w_ih: Array
    b_ih: Array
    w1: Array
    b1: Array
    w2: Array
    b2: Array


@dataclass(frozen=True, slots=True)
class Route:
    """The way of a pass through a batch.

    Attributes:
        edges: (B, S, kS), weights of the messages; column ku + j of row v weighs what MLP j makes of u.
        spans: First slot and end of every level, in the order of the slots.
        reverse: Visit the last level first.
    """

    edges: Array
    spans: Sequence[tuple[int, int]]
    reverse: bool

    def visits(self) -> list[tuple[int, int]]:
        """The levels in the order of the pass."""
        return list(self.spans[::-1] if self.reverse else self.spans)

    def below(self, level: tuple[int, int]) -> slice:
        """The slots on the side from which messages come: those visited before."""
        return slice(level[1], self.spans[-1][1]) if self.reverse else slice(0, level[0])

    def above(self, level: tuple[int, int]) -> slice:
        """The slots on the side to which messages go: those visited afterwards."""
        return slice(0, level[0]) if self.reverse else slice(level[1], self.spans[-1][1])


@dataclass(frozen=True, slots=True)
class Visited:
    """What a forward pass leaves for the backward pass; R = S B rows.

    Attributes:
        h0: (R, d), the old features.
        h: (R, d), the new ones.
        gates: (R, 2d), tanh(r / 2) and tanh(z / 2) of the gates' pre-activations.
        new: (R, d), the candidate state n.
        recurrent_n: (R, d), the recurrent half of n's pre-activation.
        received: (R, d), sums of messages.
        hidden: (R, e + 1), hidden units of the MLPs, the last column is 1.
        messages: (R, kd).
    """

    h0: Array
    h: Array
    gates: Array
    new: Array
    recurrent_n: Array
    received: Array
    hidden: Array
    messages: Array


def routes(
    distances: npt.NDArray[np.uint8], levels: Sequence[int], mlps: int, dtype: Any
) -> tuple[Route, Route]:
    """The ways forth and back through graphs with these lengths of shortest paths u -> v, (B, S, S).

    A message weighs 1 from the first MLP where there is a real edge, and 1 / s from the second.
    """
    table = np.zeros((256, mlps), dtype)
    table[1, 0] = 1
    if mlps == 2:
        table[1:, 1] = 1 / np.arange(1, 256)
    # Taking a pair of numbers as one item is four times faster.
    items = table.view({4: np.float32, 8: np.float64, 16: np.complex128}[table.itemsize * mlps])[:, 0]
    spans = list(itertools.pairwise(levels))
    onward = np.ascontiguousarray(distances.transpose(0, 2, 1))
    return (
        Route(items.take(onward).view(dtype), spans, reverse=False),
        Route(items.take(distances).view(dtype), spans, reverse=True),
    )


def forward(h0: Array, weights: Weights, route: Route) -> Visited:
    """Visit all nodes once: messages, their sums, GRU."""
    d, k = h0.shape[1], len(weights.w2) // h0.shape[1]
    graphs, slots, _ = route.edges.shape
    w_hh, b_hh, w_ih, b_ih, w1, w2 = _folded(weights)
    recurrent = h0 @ w_hh + b_hh
    half_n = 0.5 * recurrent[:, 2 * d :]
    inputs = recurrent + b_ih
    inputs[:, 2 * d :] -= half_n  # n's pre-activation is this plus tanh(r / 2) times the other half
    gates, new, received = np.empty_like(h0, shape=(len(h0), 2 * d)), np.empty_like(h0), np.empty_like(h0)
    double, hidden = (np.ones_like(h0, shape=(len(h0), len(w))) for w in (w1, w2))
    messages = np.empty_like(h0, shape=(graphs, slots, k * d))
    by_mlp = messages.reshape(graphs, slots * k, d)
    for level in route.visits():
        start, stop = level
        rows, seen = slice(start * graphs, stop * graphs), route.below(level)
        seen = slice(seen.start * k, seen.stop * k)
        received[rows] = _slots_first(route.edges[:, start:stop, seen] @ by_mlp[:, seen])
        total = received[rows] @ w_ih
        total += inputs[rows]
        rz, n, old = gates[rows], new[rows], h0[rows]
        np.tanh(total[:, : 2 * d], out=rz)
        np.multiply(rz[:, :d], half_n[rows], out=n)
        n += total[:, 2 * d :]
        np.tanh(n, out=n)
        change = old - n
        change *= rz[:, d:]
        change += old
        np.add(change, n, out=double[rows, :d])
        np.maximum(double[rows] @ w1, 0, out=hidden[rows, :-1])
        sent = _graphs_first(hidden[rows] @ w2, graphs)
        np.maximum(sent, 0, out=messages[:, start:stop])
    return Visited(h0, 0.5 * double[:, :d], gates, new, 2 * half_n, received, hidden, _slots_first(messages))


def backward(grad: Array, done: Visited, weights: Weights, route: Route) -> tuple[Array, Weights]:
    """Gradients of the old features and of the weights, from that of the new features."""
    d, k = done.h0.shape[1], len(weights.w2) // done.h0.shape[1]
    graphs, slots, _ = route.edges.shape
    r, z = (0.5 + 0.5 * gate for gate in np.split(done.gates, 2, axis=1))
    by_new = (1 - z) * (1 - done.new * done.new)
    by_r = by_new * done.recurrent_n * r * (1 - r)
    # Derivatives of h by the pre-activations of r, z and n.
    factors = np.stack([by_r, (done.h0 - done.new) * z * (1 - z), by_new], axis=1)
    alive_hidden, alive_messages = done.hidden[:, :-1] > 0, done.messages > 0

    dh = grad.copy()
    dgates, dhidden = np.empty_like(factors), np.empty_like(done.hidden[:, :-1])
    dmessages, dreceived = np.empty_like(done.messages), np.empty_like(dh, shape=(graphs, slots, d))
    for level in reversed(route.visits()):
        start, stop = level
        rows, later = slice(start * graphs, stop * graphs), route.above(level)
        answers = route.edges[:, later, start * k : stop * k].transpose(0, 2, 1) @ dreceived[:, later]
        dm, dx, now = dmessages[rows], dhidden[rows], dh[rows]
        np.multiply(_slots_first(answers.reshape(graphs, stop - start, k * d)), alive_messages[rows], out=dm)
        np.multiply(dm @ weights.w2, alive_hidden[rows], out=dx)
        now += dx @ weights.w1
        np.multiply(now[:, None], factors[rows], out=dgates[rows])
        dreceived[:, start:stop] = _graphs_first(dgates[rows].reshape(-1, 3 * d) @ weights.w_ih, graphs)

    drecurrent = dgates.copy()
    drecurrent[:, 2] *= r
    dgates, drecurrent = dgates.reshape(-1, 3 * d), drecurrent.reshape(-1, 3 * d)
    return dh * z + drecurrent @ weights.w_hh, Weights(
        w_hh=drecurrent.T @ done.h0,
        b_hh=drecurrent.sum(0),
        w_ih=dgates.T @ done.received,
        b_ih=dgates.sum(0),
        w1=dhidden.T @ done.h,
        b1=dhidden.sum(0),
        w2=dmessages.T @ done.hidden[:, :-1],
        b2=dmessages.sum(0),
    )


def _folded(weights: Weights) -> tuple[Array, ...]:
    """w_hh, b_hh, w_ih, b_ih, w1 (d + 1, e), w2 (e + 1, kd) as the forward loop reads them."""
    w_hh, b_hh, w_ih, b_ih, w1, b1, w2, b2 = weights
    half = np.repeat(np.array([0.5, 0.5, 1], w_hh.dtype), w_hh.shape[1])
    return (
        np.ascontiguousarray(w_hh.T * half),
        b_hh * half,
        np.ascontiguousarray(w_ih.T * half),
        b_ih * half,
        np.concatenate([0.5 * w1.T, b1[None]]),
        np.concatenate([w2.T, b2[None]]),
    )


def _slots_first(values: Array) -> Array:
    """(B, s, c) to (s B, c); a view of a single graph, which is what prediction has."""
    return values[0] if len(values) == 1 else values.transpose(1, 0, 2).reshape(-1, values.shape[2])


def _graphs_first(values: Array, graphs: int) -> Array:
    """(s B, c) to (B, s, c)."""
    return values[None] if graphs == 1 else values.reshape(-1, graphs, values.shape[1]).transpose(1, 0, 2)
