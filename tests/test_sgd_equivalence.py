"""`benchmarks/sgd_equivalence.py`: it runs, goes on, and sums up what it found."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest
import torch

if TYPE_CHECKING:
    from types import ModuleType

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"

pytestmark = pytest.mark.source


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", str(BENCHMARKS / "sgd_equivalence.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def labelled_images(path: Path) -> Path:
    """64 images of 16 x 16 pixels whose brightness tells the class."""
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(64) % 10
    noise = torch.randint(0, 30, (64, 16, 16, 3), generator=rng)
    pixels = (22 * labels[:, None, None, None] + noise).to(torch.uint8).numpy()
    np.savez(path, train_images=pixels, train_labels=labels, test_images=pixels, test_labels=labels)
    return path


TINY = (
    "--steps", "4", "--tuning", "1", "--batch", "8", "--every", "2", "--images", "32", "--optimizers", "adam",
    "--networks", "0", "--also",
)  # fmt: skip


def test_predictions_are_compared_with_training_and_the_comparison_goes_on(tmp_path: Path) -> None:
    data, file, picture = labelled_images(tmp_path / "data.npz"), tmp_path / "runs.jsonl", tmp_path / "c.svg"
    done = run(str(data), str(file), *TINY, "test 4")
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(r["setting"]["start"], r["setting"]["steps"]) for r in records] == [
        *[("default", 1)] * 4, ("untrained", 0), ("default", 4), ("predicted", 4),
    ]  # fmt: skip
    assert [len(record["accuracies"]) for record in records[4:]] == [1, 3, 3]
    rates = {r["setting"]["rate"]: r["losses"][0] for r in records[:4]}
    assert records[5]["setting"]["rate"] in rates
    assert done.stdout.count("| test 4 |") == 1

    with file.open("a") as cut:
        cut.write('{"setting": {"netw')
    more = run(str(data), str(file), *TINY, "test 4", "resnet18", "--draw", str(picture))
    assert more.returncode == 0, more.stderr
    again = [json.loads(line) for line in file.read_text().splitlines()]
    assert again[: len(records)] == records
    assert [r["setting"]["network"] for r in again[len(records) :]] == ["resnet18"] * 3
    assert {r["setting"]["rate"] for r in again[8:]} == {records[5]["setting"]["rate"]}
    drawn = picture.read_text()
    assert ET.fromstring(drawn).tag.endswith("svg")
    assert "resnet18" in drawn

    told = run(str(data), str(file), *TINY, "test 4", "resnet18", "--minutes", "0")
    assert told.stdout == more.stdout
    assert file.read_text().count("\n") == len(again)


def test_trainings_end_where_they_are_as_good_as_the_prediction(tmp_path: Path) -> None:
    data, file = labelled_images(tmp_path / "data.npz"), tmp_path / "runs.jsonl"
    settings = (str(data), str(file), *TINY, "test 4", "--every", "1", "--steps", "60", "--until-equal")
    done = run(*settings)
    assert done.returncode == 0, done.stderr
    untrained, trained = [json.loads(line) for line in file.read_text().splitlines()][4:]
    assert (untrained["setting"]["start"], trained["setting"]["start"]) == ("untrained", "default")
    wanted, found = untrained["accuracies"][0], trained["accuracies"]
    assert trained["setting"]["until"] == wanted
    assert all(accuracy < wanted for accuracy in found[1:-1])
    assert found[-1] >= wanted
    assert len(trained["losses"]) == len(found) - 1 < 60
    assert f"| test 4 | {wanted:.1f} | {0 if found[0] >= wanted else len(found) - 1} |" in done.stdout
    assert run(*settings).stdout == done.stdout
    assert len(file.read_text().splitlines()) == 6


def test_networks_in_bfloat16_learn_the_same(tmp_path: Path) -> None:
    data, files = labelled_images(tmp_path / "data.npz"), (tmp_path / "full.jsonl", tmp_path / "half.jsonl")
    found = []
    for file, options in zip(files, ((), ("--bf16",)), strict=True):
        done = run(str(data), str(file), *TINY, "test 4", "--steps", "12", *options)
        assert done.returncode == 0, done.stderr
        found.append([json.loads(line) for line in file.read_text().splitlines()])
    precisions = [{record["setting"]["precision"] for record in records} for records in found]
    assert precisions == [{"float32"}, {"bfloat16"}]
    full, half = (records[-2]["losses"] for records in found)
    assert len(full) == len(half) == 12
    assert full != half
    assert full[-1] < full[0]
    assert half == pytest.approx(full, rel=0.2)


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("sgd_equivalence"), importlib.import_module("sgd_report")


def training(bench: Any, start: str, seed: int, losses: list[float], accuracies: list[float]) -> Any:
    """One of "test 0" by Adam; measured after every step."""
    how = ("", 0.0, 0, 0) if start == "untrained" else ("adam", 1e-3, seed, 3)
    return bench.Training(
        bench.Setting("test 0", start, *how, 8, 16, 1, 32, ""), tuple(losses), tuple(accuracies)
    )


def test_known_trainings_are_summed_up(modules: tuple[ModuleType, ModuleType]) -> None:
    bench, told = modules
    found = [
        training(bench, "untrained", 0, [], [40.0]),
        training(bench, "default", 0, [2.0, 2.0, 2.0], [10.0, 30.0, 41.0, 39.0]),
        training(bench, "default", 1, [2.0, 2.0, 2.0], [10.0, 30.0, 35.0, 40.0]),
        training(bench, "default", 2, [2.0, 2.0, 2.0], [10.0, 10.0, 10.0, 10.0]),
        training(bench, "predicted", 0, [1.0, 1.0, 1.0], [10.0, 50.0, 50.0, 60.0]),
    ]
    assert [t.steps_to(40.0) for t in found[1:4]] == [2, 3, None]
    text = told.report(found, ["test 0", "test 1"])
    assert "| test 0 | 40.0 | 3 | 0.50, 39.0 to 60.0 |" in text
    assert "adam: median over networks 3 steps (1 of 1 got there)" in text
    assert "geometric mean 0.500" in text


def test_what_was_never_reached_or_diverged_is_said(modules: tuple[ModuleType, ModuleType]) -> None:
    bench, told = modules
    found = [
        training(bench, "untrained", 0, [], [40.0]),
        training(bench, "default", 0, [2.0, 2.0, 2.0], [10.0, 20.0, 20.0, 20.0]),
        training(bench, "predicted", 0, [2.0, math.nan], [10.0, 10.0]),
    ]
    text = told.report(found, ["test 0"])
    assert "| test 0 | 40.0 | > 3 | inf, 20.0 to 10.0 |" in text
    assert "median over networks more than 3 steps (0 of 1 got there)" in text
    assert told.report(found[:1], ["test 0"]) == "nothing to compare yet\n"
