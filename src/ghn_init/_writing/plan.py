"""`plan`, everything that `predict` will do to a model, computed and checked before the first write.

`predict`, the one-line replacement for random initialisation, and `predict_to`, which writes to disk, make a
plan and write it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from torch import Tensor, nn

from ghn_init._errors import PredictError, listing
from ghn_init._graph.structure import has_batch_norms
from ghn_init._meta.materialise import materialised
from ghn_init._network.parametrised import computed_weights
from ghn_init._network.sharded import reshard
from ghn_init._network.wrappers import unwrapped
from ghn_init._threads import uninterrupted
from ghn_init._tracing.trace import traced
from ghn_init._weights import DEFAULT_WEIGHTS
from ghn_init._writing.calm import calmed
from ghn_init._writing.entry import ACTIONS, to_write
from ghn_init._writing.familiarity import described, unfamiliar, warn
from ghn_init._writing.features import shortened
from ghn_init._writing.in_place import check_unchanged, write, write_buffers
from ghn_init._writing.known import as_learned, is_of_the_kind
from ghn_init._writing.options import Options, as_patterns
from ghn_init._writing.predictions import ghn_of, plain_torch, with_predictions
from ghn_init._writing.select import check_model, forbid_kept, select
from ghn_init._writing.spectral import as_used, divided
from ghn_init._writing.statistics import followed
from ghn_init._writing.table import summary_of, table_of
from ghn_init._writing.to_disk import save
from ghn_init._writing.training import ready_to_train, worth_predicting
from ghn_init._writing.values import values_of, without_unsolvable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from os import PathLike
    from pathlib import Path

    from ghn_init._graph.graph import Graph
    from ghn_init._weights.ghn import GHN
    from ghn_init._writing.entry import Action, Entry
    from ghn_init._writing.familiarity import Remark
    from ghn_init._writing.options import Diversify, Frozen, Head, Scale
    from ghn_init._writing.spectral import Divided
    from ghn_init._writing.statistics import Followed

ModelT = TypeVar("ModelT", bound=nn.Module)


@dataclass(frozen=True, eq=False)
class Plan(Generic[ModelT]):
    """Predicted weights for a model, not yet written. Made by `plan`; `str(plan)` is a table.

    Attributes:
        model: The module that `apply` writes to.
        graph: Its graph.
        rows: What happens to every parameter, in the order of `model.named_parameters()`.
        weights: The GHN's weights as the caller named them.
        options: The caller's choices.
        remarks: In which ways the network is unlike those that GHNs are trained on (docs/familiarity.md).
        statistics: Buffers that belong to the predicted weights, by name: running means and variances of
            batch norms, and vectors of `torch.nn.utils.spectral_norm`.
    """

    model: ModelT
    graph: Graph
    rows: tuple[Entry, ...]
    weights: str
    options: Options
    remarks: tuple[Remark, ...]
    statistics: Mapping[str, Tensor] = field(repr=False)

    def apply(self) -> ModelT:
        """Write the predicted values into the model's parameters, in place, and return the model.

        dtype, device, requires_grad, identity and ties of the parameters stay, so an optimizer that holds
        them needs no change; tied ones are written once. A model on the meta device is created on the
        CPU: its parameters are then new objects, and kept parameters and buffers get the values that
        `ghn_init._meta.initialise` describes. Applying again writes the same bits. Ctrl-C waits until
        everything is written; pressed twice it does not, and part of the parameters are written.

        Where `scale="auto"` keeps everything, because predictions would do such a network no good, that was
        warned of, and only what is on the meta device gets values.

        Raises:
            PredictError: Nothing to write, by the caller's choices; the model changed since it was
                planned; or a meta model with tensors that nobody gives a value. The model is then as it
                was. A write that the device itself refuses raises too, and says how many parameters were
                written.
        """
        entries, network = to_write(self.rows), self._network()
        if not entries and not any(remark.nothing for remark in self.remarks):
            reasons = listing(list(dict.fromkeys(row.reason for row in self.rows)))
            raise PredictError(
                f"{type(self.model).__name__}: nothing to write, all {len(self.rows)} parameters are kept "
                f"({reasons}); expected one to predict: choose others by include, exclude, head or frozen"
            )
        names = [name for entry in entries for name in entry.written]
        with plain_torch(), uninterrupted(), materialised(network, names, self.options.seed):
            write(network, entries, self.options)
            write_buffers(network, self.statistics)
        return self.model

    def save(self, folder: str | PathLike[str], *, max_shard_size: int | str = "5GB") -> Path:
        """Write the whole model's checkpoint with the predicted values to disk, tensor by tensor.

        See `ghn_init.predict_to`. The model is left as it is: one on the meta device stays there.
        """
        entries, network = to_write(self.rows), self._network()
        with plain_torch():
            return save(network, entries, self.options, folder, max_shard_size, self.statistics)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Names and values of the tensors that are written, one full tensor at a time, on the CPU.

        In the parameters' dtypes. A weight that is computed from other parameters gives those.
        """
        self._network()
        for entry in to_write(self.rows):
            with plain_torch():
                values = values_of(entry, self.options)
            yield from ((name, value.cpu()) for name, value in values.items())
        yield from self.statistics.items()

    @property
    def unfamiliar(self) -> tuple[str, ...]:
        """In which ways the network is unlike those that GHNs are trained on, in words."""
        return tuple(remark.text for remark in self.remarks)

    @property
    def warned(self) -> tuple[str, ...]:
        """Those of `unfamiliar` that `plan` warned about."""
        return tuple(r.text for r in self.remarks if r.trained or not self.options.own_scale)

    def counts(self) -> dict[Action, tuple[int, int]]:
        """Number of parameters and of elements for every action."""
        parameters = Counter(row.action for row in self.rows)
        elements: Counter[Action] = Counter()
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
                "rms": row.rms if row.action != "kept" else None,
                "factor": row.factor if row.action != "kept" else None,
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
            "scale": self.options.scale if self.options.own_scale else "predicted",
            "frozen": self.options.frozen,
            "diversify": self.options.diversify,
            "seed": self.options.seed,
            "unfamiliar": list(self.unfamiliar),
            "statistics": list(self.statistics),
            "summary": summary,
            "rows": rows,
        }

    def __str__(self) -> str:
        name = type(self.model).__name__
        table = table_of(self.rows, own_scale=self.options.own_scale)
        text = f"{name}, weights {self.weights}\n{table}\n\n{summary_of(self.rows, self.counts())}"
        if self.statistics:
            norms = sum(name.endswith("running_mean") for name in self.statistics)
            text += f"\nrunning statistics of {norms} batch norms: from the weights" if norms else ""
        return f"{text}\n{described(name, self.unfamiliar)}" if self.unfamiliar else text

    def __repr__(self) -> str:
        counted = ", ".join(f"{action}={count}" for action, (count, _) in self.counts().items())
        return f"<Plan of {type(self.model).__name__}: {counted}>"

    def _network(self) -> nn.Module:
        """The network inside the model's wrappers, its shards in place, as it was planned."""
        network = unwrapped(self.model)
        reshard(network)
        check_unchanged(network, self.rows, self.statistics)
        return network


