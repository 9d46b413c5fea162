"""Widths of networks: drawn for every use in training, fixed for evaluation."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Final

from ghn_init.deepnets._sample import LARGE_KERNELS

if TYPE_CHECKING:
    from ghn_init.deepnets._architecture import Architecture
    from ghn_init.deepnets._random import Stream

WIDTHS: Final = tuple(range(32, 129, 16))
"""Widths C of training networks."""

FC_DIMS: Final = tuple(range(64, 513, 64))
"""Widths of the head's hidden layer in training networks."""

MIN_EVALUATION_PARAMS: Final = 2_500_000
"""Evaluation networks have at least this many parameters on CIFAR-10."""


def training_width(arch: Architecture, stream: Stream, image_size: int = 32) -> tuple[int, int]:
    """Draw (C, fc_dim) for one use of `arch` in training: the smaller the network, the wider it may be."""
    millions = dataclasses.replace(arch, C=32).num_params(10, image_size) / 1e6
    large_kernel = not LARGE_KERNELS.isdisjoint(arch.genotype.operations)
    if millions > 0.8 or not arch.glob_avg or large_kernel or arch.n_cells > 12:
        allowed = 1
    elif millions > 0.4 or arch.n_cells > 10:
        allowed = 2
    elif millions > 0.2 or arch.n_cells > 8:
        allowed = 3
    else:
        allowed = len(WIDTHS)
    width = stream.choice(WIDTHS[:allowed])
    any_fc_dim = allowed == len(WIDTHS) and width <= 64
    return width, stream.choice(FC_DIMS if any_fc_dim else FC_DIMS[:4])


def evaluation_width(arch: Architecture) -> int:
    """The smallest multiple of 16, at least 32, with 2.5 million parameters on CIFAR-10."""
    width = 32
    while dataclasses.replace(arch, C=width).num_params(10, 32) < MIN_EVALUATION_PARAMS:
        width += 16
    return width
