"""Training a GHN: a run that is interrupted, spread or fails does what an undisturbed one does."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from typer.testing import CliRunner

import training_runs
from ghn_init import GHN, GHNConfig
from ghn_init._errors import ConfigError, TrainingError
from ghn_init.cli import app
from ghn_init.cli._training import _trainer
from ghn_init.cli._values import training_config
from ghn_init.deepnets._ops import FactorizedReduction, Layers
from ghn_init.training import RunOptions, TrainConfig, Trainer
from ghn_init.training import trainer as trainer_module
from ghn_init.training._engine import KERNELS, Engine, Result, fast_precision, inject, prepare_process
from ghn_init.training._layers import prepare
from ghn_init.training._log import LOG
from ghn_init.training._meta_batches import MetaBatches, ahead
from ghn_init.training._ranks import PATIENCE, Ranks, local_device
from ghn_init.training._schedule import learning_rate
from training_runs import TINY_GHN, figures, random_images, tiny_config, tiny_trainer

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, float, float, float | None]]:
    """Figures of every step of a whole run in one process."""
    found: list[tuple[int, float, float, float | None]] = []
    trainer = tiny_trainer(tmp_path_factory.mktemp("undisturbed"))
    assert trainer.run(lambda record: found.append(figures(record)))
    return found


def start_run(**wanted: Any) -> subprocess.Popen[str]:
    """A tiny run in a process of its own; see `training_runs.main`."""
    command = [sys.executable, training_runs.__file__, json.dumps(wanted)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def steps_of(output: str) -> list[tuple[int, float, float, float | None]]:
    return [tuple(json.loads(line)) for line in output.splitlines()]


# Configuration and schedule


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 5, "learning_rate": 1}, "unknown learning_rate; expected .*lr"),
        ({"steps": 5, "ghn": {"width": 1}}, "unknown key width"),
        ({}, "exactly one of them"),
        ({"steps": 5, "duration": 5.0}, "exactly one of them"),
        ({"steps": 0}, "no length"),
        ({"duration": math.nan}, "duration=nan; expected a finite number"),
        ({"duration": math.inf}, "duration=inf; expected a finite number"),
        ({"duration": -1.0}, "no length"),
        ({"seed": -1}, "seed=-1; expected at least 0"),
        ({"seed": 2**63}, "seed=9223372036854775808; expected at most 9223372036854775807"),
        ({"images": "mine"}, r"images='mine'; expected one of \('shared', 'own'\)"),
        ({"steps": 5, "lr": math.nan}, "lr=nan; expected a finite number"),
        ({"steps": 5, "lr": "abc"}, "lr='abc'; expected float"),
        ({"steps": 5, "seed": 1.5}, "seed=1.5; expected int"),
        ({"steps": "five"}, r"steps='five'; expected int \| None"),
        ({"steps": 5, "meta_batch": True}, "meta_batch=True; expected int"),
        ({"steps": 5, "ghn": 3}, "ghn=3; expected GHNConfig"),
        ({"steps": 5, "meta_batch": 0}, "meta_batch=0; expected at least 1"),
        ({"steps": 5, "curriculum_nodes": -5}, "curriculum_nodes=-5; expected at least 1"),
        ({"steps": 5, "ema": 1.5}, "ema=1.5; expected 0 to 1"),
        ({"steps": 5, "precision": "float16"}, "precision='float16'; expected one of"),
    ],
)
def test_configurations_that_no_run_can_have(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig.from_dict(values)


@pytest.mark.parametrize("name", ["time_limit", "save_every", "validate_every"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_lengths_of_time_that_no_run_can_have(tmp_path: Path, name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{name}={value}; expected a finite number of seconds from 0"):
        RunOptions(output=tmp_path, **{name: value})


@pytest.mark.parametrize("name", ["log_every", "validation_networks", "validation_images"])
def test_numbers_that_no_run_can_have(tmp_path: Path, name: str) -> None:
    for value in (0, 1.5, "10"):
        with pytest.raises(ConfigError, match=f"{name}={value!r}; expected a whole number from 1"):
            RunOptions(output=tmp_path, **{name: value})  # type: ignore[arg-type]


def test_options_of_a_run_take_a_path_of_text_and_no_text_for_a_time(tmp_path: Path) -> None:
    assert RunOptions(output=str(tmp_path)).output == tmp_path  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="time_limit='10m'; expected a finite number of seconds"):
        RunOptions(output=tmp_path, time_limit="10m")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="save_every=None; expected a finite number of seconds"):
        RunOptions(output=tmp_path, save_every=None)  # type: ignore[arg-type]


def test_a_configuration_survives_json() -> None:
    config = tiny_config(lr=3e-4, ghn={"hid": 16, "depth_buckets": 8})
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_the_length_of_the_command_line_goes_before_that_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(tiny_config(steps=5).to_dict()))
    assert training_config(file, None, None, None)[0].steps == 5
    assert training_config(file, None, 7, None)[0].steps == 7
    for truth in ("True", "true"):
        assert training_config(file, [f"ghn.identity={truth}"], None, None)[0].ghn.identity is True
    assert training_config(file, ["lr=1e-4", "lr=1e-3"], None, None)[0].lr == 1e-3
    config = training_config(file, ["lr=1e-4"], None, "2m")[0]
    assert (config.steps, config.duration, config.lr) == (None, 120, 1e-4)
    with pytest.raises(ConfigError, match="give exactly one of them"):
        training_config(file, ["duration=3.0"], 7, None)[0]


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_schedules_rise_and_reach_zero_at_the_last_step(schedule: str) -> None:
    config = tiny_config(schedule=schedule, steps=50, warmup=10, lr=1.0)
    rates = [learning_rate(config, step, 0.0) for step in range(50)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] > 0.8
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] == pytest.approx(0.0, abs=1e-12)


def test_the_published_schedule_falls_twice() -> None:
    config = tiny_config(schedule="step", steps=300, warmup=0, lr=1.0)
    rates = [learning_rate(config, step, 0.0) for step in (0, 199, 201, 248, 251, 299)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_a_schedule_of_a_duration_goes_by_the_clock() -> None:
    config = tiny_config(schedule="linear", steps=None, duration=100.0, warmup=0, lr=1.0)
    assert [learning_rate(config, 7, seconds) for seconds in (0.0, 25.0, 100.0, 120.0)] == [1, 0.75, 0, 0]


# Layers and engine


def depthwise(kernel: int, dilation: int = 1) -> nn.Conv2d:
    padding = dilation * (kernel // 2)
    return nn.Conv2d(6, 6, kernel, padding=padding, dilation=dilation, groups=6, bias=False)


@pytest.mark.parametrize("size", [8, 11])
@pytest.mark.parametrize(
    "layer",
    [
        depthwise(3), depthwise(5), depthwise(7), depthwise(9), depthwise(3, 2), depthwise(5, 2),
        nn.Conv2d(6, 4, 1, bias=False),
        nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False),
        nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False),
        FactorizedReduction(Layers("bnorm"), 6, 5), FactorizedReduction(Layers(None), 6, 6),
    ],
    ids=lambda layer: str(layer).replace("\n", ""),
)  # fmt: skip
def test_prepared_layers_compute_what_the_original_ones_do(layer: nn.Module, size: int) -> None:
    size += size % 2 if isinstance(layer, FactorizedReduction) else 0  # it takes even sides
    layer.double()  # sums in another order are equal to the last digits only, which float32 has too few of
    x = torch.randn(2, 6, size, size, dtype=torch.double, requires_grad=True)
    inputs = [x, *layer.parameters()]
    expected = layer(x)
    weights = torch.randn_like(expected)
    expected_grads = torch.autograd.grad((expected * weights).sum(), inputs)
    (replaced,) = prepare(nn.Sequential(layer))
    try:
        found = replaced(x)
        grads = torch.autograd.grad((found * weights).sum(), inputs)
    finally:
        layer.__dict__.pop("forward", None)  # the parametrised layer is shared between tests
    torch.testing.assert_close(found, expected)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad)


def test_batch_norm_uses_the_batch_and_dropout_a_seed() -> None:
    x = torch.randn(4, 3, 5, 5)
    norm = prepare(nn.Sequential(nn.BatchNorm2d(3))).eval()
    torch.testing.assert_close(norm(x), F.batch_norm(x, None, None, training=True))

    def dropped(seed: int) -> torch.Tensor:
        return prepare(nn.Sequential(nn.Dropout(0.5)), seed=seed).train()(x)

    assert torch.equal(dropped(1), dropped(1))
    assert not torch.equal(dropped(1), dropped(2))
    assert set((dropped(1) / x).unique().round(decimals=3).tolist()) == {0.0, 2.0}
    off = prepare(nn.Sequential(nn.Dropout(0.5))).eval()
    assert torch.equal(off(x), x)


def test_the_engine_gives_the_gradients_of_functional_call() -> None:
    stream = MetaBatches(tiny_config(), 16)
    task, (graph,) = next(stream.tasks()), stream.graphs(1)
    (predicted,) = GHN(GHNConfig.from_dict(training_runs.TINY_GHN))([graph])
    params = {name: value.detach().requires_grad_() for name, value in predicted.items()}
    images, labels = torch.randn(4, 3, 16, 16), torch.tensor([1, 2, 3, 4])

    plain = prepare(task.build(10, 16).to_empty(device="cpu"), fast=False).train()
    loss = F.cross_entropy(functional_call(plain, params, images), labels)
    expected = dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))

    result = Engine(torch.float32).run(task.build(10, 16), params, images, labels)
    assert result.loss == pytest.approx(loss.item(), rel=1e-5)
    assert result.gradients.keys() == expected.keys()
    for name, gradient in result.gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5)


def test_injected_parameters_have_the_wanted_types() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    params = {name: value.detach().clone() for name, value in network.named_parameters()}
    leaves = inject(network, params, torch.bfloat16, gradients=True)
    types = {name: leaf.dtype for name, leaf in leaves.items()}
    assert {name for name, dtype in types.items() if dtype == torch.float32} == {"1.weight", "1.bias"}
    assert leaves["0.weight"].is_contiguous(memory_format=torch.channels_last)
    assert all(leaf.requires_grad for leaf in leaves.values())


@pytest.mark.parametrize(
    ("amx", "avx512", "expected"),
    [(False, False, torch.float32), (True, False, torch.bfloat16), (False, True, torch.bfloat16)],
)
def test_networks_run_in_bfloat16_where_the_device_computes_in_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, amx: bool, avx512: bool, expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    assert tiny_trainer(tmp_path, tiny_config(precision="auto")).engine.precision == expected
    assert tiny_trainer(tmp_path, tiny_config(precision="bfloat16")).engine.precision == torch.bfloat16
    assert fast_precision(torch.device("cuda")) == torch.bfloat16


# The stream of networks


def places(stream: Any, count: int) -> list[tuple[tuple[int, ...], int]]:
    """(Places of the networks, place after them) of the first meta-batches."""
    iterator = iter(stream)
    return [(tuple(task.index for task in b.tasks), b.stop) for b in (next(iterator) for _ in range(count))]


@pytest.mark.parametrize("meta_batch", [1, 3])
def test_the_stream_goes_on_from_any_place(meta_batch: int) -> None:
    config = tiny_config(meta_batch=meta_batch, curriculum_nodes=70)
    whole = places(MetaBatches(config, 16), 5)
    assert len({index for indices, _ in whole for index in indices}) == 5 * meta_batch
    for done in range(1, 5):
        assert places(MetaBatches(config, 16, start=whole[done - 1][1]), 5 - done) == whole[done:]


def test_processes_share_meta_batches() -> None:
    config = tiny_config(meta_batch=4)
    whole, *shares = (
        places(MetaBatches(config, 16, 0, ranks), 3) for ranks in (Ranks(), Ranks(0, 2), Ranks(1, 2))
    )
    for (indices, stop), *parts in zip(whole, *shares, strict=True):
        assert [part[1] for part in parts] == [stop, stop]
        assert sorted(indices) == sorted(parts[0][0] + parts[1][0])


def test_a_share_of_the_networks_loses_its_batch_norms() -> None:
    def first(share: float) -> list[Any]:
        tasks = MetaBatches(tiny_config(norm_free=share, max_params=2.0, max_nodes=400), 16).tasks()
        return [task for task, _ in zip(tasks, range(40), strict=False)]

    as_drawn, half, none = first(0.0), first(0.5), first(1.0)
    drawn_without = sum(task.architecture.norm is None for task in as_drawn)
    assert drawn_without + 8 < sum(task.architecture.norm is None for task in half) < 38
    assert all(task.architecture.norm is None for task in none)
    networks = {task.index: task.architecture for task in as_drawn}
    both = [task for task in half if task.index in networks]
    assert len(both) > 20
    for task in both:  # but for the norms they are what they were
        norm = networks[task.index].norm
        assert task.architecture.norm in (None, norm)
        assert dataclasses.replace(task.architecture, norm=norm) == networks[task.index]
    assert first(0.5) == half
    with pytest.raises(ConfigError, match=r"norm_free=1\.5; expected 0 to 1"):
        tiny_config(norm_free=1.5)


def test_networks_obey_the_filters() -> None:
    config = tiny_config(max_params=0.5, curriculum_nodes=80)
    tasks = [task for task, _ in zip(MetaBatches(config, 16).tasks(), range(10), strict=False)]
    assert all(task.architecture.num_params(config.ghn.num_classes) <= 0.5e6 for task in tasks)
    assert all(task.architecture.num_nodes() <= 80 for task in tasks)
    assert all(task.architecture.supports(16) for task in tasks)


def test_meta_batches_made_ahead_are_the_same() -> None:
    made = (ahead(iter(MetaBatches(tiny_config(), 16)), count) for count in (0, 1, 3))
    plain, *others = ([batch.tasks for batch in itertools.islice(batches, 4)] for batches in made)
    assert others == [plain, plain]


@pytest.mark.parametrize("prefetch", [0, 2])
def test_filters_that_leave_nothing_are_an_error(prefetch: int) -> None:
    made = iter(MetaBatches(tiny_config(max_params=0.001, meta_batch=1), 16))
    with (
        closing(ahead(made, prefetch)) as batches,
        pytest.raises(TrainingError, match=r"max_params=0\.001 .* expected wider limits"),
    ):
        next(batches)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_network_that_cannot_be_prepared_ends_the_run_with_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefetch: int
) -> None:
    graph, calls = MetaBatches._graph, itertools.count()

    def sometimes(batches: MetaBatches, task: Any) -> Any:
        if next(calls) == 8:
            raise MemoryError("no room for it")
        return graph(batches, task)

    monkeypatch.setattr(MetaBatches, "_graph", sometimes)
    config = tiny_config(prefetch=prefetch, steps=20)
    with pytest.raises(TrainingError, match=r"networks .* cannot be prepared: MemoryError: no room for it"):
        tiny_trainer(tmp_path, config).run()
    assert 1 <= tiny_trainer(tmp_path, config).state.step < 20


# Runs


def test_a_run_that_stops_and_goes_on_equals_an_undisturbed_one(tmp_path: Path, undisturbed: Any) -> None:
    found: list[Any] = []
    parts = 0
    while not tiny_trainer(tmp_path, time_limit=0.0).run(lambda record: found.append(figures(record))):
        parts += 1
        assert len(found) == parts
    assert found == undisturbed
    lines = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 6]
    assert lines[-1].keys() >= {"validation", "standard_error", "accuracies"}
    exported = GHN.from_pretrained(tmp_path / "ghn")
    assert exported.config == tiny_config().ghn
    assert json.loads((tmp_path / "ghn" / "training.json").read_text())["networks"] == 12


def test_a_killed_run_goes_on_where_its_checkpoint_is(tmp_path: Path, undisturbed: Any) -> None:
    killed = start_run(output=str(tmp_path), kill_at=4, options={"save_every": 0.0}, config={"prefetch": 2})
    output, _ = killed.communicate(timeout=600)
    assert killed.returncode == -signal.SIGKILL
    assert steps_of(output) == undisturbed[:4]
    found: list[Any] = []
    assert tiny_trainer(tmp_path).run(lambda record: found.append(figures(record)))
    assert found == undisturbed[3:]  # killed after step 4, before it was saved


def test_sigterm_stops_a_run_after_its_step(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    assert not trainer.run(lambda _: os.kill(os.getpid(), signal.SIGTERM))
    assert signal.getsignal(signal.SIGTERM) == before
    assert tiny_trainer(tmp_path).state.step == 2  # the signal came when the first was over


def test_two_processes_make_the_update_of_one_and_a_lost_one_ends_the_run(
    tmp_path: Path, undisturbed: Any
) -> None:
    common = {"output": str(tmp_path / "run"), "meet": str(tmp_path / "meet"), "world": 2}
    first, second = start_run(**common, rank=0), start_run(**common, rank=1, kill_at=4)
    output, errors = first.communicate(timeout=600)
    second.communicate(timeout=600)
    assert first.returncode == 1
    assert "TrainingError: process 0 of 2 lost another one" in errors
    found = steps_of(output)[:4]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(undisturbed[:4]), rtol=1e-3, atol=1e-4)
    assert tiny_trainer(tmp_path / "run").state.step == 4


def test_processes_that_share_muons_matrices_make_the_updates_of_one(tmp_path: Path) -> None:
    changes = {"optimizer": "muon", "steps": 3, "ghn": {**TINY_GHN, "hypernet": "transformer"}}
    alone = tiny_trainer(tmp_path / "alone", tiny_config(**changes))
    assert alone.run()
    common = {"output": str(tmp_path / "run"), "meet": str(tmp_path / "meet"), "world": 2, "config": changes}
    for process in [start_run(**common, rank=rank) for rank in range(2)]:
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
    both = tiny_trainer(tmp_path / "run", tiny_config(**changes))
    for (name, one), two in zip(alone.ghn.named_parameters(), both.ghn.parameters(), strict=True):
        torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-4, msg=lambda text, of=name: f"{of}: {text}")
    states = [trainer.optimizer.state_dict()["state"] for trainer in (alone, both)]
    for index, one in states[0].items():  # so that one process can go on from what two have left
        for key, value in one.items():
            torch.testing.assert_close(states[1][index][key], value, rtol=1e-2, atol=1e-4)


_RENDEZVOUS = importlib.import_module("torch.distributed.rendezvous")

_LAUNCHED = (
    "WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION",
)  # fmt: skip


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets what a launcher would, on a machine without GPUs, and removes all else."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for name in _LAUNCHED:
        monkeypatch.delenv(name, raising=False)

    def launch(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return launch


def test_launchers_tell_the_place(launched: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    met: list[Any] = []
    joined: list[Any] = []
    place = ("store", 3, 4)
    monkeypatch.setattr(_RENDEZVOUS, "rendezvous", lambda *a: met.append(a) or iter([place]))
    monkeypatch.setattr("torch.distributed.init_process_group", lambda *a, **k: joined.append((a, k)))
    assert Ranks.join() == Ranks()
    assert not met
    assert not joined
    launched(WORLD_SIZE="4", RANK="3")
    Ranks.join()
    assert met == [("env://", 3, 4)]
    assert joined == [(("gloo",), {"store": "store", "rank": 3, "world_size": 4, "timeout": PATIENCE})]


def test_a_process_leaves_its_group_for_gloo_would_abort_it_at_its_end(
    launched: Callable[..., None],
) -> None:
    launched(WORLD_SIZE="1", RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    ranks = Ranks.join()
    assert torch.distributed.is_initialized()
    ranks.leave()
    assert not torch.distributed.is_initialized()
    ranks.leave()  # there is no group any more


@pytest.mark.parametrize("said", [{}, {"RANK": ""}, {"RANK": "5"}, {"RANK": "-1"}, {"RANK": "first"}])
def test_a_place_that_no_process_has_is_refused(launched: Callable[..., None], said: dict[str, str]) -> None:
    launched(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500", **said)
    expected = f"RANK='{said.get('RANK', '')}' and WORLD_SIZE='2' in the environment; expected a process's"
    with pytest.raises(TrainingError, match=expected):
        Ranks.join()


@pytest.mark.source
@pytest.mark.skipif(os.name != "posix", reason="no signals there")
def test_a_process_that_waits_for_others_can_be_ended() -> None:
    code = "from ghn_init.training._ranks import Ranks; print(1, flush=True); Ranks.join()"
    place = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | place,
    )
    assert process.stdout is not None
    process.stdout.read(1)
    time.sleep(1)  # it waits by then
    process.terminate()
    assert process.wait(timeout=20) == -signal.SIGTERM
    process.stdout.close()


@pytest.mark.source
@pytest.mark.skipif(os.name != "posix", reason="no signals there")
def test_processes_wait_for_one_that_is_held_beyond_torchs_time_limit() -> None:
    code = """
