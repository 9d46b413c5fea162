"""A `Graph` as an SVG picture without graphviz: depth from left to right, in rows like lines of text."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Final

from ghn_init._graph.draw import COLOURS

if TYPE_CHECKING:
    from ghn_init._graph.graph import Graph, Node

MOST_NODES: Final = 1500
"""Nodes of a graph that is still readable as a picture."""

_STEP: Final = 18
"""Pixels from one depth to the next, and from one node to another of the same depth."""
_RADIUS: Final = 5.5
_PER_ROW: Final = 54
"""Depths in a row."""
_GAP: Final = 40
"""Pixels between rows, for the arcs of edges that pass by nodes."""
_HIGHEST: Final = 24
"""Pixels that such an arc rises at most."""

Point = tuple[float, float]


def to_svg(graph: Graph) -> str:
    """The graph as an `<svg>` element without fonts, styles or resources of its own, same text every time.

    Every node is a circle in the colour of its type, with type, parameter and shape as its tooltip; lines
    have the colour of the text around. An edge to another row leaves on the right and comes in on the left.
    """
    places, width, height = _places(graph)
    label = f"{graph.name}: {len(graph)} nodes, {len(graph.edges)} edges"
    size = f'viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}"'
    rows = (graph.depths // _PER_ROW).tolist()
    edges = [
        _within(places[u], places[v]) if rows[u] == rows[v] else _across(places[u], places[v], width)
        for u, v in graph.edges
    ]
    lines = [
        f'<svg class="graph" {size} role="img" aria-label="{escape(label)}">',
        '<g fill="none" stroke="currentColor" stroke-opacity="0.5">',
        *(f'<path d="{edge}"/>' for edge in edges),
        '</g><g stroke="currentColor" stroke-opacity="0.6">',
        *(_circle(index, node, places[index]) for index, node in enumerate(graph.nodes)),
        "</g></svg>",
    ]
    return "\n".join(lines)


def _places(graph: Graph) -> tuple[list[Point], float, float]:
    """The centre of every node; width and height of the picture, in pixels."""
    levels: dict[int, list[int]] = {}
    for index, depth in enumerate(graph.depths.tolist()):
        levels.setdefault(depth, []).append(index)
    offset = _offsets(graph, levels)
    places: list[Point] = [(0.0, 0.0)] * len(graph)
    top = 0.0
    for first in range(0, len(levels), _PER_ROW):
        row = range(first, min(first + _PER_ROW, len(levels)))
        half = _STEP * (max(len(levels[depth]) for depth in row) - 1) / 2
        for depth in row:
            for index in levels[depth]:
                places[index] = (
                    _STEP * (depth - first + 1.0),
                    top + _GAP - 10 + half + _STEP * offset[index],
                )
        top += 2 * half + _GAP
    return places, _STEP * (min(_PER_ROW, len(levels)) + 1.0), top


def _offsets(graph: Graph, levels: dict[int, list[int]]) -> list[float]:
    """Places of the nodes among those of their depth, about the middle, in the order of those before them."""
    offset = [0.0] * len(graph)
    for depth in sorted(levels):
        wanted = {}
        for index in levels[depth]:
            before = [offset[u] for u in graph.predecessors[index]]
            wanted[index] = sum(before) / len(before) if before else 0.0
        for rank, index in enumerate(sorted(levels[depth], key=lambda i: (wanted[i], i))):
            offset[index] = rank - (len(levels[depth]) - 1) / 2
    return offset


def _within(start: Point, end: Point) -> str:
    """An edge of a row: a straight line to the next depth, an arc past the nodes in between."""
    (x, y), (u, v) = start, end
    if u - x <= _STEP:
        return f"M{x:g} {y:g}L{u:g} {v:g}"
    top = min(y, v) - _rise(u - x) * 4 / 3  # the curve reaches three quarters of its handles' height
    return f"M{x:g} {y:g}C{x + 6:g} {top:g} {u - 6:g} {top:g} {u:g} {v:g}"


def _across(start: Point, end: Point, width: float) -> str:
    """An edge from one row to a later one, in two parts."""
    (x, y), (u, v) = start, end
    out, come = y - _rise(width - x - _STEP), v - _rise(u - _STEP)
    return f"M{x:g} {y:g}Q{x + 8:g} {out:g} {width:g} {out:g}M0 {come:g}Q{u - 8:g} {come:g} {u:g} {v:g}"


def _rise(length: float) -> float:
    """How high an arc of this length rises, in pixels."""
    return min(_HIGHEST, length / 7)


def _circle(index: int, node: Node, place: Point) -> str:
    shape = "x".join(map(str, node.shape)) if node.shape else ""
    title = "\n".join(part for part in (f"{index}: {node.type}", node.param, node.bias, shape) if part)
    centre = f'cx="{place[0]:g}" cy="{place[1]:g}" r="{_RADIUS}"'
    return f'<circle {centre} fill="{COLOURS[node.type]}"><title>{escape(title)}</title></circle>'
