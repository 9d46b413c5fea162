"""Pictures in files; matplotlib, of the `train` extra, draws them."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from ghn_init._errors import TrainingError
from ghn_init._files import write_bytes
from ghn_init.training._output import writing

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches.

    Raises:
        TrainingError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise TrainingError(
            f"matplotlib, which draws pictures, cannot be imported ({error}); pip install matplotlib"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, target: Path, **options: Any) -> None:
    """Draw a figure to a file, in the format of matplotlib's that its suffix names.

    Raises:
        TrainingError: matplotlib lacks the format, or the file cannot be written.
    """
    drawn = io.BytesIO()
    try:
        figure.savefig(drawn, format=target.suffix[1:], **options)
    except ValueError as error:
        raise TrainingError(f"{target}: cannot be drawn: {error}; give a name that ends in .svg") from error
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(target, drawn.getvalue())
