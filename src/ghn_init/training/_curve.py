"""The learning curve of a run as a picture, from its log."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ghn_init._errors import TrainingError
from ghn_init.training._figures import new_figure, save_figure
from ghn_init.training._log import LOG, read_log

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PICTURE: Final = "curve.svg"

_MOST_POINTS: Final = 400
"""Points of a line; more are drawn as means over neighbours."""

_HOURS: Final = 3 * 3600.0
"""Seconds from which the time axis counts hours instead of minutes."""


@dataclass(frozen=True, slots=True)
class Point:
    """A value at a time, in seconds of training, and its standard error (0 where there is none)."""

    seconds: float
    value: float
    error: float = 0.0


def draw_curve(folder: Path, target: Path | None = None) -> Path:
    """Draw the log of the run in `folder`, finished or not: loss and accuracies over the training time.

    Args:
        folder: The run's output folder.
        target: File to draw to, in the format of matplotlib's that its suffix names; default: `curve.svg` in
            that folder.

    Returns:
        The file that was written.

    Raises:
        TrainingError: There is no log, or nothing in it yet; matplotlib is missing or lacks the format;
            the file cannot be written.
    """
    path = folder / LOG
    if not path.is_file():
        raise TrainingError(f"{path}: no such file; expected the output folder of `ghn-init train`")
    curves = read_curves(path)
    if not any(curves.values()):
        raise TrainingError(f"{path}: has no steps yet; a run writes its first after ten of them")
    target = target or folder / PICTURE
    save_figure(picture(curves), target, bbox_inches="tight")
    return target


def read_curves(path: Path) -> dict[str, list[Point]]:
    """Points by title, from a `log.jsonl`; values that were not finite are left out."""
    loss: list[Point] = []
    accuracy: list[Point] = []
    validation: list[Point] = []
    seconds = 0.0
    for values in read_log(path):
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


def _thinned(points: Sequence[Point]) -> list[Point]:
    many = -(-len(points) // _MOST_POINTS)
    parts = [points[start : start + many] for start in range(0, len(points), many or 1)]
    return [Point(part[-1].seconds, sum(point.value for point in part) / len(part)) for part in parts]


def picture(curves: Mapping[str, Sequence[Point]]) -> Figure:
    """A panel for every curve that has points, above each other.

    Raises:
        TrainingError: matplotlib is not installed.
    """
    shown = {title: points for title, points in curves.items() if points}
    longest = max(point.seconds for points in shown.values() for point in points)
    unit, name = (3600.0, "hours") if longest >= _HOURS else (60.0, "minutes")
    figure = new_figure(9, 2.8 * len(shown))
    panels = figure.subplots(len(shown), sharex=True, squeeze=False)[:, 0]
    for number, (panel, (title, points)) in enumerate(zip(panels, shown.items(), strict=True)):
        _plot(panel, points, unit, f"C{number}")
        panel.set_title(title, loc="left")
    panels[-1].set_xlabel(f"{name} of training")
    return figure


def _plot(panel: Axes, points: Sequence[Point], unit: float, colour: str) -> None:
    """A line through the points, with a dot and a bar of one standard error each way where there is one."""
    times, values = [point.seconds / unit for point in points], [point.value for point in points]
    errors = [point.error for point in points]
    marker = "o" if any(errors) or len(points) == 1 else ""
    panel.errorbar(times, values, errors if any(errors) else None, color=colour, marker=marker, markersize=3)
    panel.set_ylim(*_value_range(points))
    panel.grid(alpha=0.3)


def _value_range(points: Sequence[Point]) -> tuple[float, float]:
    """From below the least to above the largest value, errors included.

    Of many values a fiftieth at either end is left out: single steps have ten times the loss of others.
    """
    out = len(points) // 50
    low = sorted(point.value - point.error for point in points)[out]
    high = sorted(point.value + point.error for point in points)[-1 - out]
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin
