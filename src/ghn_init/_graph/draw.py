"""Drawing a `Graph`: DOT made here, everything else by graphviz."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ghn_init._errors import DrawError
from ghn_init._files import reason, write_bytes

if TYPE_CHECKING:
    from os import PathLike

    from ghn_init._graph.graph import Graph, Node

COLOURS: Final = {
    "max_pool": "#228833", "avg_pool": "#44bb99", "sep_conv": "#77aadd", "dil_conv": "#99ddff",
    "conv": "#4477aa", "msa": "#aa3377", "cse": "#ee99aa", "sum": "#ffffff", "concat": "#dddddd",
    "input": "#222222", "bias": "#bbbbbb", "bn": "#eecc66", "ln": "#ee8866", "pos_enc": "#994455",
    "glob_avg": "#bbcc33",
}  # fmt: skip
"""Fill colour of every node type, in the order of `NODE_TYPES`, which is that of the legend.

Convolutions are blue, pooling green, normalisation yellow.
"""

FORMATS: Final = (".svg", ".pdf", ".png")
"""What graphviz renders; .dot needs no graphviz."""


def format_of(path: Path) -> str:
    """The suffix of a file to draw to, which says in which format.

    Raises:
        DrawError: An unknown one.
    """
    suffix = path.suffix.lower()
    if suffix != ".dot" and suffix not in FORMATS:
        raise DrawError(f"{path}: cannot draw to {suffix!r}; expected .dot, {', '.join(FORMATS)}")
    return suffix


def draw(graph: Graph, path: str | PathLike[str]) -> None:
    """Draw `graph` to `path`; its suffix chooses the format (.dot, .svg, .pdf, .png).

    The same graph gives the same DOT text, byte for byte.

    Raises:
        DrawError: An unknown suffix, graphviz is missing, or the file cannot be written.
    """
    path = Path(path)
    suffix = format_of(path)
    source = to_dot(graph)
    content = source.encode() if suffix == ".dot" else _render(source, suffix, path)
    try:
        write_bytes(path, content)
    except OSError as error:
        raise DrawError(f"{path} cannot be written: {reason(error)}") from error


def to_dot(graph: Graph) -> str:
    """The graph in the DOT language, nodes coloured by type, with a legend of the types present."""
    lines = [
        f"digraph {_quote(graph.name)} {{",
        '  graph [fontname="Helvetica", nodesep=0.15, ranksep=0.2];',
        '  node [fontname="Helvetica", style=filled, shape=circle, label="", width=0.22, penwidth=0.6];',
        "  edge [arrowsize=0.4, penwidth=0.6];",
    ]
    lines += [_node_line(index, node) for index, node in enumerate(graph.nodes)]
    lines += [f"  n{u} -> n{v};" for u, v in graph.edges]
    return "\n".join([*lines, *_legend(graph), "}", ""])


def _node_line(index: int, node: Node) -> str:
    parts = [f"{index}: {node.type}", node.param, node.bias]
    if node.shape is not None:
        parts.append("x".join(map(str, node.shape)))
    tooltip = _quote("\n".join(part for part in parts if part))
    return f'  n{index} [fillcolor="{COLOURS[node.type]}", tooltip={tooltip}];'


def _legend(graph: Graph) -> list[str]:
    """One labelled box for every type that occurs, with its count, in the order of `COLOURS`."""
    counts = Counter(node.type for node in graph.nodes)
    present = [name for name in COLOURS if name in counts]
    lines = [
        "  subgraph cluster_legend {",
        f"    label={_quote(f'{graph.name}: {len(graph)} nodes, {len(graph.edges)} edges')};",
        '    node [shape=box, width=1.2, height=0.25, fontsize=10, tooltip=""];',
    ]
    for name in present:
        text = ', fontcolor="#ffffff"' if name in {"input", "conv", "msa", "pos_enc", "max_pool"} else ""
        label = _quote(f"{name} ({counts[name]})")
        lines.append(f'    legend_{name} [fillcolor="{COLOURS[name]}", label={label}{text}];')
    lines += [f"    legend_{a} -> legend_{b} [style=invis];" for a, b in pairwise(present)]
    return [*lines, "  }"]


def _quote(text: str) -> str:
    """A double-quoted DOT string; a newline becomes DOT's own escape."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def _render(source: str, suffix: str, path: Path) -> bytes:
    """Have the `dot` program lay `source` out."""
    remedy = f"or draw to {path.with_suffix('.dot')}, which needs neither"
    try:
        import graphviz
    except ImportError as error:
        raise DrawError(
            f"{path}: drawing {suffix} needs graphviz: pip install graphviz, and the `dot` program "
            f"(apt install graphviz, brew install graphviz), {remedy}"
        ) from error
    try:
        return graphviz.Source(source).pipe(format=suffix[1:])
    except graphviz.ExecutableNotFound as error:
        raise DrawError(
            f"{path}: the `dot` program is not on the PATH: apt install graphviz (or brew), {remedy}"
        ) from error
    except graphviz.CalledProcessError as error:
        raise DrawError(f"{path}: `dot` failed: {error}") from error
