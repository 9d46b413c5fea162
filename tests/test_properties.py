"""Properties of architectures predicted from embeddings, and the search by them."""

from __future__ import annotations

import dataclasses
import json
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau
from typer.testing import CliRunner

import ghn_init
from ghn_init import GHN
from ghn_init._errors import TrainingError
from ghn_init.cli import app
from ghn_init.search import (
    PROPERTIES,
    Fitted,
    Header,
    Measurement,
    MeasurementFile,
    Properties,
    Recipe,
    Records,
    candidates,
    correlation,
    draw_properties,
    embed_architectures,
    fit_properties,
    rank,
    read_records,
)
from ghn_init.search._kendall import _tau
from ghn_init.search._regressors import KINDS, Kind, Regressor, _search, fit, out_of_fold
from ghn_init.search._tables import properties_table, ranking_table
from training_runs import random_images

if TYPE_CHECKING:
    from pathlib import Path

RECIPE = Recipe(steps=2, batch_size=4, images=8, image_size=16, width=8)
LIMITS = {"max_activations": 0.07}


def made_up(split: str, count: int, ghn: GHN, start: int = 0) -> Records:
    """Measurements that nobody made: what they say follows from the architecture's size."""
    found = {
        candidate.index: Measurement(
            index=candidate.index,
            architecture=candidate.architecture,
            params=candidate.architecture.num_params(10, 16),
            nodes=(nodes := candidate.architecture.num_nodes()),
            predicted=10.0 + candidate.index % 3,
            predicted_noise=10.0,
            trained=20 + nodes / 10,
            trained_noise=10 + nodes / 10,
            convergence=500 - nodes,
            speed=1e5 / nodes,
            loss=2.0,
            seconds=1.0,
        )
        for candidate in islice(candidates(split, RECIPE, start=start, **LIMITS), count)
    }
    return Records(Header.of(split, "mine", ghn, random_images(48), RECIPE), found)


@pytest.fixture(scope="module")
def ghn(ghn_dir: Path) -> GHN:
    return ghn_init.load(ghn_dir)


@pytest.fixture(scope="module")
def records(ghn: GHN) -> Records:
    return made_up("search", 32, ghn)


@pytest.fixture(scope="module")
def fits(records: Records, ghn: GHN) -> tuple[Properties, list[Fitted]]:
    return fit_properties(records, ghn, "mine")


Fits = tuple[Properties, list[Fitted]]


def test_tau_is_kendalls_with_ties_and_repetitions() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        one, two = rng.integers(0, 6, 12), rng.normal(size=12)
        two[::3] = 0
        assert correlation(one, two).tau == pytest.approx(kendalltau(one, two).statistic)
        counts = rng.multinomial(12, np.full(12, 1 / 12))
        orders = [np.sign(np.subtract.outer(values, values)) for values in (one, two)]
        expected = kendalltau(one.repeat(counts), two.repeat(counts)).statistic
        assert _tau(counts[None], *orders)[0] == pytest.approx(expected)
    assert correlation(np.ones(5), np.arange(5)).tau == 0


def test_the_interval_covers_and_narrows() -> None:
    """Of pairs whose true tau is known (2/pi arcsin of the correlation), 95 % intervals cover about that."""
    rng, covered = np.random.default_rng(1), 0
    truth = 2 / np.pi * np.arcsin(0.5)
    for _ in range(200):
        one, noise = rng.normal(size=(2, 60))
        found = correlation(one, 0.5 * one + np.sqrt(0.75) * noise)
        covered += found.low <= truth <= found.high
    assert 180 <= covered <= 198
    one, noise = rng.normal(size=(2, 600))
    wide = correlation(one[:60], one[:60] + noise[:60])
    narrow = correlation(one, one + noise)
    assert narrow.high - narrow.low < (wide.high - wide.low) / 2
    assert correlation(one, one).tau == correlation(one, one).low == 1


@pytest.mark.parametrize("kind", KINDS)
def test_plain_numbers_say_what_scikit_learn_says(kind: Kind) -> None:
    rng = np.random.default_rng(2)
    x, new = rng.normal(3, 2, size=(40, 6)), rng.normal(3, 2, size=(9, 6))
    y = 50 + 7 * np.tanh(x[:, 0] - 3) + x[:, 1]
    regressor = fit(kind, x, y)
    mean, std = x.mean(0), x.std(0)
    theirs = _search(kind, (x - mean) / std, (y - y.mean()) / y.std())
    expected = y.mean() + y.std() * theirs.predict((new - mean) / std)
    np.testing.assert_allclose(regressor(new), expected, rtol=1e-9)
    again = Regressor.from_dict(json.loads(json.dumps(regressor.to_dict())))
    np.testing.assert_array_equal(again(new), regressor(new))
    truth = 50 + 7 * np.tanh(new[:, 0] - 3) + new[:, 1]
    assert np.abs(regressor(new) - truth).mean() < 0.4 * np.abs(truth - y.mean()).mean()


