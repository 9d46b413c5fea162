"""Any network: an error of ours and the model as it was, or finite weights and the same bits twice.

More examples: `pytest tests/test_random_models.py --hypothesis-profile=nightly`.
"""

from __future__ import annotations

import copy
import random
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st

from ghn_init import GHN, GHNConfig, GHNInitError, plan, predict, record
from ghn_init._hypernetwork.batch import GraphBatch
from ghn_init._hypernetwork.decoder import ConvDecoder
from ghn_init._tracing import recorder, trace
from ghn_init._tracing.sketch import Sketch
from ghn_init._writing import in_place, predictions
from ghn_init._writing import plan as planning
from random_models import INPUTS, RandomModel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

kinds = st.sampled_from(sorted(INPUTS))
numbers = st.lists(st.integers(0, 5_000), max_size=9)
choices = st.fixed_dictionaries(
    {
        "head": st.sampled_from(("auto", "predict")),
        "diversify": st.sampled_from((None, "noise", "orthogonal")),
        "seed": st.integers(0, 3),
    }
)


def _ghn() -> GHN:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(1)
        return GHN(GHNConfig.ghn2(max_shape=(16, 16, 3, 3), hid=8)).requires_grad_(False)


SMALL = _ghn()


def snapshot(model: RandomModel) -> dict[str, Any]:
    """Everything that must be as it was: bits, objects, modes, hooks, attributes, random states."""
    return {
        "bits": {name: value.detach().clone() for name, value in model.state_dict().items()},
        "objects": {name: id(value) for name, value in model.state_dict(keep_vars=True).items()},
        "gradients": [(param.requires_grad, param.grad) for param in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "attributes": (model.calls, model.last, [sorted(vars(module)) for module in model.modules()]),
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),  # noqa: NPY002
    }


