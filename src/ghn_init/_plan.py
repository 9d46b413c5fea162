"""`plan`: everything that `predict` will do to a model, computed and checked before the first write."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

from ghn_init._diversify import diversify as diversify_
from ghn_init._errors import PredictError
from ghn_init._materialise import materialised
from ghn_init._select import KEEP, Options, as_patterns, check_model, listing, select
from ghn_init._tile import stored_form, tile_to
from ghn_init._tiles import ghn_of, plain_torch, predicted_tiles
from ghn_init._trace import trace

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from os import PathLike

    from ghn_init._graph import Graph
    from ghn_init._model import GHN
    from ghn_init._select import Diversify, Entry, Head
    from ghn_init._tile import Tile

Action = Literal["predicted", "tiled", "kept"]
ModelT = TypeVar("ModelT", bound=nn.Module)

ACTIONS: Final[tuple[Action, ...]] = ("predicted", "tiled", "kept")


@dataclass(frozen=True, slots=True)
class Row:
    """What happens to one parameter.

    Attributes:
        name: Qualified name; the first one, if it is tied.
        shape: The parameter's own shape.
        node: Type of the node that stands for it, or None.
        action: "predicted": every element has a prediction of its own; "tiled": the prediction is
            smaller and repeats; "kept": not written.
        reason: Why it is kept, or "".
        also: Its other names, if it is tied.
    """

    name: str
    shape: tuple[int, ...]
    node: str | None
    action: Action
    reason: str = ""
    also: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()


@dataclass(frozen=True, eq=False)
class Plan(Generic[ModelT]):
    """Predicted weights for a model, not yet written. Made by `plan`; `str(plan)` is a table.

    Attributes:
        model: The module that `apply` writes to.
        graph: Its graph.
        rows: One row for every parameter, in the order of `model.named_parameters()`.
        weights: The GHN's weights as the caller named them.
        options: The caller's choices.
    """

    model: ModelT
    graph: Graph
    rows: tuple[Row, ...]
    weights: str
    options: Options
    _tiles: dict[str, Tile]

    def apply(self) -> ModelT:
        """Write the predicted values into the model's parameters, in place, and return the model.

        dtype, device, requires_grad, identity and ties of the parameters stay, so an optimizer that holds
        them needs no change; tied ones are written once. A model on the meta device is created on the
        CPU: its parameters are then new objects, and kept parameters and buffers come from their
        modules' `reset_parameters`. Applying again writes the same bits.

        Raises:
            PredictError: Nothing to write; the model changed since it was planned; or a meta model
                with tensors that nobody gives a value. The model is then as it was. A write that
                the device itself refuses raises too, and says how many parameters were written.
        """
        kind = type(self.model).__name__
        if not self._tiles:
            reasons = listing(list(dict.fromkeys(row.reason for row in self.rows)))
            raise PredictError(
                f"{kind}: nothing to write, all {len(self.rows)} parameters are kept ({reasons})"
            )
        with plain_torch(), materialised(self.model, self._tiles, self.options.seed):
            self._write(self._targets())
        return self.model

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Names and values of the parameters that are written, one full float32 tensor at a time."""
        for name, tile in self._tiles.items():
            yield name, self._value(name, tile)

    def counts(self) -> dict[Action, tuple[int, int]]:
        """Number of parameters and of elements for every action."""
        parameters = Counter[Action](row.action for row in self.rows)
        elements = Counter[Action]()
        for row in self.rows:
            elements[row.action] += row.numel
        return {action: (parameters[action], elements[action]) for action in ACTIONS}

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON values."""
        rows = [
            {
                "name": row.name,
                "shape": list(row.shape),
                "node": row.node,
                "action": row.action,
                "reason": row.reason,
                "also": list(row.also),
            }
            for row in self.rows
        ]
        summary = {
            action: {"parameters": parameters, "elements": elements}
            for action, (parameters, elements) in self.counts().items()
        }
        return {
            "model": type(self.model).__name__,
            "weights": self.weights,
            "head": self.options.head,
            "diversify": self.options.diversify,
            "seed": self.options.seed,
            "summary": summary,
            "rows": rows,
        }

    def __str__(self) -> str:
        head = ("parameter", "shape", "node", "action", "")
        table = [head, *(_cells(row) for row in self.rows)]
        return f"{type(self.model).__name__}, weights {self.weights}\n{_aligned(table)}\n\n{self._summary()}"

    def __repr__(self) -> str:
        counted = ", ".join(f"{action}={count}" for action, (count, _) in self.counts().items())
        return f"<Plan of {type(self.model).__name__}: {counted}>"

    def _summary(self) -> str:
        """Counts and shares for every action, and the reasons for keeping."""
        counts = self.counts()
        total = max(sum(elements for _, elements in counts.values()), 1)
        lines = [("action", "parameters", "elements", "share")]
        for action, (parameters, elements) in counts.items():
            lines.append((action, str(parameters), f"{elements:,}", f"{elements / total:.1%}"))
        reasons = Counter(row.reason for row in self.rows if row.action == KEEP)
        kept = [f"kept, {count} of them: {reason}" for reason, count in reasons.most_common()]
        return "\n".join([_aligned(lines, right=(1, 2, 3)), *kept])

    def _targets(self) -> list[tuple[str, nn.Parameter, Tile]]:
        """Every tile with its parameter, on the parameter's device and in its dtype.

        Raises:
            PredictError: Parameters that are gone or have another shape since the plan was made.
        """
        params = dict(self.model.named_parameters())
        changed = [n for n, tile in self._tiles.items() if n not in params or params[n].shape != tile.stored]
        if changed:
            kind = type(self.model).__name__
            raise PredictError(f"{kind} changed since it was planned: {listing(changed)}; make a new plan")
        return [
            (name, params[name], tile if self._diversified(tile) else _on(tile, params[name]))
            for name, tile in self._tiles.items()
        ]

    def _diversified(self, tile: Tile) -> bool:
        """The prediction is changed before it is written: full, in float32, on the CPU."""
        return self.options.diversify is not None and len(tile.shape) > 1

    def _write(self, targets: list[tuple[str, nn.Parameter, Tile]]) -> None:
        """Copy every tile into its parameter."""
        if self.options.diversify is not None:
            # The largest first, so that memory that does not suffice is found before anything is written.
            targets = sorted(targets, key=lambda target: -target[1].numel())
        written = 0
        try:
            for name, param, tile in targets:
                if self._diversified(tile):
                    param.copy_(self._value(name, tile))
                else:
                    tile.copy_into(param)
                written += 1
        except RuntimeError as error:
            name, param, _ = targets[written]
            raise PredictError(
                f"{type(self.model).__name__}: {param.device} refused to write {name} {tuple(param.shape)}: "
                f"{error}; {written} of {len(targets)} parameters were written before, apply the plan again"
            ) from error

    def _value(self, name: str, tile: Tile) -> Tensor:
        """The full tensor of a parameter, diversified if so wanted, in its own shape."""
        if self.options.diversify is None or not self._diversified(tile):
            return tile.expand()
        block = tile.values.cpu()
        full = tile_to(block.unsqueeze(0), tile.shape)[0]
        full = full.clone() if full.data_ptr() == block.data_ptr() else full
        diversify_(full, block, self.options.diversify, name=name, seed=self.options.seed)
        return stored_form(full.unsqueeze(0), tile.stored, tile.transposed)[0]


def plan(
    model: ModelT,
    weights: str | PathLike[str] | GHN = "ghn2-cifar10",
    *,
    example_input: object = None,
    head: Head = "auto",
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    diversify: Diversify | None = None,
    seed: int = 0,
    strict: bool = False,
) -> Plan[ModelT]:
    """Compute and check everything that `predict` with the same arguments would write.

    The model is not changed: neither weights nor buffers, modes, hooks or random state.

    Args:
        model: The network, on any device, meta included.
        weights: The GHN: a bundled name, a file or directory, "hf://org/repo", or a loaded one. What is
            named runs on the CPU, so that every device gets the same bits; a loaded GHN runs where it is.
        example_input: What the network is called with, see `trace`; found by itself where it can be.
        head: "auto" predicts the classifier if its width is the one that the GHN was trained for and
            keeps it otherwise; "predict" and "keep" force it.
        include: Predict only the parameters whose qualified names match (`fnmatch` patterns).
        exclude: Keep the parameters whose qualified names match. Of tied names one is enough.
        diversify: "noise" or "orthogonal" make the repeated channels of tiled weights differ, see
            `ghn_init._diversify`; for weights of two or more dimensions.
        seed: Seed of `diversify`, and of what a meta model's modules initialise themselves.
        strict: Refuse to keep any parameter but those that `head="keep"`, `include` and `exclude` ask for.

    Returns:
        The plan: print it, or `apply` it.

    Raises:
        PredictError: An argument that is none of its choices, a pattern without a match, a model without
            parameters or with lazy ones, a prediction that is not finite, `strict` violated.
        TraceError: The network could not be traced.
        CheckpointError: The weights could not be loaded.
    """
    options = Options(
        head, as_patterns("include", include), as_patterns("exclude", exclude), diversify, seed, strict
    )
    check_model(model)
    with plain_torch():
        graph = trace(model, example_input)
        ghn = ghn_of(weights)
        entries = select(model, graph, options, ghn.config.num_classes)
        tiles = predicted_tiles(ghn, graph, entries)
    label = type(weights).__name__ if isinstance(weights, torch.nn.Module) else str(weights)
    rows = tuple(_row(entry, tiles.get(entry.name)) for entry in entries)
    return Plan(model, graph, rows, label, options, tiles)


def _row(entry: Entry, tile: Tile | None) -> Row:
    action: Action = "kept" if tile is None else "tiled" if tile.tiled else "predicted"
    return Row(entry.name, tuple(entry.param.shape), entry.node, action, entry.reason, entry.also)


def _on(tile: Tile, param: Tensor) -> Tile:
    """The tile on the parameter's device and in its dtype."""
    values = tile.values.to(param.device, param.dtype)
    return tile if values is tile.values else replace(tile, values=values)


def _cells(row: Row) -> tuple[str, ...]:
    note = ", ".join(filter(None, (row.reason, f"tied to {', '.join(row.also)}" if row.also else "")))
    return row.name, "x".join(map(str, row.shape)) or "scalar", row.node or "-", row.action, note


def _aligned(table: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """A plain table, columns two spaces apart; the columns in `right` are aligned there."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for row in table:
        cells = (
            c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
