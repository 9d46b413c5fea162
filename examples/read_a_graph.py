"""Trace a transformer, look at its graph, draw it.

Run: `python examples/read_a_graph.py [graph.svg]`
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
from torchvision.models import vit_b_16

import ghn_init


def main() -> None:
    with torch.device("meta"):  # 86 million parameters that take no memory
        model = vit_b_16()
    graph = ghn_init.trace(model)

    print(f"{graph.name}: {len(graph)} nodes, {len(graph.edges)} edges")
    for node_type, count in Counter(node.type for node in graph.nodes).most_common():
        print(f"  {count:3} {node_type}")
    print("virtual edges:", int((graph.distances > 1).sum()), "longest path:", int(graph.depths.max()))
    for parameter in graph.unmatched:
        print(f"no node type fits {parameter.name} {parameter.shape}: {parameter.role}")

    # .dot needs nothing else; .svg, .pdf and .png need graphviz: pip install graphviz
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp()) / "vit.dot"
    graph.draw(path)
    print("drawn to", path)


if __name__ == "__main__":
    main()
