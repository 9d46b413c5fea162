"""The learning curve of a run as an SVG picture, from its log: no plotting library needed."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from xml.etree import ElementTree as ET

from ghn_init._errors import TrainingError
from ghn_init.training._checkpoint import write_atomically
from ghn_init.training._log import LOG

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

PICTURE: Final = "curve.svg"

_WIDTH, _PANEL, _LEFT, _RIGHT, _TOP, _BOTTOM = 720, 190, 60, 16, 34, 44
_MOST_POINTS: Final = 400
"""Points of a line; more are drawn as means over neighbours."""

_COLOURS: Final = ("#4477aa", "#228833", "#cc3311")
_HOURS: Final = 3 * 3600.0
"""Seconds from which the time axis counts hours instead of minutes."""


@dataclass(frozen=True, slots=True)
class Point:
    """A value at a time, in seconds of training, and its standard error (0 where there is none)."""

    seconds: float
    value: float
    error: float = 0.0


@dataclass(frozen=True, slots=True)
class Axis:
    """Numbers from `low` to `high` on pixels from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """The pixel of a number; of one beyond the axis, the pixel of its end."""
        value = min(max(value, self.low), self.high)
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, most: int) -> list[float]:
        """At most `most` round numbers of the axis, or a few more."""
        span = self.high - self.low
        power = 10.0 ** math.floor(math.log10(span / most))
        step = next(factor * power for factor in (1, 2, 5, 10) if span / (factor * power) <= most)
        return [k * step for k in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]


def draw_curve(folder: Path, target: Path | None = None) -> Path:
    """Draw the log of the run in `folder`, finished or not: loss and accuracies over the training time.

    Args:
        folder: The run's output folder.
        target: SVG file; default: `curve.svg` in that folder.

    Returns:
        The file that was written.

    Raises:
        TrainingError: There is no log, or nothing in it yet.
    """
    path = folder / LOG
    if not path.is_file():
        raise TrainingError(f"{path}: no such file; expected the output folder of `ghn-init train`")
    curves = read_curves(path)
    if not any(curves.values()):
        raise TrainingError(f"{path}: has no steps yet; a run writes its first after ten of them")
    target = target or folder / PICTURE
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, picture(curves).encode())
    return target


def read_curves(path: Path) -> dict[str, list[Point]]:
    """Points by title, from a `log.jsonl`; values that were not finite are left out."""
    loss: list[Point] = []
    accuracy: list[Point] = []
    validation: list[Point] = []
    seconds = 0.0
    for line in path.read_text().splitlines():
        values = _parsed(line)
        seconds = values.get("seconds", seconds)  # a validation belongs to the step before it
        if values.get("loss") is not None:
            loss.append(Point(seconds, values["loss"]))
            accuracy.append(Point(seconds, 100 * values["accuracy"]))
        if "validation" in values:
            validation.append(Point(seconds, values["validation"], values["standard_error"]))
    return {
        "training loss": _thinned(loss),
        "training accuracy, %": _thinned(accuracy),
        "validation accuracy, % (± standard error over networks)": validation,
    }


def _parsed(line: str) -> Mapping[str, Any]:
    """The values of a line; none for the torn last line of a killed run."""
    try:
        return json.loads(line)
    except ValueError:
        return {}


def _thinned(points: Sequence[Point]) -> list[Point]:
    many = -(-len(points) // _MOST_POINTS)
    parts = [points[start : start + many] for start in range(0, len(points), many or 1)]
    return [Point(part[-1].seconds, sum(point.value for point in part) / len(part)) for part in parts]


def picture(curves: Mapping[str, Sequence[Point]]) -> str:
    """An SVG document with a panel for every curve that has points, above each other."""
    shown = {title: points for title, points in curves.items() if points}
    longest = max(point.seconds for points in shown.values() for point in points) or 1.0
    unit, name = (3600.0, "hours") if longest >= _HOURS else (60.0, "minutes")
    height = _TOP + len(shown) * (_PANEL + _TOP) + _BOTTOM - _TOP
    size = {"width": str(_WIDTH), "height": str(height), "viewBox": f"0 0 {_WIDTH} {height}"}
    svg = ET.Element("svg", size | {"xmlns": "http://www.w3.org/2000/svg", "font-family": "sans-serif"})
    svg.set("font-size", "12")
    ET.SubElement(svg, "rect", {"width": "100%", "height": "100%", "fill": "white"})
    time = Axis(0.0, longest / unit, _LEFT, _WIDTH - _RIGHT)
    for number, (title, points) in enumerate(shown.items()):
        top = _TOP + number * (_PANEL + _TOP)
        values = _value_axis(points, top)
        _frame(svg, title, time, values, labelled=number == len(shown) - 1)
        _plot(svg, points, lambda seconds: time(seconds / unit), values, _COLOURS[number % len(_COLOURS)])
    _text(svg, f"{name} of training", (_LEFT + _WIDTH - _RIGHT) / 2, height - 8, "middle")
    return ET.tostring(svg, encoding="unicode") + "\n"


def _value_axis(points: Sequence[Point], top: float) -> Axis:
    """From below the least to above the largest value, errors included; pixels grow downwards.

    Of many values a fiftieth at either end is left out: single steps have ten times the loss of others.
    """
    out = len(points) // 50
    low = sorted(p.value - p.error for p in points)[out]
    high = sorted(p.value + p.error for p in points)[-1 - out]
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return Axis(low - margin, high + margin, top + _PANEL, top)


def _frame(svg: ET.Element, title: str, time: Axis, values: Axis, *, labelled: bool) -> None:
    """Title, grid and numbers of a panel; numbers of the time axis where `labelled`."""
    _text(svg, title, time.start, values.end - 8, "start")
    for tick in values.ticks(5):
        y = values(tick)
        _line(svg, (time.start, y), (time.end, y))
        _text(svg, f"{tick:g}", time.start - 6, y + 4, "end")
    for tick in time.ticks(10):
        x = time(tick)
        _line(svg, (x, values.start), (x, values.end))
        if labelled:
            _text(svg, f"{tick:g}", x, values.start + 16, "middle")


def _plot(
    svg: ET.Element, points: Sequence[Point], time: Callable[[float], float], values: Axis, colour: str
) -> None:
    """A line through the points, with a dot and a bar of one standard error each way where there is one."""
    path = " ".join(f"{time(p.seconds):.1f},{values(p.value):.1f}" for p in points)
    ET.SubElement(svg, "polyline", {"points": path, "fill": "none", "stroke": colour, "stroke-width": "1.5"})
    for point in points:
        x, y = time(point.seconds), values(point.value)
        if point.error:
            _line(svg, (x, values(point.value - point.error)), (x, values(point.value + point.error)), colour)
        if point.error or len(points) == 1:
            ET.SubElement(svg, "circle", {"cx": f"{x:.1f}", "cy": f"{y:.1f}", "r": "2.5", "fill": colour})


def _line(
    svg: ET.Element, start: tuple[float, float], end: tuple[float, float], colour: str = "#dddddd"
) -> None:
    places = {"x1": start[0], "y1": start[1], "x2": end[0], "y2": end[1]}
    ET.SubElement(svg, "line", {key: f"{value:.1f}" for key, value in places.items()} | {"stroke": colour})


def _text(svg: ET.Element, text: str, x: float, y: float, anchor: str) -> None:
    attributes = {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor, "fill": "#333333"}
    ET.SubElement(svg, "text", attributes).text = text
