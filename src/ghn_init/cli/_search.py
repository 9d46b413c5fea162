"""The commands `ghn-init measure`, `properties` and `search`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from ghn_init.cli import _search_options as opt  # noqa: TC001 (typer reads the annotations)
from ghn_init.cli import _training_options as training  # noqa: TC001
from ghn_init.cli._output import check_output, say

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ghn_init.search import Candidate, Measurement, Measurer, Recorder


def measure(
    data: training.Data,
    *,
    output: opt.Measured,
    split: opt.Split = "search",
    sample: opt.Sample = 100,
    max_params: opt.MaxParams = None,
    max_activations: opt.MaxActivations = None,
    width: opt.Width = None,
    weights: opt.Weights = "ghn2-cifar10",
    steps: opt.Steps = 400,
    batch_size: opt.BatchSize = 64,
    lr: opt.LearningRate = 0.05,
    target: opt.Target = 25.0,
    images: opt.Count = 1000,
    image_size: opt.ImageSize = None,
    bf16: opt.BFloat16 = False,
    workers: training.Workers = None,
) -> None:
    """Measure architectures of a split: with predicted weights, trained for a while, and their speed."""
    check_output(output)
    from itertools import islice

    from ghn_init import load
    from ghn_init.search import Header, Measurer, Recipe, Recorder, candidates
    from ghn_init.training import hold_out, load_images
    from ghn_init.training._engine import prepare_process

    prepare_process()
    ghn, (train, validation) = load(weights), hold_out(load_images(data, "train"))
    recipe = Recipe(
        steps=steps, batch_size=batch_size, lr=lr, target=target, images=images, width=width,
        image_size=image_size or train.size, precision="bfloat16" if bf16 else "float32",
    )  # fmt: skip
    recorder = Recorder(output, Header.of(split, weights, ghn, train, recipe))
    found = candidates(
        split, recipe, max_params=max_params, max_activations=max_activations, num_classes=len(train.classes)
    )
    chosen = list(islice(found, sample))
    measurer = Measurer(ghn, train, validation, recipe)
    missing = [candidate for candidate in chosen if candidate.index not in recorder.measurements]
    _measure_all(measurer, missing, recorder, workers)
    done = [recorder.measurements[candidate.index] for candidate in chosen]
    say(f"{output}: {len(done)} architectures of {split}, {_means(done)}")


def _measure_all(
    measurer: Measurer, candidates: Sequence[Candidate], recorder: Recorder, workers: int | None
) -> None:
    """Measure these side by side and keep every one as it comes, with a progress bar."""
    from ghn_init.cli._bars import EvaluationBar
    from ghn_init.training._pool import cores, run_all

    with EvaluationBar(len(candidates)) as bar:
        for candidate, measurement in run_all(measurer, candidates, workers or cores()):
            recorder.add(measurement)
            bar.network(f"{recorder.split} {candidate.index}", measurement.trained)


def _means(measurements: Sequence[Measurement]) -> str:
    from statistics import fmean

    predicted = fmean(m.predicted for m in measurements)
    trained = fmean(m.trained for m in measurements)
    return f"on average {predicted:.1f} % with predicted weights, {trained:.1f} % trained"


def properties(
    measured: opt.MeasuredFile,
    *,
    output: opt.Regressors,
    held_out: opt.HeldOut = None,
    weights: opt.Weights = "ghn2-cifar10",
    picture: opt.Picture = None,
) -> None:
    """Fit regressors from embeddings to measured properties, and compare them with simple baselines."""
    inputs = [path for path in (measured, held_out) if path is not None]
    check_output(output, inputs)
    if picture is not None:
        check_output(picture, [*inputs, output], hint="--picture")
    from ghn_init import load
    from ghn_init.search import draw_properties, fit_properties, read_records
    from ghn_init.search._tables import properties_table

    others = read_records(held_out) if held_out is not None else None
    kept, fitted = fit_properties(read_records(measured), load(weights), weights, others)
    kept.save(output)
    if picture is not None:
        draw_properties(fitted, picture)
    typer.echo(properties_table(fitted))
    kinds = ", ".join(f"{found.prop.name}: {found.best.name}" for found in fitted)
    say(f"{output}: regressors fitted to {len(kept.indices)} architectures ({kinds})")


def search(
    data: training.Data,
    regressors: opt.Properties,
    *,
    output: opt.Found,
    by: opt.By = "accuracy",
    split: opt.Split = "search",
    sample: opt.Sample = 10_000,
    top: opt.Top = 10,
    max_params: opt.MaxParams = None,
    max_activations: opt.MaxActivations = None,
    weights: opt.Weights = "ghn2-cifar10",
    workers: training.Workers = None,
) -> None:
    """Rank many architectures by a predicted property, and measure the first of them."""
    check_output(output, [regressors])
    from itertools import islice

    from ghn_init import load
    from ghn_init.cli._bars import CountBar
    from ghn_init.search import Header, Measurer, Properties, Recorder, candidates, rank
    from ghn_init.search._tables import ranking_table
    from ghn_init.training import hold_out, load_images
    from ghn_init.training._engine import prepare_process
    from ghn_init.training._pool import cores

    prepare_process()
    fitted, ghn = Properties.load(regressors), load(weights)
    train, validation = hold_out(load_images(data, "train"))
    recorder = Recorder(output, Header.of(split, weights, ghn, train, fitted.recipe))
    measurer = Measurer(ghn, train, validation, fitted.recipe)
    found = candidates(
        split, fitted.recipe, max_params=max_params, max_activations=max_activations,
        num_classes=len(train.classes),
    )  # fmt: skip
    known = set(fitted.indices) if split == fitted.split else set()
    chosen = list(islice((candidate for candidate in found if candidate.index not in known), sample))
    with CountBar(len(chosen), "embedding") as bar:
        ranked = rank(chosen, fitted, ghn, by, workers=workers or cores(), on_part=bar.advance)[:top]
    missing = [entry.candidate for entry in ranked if entry.candidate.index not in recorder.measurements]
    _measure_all(measurer, missing, recorder, workers)
    typer.echo(ranking_table(ranked, recorder.measurements, fitted, by))
    say(f"{output}: the first {len(ranked)} of {len(chosen):,} architectures of {split} by {by}")
