"""benchmarks/campaign.py: what it trains on and when, from where it goes on, what it keeps."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ghn_init import GHN, GHNConfig
from ghn_init import load as load_ghn
from ghn_init.training import TrainConfig
from ghn_init.training._checkpoint import load, newest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"

pytestmark = pytest.mark.source


@pytest.fixture
def campaign(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The module, with its weights kept in a folder of the test."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("campaign")
    monkeypatch.setattr(module, "KEPT", tmp_path / "kept")
    return module


@pytest.fixture
def trained(campaign: Any, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Commands that would have trained; the clock moves on by what they were given, and each leaves a run."""
    commands: list[dict[str, Any]] = []
    clock = itertools.count()
    now = [0.0]
    monkeypatch.setattr(campaign.time, "monotonic", lambda: now[0])

    def trained_so_far(folder: Path) -> float:
        return sum(entry["seconds"] for entry in commands if entry["name"] == folder.name)

    def start(arguments: list[str], processes: int) -> bool:
        folder = Path(arguments[arguments.index("-o") + 1])
        config = json.loads(Path(arguments[arguments.index("--config") + 1]).read_text())
        limit = float(arguments[arguments.index("--time-limit") + 1].rstrip("s"))
        first = arguments[arguments.index("--from") + 1] if "--from" in arguments else None
        earlier = trained_so_far(folder)
        seconds = min(limit, config["duration"] - earlier)
        now[0] += seconds
        commands.append({"name": folder.name, "from": first, "seconds": seconds, "arguments": arguments})
        if earlier + seconds < config["duration"] - 1:
            return True
        (folder / "ghn").mkdir()
        for name in ("model.safetensors", "config.json"):
            (folder / "ghn" / name).write_text(f"{folder.name} {next(clock)}")
        run = {"seconds": config["duration"], "networks": 100, "skipped": 0}
        (folder / "ghn" / "training.json").write_text(json.dumps(run))
        (folder / "log.jsonl").write_text(
            json.dumps({"step": 1, "validation": 20.0, "accuracies": []}) + "\n"
        )
        return True

    def settle(part: Any, data: Path) -> None:
        (part.folder / "mean.json").write_text(json.dumps({"validation": 19.0}))

    monkeypatch.setattr(campaign, "start", start)
    monkeypatch.setattr(campaign, "settle", settle)
    monkeypatch.setattr(campaign.Part, "seconds", property(lambda part: trained_so_far(part.folder)))
    return commands


def hours(campaign: Any, run: Path, many: float, fall: float = 0.5) -> None:
    campaign.campaign(Path("data"), run, many * 3600, fall * 3600, 2)