@pytest.mark.parametrize("kind", KINDS)
def test_a_property_that_is_equal_for_all_is_predicted_and_read_back(kind: Kind) -> None:
    x = np.random.default_rng(4).normal(size=(20, 6))
    regressor = fit(kind, x, np.full(20, -6.0))
    again = Regressor.from_dict(json.loads(json.dumps(regressor.to_dict())))
    np.testing.assert_allclose(again(x), -6.0)


@pytest.mark.parametrize("kind", KINDS)
def test_nobody_is_predicted_by_a_regressor_that_has_seen_him(kind: Kind) -> None:
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(25, 4)), rng.normal(size=25)
    before = out_of_fold(kind, x, y)
    for index in (0, 11):
        changed = y.copy()
        changed[index] += 100
        after = out_of_fold(kind, x, changed)
        assert after[index] == before[index]
        assert (after != before).sum() == 20


@pytest.mark.parametrize(
    "changes",
    [{"kind": "pickle"}, {"weights": [1.0]}, {"offset": float("nan")}, {"support": "text"}, {"more": 1}],
)
def test_damaged_regressors_are_refused(changes: dict[str, object]) -> None:
    x = np.random.default_rng(4).normal(size=(20, 3))
    values = fit("svr", x, x[:, 0]).to_dict()
    with pytest.raises(TrainingError, match="not a regressor"):
        Regressor.from_dict({**values, **changes})


def test_embeddings_are_those_of_embed(ghn: GHN) -> None:
    architectures = [found.architecture for found in islice(candidates("search", RECIPE), 3)]
    found = embed_architectures(ghn, architectures, 16)
    assert found.shape == (3, ghn.config.hid)
    for row, architecture in zip(found, architectures, strict=True):
        with torch.device("meta"):
            network = architecture.build(10, 16)
        torch.testing.assert_close(row, ghn_init.embed(network, ghn, example_input=(1, 3, 16, 16)))


def test_what_follows_from_the_graph_is_predicted(records: Records, fits: Fits) -> None:
    kept, fitted = fits
    assert [found.prop.name for found in fitted] == list(PROPERTIES) == list(kept.regressors)
    for found in fitted:
        assert (len(found.measured), len(found.measured_held_out)) == (24, 8)
        taus = {prediction.name: prediction.folds_tau.tau for prediction in found.predictions}
        assert list(taus) == ["svr", "ridge", "parameters", "nodes", "predicted accuracy"]
        assert taus["nodes"] > 0.99  # all was made up from the nodes
        assert max(taus["svr"], taus["ridge"]) > 0.4
        assert found.best.folds_tau.tau == max(taus["svr"], taus["ridge"])
    indices = sorted(records.measurements)
    assert kept.indices == tuple(indices[:24])
    assert kept.medians["accuracy"] == pytest.approx(
        np.median([records.measurements[index].trained for index in indices[:24]])
    )


def test_an_architecture_that_did_not_converge_comes_last(records: Records) -> None:
    convergence = PROPERTIES["convergence"].of
    one = next(iter(records.measurements.values()))
    never, late, early = (
        convergence(dataclasses.replace(one, convergence=steps), Recipe(steps=400))
        for steps in (None, 400, 30)
    )
    assert never < late < early


def test_architectures_of_another_split_may_be_held_out(records: Records, ghn: GHN) -> None:
    other = made_up("train", 6, ghn)
    kept, fitted = fit_properties(records, ghn, "mine", other)
    assert len(kept.indices) == 32
    assert {len(found.measured_held_out) for found in fitted} == {6}
    table = properties_table(fitted).splitlines()
    assert table[0] == "| property | on | n | svr | ridge | parameters | nodes | predicted accuracy |"
    assert table[2].startswith("| accuracy | five folds | 32 | ")
    assert table[3].startswith("| accuracy | held out | 6 | ")
    with pytest.raises(TrainingError, match="expected another split than search"):
        fit_properties(records, ghn, "mine", records)
    slower = dataclasses.replace(other.header, recipe=dataclasses.replace(RECIPE, steps=9))
    with pytest.raises(TrainingError, match="steps=9"):
        fit_properties(records, ghn, "mine", dataclasses.replace(other, header=slower))
    for count, held_out, message in ((12, other, "12 of 12"), (17, None, "12 of 17")):
        with pytest.raises(
            TrainingError, match=f"{message} architectures .* at least 13 to fit regressors to"
        ):
            fit_properties(made_up("search", count, ghn), ghn, "mine", held_out)


