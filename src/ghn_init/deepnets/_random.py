"""A counter-based random stream: the same numbers on every machine and with every version of numpy."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

T = TypeVar("T")

_BATCH = 64


class Stream:
    """Uniform draws from Philox-4x64-10, addressed by (seed, family, index).

    Only the generator's raw words are used, which numpy keeps fixed; how words become numbers is said
    here, in integer arithmetic, because numpy's distributions may change between versions (NEP 19).

    Args:
        seed: Any integer in 0 .. 2**64 - 1.
        family: Which family of streams, e.g. the number of a split.
        index: Which stream of the family; streams do not overlap.
    """

    def __init__(self, seed: int, family: int = 0, index: int = 0) -> None:
        key = np.array([seed, family], dtype=np.uint64)
        counter = np.array([0, 0, index, 0], dtype=np.uint64)
        self._philox = np.random.Philox(counter=counter, key=key)
        self._words: list[int] = []

    def below(self, n: int) -> int:
        """A uniform integer in 0 .. n - 1: the high word of a product (bias below n / 2**64)."""
        if not self._words:
            self._words = self._philox.random_raw(_BATCH).tolist()[::-1]
        return self._words.pop() * n >> 64

    def between(self, low: int, high: int) -> int:
        """A uniform integer in low .. high, both included."""
        return low + self.below(high - low + 1)

    def choice(self, items: Sequence[T]) -> T:
        """One of `items`, uniformly."""
        return items[self.below(len(items))]

    def chance(self, numerator: int, denominator: int) -> bool:
        """True with probability numerator / denominator."""
        return self.below(denominator) < numerator
