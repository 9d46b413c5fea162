"""Graphs as GHN-3 was trained on them: without the poolings inside squeeze-and-excitation blocks.

The published graphs have a `cse` node for the product of a feature map with its gate, but no `glob_avg` for
the pooling that the gate begins with. Ours have both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ghn_init._graph.graph import without

if TYPE_CHECKING:
    from ghn_init._graph.graph import Graph


def without_gate_poolings(graph: Graph) -> Graph:
    """The graph without the poolings whose results become gates, their neighbours linked.

    Such a `glob_avg` reads what a `cse` node multiplies, and leads nowhere but to that node.
    """
    if not any(node.type == "cse" for node in graph.nodes):
        return graph
    poolings = (index for index, node in enumerate(graph.nodes) if node.type == "glob_avg")
    return without(graph, {index for index in poolings if _begins_gate(graph, index)})


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
