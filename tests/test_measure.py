"""Architectures measured on images: what is measured, and the file that it goes to."""

from __future__ import annotations

import dataclasses
import json
import math
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

from ghn_init import GHN, GHNConfig
from ghn_init._errors import ArchitectureError, ConfigError, TrainingError
from ghn_init.cli import app
from ghn_init.deepnets import Architecture, Genotype
from ghn_init.search import (
    Candidate,
    Header,
    Measurement,
    MeasurementFile,
    Measurer,
    Recipe,
    candidates,
    measure,
    read_records,
)
from ghn_init.search._measure import train
from training_runs import TINY_GHN, random_images

if TYPE_CHECKING:
    from pathlib import Path

EDGES = (("sep_conv_3x3", 0), ("conv_1x1", 1))
SMALL = Architecture(Genotype(EDGES, (2,), EDGES, (2,)), n_cells=3, C=8)
RECIPE = Recipe(steps=3, batch_size=8, images=16, image_size=16, target=1.0)


@pytest.fixture(scope="module")
def ghn() -> GHN:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(1)
        return GHN(GHNConfig.from_dict(TINY_GHN)).eval()


@pytest.fixture(scope="module")
def measurer(ghn: GHN) -> Measurer:
    return Measurer(ghn, random_images(48), random_images(32, seed=1), RECIPE)


def test_training_is_that_of_plain_torch(measurer: Measurer) -> None:
    """torch's own layers, optimizer and schedule give the same parameters after three steps."""
    torch.manual_seed(RECIPE.seed)
    plain = SMALL.build(10, 16).train()
    optimizer = torch.optim.SGD(plain.parameters(), lr=RECIPE.lr, momentum=0.9, weight_decay=3e-4)
    losses = []
    for step in range(RECIPE.steps):
        optimizer.param_groups[0]["lr"] = RECIPE.lr * (1 + math.cos(math.pi * step / RECIPE.steps)) / 2
        x, labels = measurer.batch(step)
        loss = F.cross_entropy(plain(x), labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 5.0)
        optimizer.step()
        losses.append(loss.item())
    torch.manual_seed(RECIPE.seed)
    network = SMALL.build(10, 16)
    _, loss = train(network, measurer)
    assert loss == pytest.approx(np.mean(losses), rel=1e-5)
    trained = dict(network.named_parameters())
    for name, values in plain.named_parameters():
        torch.testing.assert_close(trained[name], values.detach(), rtol=1e-3, atol=1e-5)


def test_a_measurement_says_everything_and_repeats(measurer: Measurer) -> None:
    first, again = measurer(Candidate(7, SMALL)), measurer(Candidate(7, SMALL))
    assert (first.index, first.architecture) == (7, SMALL)
    assert (first.params, first.nodes) == (SMALL.num_params(10, 16), SMALL.num_nodes())
    accuracies = (first.predicted, first.predicted_noise, first.trained, first.trained_noise)
    assert all(0 <= value <= 100 for value in accuracies)
    assert first.speed > 0
    timeless = {"speed": 1.0, "seconds": 1.0}
    assert dataclasses.replace(first, **timeless) == dataclasses.replace(again, **timeless)
    assert Measurement.from_dict(json.loads(json.dumps(first.to_dict()))) == first


def test_predicted_accuracy_is_that_of_an_evaluation(ghn: GHN, measurer: Measurer) -> None:
    with torch.device("meta"):
        network = SMALL.build(10, 16)
    found = measurer(Candidate(0, SMALL))
    assert found.predicted == measurer.scorer(network)
    assert found.predicted_noise == measurer.scorer.accuracy(network, 0.08)


