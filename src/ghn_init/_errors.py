"""Every error that ghn-init raises on purpose derives from `GHNInitError`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


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


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def listing(names: Sequence[str], limit: int = 8) -> str:
    """Join names for a message, cut after `limit`."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