def test_regressors_are_kept_as_numbers_and_read_back(fits: Fits, ghn: GHN, tmp_path: Path) -> None:
    kept, fitted = fits
    path = tmp_path / "properties.json"
    kept.save(path)
    again = Properties.load(path)
    x = np.random.default_rng(5).normal(size=(4, ghn.config.hid))
    for name, regressor in kept.regressors.items():
        np.testing.assert_array_equal(again.regressors[name](x), regressor(x))
    assert dataclasses.replace(again, regressors={}) == dataclasses.replace(kept, regressors={})
    draw_properties(fitted, tmp_path / "properties.svg")
    picture = (tmp_path / "properties.svg").read_text()
    assert picture.count("<use ") >= 4 * 32  # a dot for every architecture in four panels
    with pytest.raises(TrainingError, match=r"ends in \.svg"):
        draw_properties(fitted, tmp_path / "properties.doc")
    for text in ("no json", "[]", "{}", path.read_text().replace("ghn-init properties 1", "other")):
        path.write_text(text)
        with pytest.raises(TrainingError, match="no regressors"):
            Properties.load(path)
    path.unlink()
    with pytest.raises(TrainingError, match=r"properties\.json cannot be read: No such file or directory"):
        Properties.load(path)


def test_ranking_is_by_what_the_regressor_says(records: Records, fits: Fits, ghn: GHN) -> None:
    kept, _ = fits
    chosen = list(islice(candidates("search", RECIPE, start=max(records.measurements) + 1, **LIMITS), 10))
    counts: list[int] = []
    ranked = rank(chosen, kept, ghn, "speed", on_part=counts.append)
    x = embed_architectures(ghn, [candidate.architecture for candidate in chosen], 16)
    expected = dict(zip((c.index for c in chosen), kept.regressors["speed"](x), strict=True))
    assert [entry.candidate.index for entry in ranked] == sorted(expected, key=lambda i: -expected[i])
    assert sum(counts) == 10
    nodes = [entry.candidate.architecture.num_nodes() for entry in ranked]
    assert np.mean(nodes[:5]) < np.mean(nodes[5:])  # small ones are fast
    assert rank(chosen, kept, ghn, "speed", workers=2) == ranked
    with pytest.raises(TrainingError, match="no property 'beauty'"):
        rank(chosen, kept, ghn, "beauty")
    with pytest.raises(TrainingError, match=r"read embeddings of mine .*, not of this hypernetwork"):
        rank(chosen, kept, GHN(ghn.config), "speed")


def test_the_commands_find_architectures_that_load_again(
    records: Records, ghn_dir: Path, tmp_path: Path
) -> None:
    measured, regressors, found = (tmp_path / name for name in ("measured.jsonl", "p.json", "found.jsonl"))
    kept = MeasurementFile(measured, records.header)
    for measurement in records.measurements.values():
        kept.add(measurement)
    arguments = ["properties", str(measured), "-o", str(regressors), "--weights", str(ghn_dir)]
    done = CliRunner().invoke(app, [*arguments, "--picture", str(tmp_path / "p.png")])
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("| property | on | n | svr | ridge |")
    assert "fitted to 24 architectures (accuracy: " in done.stderr
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")

    images = random_images(5_032)
    arrays = {
        "train_images": images.pixels.permute(0, 2, 3, 1).numpy(),
        "train_labels": images.labels.numpy(),
    }
    np.savez(tmp_path / "set.npz", **arrays)  # pyright: ignore[reportArgumentType]
    arguments = ["search", str(tmp_path / "set.npz"), str(regressors), "-o", str(found), "--by", "speed"]
    arguments += ["--weights", str(ghn_dir), "--sample", "12", "--top", "2", "--max-activations", "0.07"]
    done = CliRunner().invoke(app, [*arguments, "--workers", "1"])
    assert done.exit_code == 0, done.output
    architectures = read_records(found).measurements
    assert len(architectures) == 2
    assert not architectures.keys() & set(Properties.load(regressors).indices)
    rows = done.stdout.splitlines()
    assert [row.split(" | ")[:2] for row in rows[2:4]] == [
        [f"| {place}", f"{index}"] for place, index in enumerate(architectures, 1)
    ]
    assert rows[4].startswith("median of the 24 architectures that were fitted to: ")
    for measurement in architectures.values():
        assert measurement.architecture.build(10, 16)(torch.zeros(2, 3, 16, 16)).shape == (2, 10)


def test_the_table_of_a_ranking_has_predicted_beside_measured(records: Records, fits: Fits, ghn: GHN) -> None:
    kept, _ = fits
    chosen = list(islice(candidates("search", RECIPE, **LIMITS), 3))
    table = ranking_table(rank(chosen, kept, ghn, "accuracy"), records.measurements, kept, "accuracy")
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()]
    assert rows[0][2:4] == ["accuracy predicted, %", "measured"]
    for row in rows[2:5]:
        assert float(row[3]) == pytest.approx(records.measurements[int(row[1])].trained, abs=0.01)
