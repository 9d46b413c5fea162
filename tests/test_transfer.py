"""Low-shot transfer: what is compared, how it is kept, and the command."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from ghn_init import ConfigError, TrainingError
from ghn_init.cli import app
from ghn_init.training import Images, LowShot, TransferConfig, transfer
from ghn_init.training._records import add_record, read_records
from ghn_init.training._transfer import Training, _Bench, _code, interval

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TINY = TransferConfig(shots=(3, 6), rates=(0.03, 0.1), seeds=2, steps=8, batch_size=4, validation=8)


class Net(nn.Module):
    """The smallest classifier with a batch norm."""

    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


class Said(Net):
    """One whose training mode gives something else, as networks with auxiliary classifiers do."""

    def __init__(self, otherwise: Callable[[list[Tensor]], Any]) -> None:
        super().__init__()
        self.otherwise = otherwise

    def forward(self, x: Tensor) -> Any:
        logits = super().forward(x)
        return self.otherwise([logits, logits]) if self.training else logits


def nothing(_: list[Tensor]) -> Any:
    raise KeyError("images")


def images(count: int, seed: int = 0) -> Images:
    """Two classes, of reddish and of bluish noise."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    pixels = torch.randint(0, 60, (count, 3, 8, 8), generator=rng, dtype=torch.uint8)
    pixels[labels == 0, 0] += 150
    pixels[labels == 1, 2] += 150
    return Images(pixels, labels, ("red", "blue"))


def compared(ghn_dir: Path, **options: Any) -> tuple[list[LowShot], list[Training]]:
    """The rows of a small comparison, and its trainings in the order in which they were wanted."""
    wanted: list[Training] = []
    given: dict[str, Any] = {"build": Net, "config": TINY} | options
    build, config = given.pop("build"), given.pop("config")
    rows = transfer(
        build, images(40), images(20, seed=1), config, weights=ghn_dir, on_training=wanted.append, **given
    )
    return rows, wanted


def test_networks_are_told_apart_by_what_they_compute() -> None:
    x = torch.zeros(2, 3, 8, 8)
    codes = [
        _code(nn.Sequential(nn.Conv2d(3, 4, 3), layer), x) for layer in (nn.ReLU(), nn.ReLU(), nn.Tanh())
    ]
    assert codes[0] == codes[1] != codes[2]


def test_every_start_is_compared_at_the_rate_that_is_best_on_held_out_images(ghn_dir: Path) -> None:
    rows, wanted = compared(ghn_dir)
    starts = ["default", "predicted", "noise", "orthogonal"]
    assert [(row.shots, row.start) for row in rows] == [
        (shots, start) for shots in (3, 6) for start in starts
    ]
    assert len(wanted) == TINY.trainings == 2 * 4 * (2 + 1)
    for row in rows:
        of = [t for t in wanted if (t.setting.shots, t.setting.start) == (row.shots, row.start)]
        tried = {t.setting.rate: t.validation for t in of if t.setting.seed == 0}
        assert set(tried) == {0.03, 0.1}
        assert tried[row.rate] == max(tried.values())
        assert row.accuracies == tuple(t.test for t in of if t.setting.rate == row.rate)
        assert row.at_edge
        default = next(other for other in rows if (other.shots, other.start) == (row.shots, "default"))
        assert row.gain == pytest.approx(row.mean - default.mean)
    assert max(row.mean for row in rows) > 80


