"""The gated network for prediction, in numpy.

The same passes as in `_gated`, without gradients. Most levels of a single graph have one node, whose
vectors of 32 numbers are too short for anything but the cost of a call to count, and numpy's calls cost a
third of torch's and never wait for a pool of threads. Folded into the weights beforehand:

- the biases of the messages' MLPs, as one more row against a constant 1;
- sigmoid(x) = (1 + tanh(x / 2)) / 2, so that two gates are one tanh and the new state times two is
  `(h0 + new) + tanh(z / 2) (h0 - new)`, its half going into the layer that reads it.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt
    from torch import Tensor

    from ghn_init._gated import PassWeights

    Array = npt.NDArray[np.float32]


class _Folded(NamedTuple):
    """Weights as the loop reads them; k MLPs with e hidden units in all, d features.

    Attributes:
        w_hh: (d, 3d), recurrent half of the gates r/2, z/2, n.
        b_hh: (3d,).
        w_ih: (d, 3d), input half of the gates.
        b_ih: (3d,).
        w1: (d + 1, e), first layers of the MLPs, over twice the state; the last row is the bias.
        w2: (e + 1, kd), second layers; the last row is the bias.
    """

    w_hh: Array
    b_hh: Array
    w_ih: Array
    b_ih: Array
    w1: Array
    w2: Array


def propagate(
    h: Tensor,
    distances: Tensor,
    levels: Sequence[int],
    weights: PassWeights,
    w_hh: Tensor,
    b_hh: Tensor,
    rounds: int,
) -> Array:
    """Node features (N, d) in visiting order to their new values, as `GatedGNN.forward`."""
    folded = _fold(weights, w_hh, b_hh)
    features, lengths = _array(h), distances.numpy(force=True)
    mlps = folded.w2.shape[1] // features.shape[1]
    onward, backward = (_edge_weights(matrix, mlps) for matrix in (np.ascontiguousarray(lengths.T), lengths))
    spans = list(itertools.pairwise(levels))
    for _ in range(rounds):
        features = _pass(features, onward, spans, folded, reverse=False)
        features = _pass(features, backward, spans[::-1], folded, reverse=True)
    return features


def _pass(
    h0: Array, edges: Array, spans: Sequence[tuple[int, int]], weights: _Folded, *, reverse: bool
) -> Array:
    """Visit the levels `spans` in this order; see `_gated` for the arithmetic."""
    n, d = h0.shape
    _, _, w_ih, b_ih, w1, w2 = weights
    e, k = w1.shape[1], w2.shape[1] // d
    recurrent = h0 @ weights.w_hh + weights.b_hh
    half_n = 0.5 * recurrent[:, 2 * d :]
    gates = recurrent + b_ih
    gates[:, 2 * d :] -= half_n  # n's pre-activation is this plus tanh(r / 2) times the other half
    double = np.ones((n, d + 1), np.float32)
    hidden = np.ones((n, e + 1), np.float32)
    messages = np.empty((n, k * d), np.float32)
    flat = messages.reshape(n * k, d)
    for start, stop in spans:
        seen = slice(k * stop, k * n) if reverse else slice(0, k * start)
        gate = gates[start:stop]
        gate += edges[start:stop, seen] @ flat[seen] @ w_ih
        rz = np.tanh(gate[:, : 2 * d])
        new = rz[:, :d] * half_n[start:stop]
        new += gate[:, 2 * d :]
        np.tanh(new, out=new)
        old = h0[start:stop]
        change = old - new
        change *= rz[:, d:]
        change += old
        now = double[start:stop]
        np.add(change, new, out=now[:, :d])
        x = hidden[start:stop]
        np.maximum(now @ w1, 0, out=x[:, :e])
        np.maximum(x @ w2, 0, out=messages[start:stop])
    return 0.5 * double[:, :d]


def _fold(weights: PassWeights, w_hh: Tensor, b_hh: Tensor) -> _Folded:
    w_ih, b_ih, w1, b1, w2, b2 = map(_array, weights)
    d = w_ih.shape[1]
    half = np.repeat(np.array([0.5, 0.5, 1], np.float32), d)
    return _Folded(
        w_hh=np.ascontiguousarray(_array(w_hh).T * half),
        b_hh=_array(b_hh) * half,
        w_ih=np.ascontiguousarray(w_ih.T * half),
        b_ih=b_ih * half,
        w1=np.concatenate([0.5 * w1.T, b1[None]]),
        w2=np.concatenate([w2.T, b2[None]]),
    )


def _edge_weights(distances: npt.NDArray[np.uint8], mlps: int) -> Array:
    """Weights of messages to the rows of `distances` (N, N) from its columns, (N, mlps N)."""
    table = np.zeros((256, mlps), np.float32)
    table[1, 0] = 1
    if mlps == 2:
        table[1:, 1] = 1 / np.arange(1, 256)
    # Taking a pair as one item of eight bytes is four times faster.
    items = table.view(np.float64 if mlps == 2 else np.float32)[:, 0]
    return items.take(distances).view(np.float32)


def _array(values: Tensor) -> Array:
    array: Any = values.detach().numpy(force=True)
    return array
