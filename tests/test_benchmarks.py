"""The benchmarks are commands that run."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ghn_init import GHN, GHNConfig, load
from ghn_init.training.data import CIFAR10, Images

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"

pytestmark = pytest.mark.source


def run(*arguments: str, script: str = "predict.py") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", str(BENCHMARKS / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def test_predict_measures_a_model(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    chosen = ("--models", "squeezenet1_1", "--weights", "random", "--repeats", "1", "--threads", "1")
    done = run(*chosen, "--json", str(report))
    assert done.returncode == 0, done.stderr
    assert "geometric mean" in done.stdout
    (result,) = json.loads(report.read_text())["results"]
    assert result["model"] == "squeezenet1_1"
    assert result["parameters"] == 1_235_496
    assert all(result[key] > 0 for key in result if key.endswith("_ms"))


def test_predict_refuses_unknown_models() -> None:
    done = run("--models", "resnet9000")
    assert done.returncode == 1
    assert "no torchvision classification model matches resnet9000" in done.stderr


def test_an_interrupted_survey_of_the_zoos_goes_on(tmp_path: Path) -> None:
    survey, times = tmp_path / "zoo.jsonl", tmp_path / "times.jsonl"
    chosen = ("--zoo", "torchvision", "--threads", "1", "--only")
    first = run("survey", str(survey), *chosen, "squeezenet1_1", script="zoo.py")
    assert first.returncode == 0, first.stderr
    (record,) = map(json.loads, survey.read_text().splitlines())
    assert (record["status"], record["path"], record["input"]) == (
        "planned",
        "first layer",
        "(1, 3, 224, 224)",
    )
    assert 0 < record["trace_ms"] < record["plan_ms"]
    with survey.open("a") as file:
        file.write('{"zoo": "torchvision", "na')
    second = run("survey", str(survey), *chosen, "squeezenet1_*", script="zoo.py")
    assert second.returncode == 0, second.stderr
    assert [line.split()[1] for line in second.stdout.splitlines()] == ["squeezenet1_0"]
    records = [json.loads(line) for line in survey.read_text().splitlines()]
    assert [record["name"] for record in records] == ["squeezenet1_1", "squeezenet1_0"]
    timed = run("time", str(times), *chosen, "squeezenet1_1", script="zoo.py")
    assert timed.returncode == 0, timed.stderr
    report = run("report", str(survey), str(times), script="zoo.py").stdout
    assert "| torchvision | 2, a sample of 121 | 2 | 0 | 0 | 0 |" in report
    assert "| torchvision | first layer | 2 | (1, 3, 224, 224) of squeezenet1_1 |" in report
    assert "| squeezenet1_1 |" in report[report.index("## Speed") :]


def test_to_disk_measures_and_cleans_up(tmp_path: Path) -> None:
    size = ("--layers", "1", "--width", "128", "--hidden", "256", "--max-shard-size", "10MB")
    command = [
        sys.executable,
        "-W",
        "ignore",
        str(BENCHMARKS / "to_disk.py"),
        "--folder",
        str(tmp_path / "out"),
    ]
    done = subprocess.run([*command, *size], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["parameters"] == 2 * 32_000 * 128 + 4 * 128 * 128 + 3 * 128 * 256 + 3 * 128
    assert report["files"] == 2
    assert 0 <= report["extra_mb"] < 300  # a network so small may need no more than was there
    assert list(tmp_path.iterdir()) == []


def test_familiarity_measures_networks_of_every_kind(tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (64, 8, 8, 3), generator=rng, dtype=torch.uint8).numpy()
    labels = (torch.arange(64) % 10).numpy()
    data = tmp_path / "data.npz"
    np.savez(data, train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    command = [sys.executable, "-W", "ignore", str(BENCHMARKS / "familiarity.py"), str(data)]
    sizes = ("--images", "64", "--sample", "1", "--max-params", "0")
    done = subprocess.run([*command, *sizes], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines()[2:]]
    groups = [row[0].removeprefix("| DeepNets-1M ") for row in rows]
    assert groups == [
        "test, batch norm",
        "deep, batch norm",
        "bnfree, no norm",
        "resnet50, batch norm",
        "vit, layer norm",
    ]
    assert all(row[1] == "1" and 0 <= float(row[2]) <= 100 for row in rows)


def finished_run(folder: Path, accuracies: list[float], **settings: object) -> Path:
    config = {"ghn": {"hid": 32}, "seed": 1, "lr": 1e-3} | settings
    lines = [
        {"step": 600, "loss": 2.3, "accuracy": 0.1, "done": 0.5},
        {"step": 1100, "loss": 1.5, "accuracy": accuracies[0] / 100, "done": 0.95},
        {"step": 1150, "loss": None, "accuracy": 0.2, "done": 0.98},
        {"validation": 0.0, "accuracies": accuracies},
    ]
    (folder / "ghn").mkdir(parents=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    figures = {"config": config, "steps": 1200, "networks": 2400, "seconds": 600.0}
    (folder / "ghn" / "training.json").write_text(json.dumps(figures))
    return folder


def test_recipes_are_compared_network_by_network(tmp_path: Path) -> None:
    base = finished_run(tmp_path / "base", [30.0, 40.0, 50.0])
    other = finished_run(tmp_path / "other", [32.0, 42.0, 55.0], lr=3e-3, ghn={"hid": 64})
    done = run(str(base), str(other), script="recipes.py")
    assert done.returncode == 0, done.stderr
    _, _, first, second = done.stdout.splitlines()
    assert first == "| as above | 1,200 | 2,400 | 1.50, 30.0 % | 40.0 ± 5.8, 40.0 |  |  |"
    assert second == (
        "| `ghn.hid=64`, `lr=0.003` | 1,200 | 2,400 | 1.50, 32.0 % | 43.0 ± 6.7, 42.0 "
        "| +3.0 ± 1.0 | +2.0 ± 0.0 |"
    )

    another = finished_run(tmp_path / "another", [32.0, 42.0, 55.0], seed=2)
    assert run(str(base), str(another), script="recipes.py").stdout.endswith("| +3.0 ± 1.0 |  |\n")


def test_recipes_need_finished_runs_on_the_same_networks(tmp_path: Path) -> None:
    base = finished_run(tmp_path / "base", [30.0, 40.0])
    fewer = finished_run(tmp_path / "fewer", [30.0])
    assert (
        "fewer: validated on 1 networks; expected 2" in run(str(base), str(fewer), script="recipes.py").stderr
    )
    assert "no finished run" in run(str(tmp_path), script="recipes.py").stderr


def labelled_images(path: Path) -> Path:
    """64 images of 8 x 8 pixels whose brightness tells the class."""
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(64) % 10
    noise = torch.randint(0, 30, (64, 8, 8, 3), generator=rng)
    images = (22 * labels[:, None, None, None] + noise).to(torch.uint8).numpy()
    data = {f"{split}_{of}": it for split in ("train", "test") for of, it in
            (("images", images), ("labels", labels.numpy()))}  # fmt: skip
    np.savez(path, **data)  # pyright: ignore[reportArgumentType]
    return path


TINY = ("--steps", "4", "--batch", "8", "--size", "8", "--rates", "1", "--optimizers", "adamw")


def test_starting_points_are_compared_and_the_comparison_goes_on(tmp_path: Path) -> None:
    data, file, curves = labelled_images(tmp_path / "data.npz"), tmp_path / "runs.jsonl", tmp_path / "c.svg"
    panel = ("--networks", "plain-cnn", "autoencoder", "gpt-tied")
    done = run(str(data), str(file), *TINY, *panel, "--seeds", "1", script="starting_point.py")
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in file.read_text().splitlines()]
    mine = [record for record in records if record["setting"]["start"] == "predicted"]
    assert [record["setting"]["network"] for record in mine] == ["plain-cnn", "autoencoder", "gpt-tied"]
    assert all(len(record["losses"]) == 4 and record["output"] > 0 for record in records)
    rows = [line for line in done.stdout.splitlines() if line.startswith("| plain-cnn | adamw")]
    assert len(rows) == 1
    assert "geometric mean, best to best" in done.stdout

    with file.open("a") as cut:
        cut.write('{"setting": {"netw')
    chosen = (str(data), str(file), *TINY, *panel[:2])
    more = run(*chosen, "--seeds", "2", "--draw", str(curves), script="starting_point.py")
    assert more.returncode == 0, more.stderr
    again = [json.loads(line) for line in file.read_text().splitlines()]
    assert again[: len(records)] == records
    settings = [record["setting"] for record in again[len(records) :]]
    added = [(setting["network"], setting["start"], setting["seed"]) for setting in settings]
    assert added == [("plain-cnn", "default", 1), ("plain-cnn", "predicted", 1)]
    assert curves.read_text().count("plain-cnn") == 1

    told = run(*chosen, "--seeds", "2", "--minutes", "0", script="starting_point.py")
    assert told.stdout == more.stdout
    assert file.read_text().count("\n") == len(again)

    longer = (*chosen, "--seeds", "1", "--steps", "6", "--search-steps", "4")
    assert run(*longer, script="starting_point.py").returncode == 0
    last = [json.loads(line)["setting"] for line in file.read_text().splitlines()[len(again) :]]
    assert [(setting["start"], setting["steps"]) for setting in last] == [("default", 6), ("predicted", 6)]

    worst = max(
        (r for r in records if r["setting"]["network"] == "plain-cnn"), key=lambda r: sum(r["losses"])
    )
    file.write_text(
        json.dumps(worst | {"setting": worst["setting"] | {"start": "default", "weights": ""}}) + "\n"
    )
    searched = run(*chosen, "--seeds", "1", "--no-search", script="starting_point.py")
    assert searched.returncode == 0, searched.stderr
    _, told = (json.loads(line)["setting"] for line in file.read_text().splitlines())
    assert (told["start"], told["power"]) == ("predicted", worst["setting"]["power"])


def test_starting_points_are_computed_from_known_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    point, report, panel = (
        importlib.import_module(f"starting_{name}") for name in ("point", "report", "panel")
    )

    def training(start: str, power: int, seed: int, *losses: float, output: float = 1.0) -> object:
        setting = point.Setting("vgg", start, "sgd", power, seed, 2, 8, 8, "")
        return point.Training(setting, losses, 50.0, output)

    large, nan = 50.0, float("nan")
    trainings = [
        training("default", 0, 0, 2.0, 2.0), training("default", 1, 0, 1.0, 1.0),
        training("default", 2, 0, 9.0), training("default", 1, 1, 1.0, 2.0),
        training("predicted", 0, 0, 1.0, 1.0, output=large),
        training("predicted", 1, 1, 1.0, 2.0, output=large),
        training("predicted", 1, 0, 3.0, nan, output=large), training("predicted", 2, 0, 1.0, 1.0),
    ]  # fmt: skip
    members = [member for member in panel.PANEL if member.name == "vgg"]
    (found,) = report.compared(trainings, members, "predicted")
    assert found.best == pytest.approx(0.06)
    # a diverged seed beside a whole one has an infinite median; rates that suit no default start do not count
    assert found.ratios == {0.02: 0.5, found.best: float("inf")}
    assert found.at_best == pytest.approx(1.0 / 1.0)  # of the seed that both best rates have
    assert found.output == large
    text = report.report(trainings, members)
    assert "diverged where the default start did not: vgg (sgd)" in text
    assert "farther than a factor of 10 from the default start's: vgg" in text


def test_what_comes_of_a_network_in_which_nothing_is_predicted_is_known(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    point = importlib.import_module("starting_point")
    data = labelled_images(tmp_path / "data.npz")
    bench = point.Bench(point._parser().parse_args([str(data), str(tmp_path / "runs.jsonl"), *TINY]), [])
    names = ("gpt-tied", "plain-cnn")
    own = {name: bench.train(bench.setting(name, "default", "adamw", 0, 0)) for name in names}

    def trained(*_: object) -> None:
        raise RuntimeError("it is trained")

    monkeypatch.setattr(point, "_losses", trained)
    found = bench.train(bench.setting("gpt-tied", "predicted", "adamw", 0, 0))
    assert (found.losses, found.quality) == (own["gpt-tied"].losses, own["gpt-tied"].quality)
    with pytest.raises(RuntimeError, match="it is trained"):
        bench.train(bench.setting("plain-cnn", "predicted", "adamw", 0, 0))


SECOND = (
    "mlp", "discriminator", "residual", "super-resolution", "denoiser", "vae", "preactivated", "convmixer",
    "video", "audio", "pyramid", "generator", "diffusion", "mixer", "language",
)  # fmt: skip
THIRD = {
    "number": 0.34, "rotation": 0.5, "brightness": 0.01, "steering": 0.34, "actions": 0.7, "siamese": 0.05,
    "triplets": 0.11, "unnormalised": 2.3, "late-norms": 2.4, "flat-norm": 2.4, "biased": 2.4,
    "group-norms": 2.4, "grey": 2.4, "grey-plain": 2.4,
}  # fmt: skip
"""Loss of the third panel's networks at the start, about: of noise, with an image of each class."""