def plan(
    model: ModelT,
    weights: str | PathLike[str] | GHN = DEFAULT_WEIGHTS,
    *,
    example_input: object = None,
    head: Head = "auto",
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    diversify: Diversify | None = None,
    seed: int = 0,
    strict: bool = False,
    scale: Scale = "auto",
    frozen: Frozen = "keep",
) -> Plan[ModelT]:
    """Compute and check everything that `predict` with the same arguments would write.

    The model is not changed: neither weights nor buffers, modes, hooks or random state (what another thread
    draws from the global generators meanwhile may come again). Warns (`OutOfDistributionWarning`) if all
    but the classifier is frozen, if nothing is predicted because the network would train no better for it,
    and with `scale="predicted"` if the network is unlike those trained on.

    The GHN is shown the network as DeepNets-1M, its training set, would have it: biases before batch norms,
    which do nothing, are left out and predicted as zeros, images have three channels, the classifier reads
    what is pooled, and group norms may count as batch norms (docs/familiarity.md lists all of it).
    `load(weights)(trace(model))` is without this.

    Args:
        model: The network, on any device, meta included, wrapped or sharded or not: see docs/places.md.
            Names are those of the network inside the wrappers.
        weights: The GHN: a bundled name, a file or directory, "hf://org/repo", or a loaded one. What is
            named runs on the CPU, whatever the model's device; a loaded GHN runs where it is.
        example_input: What the network is called with, see `trace`; found by itself where it can be.
        head: "auto" predicts a classifier of the width that the GHN was trained for and keeps any other;
            "predict" and "keep" force it.
        include: Only the parameters whose qualified names match (`fnmatch` patterns) are predicted.
        exclude: The parameters whose qualified names match are kept. Of tied names one is enough.
        diversify: "noise" or "orthogonal" make the repeated channels of tiled weights differ. With
            "orthogonal", `scale="auto"` takes every network for one that the GHN does not know.
        seed: Seed of `diversify`, and of what a meta model's modules initialise themselves.
        strict: No parameter may be kept because it cannot be predicted.
        scale: "own": weights get the scale that the layer had, and norm layers and values that are all one
            number (zeros above all) stay. "predicted", to use the network untrained: everything as
            predicted. "auto", to train it: as "own", with two exceptions that the graph tells. In networks
            of the kind that the GHN knows norms are predicted, also such as begin at zero, and weights at
            predicted scale, later ones at most at their own, and features no longer than a classifier can
            learn from (`features.py`); and layers are kept that predictions harm (`training.py`). With
            `head="predict"` it is "predicted".
        frozen: "keep" leaves parameters without `requires_grad` alone; "predict" does not mind.

    Returns:
        The plan: print it, or `apply` it.

    Raises:
        PredictError: An argument that is none of its choices, a pattern without a match, a model without
            parameters or with lazy ones, a prediction that is not finite, `strict` violated.
        TraceError: The network could not be traced.
        CheckpointError: The weights could not be loaded.
    """
    options = Options(
        head, as_patterns("include", include), as_patterns("exclude", exclude), diversify, seed, strict,
        scale, frozen,
    )  # fmt: skip
    planned = _planned(model, weights, example_input, options)
    warn(type(unwrapped(model)).__name__, planned.warned)
    return planned


