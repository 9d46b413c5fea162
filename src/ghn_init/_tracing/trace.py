"""`trace`: any `nn.Module` -> `Graph`, with real shapes, no data and no computation."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Literal

import torch
from torch import fx, nn
from torch.nn.parameter import UninitializedParameter

from ghn_init._errors import TraceError, listing
from ghn_init._graph.graph import UNUSED
from ghn_init._network.parametrised import computed_weights
from ghn_init._network.walk import modules_of, params_of
from ghn_init._network.wrappers import bare, unwrapped
from ghn_init._threads import alone, uncollected
from ghn_init._tracing.foreign import inputs_of, is_complete, recording_of
from ghn_init._tracing.inputs import ExampleInput, candidate_inputs, given_input
from ghn_init._tracing.recorded import UnfollowableError, recorded, recorders
from ghn_init._tracing.rules.registered import registered_layers  # and with it all rules, into RULES
from ghn_init._tracing.sketch import Sketch
from ghn_init._tracing.untouched import draw_alike, snapshot

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ghn_init._graph.graph import Graph
    from ghn_init._network.parametrised import Computed
    from ghn_init._tracing.recorder import Recording

Mode = Literal["as it is", "evaluating"]

Record = Callable[[ExampleInput, Mode], "Traced"]
"""Records one forward pass, and draws its graph."""


def trace(model: nn.Module, example_input: object = None) -> Graph:
    """The computational graph of `model` (arXiv 2110.13100, section 3).

    The forward pass is recorded once on meta tensors, as `record` does: real shapes and control flow, no
    data, no computation. Then one pass over the recorded graph says what every function is in a GHN's graph.
    Parameters, buffers, train/eval mode, attributes, containers and random state are left as they
    are. The model may be on any device, meta included. Of a wrapped network (see `_network/wrappers`) the
    graph is that of the network inside.

    Args:
        model: The network. A `torch.fx.GraphModule`, of `torch.fx.symbolic_trace`, of `record` or of an
            exported program's `module()`, is not recorded again: its own graph is read. Where that does not
            say the shapes, or calls modules, they are found node by node.
        example_input: What `model` is called with: a tensor (only its shape and dtype count, and the values
            of integers in one dimension on the CPU, such as lengths), a shape, a
            tuple of positional arguments or a dict of keyword arguments. By default it is found from
            the model's own attributes (timm's `default_cfg`, `image_size`, ...) or from its first
            layer's input channels and usual image sizes.

    Returns:
        The graph; parameters that no node stands for are in `Graph.unmatched`.

    Raises:
        TraceError: `model` is not a module, is a TorchScript module, has lazy parameters, or fails on every
            input tried; the message names the module in which it failed.
    """
    return traced(model, example_input).graph


@dataclass(frozen=True)
class Traced:
    """What `trace` found: the graph, and how.

    Attributes:
        graph: The graph.
        example: What the network was called with.
        mode: Whether the network was traced as if it were evaluating.
        recording: The forward pass that the graph was drawn from, if it is wanted.
    """

    graph: Graph
    example: ExampleInput
    mode: Mode
    recording: Recording | None


def traced(
    model: nn.Module, example_input: object = None,
    *, whole: bool = False, computed: Mapping[str, Computed] | None = None,
) -> Traced:  # fmt: skip
    """See `trace`.

    `whole` if the recording is for users to see (names of buffers, modules of nodes); `computed` are the
    weights that the network computes, where they have been found already.
    """
    _check(model)
    model = unwrapped(model)
    given = None if example_input is None else given_input(example_input)
    if given is None and isinstance(model, fx.GraphModule) and is_complete(model.graph):
        return _read(model)
    candidates = _candidates(model) if given is None else [given]
    failures: list[tuple[ExampleInput, TraceError]] = []
    computed = computed_weights(model) if computed is None else computed
    with _recordings(model, computed, whole=whole) as record:
        for mode, candidate in product(_modes(model), candidates):
            try:
                return _with_every_layer(model, record(candidate, mode), record)
            except TraceError as error:  # noqa: PERF203
                failures.append((candidate, error))
    if given is not None:
        raise failures[0][1]
    raise _no_input_fits(model, failures[: len(candidates)])


def _read(model: fx.GraphModule) -> Traced:
    """A graph of the user's that says everything, as it is."""
    recording = recording_of(model)
    example = inputs_of(model.graph)
    assert example is not None
    return Traced(_drawn(recording, None, type(model).__name__), example, "as it is", recording)


