"""Rules: which torch functions are nodes of the graph, and which nodes (arXiv 2110.13100, appendix A).

A rule gets an `Operation`, a node of the fx graph and its neighbourhood, and returns what the node's output
carries. It decides by the function and its tensors' shapes, never by the module around it, so a hand-written
layer, `F.conv2d(x, self.w)` and `nn.Conv2d` are the same thing. A function without a rule has no node: its
inputs' sources are passed on to its output.
"""

from __future__ import annotations

from ghn_init._tracing.rules import (  # noqa: F401  # they fill `sketch.RULES`
    attention,
    exported,
    joins,
    layers,
    norms,
    pooling,
    products,
    registered,
)
