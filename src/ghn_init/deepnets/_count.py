"""Parameters and activations of an architecture, counted without building it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ghn_init.deepnets._graph import num_nodes
from ghn_init.deepnets._shapes import cell_shapes, stem_width
from ghn_init.deepnets._space import LARGE_INPUT

if TYPE_CHECKING:
    from ghn_init.deepnets._architecture import Architecture

_TOKENS, _PIXELS = 121, 112
"""Positions of a transformer's feature map, and the mean over a network's thirds behind a 16 x 16 stem."""


def operation_params(name: str, width: int, stride: int, norm: int) -> int:
    """Parameters of an operation width -> width; `norm` is those of a norm layer per channel, 2 or 0."""
    c, kernel = width, int(name[-1]) if name[-1].isdigit() else 0
    if name == "skip_connect":
        return c * c + norm * c if stride == 2 else 0
    if name == "cse":
        return c * c + c // 2 + c
    if name == "msa":
        return 3 * c * c + 3 * (c * c + c) + 4 * c
    if name == "conv_7x1_1x7":
        return 14 * c * c + norm * c
    if name.startswith("conv"):
        return kernel * kernel * c * c + norm * c
    if name.startswith("dil"):
        return kernel * kernel * c + c * c + norm * c
    if name.startswith("sep"):
        return 2 * (kernel * kernel * c + c * c + norm * c)
    return 0


def num_params(arch: Architecture, num_classes: int, image_size: int) -> int:
    """Parameters of every layer that is built, used or not."""
    norm = 2 if arch.norm else 0
    side, last_side = arch.sides(image_size)
    shapes, features = cell_shapes(arch, image_size)
    total = _stem_params(arch, norm, side, image_size)
    for shape in shapes:
        if arch.preproc:
            # A factorized reduction has as many weights as the 1x1 convolution it stands for.
            total += (sum(shape.widths) + 2 * norm) * shape.width
        for name, state in shape.edges:
            total += operation_params(name, shape.width, shape.stride if state < 2 else 1, norm)
    features *= 1 if arch.glob_avg else last_side**2
    if arch.fc_layers == 2:
        total += (features + 1) * arch.fc_dim
        features = arch.fc_dim
    return total + (features + 1) * num_classes


def _stem_params(arch: Architecture, norm: int, side: int, image_size: int) -> int:
    c, k = stem_width(arch, image_size), arch.ks
    if arch.transformer:
        kernel = 16 if image_size >= LARGE_INPUT else 3
        return (3 * kernel * kernel + side * side) * c
    if arch.stem_type == 0:
        return (3 * k * k + norm) * c
    half = c // 2
    return (3 * k * k + norm) * half + 9 * half * c + 9 * c * c + 2 * norm * c


def activations(arch: Architecture) -> int:
    """Elements of all feature maps for one image of 32 x 32, roughly: what a network's time goes by."""
    if arch.transformer:
        return num_nodes(arch) * arch.C * arch.C_mult * _TOKENS
    pixels = _PIXELS if arch.stem_type == 1 or arch.stem_pool else 4 * _PIXELS
    return num_nodes(arch) * arch.C * pixels
