"""`trace`: any `nn.Module` -> `Graph`, with real shapes, no data and no computation."""

from __future__ import annotations

import operator
import random
import re
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Final, Literal

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from ghn_init._errors import GHNInitError, TraceError
from ghn_init._graph.graph import Graph
from ghn_init._network.parametrised import computed_weights, watched
from ghn_init._network.wrappers import bare, unwrapped
from ghn_init._threads import alone
from ghn_init._tracing.inputs import ExampleInput, candidate_inputs, given_input
from ghn_init._tracing.record import Recorder, UnknownValueError
from ghn_init._tracing.rules import RULES
from ghn_init._tracing.rules.registered import registered_layers

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from types import TracebackType

    from ghn_init._network.parametrised import Computed

Mode = Literal["as it is", "evaluating"]

Record = Callable[[ExampleInput, Mode], Graph]
"""Records one forward pass."""


def trace(model: nn.Module, example_input: object = None) -> Graph:
    """The computational graph of `model` (arXiv 2110.13100, section 3).

    The forward pass is followed once on meta tensors: real shapes and control flow, no data, no
    computation. Parameters, buffers, train/eval mode, attributes and random state are left as they
    are. The model may be on any device, meta included. Of a wrapped network (see `_wrappers`) the
    graph is that of the network inside.

    Args:
        model: The network.
        example_input: What `model` is called with: a tensor (only its shape and dtype count), a shape, a
            tuple of positional arguments or a dict of keyword arguments. By default it is found from
            the model's own attributes (timm's `default_cfg`, `image_size`, ...) or from its first
            layer's input channels and usual image sizes.

    Returns:
        The graph; parameters that no node stands for are in `Graph.unmatched`.

    Raises:
        TraceError: `model` is not a module, has lazy parameters, or fails on every input tried; the
            message names the module in which it failed.
    """
    return traced(model, example_input).graph


@dataclass(frozen=True)
class Traced:
    """What `trace` found: the graph, and how.

    Attributes:
        graph: The graph.
        example: What the network was called with.
        mode: Whether the network was traced as if it were evaluating.
    """

    graph: Graph
    example: ExampleInput
    mode: Mode


def traced(model: nn.Module, example_input: object = None) -> Traced:
    """See `trace`."""
    _check(model)
    model = unwrapped(model)
    given = None if example_input is None else given_input(example_input)
    candidates = list(candidate_inputs(model)) if given is None else [given]
    failures: list[tuple[ExampleInput, TraceError]] = []
    with _recordings(model) as record:
        for mode, candidate in product(_modes(model), candidates):
            try:
                return _with_every_layer(model, Traced(record(candidate, mode), candidate, mode), record)
            except TraceError as error:  # noqa: PERF203
                failures.append((candidate, error))
    if given is not None:
        raise failures[0][1]
    raise _no_input_fits(model, failures[: len(candidates)])


def _with_every_layer(model: nn.Module, found: Traced, record: Record) -> Traced:
    """`found`, or the evaluating model's if that uses more parameters: layer drop skips some in training."""
    unused = _unused(found.graph)
    if not unused or len(_modes(model)) == 1:
        return found
    try:
        evaluating = record(found.example, "evaluating")
    except TraceError:  # it runs in training only
        return found
    return Traced(evaluating, found.example, "evaluating") if _unused(evaluating) < unused else found


def _unused(graph: Graph) -> int:
    return sum(param.role == "unused" for param in graph.unmatched)


def _modes(model: nn.Module) -> tuple[Mode, ...]:
    """As the model is; and evaluating if it is training, as detectors then want the boxes to learn."""
    return ("as it is", "evaluating") if any(module.training for module in model.modules()) else ("as it is",)


def _check(model: object) -> None:
    if not isinstance(model, nn.Module):
        kind = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise TraceError(f"expected an nn.Module instance, found {kind}; pass a constructed model")
    lazy = [name for name, p in model.named_parameters() if isinstance(p, UninitializedParameter)]
    if lazy:
        raise TraceError(
            f"{type(model).__name__}: {len(lazy)} lazy parameters have no shape yet ({', '.join(lazy[:3])}); "
            "run the model once on a batch (a dry run initialises them), then predict"
        )


def _no_input_fits(model: nn.Module, failures: list[tuple[ExampleInput, TraceError]]) -> TraceError:
    tried = ", ".join(candidate.described for candidate, _ in failures)
    first = f" With {failures[0][0].described}: {failures[0][1]}" if failures else ""
    return TraceError(
        f"{type(model).__name__}: found no example input that it takes (tried {tried or 'none'}). "
        f"Pass example_input=, a shape such as (1, 3, 224, 224) or the arguments of its call.{first}"
    )


