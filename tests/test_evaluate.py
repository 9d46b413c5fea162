"""Evaluation: accuracy of predicted networks, kept network by network, measured in several processes."""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from ghn_init import GHN, GHNConfig
from ghn_init._errors import ArchitectureError, TrainingError
from ghn_init.cli import app
from ghn_init.cli._values import seconds
from ghn_init.deepnets import Architecture, DeepNets1M
from ghn_init.training import Score, evaluate
from ghn_init.training._pool import run_all
from ghn_init.training._results import Results, table
from ghn_init.training.data import CIFAR10
from ghn_init.training.evaluate import Case, Measure
from training_runs import TINY_GHN, random_images

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def ghn() -> GHN:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(1)
        return GHN(GHNConfig.from_dict(TINY_GHN)).eval()


def test_a_score_is_mean_error_and_best() -> None:
    score = Score.of("test", [10.0, 20.0, 60.0], 640, 0.08)
    assert (score.n, score.mean, score.maximum) == (3, 30.0, 60.0)
    assert score.standard_error == pytest.approx(np.std([10, 20, 60], ddof=1) / math.sqrt(3))
    assert Score.of("vit", [11.4], 640, 0.0).standard_error == 0
    assert score.to_dict()["accuracies"] == [10.0, 20.0, 60.0]
    assert score.image_error == 0


def test_measuring_on_some_images_has_an_error() -> None:
    """For one network whose hits are known: the spread of its accuracy over samples of the images."""
    hits = np.arange(1_000) < 300
    rng = np.random.default_rng(0)
    found = [100 * rng.choice(hits, 200, replace=False).mean() for _ in range(4_000)]
    assert Score.of("vit", [30.0], 200, 0.0, available=1_000).image_error == pytest.approx(
        np.std(found), rel=0.05
    )
    assert Score.of("vit", [30.0], 1_000, 0.0, available=1_000).image_error == 0


def test_evaluate_measures_the_first_networks_of_a_split(ghn: GHN) -> None:
    images = random_images(16, size=32)
    score = evaluate(ghn, "test", images, n=2, images=10)
    assert (score.split, score.n, score.images, score.noise) == ("test", 2, 10, 0.0)
    assert all(0 <= value <= 100 and value % 10 == pytest.approx(0) for value in score.accuracies)
    assert score.mean == pytest.approx(sum(score.accuracies) / 2)
    assert evaluate(ghn, "test", images, n=2, images=10) == score


def test_accuracy_is_that_of_the_network(ghn: GHN) -> None:
    class Fixed(torch.nn.Module):
        """Answers with the class that the red channel's first pixel says."""

        def __init__(self) -> None:
            super().__init__()
            self.fc = torch.nn.Linear(3, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen.append(x)
            return self.fc(x.mean((2, 3)))

        seen: list[torch.Tensor] = []  # noqa: RUF012 (of this one test)

    images = random_images(130, size=8)
    measure = Measure(ghn, images)
    with torch.device("meta"):
        network = Fixed()
    found = measure(network)
    batches = [x for x in Fixed.seen if not x.is_meta and x.shape[0] > 1]
    assert [len(x) for x in batches] == [64, 64, 2]
    logits = torch.cat([network.fc(x.mean((2, 3))) for x in batches])
    labels = torch.cat([y for _, y in measure.batches()])
    assert found == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item())


def test_a_single_image_is_no_batch(ghn: GHN) -> None:
    sizes = [len(y) for _, y in Measure(ghn, random_images(129, size=8)).batches()]
    assert sizes == [64, 65]
    with pytest.raises(TrainingError, match="at least 2 images"):
        Measure(ghn, random_images(40, size=8), images=1)


def test_networks_may_see_images_of_half_the_size(ghn: GHN) -> None:
    measure = Measure(ghn, random_images(8, size=16), image_size=8)
    assert measure.batches()[0][0].shape == (8, 3, 8, 8)
    assert 0 <= measure(Case("val", 0)) <= 100
    with pytest.raises(TrainingError, match="image_size=5 and images of 16 pixels; expected that or half"):
        Measure(ghn, random_images(8, size=16), image_size=5)


def test_noise_has_its_deviation_on_pixels(ghn: GHN) -> None:
    measure = Measure(ghn, random_images(64, size=16))
    (clean, _), (noisy, _) = measure.batches()[0], measure.batches(0.08)[0]
    std = torch.tensor(measure.normalise.std).view(1, 3, 1, 1)
    torch.testing.assert_close(((noisy - clean) * std).std().item(), 0.08, rtol=0.02, atol=0)


