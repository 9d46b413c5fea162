"""Arguments and options of the commands, and how their text becomes values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ghn_init.training._config import TrainConfig

_RUN, _MODEL, _KEEPING = "Run", "Hypernetwork", "Keeping"

Data = Annotated[
    Path, typer.Argument(help="Images: an ImageFolder (or .tar.xz of one), torchvision's CIFAR, or .npz.")
]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for checkpoint, log and weights.")]
Config = Annotated[
    Path | None, typer.Option(help="JSON file of TrainConfig fields; options below override it.")
]
Start = Annotated[
    str | None, typer.Option("--from", help="Weights to start from: bundled name, folder, file.")
]
Steps = Annotated[int | None, typer.Option(help="Length of the run in steps.", rich_help_panel=_RUN)]
Duration = Annotated[
    str | None,
    typer.Option(help="Length of the run in training time: 90s, 30m, 2h.", rich_help_panel=_RUN),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        rich_help_panel=_MODEL,
        help="Any field of TrainConfig (lr=3e-4), or of GHNConfig with ghn. before it (ghn.hid=64).",
    ),
]
SoftLabels = Annotated[
    Path | None, typer.Option(help="Soft labels from `teach`, for --set soft_labels=SHARE.")
]
TimeLimit = Annotated[
    str | None,
    typer.Option(help="Stop cleanly after this long; run again to go on.", rich_help_panel=_KEEPING),
]
SaveEvery = Annotated[str, typer.Option(help="Between checkpoints.", rich_help_panel=_KEEPING)]
ValidateEvery = Annotated[
    str, typer.Option(help="Between quick validations; 0s: none.", rich_help_panel=_KEEPING)
]
ValidationNetworks = Annotated[
    int, typer.Option(min=1, help="Held-out architectures of a quick one.", rich_help_panel=_KEEPING)
]
ValidationImages = Annotated[
    int, typer.Option(min=2, help="Held-out images of a quick one.", rich_help_panel=_KEEPING)
]
TensorBoard = Annotated[
    bool,
    typer.Option(
        "--tensorboard",
        help="Write the log for TensorBoard, too, to `tensorboard/`.",
        rich_help_panel=_KEEPING,
    ),
]

Labels = Annotated[Path, typer.Option("--output", "-o", help="Soft labels, an .npz file.")]
Epochs = Annotated[float, typer.Option(help="Passes over the images.")]
TeacherSeed = Annotated[int, typer.Option(help="Of its weights, order and augmentation.")]
TeacherWidth = Annotated[int, typer.Option(min=1, help="Channels of its first stage.")]

Run = Annotated[Path, typer.Argument(help="Output folder of `train`; the run may still be going on.")]
Picture = Annotated[
    Path | None, typer.Option("--output", "-o", help="SVG file; default: curve.svg in that folder.")
]

Weights = Annotated[str, typer.Argument(help="Bundled name, directory, published .pt, hf://org/repo.")]
TestData = Annotated[Path, typer.Option("--data", help="Images, as for `train`; the test split is used.")]
Split = Annotated[
    list[str] | None, typer.Option("--split", help="Splits; default: all. Also resnet50 and vit.")
]
Sample = Annotated[int | None, typer.Option(min=1, help="Only the first N architectures of a split.")]
Count = Annotated[int | None, typer.Option("--images", min=2, help="Only N test images.")]
Noise = Annotated[bool, typer.Option("--noise", help="Also under Gaussian noise of std 0.08.")]
Scores = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", help="JSON file, written after every network; what it has is not measured again."
    ),
]
BFloat16 = Annotated[bool, typer.Option("--bf16", help="Run networks in bfloat16 (faster, rounded).")]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Processes, one core each; default: one for every core.")
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