def test_a_campaign_goes_through_its_phases_and_ends_every_call_with_a_falling_rate(
    campaign: Any, trained: list[dict[str, Any]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    hours(campaign, run, 10)
    assert [entry["name"] for entry in trained] == ["001-small", "002-all16", "003-all32", "004-fall"]
    assert [round(entry["seconds"] / 60) for entry in trained] == [40, 500, 30, 30]
    starts = [entry["from"] and Path(entry["from"]).parent.name for entry in trained]
    assert starts == [None, "001-small", "002-all16", "003-all32"]
    configs = [TrainConfig.from_dict(part.config) for part in campaign.parts_of(run)]
    assert [config.image_size for config in configs] == [16, 16, 32, 32]
    assert [config.schedule for config in configs] == ["constant"] * 3 + ["linear"]
    assert len({config.seed for config in configs}) == 4
    assert all(config.ghn.identity and config.ghn.whitening == 3 for config in configs)
    assert all(config.ghn.aligned and config.ghn.widest == 96 for config in configs)
    position = campaign.Position.read(tmp_path / "kept" / "position.json")
    assert (position.parts, position.pairs, round(position.core_minutes)) == (4, 400, 1200)
    assert [entry["part"] for entry in position.figures] == [entry["name"] for entry in trained]
    assert (tmp_path / "kept" / "model.safetensors").read_text().startswith("004-fall")

    hours(campaign, run, 1)
    assert [entry["name"] for entry in trained[4:]] == ["005-all32", "006-fall"]


def minutes(trained: list[dict[str, Any]]) -> list[tuple[str, int]]:
    return [(entry["name"], round(entry["seconds"] / 60)) for entry in trained]


def test_an_interrupted_part_ends_where_the_next_call_begins_to_fall(
    campaign: Any, trained: list[dict[str, Any]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    campaign.next_part(run, campaign.Position(), None, 3600.0, 1800.0, 2).write()  # of 30 minutes
    hours(campaign, run, 0.5, 0.25)
    assert minutes(trained) == [("001-small", 15), ("002-fall", 15)]
    hours(campaign, run, 1)
    assert minutes(trained)[2:] == [("003-small", 10), ("004-all16", 20), ("005-fall", 30)]


def test_an_interrupted_part_is_made_longer_but_not_than_its_phase(
    campaign: Any, trained: list[dict[str, Any]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    campaign.next_part(run, campaign.Position(), None, 3600.0, 1800.0, 2).write()
    hours(campaign, run, 2)
    assert minutes(trained) == [("001-small", 40), ("002-all16", 50), ("003-fall", 30)]


def test_a_part_at_a_falling_rate_keeps_its_length(
    campaign: Any, trained: list[dict[str, Any]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    campaign.next_part(run, campaign.Position(), None, 1200.0, 1200.0, 2).write()
    hours(campaign, run, 0.25)
    hours(campaign, run, 9 / 60)  # and nothing begins in the four minutes that it leaves
    assert minutes(trained) == [("001-fall", 15), ("001-fall", 5)]


def test_a_new_machine_goes_on_from_what_was_kept(
    campaign: Any, trained: list[dict[str, Any]], tmp_path: Path
) -> None:
    hours(campaign, tmp_path / "first", 1)
    hours(campaign, tmp_path / "second", 1)
    assert [entry["name"] for entry in trained] == ["001-small", "002-fall", "003-all16", "004-fall"]
    copied = tmp_path / "second" / "000-start"
    assert trained[2]["from"] == str(copied)
    assert (copied / "model.safetensors").read_text().startswith("002-fall")
    position = campaign.Position.read(tmp_path / "kept" / "position.json")
    assert (position.pairs, round(position.core_minutes)) == (400, 240)
    (tmp_path / "kept" / "model.safetensors").unlink()  # they are bundled
    hours(campaign, tmp_path / "third", 1)
    copied = tmp_path / "third" / "000-start"
    assert [trained[4]["name"], trained[4]["from"]] == ["005-all16", str(copied)]
    assert load_ghn(copied).digest() == load_ghn("ghn3-cifar10").digest()


def finished(campaign: Any, run: Path, name: str, schedule: str, start: str | None, value: float) -> Any:
    """A part that is over, whose parameters are all `value`."""
    config = {"schedule": schedule, "image_size": 32}
    part = campaign.Part(run / name, config, start, 2, campaign.Position())
    part.write()
    saved(part.trained, value)
    (part.trained / "training.json").write_text(json.dumps({"seconds": 60.0, "networks": 4, "skipped": 0}))
    (part.folder / "log.jsonl").write_text(json.dumps({"step": 1, "validation": 50.0}) + "\n")
    return part


def saved(folder: Path, value: float) -> str:
    ghn = GHN(GHNConfig.mlp(hid=8))
    for parameter in ghn.parameters():
        torch.nn.init.constant_(parameter, value)
    ghn.save_pretrained(folder)
    return str(folder)


def values(folder: Path) -> set[float]:
    return {value.item() for parameter in load_ghn(folder).parameters() for value in parameter.unique()}


@pytest.mark.parametrize("better", [True, False])
def test_the_mean_with_what_a_call_began_from_is_kept_where_it_is_better(
    campaign: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, better: bool
) -> None:
    found = {"validation": 50.0 + better / 10}
    monkeypatch.setattr(campaign, "validated", lambda data, ghns: [found for _ in ghns])
    run = tmp_path / "run"
    finished(campaign, run, "001-all32", "constant", saved(tmp_path / "first", 0.0), 8.0)
    part = finished(campaign, run, "002-fall", "linear", str(run / "001-all32" / "ghn"), 2.0)
    assert not part.settled
    campaign.campaign(Path("data"), run, 0.0, 0.0, 2)  # it was interrupted before that
    assert part.settled
    assert values(part.weights) == {1.0 if better else 2.0}
    position = campaign.Position.read(tmp_path / "kept" / "position.json")
    assert position.figures[-1]["mean"] == found
    assert position.figures[-1]["validation"] == 50.0
    shutil.copy(part.trained / "config.json", tmp_path / "kept")
    assert values(tmp_path / "kept") == values(part.weights)

    later = finished(campaign, run, "003-fall", "linear", str(part.weights), 4.0)
    found = {"validation": 60.0}
    campaign.settle(later, Path("data"))
    assert values(later.weights) == {2.5 if better else 3.0}  # the call began from part 2's


def test_from_scratch_there_is_nothing_to_make_a_mean_with(campaign: Any, tmp_path: Path) -> None:
    finished(campaign, tmp_path / "run", "001-all32", "constant", None, 8.0)
    part = finished(campaign, tmp_path / "run", "002-fall", "linear", "001-all32/ghn", 2.0)
    campaign.settle(part, Path("data"))
    assert part.settled
    assert part.weights == part.trained


def test_fewer_processes_share_a_meta_batch(campaign: Any, tmp_path: Path) -> None:
    part = campaign.next_part(tmp_path, campaign.Position(), None, 3600.0, 1200.0, 6)
    assert [campaign.sharing(part, processes) for processes in (6, 4, 1, 9)] == [6, 3, 1, 6]


def test_a_process_that_fails_ends_the_others_and_the_campaign(campaign: Any) -> None:
    assert campaign.start([sys.executable, "-c", ""], 2)
    waits = "import os, signal; signal.pause() if os.environ['RANK'] == '0' else exit(3)"
    with pytest.raises(SystemExit, match=r"training failed: .* status \[-15, 3\]"):
        campaign.start([sys.executable, "-c", waits], 2)


RUN = """
import os, signal, sys
from pathlib import Path
from ghn_init.training._ranks import Ranks
from training_runs import tiny_config, tiny_trainer

def on_step(record):
    if record.step == 2 and ranks.first:
        os.kill(os.getppid(), signal.SIGTERM)

ranks = Ranks.join()
tiny_trainer(Path(sys.argv[1]), tiny_config(steps=10_000)).run(on_step)
ranks.leave()
"""


def test_sigterm_ends_a_campaign_with_a_checkpoint_and_one_line(
    campaign: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
    monkeypatch.setattr(campaign, "command", lambda part, *_: [sys.executable, "-c", RUN, str(part.folder)])
    before = signal.getsignal(signal.SIGTERM)
    hours(campaign, tmp_path / "run", 1)
    assert signal.getsignal(signal.SIGTERM) == before
    assert capfd.readouterr().err == f"{tmp_path / 'run'}: stopped; the same command goes on\n"
    (part,) = campaign.parts_of(tmp_path / "run")
    assert not part.over
    assert part.seconds > 0
    assert (checkpoint := newest(part.folder)) is not None
    assert load(checkpoint).state["state"]["step"] >= 2