import sys, torch
from datetime import timedelta
torch.distributed.distributed_c10d.default_pg_timeout = timedelta(seconds=4)  # half an hour, in truth
from ghn_init.training._ranks import Ranks
ranks = Ranks.join()
ranks.gather([0.0])
print("met", flush=True)
sys.stdin.readline()
print(ranks.gather([float(ranks.rank)]), flush=True)
Ranks.leave()
"""
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1])}
    command = [sys.executable, "-c", code]
    with (
        _talking(command, place | {"RANK": "0"}) as waiting,
        _talking(command, place | {"RANK": "1"}) as held,
    ):
        assert [process.stdout.readline() for process in (waiting, held) if process.stdout] == ["met\n"] * 2
        held.send_signal(signal.SIGSTOP)
        for process in (waiting, held):
            print(file=process.stdin, flush=True)
        time.sleep(7)
        held.send_signal(signal.SIGCONT)
        for process in (waiting, held):
            assert process.stdout is not None
            assert process.stdout.read() == "[[0.0], [1.0]]\n"


def _talking(command: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    """A process with which to exchange lines."""
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | environment
    )


def test_processes_that_do_not_meet_are_told_what_to_set(
    launched: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    launched(WORLD_SIZE="2", RANK="1")
    with pytest.raises(TrainingError, match=r"process 1 of 2 did not find .* MASTER_ADDR expected"):
        Ranks.join()

    def refused(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("Connection refused, remote=[127.0.1.1]:11686")

    monkeypatch.setattr(_RENDEZVOUS, "rendezvous", lambda *_: iter([(object(), 1, 2)]))
    monkeypatch.setattr("torch.distributed.init_process_group", refused)
    with pytest.raises(TrainingError, match=r"remote=\[127.0.1.1\].* GLOO_SOCKET_IFNAME=eth0"):
        Ranks.join()


def test_accelerate_with_an_mpi_is_refused(launched: Callable[..., None]) -> None:
    launched(ACCELERATE_MIXED_PRECISION="no", ACCELERATE_USE_CPU="True")
    assert Ranks.join() == Ranks()
    launched(MASTER_ADDR="127.0.0.1")
    with pytest.raises(TrainingError, match=r"this one alone; use `torchrun --nproc-per-node N`"):
        Ranks.join()


def test_every_process_has_a_gpu_where_there_are_any(
    launched: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert local_device() == torch.device("cpu")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert local_device() == torch.device("cuda", 0)
    launched(LOCAL_RANK="3")
    assert local_device() == torch.device("cuda", 1)
    launched(ACCELERATE_USE_CPU="True")
    assert local_device() == torch.device("cpu")


def test_what_is_not_said_of_the_ghn_follows_from_images_and_first_weights(tmp_path: Path) -> None:
    images = random_images(60, 16, classes=3)
    arrays = {
        "train_images": images.pixels.permute(0, 2, 3, 1).numpy(), "train_labels": images.labels.numpy(),
        "classes": np.array(images.classes),
    }  # fmt: skip
    np.savez(tmp_path / "set.npz", **arrays)  # pyright: ignore[reportArgumentType]
    small = GHN(GHNConfig.from_dict({**TINY_GHN, "num_classes": 3}))
    small.save_pretrained(tmp_path / "small")

    def trainer(start: str | None, *settings: str) -> Trainer:
        config, of_ghn = training_config(None, ["batch_size=4", "meta_batch=1", *settings], 1, None)
        options = RunOptions(output=tmp_path / "run", validation_networks=1, validation_images=8)
        return _trainer(tmp_path / "set.npz", config, of_ghn, options, start, None)

    assert trainer(None).ghn.config == GHNConfig(num_classes=3)
    assert trainer(None, "ghn.hid=8").ghn.config == GHNConfig(num_classes=3, hid=8)
    assert trainer(str(tmp_path / "small")).ghn.config == small.config
    with pytest.raises(TrainingError, match=r"3 classes of images; .* for 4 \(ghn.num_classes=3 is one"):
        trainer(None, "ghn.num_classes=4")
    with pytest.raises(TrainingError, match=r"of a GHN with .*hid=8; .*leave the GHN's configuration out"):
        trainer(str(tmp_path / "small"), "ghn.num_classes=3")
    done = CliRunner().invoke(
        app, ["train", str(tmp_path / "set.npz"), "--steps", "1", "--soft-labels", "x.npz"]
    )
    assert done.exit_code == 2
    assert "without a share" in " ".join(done.stderr.split())


def test_a_meta_batch_has_to_be_shared_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ranks, "current", lambda: Ranks(0, 3))
    with pytest.raises(TrainingError, match="meta_batch=2 networks cannot be shared evenly by 3"):
        tiny_trainer(tmp_path)


def poison(trainer: Any, bad: Callable[[int, int], bool], gradient: float = 1.0) -> None:
    """Make losses infinite, or gradients so many times larger, where `bad` (step, network) says so."""
    healthy, calls = Engine(torch.float32), itertools.count()

    class Poisoned:
        precision = torch.float32

        def run(self, *args: Any, **kwargs: Any) -> Result:
            result = healthy.run(*args, **kwargs)
            if not bad(trainer.state.step + 1, next(calls) % 2):
                return result
            if gradient == 1:
                return Result(float("inf"), result.correct, result.gradients)
            grads = {name: gradient * values for name, values in result.gradients.items()}
            return Result(result.loss, result.correct, grads)

    trainer.engine = Poisoned()


def test_a_step_without_a_finite_loss_is_skipped_and_counted(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, tiny_config(steps=3))
    poison(trainer, lambda step, _: step == 2)
    weights: list[torch.Tensor] = []
    records: list[Any] = []

    def on_step(record: Any) -> None:
        records.append(record)
        weights.append(trainer.ghn.embed.weight.detach().clone())

    assert trainer.run(on_step)
    assert [record.skipped for record in records] == [0, 1, 1]
    assert [record.dropped for record in records] == [0, 2, 2]
    assert [record.grad_norm is None for record in records] == [False, True, False]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])
    lines = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
    assert lines[1]["loss"] is None
    assert json.loads((tmp_path / "ghn" / "training.json").read_text())["dropped"] == 2


@pytest.mark.parametrize("gradient", [1.0, math.nan, math.inf, 1e12])
def test_one_network_that_is_not_finite_leaves_the_step_to_the_others(
    tmp_path: Path, gradient: float
) -> None:
    found = []
    for bad in (False, True):
        trainer = tiny_trainer(tmp_path / str(bad), tiny_config(steps=1, clip=0.0, optimizer="adamw"))
        poison(trainer, lambda _step, network, bad=bad: bad and network == 0, gradient)
        kept: list[Any] = []
        trainer.run(kept.append)
        found.append((trainer, kept[0]))
    (whole, healthy), (rest, left) = found
    assert (healthy.skipped, healthy.dropped) == (0, 0)
    assert (left.skipped, left.dropped) == (0, 1)
    assert math.isfinite(left.loss)
    assert left.loss != healthy.loss
    assert math.isfinite(left.grad_norm)
    moved = [torch.isfinite(p).all() for p in rest.ghn.parameters()]
    assert all(moved)
    assert not torch.equal(whole.ghn.embed.weight, rest.ghn.embed.weight)


def test_fifty_steps_in_a_row_without_a_network_end_the_run_with_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_module, "_LOST", 2)
    trainer = tiny_trainer(tmp_path, tiny_config())
    poison(trainer, lambda step, _: step in (1, 3, 4))
    with pytest.raises(TrainingError, match="2 steps in a row, up to step 4, without a network whose loss"):
        trainer.run()
    resumed = tiny_trainer(tmp_path, tiny_config())
    assert (resumed.state.step, resumed.state.skipped, resumed.state.dropped) == (4, 3, 6)


def test_a_run_starts_from_given_weights(tmp_path: Path) -> None:
    from ghn_init.training import RunOptions, Trainer

    start = GHN(tiny_config().ghn)
    images, options = random_images(), RunOptions(output=tmp_path)
    trainer = Trainer(tiny_config(), images, images, options, start=start)
    assert all(torch.equal(a, b) for a, b in zip(trainer.ghn.parameters(), start.parameters(), strict=True))
    with pytest.raises(TrainingError, match="weights to start from are of"):
        Trainer(tiny_config(), images, images, options, start=GHN(GHNConfig(hid=16)))


def test_filters_come_from_the_training_images_or_with_the_weights(tmp_path: Path) -> None:
    from ghn_init._hypernetwork.priors import whitening_filters
    from ghn_init.training import RunOptions, Trainer
    from ghn_init.training.data import Normalisation, sized

    images, options = random_images(), RunOptions(output=tmp_path)
    ghn = {**training_runs.TINY_GHN, "whitening": 2.0, "identity": True}
    x = Normalisation.of(images)(images.pixels)
    for size, seen in ((0, x), (8, sized(x, 8))):
        config = tiny_config(ghn=ghn, image_size=size, scaled_init=1)
        trainer = Trainer(config, images, images, options)
        assert torch.equal(trainer.ghn.get_buffer("whitening"), whitening_filters(seen))
    others = random_images(seed=5)
    again = Trainer(tiny_config(ghn=ghn), others, others, options, start=trainer.ghn)
    assert torch.equal(again.ghn.get_buffer("whitening"), whitening_filters(sized(x, 8)))
    assert again.averaged().get_buffer("whitening").abs().max() > 0


def test_a_validation_sees_the_size_trained_on_and_tells_kinds_of_networks_apart(tmp_path: Path) -> None:
    from ghn_init.training._validation import Validation
    from ghn_init.training.data import Normalisation
    from ghn_init.training.evaluate import Measure

    images = random_images(8, size=16)
    ghn = GHN(GHNConfig.from_dict(training_runs.TINY_GHN))
    validation = Validation(images, Normalisation.of(images), 4, 8, 8)
    kinds = [arch.transformer for arch in validation.architectures]
    assert kinds == [False, False, True, False]
    figures = validation(ghn, torch.float32)
    accuracies = figures["accuracies"]
    assert figures["validation"] == pytest.approx(sum(accuracies) / 4, abs=0.1)
    assert figures["convolutional"] == pytest.approx(
        (accuracies[0] + accuracies[1] + accuracies[3]) / 3, abs=0.1
    )
    assert (figures["transformers"], figures["transformers_error"]) == (accuracies[2], 0)
    assert figures.keys() >= {"norm_free", "norm_free_error", "convolutional_error", "maximum"}
    seen: list[tuple[int, bool]] = []

    def note(self: Any, network: nn.Module, noise: float = 0.0) -> float:
        layers = [type(layer).__name__ for layer in network.modules()]
        seen.append((self.batches(noise)[0][0].shape[-1], "_BatchNorm2d" in layers))
        return 0.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Measure, "__call__", note)
        validation(ghn, torch.float32)
    assert seen == [(8, True)] * 4 + [(8, False)]


def test_crops_may_be_padded_by_nothing(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, tiny_config(crop_padding=0))
    x, labels, _ = trainer._batch(0)
    for image, label in zip(x, labels, strict=True):
        originals = trainer.normalise(trainer.images.pixels[trainer.images.labels == label])
        assert any(
            torch.allclose(image, other) or torch.allclose(image, other.flip(2)) for other in originals
        )


def test_networks_of_a_step_see_the_same_images_or_each_its_own(tmp_path: Path) -> None:
    def seen(images: str, step: int, ranks: Ranks = Ranks()) -> list[Any]:  # noqa: B008 (it is frozen)
        trainer = tiny_trainer(tmp_path, tiny_config(images=images, meta_batch=4, batch_size=6))
        trainer.ranks = ranks
        return trainer._batches(step)

    shared, own = seen("shared", 1), seen("own", 1)
    assert len(shared) == len(own) == 4
    assert all(torch.equal(batch.images, shared[0].images) for batch in shared)
    # 48 images are two steps of four networks, and of these no image is seen twice.
    both = [batch.images for step in (0, 1) for batch in seen("own", step)]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(torch.cat(both), 2))
    labels = torch.cat([batch.labels for step in (0, 1) for batch in seen("own", step)])
    assert torch.equal(labels.bincount(), random_images().labels.bincount())
    # However many processes there are, a network sees the same.
    for rank in range(2):
        for mine, alone in zip(seen("own", 1, Ranks(rank, 2)), own[rank::2], strict=True):
            assert torch.equal(mine.images, alone.images)
            assert torch.equal(mine.labels, alone.labels)


def test_first_weights_may_be_scaled(tmp_path: Path) -> None:
    plain = tiny_trainer(tmp_path / "a").ghn
    scaled = tiny_trainer(tmp_path / "b", tiny_config(scaled_init=2)).ghn
    again = tiny_trainer(tmp_path / "c", tiny_config(scaled_init=2)).ghn
    assert torch.equal(scaled.decoder.conv[2].weight, again.decoder.conv[2].weight)
    assert not torch.equal(scaled.decoder.conv[2].weight, plain.decoder.conv[2].weight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 100}, "48 training images; expected at least batch_size=100"),
        ({"ghn": {**training_runs.TINY_GHN, "num_classes": 7}}, "10 classes of images; .* configured for 7"),
        ({"image_size": 12}, "image_size=12 and images of 16 pixels"),
    ],
)
def test_images_have_to_fit(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        tiny_trainer(tmp_path, tiny_config(**changes))


def test_images_may_be_halved(tmp_path: Path) -> None:
    config = tiny_config(image_size=8)
    trainer = tiny_trainer(tmp_path, config)
    images, labels, targets = trainer._batch(0)
    assert images.shape == (4, 3, 8, 8)
    assert labels.shape == (4,)
    assert targets is None


@pytest.mark.source
@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="processes cannot be stopped on this system")
def test_a_pause_is_no_training_time() -> None:
    """What a stopped process waits is not counted, whether or not a tick comes before the clock is read."""
    code = (
        "from ghn_init.training._run import Clock\n"
        "class Quick(Clock):\n"
        "    TICK, LATE = 0.1, 1.0\n"
        "with Quick() as clock:\n"
        "    while input():\n"
        "        print(clock(), flush=True)\n"
    )
    run = [sys.executable, "-c", code]
    with subprocess.Popen(run, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        stdin, stdout = process.stdin, process.stdout
        assert stdin is not None
        assert stdout is not None

        def asked() -> float:
            print("?", file=stdin, flush=True)
            return float(stdout.readline())

        before, started = asked(), time.monotonic()
        process.send_signal(signal.SIGSTOP)
        time.sleep(3)
        process.send_signal(signal.SIGCONT)
        after = asked()
        assert after <= time.monotonic() - started + before - 2.5
        assert asked() >= after >= before
        print(file=stdin, flush=True)
    assert process.returncode == 0


def test_the_benchmark_is_a_command_that_runs(tmp_path: Path) -> None:
    script, report = Path(__file__).parent.parent / "benchmarks" / "train.py", tmp_path / "report.json"
    small = ["--steps", "1", "--warmup", "0", "--meta-batch", "1", "--batch-size", "2", "--image-size", "16"]
    command = [sys.executable, str(script), *small, "--max-params", "0.5", "--json", str(report)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert "per (network, batch):" in done.stdout
    result = json.loads(report.read_text())
    assert (result["steps"], result["networks"], result["processes"]) == (1, 1, 1)
    parts = result["seconds"]
    assert sum(value for part, value in parts.items() if part not in ("host", "total")) == pytest.approx(
        parts["total"]
    )


@pytest.mark.slow
def test_accelerate_starts_the_processes_of_a_run(tmp_path: Path) -> None:
    images = random_images(5_048)  # 5,000 are held out
    arrays = {
        "train_images": images.pixels.permute(0, 2, 3, 1).numpy(),
        "train_labels": images.labels.numpy(),
    }
    np.savez(tmp_path / "set.npz", **arrays, classes=np.array(images.classes))
    (tmp_path / "config.json").write_text(json.dumps(tiny_config(steps=1).to_dict()))
    chosen = ["-m", "ghn_init", "train", str(tmp_path / "set.npz"), "--config", str(tmp_path / "config.json")]
    chosen += ["--validation-networks", "1", "--validation-images", "8", "-o"]
    launcher = [
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    lines: list[dict[str, Any]] = []
    for name, before in (("two", launcher), ("one", [])):
        command = [sys.executable, *before, *chosen, str(tmp_path / name)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=600, check=False, env=environment
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("done: step 1, 2 networks") == 1
        lines.append(json.loads((tmp_path / name / LOG).read_text().splitlines()[0]))
    assert lines[0]["loss"] == pytest.approx(lines[1]["loss"], rel=1e-4)


def test_a_process_is_prepared_but_for_what_its_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    monkeypatch.setenv(name, "7")
    prepare_process()
    assert (os.environ[name], torch.get_num_threads()) == ("7", 1)
    monkeypatch.delenv(name)
    prepare_process()
    assert os.environ[name] == str(KERNELS)
    monkeypatch.delenv(name)