def test_what_is_easy_is_learnt_and_the_steps_are_counted(ghn: GHN) -> None:
    """Images that are of one colour for each class; the target cannot be reached before 20 steps."""
    images = random_images(160)
    images = dataclasses.replace(
        images, pixels=(images.labels * 25)[:, None, None, None].expand(160, 3, 16, 16).byte()
    )
    recipe = dataclasses.replace(RECIPE, steps=60, batch_size=32, target=40.0)
    found = measure(SMALL, ghn, images, images, recipe)
    assert found.trained > 60
    assert found.convergence is not None
    assert 20 <= found.convergence < 60
    assert found.loss < math.log(10)
    hopeless = measure(SMALL, ghn, images, images, dataclasses.replace(recipe, steps=19))
    assert hopeless.convergence is None


def test_training_that_diverges_ends_and_is_told(ghn: GHN) -> None:
    bare = dataclasses.replace(SMALL, norm=None, n_cells=6)
    recipe = dataclasses.replace(RECIPE, steps=30, lr=1e30)
    found = measure(bare, ghn, random_images(48), random_images(32, seed=1), recipe)
    assert found.loss == math.inf
    assert found.convergence is None
    assert found.to_dict()["loss"] is None
    assert Measurement.from_dict(found.to_dict()) == found


def test_candidates_keep_to_the_limits_in_the_order_of_the_split() -> None:
    recipe = Recipe(image_size=16)
    limits = {"max_params": 0.3, "max_activations": 0.4}
    found = list(islice(candidates("search", recipe, **limits), 5))
    assert [candidate.index for candidate in found] == sorted({candidate.index for candidate in found})
    for candidate in found:
        assert candidate.architecture.supports(16)
        assert candidate.architecture.num_params(10, 16) <= 300_000
        assert candidate.architecture.activations() <= 400_000
    later = next(candidates("search", recipe, start=found[1].index + 1, **limits))
    assert later == found[2]
    narrow = next(candidates("search", dataclasses.replace(recipe, width=16)))
    assert narrow.architecture.C == 16
    with pytest.raises(ArchitectureError, match=r"'predefined': .* has no genotype"):
        next(candidates("predefined", recipe))


def test_impossible_recipes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"steps=0, must be at least 1; target=100, must be between"):
        Recipe(steps=0, target=100)
    with pytest.raises(ConfigError, match="precision='half'"):
        Recipe(precision="half")
    with pytest.raises(ConfigError, match="lr=inf, must be positive and finite"):
        Recipe(lr=math.inf)


def test_limits_and_batches_that_nothing_keeps_to_are_refused(ghn: GHN) -> None:
    with pytest.raises(TrainingError, match="max_params=nan millions; expected a number above 0"):
        next(candidates("train", RECIPE, max_params=math.nan))
    with pytest.raises(TrainingError, match="max_activations=0 millions"):
        next(candidates("train", RECIPE, max_activations=0))
    with pytest.raises(TrainingError, match="24 training images; expected at least batch_size=40"):
        Measurer(ghn, random_images(24), random_images(16), Recipe(batch_size=40, image_size=16))


def header(ghn: GHN, **changes: Any) -> Header:
    return Header.of("search", "mine", ghn, random_images(48), dataclasses.replace(RECIPE, **changes))


def test_a_file_is_taken_over_even_if_its_last_line_is_torn(
    ghn: GHN, measurer: Measurer, tmp_path: Path
) -> None:
    path = tmp_path / "measured.jsonl"
    kept = MeasurementFile(path, header(ghn))
    first = measurer(Candidate(7, SMALL))
    kept.add(first)
    kept.add(dataclasses.replace(first, index=9))
    whole = path.read_text()
    assert read_records(path).measurements == {7: first, 9: dataclasses.replace(first, index=9)}
    path.write_text(whole[:-20])
    taken = MeasurementFile(path, header(ghn))
    assert list(taken.measurements) == [7]
    taken.add(dataclasses.replace(first, index=9))
    assert path.read_text() == whole