def _planned(
    model: ModelT, weights: str | PathLike[str] | GHN, example_input: object, options: Options
) -> Plan[ModelT]:
    """The plan for these choices."""
    check_model(model)
    network = unwrapped(model)
    reshard(network)
    with plain_torch():
        computed = computed_weights(network)
        graph = traced(network, example_input, computed=computed).graph
        ghn = ghn_of(weights)
        entries = select(network, graph, computed, options, ghn.config.num_classes)
        learned = as_learned(graph)
        if options.own_scale:
            entries = worth_predicting(network, learned, entries, options)
        separable = not options.own_scale or is_of_the_kind(learned)
        entries = with_predictions(ghn, learned, entries, separable=separable)
        if options.own_scale:
            entries = ready_to_train(learned, entries, options)
        entries = without_unsolvable(entries, options)
        norms = divided(entries, options)
        statistics: dict[str, Tensor] = {}
        if options.own_scale and options.diversify != "orthogonal":  # else the blocks are not what is written
            told = _followed(network, learned, entries, norms, options)
            if options.scale == "auto":
                entries, as_before = shortened(learned, entries, told)
                told = as_before or _followed(network, learned, entries, norms, options)
                entries = calmed(learned, entries, told)
            statistics = dict(told.statistics)
        statistics |= {name: vector for norm in norms.values() for name, vector in norm.vectors.items()}
    if options.strict:
        forbid_kept(type(network).__name__, entries)
    far = unfamiliar(graph, entries, ghn.config.num_classes, options)
    label = type(weights).__name__ if isinstance(weights, nn.Module) else str(weights)
    return Plan(model, graph, tuple(entries), label, options, far, statistics)


