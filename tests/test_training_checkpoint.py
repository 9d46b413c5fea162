"""Checkpoints of a training run: whole at any moment, refused where they do not fit."""

from __future__ import annotations

import dataclasses
import errno
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from ghn_init import GHN, _files
from ghn_init._errors import TrainingError
from ghn_init.training import RunOptions, Trainer, _checkpoint
from ghn_init.training._checkpoint import Checkpoint
from ghn_init.training._engine import Engine
from ghn_init.training._log import LOG, Log
from ghn_init.training._output import only_writer
from training_runs import figures, random_images, tiny_config, tiny_trainer

if TYPE_CHECKING:
    from collections.abc import Callable


class Killed(BaseException):
    """Stands for a process that ends at this point."""


def checkpoint(value: float) -> Checkpoint:
    return Checkpoint({"weights": {"a": torch.full((4,), value)}}, {"value": value})


def test_a_checkpoint_is_whole_wherever_writing_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = 0

    def limited(function: Callable[..., Any]) -> Any:
        def run(*args: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return function(*args, **options)

        return run

    for owner, function in (
        (os, os.fsync),
        (shutil, shutil.rmtree),
        (Path, Path.rename),
        (Path, Path.replace),
    ):
        monkeypatch.setattr(owner, function.__name__, limited(function))
    left = 100
    _checkpoint.save(tmp_path, 1, checkpoint(1.0))
    seen: list[float] = []
    for allowed in range(100):
        left = allowed
        try:
            _checkpoint.save(tmp_path, 2, checkpoint(2.0))
        except Killed:
            pass
        else:
            break
        path = _checkpoint.newest(tmp_path)
        assert path is not None
        loaded = _checkpoint.load(path)
        seen.append(loaded.state["value"])
        assert torch.equal(loaded.tensors["weights"]["a"], torch.full((4,), seen[-1]))
    assert seen == sorted(seen)
    assert set(seen) == {1.0, 2.0}
    left = 100
    unfinished = {path for path in tmp_path.iterdir() if path.name.endswith(".partial")}
    assert {path.name for path in tmp_path.iterdir()} - {path.name for path in unfinished} == {
        "checkpoint-00000002"
    }
    for path in (file for folder in unfinished for file in (*folder.iterdir(), folder)):
        os.utime(path, (0, 0))  # a day later
    last = _checkpoint.save(tmp_path, 3, checkpoint(3.0))
    assert list(tmp_path.iterdir()) == [last]


def test_large_files_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_checkpoint, "PART", 1000)
    values = {f"t{i}": torch.randn(200) for i in range(4)}
    path = _checkpoint.save(tmp_path, 3, Checkpoint({"weights": values, "small": {"x": torch.ones(2)}}, {}))
    sizes = {file.name: file.stat().st_size for file in path.iterdir()}
    assert sizes.keys() == {
        "small.safetensors",
        "state.json",
        *(f"weights.safetensors.0{i}" for i in range(4)),
    }
    assert max(sizes.values()) <= 1000
    loaded = _checkpoint.load(path).tensors
    assert all(torch.equal(loaded["weights"][name], value) for name, value in values.items())


def test_more_than_a_hundred_parts_are_joined_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_checkpoint, "PART", 100)
    values = torch.arange(3000.0)
    path = _checkpoint.save(tmp_path, 1, Checkpoint({"weights": {"a": values}}, {}))
    assert (path / "weights.safetensors.120").exists()
    assert torch.equal(_checkpoint.load(path).tensors["weights"]["a"], values)


def remove_sizes(path: Path) -> None:
    """Make it a checkpoint of before sizes were kept."""
    state = json.loads((path / "state.json").read_text())
    del state["bytes"]
    (path / "state.json").write_text(json.dumps(state))


