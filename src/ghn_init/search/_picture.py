"""A picture of predicted against measured properties; matplotlib, of the `train` extra, draws it."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from ghn_init._errors import TrainingError
from ghn_init._files import reason, write_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    from ghn_init.search._properties import Fitted


def draw_properties(fitted: Sequence[Fitted], target: Path) -> None:
    """Draw a panel for every property: what its better regressor predicted, against what was measured.

    Args:
        fitted: The properties.
        target: File to draw to, in the format of matplotlib's that its suffix names.

    Raises:
        TrainingError: matplotlib is missing or lacks the format; the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise TrainingError(
            f"matplotlib, which draws properties, cannot be imported ({error}); pip install 'ghn-init[train]'"
        ) from error
    figure = Figure(figsize=(9, 8), layout="constrained")
    for panel, found in zip(figure.subplots(2, 2).flat, fitted, strict=True):
        _plot(panel, found)
    drawn = io.BytesIO()
    try:
        figure.savefig(drawn, format=target.suffix[1:])
    except ValueError as error:
        raise TrainingError(f"{target}: cannot be drawn: {error}; give a name that ends in .svg") from error
    try:
        write_bytes(target, drawn.getvalue())
    except OSError as error:
        raise TrainingError(f"{target} cannot be written: {reason(error)}") from error


def _plot(panel: Axes, found: Fitted) -> None:
    best = found.best
    panel.scatter(found.measured, best.folds, s=14, label=f"five folds, tau {best.folds_tau}")
    panel.scatter(
        found.measured_held_out, best.held_out, s=18, marker="^", label=f"held out, tau {best.held_out_tau}"
    )
    low, high = found.measured.min(), found.measured.max()
    panel.plot([low, high], [low, high], color="0.6", linewidth=1, zorder=0)
    panel.set_title(f"{found.prop.name}, {best.name}", loc="left")
    panel.set_xlabel(f"measured, {found.prop.unit}")
    panel.set_ylabel(f"predicted, {found.prop.unit}")
    panel.legend(fontsize="small")
    panel.grid(alpha=0.3)
