"""`--report`: a page that says what was done, loads nothing, and is not fooled by names."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import ghn_init
from ghn_init import Graph, Node, PredictError
from ghn_init._graph.svg import MOST_NODES, to_svg
from ghn_init.cli import app
from ghn_init.cli._report import Page
from ghn_init.cli._report_charts import dumbbells, histogram

if TYPE_CHECKING:
    from pathlib import Path

EVIL = '"><script src="http://example.org/x.js">alert(1)</script><img src=x onerror=alert(2)>&amp;'

MODEL = f"""
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3)
        self.norm = nn.BatchNorm2d(32)
        self.add_module({EVIL.replace(".", "_")!r}, nn.Conv2d(32, 64, 3))
        self.zero = nn.Conv2d(64, 64, 1)
        self.head = nn.Linear(64, 300)
        nn.init.zeros_(self.zero.weight)

    def forward(self, x):
        stem, norm, odd, zero, head = self.children()
        x = odd(norm(stem(x)).relu())
        return head((x + zero(x)).mean((2, 3)))
"""


class Elements(HTMLParser):
    """All elements with their attributes, and all text, of a page."""

    void = frozenset({"meta", "link", "img", "br"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.py").write_text(MODEL, encoding="utf-8")
    return tmp_path


def report(folder: Path, ghn_dir: Path, *options: str) -> str:
    """The page that the command writes."""
    command = ["model.py", "--weights", str(ghn_dir), "--report", "page.html", *options]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert done.stderr.endswith("report: page.html\n")
    return (folder / "page.html").read_text(encoding="utf-8")


def test_the_page_is_whole_and_loads_nothing_whatever_modules_are_called(folder: Path, ghn_dir: Path) -> None:
    page = report(folder, ghn_dir)
    elements = Elements(page)
    assert elements.open == []
    tags = {tag for tag, _ in elements.found}
    assert tags.isdisjoint({"script", "img", "link", "iframe", "object", "use", "image", "a", "base", "form"})
    attributes = {name for _, attrs in elements.found for name in attrs}
    assert attributes.isdisjoint({"src", "href", "xlink:href", "srcset", "action", "data", "background"})
    assert not any(name.startswith("on") for name in attributes)
    (style,) = re.findall("<style>(.*?)</style>", page, re.S)
    assert "url(" not in style
    assert "@import" not in style
    assert "prefers-color-scheme: dark" in style
    (policy,) = (a["content"] for t, a in elements.found if t == "meta" and "http-equiv" in a)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    odd = f"{EVIL.replace('.', '_')}.weight"
    assert odd in elements.text
    assert any(text.startswith(f"{odd}: ") for text in elements.text)


def test_the_page_says_what_was_done_and_what_to_expect(folder: Path, ghn_dir: Path) -> None:
    page = report(folder, ghn_dir)
    text = " ".join("".join(Elements(page).text).split())
    assert "model.py:Net" in text
    assert "This is the start of a training" in text
    assert "running statistics that belong to these" in text
    assert "(--head predict forces it)" in text
    assert "all its values are 0" in text
    assert "Left out are 1 without a scale" in text
    rows = re.findall("<tr><td.*?</tr>", page)
    assert len(rows) == 10
    (stem,) = (Elements(row).text for row in rows if ">stem.weight<" in row)
    assert stem[:4] == ["stem.weight", "32x3x3x3".replace("x", chr(215)), "conv", "predicted"]
    assert page.count("<circle") >= 2 * 3  # a ring and a dot for each weight, and the graph's nodes
    untrained = " ".join("".join(Elements(report(folder, ghn_dir, "--scale", "predicted")).text).split())
    assert "This is for using the network untrained" in untrained


def test_the_same_network_gives_the_same_page(folder: Path, ghn_dir: Path) -> None:
    assert report(folder, ghn_dir) == report(folder, ghn_dir)


def test_scales_are_those_of_the_values_before_and_after(ghn_dir: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Flatten(), nn.LazyLinear(10))
    model(torch.randn(2, 3, 8, 8))
    plan = ghn_init.plan(model, ghn_dir, scale="predicted", example_input=(1, 3, 8, 8))
    before = float(model[0].weight.detach().square().mean().sqrt())
    page = Page(plan, "here")
    plan.apply()
    after = float(model[0].weight.detach().square().mean().sqrt())
    html = page.html({row.name: float(row.param.detach().square().mean().sqrt()) for row in plan.rows})
    assert before != pytest.approx(after, rel=0.01)
    assert f"<title>0.weight: {before:.3g} before, {after:.3g} after</title>" in html


def test_a_page_of_shards_has_the_scales_that_were_written(folder: Path, ghn_dir: Path) -> None:
    whole = report(folder, ghn_dir)
    sharded = report(folder, ghn_dir, "--max-shard-size", "1MB", "-o", "shards")
    pattern = "<title>stem.weight: (.*?) before, (.*?) after</title>"
    assert re.findall(pattern, sharded) == re.findall(pattern, whole) != []


def test_where_the_page_may_not_be_written_nothing_is_computed(folder: Path, ghn_dir: Path) -> None:
    for target in ("nowhere/page.html", "model.py", "Net.safetensors"):
        command = ["model.py:Net", "--weights", str(ghn_dir), "--report", target]
        assert CliRunner().invoke(app, command).exit_code == 2
    assert not (folder / "Net.safetensors").exists()


def test_a_page_that_cannot_be_written_is_an_error_of_ours(ghn_dir: Path, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    page = Page(ghn_init.plan(model, ghn_dir, example_input=(1, 3, 8, 8)), "here")
    with pytest.raises(PredictError, match="cannot be written"):
        page.write(tmp_path, in_place=False)


def test_values_on_the_meta_device_have_no_scale_before(ghn_dir: Path, tmp_path: Path) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    page = Page(ghn_init.plan(model, ghn_dir, example_input=(1, 3, 8, 8)), "here")
    page.write(tmp_path / "page.html", in_place=False)
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Not known: the values were never in memory, or are all zero." in html
    assert re.search(r'0\.weight</td>.*?<td class="n">-</td><td class="n">0\.\d+</td>', html)


# Pictures

CHAIN = Graph(
    (Node("input"), *(Node("conv", f"{i}<&>.weight", (8, 8, 3, 3)) for i in range(119))),
    (*((i, i + 1) for i in range(119)), (3, 9), (50, 60)),
    name='"Chain" & <co>',
)


def points(svg: str) -> list[tuple[float, float]]:
    root = ET.fromstring(svg)
    return [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in root.iter("circle")]


def test_the_graph_is_drawn_whole_within_its_frame_and_in_order() -> None:
    svg = to_svg(CHAIN)
    root = ET.fromstring(svg)
    width, height = (float(root.attrib[name]) for name in ("width", "height"))
    places = points(svg)
    assert len(places) == len(CHAIN)
    assert len(set(places)) == len(places)
    assert all(0 < x < width and 0 < y < height for x, y in places)
    assert sorted(places, key=lambda place: (place[1], place[0])) == places
    assert len(list(root.iter("path"))) == len(CHAIN.edges)
    assert root.attrib["aria-label"].startswith('"Chain" & <co>: 120 nodes')
    titles = [title.text for title in root.iter("title")]
    assert titles[1] == "1: conv\n0<&>.weight\n8x8x3x3"
    assert to_svg(CHAIN) == svg


def test_nodes_of_one_depth_stand_side_by_side() -> None:
    fork = Graph(tuple(Node(t) for t in ("input", "conv", "conv", "sum")), ((0, 1), (0, 2), (1, 3), (2, 3)))
    start, first, second, end = points(to_svg(fork))
    assert first[0] == second[0]
    assert first[1] + second[1] == 2 * start[1] == 2 * end[1]


def test_a_graph_that_is_too_large_is_counted_instead(ghn_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MOST_NODES > 1000
    monkeypatch.setattr("ghn_init.cli._report.MOST_NODES", 2)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    html = Page(ghn_init.plan(model, ghn_dir, example_input=(1, 3, 8, 8)), "here").html({})
    assert "Its 4 nodes are too many for a picture" in html
    assert 'class="graph"' not in html
    assert "conv (1)" in html


def test_charts_put_values_on_a_logarithmic_axis() -> None:
    root = ET.fromstring(dumbbells([("a<b", 0.01, 0.1), ("long" * 40, 0.1, 1.0)]))
    x = [float(circle.attrib["cx"]) for circle in root.iter("circle")]
    assert x[1] - x[0] == pytest.approx(x[3] - x[2], abs=0.2)
    assert x[1] == x[2]
    texts = [text.text for text in root.iter("text")]
    assert "a<b" in texts
    assert any(text and text.startswith("…") and len(text) == 52 for text in texts)
    bars = ET.fromstring(histogram([0.1, 0.1, 0.2], [0.3, 0.3, 0.3]))
    heights = [float(bar.attrib["height"]) for bar in bars.iter("rect")]
    assert sorted(heights)[1] == pytest.approx(2 * sorted(heights)[0], abs=0.2)
    assert ET.fromstring(histogram([1.0], [1.0])).tag == "svg"
