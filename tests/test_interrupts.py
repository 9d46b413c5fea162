"""Ctrl-C at any moment: the model is as it was, or wholly written."""

from __future__ import annotations

import copy
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import ghn_init
from ghn_init import GHN, load, predict
from ghn_init._threads import uninterrupted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

MOMENTS = 60
"""At so many moments, spread over all function calls, the signal comes."""


@pytest.fixture(scope="module")
def ghn(ghn_dir: Path) -> GHN:
    return load(ghn_dir)


class Net(nn.Module):
    """A network that uses its second layer while evaluating only, so that it is traced in both modes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)
        self.norm, self.fc = nn.BatchNorm2d(8), nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.first(x)).relu()
        return self.fc((x if self.training else self.second(x)).mean((2, 3)))


@pytest.fixture(autouse=True)
def sigint_is_heard() -> Iterator[None]:
    """Also where the tests are a shell's background job, for which it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def network() -> nn.Module:
    torch.manual_seed(0)
    return Net()


def calls_of(action: Callable[[], object], interrupt_at: int = -1) -> int:
    """Run `action`, with SIGINT at one of its function calls; returns how many there are."""
    count = 0

    def count_call(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal count
        if event == "call":
            count += 1
            if count == interrupt_at:
                signal.raise_signal(signal.SIGINT)

    sys.setprofile(count_call)
    try:
        action()
    finally:
        sys.setprofile(None)
    return count


def same(model: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("options", [{}, {"diversify": "noise"}])
def test_ctrl_c_at_any_moment_leaves_the_model_as_it_was_or_wholly_written(
    ghn: GHN, options: dict[str, Any]
) -> None:
    written = predict(network(), ghn, example_input=(2, 3, 8, 8), **options).state_dict()
    model = network()
    calls = calls_of(lambda: predict(model, ghn, example_input=(2, 3, 8, 8), **options))
    handler, random_state = signal.getsignal(signal.SIGINT), torch.get_rng_state()
    interrupted = 0
    for moment in range(1, calls, calls // MOMENTS):
        model = network()
        before = copy.deepcopy(model.state_dict())
        torch.set_rng_state(random_state)
        try:
            calls_of(lambda model=model: predict(model, ghn, example_input=(2, 3, 8, 8), **options), moment)
        except KeyboardInterrupt:
            interrupted += 1
        assert same(model, before) or same(model, written), moment
        assert all(module.training for module in model.modules()), moment
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        assert torch.equal(torch.get_rng_state(), random_state), moment
        assert torch.is_grad_enabled(), moment
        assert signal.getsignal(signal.SIGINT) is handler
    assert interrupted > MOMENTS / 2  # Python swallows what is raised in a destructor


def test_the_first_signal_waits_and_the_second_does_not() -> None:
    reached: list[str] = []

    def twice() -> None:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            reached.append("after the first")
            signal.raise_signal(signal.SIGINT)
            reached.append("after the second")

    with pytest.raises(KeyboardInterrupt):
        twice()
    assert reached == ["after the first"]


def test_the_signal_waits_for_the_outermost_end() -> None:
    reached: list[str] = []

    def nested() -> None:
        with uninterrupted():
            with uninterrupted():
                signal.raise_signal(signal.SIGINT)
            reached.append("after the inner one")

    with pytest.raises(KeyboardInterrupt):
        nested()
    assert reached == ["after the inner one"]


def test_other_threads_leave_the_handler_alone() -> None:
    handler, seen = signal.getsignal(signal.SIGINT), []

    def work() -> None:
        with uninterrupted():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [handler]


def test_a_signal_without_a_handler_of_pythons_is_left_alone() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with uninterrupted():
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_layers_without_elements_are_kept_and_the_others_predicted(ghn: GHN) -> None:
    class Empty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last, self.empty = nn.Linear(8, 10), nn.Linear(10, 10), nn.Linear(10, 0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x).relu()
            return self.last(torch.cat([x, self.empty(x)], -1))

    rows = {row.name: row for row in ghn_init.plan(Empty(), ghn, example_input=(1, 8), scale="own").rows}
    assert {name for name, row in rows.items() if row.action == "kept"} == {"empty.weight", "empty.bias"}
    assert rows["empty.weight"].reason == "no elements"
    predict(Empty(), ghn, example_input=(1, 8), scale="own")