def _followed(
    network: nn.Module, graph: Graph, entries: Sequence[Entry], norms: Mapping[str, Divided], options: Options
) -> Followed:
    """What activations say of what is written."""
    normalised = has_batch_norms(graph)
    return followed(network, graph, as_used(entries, norms, options) if normalised else entries)


def predict(
    model: ModelT,
    weights: str | PathLike[str] | GHN = DEFAULT_WEIGHTS,
    *,
    example_input: object = None,
    head: Head = "auto",
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    diversify: Diversify | None = None,
    seed: int = 0,
    strict: bool = False,
    scale: Scale = "auto",
    frozen: Frozen = "keep",
) -> ModelT:
    """Replace the parameters of `model`, in place, by those that a graph hypernetwork predicts.

    The same as `plan(...).apply()`; see `plan` for the arguments and `Plan.apply` for what is written. A
    failure leaves the model as it was, and so does Ctrl-C until writing begins, which it lets finish.

    The same model, weights and seed give the same bits again in the same process, whether the weights are
    named or loaded. On another machine, with another number of threads or another torch the last bits may
    differ: docs/design.md has by how much.

    Random numbers are drawn from torch's global generator while it is seeded, and it is put back at the end:
    what another thread draws meanwhile may come again.

    With `scale="predicted"` running statistics of batch norms are not set: call `calibrate_batchnorm`.

    Returns:
        The same module.

    Raises:
        PredictError: See `plan` and `Plan.apply`.
        TraceError: The network could not be traced.
        CheckpointError: The weights could not be loaded.
    """
    return plan(
        model, weights, example_input=example_input, head=head, include=include, exclude=exclude,
        diversify=diversify, seed=seed, strict=strict, scale=scale, frozen=frozen,
    ).apply()  # fmt: skip


def predict_to(
    model: nn.Module,
    out_dir: str | PathLike[str],
    weights: str | PathLike[str] | GHN = DEFAULT_WEIGHTS,
    *,
    max_shard_size: int | str = "5GB",
    example_input: object = None,
    head: Head = "auto",
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    diversify: Diversify | None = None,
    seed: int = 0,
    strict: bool = False,
    scale: Scale = "auto",
    frozen: Frozen = "keep",
) -> Path:
    """Write a sharded safetensors checkpoint of `model` with predicted parameters, tensor by tensor.

    The same as `plan(...).save(out_dir)`. With a model on the meta device this takes memory for its largest
    tensor, not for the model, so a network that does not fit into memory can be initialised. The values
    are those that `predict` with the same arguments gives; what is not predicted is initialised, or
    copied where the model is not on the meta device. The model is left as it is.

    `out_dir` is a folder that does not exist or is empty. It appears when it is complete; after a failure
    there is none. A file has at most `max_shard_size` bytes, or text such as "5GB"; a larger tensor gets a
    file of its own. For the other arguments see `plan`.

    Returns:
        What to open: `out_dir/model.safetensors`, or `out_dir/model.safetensors.index.json` beside several
        files. `huggingface_hub.load_torch_model(model, out_dir)` loads both, and transformers'
        `from_pretrained(out_dir)`, for whose models the folder gets a `config.json`. Tied tensors are
        stored once: load them with `strict=False`.

    Raises:
        PredictError: See `plan`; or `out_dir` is not empty or cannot be written, the state dict holds more
            than tensors, the model is sharded over processes, or a tensor of a meta model that is not
            predicted cannot be initialised.
        TraceError: The network could not be traced.
        CheckpointError: The weights could not be loaded.
    """
    return plan(
        model, weights, example_input=example_input, head=head, include=include, exclude=exclude,
        diversify=diversify, seed=seed, strict=strict, scale=scale, frozen=frozen,
    ).save(out_dir, max_shard_size=max_shard_size)  # fmt: skip
