"""What of an architecture its output depends on, found on the specification alone.

The published graphs come from the backward pass, so whatever does not reach the output has no node.
The same knowledge lets a network skip those layers, and counts nodes without building anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ghn_init.deepnets._architecture import Genotype


@dataclass(frozen=True, slots=True)
class CellPlan:
    """Which parts of a cell are used, given that both its inputs exist.

    Attributes:
        terms: For every state from 2 on, the indices of the edges that it sums; () where the state is
            missing (two times `none`, or operations on missing states) or not used.
        concat: The concatenated states; a missing one among them is zeros.
        uses: Whether the output depends on input 0 (the older) and on input 1.
        present: Whether the cell has an output at all.
    """

    terms: tuple[tuple[int, ...], ...]
    concat: tuple[int, ...]
    uses: tuple[bool, bool]
    present: bool


@dataclass(frozen=True, slots=True)
class NetworkPlan:
    """Which cells are used.

    Attributes:
        normal: Plan of the normal cells.
        reduction: Plan of the reduction cells.
        reductions: Indices of the reduction cells.
        used: For every cell whether the output depends on it.
        uses_stem: Whether the older and the newer of the first cell's inputs are used by any cell.
        connected: Whether a used cell always has an output, so that every path begins at the input.
    """

    normal: CellPlan
    reduction: CellPlan
    reductions: frozenset[int]
    used: tuple[bool, ...]
    uses_stem: tuple[bool, bool]
    connected: bool

    def cell(self, index: int) -> CellPlan:
        """The plan of cell `index`."""
        return self.reduction if index in self.reductions else self.normal


def plan_cell(edges: tuple[tuple[str, int], ...], concat: tuple[int, ...]) -> CellPlan:
    """Follow a cell forwards for what is present, backwards for what is used."""
    present = [True, True]
    terms: list[tuple[int, ...]] = []
    for first in range(0, len(edges), 2):
        there = tuple(e for e in (first, first + 1) if edges[e][0] != "none" and present[edges[e][1]])
        terms.append(there)
        present.append(bool(there))
    used = [state in concat for state in range(len(present))]
    for state in range(len(present) - 1, 1, -1):
        if not used[state]:
            terms[state - 2] = ()
        for edge in terms[state - 2]:
            used[edges[edge][1]] = True
    return CellPlan(tuple(terms), concat, (used[0], used[1]), any(present[state] for state in concat))


def plan_network(genotype: Genotype, n_cells: int, stem_type: int) -> NetworkPlan:
    """Follow the cells backwards from the last one, which makes the output."""
    normal = plan_cell(genotype.normal, genotype.normal_concat)
    reduction = plan_cell(genotype.reduce, genotype.reduce_concat)
    reductions = frozenset({n_cells // 3, 2 * n_cells // 3} - {0})
    # Entries 0 and 1 are the stem's two outputs, entry i + 2 is cell i.
    used = [False] * (n_cells + 1) + [True]
    connected = True
    for index in range(n_cells - 1, -1, -1):
        if used[index + 2]:
            plan = reduction if index in reductions else normal
            connected &= plan.present
            used[index] |= plan.uses[0]
            used[index + 1] |= plan.uses[1]
    older = used[0] or (stem_type == 1 and used[1])  # stem1 is computed from stem0
    return NetworkPlan(normal, reduction, reductions, tuple(used[2:]), (older, used[1]), connected)
