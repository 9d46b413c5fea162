"""Progress bars on stderr, where that is a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as Remaining

if TYPE_CHECKING:
    from ghn_init.training._log import Record


class _Bar:
    """A progress bar with one task; a context manager."""

    def __init__(self, *columns: Any, total: float, shown: bool = True, **figures: Any) -> None:
        console = Console(stderr=True)
        self._bar = Progress(*columns, console=console, disable=not (shown and console.is_terminal))
        self._task = self._bar.add_task("", total=total, **figures)

    def __enter__(self) -> Any:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()


class TrainingBar(_Bar):
    """Step, running means of loss, accuracy and networks a second, time left."""

    def __init__(self, *, shown: bool = True) -> None:
        percent = "[progress.percentage]{task.percentage:>4.1f}%"
        super().__init__(
            TextColumn("step {task.fields[step]}"), BarColumn(), TextColumn(percent),
            TextColumn("{task.fields[figures]}"), TimeElapsedColumn(), Remaining(),
            total=1.0, shown=shown, step=0, figures="",
        )  # fmt: skip
        self._mean: dict[str, float] = {}

    def step(self, record: Record) -> None:
        """Show one step."""
        new = {"loss": record.loss, "acc": record.accuracy, "net/s": record.networks / record.step_seconds}
        self._mean = {key: 0.95 * self._mean.get(key, value) + 0.05 * value for key, value in new.items()}
        figures = "  ".join(f"{key} {value:.3g}" for key, value in self._mean.items())
        if record.skipped:
            figures += f"  skipped {record.skipped}"
        if record.dropped:
            figures += f"  dropped {record.dropped}"
        self._bar.update(self._task, completed=record.done, step=record.step, figures=figures)


class TeacherBar(_Bar):
    """The teacher's running loss, time left."""

    def __init__(self) -> None:
        super().__init__(
            TextColumn("loss {task.fields[loss]:.3f}"), BarColumn(), TimeElapsedColumn(), Remaining(),
            total=1.0, loss=0.0,
        )  # fmt: skip
        self._loss: float | None = None

    def step(self, done: float, loss: float) -> None:
        """Show one step."""
        self._loss = loss if self._loss is None else 0.95 * self._loss + 0.05 * loss
        self._bar.update(self._task, completed=done, loss=self._loss)


class EvaluationBar(_Bar):
    """Networks measured, the last one's accuracy, time left."""

    def __init__(self, networks: int) -> None:
        super().__init__(
            TextColumn("{task.fields[figures]:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            Remaining(), total=networks, figures="",
        )  # fmt: skip

    def network(self, name: str, accuracy: float) -> None:
        """Show one network more."""
        self._bar.update(self._task, advance=1, figures=f"{name}: {accuracy:.1f} %")


class CountBar(_Bar):
    """How many of a number of things are done, time left."""

    def __init__(self, total: int, label: str) -> None:
        super().__init__(
            TextColumn(label),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            Remaining(),
            total=total,
        )

    def advance(self, count: int) -> None:
        """Show so many more."""
        self._bar.update(self._task, advance=count)