def test_a_comparison_goes_on_from_its_file_and_a_changed_one_does_not(
    ghn_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "runs.jsonl"
    rows, wanted = compared(ghn_dir, file=file)
    assert len(read_records(file)) == len(wanted)
    with file.open("a") as cut:
        cut.write('{"setting": {"netw')

    def trained(*_: Any) -> None:
        raise AssertionError("trained again")

    with monkeypatch.context() as patch:
        patch.setattr(_Bench, "_train", trained)
        assert compared(ghn_dir, file=file)[0] == rows
        with pytest.raises(AssertionError, match="trained again"):
            compared(ghn_dir, file=file, build=lambda: nn.Sequential(Net()))
    more = dataclasses.replace(TINY, seeds=3, starts=("predicted",))
    compared(ghn_dir, file=file, config=more)
    assert len(read_records(file)) == len(wanted) + 4


def test_the_same_seed_gives_all_starts_the_same_images_and_larger_sets_hold_the_smaller(
    ghn_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[tuple[int, str, int], set[bytes]] = {}
    record = Images.take

    def take(self: Images, index: Tensor | slice) -> Images:
        taken = record(self, index)
        if isinstance(index, Tensor) and len(index) in (6, 12):
            seen[(len(index), "", len(seen))] = {image.numpy().tobytes() for image in taken.pixels}
        return taken

    monkeypatch.setattr(Images, "take", take)
    compared(ghn_dir, config=dataclasses.replace(TINY, seeds=1, rates=(0.1,), steps=1))
    small = [images for (count, *_), images in seen.items() if count == 6]
    large = [images for (count, *_), images in seen.items() if count == 12]
    assert len(small) == len(large) == 4
    assert all(few == small[0] and many == large[0] for few, many in zip(small, large, strict=True))
    assert small[0] < large[0]


def test_a_training_that_diverges_counts_as_nothing_learned(ghn_dir: Path) -> None:
    config = dataclasses.replace(TINY, shots=(3,), rates=(1e30,), seeds=2, starts=())
    (row,), _ = compared(ghn_dir, config=config)
    assert (row.diverged, row.mean, row.start) == (2, 0.0, "default")


def test_one_seed_has_no_interval(ghn_dir: Path) -> None:
    rows, _ = compared(ghn_dir, config=dataclasses.replace(TINY, shots=(3,), seeds=1, rates=(0.1,)))
    assert all(math.isnan(row.interval) for row in rows)
    assert json.loads(json.dumps(rows[0].to_dict()))["interval"] is None
    assert not rows[0].at_edge


@pytest.mark.parametrize(
    ("n", "quantile"), [(2, 12.7062), (5, 2.7764), (11, 2.2281), (12, 2.2010), (31, 2.0423), (1001, 1.9623)]
)
def test_the_interval_is_that_of_students_t(n: int, quantile: float) -> None:
    """Quantiles as printed in tables."""
    values = [0.0, 2.0] * (n // 2) + [1.0] * (n % 2)
    expected = quantile * float(np.std(values, ddof=1)) / math.sqrt(n)
    assert interval(values) == pytest.approx(expected, rel=2e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"build": lambda: Net(5)},
            r"network: outputs of shape \(2, 5\) for two images in evaluation mode; expected .* \(2, 2\)",
        ),
        ({"build": lambda: Said(tuple)}, "network: outputs that are a tuple for two images in training mode"),
        (
            {"build": lambda: Said(nothing)},
            r"network: cannot be run on images of shape \(2, 3, 8, 8\) \(KeyError: 'images'\)",
        ),
        (
            {"build": lambda: Net(2).requires_grad_(False)},
            "network: none of its parameters has requires_grad",
        ),
        (
            {"config": dataclasses.replace(TINY, shots=(30,))},
            r"class red has 1\d training images .* least 30",
        ),
    ],
)
def test_networks_and_images_that_do_not_fit_are_refused(
    ghn_dir: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(TrainingError, match=message):
        compared(ghn_dir, **options)


def test_test_images_of_other_classes_are_refused(ghn_dir: Path) -> None:
    other = dataclasses.replace(images(20), classes=("red", "green"))
    with pytest.raises(TrainingError, match=r"2 classes .* and 2 of test images .* expected the same"):
        transfer(Net, images(40), other, TINY, weights=ghn_dir)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shots": ()}, "shots"), ({"shots": (0,)}, "shots"), ({"starts": ("best",)}, r"starts \['best'\]"),
        ({"rates": (0.1, -1.0)}, "rates"), ({"optimizer": "lion"}, "optimizer"), ({"seeds": 0}, "seeds=0"),
        ({"batch_size": 1}, "batch_size=1"), ({"seeds": "5"}, "seeds='5'; expected a whole number"),
        ({"shots": (2.5,)}, "shots"),
    ],
)  # fmt: skip
def test_impossible_comparisons_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"transfer: {message}"):
        TransferConfig(**changes)


