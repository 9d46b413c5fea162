"""What of an architecture its output depends on, found on the specification alone.

The published graphs come from the backward pass, so whatever does not reach the output has no node.
The same knowledge lets a network skip those layers, and counts nodes without building anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ghn_init.deepnets._space import Genotype


@dataclass(frozen=True, slots=True)
class CellPlan:
    """Which parts of a cell are used.

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
        cells: The plan of every cell.
        reductions: Indices of the reduction cells.
        used: For every cell whether it is there and the output depends on it.
        uses_stem: Whether the output depends on the older and on the newer of the stem's two outputs.
        connected: Whether a path leads from the input to the output.
    """

    cells: tuple[CellPlan, ...]
    reductions: frozenset[int]
    used: tuple[bool, ...]
    uses_stem: tuple[bool, bool]
    connected: bool


def plan_cell(
    edges: tuple[tuple[str, int], ...], concat: tuple[int, ...], inputs: tuple[bool, bool] = (True, True)
) -> CellPlan:
    """Follow a cell forwards for what is present, backwards for what is used.

    Args:
        edges: The cell's operations, two for every state.
        concat: The states that it concatenates.
        inputs: Whether the older and the newer input are there.
    """
    present = list(inputs)
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
    """Follow the cells forwards for what is present, backwards from the last for what is used."""
    reductions = frozenset({n_cells // 3, 2 * n_cells // 3} - {0})
    variants: dict[tuple[bool, tuple[bool, bool]], CellPlan] = {}
    cells: list[CellPlan] = []
    inputs = (True, True)
    for index in range(n_cells):
        reduction = index in reductions
        plan = variants.get((reduction, inputs))
        if plan is None:
            edges, concat = genotype.edges(reduction=reduction), genotype.concat(reduction=reduction)
            plan = variants[reduction, inputs] = plan_cell(edges, concat, inputs)
        cells.append(plan)
        inputs = (inputs[1], plan.present)
    # Entries 0 and 1 are the stem's two outputs, entry i + 2 is cell i.
    used = [False] * (n_cells + 1) + [cells[-1].present if cells else False]
    for index in range(n_cells - 1, -1, -1):
        if used[index + 2]:
            used[index] |= cells[index].uses[0]
            used[index + 1] |= cells[index].uses[1]
    older = used[0] or (stem_type == 1 and used[1])  # the newer output is computed from the older
    return NetworkPlan(tuple(cells), reductions, tuple(used[2:]), (older, used[1]), used[-1])
