"""Parameters, activations and graph nodes of an architecture, counted without building it."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
    stem, older, newer = _stem_params(arch, norm, side, image_size)
    total, width = stem, arch.C
    for index in range(arch.n_cells):
        reduction = index in arch.plan.reductions
        width *= arch.C_mult if reduction else 1
        if arch.preproc:
            # A factorized reduction has as many weights as the 1x1 convolution it stands for.
            total += (older + newer + 2 * norm) * width
        stride = 2 if reduction and not arch.transformer else 1
        for name, state in arch.genotype.edges(reduction=reduction):
            total += operation_params(name, width, stride if state < 2 else 1, norm)
        older, newer = newer, width * len(arch.genotype.concat(reduction=reduction))
    features = newer * (1 if arch.glob_avg else last_side**2)
    if arch.fc_layers == 2:
        total += (features + 1) * arch.fc_dim
        features = arch.fc_dim
    return total + (features + 1) * num_classes


def _stem_params(arch: Architecture, norm: int, side: int, image_size: int) -> tuple[int, int, int]:
    """Parameters of the stem, and the widths of its two outputs."""
    c, k = arch.C, arch.ks
    large = image_size >= LARGE_INPUT
    if arch.transformer:
        kernel = 16 if large else 3
        return (3 * kernel * kernel + side * side) * c, c, c
    if arch.stem_type == 0:
        c *= 3 if arch.preproc and not large else 1
        return (3 * k * k + norm) * c, c, c
    half = c // 2
    return (3 * k * k + norm) * half + 9 * half * c + 9 * c * c + 2 * norm * c, c, c


def activations(arch: Architecture) -> int:
    """Elements of all feature maps for one image of 32 x 32, roughly: what a network's time goes by."""
    if arch.transformer:
        return num_nodes(arch) * arch.C * arch.C_mult * _TOKENS
    pixels = _PIXELS if arch.stem_type == 1 or arch.stem_pool else 4 * _PIXELS
    return num_nodes(arch) * arch.C * pixels


def operation_nodes(name: str, stride: int, norm: int) -> int:
    """Nodes of an operation; `norm` is 1 with norm layers, 0 without."""
    if name == "skip_connect":
        return 3 + norm if stride == 2 else 0
    if name == "msa":
        return 12
    if name == "cse":
        return 5
    if name.startswith("sep"):
        return 4 + 2 * norm
    if name.startswith("dil") or name == "conv_7x1_1x7":
        return 2 + norm
    return 1 + norm if name.startswith("conv") else 1


def num_nodes(arch: Architecture) -> int:
    """Nodes of the graph."""
    return _NodeCounter(arch).count()


class _NodeCounter:
    """Follows, through the used part of a network, which node every state comes from.

    A sum or concatenation of several states that come from one node is not a node (it has one
    incoming edge), so states are represented by the number of their node.
    """

    def __init__(self, arch: Architecture) -> None:
        self.arch = arch
        self.norm = 1 if arch.norm else 0
        self.nodes = 1  # the input

    def add(self, n: int) -> int:
        """Count n nodes; returns the number of the last."""
        self.nodes += n
        return self.nodes

    def join(self, sources: set[int]) -> int:
        """A sum or a concatenation."""
        return self.add(1) if len(sources) > 1 else next(iter(sources))

    def count(self) -> int:
        arch, plan = self.arch, self.arch.plan
        older, newer = self.stem()
        halved = arch.stem_type == 1 and not arch.transformer
        for index in range(arch.n_cells):
            reduction = index in plan.reductions
            out = self.cell(index, older, newer, halved) if plan.used[index] else -1
            older, newer, halved = newer, out, reduction and not arch.transformer
        return self.nodes + arch.glob_avg + 2 * arch.fc_layers

    def stem(self) -> tuple[int, int]:
        if self.arch.transformer:
            both = self.add(3)
            return both, both
        if self.arch.stem_type == 0:
            both = self.add(1 + self.norm + self.arch.stem_pool)
            return both, both
        older = self.add(2 + 2 * self.norm)
        return older, self.add(1 + self.norm) if self.arch.plan.uses_stem[1] else -1

    def cell(self, index: int, older: int, newer: int, halved: bool) -> int:
        arch = self.arch
        plan, reduction = arch.plan.cells[index], index in arch.plan.reductions
        edges = arch.genotype.edges(reduction=reduction)
        states = [older, newer]
        if arch.preproc:
            for position in (0, 1):
                if plan.uses[position]:
                    factorized = halved and position == 0
                    states[position] = self.add(3 + self.norm if factorized else 1 + self.norm)
        for terms in plan.terms:
            sources = set()
            for edge in terms:
                name, state = edges[edge]
                stride = 2 if reduction and state < 2 and not arch.transformer else 1
                n = operation_nodes(name, stride, self.norm)
                sources.add(self.add(n) if n else states[state])
            states.append(self.join(sources) if sources else -1)
        return self.join({states[state] for state in plan.concat if plan.terms[state - 2]})
