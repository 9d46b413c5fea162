"""The commands `ghn-init train`, `curve`, `teach` and `evaluate`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from ghn_init.cli import _options as opt  # noqa: TC001 (typer reads the annotations)
from ghn_init.cli._options import PLACES, argument, option
from ghn_init.cli._output import check_output
from ghn_init.cli._values import seconds, training_config

if TYPE_CHECKING:
    from collections.abc import Set

    from ghn_init.training._config import TrainConfig
    from ghn_init.training._run import RunOptions
    from ghn_init.training.trainer import Trainer

_RUN: Final = "Length of the run"
_MODEL: Final = "What is trained, and how"
_KEEPING: Final = "Keeping and watching the run"


def train(
    data: opt.Data,
    *,
    output: Annotated[
        Path, option("--output -o FOLDER", "Keep checkpoint, log and weights in this folder.")
    ] = Path("runs/ghn2"),
    config: Annotated[
        Path | None,
        option("FILE", "Read fields of TrainConfig from this JSON file; other options go before it."),
    ] = None,
    start: Annotated[
        str | None,
        option(
            "--from WEIGHTS",
            "Start from these weights, a bundled name, a folder or a file, and with their configuration.",
        ),
    ] = None,
    steps: Annotated[int | None, option("N", "Train for this many steps.", panel=_RUN)] = None,
    duration: Annotated[
        str | None,
        option("TIME", "Train for this long, all parts of the run together: 90s, 30m or 2h.", panel=_RUN),
    ] = None,
    settings: Annotated[
        list[str] | None,
        option(
            "--set KEY=VALUE",
            "Set a field of TrainConfig, such as lr=3e-4, or of GHNConfig, such as ghn.hid=64. "
            "Repeat the option for more.",
            panel=_MODEL,
        ),
    ] = None,
    soft_labels: Annotated[
        Path | None,
        option(
            "FILE",
            "Read the soft labels that `teach` wrote. It needs --set soft_labels=SHARE, how much they count.",
            panel=_MODEL,
        ),
    ] = None,
    time_limit: Annotated[
        str | None,
        option("TIME", "Stop cleanly after this long; the same command then goes on.", panel=_KEEPING),
    ] = None,
    save_every: Annotated[
        str, option("TIME", "Write a checkpoint whenever this long has passed.", panel=_KEEPING)
    ] = "60s",
    validate_every: Annotated[
        str,
        option(
            "TIME",
            "Validate quickly whenever this long has passed; 0s leaves only the validation at the end.",
            panel=_KEEPING,
        ),
    ] = "5m",
    validation_networks: Annotated[
        int, option("N", "Validate quickly on this many held-out architectures.", panel=_KEEPING, least=1)
    ] = 12,
    validation_images: Annotated[
        int, option("N", "Validate quickly on this many held-out images.", panel=_KEEPING, least=2)
    ] = 320,
    tensorboard: Annotated[
        bool,
        option(
            "--tensorboard",
            "Write the log for TensorBoard, too, into the folder `tensorboard/`.",
            panel=_KEEPING,
        ),
    ] = False,
) -> None:
    """Train a graph hypernetwork; run the same command again to take up where it stopped."""
    from ghn_init.training._run import RunOptions

    wanted, of_ghn = training_config(config, settings, steps, duration)
    if soft_labels is not None and not wanted.soft_labels:
        raise typer.BadParameter(
            "they count for nothing without a share; give, say, --set soft_labels=0.5",
            param_hint="--soft-labels",
        )
    options = RunOptions(
        output=output,
        time_limit=None if time_limit is None else seconds(time_limit),
        save_every=seconds(save_every),
        validate_every=seconds(validate_every),
        validation_networks=validation_networks,
        validation_images=validation_images,
        tensorboard=tensorboard,
    )
    _run(_trainer(data, wanted, of_ghn, options, start, soft_labels))


def _trainer(
    data: Path, config: TrainConfig, of_ghn: Set[str], options: RunOptions, start: str | None,
    soft_labels: Path | None,
) -> Trainer:  # fmt: skip
    """A trainer on these images; this process meets the others of the run, if there are any.

    If no field is said `of_ghn`, its configuration is that of the weights to start from; the number of
    classes, if it is not said, that of the images.
    """
    from ghn_init import load
    from ghn_init.training import hold_out, load_images
    from ghn_init.training._engine import prepare_process
    from ghn_init.training._ranks import Ranks
    from ghn_init.training.teacher import with_soft_labels
    from ghn_init.training.trainer import Trainer

    prepare_process()
    Ranks.join()
    images, validation = hold_out(load_images(data, "train"))
    if soft_labels is not None:
        images = with_soft_labels(images, soft_labels)
    first = load(start) if start else None
    if first is not None and not of_ghn:
        config = replace(config, ghn=first.config)
    elif first is None and "num_classes" not in of_ghn:
        config = replace(config, ghn=replace(config.ghn, num_classes=len(images.classes)))
    return Trainer(config, images, validation, options, start=first)


def _run(trainer: Trainer) -> None:
    """Train with a progress bar, and say how it ended."""
    from ghn_init.cli._bars import Bar

    with Bar(1.0, shown=trainer.ranks.first) as bar:
        finished = trainer.run(bar.training_step)
    trainer.ranks.leave()
    if trainer.ranks.first:
        output, state = trainer.options.output, trainer.state
        how, where = ("done", output / "ghn") if finished else ("stopped; run again to go on", output)
        figures = f"step {state.step}, {state.networks} networks, {state.dropped} of them dropped"
        typer.echo(f"{how}: {figures}, {where}", err=True)


def curve(
    run: Annotated[
        Path, argument("RUN", "Name the output folder of `train`; the run may still be going on.")
    ],
    *,
    output: Annotated[
        Path | None,
        option(
            "--output -o FILE",
            "Draw to this .svg, .png or .pdf file; the default is curve.svg in the folder of the run.",
        ),
    ] = None,
) -> None:
    """Draw the learning curve of a training run: loss and accuracies over time, from its log."""
    if output is not None:
        check_output(output, [run / "log.jsonl"])
    from ghn_init.training._curve import draw_curve

    typer.echo(draw_curve(run, output))


def teach(
    data: opt.Data,
    *,
    output: Annotated[Path, option("--output -o FILE", "Write the soft labels to this .npz file.")],
    epochs: Annotated[float, option("N", "Train the classifier for this many passes over the images.")] = 8.0,
    seed: Annotated[
        int, option("N", "Seed the classifier's weights, and the images' order and augmentation.")
    ] = 0,
    width: Annotated[int, option("N", "Give the classifier's first stage this many channels.", least=1)] = 32,
) -> None:
    """Train a small classifier and write its soft labels of the training images."""
    check_output(output, [data])
    from ghn_init.cli._bars import Bar
    from ghn_init.training import Normalisation, hold_out, load_images
    from ghn_init.training.teacher import accuracy, save_soft_labels, soft_labels, train_teacher

    images, validation = hold_out(load_images(data, "train"))
    with Bar(1.0) as bar:

        def on_step(done: float, loss: float) -> None:
            bar.reach(done, {"loss": loss})

        teacher = train_teacher(images, epochs=epochs, seed=seed, width=width, on_step=on_step)
    normalise = Normalisation.of(images)
    save_soft_labels(output, soft_labels(teacher, images, normalise), images)
    percent = accuracy(soft_labels(teacher, validation, normalise), validation)
    typer.echo(f"{output}: teacher with {percent:.1f} % on {len(validation)} validation images", err=True)


def evaluate(
    weights: Annotated[
        str,
        argument("WEIGHTS", f"Measure this hypernetwork: {PLACES}."),
    ],
    *,
    data: Annotated[
        Path, option("--data DATA", "Measure on the test split of these images, given as for `train`.")
    ],
    split: Annotated[
        list[str] | None,
        option(
            "--split NAME",
            "Measure this split: test, wide, deep, dense, bnfree, resnet50 or vit. Repeat the option for "
            "more; the default is all of them.",
        ),
    ] = None,
    sample: Annotated[
        int | None, option("N", "Measure only the first N architectures of a split.", least=1)
    ] = None,
    images: Annotated[
        int | None, option("--images N", "Measure on N of the test images only.", least=2)
    ] = None,
    noise: Annotated[
        bool,
        option(
            "--noise",
            "Measure a second time under Gaussian noise of deviation 0.08, where pixels go from 0 to 1.",
        ),
    ] = False,
    output: Annotated[
        Path | None,
        option(
            "--output -o FILE",
            "Write the scores to this JSON file after every network; what it has is not measured again.",
        ),
    ] = None,
    bf16: opt.BFloat16 = False,
    workers: opt.Workers = None,
) -> None:
    """Measure the accuracy of networks with predicted parameters, split by split."""
    if output is not None:
        check_output(output, [data])
    import torch

    from ghn_init import TrainingError, load
    from ghn_init.cli._bars import Bar
    from ghn_init.training import Normalisation, load_images
    from ghn_init.training._engine import prepare_process
    from ghn_init.training._pool import cores, run_all
    from ghn_init.training._results import Results, table
    from ghn_init.training.data import check_splits
    from ghn_init.training.evaluate import NOISE, SPLITS, Case, Measure

    prepare_process()
    trained, tested = load_images(data, "train"), load_images(data, "test")
    check_splits(trained, tested)
    measure = Measure(
        load(weights), tested, images=images, normalise=Normalisation.of(trained),
        precision=torch.bfloat16 if bf16 else torch.float32,
    )  # fmt: skip
    results = Results(measure, output, weights)
    levels = (0.0, NOISE) if noise else (0.0,)
    networks: list[Case] = []
    for name in split or SPLITS:
        fitting, unfit = Case.fitting(name, measure.image_size, sample)
        networks += [replace(network, noise=level) for level in levels for network in fitting]
        if unfit:
            typer.echo(f"{name}: {unfit} networks take no images of this size, and are passed over", err=True)
    if not networks:
        raise TrainingError(f"no network takes images of {measure.image_size} x {measure.image_size} pixels")
    missing = [network for network in networks if network not in results]
    with Bar(len(missing)) as bar:
        for network, accuracy in run_all(measure, missing, workers or cores()):
            results.add(network, accuracy)
            bar.advance(label=f"{network.split} {network.index}: {accuracy:.1f} %")
    typer.echo(table(results.scores()))