def _candidates(model: nn.Module) -> list[ExampleInput]:
    """Inputs that the network may take; what a graph of the user's says of its inputs comes first."""
    said = inputs_of(model.graph) if isinstance(model, fx.GraphModule) else None
    return [*(() if said is None else (said,)), *candidate_inputs(model)]


def _with_every_layer(model: nn.Module, found: Traced, record: Record) -> Traced:
    """`found`, or the evaluating model's if that uses more parameters: layer drop skips some in training."""
    unused = _unused(found.graph)
    if not unused or len(_modes(model)) == 1:
        return found
    try:
        evaluating = record(found.example, "evaluating")
    except TraceError:  # it runs in training only
        return found
    return evaluating if _unused(evaluating.graph) < unused else found


def _unused(graph: Graph) -> int:
    return sum(param.role == UNUSED for param in graph.unmatched)


def _modes(model: nn.Module) -> tuple[Mode, ...]:
    """As the model is; and evaluating if it is training, as detectors then want the boxes to learn."""
    return ("as it is", "evaluating") if any(module.training for module in model.modules()) else ("as it is",)


def _check(model: object) -> None:
    if not isinstance(model, nn.Module):
        kind = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise TraceError(f"expected an nn.Module instance, found {kind}; pass a constructed model")
    modules = modules_of(model)
    for path, module in modules:
        if isinstance(module, torch.jit.ScriptModule):
            place = f"{path} of {type(model).__name__} is" if path else "the model is"
            raise TraceError(
                f"{place} a TorchScript module ({module.original_name}), whose functions cannot be recorded; "
                "pass the nn.Module that was scripted or traced with torch.jit"
            )
    lazy = [name for name, p in params_of(modules).items() if isinstance(p, UninitializedParameter)]
    if lazy:
        raise TraceError(
            f"{type(model).__name__}: {len(lazy)} lazy parameters have no shape yet ({', '.join(lazy[:3])}); "
            "run the model once on a batch (a dry run initialises them), then predict"
        )


def _no_input_fits(model: nn.Module, failures: list[tuple[ExampleInput, TraceError]]) -> TraceError:
    """What the likeliest input gave, and which others were tried."""
    if failures and isinstance(failures[0][1], UnfollowableError):
        return failures[0][1]
    if failures:
        others = listing([candidate.described for candidate, _ in failures[1:]], 3)
        told = f"{failures[0][1]}{f'; nor does it take {others}' if others else ''}"
    else:
        told = f"{type(model).__name__}: no example input is known for it"
    error = TraceError(
        f"{told}. Pass example_input=, a shape such as (1, 3, 224, 224) or the arguments of its call."
    )
    error.__cause__ = failures[0][1].__cause__ if failures else None
    return error


@contextmanager
def _recordings(model: nn.Module, computed: Mapping[str, Computed], *, whole: bool) -> Iterator[Record]:
    """A function that records a forward pass and puts the model back as it was, for several attempts."""
    recorder = recorders(model, computed, whole=whole)
    with alone(), uncollected(), bare(model), registered_layers(model), torch.no_grad():
        put_back = snapshot(model)

        def record(example: ExampleInput, mode: Mode) -> Traced:
            try:
                draw_alike()
                recording, stopped = recorded(recorder(), model, computed, example, mode)
            finally:
                put_back()
            graph = _drawn(recording, stopped, type(model).__name__)
            # What nobody holds when Python looks for garbage again is gone at once. Thousands of nodes that
            # refer to each other would else be looked through twice more.
            return Traced(graph, example, mode, recording if whole else None)

        yield record


def _drawn(recording: Recording, stopped: TraceError | None, name: str) -> Graph:
    """The graph of a recording; of one that stopped early, if every parameter was used by then."""
    sketch = Sketch(recording.shapes)
    sketch.draw(recording.graph)
    if stopped is not None and not sketch.all_used():
        raise stopped
    return sketch.graph(name)
