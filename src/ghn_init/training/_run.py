"""How a run is kept, how far it is, and how it is asked to end."""

from __future__ import annotations

import math
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ghn_init._errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """How a run is kept and watched; none of it changes its result.

    Attributes:
        output: Folder for checkpoint, log and weights; with several machines, one that all see.
        time_limit: Seconds after which this part of the run stops cleanly, to be resumed; None: no limit.
            At least one step is made.
        save_every: Seconds between checkpoints.
        validate_every: Seconds between quick validations; 0: none but the last.
        validation_networks: Held-out architectures of a quick validation.
        validation_images: Validation images of a quick validation.
        log_every: Steps between lines of the log.
        tensorboard: Write the log for TensorBoard, too.

    Raises:
        ConfigError: A length of time that is negative or not finite, or a number that is less than 1.
    """

    output: Path
    time_limit: float | None = None
    save_every: float = 60.0
    validate_every: float = 300.0
    validation_networks: int = 12
    validation_images: int = 320
    log_every: int = 10
    tensorboard: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "output", Path(self.output))
        for name in ("time_limit", "save_every", "validate_every"):
            value = getattr(self, name)
            unlimited = name == "time_limit" and value is None
            if not unlimited and not (isinstance(value, int | float) and 0 <= value < math.inf):
                raise ConfigError(f"training: {name}={value!r}; expected a finite number of seconds from 0")
        for name in ("validation_networks", "validation_images", "log_every"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ConfigError(f"training: {name}={getattr(self, name)!r}; expected a whole number from 1")


@dataclass
class State:
    """What changes during a run, beside weights and optimizer. All randomness is a function of these.

    Attributes:
        step: Optimizer steps tried, skipped ones included.
        skipped: Steps that were not taken because no network was left, or the GHN's gradient was not finite.
        dropped: (network, batch) pairs that were left out because loss or gradients were not finite.
        position: Place in the sequence of networks after the last step.
        seconds: Time spent training, over all parts of the run.
        networks: (network, batch) pairs run.
    """

    step: int = 0
    skipped: int = 0
    dropped: int = 0
    position: int = 0
    seconds: float = 0.0
    networks: int = 0


class Clock:
    """Seconds since it was entered, less those in which the process was stopped (SIGSTOP); a context manager.

    A process cannot be told that it is being stopped, so a thread ticks: where a tick comes `LATE` seconds
    late or more, nothing of the process ran.
    """

    TICK: Final = 0.5
    LATE: Final = 5.0

    def __init__(self) -> None:
        self._started = self._ticked = time.monotonic()
        self._lock, self._over = threading.Lock(), threading.Event()

    def __enter__(self) -> Clock:
        threading.Thread(target=self._tick, name="clock", daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()

    def __call__(self) -> float:
        with self._lock:
            now = time.monotonic()
            late = now - self._ticked - self.TICK
            if late >= self.LATE:
                self._started += late
            self._ticked = now
            return now - self._started

    def _tick(self) -> None:
        while not self._over.wait(self.TICK):
            self()


class Termination:
    """Notes SIGTERM and the first Ctrl-C, so that a run ends after its step; a context manager.

    A second Ctrl-C interrupts at once. Threads other than the main one get no signals.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Termination:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: object) -> None:
        self.asked = True
        if number == signal.SIGINT:
            signal.signal(number, self._before[number])
