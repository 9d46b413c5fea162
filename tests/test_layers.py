"""Every row of the tables in docs/layers.md: the layer is traced, and gives the nodes that the row says."""

from __future__ import annotations

import ast
import importlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ghn_init
from ghn_init import trace

if TYPE_CHECKING:
    from ghn_init import Graph, Node

PAGE = Path(ghn_init.__file__).parents[2] / "docs" / "layers.md"

ROW = re.compile(r"^\| `([^`]+)` \| `([^`]+)` \| ([^|]*) \| ([^|]*) \|$", re.MULTILINE)
"""Layer, inputs, nodes, kept: the rows of both tables."""

TENSOR = re.compile(r"(?:(\w+) )?(\([\d, ]+\))")

INPUTS = {"x": torch.float32, "y": torch.float32, "ids": torch.long}
"""Names of inputs in the page; any other name in front of a shape is a parameter."""


@dataclass(frozen=True)
class Row:
    """A row of a table."""

    layer: str
    tensors: str
    nodes: str
    kept: str


def rows() -> list[Row]:
    if not PAGE.exists():  # the tests of an installed package
        return []
    return [Row(*(cell.strip() for cell in found)) for found in ROW.findall(PAGE.read_text(encoding="utf-8"))]


class Expression(nn.Module):
    """A network that computes an expression of its inputs and parameters."""

    def __init__(self, code: str, inputs: list[str], shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.code, self.inputs = compile(code, code, "eval"), inputs
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))

    def forward(self, *args: Tensor) -> Tensor:
        names = {**dict(zip(self.inputs, args, strict=True)), **dict(self.named_parameters())}
        return eval(self.code, {"torch": torch, "F": F}, names)  # of our own page


def built(row: Row) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The row's network and its inputs."""
    shapes = [(name or "x", ast.literal_eval(shape)) for name, shape in TENSOR.findall(row.tensors)]
    inputs = [(name, shape) for name, shape in shapes if name in INPUTS]
    args = tuple(torch.zeros(shape, dtype=INPUTS[name]) for name, shape in inputs)
    if re.search(r"\b(x|ids)\b", row.layer):
        params = {name: shape for name, shape in shapes if name not in INPUTS}
        return Expression(row.layer, [name for name, _ in inputs], params), args
    return constructed(row.layer), args


def constructed(code: str) -> nn.Module:
    """The module that an expression such as `timm.layers.RmsNorm(8)` makes; skips if a package is missing."""
    names: dict[str, Any] = {"nn": nn}
    for package in ("torchvision", "timm", "transformers"):
        if package in code:
            names[package] = pytest.importorskip(package)
            path = re.search(rf"{package}(?:\.[a-z]\w*)*", code)
            assert path is not None
            importlib.import_module(path[0])
    model = eval(code, names)  # of our own page
    assert isinstance(model, nn.Module)
    return model.eval()


def described(graph: Graph) -> tuple[str, str]:
    """The cells of the page: nodes after the input, and kept parameters."""
    nodes = "; ".join(_node(node) for node in graph.nodes[1:])
    return nodes or "none", "; ".join(f"{p.name}: {p.role}" for p in graph.unmatched) or "none"


def _node(node: Node) -> str:
    parts = [node.type, *(name for name in (node.param, node.bias) if name)]
    if node.shape is not None:
        parts.append(str(node.shape))
    if node.transposed:
        parts.append("transposed")
    if node.stored is not None:
        parts.append(f"of {node.stored}")
    return " ".join(parts)


@pytest.mark.source
@pytest.mark.parametrize("row", rows(), ids=lambda row: row.layer)
def test_a_row_of_the_page_says_what_happens(row: Row) -> None:
    model, args = built(row)
    assert described(trace(model, args)) == (row.nodes, row.kept)


@pytest.mark.source
def test_the_page_has_its_rows() -> None:
    assert len(rows()) >= 60
    assert len({(row.layer, row.tensors) for row in rows()}) == len(rows())
    _, _, tables = PAGE.read_text(encoding="utf-8").partition("## Modules")
    lines = tables.splitlines()
    assert sum(line.startswith("| `") for line in lines) == len(rows()), "a row that the test does not read"


def test_a_stored_offset_is_not_a_norms_weight() -> None:
    """Gemma stores a norm's weight minus one: a predicted weight would be doubled there."""
    model = Expression("F.layer_norm(x, (8,), 1 + w, b)", ["x"], {"w": (8,), "b": (8,)})
    graph = trace(model, (torch.zeros(2, 8),))
    assert described(graph)[0] == "ln b (8,)"
    assert graph.unmatched[0].name == "w"


def test_of_two_weights_after_one_norm_the_second_scales() -> None:
    """The first is the norm's, the second scales."""
    model = Expression("F.layer_norm(x, (8,)) * w * g", ["x"], {"w": (8,), "g": (8,)})
    assert described(trace(model, (torch.zeros(2, 8),))) == ("ln w (8,)", "g: layer scale")


def test_no_norm_goes_on_beyond_an_activation() -> None:
    model = Expression("F.layer_norm(x, (8,)).relu() * w", ["x"], {"w": (8,)})
    assert described(trace(model, (torch.zeros(2, 8),))) == ("ln", "w: layer scale")


@pytest.mark.source
def test_the_three_lines_that_add_a_rule() -> None:
    code = PAGE.read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]
    assert len([line for line in code.splitlines() if line]) == 3

    class FastLinear(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            return torch.from_numpy(x.numpy() @ self.weight.numpy().T)

    names: dict[str, Any] = {"ghn_init": ghn_init, "FastLinear": FastLinear}
    exec(code.replace("ghn_init.register", "handle = ghn_init.register"), names)  # of our own page
    with names["handle"]:
        graph = trace(nn.Sequential(FastLinear(8, 4), nn.Linear(4, 2)), (1, 8))
    assert described(graph)[0].startswith("conv 0.weight (4, 8); bias 0.bias (4,); conv 1.weight")
