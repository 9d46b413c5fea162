"""Time of a graph's virtual edges: `python benchmarks/virtual_edges.py --nodes 1000`.

Chains are the worst case of depth, random graphs that of predecessors; the claim is under 10 ms for
1,000 nodes on one core.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from dataclasses import replace

from ghn_init import Graph, Node
from ghn_init._graph.graph import graph_from_edges


def chain(nodes: int) -> Graph:
    """A path: as deep as can be."""
    return graph_from_edges(
        [Node("input")] + [Node("conv")] * (nodes - 1), [(i, i + 1) for i in range(nodes - 1)]
    )


def branched(nodes: int, predecessors: int = 4, reach: int = 12) -> Graph:
    """Every node has up to `predecessors` among the `reach` nodes before it."""
    draw = random.Random(0)
    edges = [(draw.randrange(max(0, v - reach), v), v) for v in range(1, nodes) for _ in range(predecessors)]
    return graph_from_edges([Node("input")] + [Node("conv")] * (nodes - 1), edges)


def milliseconds(graph: Graph, repeats: int) -> list[float]:
    """Times of `Graph.distances`, each on a graph that has not computed it yet."""
    times = []
    for _ in range(repeats):
        fresh = replace(graph)
        _ = fresh.predecessors
        start = time.perf_counter()
        _ = fresh.distances
        times.append((time.perf_counter() - start) * 1e3)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    for name, make in (("chain", chain), ("branched", branched)):
        times = milliseconds(make(options.nodes), options.repeats)
        print(
            f"{name}: {options.nodes} nodes, median {statistics.median(times):.1f} ms, "
            f"min {min(times):.1f}, max {max(times):.1f}, n={len(times)}"
        )


if __name__ == "__main__":
    main()
