"""`plan`: everything that `predict` will do to a model, computed and checked before the first write."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

from ghn_init._errors import PredictError
from ghn_init._meta.initialise import kinds_of
from ghn_init._meta.materialise import materialised
from ghn_init._network.sharded import reshard
from ghn_init._network.wrappers import unwrapped
from ghn_init._tracing.trace import trace
from ghn_init._writing.familiarity import described, unfamiliar, warn
from ghn_init._writing.in_place import names_of, targets_of, write
from ghn_init._writing.predictions import ghn_of, plain_torch, predicted_tiles
from ghn_init._writing.select import KEEP, Options, as_patterns, check_model, forbid_kept, listing, select
from ghn_init._writing.to_disk import save

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from os import PathLike
    from pathlib import Path

    from ghn_init._graph.graph import Graph
    from ghn_init._hypernetwork.model import GHN
    from ghn_init._hypernetwork.tile import Tile
    from ghn_init._writing.select import Diversify, Entry, Head

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
        through: Name of the weight that is computed from it, if that is what is predicted; or None.
    """

    name: str
    shape: tuple[int, ...]
    node: str | None
    action: Action
    reason: str = ""
    also: tuple[str, ...] = ()
    through: str | None = None

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
        unfamiliar: In which ways the network is unlike those that GHNs are trained on, see `_familiarity`.
    """

    model: ModelT
    graph: Graph
    rows: tuple[Row, ...]
    weights: str
    options: Options
    unfamiliar: tuple[str, ...]
    _tiles: dict[str, Tile]

    def apply(self) -> ModelT:
        """Write the predicted values into the model's parameters, in place, and return the model.

        dtype, device, requires_grad, identity and ties of the parameters stay, so an optimizer that holds
        them needs no change; tied ones are written once. A model on the meta device is created on the
        CPU: its parameters are then new objects, and kept parameters and buffers get the values that
        `ghn_init._meta.initialise` describes. Applying again writes the same bits.

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
        network = self._network()
        with plain_torch():
            predicted = names_of(network, self._tiles)
            with materialised(network, predicted, kinds_of(self.graph), self.options.seed):
                write(network, targets_of(network, self._tiles), self.options)
        return self.model

    def save(self, folder: str | PathLike[str], *, max_shard_size: int | str = "5GB") -> Path:
        """Write the whole model's checkpoint with the predicted values to disk, tensor by tensor.

        See `ghn_init.predict_to`. The model is left as it is: one on the meta device stays there.
        """
        with plain_torch():
            kinds = kinds_of(self.graph)
            return save(self._network(), self._tiles, kinds, self.options, folder, max_shard_size)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Names and values of the tensors that are written, one full tensor at a time, on the CPU.

        In the parameters' dtypes. A weight that is computed from other parameters gives those.
        """
        for target in targets_of(self._network(), self._tiles):
            with plain_torch():
                values = target.values(self.options)
            yield from ((name, value.cpu()) for name, value in values.items())

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
                "through": row.through,
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
            "unfamiliar": list(self.unfamiliar),
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
        far = [described(type(self.model).__name__, self.unfamiliar)] if self.unfamiliar else []
        return "\n".join([_aligned(lines, right=(1, 2, 3)), *kept, *far])

    def _network(self) -> nn.Module:
        """The network inside the model's wrappers, its shards in place."""
        network = unwrapped(self.model)
        reshard(network)
        return network


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

    The model is not changed: neither weights nor buffers, modes, hooks or random state. Warns
    (`OutOfDistributionWarning`) if the network is far from those that a GHN is trained on.

    Args:
        model: The network, on any device, meta included; wrapped (DistributedDataParallel, torch.compile,
            AveragedModel, ...) or not, sharded over processes or not, see docs/places.md. Names are those
            of the network inside the wrappers.
        weights: The GHN: a bundled name, a file or directory, "hf://org/repo", or a loaded one. What is
            named runs on the CPU, so that every device gets the same bits; a loaded GHN runs where it is.
        example_input: What the network is called with, see `trace`; found by itself where it can be.
        head: "auto" predicts the classifier if its width is the one that the GHN was trained for and
            keeps it otherwise; "predict" and "keep" force it.
        include: Predict only the parameters whose qualified names match (`fnmatch` patterns).
        exclude: Keep the parameters whose qualified names match. Of tied names one is enough.
        diversify: "noise" or "orthogonal" make the repeated channels of tiled weights differ, see
            `ghn_init._writing.diversify`; for weights of two or more dimensions.
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
    network = unwrapped(model)
    reshard(network)
    with plain_torch():
        graph = trace(network, example_input)
        ghn = ghn_of(weights)
        entries, tiles = _predictions(network, graph, ghn, options)
    if options.strict:
        forbid_kept(type(network).__name__, entries)
    rows = tuple(_row(entry, tiles.get(entry.source)) for entry in entries)
    far = unfamiliar(graph, entries, ghn.config.num_classes)
    warn(type(network).__name__, far)
    return Plan(model, graph, rows, _label(weights), options, far, tiles)


def _label(weights: str | PathLike[str] | GHN) -> str:
    return type(weights).__name__ if isinstance(weights, nn.Module) else str(weights)


def _predictions(
    network: nn.Module, graph: Graph, ghn: GHN, options: Options
) -> tuple[list[Entry], dict[str, Tile]]:
    """What is to happen to every parameter, and predicted values by the name of what they are for."""
    entries = select(network, graph, options, ghn.config.num_classes)
    return _solvable(network, entries, predicted_tiles(ghn, graph, entries), options)


def _solvable(
    network: nn.Module, entries: list[Entry], tiles: dict[str, Tile], options: Options
) -> tuple[list[Entry], dict[str, Tile]]:
    """The same without computed weights that cannot be made what was predicted."""
    if not any(entry.through for entry in entries):
        return entries, tiles
    refused: dict[str, str] = {}
    for target in targets_of(network, tiles):
        if target.computed is not None:
            try:
                target.values(options)
            except PredictError as error:
                refused[target.name] = str(error).removeprefix(f"{target.name}: ")
    entries = [
        replace(entry, wanted=KEEP, reason=refused[entry.source]) if entry.source in refused else entry
        for entry in entries
    ]
    return entries, {name: tile for name, tile in tiles.items() if name not in refused}


def _row(entry: Entry, tile: Tile | None) -> Row:
    action: Action = "kept" if tile is None else "tiled" if tile.tiled else "predicted"
    through = None if entry.through is None else entry.through.name
    return Row(entry.name, tuple(entry.param.shape), entry.node, action, entry.reason, entry.also, through)


def _cells(row: Row) -> tuple[str, ...]:
    tied = f"tied to {', '.join(row.also)}" if row.also else ""
    through = f"through {row.through}" if row.through and row.action != KEEP else ""
    note = ", ".join(filter(None, (row.reason, through, tied)))
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