def test_a_file_whose_first_line_is_torn_is_begun_anew(ghn: GHN, measurer: Measurer, tmp_path: Path) -> None:
    path = tmp_path / "measured.jsonl"
    first = measurer(Candidate(7, SMALL))
    MeasurementFile(path, header(ghn)).add(first)
    whole = path.read_text()
    end_of_header = whole.index("\n") + 1
    for left in (end_of_header - 5, end_of_header, end_of_header + 20):
        path.write_text(whole[:left])
        kept = MeasurementFile(path, header(ghn))
        assert not kept.measurements
        kept.add(first)
        assert path.read_text() == whole


def test_files_of_other_measurements_are_refused(ghn: GHN, measurer: Measurer, tmp_path: Path) -> None:
    path = tmp_path / "measured.jsonl"
    MeasurementFile(path, header(ghn)).add(measurer(Candidate(7, SMALL)))
    with pytest.raises(TrainingError, match=r"other recipe\.steps, recipe\.lr; give another file"):
        MeasurementFile(path, header(ghn, steps=4, lr=0.1))
    with pytest.raises(TrainingError, match="other weights_digest"):
        MeasurementFile(path, header(GHN(ghn.config)))
    damaged = path.read_text().replace("sep_conv_3x3", "sep_conv_9x9")
    path.write_text(damaged)
    with pytest.raises(TrainingError, match=r"line 2: not a measurement .*sep_conv_9x9.*remove the line"):
        read_records(path)
    impossible = damaged.split("\n")[0].replace(f'"steps": {RECIPE.steps}', '"steps": -1') + "\n"
    assert "-1" in impossible
    for text in ("", "[]\n", '{"some": "json"}\n', "no json\n", impossible):
        path.write_text(text)
        with pytest.raises(TrainingError, match=r"measured\.jsonl: (not a file of|expected a JSON object)"):
            read_records(path)
    path.unlink()
    with pytest.raises(TrainingError, match=r"measured\.jsonl: no such file; .* `ghn-init measure`"):
        read_records(path)


def test_a_file_is_not_begun_before_there_is_a_measurement(ghn: GHN, tmp_path: Path) -> None:
    path = tmp_path / "measured.jsonl"
    MeasurementFile(path, header(ghn))
    assert not path.exists()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A file of images, enough for the 5,000 that are held out."""
    images = random_images(5_064)
    arrays = {
        "train_images": images.pixels.permute(0, 2, 3, 1).numpy(),
        "train_labels": images.labels.numpy(),
    }
    np.savez(tmp_path / "set.npz", **arrays)  # pyright: ignore[reportArgumentType]
    return tmp_path / "set.npz"


def test_the_command_goes_on_where_it_stopped(ghn_dir: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "measured.jsonl"
    command = ["measure", str(data), "-o", str(output), "--weights", str(ghn_dir), "--steps", "2"]
    command += ["--batch-size", "4", "--images", "8", "--width", "8", "--max-activations", "0.07"]
    terminal = {"FORCE_COLOR": "1", "COLUMNS": "120"}  # progress bars are shown
    done = CliRunner(env=terminal).invoke(app, [*command, "--sample", "1", "--workers", "1"])
    assert done.exit_code == 0, done.output
    assert "1/1" in done.stderr
    assert "chosen from " in done.stderr
    one = output.read_text()
    done = CliRunner().invoke(app, [*command, "--sample", "2", "--workers", "2"])
    assert done.exit_code == 0, done.output
    assert output.read_text().startswith(one)
    records = read_records(output)
    expected = islice(candidates("search", records.header.recipe, max_activations=0.07), 2)
    assert sorted(records.measurements) == [candidate.index for candidate in expected]
    assert "2 architectures of search, on average" in done.stderr
    other = tmp_path / "other.jsonl"
    nothing = ["--split", "test", "--max-params", "0.001", "-o", str(other)]
    done = CliRunner().invoke(app, [*command, *nothing])
    assert "no architecture of the split is within the limits" in done.stderr
    assert not other.exists()
    done = CliRunner().invoke(app, [*command, "--steps", "3"])
    assert isinstance(done.exception, SystemExit)
    assert "other recipe.steps" in done.stderr
