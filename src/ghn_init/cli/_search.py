"""The commands `ghn-init measure`, `properties` and `search`."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 (typer reads the annotations)
from typing import TYPE_CHECKING, Annotated, Final, Literal

import typer

from ghn_init._weights import DEFAULT_WEIGHTS
from ghn_init.cli import _options as opt  # noqa: TC001
from ghn_init.cli._options import argument, option
from ghn_init.cli._output import check_output, say

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ghn_init.search import Candidate, Measurement, MeasurementFile, Measurer

_TRAINING: Final = "How networks are trained and measured"


def measure(
    data: opt.Data,
    *,
    output: Annotated[
        Path,
        option(
            "--output -o MEASURED",
            "Append a line for every architecture to this JSON-lines file; what it has is not measured "
            "again.",
        ),
    ],
    split: opt.Split = "search",
    sample: opt.Sample = 100,
    max_params: opt.MaxParams = None,
    max_activations: opt.MaxActivations = None,
    width: Annotated[
        int | None,
        option(
            "C",
            "Give the first cell this many channels; by default those of the split.",
            panel="Which architectures",
            least=8,
        ),
    ] = None,
    weights: opt.Weights = DEFAULT_WEIGHTS,
    steps: Annotated[
        int, option("N", "Train every network for this many steps.", panel=_TRAINING, least=1)
    ] = 400,
    batch_size: Annotated[
        int, option("N", "Train on this many images a step.", panel=_TRAINING, least=2)
    ] = 64,
    lr: Annotated[
        float,
        option(
            "--lr RATE",
            "Begin with this learning rate; it falls to zero along half a cosine.",
            panel=_TRAINING,
        ),
    ] = 0.05,
    target: Annotated[
        float,
        option(
            "PERCENT",
            "Count the steps until the training accuracy, as the mean over 20 steps, reaches this.",
            panel=_TRAINING,
        ),
    ] = 25.0,
    images: Annotated[
        int,
        option(
            "--images N",
            "Measure accuracies on N of the training images that are held out.",
            panel=_TRAINING,
            least=2,
        ),
    ] = 1000,
    image_size: Annotated[
        int | None,
        option(
            "PIXELS",
            "Show networks images of this side: that of the data, which is the default, or half of it.",
            panel=_TRAINING,
        ),
    ] = None,
    bf16: opt.BFloat16 = False,
    workers: opt.Workers = None,
) -> None:
    """Measure architectures of a split: with predicted weights, trained for a while, and their speed."""
    check_output(output)
    from ghn_init import load
    from ghn_init.search import Header, MeasurementFile, Measurer, Recipe, candidates
    from ghn_init.training import hold_out, load_images
    from ghn_init.training._engine import prepare_process

    prepare_process()
    ghn, (train, validation) = load(weights), hold_out(load_images(data, "train"))
    recipe = Recipe(
        steps=steps, batch_size=batch_size, lr=lr, target=target, images=images, width=width,
        image_size=image_size or train.size, precision="bfloat16" if bf16 else "float32",
    )  # fmt: skip
    kept = MeasurementFile(output, Header.of(split, weights, ghn, train, recipe))
    found = candidates(
        split, recipe, max_params=max_params, max_activations=max_activations, num_classes=len(train.classes)
    )
    chosen = _first(found, sample)
    measurer = Measurer(ghn, train, validation, recipe)
    _measure_missing(measurer, chosen, kept, workers)
    done = [kept.measurements[candidate.index] for candidate in chosen]
    say(f"{output}: {len(done)} architectures of {split}, {_means(done)}")


def _first(found: Iterator[Candidate], sample: int) -> list[Candidate]:
    """The first `sample` of them, with a progress bar: where limits are narrow, many are passed over.

    Raises:
        ArchitectureError: There is none.
    """
    from itertools import islice

    from ghn_init._errors import ArchitectureError
    from ghn_init.cli._bars import Bar

    chosen: list[Candidate] = []
    with Bar(sample, "choosing") as bar:
        for candidate in islice(found, sample):
            chosen.append(candidate)
            bar.advance(label=f"chosen from {candidate.index + 1:,}")
    if not chosen:
        raise ArchitectureError(
            "no architecture of the split is within the limits; raise --max-params or --max-activations"
        )
    return chosen


def _measure_missing(
    measurer: Measurer, candidates: Sequence[Candidate], kept: MeasurementFile, workers: int | None
) -> None:
    """Measure those that the file lacks side by side, and keep every one as it comes, with a progress bar."""
    from ghn_init.cli._bars import Bar
    from ghn_init.training._pool import cores, run_all

    missing = [candidate for candidate in candidates if candidate.index not in kept.measurements]
    with Bar(len(missing)) as bar:
        for candidate, measurement in run_all(measurer, missing, workers or cores()):
            kept.add(measurement)
            bar.advance(label=f"{kept.split} {candidate.index}: {measurement.trained:.1f} %")


def _means(measurements: Sequence[Measurement]) -> str:
    from statistics import fmean

    predicted = fmean(m.predicted for m in measurements)
    trained = fmean(m.trained for m in measurements)
    return f"on average {predicted:.1f} % with predicted weights, {trained:.1f} % trained"


def properties(
    measured: Annotated[
        Path, argument("MEASURED", "Read the measurements that `measure` wrote to this file.")
    ],
    *,
    output: Annotated[Path, option("--output -o FILE", "Write the regressors to this JSON file.")],
    held_out: Annotated[
        Path | None,
        option(
            "FILE",
            "Test the regressors on these measurements of another split; by default on the last quarter of "
            "MEASURED, to which they are then not fitted.",
        ),
    ] = None,
    weights: opt.Weights = DEFAULT_WEIGHTS,
    picture: Annotated[
        Path | None,
        option("FILE", "Draw predicted against measured properties to this .svg, .png or .pdf file."),
    ] = None,
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
    typer.echo(properties_table(fitted))
    if equal := [found.prop.name for found in fitted if len(set(found.measured.tolist())) == 1]:
        say(f"the same for all architectures, so that nothing is predicted: {', '.join(equal)}")
    kinds = ", ".join(f"{found.prop.name}: {found.best.name}" for found in fitted)
    say(f"{output}: regressors fitted to {len(kept.indices)} architectures ({kinds})")
    if picture is not None:
        draw_properties(fitted, picture)


def search(
    data: opt.Data,
    regressors: Annotated[
        Path, argument("PROPERTIES", "Read the regressors that `properties` wrote to this file.")
    ],
    *,
    output: Annotated[
        Path,
        option(
            "--output -o FOUND",
            "Append the measured architectures to this file, of the kind that `measure` writes.",
        ),
    ],
    by: Annotated[
        Literal["accuracy", "noise", "speed", "convergence"],
        option(
            "",
            "Rank by this property: accuracy after training, the same under noise, images a second, or "
            "steps to the target accuracy.",
        ),
    ] = "accuracy",
    split: opt.Split = "search",
    sample: opt.Sample = 10_000,
    top: Annotated[int, option("N", "Measure and print the first N of the ranking.", least=1)] = 10,
    max_params: opt.MaxParams = None,
    max_activations: opt.MaxActivations = None,
    weights: opt.Weights = DEFAULT_WEIGHTS,
    workers: opt.Workers = None,
) -> None:
    """Rank many architectures by a predicted property, and measure the first of them."""
    check_output(output, [regressors])
    from ghn_init import load
    from ghn_init.cli._bars import Bar
    from ghn_init.search import Header, MeasurementFile, Measurer, Properties, candidates, rank
    from ghn_init.search._tables import ranking_table
    from ghn_init.training import hold_out, load_images
    from ghn_init.training._engine import prepare_process
    from ghn_init.training._pool import cores

    prepare_process()
    fitted, ghn = Properties.load(regressors), load(weights)
    train, validation = hold_out(load_images(data, "train"))
    kept = MeasurementFile(output, Header.of(split, weights, ghn, train, fitted.recipe))
    measurer = Measurer(ghn, train, validation, fitted.recipe)
    found = candidates(
        split, fitted.recipe, max_params=max_params, max_activations=max_activations,
        num_classes=len(train.classes),
    )  # fmt: skip
    known = set(fitted.indices) if split == fitted.split else set()
    chosen = _first((candidate for candidate in found if candidate.index not in known), sample)
    with Bar(len(chosen), "embedding") as bar:
        ranked = rank(chosen, fitted, ghn, by, workers=workers or cores(), on_part=bar.advance)[:top]
    _measure_missing(measurer, [entry.candidate for entry in ranked], kept, workers)
    typer.echo(ranking_table(ranked, kept.measurements, fitted, by))
    say(f"{output}: the first {len(ranked)} of {len(chosen):,} architectures of {split} by {by}")
