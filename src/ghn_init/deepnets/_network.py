"""The network of an architecture (arXiv 2110.13100, appendix A): stem, cells, head."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghn_init.deepnets._ops import RECTIFIED, FactorizedReduction, Layers, _Conv2d, _Linear, subsampled
from ghn_init.deepnets._shapes import cell_shapes, stem_width
from ghn_init.deepnets._space import LARGE_INPUT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ghn_init.deepnets._architecture import Architecture
    from ghn_init.deepnets._shapes import CellShape


class State:
    """A feature map (N, C, H, W) and, computed once when it is first wanted, its ReLU."""

    __slots__ = ("_rectified", "x")

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self._rectified: Tensor | None = None

    @property
    def rectified(self) -> Tensor:
        """max(x, 0)."""
        if self._rectified is None:
            self._rectified = F.relu(self.x)
        return self._rectified


class Cell(nn.Module):
    """A cell: sum nodes of two operations each, on its two inputs and earlier sums."""

    def __init__(self, arch: Architecture, shape: CellShape, layers: Layers) -> None:
        super().__init__()
        self.plan = shape.plan
        self.halved = shape.halved
        self.preprocess = self._preprocessing(shape, layers) if arch.preproc else None
        self.edges = shape.edges
        operations = {
            str(index): layers.operation(name, shape.width, shape.stride if state < 2 else 1)
            for index, (name, state) in enumerate(self.edges)
        }
        self.operations = nn.ModuleDict({k: module for k, module in operations.items() if module is not None})
        self.rectified = tuple(
            name in RECTIFIED or isinstance(operations[str(index)], FactorizedReduction)
            for index, (name, _) in enumerate(self.edges)
        )

    @staticmethod
    def _preprocessing(shape: CellShape, layers: Layers) -> nn.ModuleList:
        older, newer = shape.widths
        first = (
            FactorizedReduction(layers, older, shape.width)
            if shape.halved
            else layers.conv(older, shape.width, 1)
        )
        return nn.ModuleList([first, layers.conv(newer, shape.width, 1)])

    def forward(self, older: State | None, newer: State | None) -> State:
        """The output of the cell; layers that it does not depend on are not run."""
        states: list[State | None] = [
            self._input(position, state) if state is not None and used else None
            for position, (state, used) in enumerate(zip((older, newer), self.plan.uses, strict=True))
        ]
        for terms in self.plan.terms:
            values = [self._term(edge, states) for edge in terms]
            states.append(State(values[0] + values[1] if len(values) == 2 else values[0]) if values else None)
        return _concatenated([states[index] for index in self.plan.concat])

    def _input(self, position: int, state: State) -> State:
        if self.preprocess is not None:
            return State(self.preprocess[position](state.rectified))
        if self.halved and position == 0:
            return State(subsampled(state.x, 2))
        return state

    def _term(self, edge: int, states: Sequence[State | None]) -> Tensor:
        state = states[self.edges[edge][1]]
        assert state is not None  # the plan has only edges from states that exist
        return self.operations[str(edge)](state.rectified if self.rectified[edge] else state.x)


def _concatenated(states: Sequence[State | None]) -> State:
    """The states side by side, zeros in place of missing ones; one state alone is passed on."""
    present = [state for state in states if state is not None]
    if len(states) == 1:
        return present[0]
    zeros = torch.zeros_like(present[0].x) if len(present) < len(states) else present[0].x
    return State(torch.cat([zeros if state is None else state.x for state in states], 1))


class ConvStem(nn.Module):
    """`stem_type` 0: one convolution, whose output is both inputs of the first cell."""

    def __init__(self, arch: Architecture, image_size: int, layers: Layers) -> None:
        super().__init__()
        stride = 4 if image_size >= LARGE_INPUT else 1
        self.conv = layers.conv(3, stem_width(arch, image_size), arch.ks, stride)
        self.pool = nn.MaxPool2d(3, 2, padding=1) if arch.stem_pool else nn.Identity()

    def forward(self, x: Tensor) -> tuple[State, State]:
        """Images (N, 3, H, W) -> the older and the newer input of the first cell."""
        both = State(self.pool(self.conv(x)))
        return both, both


class DeepStem(nn.Module):
    """`stem_type` 1: two convolutions for the older input, a third, of stride 2, for the newer."""

    def __init__(self, arch: Architecture, image_size: int, layers: Layers) -> None:
        super().__init__()
        stride = 2 if image_size >= LARGE_INPUT else 1
        self.conv0 = layers.conv(3, arch.C // 2, arch.ks, stride)
        self.conv1 = layers.conv(arch.C // 2, arch.C, 3, stride)
        self.conv2 = layers.conv(arch.C, arch.C, 3, 2)
        self.newer = arch.plan.uses_stem[1]

    def forward(self, x: Tensor) -> tuple[State, State | None]:
        """Images (N, 3, H, W) -> the older and, if it is used, the newer input of the first cell."""
        older = State(self.conv1(F.relu(self.conv0(x), inplace=True)))
        return older, State(self.conv2(older.rectified)) if self.newer else None


class TokenStem(nn.Module):
    """The stem of a transformer: patches and a learned positional encoding."""

    def __init__(self, arch: Architecture, image_size: int) -> None:
        super().__init__()
        patch, padding = (16, 0) if image_size >= LARGE_INPUT else (3, 1)
        self.conv = _Conv2d(3, arch.C, patch, stride=patch, padding=padding)
        side, _ = arch.sides(image_size)
        self.pos_enc = nn.Parameter(torch.empty(1, arch.C, side, side))
        if not self.pos_enc.is_meta:
            nn.init.trunc_normal_(self.pos_enc, std=0.02)

    def forward(self, x: Tensor) -> tuple[State, State]:
        """Images (N, 3, H, W) -> the older and the newer input of the first cell, which are the same."""
        both = State(self.conv(x) + self.pos_enc)
        return both, both


def _stem(arch: Architecture, image_size: int, layers: Layers) -> ConvStem | DeepStem | TokenStem:
    if arch.transformer:
        return TokenStem(arch, image_size)
    return (DeepStem if arch.stem_type == 1 else ConvStem)(arch, image_size, layers)


def _head(arch: Architecture, features: int, num_classes: int) -> nn.Sequential:
    if arch.fc_layers == 1:
        return nn.Sequential(_Linear(features, num_classes))
    hidden = nn.ReLU(inplace=True), nn.Dropout(0.5)
    return nn.Sequential(_Linear(features, arch.fc_dim), *hidden, _Linear(arch.fc_dim, num_classes))


class Network(nn.Module):
    """The network of `arch`: square images (N, 3, image_size, image_size) -> logits (N, num_classes).

    Every layer of the architecture is built, but only those that the output depends on are run.
    """

    def __init__(
        self, arch: Architecture, num_classes: int, image_size: int, *, running_stats: bool = True
    ) -> None:
        super().__init__()
        self.arch = arch
        layers = Layers(arch.norm, running_stats=running_stats)
        _, side = arch.sides(image_size)
        self.stem = _stem(arch, image_size, layers)
        shapes, features = cell_shapes(arch, image_size)
        self.cells = nn.ModuleList(Cell(arch, shape, layers) for shape in shapes)
        self.head = _head(arch, features if arch.glob_avg else features * side * side, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, 3, H, W)."""
        older: State | None
        newer: State | None
        older, newer = self.stem(x)
        for cell, used in zip(self.cells, self.arch.plan.used, strict=True):
            older, newer = newer, cell(older, newer) if used else None
        assert newer is not None  # an `Architecture` is connected
        out = F.adaptive_avg_pool2d(newer.x, 1) if self.arch.glob_avg else newer.x
        return self.head(out.flatten(1))
