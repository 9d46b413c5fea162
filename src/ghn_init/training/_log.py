"""The log of a run: one JSON object a line, and where it is wanted the same for TensorBoard."""

from __future__ import annotations

import io
import json
import math
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ghn_init._errors import TrainingError
from ghn_init._files import write_bytes
from ghn_init.training._output import writing
from ghn_init.training._records import read_records

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch.utils.tensorboard import SummaryWriter

LOG = "log.jsonl"
TENSORBOARD = "tensorboard"

_NAMED = 3
"""Networks of large loss that a line names; one is half a kilobyte."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """Figures of one step.

    `loss` and `accuracy` are means over its networks, `losses` those of this process's networks, `seconds` go
    from the start.
    """

    step: int
    loss: float
    accuracy: float
    lr: float
    grad_norm: float | None
    skipped: int
    dropped: int = 0
    seconds: float
    step_seconds: float
    networks: int
    losses: tuple[float, ...] = ()
    done: float


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's log; none if there is no file.

    Raises:
        TrainingError: The file cannot be read, or is no log of a run.
    """
    lines = read_records(path)
    for number, line in enumerate(lines, 1):
        if not _is_line(line):
            raise TrainingError(f"{path}, line {number}: {line!r:.80}; expected the log of `ghn-init train`")
    return lines


def _is_line(values: Mapping[str, Any]) -> bool:
    """Whether it has what is read of a line: its step, and the figures of steps or of a validation."""
    figures = [values.get(name) for name in ("seconds", "loss", "accuracy", "validation", "standard_error")]
    return (
        isinstance(values.get("step"), int)
        and all(figure is None or isinstance(figure, int | float) for figure in figures)
        and ("loss" not in values or "accuracy" in values)
        and ("validation" not in values or "standard_error" in values)
    )


class Log:
    """Appends to `log.jsonl` means over `every` steps; a context manager.

    Lines of steps after `resume_at` are removed first: a resumed run does them again. Without a folder
    nothing is written. With `tensorboard` the numbers go to event files in `tensorboard/`, too.

    Attributes:
        validated: Step `resume_at` has been validated.

    Raises:
        TrainingError: From every method: the log cannot be written.
    """

    def __init__(
        self, folder: Path | None, every: int, resume_at: int = 0, *, tensorboard: bool = False
    ) -> None:
        self._path = folder / LOG if folder else None
        self._name = self._path or LOG
        self._every, self._pending = every, list[Record]()
        self._large: list[dict[str, Any]] = []
        self._board: SummaryWriter | None = None
        self.validated = False
        if folder is not None and self._path is not None:
            with writing(self._path):
                folder.mkdir(parents=True, exist_ok=True)
                if self._path.exists():
                    kept = [line for line in read_log(self._path) if line["step"] <= resume_at]
                    self.validated = any(line["step"] == resume_at and "lr" not in line for line in kept)
                    write_bytes(self._path, "".join(f"{json.dumps(line)}\n" for line in kept).encode())
            if tensorboard:
                self._board = summary_writer()(folder / TENSORBOARD, purge_step=resume_at + 1)

    def __enter__(self) -> Log:
        with writing(self._name):
            self._file = self._path.open("a", buffering=1) if self._path else io.StringIO()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # The error that ends the run is the one to show, not that its log cannot be finished either.
        with suppress(TrainingError) if kind else nullcontext():
            self._close()

    def _close(self) -> None:
        if self._board is not None:
            self._board.close()
        with writing(self._name), self._file:
            self._flush()

    def step(self, record: Record, large: Sequence[dict[str, Any]] = ()) -> None:
        """Take up one step, and its networks of large "loss" (None: not finite); write if it is time."""
        self._pending.append(record)
        self._large += large
        if record.step % self._every == 0:
            self._flush()

    def write(self, values: dict[str, Any]) -> None:
        """Write a line of its own."""
        self._flush()
        self._emit(values)

    def _flush(self) -> None:
        if not (records := self._pending):
            return
        count, spent = len(records), sum(record.step_seconds for record in records)
        line = asdict(records[-1]) | {
            "loss": _mean([record.loss for record in records]),
            "accuracy": _mean([record.accuracy for record in records]),
            "networks_per_second": sum(record.networks for record in records) / spent,
            "step_seconds": spent / count,
            "large": len(self._large),
            "largest": sorted(self._large, key=_loss, reverse=True)[:_NAMED],
        }
        del line["losses"]
        rounded = {
            key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in line.items()
        }
        self._emit(rounded)
        self._pending, self._large = [], []

    def _emit(self, values: dict[str, Any]) -> None:
        with writing(self._name):
            self._file.write(json.dumps(values) + "\n")
        if self._board is not None:
            for key, value in values.items():
                if key != "step" and isinstance(value, int | float):
                    self._board.add_scalar(key, value, values["step"])


def summary_writer() -> type[SummaryWriter]:
    """TensorBoard's writer.

    Raises:
        TrainingError: It is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise TrainingError(
            f"--tensorboard: TensorBoard cannot be imported ({error}); "
            "pip install tensorboard, or leave the option out"
        ) from error
    return SummaryWriter


def _loss(network: dict[str, Any]) -> float:
    """What a network of large loss is sorted by."""
    return math.inf if network["loss"] is None else network["loss"]


def _mean(values: list[float]) -> float | None:
    """Mean of the finite values, None without any: JSON has no others."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else None