@pytest.mark.parametrize("sizes", [True, False])
@pytest.mark.parametrize("lost", [0, 2])
def test_a_checkpoint_that_lacks_a_part_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: int, sizes: bool
) -> None:
    monkeypatch.setattr(_checkpoint, "PART", 1000)
    values = torch.arange(1000.0)
    path = _checkpoint.save(tmp_path, 1, Checkpoint({"weights": {"a": values}}, {}))
    if not sizes:
        remove_sizes(path)
    assert torch.equal(_checkpoint.load(path).tensors["weights"]["a"], values)
    (path / f"weights.safetensors.{lost:02d}").unlink()
    with pytest.raises(TrainingError, match=rf"not a complete .* weights\.safetensors lacks part {lost}"):
        _checkpoint.load(path)


def test_files_that_are_not_of_a_checkpoint_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_checkpoint, "PART", 1000)
    values = torch.arange(1000.0)
    path = _checkpoint.save(tmp_path, 1, Checkpoint({"weights": {"a": values}}, {}))
    for name in ("weights.safetensors.bak", "weights.safetensors.00~", "other.safetensors", "note.txt"):
        (path / name).write_bytes(b"stray")
    loaded = _checkpoint.load(path)
    assert loaded.tensors.keys() == {"weights"}
    assert torch.equal(loaded.tensors["weights"]["a"], values)
    (path / "weights.safetensors.05").write_bytes(b"one too many")
    with pytest.raises(TrainingError, match=r"has \d+ bytes in 6 files; expected \d+"):
        _checkpoint.load(path)


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    path = _checkpoint.save(tmp_path, 3, checkpoint(1.0))
    whole = path / "weights.safetensors"
    whole.write_bytes(b"damaged".ljust(whole.stat().st_size))
    with pytest.raises(TrainingError, match="cannot be read as a training checkpoint"):
        _checkpoint.load(path)
    (path / "state.json").write_text(json.dumps({"format": _checkpoint.FORMAT, "bytes": 3}))
    with pytest.raises(TrainingError, match="cannot be read as a training checkpoint"):
        _checkpoint.load(path)
    (path / "state.json").write_text("{}")
    with pytest.raises(TrainingError, match="not a training checkpoint of format"):
        _checkpoint.load(path)


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path: Path) -> None:
    tiny_trainer(tmp_path, time_limit=0.0).run()
    with pytest.raises(TrainingError, match="was trained with other values of seed, lr; give the same"):
        tiny_trainer(tmp_path, tiny_config(seed=1, lr=0.1))
    assert tiny_trainer(tmp_path, tiny_config(prefetch=2)).state.step == 1
    (path,) = tmp_path.glob("checkpoint-*")
    (path / "average.safetensors").unlink()
    with pytest.raises(TrainingError, match="not a complete training checkpoint"):
        tiny_trainer(tmp_path)


def test_a_checkpoint_of_other_images_is_refused(tmp_path: Path) -> None:
    def trainer(seed: int, soft: float = 0.0) -> Trainer:
        images = random_images(seed=seed)
        images = dataclasses.replace(images, soft=torch.full((48, 10), soft)) if soft else images
        chosen = RunOptions(output=tmp_path, time_limit=0.0)
        config = tiny_config(soft_labels=0.5 if soft else 0.0)
        return Trainer(config, images, random_images(16, seed=1), chosen)

    trainer(0).run()
    with pytest.raises(TrainingError, match="was trained on other images; give the same, or another output"):
        trainer(3)
    assert trainer(0).state.step == 1
    (path,) = tmp_path.glob("checkpoint-*")
    state = json.loads((path / "state.json").read_text())
    del state["data"]  # as earlier versions wrote it
    (path / "state.json").write_text(json.dumps(state))
    assert trainer(3).state.step == 1
    shutil.rmtree(path)
    trainer(0, 0.1).run()
    with pytest.raises(TrainingError, match="was trained on other soft labels"):
        trainer(0, 0.2)


