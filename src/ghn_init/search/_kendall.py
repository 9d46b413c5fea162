"""Kendall's rank correlation and how uncertain it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

_RESAMPLES: Final = 2_000
_LEVEL: Final = 95


@dataclass(frozen=True)
class Correlation:
    """Kendall's tau-b over `n` architectures and its 95 % interval, from bootstrap resamples of them."""

    tau: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.tau:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


def correlation(predicted: npt.ArrayLike, measured: npt.ArrayLike, seed: int = 0) -> Correlation:
    """How well one value orders architectures as the other does.

    Args:
        predicted: (n,), n at least 2.
        measured: (n,).
        seed: Of the resamples.

    A tau is 0 where all predicted or all measured values are equal, so that there is no order.
    """
    orders = [np.sign(np.subtract.outer(values, values)) for values in map(np.asarray, (predicted, measured))]
    n = len(orders[0])
    rng = np.random.default_rng(seed)
    # How often each architecture is drawn; two draws of one are a tie in both orders, which tau-b leaves out.
    counts = rng.multinomial(n, np.full(n, 1 / n), size=_RESAMPLES)
    low, high = np.percentile(_tau(counts, *orders), [(100 - _LEVEL) / 2, (100 + _LEVEL) / 2])
    tau = _tau(np.ones((1, n)), *orders)[0]
    return Correlation(float(tau), float(low), float(high), n)


def _tau(
    counts: npt.NDArray[Any], first: npt.NDArray[np.float64], second: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Tau-b (Kendall 1945) of resamples in which architecture i stands `counts[r, i]` times, (r,)."""
    concordant, *ordered = (
        ((counts @ pairs) * counts).sum(axis=1) for pairs in (first * second, abs(first), abs(second))
    )
    norm = np.sqrt(ordered[0] * ordered[1])
    return np.divide(concordant, norm, out=np.zeros_like(norm), where=norm > 0)
