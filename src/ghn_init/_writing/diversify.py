"""Make the copies of channels that tiling leaves different again.

A predicted tensor larger than the decoded one repeats it, and gradient descent cannot tell the copies
apart: they get the same gradients for ever. Knyazev 2022, "Pretraining a Neural Network before Knowing
Its Architecture" (arXiv 2207.10049), post-processes predicted weights before fine-tuning with noise
that depends on how alike a layer's filters are, or with orthogonal matrices; these are our versions.

Both apply to weights of two or more dimensions; norms and biases stay as they were predicted. Both are
seeded per parameter, by the caller's seed and the parameter's name, so that a value depends neither on
which other parameters are predicted nor on the order, and the global random state is never touched.

Both are made on the CPU, one full weight at a time: "noise" in its own memory, "orthogonal" in as much again
for a weight with more outputs than inputs. "noise" costs as much time as random initialisation; "orthogonal"
costs a QR decomposition of every layer's matrix: half a second for ResNet-18, but 20 s for the 4096 x 25088
matrix of VGG on one core.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from ghn_init._writing.options import Diversify

NOISE_STRENGTH: Final = 0.1
"""Standard deviation of the noise in a layer whose filters are all alike, in units of the weights' RMS."""

_CHUNK: Final = 1 << 22
"""Elements of noise that exist at a time (16 MB)."""


def diversify(weight: Tensor, filters: Tensor, how: Diversify, *, name: str, seed: int) -> None:
    """Change a predicted weight in place so that its filters differ.

    Args:
        weight: float32 tensor on the CPU, output channels first, contiguous; at least 2-d.
        filters: The smallest repeating block of `weight`, output channels first; `weight` itself will do.
        how: "noise" adds Gaussian noise, "orthogonal" makes the layer's matrix orthogonal as well.
        name: The parameter's qualified name, part of the seed.
        seed: The caller's seed.
    """
    generator = torch.Generator().manual_seed(_seed(name, seed))
    _add_noise(weight, NOISE_STRENGTH * filter_correlation(filters, weight.shape[0]), generator)
    if how == "orthogonal":
        _orthogonalise(weight)


def filter_correlation(filters: Tensor, count: int) -> float:
    """Spread of the correlations between `count` filters that repeat `filters` in turn, 0 to 1.

    The root mean square of the correlation coefficients of all pairs: 1 where every filter is a copy
    (or the negative) of the others, 1/sqrt(d) for independent filters of d elements. Taken about zero,
    the mean for independent filters, and not about the layer's own mean: the spread of a layer of
    identical filters would be zero there, and it needs noise the most.
    """
    if count < 2:
        return 0.0
    unit = torch.nn.functional.normalize(filters.flatten(1).double(), dim=1)
    own = len(unit)
    copies = torch.full((own,), count // own, dtype=torch.float64)
    copies[: count % own] += 1
    squares = (unit @ unit.T).square()
    pairs = copies @ squares @ copies - copies @ squares.diagonal()
    return float((pairs.clamp(min=0) / (count * (count - 1))).sqrt())


def _add_noise(weight: Tensor, relative: float, generator: torch.Generator) -> None:
    """Add noise of `relative` times the weights' root mean square, a chunk at a time."""
    flat = weight.view(-1)
    std = relative * float(torch.linalg.vector_norm(flat)) / flat.numel() ** 0.5
    for chunk in flat.split(_CHUNK):
        chunk.add_(torch.randn(chunk.shape, generator=generator, dtype=chunk.dtype), alpha=std)


def _orthogonalise(weight: Tensor) -> None:
    """Replace the matrix (filters x elements of a filter) by its orthonormal factor, at the same norm.

    QR decomposition of the matrix or of its transpose, whichever is tall, with the signs that make the
    diagonal of R positive, as `torch.nn.init.orthogonal_` does with a random matrix. A tiled matrix has
    linearly dependent columns, whose orthonormal completion rounding errors would choose; the noise
    added before makes the choice the seed's.
    """
    matrix = weight.view(weight.shape[0], -1)
    norm = torch.linalg.vector_norm(matrix)
    # LAPACK reads and writes columns, so that the transpose of a wide matrix takes no second one.
    tall = matrix.T if matrix.shape[0] < matrix.shape[1] else matrix.T.contiguous().T
    factors = torch.empty(min(matrix.shape), dtype=matrix.dtype)
    torch.geqrf(tall, out=(tall, factors))
    signs = torch.where(tall.diagonal() < 0, -1.0, 1.0)
    torch.linalg.householder_product(tall, factors, out=tall)
    tall *= signs
    tall *= norm / min(matrix.shape) ** 0.5
    if matrix.shape[0] >= matrix.shape[1]:
        matrix.copy_(tall)


def _seed(name: str, seed: int) -> int:
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
