"""Arguments and options of the commands about training, and how their text becomes values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ghn_init.training._config import TrainConfig

_RUN, _MODEL, _KEEPING = "Length of the run", "What is trained, and how", "Keeping and watching the run"

Data = Annotated[
    Path,
    typer.Argument(
        metavar="DATA",
        help="The images: a folder with one per class, an archive of that, torchvision's CIFAR, or an .npz.",
    ),
]
Output = Annotated[
    Path,
    typer.Option("--output", "-o", metavar="FOLDER", help="Keep checkpoint, log and weights in this folder."),
]
Config = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Read fields of TrainConfig from this JSON file; other options go before it."
    ),
]
Start = Annotated[
    str | None,
    typer.Option(
        "--from", metavar="WEIGHTS", help="Start from these weights: a bundled name, a folder or a file."
    ),
]
Steps = Annotated[
    int | None, typer.Option(metavar="N", help="Train for this many steps.", rich_help_panel=_RUN)
]
Duration = Annotated[
    str | None,
    typer.Option(
        metavar="TIME",
        help="Train for this long, all parts of the run together: 90s, 30m or 2h.",
        rich_help_panel=_RUN,
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        rich_help_panel=_MODEL,
        help="Set a field of TrainConfig, such as lr=3e-4, or of GHNConfig, such as ghn.hid=64. "
        "Repeat the option for more.",
    ),
]
SoftLabels = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        rich_help_panel=_MODEL,
        help="Read the soft labels that `teach` wrote; --set soft_labels=SHARE says how much they count.",
    ),
]
TimeLimit = Annotated[
    str | None,
    typer.Option(
        metavar="TIME",
        help="Stop cleanly after this long; the same command goes on.",
        rich_help_panel=_KEEPING,
    ),
]
SaveEvery = Annotated[
    str,
    typer.Option(
        metavar="TIME", help="Write a checkpoint whenever this long has passed.", rich_help_panel=_KEEPING
    ),
]
ValidateEvery = Annotated[
    str,
    typer.Option(
        metavar="TIME",
        help="Validate quickly whenever this long has passed; 0s leaves only the validation at the end.",
        rich_help_panel=_KEEPING,
    ),
]
ValidationNetworks = Annotated[
    int,
    typer.Option(
        metavar="N",
        min=1,
        help="Validate quickly on this many held-out architectures.",
        rich_help_panel=_KEEPING,
    ),
]
ValidationImages = Annotated[
    int,
    typer.Option(
        metavar="N", min=2, help="Validate quickly on this many held-out images.", rich_help_panel=_KEEPING
    ),
]
TensorBoard = Annotated[
    bool,
    typer.Option(
        "--tensorboard",
        help="Write the log for TensorBoard, too, into the folder `tensorboard/`.",
        rich_help_panel=_KEEPING,
    ),
]

Labels = Annotated[
    Path, typer.Option("--output", "-o", metavar="FILE", help="Write the soft labels to this .npz file.")
]
Epochs = Annotated[
    float, typer.Option(metavar="N", help="Train the classifier for this many passes over the images.")
]
TeacherSeed = Annotated[
    int,
    typer.Option(metavar="N", help="Seed the classifier's weights, and the images' order and augmentation."),
]
TeacherWidth = Annotated[
    int,
    typer.Option(metavar="N", min=1, help="Give the classifier's first stage this many channels."),
]

Run = Annotated[
    Path, typer.Argument(metavar="RUN", help="The output folder of `train`; the run may still be going on.")
]
Picture = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE",
        help="Draw to this .svg, .png or .pdf file; the default is curve.svg in the folder of the run.",
    ),
]

Weights = Annotated[
    str,
    typer.Argument(
        metavar="WEIGHTS",
        help="The hypernetwork: a bundled name, a folder, a file or hf://ORG/REPO\\[@REVISION].",
    ),
]
TestData = Annotated[
    Path,
    typer.Option(
        "--data", metavar="DATA", help="Measure on the test split of these images, given as for `train`."
    ),
]
Split = Annotated[
    list[str] | None,
    typer.Option(
        "--split",
        metavar="NAME",
        help="Measure this split: test, wide, deep, dense, bnfree, resnet50 or vit. Repeat the option for "
        "more; the default is all of them.",
    ),
]
Sample = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="Measure only the first N architectures of a split."),
]
Count = Annotated[
    int | None, typer.Option("--images", metavar="N", min=2, help="Measure on N of the test images only.")
]
Noise = Annotated[
    bool,
    typer.Option(
        "--noise", help="Measure a second time under Gaussian noise of deviation 0.08, pixels being 0 to 1."
    ),
]
Scores = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE",
        help="Write the scores to this JSON file after every network; what it has is not measured again.",
    ),
]
BFloat16 = Annotated[bool, typer.Option("--bf16", help="Run the networks in bfloat16: faster, but rounded.")]
Workers = Annotated[
    int | None,
    typer.Option(
        metavar="N", min=1, help="Measure in this many processes, one core each; the default is one per core."
    ),
]


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


def training_config(
    file: Path | None, settings: Sequence[str] | None, steps: int | None, duration: str | None
) -> TrainConfig:
    """The configuration in `file`, overridden by settings KEY=VALUE and the run's length.

    Values are JSON, or else strings; `ghn.KEY` is a field of the GHN's configuration.

    Raises:
        typer.BadParameter: A setting without "=", a file that is no JSON object.
        ConfigError: Unknown keys, impossible values.
    """
    from ghn_init.training._config import TrainConfig

    values = _read_json(file) if file else {}
    for setting in settings or ():
        key, sign, text = setting.partition("=")
        if not sign:
            raise typer.BadParameter(f"{setting!r}; expected KEY=VALUE")
        owner = values.setdefault("ghn", {}) if key.startswith("ghn.") else values
        if not isinstance(owner, dict):
            raise typer.BadParameter(f"{setting!r} and ghn={owner!r}; expected only one of them")
        owner[key.removeprefix("ghn.")] = _value(text)
    if steps is not None:
        values["steps"] = steps
    if duration is not None:
        values["duration"] = seconds(duration)
    return TrainConfig.from_dict(values)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{file}: cannot be read as JSON ({error})") from error
    if not isinstance(values, dict):
        raise typer.BadParameter(f"{file}: expected a JSON object with fields of TrainConfig")
    return values


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
