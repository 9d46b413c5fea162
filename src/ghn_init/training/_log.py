"""The log of a run: one JSON object a line."""

from __future__ import annotations

import io
import json
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ghn_init.training._checkpoint import write_atomically

if TYPE_CHECKING:
    from pathlib import Path

LOG = "log.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """Figures of one step: `loss` and `accuracy` are means over its networks, `seconds` since the start."""

    step: int
    loss: float
    accuracy: float
    lr: float
    grad_norm: float | None
    skipped: int
    seconds: float
    step_seconds: float
    networks: int
    done: float


class Log:
    """Appends to `log.jsonl` means over `every` steps; a context manager.

    Lines of steps after `resume_at` are removed first: a resumed run does them again. Without a folder
    nothing is written.
    """

    def __init__(self, folder: Path | None, every: int, resume_at: int = 0) -> None:
        self._path = folder / LOG if folder else None
        self._every, self._pending = every, list[Record]()
        if folder is not None and self._path is not None:
            folder.mkdir(parents=True, exist_ok=True)
            if self._path.exists():
                kept = [line for line in self._path.read_text().splitlines() if _step(line) <= resume_at]
                write_atomically(self._path, "".join(f"{line}\n" for line in kept).encode())

    def __enter__(self) -> Log:
        self._file = self._path.open("a", buffering=1) if self._path else io.StringIO()
        return self

    def __exit__(self, *exc: object) -> None:
        self._flush()
        self._file.close()

    def step(self, record: Record) -> None:
        """Take up one step; write a line if it is time."""
        self._pending.append(record)
        if record.step % self._every == 0:
            self._flush()

    def write(self, values: dict[str, Any]) -> None:
        """Write a line of its own."""
        self._flush()
        self._file.write(json.dumps(values) + "\n")

    def _flush(self) -> None:
        if not (records := self._pending):
            return
        count, spent = len(records), sum(record.step_seconds for record in records)
        line = asdict(records[-1]) | {
            "loss": _mean([record.loss for record in records]),
            "accuracy": _mean([record.accuracy for record in records]),
            "networks_per_second": sum(record.networks for record in records) / spent,
            "step_seconds": spent / count,
        }
        rounded = {
            key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in line.items()
        }
        self._file.write(json.dumps(rounded) + "\n")
        self._pending = []


def _mean(values: list[float]) -> float | None:
    """Mean of the finite values, None without any: JSON has no others."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else None


def _step(line: str) -> float:
    """The step of a line of the log; infinity for the torn last line of a killed run."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return float("inf")