FOURTH = (
    "mobile", "inverted", "aggregated", "sloped", "unshuffled", "scores-pooled", "flat", "flat-hidden",
)  # fmt: skip


@pytest.mark.parametrize(
    "name", ["small-resnet", "vit", "unet", "segformer", "lstm", "deepnets-bn", *SECOND, *THIRD, *FOURTH]
)
def test_networks_of_the_panels_start_at_the_loss_of_guessing(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    panel = importlib.import_module("starting_panel")
    point = importlib.import_module("starting_point")
    (member,) = (member for member in point.MEMBERS if member.name == name)
    assert {member.name for member in point.MEMBERS} >= {*SECOND, *THIRD, *FOURTH}
    size = max(32, member.enlarged)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (8, 3, 32, 32), generator=generator, dtype=torch.uint8)
    task = panel.Task(member.kind, Images(pixels, torch.arange(8), tuple("0123456789")), CIFAR10, size)
    x, y = task.batch(torch.arange(8), generator)
    torch.manual_seed(0)
    loss = task.loss(member.build(size)(x), y).item()
    usual = {"classify": math.log(10), "segment": math.log(8), "restore": 1.3, "next pixel": math.log(32)}
    guessed = THIRD.get(name) or usual[member.kind]
    assert 0.5 * guessed < loss < 1.7 * guessed


