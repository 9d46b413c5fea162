"""Progress bars on stderr, where that is a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn
from rich.progress import TimeElapsedColumn as Elapsed
from rich.progress import TimeRemainingColumn as Remaining

if TYPE_CHECKING:
    from typing_extensions import Self

    from ghn_init.training._log import Record


class Bar:
    """A progress bar with a label, and the time left; a context manager.

    Args:
        total: Number of things to do, which is shown; 1.0 stands for the whole, of which percents are shown.
        label: What is said beside it.
        shown: Whether it may be shown.
    """

    def __init__(self, total: float, label: str = "", *, shown: bool = True) -> None:
        console = Console(stderr=True)
        done = MofNCompleteColumn() if isinstance(total, int) else TaskProgressColumn()
        columns = (
            BarColumn(),
            done,
            Elapsed(),
            Remaining(),
            TextColumn("{task.description}"),
        )
        self._bar = Progress(*columns, console=console, disable=not (shown and console.is_terminal))
        self._task = self._bar.add_task(label, total=total)
        self._means: dict[str, float] = {}

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    def advance(self, count: int = 1, label: str | None = None) -> None:
        """Show so many more, and another label."""
        self._bar.update(self._task, advance=count, description=label)

    def reach(self, done: float, figures: dict[str, float], text: str = "") -> None:
        """Show the part that is done, running means of figures, and a text."""
        means = {key: 0.95 * self._means.get(key, new) + 0.05 * new for key, new in figures.items()}
        self._means = means
        shown = "  ".join([*(f"{key} {mean:.3g}" for key, mean in means.items()), text])
        self._bar.update(self._task, completed=done, description=shown)

    def training_step(self, record: Record) -> None:
        """Show a step of a run."""
        speed = record.networks / record.step_seconds
        counts = {"step": record.step, "skipped": record.skipped, "dropped": record.dropped}
        text = "  ".join(f"{name} {count}" for name, count in counts.items() if count)
        self.reach(record.done, {"loss": record.loss, "acc": record.accuracy, "net/s": speed}, text)
