"""`Entry`: a parameter of the network on its way to its new values."""

from __future__ import annotations

from dataclasses import dataclass, field
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


@dataclass(frozen=True, slots=True)
class Decision:
    """What is to be done with a parameter.

    Attributes:
        predict: It is predicted; otherwise it is kept.
        reason: Why it is kept, or "".
        meant: It is kept by what the caller wants, a pattern, `head="keep"`, `frozen` or `scale`, and
            `strict` does not mind.
    """

    predict: bool
    reason: str = ""
    meant: bool = False


PREDICT: Final = Decision(predict=True)


def keep(reason: str) -> Decision:
    """The parameter cannot be predicted; `strict` forbids it."""
    return Decision(predict=False, reason=reason)


def spare(reason: str) -> Decision:
    """The parameter is kept by what the caller wants."""
    return Decision(predict=False, reason=reason, meant=True)


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
        rms: The root mean square that its values have and keep; None where the prediction's own counts.
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
        """Why it is kept, or ""."""
        return self.decision.reason


def to_write(entries: Iterable[Entry]) -> list[Entry]:
    """The entries with a prediction, one for each: the last of those that a weight is computed from."""
    return list({entry.source: entry for entry in entries if entry.tile is not None}.values())
