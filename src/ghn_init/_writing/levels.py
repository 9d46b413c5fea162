"""Layers in a row: which weights can share a factor so that the network stays the same function but for it.

ReLUs, poolings, sums and concatenations pass a factor on if all that they join has it. So a factor of the
outputs can be spread over the weights that come one after another, if branches that meet again have the same.
"""

from __future__ import annotations

from collections import Counter
from graphlib import CycleError, TopologicalSorter
from typing import TYPE_CHECKING

from ghn_init._graph.graph import LAYER_TYPES

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence, Set

    from ghn_init._graph.graph import Graph


def rises(graph: Graph, params: Collection[str | None]) -> tuple[dict[int, int], list[int]]:
    """How many steps of a factor each weight takes, so that all that is joined has taken equally many.

    Args:
        graph: The network's graph.
        params: The weights that may take some. One that stands at several places takes none.

    Returns:
        The steps of these weights, by node: 1 in a row, more beside a longer branch, 0 where something goes
        around them, as around a residual block. And for every node the steps that its output has taken.
    """
    places = Counter(node.param for node in graph.nodes)
    scaled = {
        index
        for index, node in enumerate(graph.nodes)
        if node.type in LAYER_TYPES and node.param in params and places[node.param] == 1
        if graph.predecessors[index]
    }
    levels = _levels(graph, scaled)
    return {index: levels[index] - levels[graph.predecessors[index][0]] for index in scaled}, levels


def _levels(graph: Graph, scaled: Set[int]) -> list[int]:
    """For every node the weights of `scaled` on the longest way to it, as many for all that is joined."""
    groups = list(range(len(graph)))

    def group(index: int) -> int:
        while groups[index] != index:
            groups[index] = index = groups[groups[index]]
        return index

    def join(indices: Sequence[int]) -> None:
        for index in indices[1:]:
            groups[group(index)] = group(indices[0])

    for index, sources in enumerate(graph.predecessors):
        join(sources if index in scaled else (index, *sources))
    while True:
        below: dict[int, set[int]] = {group(index): set() for index in range(len(graph))}
        for index in scaled:
            below[group(index)] |= {group(source) for source in graph.predecessors[index]} - {group(index)}
        try:
            order = list(TopologicalSorter(below).static_order())
        except CycleError as error:  # around what lies between, there is a way without a step
            join(error.args[1])
        else:
            break
    levels: dict[int, int] = {}
    for place in order:
        levels[place] = max((levels[other] + 1 for other in below[place]), default=0)
    return [levels[group(index)] for index in range(len(graph))]