def test_a_run_that_is_over_is_not_validated_again(tmp_path: Path) -> None:
    assert tiny_trainer(tmp_path, tiny_config(steps=2)).run()
    before = (tmp_path / LOG).read_text()
    assert len(before.splitlines()) == 3
    assert tiny_trainer(tmp_path, tiny_config(steps=2)).run()
    assert (tmp_path / LOG).read_text() == before


def test_a_run_at_a_constant_rate_may_get_another_length(tmp_path: Path) -> None:
    constant = {"schedule": "constant", "steps": 2}
    assert tiny_trainer(tmp_path / "run", tiny_config(**constant)).run()
    longer = tiny_trainer(tmp_path / "run", tiny_config(**{**constant, "steps": 4}))
    assert longer.state.step == 2
    assert longer.run()
    whole = tiny_trainer(tmp_path / "whole", tiny_config(**{**constant, "steps": 4}))
    assert whole.run()
    for one, other in zip(longer.ghn.parameters(), whole.ghn.parameters(), strict=True):
        assert torch.equal(one, other)
    assert tiny_trainer(tmp_path / "run", tiny_config(**{**constant, "steps": 3})).run()  # it is over
    with pytest.raises(TrainingError, match="was trained with other values of schedule; give the same"):
        tiny_trainer(tmp_path / "run", tiny_config(schedule="linear", steps=4))


def test_a_run_does_not_go_on_from_other_weights(tmp_path: Path) -> None:
    def trainer(name: str, start: GHN | None) -> Trainer:
        images = random_images()
        options = RunOptions(output=tmp_path / name, validation_networks=1, validation_images=8)
        return Trainer(tiny_config(steps=1), images, random_images(16, seed=1), options, start=start)

    one, other = (GHN(tiny_config().ghn) for _ in range(2))
    trainer("one", one).run()
    trainer("random", None).run()
    assert trainer("one", None)._start == one.digest()
    trainer("one", one)
    with pytest.raises(TrainingError, match="weights to start from were others; give the same"):
        trainer("one", other)
    with pytest.raises(TrainingError, match="weights to start from were random ones"):
        trainer("random", one)


def test_a_folder_of_another_name_is_no_checkpoint(tmp_path: Path) -> None:
    for name in ("checkpoint-old", "checkpoint-9", "checkpoint-00000009.bak"):
        (tmp_path / name).mkdir()
    assert _checkpoint.newest(tmp_path) is None
    path = _checkpoint.save(tmp_path, 3, checkpoint(1.0))
    assert _checkpoint.newest(tmp_path) == path
    assert len(list(tmp_path.iterdir())) == 4
    assert _checkpoint.save(tmp_path, 123_456_789, checkpoint(1.0)) == _checkpoint.newest(tmp_path)
    assert not path.exists()


def test_saving_leaves_what_another_run_may_be_writing(tmp_path: Path) -> None:
    later, unfinished, left = (
        tmp_path / name
        for name in ("checkpoint-00000100", ".0123456789abcdef.partial", ".fedcba9876543210.partial")
    )
    for folder in (later, unfinished, left):
        folder.mkdir()
        (folder / "weights.safetensors").touch()
    for path in (left / "weights.safetensors", left):
        os.utime(path, (0, 0))
    saved = _checkpoint.save(tmp_path, 7, checkpoint(1.0))
    assert set(tmp_path.iterdir()) == {saved, later, unfinished}


def test_a_second_run_in_a_folder_is_refused_while_the_first_goes_on(tmp_path: Path) -> None:
    second, refused = tiny_trainer(tmp_path), []

    def on_step(_: Any) -> None:
        with pytest.raises(TrainingError, match=r"another run writes there; .* another output folder"):
            second.run()
        refused.append(True)

    assert not tiny_trainer(tmp_path, time_limit=0.0).run(on_step)
    assert refused == [True]
    with pytest.raises(TrainingError, match="another run has written it since this one took up step 0"):
        second.run()
    trainer = tiny_trainer(tmp_path, time_limit=0.0)
    assert not trainer.run()
    assert not trainer.run()
    assert trainer.state.step == 3