@contextmanager
def _recordings(model: nn.Module) -> Iterator[Record]:
    """A function that records a forward pass and puts the model back as it was, for several attempts."""
    computed = computed_weights(model)
    params = _parameters(model, computed)
    with alone(), bare(model), registered_layers(model), torch.no_grad():
        put_back = _snapshot(model)

        def record(example: ExampleInput, mode: Mode) -> Graph:
            recorder = Recorder(params, RULES)
            try:
                with watched(computed, recorder.add_parameter):
                    return _recorded(model, recorder, example, mode)
            finally:
                put_back()

        yield record


def _recorded(model: nn.Module, recorder: Recorder, example: ExampleInput, mode: Mode) -> Graph:
    """Run the model's forward under a recorder.

    It may end where it reads a value, if every parameter was used by then: what would follow sorts out and
    formats results, as detectors do, and the graph ends with the nodes that nothing follows.

    Raises:
        TraceError: The forward pass failed; from the original error.
    """
    name = type(model).__name__
    recorder.add_input((example.args, dict(example.kwargs)))
    if mode == "evaluating":
        _evaluating(model)
    try:
        with recorder:
            output = model(*example.args, **example.kwargs)
    except GHNInitError:
        raise
    # The user's forward may raise anything; it is raised again with the place and the remedy.
    except Exception as error:
        if not (isinstance(error, UnknownValueError) and recorder.all_used()):
            place = _failing_module(model, error.__traceback__)
            raise TraceError(
                f"{name}: the forward pass failed{place} on an input of shape "
                f"{example.described}: {type(error).__name__}: {_first_line(error)}{_remedy(error)}"
            ) from error
        ends = recorder.ends()
    else:
        ends = recorder.sources_of(output)
    return recorder.graph(ends, name)


def _evaluating(model: nn.Module) -> None:
    """Like `model.eval()`, which a model may override; `_untouched` puts the modes back."""
    for module in model.modules():
        module.training = False


def _parameters(model: nn.Module, computed: Mapping[str, Computed]) -> dict[str, nn.Parameter]:
    """The parameters by name, ties once, without those from which weights are computed."""
    if not computed:
        return dict(model.named_parameters())
    parts = {part for weight in computed.values() for part in weight.parts}
    every = list(model.named_parameters(remove_duplicate=False))
    first = {id(param): (name, param) for name, param in reversed(every) if name not in parts}
    return dict(reversed(first.values()))


_NEEDS_MEMORY: Final = re.compile(r"(?i)\bmeta\b|memory|storage|data_ptr|numpy|not implemented")
"""What kernels say that cannot run on tensors without values."""


def _remedy(error: Exception) -> str:
    """What to do about a layer that cannot run on meta tensors; '' if nothing points to one."""
    if not (isinstance(error, NotImplementedError) or _NEEDS_MEMORY.search(str(error))):
        return ""
    return " (for a layer that cannot run on meta tensors, add a rule with ghn_init.register)"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or "no message").splitlines()[0]


def _failing_module(model: nn.Module, traceback: TracebackType | None) -> str:
    """'' or ' in path (Class)': the innermost module of the model on the traceback."""
    names = {id(module): name for name, module in model.named_modules()}
    place = ""
    while traceback is not None:
        module = traceback.tb_frame.f_locals.get("self")
        name = names.get(id(module))
        if name:
            place = f" in {name} ({type(module).__name__})"
        traceback = traceback.tb_next
    return place


_CONTAINERS: Final = tuple(name for name, value in vars(nn.Module()).items() if isinstance(value, dict))
"""What every module keeps in dictionaries: parameters, buffers, modules and hooks of several kinds."""


def _snapshot(model: nn.Module) -> Callable[[], None]:
    """A function that puts back whatever a forward pass changes on the model's modules and in random states.

    In-place changes cannot reach the model's tensors, because the recorder hands out stand-ins;
    what can be changed is attributes (caches, counters), buffers that are assigned, hooks, random states.
    """
    states = [vars(module) for module in model.modules()]
    # Most of the dictionaries are empty, and there are a dozen for every module: one copy does for all of
    # them, because thousands of new objects would have Python's garbage collector look through every object.
    empty: dict[str, object] = {}
    before = [
        (state, state.copy(), [state[c].copy() if state[c] else empty for c in _CONTAINERS])
        for state in states
    ]
    put_back_random_states = _random_states()

    def put_back() -> None:
        put_back_random_states()
        for state, attributes, containers in before:
            if _differs(state, attributes):
                state.clear()
                state.update(attributes)
            for container, content in zip(_CONTAINERS, containers, strict=True):
                if (state[container] or content) and _differs(state[container], content):
                    state[container].clear()
                    state[container].update(content)

    return put_back


def _differs(now: dict[str, object], before: dict[str, object]) -> bool:
    """Whether a key is new, gone, in another place or holds another object."""
    return list(now) != list(before) or not all(map(operator.is_, now.values(), before.values()))


def _random_states() -> Callable[[], None]:
    """A function that restores Python's, numpy's and torch's random states: layer drop and the like draw."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.random.get_rng_state()  # noqa: NPY002
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def restore() -> None:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.random.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)

    return restore
