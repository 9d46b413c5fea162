"""The commands `ghn-init train`, `curve`, `teach` and `evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ghn_init.cli import _training_options as opt
from ghn_init.cli._output import check_output

if TYPE_CHECKING:
    from ghn_init.training._config import TrainConfig
    from ghn_init.training._run import RunOptions
    from ghn_init.training.trainer import Trainer


def train(
    data: opt.Data,
    *,
    output: opt.Output = Path("runs/ghn2"),
    config: opt.Config = None,
    start: opt.Start = None,
    steps: opt.Steps = None,
    duration: opt.Duration = None,
    settings: opt.Settings = None,
    soft_labels: opt.SoftLabels = None,
    time_limit: opt.TimeLimit = None,
    save_every: opt.SaveEvery = "60s",
    validate_every: opt.ValidateEvery = "5m",
    validation_networks: opt.ValidationNetworks = 12,
    validation_images: opt.ValidationImages = 320,
    tensorboard: opt.TensorBoard = False,
) -> None:
    """Train a graph hypernetwork; run the same command again to take up where it stopped."""
    from ghn_init.training._run import RunOptions

    wanted = opt.training_config(config, settings, steps, duration)
    options = RunOptions(
        output=output,
        time_limit=None if time_limit is None else opt.seconds(time_limit),
        save_every=opt.seconds(save_every),
        validate_every=opt.seconds(validate_every),
        validation_networks=validation_networks,
        validation_images=validation_images,
        tensorboard=tensorboard,
    )
    _run(_trainer(data, wanted, options, start, soft_labels))


def _trainer(
    data: Path, config: TrainConfig, options: RunOptions, start: str | None, soft_labels: Path | None
) -> Trainer:
    """A trainer on these images; this process meets the others of the run, if there are any."""
    from ghn_init import load
    from ghn_init.training._engine import prepare_process
    from ghn_init.training._ranks import Ranks
    from ghn_init.training.data import hold_out, load_images
    from ghn_init.training.teacher import with_soft_labels
    from ghn_init.training.trainer import Trainer

    prepare_process()
    Ranks.join()
    images, validation = hold_out(load_images(data, "train"))
    if soft_labels is not None:
        images = with_soft_labels(images, soft_labels)
    return Trainer(config, images, validation, options, start=load(start) if start else None)


def _run(trainer: Trainer) -> None:
    """Train with a progress bar, and say how it ended."""
    from ghn_init.cli._bars import TrainingBar

    with TrainingBar(shown=trainer.ranks.first) as bar:
        finished = trainer.run(bar.step)
    if trainer.ranks.first:
        output, state = trainer.options.output, trainer.state
        how, where = ("done", output / "ghn") if finished else ("stopped; run again to go on", output)
        figures = f"step {state.step}, {state.networks} networks, {state.dropped} of them dropped"
        typer.echo(f"{how}: {figures}, {where}", err=True)


def curve(run: opt.Run, *, output: opt.Picture = None) -> None:
    """Draw the learning curve of a training run: loss and accuracies over time, from its log."""
    if output is not None:
        check_output(output, [run / "log.jsonl"])
    from ghn_init.training._curve import draw_curve

    typer.echo(draw_curve(run, output))


def teach(
    data: opt.Data,
    *,
    output: opt.Labels,
    epochs: opt.Epochs = 8.0,
    seed: opt.TeacherSeed = 0,
    width: opt.TeacherWidth = 32,
) -> None:
    """Train a small classifier and write its soft labels of the training images."""
    check_output(output)
    from ghn_init.cli._bars import TeacherBar
    from ghn_init.training.data import Normalisation, hold_out, load_images
    from ghn_init.training.teacher import accuracy, save_soft_labels, soft_labels, train_teacher

    images, validation = hold_out(load_images(data, "train"))
    with TeacherBar() as bar:
        teacher = train_teacher(images, epochs=epochs, seed=seed, width=width, on_step=bar.step)
    normalise = Normalisation.of(images)
    save_soft_labels(output, soft_labels(teacher, images, normalise), images)
    percent = accuracy(soft_labels(teacher, validation, normalise), validation)
    typer.echo(f"{output}: teacher with {percent:.1f} % on {len(validation)} validation images", err=True)


def evaluate(
    weights: opt.Weights,
    *,
    data: opt.TestData,
    split: opt.Split = None,
    sample: opt.Sample = None,
    images: opt.Count = None,
    noise: opt.Noise = False,
    output: opt.Scores = None,
    bf16: opt.BFloat16 = False,
    workers: opt.Workers = None,
) -> None:
    """Measure the accuracy of networks with predicted parameters, split by split."""
    if output is not None:
        check_output(output)
    import torch

    from ghn_init import load
    from ghn_init.cli._bars import EvaluationBar
    from ghn_init.training._engine import prepare_process
    from ghn_init.training._pool import Job, cores, measure_all
    from ghn_init.training._results import Results, table
    from ghn_init.training.data import Normalisation, load_images
    from ghn_init.training.evaluate import NOISE, SPLITS, Measure, Network

    prepare_process()
    measure = Measure(
        load(weights), load_images(data, "test"), images=images,
        normalise=Normalisation.of(load_images(data, "train")),
        precision=torch.bfloat16 if bf16 else torch.float32,
    )  # fmt: skip
    results = Results(measure, output, weights)
    levels = (0.0, NOISE) if noise else (0.0,)
    jobs = [
        Job(net, level) for name in split or SPLITS for level in levels for net in Network.of(name, sample)
    ]
    missing = [job for job in jobs if job not in results]
    with EvaluationBar(len(missing)) as bar:
        for job, accuracy in measure_all(measure, missing, workers or cores()):
            results.add(job, accuracy)
            bar.network(f"{job.network.split} {job.network.index}", accuracy)
    typer.echo(table(results.scores()))