def test_an_average_has_the_mean_of_the_parameters(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ghns = [GHN(GHNConfig.mlp()) for _ in range(3)]
    for number, ghn in enumerate(ghns):
        ghn.save_pretrained(tmp_path / str(number))
    folders = [str(tmp_path / str(number)) for number in range(3)]
    done = run(*folders, "-o", str(tmp_path / "mean"), script="average.py")
    assert done.returncode == 0, done.stderr
    for name, value in load(tmp_path / "mean").named_parameters():
        expected = sum(ghn.get_parameter(name) for ghn in ghns) / 3
        torch.testing.assert_close(value, expected)


def test_weights_are_validated_as_their_training_does(tmp_path: Path) -> None:
    weights = tmp_path / "ghn"
    GHN(GHNConfig(hid=8, max_shape=(16, 16, 11, 11))).save_pretrained(weights)
    images = labelled_images(tmp_path / "set.npz")
    done = run(
        str(images), str(weights), str(weights), "--networks", "1", "--images", "4", script="validate.py"
    )
    assert done.returncode == 0, done.stderr
    first, second = map(json.loads, done.stdout.splitlines())
    assert first == second
    assert first["weights"] == str(weights)
    assert 0 <= first["validation"] <= 100


def test_ghns_of_different_configurations_have_no_average(tmp_path: Path) -> None:
    GHN(GHNConfig.mlp()).save_pretrained(tmp_path / "a")
    GHN(GHNConfig.mlp(hid=8)).save_pretrained(tmp_path / "b")
    done = run(str(tmp_path / "a"), str(tmp_path / "b"), "-o", str(tmp_path / "mean"), script="average.py")
    assert done.returncode == 1
    assert "different configurations" in done.stderr
    assert not (tmp_path / "mean").exists()


def test_the_noise_of_gradients_is_told_by_its_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    noise = importlib.import_module("gradient_noise")
    rng = torch.Generator().manual_seed(0)

    def drawn(variance: float, *shape: int) -> torch.Tensor:
        """Vectors of that squared length, about."""
        return (variance / 4000) ** 0.5 * torch.randn(*shape, 4000, generator=rng)

    gradients = drawn(2, 1, 1) + drawn(4, 40, 1) + drawn(8, 1, 12) + drawn(16, 40, 12)
    found = noise.parts(noise.products_of(list(gradients)))
    assert found == pytest.approx((2, 4, 8, 16), rel=0.1)
    assert found.of_a_step(2, 1) == pytest.approx(18, rel=0.1)
    assert found.of_a_step(2, 2) == pytest.approx(14, rel=0.1)


def test_the_noise_of_a_real_gradient_is_measured(tmp_path: Path) -> None:
    weights = tmp_path / "ghn"
    GHN(GHNConfig(hid=8, max_shape=(16, 16, 11, 11))).save_pretrained(weights)
    arrays = dict(np.load(labelled_images(tmp_path / "set.npz")))
    more = {f"train_{of}": np.repeat(arrays[f"train_{of}"], 80, 0) for of in ("images", "labels")}
    np.savez(tmp_path / "set.npz", **(arrays | more))  # pyright: ignore[reportArgumentType]
    chosen = ("--networks", "3", "--batches", "2", "--set", "batch_size=4", "--set", "max_params=0.5")
    data = str(tmp_path / "set.npz")
    done = run(data, "--weights", str(weights), *chosen, script="gradient_noise.py")
    assert done.returncode == 0, done.stderr
    assert "3 networks, 2 batches of 4 images" in done.stdout
    assert "two networks, images of their own: " in done.stdout
