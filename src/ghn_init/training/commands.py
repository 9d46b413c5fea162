"""The commands `ghn-init train`, `teach` and `evaluate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

_TRAIN = "Run"
_MODEL = "Hypernetwork"
_KEEP = "Keeping"


def train(
    data: Annotated[
        Path, typer.Argument(help="Images: an ImageFolder (or .tar.xz of one), torchvision's CIFAR, or .npz.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for checkpoint, log and weights.")
    ] = Path("runs/ghn2"),
    config: Annotated[
        Path | None, typer.Option(help="JSON file of TrainConfig fields; options below override it.")
    ] = None,
    start: Annotated[
        str | None, typer.Option("--from", help="Weights to start from: bundled name, folder, file.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Length of the run in steps.", rich_help_panel=_TRAIN)
    ] = None,
    duration: Annotated[
        str | None,
        typer.Option(help="Length of the run in training time: 90s, 30m, 2h.", rich_help_panel=_TRAIN),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            rich_help_panel=_MODEL,
            help="Any field of TrainConfig (lr=3e-4), or of GHNConfig with ghn. before it (ghn.hid=64).",
        ),
    ] = None,
    soft_labels: Annotated[
        Path | None, typer.Option(help="Soft labels from `teach`, for --set soft_labels=SHARE.")
    ] = None,
    time_limit: Annotated[
        str | None,
        typer.Option(help="Stop cleanly after this long; run again to go on.", rich_help_panel=_KEEP),
    ] = None,
    save_every: Annotated[str, typer.Option(help="Between checkpoints.", rich_help_panel=_KEEP)] = "60s",
    validate_every: Annotated[
        str, typer.Option(help="Between quick validations; 0s: none.", rich_help_panel=_KEEP)
    ] = "5m",
    validation_networks: Annotated[int, typer.Option(rich_help_panel=_KEEP)] = 12,
    validation_images: Annotated[int, typer.Option(rich_help_panel=_KEEP)] = 320,
) -> None:
    """Train a graph hypernetwork; run the same command again to take up where it stopped."""
    import torch

    from ghn_init import load
    from ghn_init.training._config import TrainConfig
    from ghn_init.training._progress import TrainingBar
    from ghn_init.training._ranks import Ranks
    from ghn_init.training.data import hold_out, load_images
    from ghn_init.training.teacher import with_soft_labels
    from ghn_init.training.trainer import RunOptions, Trainer

    values = json.loads(config.read_text()) if config else {}
    _override(values, set_ or [])
    if steps is not None:
        values["steps"] = steps
    if duration is not None:
        values["duration"] = seconds(duration)
    settings = TrainConfig.from_dict(values)
    torch.set_num_threads(1)  # small networks are slower on several threads; cores are for processes
    Ranks.join()
    images, validation = hold_out(load_images(data, "train"))
    if soft_labels is not None:
        images = with_soft_labels(images, soft_labels)
    options = RunOptions(
        output=output,
        time_limit=None if time_limit is None else seconds(time_limit),
        save_every=seconds(save_every),
        validate_every=seconds(validate_every),
        validation_networks=validation_networks,
        validation_images=validation_images,
    )
    trainer = Trainer(settings, images, validation, options, start=load(start) if start else None)
    with TrainingBar(shown=trainer.ranks.first) as bar:
        finished = trainer.run(bar.step)
    if not trainer.ranks.first:
        return
    where = output / "ghn" if finished else output
    typer.echo(
        f"{'done' if finished else 'stopped; run again to go on'}: step {trainer.state.step}, "
        f"{trainer.state.networks} networks, {trainer.state.skipped} steps skipped, {where}",
        err=True,
    )


def teach(
    data: Annotated[Path, typer.Argument(help="Images, as for `train`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Soft labels, an .npz file.")],
    epochs: Annotated[float, typer.Option(help="Passes over the images.")] = 8.0,
    seed: Annotated[int, typer.Option(help="Of its weights, order and augmentation.")] = 0,
    width: Annotated[int, typer.Option(min=1, help="Channels of its first stage.")] = 32,
) -> None:
    """Train a small classifier and write its soft labels of the training images."""
    from ghn_init.training._progress import TeacherBar
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
    weights: Annotated[str, typer.Argument(help="Bundled name, directory, published .pt, hf://org/repo.")],
    data: Annotated[Path, typer.Option("--data", help="Images, as for `train`; the test split is used.")],
    split: Annotated[
        list[str] | None, typer.Option("--split", help="Splits; default: all. Also resnet50 and vit.")
    ] = None,
    sample: Annotated[
        int | None, typer.Option(min=1, help="Only the first N architectures of a split.")
    ] = None,
    images: Annotated[int | None, typer.Option(min=2, help="Only N test images.")] = None,
    noise: Annotated[bool, typer.Option("--noise", help="Also under Gaussian noise of std 0.08.")] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="JSON file, written after every network; what it has is not measured again.",
        ),
    ] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Run networks in bfloat16 (faster, rounded).")] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes, one core each; default: one for every core.")
    ] = None,
) -> None:
    """Measure the accuracy of networks with predicted parameters, split by split."""
    import torch

    from ghn_init import load
    from ghn_init.training._pool import Job, cores, measure_all
    from ghn_init.training._progress import EvaluationBar
    from ghn_init.training._results import Results, table
    from ghn_init.training.data import Normalisation, load_images
    from ghn_init.training.evaluate import NOISE, SPLITS, Measure, Network

    torch.set_num_threads(1)
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


def seconds(text: str) -> float:
    """A length of time as 90, 90s, 30m or 2h, in seconds.

    Raises:
        typer.BadParameter: Anything else.
    """
    units = {"s": 1.0, "m": 60.0, "h": 3600.0}
    number, unit = (text[:-1], units[text[-1]]) if text[-1:] in units else (text, 1.0)
    try:
        return float(number) * unit
    except ValueError:
        raise typer.BadParameter(f"{text!r}; expected a length of time such as 90s, 30m or 2h") from None


def _override(values: dict[str, Any], settings: Sequence[str]) -> None:
    """Write KEY=VALUE settings into `values`; values are JSON, or else strings."""
    for setting in settings:
        key, sign, text = setting.partition("=")
        if not sign:
            raise typer.BadParameter(f"{setting!r}; expected KEY=VALUE")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        if key.startswith("ghn."):
            values.setdefault("ghn", {})[key.removeprefix("ghn.")] = value
        else:
            values[key] = value


def app() -> typer.Typer:
    """The commands, for `python -m ghn_init.training`."""
    application = typer.Typer(add_completion=False, no_args_is_help=True)
    application.command()(train)
    application.command()(teach)
    application.command()(evaluate)
    return application
