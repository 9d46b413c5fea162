"""Widths and strides of an architecture's cells: what its network, its graph and its counts go by."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ghn_init.deepnets._space import LARGE_INPUT

if TYPE_CHECKING:
    from ghn_init.deepnets._architecture import Architecture
    from ghn_init.deepnets._plan import CellPlan
    from ghn_init.deepnets._space import Edge


class CellShape(NamedTuple):
    """Where a cell stands in its network.

    Attributes:
        plan: Which parts of it are used.
        edges: Its operations, two for every state.
        widths: Channels of the older and the newer input.
        width: Channels of the cell's states.
        stride: Of operations on the cell's inputs: 2 in a reduction cell, unless there is attention.
        halved: Whether the newer input is half as large as the older one, so that that is halved too.
    """

    plan: CellPlan
    edges: tuple[Edge, ...]
    widths: tuple[int, int]
    width: int
    stride: int
    halved: bool


def stem_width(arch: Architecture, image_size: int) -> int:
    """Channels of the stem's outputs."""
    wide = arch.preproc and image_size < LARGE_INPUT and arch.stem_type == 0 and not arch.transformer
    return arch.C * (3 if wide else 1)


def cell_shapes(arch: Architecture, image_size: int) -> tuple[list[CellShape], int]:
    """The shape of every cell, and the channels of the last one's output."""
    shapes: list[CellShape] = []
    older = newer = stem_width(arch, image_size)
    width, halved = arch.C, arch.stem_type == 1 and not arch.transformer
    for index, plan in enumerate(arch.plan.cells):
        reduction = index in arch.plan.reductions
        width *= arch.C_mult if reduction else 1
        stride = 2 if reduction and not arch.transformer else 1
        edges = arch.genotype.edges(reduction=reduction)
        shapes.append(CellShape(plan, edges, (older, newer), width, stride, halved))
        older, newer, halved = newer, width * len(plan.concat), stride == 2
    return shapes, newer
