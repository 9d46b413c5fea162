"""Graphs as GHN-3 was trained on them: without the poolings inside squeeze-and-excitation blocks.

The published graphs have a `cse` node for the product of a feature map with its gate, but no `glob_avg` for
the pooling that the gate begins with. Ours have both.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ghn_init._graph.graph import graph_from_edges

if TYPE_CHECKING:
    from ghn_init._graph.graph import Graph


def without_gate_poolings(graph: Graph) -> Graph:
    """The graph without the poolings whose results become gates, their neighbours linked.

    Such a `glob_avg` reads what a `cse` node multiplies, and leads nowhere but to that node.
    """
    if not any(node.type == "cse" for node in graph.nodes):
        return graph
    poolings = (index for index, node in enumerate(graph.nodes) if node.type == "glob_avg")
    gone = {index for index in poolings if _begins_gate(graph, index)}
    edges = set(graph.edges)
    for index in gone:
        before, beyond = {u for u, v in edges if v == index}, {v for u, v in edges if u == index}
        edges = {edge for edge in edges if index not in edge} | {(u, v) for u in before for v in beyond}
    kept = [index for index in range(len(graph)) if index not in gone]
    place = {old: new for new, old in enumerate(kept)}
    left = graph_from_edges([graph.nodes[index] for index in kept], [(place[u], place[v]) for u, v in edges])
    # Not what no GHN sees, which is told by the nodes' numbers before.
    return replace(left, unmatched=graph.unmatched, name=graph.name)


def _begins_gate(graph: Graph, pooling: int) -> bool:
    """Whether every way forward from a pooling leads to one `cse` node, which also reads what it pools."""
    ends, seen, ahead = set(), set(), [pooling]
    while ahead:
        index = ahead.pop()
        if graph.nodes[index].type == "cse":
            ends.add(index)
        elif not graph.successors[index]:
            return False
        elif index not in seen:
            seen.add(index)
            ahead += graph.successors[index]
    pooled = set(graph.predecessors[pooling])
    return len(ends) == 1 and pooled <= set(graph.predecessors[ends.pop()])