def test_a_killed_run_leaves_its_folder_unlocked(tmp_path: Path) -> None:
    holds = (
        "import os, pathlib, signal, sys\n"
        "from ghn_init.training._output import only_writer\n"
        "with only_writer(pathlib.Path(sys.argv[1])):\n"
        "    print('held', flush=True)\n"
        "    signal.pause()\n"
    )
    command = [sys.executable, "-c", holds, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(TrainingError, match="another run writes there"), only_writer(tmp_path):
            pass
        process.kill()
    with only_writer(tmp_path):
        pass


def test_a_file_system_without_locks_goes_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with only_writer(tmp_path), only_writer(tmp_path):
        pass


def test_an_output_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    trainer = tiny_trainer(tmp_path / "file" / "run")
    with pytest.raises(TrainingError, match="run cannot be written: Not a directory"):
        trainer.run()


def full_disk(*_: Any) -> None:
    """What writing to a full disk raises; it names no file."""
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_checkpoint_for_which_there_is_no_room_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _checkpoint.save(tmp_path, 1, checkpoint(1.0))
    for module, function in ((_checkpoint, "write_bytes"), (_files, "sync")):
        with monkeypatch.context() as patch:
            patch.setattr(module, function, full_disk)
            with pytest.raises(TrainingError, match="checkpoint-00000002 cannot be written: No space left"):
                _checkpoint.save(tmp_path, 2, checkpoint(2.0))
        assert list(tmp_path.iterdir()) == [before]


def test_a_log_for_which_there_is_no_room_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.StringIO):
        """A log file on a full disk, which says so again when it is closed."""

        write = full_disk  # pyright: ignore[reportAssignmentType]

        def close(self) -> None:
            super().close()
            full_disk()

    def enter(log: Log) -> Log:
        log._file = Full()
        return log

    monkeypatch.setattr(Log, "__enter__", enter)
    with pytest.raises(TrainingError, match=rf"{LOG} cannot be written: No space left on device"):
        tiny_trainer(tmp_path).run()
    monkeypatch.undo()
    assert tiny_trainer(tmp_path).state.step == 1


@pytest.mark.parametrize("room", [True, False])
def test_any_error_in_a_step_leaves_a_checkpoint_of_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: bool
) -> None:
    run, calls = Engine.run, itertools.count()

    def sometimes(*args: Any) -> Any:
        if next(calls) == 5:
            raise MemoryError("no room for it")
        return run(*args)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "run", sometimes)
        if not room:
            patch.setattr(_checkpoint, "write_bytes", full_disk)
        with pytest.raises(MemoryError, match="no room for it"):
            tiny_trainer(tmp_path).run()
    found: list[Any] = []
    trainer = tiny_trainer(tmp_path)
    first = trainer.state.step
    assert first == (2 if room else 0)
    assert trainer.run(lambda record: found.append(figures(record)))
    whole: list[Any] = []
    tiny_trainer(tmp_path / "whole").run(lambda record: whole.append(figures(record)))
    assert found == whole[first:]


def test_half_an_update_is_not_saved(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, save_every=0.0)
    step, calls = trainer.optimizer.step, itertools.count()

    def sometimes() -> None:
        step()
        if next(calls) == 2:
            raise RuntimeError("half of it")

    trainer.optimizer.step = sometimes
    with pytest.raises(RuntimeError, match="half of it"):
        trainer.run()
    path = _checkpoint.newest(tmp_path)
    assert path is not None
    assert path.name == "checkpoint-00000002"
    trainer.save()
    assert _checkpoint.newest(tmp_path) == path
    weights = _checkpoint.load(path).tensors["weights"]
    assert not torch.equal(weights["embed.weight"], trainer.ghn.embed.weight)
    with pytest.raises(TrainingError, match="after half of step 3; make a new one"):
        trainer.run()
    assert tiny_trainer(tmp_path).run()