def test_the_predefined_networks_are_splits_of_one() -> None:
    (resnet,), (vit,) = Case.of("resnet50", 50), Case.of("vit")
    parameters = sum(p.numel() for p in resnet.build(10, 32).parameters())
    assert parameters == 23_520_842  # torchvision's with a 3 x 3 stem and ten classes
    assert vit.build(10, 32).__class__ is not resnet.build(10, 32).__class__
    assert [network.index for network in Case.of("deep", 3)] == [0, 1, 2]
    with pytest.raises(
        ArchitectureError, match=r"no split 'nothing'; expected one of train, .*test, .*resnet50, vit"
    ):
        Case.of("nothing")


def test_classes_have_to_fit(ghn: GHN) -> None:
    with pytest.raises(TrainingError, match="4 classes; the GHN predicts 10"):
        Measure(ghn, random_images(8, classes=4))


def test_results_are_kept_and_taken_over(ghn: GHN, tmp_path: Path) -> None:
    measure, path = Measure(ghn, random_images(8)), tmp_path / "new" / "results.json"
    results = Results(measure, path, "mine")
    networks = [*Case.of("test", 3), Case("vit", 0, 0.08)]
    for network, accuracy in zip(networks, (10.0, 20.0, 60.0, 12.5), strict=True):
        assert network not in results
        results.add(network, accuracy)
        kept = Results(measure, path)
        assert network in kept
        assert kept.scores() == results.scores()
    saved = json.loads(path.read_text())
    assert (saved["weights"], saved["images"], saved["precision"]) == ("mine", 8, "float32")
    assert [score["split"] for score in saved["scores"]] == ["test", "vit"]
    assert saved["scores"][0]["accuracies"] == {"0": 10.0, "1": 20.0, "2": 60.0}
    assert (saved["scores"][0]["mean"], saved["scores"][1]["noise"]) == (30.0, 0.08)
    assert not [file for file in path.parent.iterdir() if file != path]


