"""`ghn-init transfer`."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path  # noqa: TC003 (typer reads the annotations)
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer

from ghn_init._weights import DEFAULT_WEIGHTS
from ghn_init.cli import _options as opt  # noqa: TC001 (as above)
from ghn_init.cli._options import option
from ghn_init.cli._output import check_output
from ghn_init.cli._values import parse_model

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from rich.table import Table
    from torch import nn

    from ghn_init.cli._spec import ModelSpec
    from ghn_init.training._transfer import LowShot

_LENGTH: Final = "How networks are trained"
_MEASURING: Final = "What is compared, and measured"


def transfer(
    data: opt.Data,
    more_shots: Annotated[
        list[int] | None, typer.Argument(metavar="N", hidden=True, help="Give --shots several numbers.")
    ] = None,
    *,
    network: Annotated[
        str,
        option(
            "SPEC",
            "Train this classifier: FILE.py, FILE.py:NAME or MODULE:NAME, as for `predict`. It needs an "
            "output for every class.",
        ),
    ],
    settings: opt.Settings = None,
    shots: Annotated[
        list[int] | None,
        option(
            "N",
            "Train on N images of each class. Repeat the option for more, or give several numbers; the "
            "default is 10 100.",
            panel=_MEASURING,
            least=1,
        ),
    ] = None,
    start: Annotated[
        list[str] | None,
        option(
            "NAME",
            "Compare this start with the network's own initialisation: predicted, the same with the "
            "--diversify of that name (noise, orthogonal), or the whole prediction (whole), as of --scale "
            "predicted. Repeat the option for more; the default is all but whole.",
            panel=_MEASURING,
        ),
    ] = None,
    seeds: Annotated[int, option("N", "Train with this many seeds.", panel=_MEASURING, least=1)] = 5,
    images: Annotated[
        int,
        option("N", "Measure on this many of the test images; 0 stands for all.", panel=_MEASURING, least=0),
    ] = 1000,
    validation: Annotated[
        int,
        option(
            "N",
            "Choose the learning rate on this many training images, held out, but at most a fifth of them.",
            panel=_MEASURING,
            least=1,
        ),
    ] = 500,
    steps: Annotated[int, option("N", "Train for this many steps.", panel=_LENGTH, least=1)] = 100,
    batch: Annotated[int, option("N", "Take this many images a step.", panel=_LENGTH, least=2)] = 32,
    optimizer: Annotated[
        Literal["sgd", "adamw"], option("", "Train with SGD with momentum, or with AdamW.", panel=_LENGTH)
    ] = "sgd",
    rate: Annotated[
        list[float] | None,
        option(
            "RATE",
            "Try this learning rate. Repeat the option for more; the default is 0.01, 0.03, 0.1 and "
            "0.3, for AdamW 3e-4, 1e-3 and 3e-3.",
            panel=_LENGTH,
        ),
    ] = None,
    no_augmentation: Annotated[
        bool, option("--no-augmentation", "Neither crop nor mirror the training images.", panel=_LENGTH)
    ] = False,
    weights: opt.Weights = DEFAULT_WEIGHTS,
    output: Annotated[
        Path | None,
        option(
            "--output -o FILE",
            "Add every training to this file of JSON lines; what it has is not trained again.",
        ),
    ] = None,
    as_json: Annotated[bool, option("--json", "Print a JSON object a line instead of a table.")] = False,
) -> None:
    """Compare what a network learns from few images, from its own initialisation and from predictions."""
    if output is not None:
        check_output(output)
    if more_shots and (not shots or min(more_shots) < 1):
        raise typer.BadParameter(f"{more_shots[0]} stands alone; write --shots {more_shots[0]}")
    from ghn_init.cli._bars import Bar
    from ghn_init.training import load_images
    from ghn_init.training._transfer import Training, TransferConfig
    from ghn_init.training._transfer import transfer as compare

    spec, keywords = parse_model(network, settings)
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
    name = str(spec) + "".join(f" {key}={value!r}" for key, value in sorted(keywords.items()))
    with Bar(config.trainings) as bar:

        def on_training(training: Training) -> None:
            setting = training.setting
            bar.advance(label=f"{setting.start} {setting.shots}: {training.test:.1f} %")

        rows = compare(
            _builder(spec, keywords), load_images(data, "train"), load_images(data, "test"), config,
            weights=weights, name=name, file=output, on_training=on_training,
        )  # fmt: skip
    _show(rows, as_json=as_json)


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
        table.add_column(heading, justify="left" if heading == "start" else "right", overflow="fold")
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
