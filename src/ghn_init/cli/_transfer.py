"""`ghn-init transfer`."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ghn_init._errors import ModelSpecError
from ghn_init.cli import _options as opt  # noqa: TC001 (typer reads the annotations)
from ghn_init.cli._commands import DEFAULT_WEIGHTS
from ghn_init.cli._output import check_output
from ghn_init.cli._training_options import Data  # noqa: TC001 (as above)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from rich.table import Table
    from torch import nn

    from ghn_init.cli._spec import ModelSpec
    from ghn_init.training._transfer import LowShot

_LENGTH, _MEASURING = "How networks are trained", "What is compared, and measured"

Network = Annotated[
    str,
    typer.Option(
        metavar="SPEC",
        help="Train this classifier: FILE.py, FILE.py:NAME or MODULE:NAME, as for `predict`. It needs an "
        "output for every class.",
    ),
]
Shots = Annotated[
    list[int] | None,
    typer.Option(
        "--shots",
        metavar="N",
        min=1,
        rich_help_panel=_MEASURING,
        help="Train on N images of each class. Repeat the option for more, or give several numbers; the "
        "default is 10 100.",
    ),
]
MoreShots = Annotated[
    list[int] | None, typer.Argument(metavar="[N]...", hidden=True, help="Give --shots several numbers.")
]
Starts = Annotated[
    list[str] | None,
    typer.Option(
        "--start",
        metavar="NAME",
        rich_help_panel=_MEASURING,
        help="Compare this start with the network's own initialisation: predicted, the same with the "
        "--diversify of that name (noise, orthogonal), or the whole prediction (whole), as of --scale "
        "predicted. Repeat the option for more; the default is all but whole.",
    ),
]
Seeds = Annotated[
    int, typer.Option(metavar="N", min=1, rich_help_panel=_MEASURING, help="Train with this many seeds.")
]
TestImages = Annotated[
    int,
    typer.Option(
        "--images",
        metavar="N",
        min=0,
        rich_help_panel=_MEASURING,
        help="Measure on this many of the test images; 0 stands for all.",
    ),
]
Validation = Annotated[
    int,
    typer.Option(
        metavar="N",
        min=1,
        rich_help_panel=_MEASURING,
        help="Choose the learning rate on this many training images, held out, but at most a fifth of them.",
    ),
]
Steps = Annotated[
    int, typer.Option(metavar="N", min=1, rich_help_panel=_LENGTH, help="Train for this many steps.")
]
Batch = Annotated[
    int, typer.Option(metavar="N", min=2, rich_help_panel=_LENGTH, help="Take this many images a step.")
]
Optimizer = Annotated[
    Literal["sgd", "adamw"],
    typer.Option(rich_help_panel=_LENGTH, help="Train with SGD with momentum, or with AdamW."),
]
Rates = Annotated[
    list[float] | None,
    typer.Option(
        "--rate",
        metavar="RATE",
        rich_help_panel=_LENGTH,
        help="Try this learning rate. Repeat the option for more; the default is 0.01, 0.03 and 0.1, for "
        "AdamW 3e-4, 1e-3 and 3e-3.",
    ),
]
Plain = Annotated[
    bool,
    typer.Option(
        "--no-augmentation", rich_help_panel=_LENGTH, help="Neither crop nor mirror the training images."
    ),
]
Trainings = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE",
        help="Add every training to this file of JSON lines; what it has is not trained again.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print a JSON object a line instead of a table.")]


def transfer(
    data: Data,
    more_shots: MoreShots = None,
    *,
    network: Network,
    settings: opt.Settings = None,
    shots: Shots = None,
    start: Starts = None,
    seeds: Seeds = 5,
    images: TestImages = 1000,
    validation: Validation = 500,
    steps: Steps = 100,
    batch: Batch = 32,
    optimizer: Optimizer = "sgd",
    rate: Rates = None,
    no_augmentation: Plain = False,
    weights: opt.Weights = DEFAULT_WEIGHTS,
    output: Trainings = None,
    as_json: Json = False,
) -> None:
    """Compare what a network learns from few images, from its own initialisation and from predictions."""
    if output is not None:
        check_output(output)
    if more_shots and (not shots or min(more_shots) < 1):
        raise typer.BadParameter(f"{more_shots[0]} stands alone; write --shots {more_shots[0]}")
    from ghn_init.cli._bars import EvaluationBar
    from ghn_init.cli._spec import check_file, parse_settings, parse_spec
    from ghn_init.training._transfer import Training, TransferConfig
    from ghn_init.training._transfer import transfer as compare
    from ghn_init.training.data import load_images

    try:
        spec, keywords = parse_spec(network), parse_settings(settings or ())
    except ModelSpecError as error:
        raise typer.BadParameter(str(error)) from error
    if spec.is_file:
        check_file(spec.source)
    config = TransferConfig(
        shots=(*(shots or (10, 100)), *(more_shots or ())),
        starts=tuple(start or ("predicted", "noise", "orthogonal")),
        optimizer=optimizer,
        rates=tuple(rate or ()),
        seeds=seeds,
        steps=steps,
        batch_size=batch,
        augmented=not no_augmentation,
        validation=validation,
        images=images,
    )
    with EvaluationBar(config.trainings) as bar:

        def on_training(training: Training) -> None:
            bar.network(f"{training.setting.start} {training.setting.shots}", training.test)

        rows = compare(
            _builder(spec, keywords), load_images(data, "train"), load_images(data, "test"), config,
            weights=weights, name=_called(spec, keywords), file=output, on_training=on_training,
        )  # fmt: skip
    _show(rows, as_json=as_json)


def _called(spec: ModelSpec, settings: Mapping[str, Any]) -> str:
    return str(spec) + "".join(f" {key}={value!r}" for key, value in sorted(settings.items()))


def _builder(spec: ModelSpec, settings: Mapping[str, Any]) -> Callable[[], nn.Module]:
    """What makes the network anew; an instance that a module holds is copied, because training changes it."""
    from ghn_init.cli._spec import load_model

    first = load_model(spec, settings).model

    def build() -> nn.Module:
        model = load_model(spec, settings).model
        return copy.deepcopy(model) if model is first else model

    return build


def _show(rows: Sequence[LowShot], *, as_json: bool) -> None:
    if as_json:
        for row in rows:
            typer.echo(json.dumps(row.to_dict()))
        return
    from rich.console import Console

    Console().print(_table(rows))
    if any(row.at_edge for row in rows):
        typer.echo("* the lowest or highest rate tried: a better one may lie beyond (--rate)")
    if any(row.diverged for row in rows):
        typer.echo("a training whose loss was not finite counts as 0 %")


def _table(rows: Sequence[LowShot]) -> Table:
    from rich.table import Table

    table = Table(title="test accuracy, %: mean and 95 % interval over seeds")
    for heading in ("images a class", "start", "rate", "seeds", "accuracy", "more than default"):
        table.add_column(heading, justify="left" if heading == "start" else "right")
    for row in rows:
        lost = f", {row.diverged} diverged" if row.diverged else ""
        gain = "" if row.start == "default" else _with_interval(row.gain, row.gain_interval, "+")
        table.add_row(
            str(row.shots), row.start, f"{row.rate:g}{'*' if row.at_edge else ''}", f"{row.n}{lost}",
            _with_interval(row.mean, row.interval), gain, end_section=row is rows[-1],
        )  # fmt: skip
    return table


def _with_interval(mean: float, interval: float, sign: str = "") -> str:
    return f"{mean:{sign}.1f}" + ("" if math.isnan(interval) else f" ± {interval:.1f}")