def test_files_of_something_else_are_refused(ghn_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "other.jsonl"
    add_record(file, {"step": 1})
    with pytest.raises(TrainingError, match=r"other\.jsonl: not a file of transfers"):
        compared(ghn_dir, file=file)
    file.write_text("[1]\n")
    with pytest.raises(TrainingError, match="expected a JSON object in every line"):
        read_records(file)
    file.write_text("no json\n")
    with pytest.raises(TrainingError, match="not a file of JSON lines"):
        read_records(file)
    with pytest.raises(TrainingError, match="cannot be written"):
        add_record(tmp_path / "nowhere" / "runs.jsonl", {})


# The command

MODEL = """
from torch import nn

def make(classes: int = 2) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, classes),
    )

instance = make()
"""
LENGTH = ("--steps", "2", "--seeds", "2", "--batch", "4", "--rate", "0.1", "--start", "predicted")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, with a model and images."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.py").write_text(MODEL)
    arrays = {}
    for split, of in (("train", images(40)), ("test", images(20, seed=1))):
        arrays |= {
            f"{split}_images": of.pixels.permute(0, 2, 3, 1).numpy(),
            f"{split}_labels": of.labels.numpy(),
        }
    np.savez(tmp_path / "data.npz", **arrays)
    return tmp_path


def test_the_command_prints_a_table_or_json_lines_and_goes_on(folder: Path, ghn_dir: Path) -> None:
    command = [
        "transfer", "data.npz", "--network", "model.py:make", "--set", "classes=2", "--shots", "2", "4",
        *LENGTH, "--weights", str(ghn_dir), "-o", "runs.jsonl",
    ]  # fmt: skip
    shown = CliRunner().invoke(app, command, env={"COLUMNS": "160"})
    assert shown.exit_code == 0, shown.output
    assert [line.split()[1:4] for line in shown.stdout.splitlines() if "predicted" in line] == [
        ["2", "│", "predicted"], ["4", "│", "predicted"],
    ]  # fmt: skip
    kept = (folder / "runs.jsonl").read_text()
    told = CliRunner().invoke(app, [*command, "--json"])
    rows = [json.loads(line) for line in told.stdout.splitlines()]
    assert [(row["shots"], row["start"], row["n"]) for row in rows] == [
        (shots, start, 2) for shots in (2, 4) for start in ("default", "predicted")
    ]
    assert (folder / "runs.jsonl").read_text() == kept
    assert kept.count("\n") == 8


def test_the_command_trains_an_instance_from_the_same_values_every_time(folder: Path, ghn_dir: Path) -> None:
    """The module that holds it is imported once, so that it has to be copied."""
    package = folder / "package"
    package.mkdir()
    (package / "__init__.py").write_text(MODEL)
    command = [
        "transfer", "data.npz", "--network", "package:instance", "--shots", "4", *LENGTH, "--weights",
        str(ghn_dir), "--json",
    ]  # fmt: skip
    first, second = (CliRunner().invoke(app, command).stdout for _ in range(2))
    assert first == second
    assert first.count("\n") == 2


def test_the_command_refuses_numbers_that_stand_alone(folder: Path) -> None:
    done = CliRunner().invoke(app, ["transfer", "data.npz", "10", "--network", "model.py:make"])
    assert done.exit_code == 2
    assert "write --shots 10" in " ".join(done.output.split())
