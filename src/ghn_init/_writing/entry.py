"""`Entry`: a parameter of the network on its way to its new values."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING, Final, Literal

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

    from ghn_init._hypernetwork.tile import Tile
    from ghn_init._network.locations import Location
    from ghn_init._network.parametrised import Computed

Action = Literal["predicted", "tiled", "kept"]

ACTIONS: Final[tuple[Action, ...]] = ("predicted", "tiled", "kept")


class Cause(Enum):
    """What a parameter is kept for.

    The first five are what the caller wants, a pattern or an option, and `strict` does not mind them; for the
    others the parameter cannot be predicted.
    """

    PATTERN = auto()
    FROZEN = auto()
    HEAD = auto()
    OWN = auto()
    AUTO = auto()
    WIDTH = auto()
    UNFIT = auto()
    UNUSED = auto()
    UNWRITABLE = auto()
    INFERENCE = auto()


_OPTIONS: Final[dict[Cause | None, str]] = {
    Cause.FROZEN: " (frozen='keep')",
    Cause.HEAD: " (head='keep')",
    Cause.OWN: " (kept unless scale='predicted')",
    Cause.AUTO: " (scale='auto')",
}
"""What the caller may change, to have it predicted."""

_MEANT: Final = frozenset({Cause.PATTERN, *_OPTIONS})


@dataclass(frozen=True, slots=True)
class Decision:
    """What is to be done with a parameter.

    Attributes:
        cause: What it is kept for; None if it is predicted.
        reason: The same in words, or "".
    """

    cause: Cause | None = None
    reason: str = ""

    @property
    def predict(self) -> bool:
        """Whether it is predicted; otherwise it is kept."""
        return self.cause is None

    @property
    def meant(self) -> bool:
        """Whether it is kept by what the caller wants, and `strict` does not mind."""
        return self.cause in _MEANT


PREDICT: Final = Decision()


@dataclass(frozen=True, slots=True)
class Entry:
    """A parameter of the network: what it is, what is to be done with it and why, and what is predicted.

    `select` makes one for every parameter, `scale` adds its scale, `predictions` the tile, and `in_place` or
    `to_disk` writes it. Entries are the rows of a `Plan`. Two are equal if they say the same, whatever the
    values are.

    Attributes:
        locations: Where it is registered; several if it is tied.
        shape: Its own shape.
        node: Type of the node that stands for it, or None.
        key: Its name in the graph, or None where there is no node: one of its qualified names, or the name of
            the weight that is computed from it.
        computed: The weight that is computed from it, which is what is predicted; or None.
        decision: What is to be done with it.
        rms: The root mean square that its values have and keep, or the number that stands for what the GHN is
            not shown (`shown.py`), 0 for biases; None where the prediction's own counts.
        factor: What the prediction is multiplied by so that outputs are no larger than a network's own, or
            features no longer than is good.
        own: The root mean square that its module would give it, if it is on the meta device.
        tile: What is predicted, once it is.
    """

    locations: tuple[Location, ...]
    shape: tuple[int, ...]
    node: str | None
    key: str | None
    computed: Computed | None = field(default=None, compare=False, repr=False)
    decision: Decision = PREDICT
    rms: float | None = field(default=None, compare=False)
    factor: float = field(default=1.0, compare=False)
    own: float | None = field(default=None, compare=False)
    tile: Tile | None = field(default=None, compare=False, repr=False)

    @property
    def name(self) -> str:
        """Its qualified name; the first one, if it is tied."""
        return self.locations[0].name

    @property
    def also(self) -> tuple[str, ...]:
        """Its other names, if it is tied."""
        return tuple(location.name for location in self.locations[1:])

    @property
    def names(self) -> tuple[str, ...]:
        """All its names."""
        return tuple(location.name for location in self.locations)

    @property
    def param(self) -> nn.Parameter:
        """The parameter that is registered at its location now."""
        param = self.locations[0].parameter
        assert param is not None  # see `check_unchanged`
        return param

    @property
    def numel(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()

    @property
    def through(self) -> str | None:
        """Name of the weight that is computed from it, if that is what is predicted; or None."""
        return None if self.computed is None else self.computed.name

    @property
    def source(self) -> str:
        """The name of what is predicted: the parameter's own, or that of the weight computed from it."""
        return self.through or self.name

    @property
    def called(self) -> tuple[str, ...]:
        """All names by which the caller and the graph may call it, those it is solved with included."""
        return self.names if self.computed is None else (*self.computed.parts, self.computed.name)

    @property
    def written(self) -> tuple[str, ...]:
        """Qualified names of all tensors that get a value when it is written."""
        return (self.name,) if self.computed is None else self.computed.solved

    @property
    def action(self) -> Action:
        """What happens to it.

        "predicted": every element has a prediction of its own; "tiled": the prediction is smaller and
        repeats; "kept": not written.
        """
        if not self.decision.predict:
            return "kept"
        return "tiled" if self.tile is not None and self.tile.tiled else "predicted"

    @property
    def reason(self) -> str:
        """Why it is kept, with the option that it is kept by, if any; or ""."""
        return self.decision.reason + _OPTIONS.get(self.decision.cause, "")


def to_write(entries: Iterable[Entry]) -> list[Entry]:
    """The entries with a prediction, one for each: the last of those that a weight is computed from."""
    return list({entry.source: entry for entry in entries if entry.tile is not None}.values())
