"""Every error that ghn-init raises on purpose derives from `GHNInitError`."""

from __future__ import annotations

import reprlib
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class GHNInitError(Exception):
    """Base class. The message names the model, the place, what was expected and found, the remedy."""


class TraceError(GHNInitError):
    """The model could not be turned into a computational graph."""


class RegistrationError(GHNInitError):
    """A rule for a layer that is not one, or that is in the way of another: see `register`."""


class GraphError(GHNInitError):
    """A `Graph` that breaks its own rules: unknown node type, cycle, edge to nowhere."""


class ConfigError(GHNInitError):
    """A configuration with an unknown key or an impossible value."""


class CheckpointError(GHNInitError):
    """Weights that are missing, damaged, or not those of a GHN."""


class PredictError(GHNInitError):
    """Predicted weights that cannot be written: wrong shape, not finite, or nothing to write."""


class ArchitectureError(GHNInitError):
    """A DeepNets-1M architecture that breaks the rules of its space."""


class TrainingError(GHNInitError):
    """Training that cannot start, continue or resume."""


class ModelSpecError(GHNInitError):
    """A model named on the command line that cannot be found or built."""


class DrawError(GHNInitError):
    """A graph that cannot be drawn: unknown format, no graphviz, nowhere to write."""


_LONGEST: Final = 120
"""Characters of a value from a file that a message repeats."""


class _Short(reprlib.Repr):
    """Representations that look at a few items on two levels, and of what is no plain value at its type.

    That of a list whose items are one list, whose items are one list, and so on, would take memory without
    end; a file of a hundred bytes may hold one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 2
        self.maxstring = self.maxlong = _LONGEST

    def repr_instance(self, x: object, level: int) -> str:
        """What is neither text, an integer nor one of Python's containers."""
        del level
        return repr(x) if type(x) in (bool, float, complex, type(None)) else f"<{type(x).__name__}>"


def shown(value: object) -> str:
    """A value from a file, for a message: its representation, cut short."""
    try:
        text = _Short().repr(value)
    except ValueError:  # an integer with more digits than Python writes out
        text = f"<{type(value).__name__}>"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def shown_names(names: Iterable[object]) -> list[str]:
    """Names from a file, for a message, sorted: text as it is but cut short; others need not be text."""
    return sorted(name[:_LONGEST] if isinstance(name, str) else shown(name) for name in names)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type."""
    return (message_of(error).strip() or type(error).__name__).splitlines()[0]


def message_of(error: BaseException) -> str:
    """An error's message; of the user's own errors, that may itself fail, and is then empty."""
    try:
        return str(error)
    except Exception:  # noqa: BLE001
        return ""


def listing(names: Sequence[str], limit: int = 8) -> str:
    """Join names for a message, cut after `limit`."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
