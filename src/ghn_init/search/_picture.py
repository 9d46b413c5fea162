"""A picture of predicted against measured properties."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ghn_init.training._figures import new_figure, save_figure

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
    figure = new_figure(9, 8)
    for panel, found in zip(figure.subplots(2, 2).flat, fitted, strict=True):
        _plot(panel, found)
    save_figure(figure, target)


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