def test_results_of_something_else_are_refused(ghn: GHN, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    Results(Measure(ghn, random_images(8)), path).write()
    other = GHN(ghn.config)
    with pytest.raises(
        TrainingError, match="results of other weights_digest, images, images_digest, precision"
    ):
        Results(Measure(other, random_images(9), precision=torch.bfloat16), path)
    with pytest.raises(TrainingError, match="results of other images_digest; give another file"):
        Results(Measure(ghn, random_images(8, seed=3)), path)
    with pytest.raises(TrainingError, match="results of other images_digest; give another file"):
        Results(Measure(ghn, random_images(8), normalise=CIFAR10), path)
    path.write_text('{"some": "json"}')
    with pytest.raises(TrainingError, match="not a file of results"):
        Results(Measure(ghn, random_images(8)), path)


def test_the_table_has_published_figures_beside_ours() -> None:
    scores = [Score.of("test", [50.0, 60.0], 100, 0.0), Score.of("vit", [9.0], 100, 0.08, available=200)]
    lines = table(scores).splitlines()
    assert lines[2] == "| test | 2 | 100 | 0 | 55.0 ± 5.0 | 60.0 | 66.9 |"
    assert lines[3] == "| vit | 1 | 100 | 0.08 | 9.0 ± 2.0 (images) | 9.0 | - |"


def test_processes_measure_what_one_does(ghn: GHN) -> None:
    measure = Measure(ghn, random_images(8, size=32))
    networks = [*Case.of("test", 2), Case("vit", 0)]
    alone = dict(run_all(measure, networks, workers=1))
    assert dict(run_all(measure, networks, workers=2)) == alone


def test_a_process_that_dies_is_told(ghn: GHN) -> None:
    measure = Measure(ghn, random_images(8, size=32))
    measure.normalise = Deadly()  # type: ignore[assignment]
    with pytest.raises(TrainingError, match="a process that measures networks died"):
        list(run_all(measure, Case.of("test", 2), workers=2))


class Deadly:
    """Ends the process that unpickles it."""

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os._exit, (1,)


def as_file(path: Path, size: int, classes: int = 10) -> Path:
    """Images of both splits in an .npz."""
    arrays: dict[str, Any] = {"classes": np.array([f"class{number}" for number in range(classes)])}
    for split, count in (("train", 20), ("test", 8)):
        images = random_images(count, size, classes)
        arrays[f"{split}_images"] = images.pixels.permute(0, 2, 3, 1).numpy()
        arrays[f"{split}_labels"] = images.labels.numpy()
    np.savez(path, **arrays)
    return path


def test_networks_that_take_no_images_of_this_size_are_passed_over(
    ghn: GHN, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, unfit = Case.fitting("test", 28, 3)
    assert [network.index for network in taken] == [
        index for index in range(taken[-1].index + 1) if DeepNets1M("test")[index].supports(28)
    ]
    assert unfit == taken[-1].index + 1 - len(taken) > 0
    assert Case.fitting("test", 32, 3) == (Case.of("test", 3), 0)
    assert evaluate(ghn, "test", random_images(8, 28), n=1).n == 1
    with monkeypatch.context() as patch:
        patch.setattr(Architecture, "supports", lambda *_: False)
        with pytest.raises(TrainingError, match="no network of val takes images of 28 x 28 pixels"):
            evaluate(ghn, "val", random_images(8, 28))
    ghn.save_pretrained(tmp_path / "ghn")
    arguments = ["evaluate", str(tmp_path / "ghn"), "--data", str(as_file(tmp_path / "set.npz", 28))]
    arguments += ["--split", "test", "--split", "resnet50", "--sample", "2", "--workers", "1", "--bf16"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert re.search(r"test: \d+ networks take no images of this size, and are passed over", done.stderr)
    assert "| test | 2 | 8 |" in done.stdout
    assert "| resnet50 | 1 | 8 |" in done.stdout


def test_the_command_skips_what_the_file_has(ghn: GHN, tmp_path: Path) -> None:
    weights, data, output = tmp_path / "ghn", tmp_path / "set.npz", tmp_path / "results.json"
    ghn.save_pretrained(weights)
    as_file(data, 32)
    arguments = ["evaluate", str(weights), "--data", str(data), "--workers", "1", "-o", str(output)]
    arguments += ["--split", "test", "--bf16"]
    done = CliRunner().invoke(app, [*arguments, "--sample", "1"])
    assert done.exit_code == 0, done.output
    saved = json.loads(output.read_text())
    saved["scores"][0]["accuracies"]["0"] = 99.0  # as if it had been measured
    output.write_text(json.dumps(saved))
    done = CliRunner().invoke(app, [*arguments, "--sample", "2"])
    assert done.exit_code == 0, done.output
    (score,) = json.loads(output.read_text())["scores"]
    assert score["n"] == 2
    assert score["accuracies"]["0"] == 99.0
    assert f"| test | 2 | 8 | 0 | {score['mean']:.1f} ±" in done.stdout


def test_the_command_measures_published_files_under_noise(shared: Path, tmp_path: Path) -> None:
    arrays: dict[str, Any] = {"classes": np.array([f"class{i}" for i in range(10)])}
    for split, images in (("train", random_images(20, 32)), ("test", random_images(16, 32, seed=1))):
        arrays[f"{split}_images"] = images.pixels.permute(0, 2, 3, 1).numpy()
        arrays[f"{split}_labels"] = images.labels.numpy()
    np.savez(tmp_path / "set.npz", **arrays)
    arguments = ["evaluate", str(shared / "parity" / "ghn2_cifar10_random.pt")]
    arguments += ["--data", str(tmp_path / "set.npz"), "--split", "vit", "--split", "resnet50", "--noise"]
    done = CliRunner().invoke(app, [*arguments, "--images", "8", "--bf16", "--workers", "1"])
    assert done.exit_code == 0, done.output
    rows = [[cell.strip() for cell in line.split("|")] for line in done.stdout.splitlines()[2:]]
    assert [row[1:5] for row in rows] == [
        [split, "1", "8", noise] for split in ("resnet50", "vit") for noise in ("0", "0.08")
    ]
    assert [row[7] for row in rows] == ["58.6", "-", "11.4", "-"]


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("train", ("--time-limit", "--set", "--steps", "--from", "--tensorboard")),
        ("curve", ("--output",)),
        ("evaluate", ("--sample", "--bf16", "--workers", "--noise")),
    ],
)
def test_commands_explain_themselves(command: str, options: tuple[str, ...]) -> None:
    done = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "160", "NO_COLOR": "1"})
    assert done.exit_code == 0
    assert all(option in done.stdout for option in options)


def test_lengths_of_time_become_seconds() -> None:
    import typer

    assert [seconds(text) for text in ("90", "90s", "30m", "2h")] == [90, 90, 1800, 7200]
    for text in ("soon", "nan", "inf", "1e400h", "-5s", "infm", ""):
        with pytest.raises(typer.BadParameter, match="is no length of time"):
            seconds(text)
