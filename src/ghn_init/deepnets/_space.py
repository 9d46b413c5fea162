"""The space of DeepNets-1M: operations, and cells made of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Final

OPERATIONS: Final = (
    "none", "max_pool_3x3", "avg_pool_3x3", "skip_connect", "sep_conv_3x3", "sep_conv_5x5",
    "dil_conv_3x3", "dil_conv_5x5", "conv_1x1", "conv_7x1_1x7", "conv_3x3", "conv_5x5", "conv_7x7",
    "msa", "cse",
)  # fmt: skip
"""Names of the operations; the order is part of what the random streams mean."""

HEADS: Final = 8
"""Attention heads of `msa`; the width is a multiple of it."""

LARGE_INPUT: Final = 128
"""Images from this side on (pixels) get the ImageNet stem, smaller ones the CIFAR-10 stem."""

Edge = tuple[str, int]
"""An operation and the earlier state that it reads; states 0 and 1 are the cell's inputs."""


@dataclass(frozen=True)
class Genotype:
    """The two cells of an architecture (Liu et al., ICLR 2019): two edges for every sum node.

    Attributes:
        normal: Edges 2k and 2k + 1 feed state k + 2 of a normal cell.
        normal_concat: The states that its output concatenates.
        reduce: As `normal`, for reduction cells.
        reduce_concat: As `normal_concat`.
    """

    normal: tuple[Edge, ...]
    normal_concat: tuple[int, ...]
    reduce: tuple[Edge, ...]
    reduce_concat: tuple[int, ...]

    @property
    def steps(self) -> int:
        """Sum nodes in a cell."""
        return len(self.normal) // 2

    @cached_property
    def operations(self) -> frozenset[str]:
        """Names of all operations that occur."""
        return frozenset(name for name, _ in self.normal + self.reduce)

    @property
    def transformer(self) -> bool:
        """Whether attention occurs: then images become tokens in the stem and keep their number."""
        return "msa" in self.operations

    def edges(self, *, reduction: bool) -> tuple[Edge, ...]:
        """The edges of the reduction or of the normal cell."""
        return self.reduce if reduction else self.normal

    def concat(self, *, reduction: bool) -> tuple[int, ...]:
        """The concatenated states of the reduction or of the normal cell."""
        return self.reduce_concat if reduction else self.normal_concat
