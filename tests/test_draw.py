"""Drawing: the DOT text, and what happens without graphviz."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING

import pytest

from ghn_init import DrawError, Graph, Node
from ghn_init._graph.draw import COLOURS, to_dot
from ghn_init._graph.graph import NODE_TYPES

if TYPE_CHECKING:
    from pathlib import Path

NODES = (
    Node("input"),
    Node("conv", "stem.weight", (8, 3, 3, 3)),
    Node("bn", "norm.weight", (8,), bias="norm.bias"),
    Node("max_pool", None, (1, 1, 3, 3)),
    Node("sum"),
)
GRAPH = Graph(NODES, ((0, 1), (1, 2), (2, 3), (2, 4), (3, 4)), name='My "Net"')


def test_every_node_type_has_a_colour_of_its_own() -> None:
    assert tuple(COLOURS) == NODE_TYPES
    assert len(set(COLOURS.values())) == len(NODE_TYPES)


def test_dot_has_every_node_edge_and_name() -> None:
    dot = to_dot(GRAPH)
    for index, node in enumerate(NODES):
        assert f'n{index} [fillcolor="{COLOURS[node.type]}", tooltip="{index}: {node.type}' in dot
    assert re.findall(r"^  (n\d+ -> n\d+);$", dot, re.M) == [f"n{u} -> n{v}" for u, v in GRAPH.edges]
    assert r'tooltip="2: bn\nnorm.weight\nnorm.bias\n8"' in dot
    assert r'digraph "My \"Net\""' in dot


def test_legend_lists_the_types_present_and_no_others() -> None:
    labels = re.findall(r'legend_\w+ \[.*label="([^"]+)"', to_dot(GRAPH))
    assert sorted(labels) == ["bn (1)", "conv (1)", "input (1)", "max_pool (1)", "sum (1)"]


def test_dot_file_needs_no_graphviz_and_is_the_same_every_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "graphviz", None)
    GRAPH.draw(tmp_path / "a.dot")
    GRAPH.draw(str(tmp_path / "b.dot"))
    assert (tmp_path / "a.dot").read_bytes() == (tmp_path / "b.dot").read_bytes() == to_dot(GRAPH).encode()


def test_without_the_package_the_error_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "graphviz", None)
    with pytest.raises(DrawError, match=r"pip install graphviz.*g\.dot"):
        GRAPH.draw(tmp_path / "g.svg")


def test_without_the_program_the_error_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("graphviz")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DrawError, match=r"`dot` program is not on the PATH: apt install graphviz"):
        GRAPH.draw(tmp_path / "g.pdf")
    assert not (tmp_path / "g.pdf").exists()


def test_rendering_pipes_the_source_through_dot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for `dot` that prints its arguments and what it reads."""
    pytest.importorskip("graphviz")
    program = tmp_path / "dot"
    program.write_text('#!/bin/sh\necho "$@"\nwhile IFS= read -r line; do printf "%s\\n" "$line"; done\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    GRAPH.draw(tmp_path / "g.svg")
    arguments, _, source = (tmp_path / "g.svg").read_text(encoding="utf-8").partition("\n")
    assert "-Tsvg" in arguments
    assert source == to_dot(GRAPH)


def test_a_failing_dot_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("graphviz")
    program = tmp_path / "dot"
    program.write_text("#!/bin/sh\nread -r line\necho 'no layout today' >&2\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DrawError, match=r"`dot` failed.*status 3"):
        GRAPH.draw(tmp_path / "g.png")


def test_an_unknown_suffix_and_an_unwritable_path_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DrawError, match=r"cannot draw to '\.gif'; expected \.dot"):
        GRAPH.draw(tmp_path / "g.gif")
    with pytest.raises(DrawError, match="cannot be written"):
        GRAPH.draw(tmp_path / "nowhere" / "g.dot")
