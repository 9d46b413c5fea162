"""The log of a run: one JSON object a line."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

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

    Lines of steps after `resume_at` are removed first: a resumed run does them again.
    """

    def __init__(self, folder: Path, every: int, resume_at: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path, self._every, self._pending = folder / LOG, every, list[Record]()
        if self._path.exists():
            kept = [line for line in self._path.read_text().splitlines() if _step(line) <= resume_at]
            self._path.write_text("".join(f"{line}\n" for line in kept))

    def __enter__(self) -> Log:
        self._file = self._path.open("a", buffering=1)
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
        count, spent = len(records), sum(r.step_seconds for r in records)
        line = asdict(records[-1]) | {
            "loss": sum(r.loss for r in records) / count,
            "accuracy": sum(r.accuracy for r in records) / count,
            "networks_per_second": sum(r.networks for r in records) / spent,
            "step_seconds": spent / count,
        }
        self._file.write(
            json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in line.items()}) + "\n"
        )
        self._pending = []


def _step(line: str) -> float:
    """The step of a line of the log; infinity for the torn last line of a killed run."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return float("inf")