def assert_same(model: RandomModel, before: dict[str, Any], but: set[str] | None = None) -> None:
    """The model is as it was, `but` for these tensors."""
    after = snapshot(model)
    for name, value in before.pop("bits").items():
        if name not in (but or set()):
            torch.testing.assert_close(after["bits"][name], value, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(after.pop("torch"), before.pop("torch"))
    after.pop("bits")
    assert after == before


@given(kind=kinds, numbers=numbers, options=choices)
def test_predicting_any_network_succeeds_or_leaves_it_as_it_was(
    kind: str, numbers: list[int], options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    model = RandomModel(kind, numbers)
    before = snapshot(model)
    options["example_input"] = (model.example(),)
    try:
        planned = plan(model, SMALL, **options)
        assert_same(model, dict(before))
        planned.apply()
    except GHNInitError as error:
        event(f"refused: {type(error).__name__}")
        assert_same(model, before)
        return
    event("predicted")
    # What a parametrisation computes with follows the weight: its buffers change with it.
    computed = {name for name in before["bits"] if ".parametrizations." in name}
    written = {name for row in planned.rows if row.action != "kept" for name in (row.name, *row.also)}
    assert_same(model, before, but=written | computed | set(planned.statistics))
    assert all(value.isfinite().all() for value in model.state_dict().values())
    first = {name: value.clone() for name, value in model.state_dict().items()}
    predict(model, SMALL, **options)
    torch.testing.assert_close(dict(model.state_dict()), first, rtol=0, atol=0)


@given(kind=kinds, numbers=numbers)
def test_what_is_recorded_gives_what_the_network_gives(kind: str, numbers: list[int]) -> None:
    torch.manual_seed(0)
    model = RandomModel(kind, numbers).eval()
    # The one draws a number of Python's, which a graph holds; the other's graph ends where it refuses.
    hypothesis.assume(not {"stateful", "refusal"}.intersection(model.steps))
    x = torch.randint_like(model.example(), 9) if kind == "tokens" else torch.randn_like(model.example())
    try:
        recorded = record(model, x)
    except GHNInitError as error:
        event(f"refused: {type(error).__name__}")
        return
    with torch.no_grad():
        torch.testing.assert_close(recorded(x), model(x), equal_nan=True)


@given(kind=kinds, numbers=numbers)
def test_inputs_that_do_not_fit_are_refused_and_change_nothing(kind: str, numbers: list[int]) -> None:
    model = RandomModel(kind, numbers)
    before = snapshot(model)
    for example in (None, (2, 5), torch.zeros(1, 1, 1), {"x": torch.zeros(3)}, (torch.zeros(2), 3), "text"):
        try:
            plan(model, SMALL, example_input=example)
        except GHNInitError as error:
            event(type(error).__name__)
        assert_same(model, dict(before))


PLACES: tuple[tuple[Any, Any], ...] = (
    (planning, planning.traced), (planning, planning.select), (planning, planning.with_predictions),
    (planning, planning.without_unsolvable), (planning, planning.check_unchanged),
    (in_place, in_place._prepared), (predictions, predictions._faults), (trace, trace.recorded),
    (Sketch, Sketch.graph), (GraphBatch, GraphBatch.from_graphs), (ConvDecoder, ConvDecoder.features),
)  # fmt: skip
"""Where a failure is injected: functions of modules and classes that are passed before the first write."""


@given(
    kind=kinds,
    numbers=numbers,
    place=st.sampled_from(PLACES),
    error=st.sampled_from((RuntimeError, MemoryError, KeyboardInterrupt, GHNInitError)),
    calls=st.integers(0, 5),
)
@hypothesis.example(kind="image", numbers=[0], place=(Sketch, Sketch.graph), error=RuntimeError, calls=0)
def test_an_injected_failure_leaves_the_model_as_it_was(
    kind: str, numbers: list[int], place: tuple[Any, Any], error: type[BaseException], calls: int
) -> None:
    model = RandomModel(kind, numbers)
    before = snapshot(model)
    with failing(place, error, calls) as failed:
        try:
            predict(model, SMALL, example_input=(model.example(),), head="predict")
        except (GHNInitError, error):
            event("failed as injected" if failed() else "refused")
        else:
            assert not failed(), "the failure was swallowed"
            return
    assert_same(model, before)


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place[1].__qualname__)
def test_every_place_of_a_failure_is_on_the_way(place: tuple[Any, Any]) -> None:
    """Or the test above would inject nothing there, and pass."""
    model = RandomModel("image", [0])
    with failing(place, RuntimeError, 0) as failed, pytest.raises((RuntimeError, GHNInitError)):
        predict(model, SMALL, example_input=(model.example(),), head="predict")
    assert failed()


@given(
    kind=kinds,
    numbers=numbers,
    error=st.sampled_from((RuntimeError, KeyboardInterrupt)),
    calls=st.integers(0, 5),
)
@hypothesis.example(kind="tokens", numbers=[0], error=RuntimeError, calls=0)
def test_a_failure_inside_the_forward_pass_leaves_the_model_as_it_was(
    kind: str, numbers: list[int], error: type[BaseException], calls: int
) -> None:
    """It may be the network's own error, so another mode is tried; an interrupt ends all."""
    model = RandomModel(kind, numbers)
    before = snapshot(model)
    with failing((recorder, recorder.Call), error, calls) as failed:
        try:
            plan(model, SMALL, example_input=(model.example(),), head="predict")
        except (GHNInitError, error):
            event("failed as injected" if failed() else "refused")
        else:
            event("tried again" if failed() else "planned")
            assert not (failed() and error is KeyboardInterrupt), "the interrupt was swallowed"
    assert_same(model, before)


@contextmanager
def failing(place: tuple[Any, Any], error: type[BaseException], calls: int) -> Iterator[Callable[[], bool]]:
    """`place` raises after so many calls; yields a function that says whether it did."""
    (owner, real), count = place, 0

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == calls + 1:
            raise error("injected")
        return real(*args, **kwargs)

    with mock.patch.object(owner, real.__name__, wrapper):
        yield lambda: count > calls


def test_random_models_are_of_every_sort() -> None:
    """The generator makes what it is for: most networks can be predicted, some cannot be traced."""
    rng = random.Random(0)
    outcomes = {"predicted": 0, "refused": 0}
    steps: set[str] = set()
    for _ in range(60):
        model = RandomModel(rng.choice(sorted(INPUTS)), [rng.randrange(5000) for _ in range(5)])
        steps |= set(model.steps)
        twin = copy.deepcopy(model)
        try:
            plan(twin, SMALL, example_input=(model.example(),), head="predict")
            outcomes["predicted"] += 1
        except GHNInitError:
            outcomes["refused"] += 1
    assert outcomes["predicted"] > 20
    assert outcomes["refused"] > 5
    assert len(steps) > 20


@pytest.mark.parametrize("kind", sorted(INPUTS))
def test_every_step_of_the_generator_runs(kind: str) -> None:
    for number in range(60):
        model = RandomModel(kind, [number])
        assert len(model.steps) == 1
