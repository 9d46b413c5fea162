"""Arguments and options of the commands about training, and how their text becomes values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ghn_init.cli._options import option

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
Output = Annotated[Path, option("--output -o FOLDER", "Keep checkpoint, log and weights in this folder.")]
Config = Annotated[
    Path | None, option("FILE", "Read fields of TrainConfig from this JSON file; other options go before it.")
]
Start = Annotated[
    str | None, option("--from WEIGHTS", "Start from these weights: a bundled name, a folder or a file.")
]
Steps = Annotated[int | None, option("N", "Train for this many steps.", panel=_RUN)]
Duration = Annotated[
    str | None,
    option("TIME", "Train for this long, all parts of the run together: 90s, 30m or 2h.", panel=_RUN),
]
Settings = Annotated[
    list[str] | None,
    option(
        "--set KEY=VALUE",
        "Set a field of TrainConfig, such as lr=3e-4, or of GHNConfig, such as ghn.hid=64. "
        "Repeat the option for more.",
        panel=_MODEL,
    ),
]
SoftLabels = Annotated[
    Path | None,
    option(
        "FILE",
        "Read the soft labels that `teach` wrote; --set soft_labels=SHARE says how much they count.",
        panel=_MODEL,
    ),
]
TimeLimit = Annotated[
    str | None, option("TIME", "Stop cleanly after this long; the same command goes on.", panel=_KEEPING)
]
SaveEvery = Annotated[
    str, option("TIME", "Write a checkpoint whenever this long has passed.", panel=_KEEPING)
]
ValidateEvery = Annotated[
    str,
    option(
        "TIME",
        "Validate quickly whenever this long has passed; 0s leaves only the validation at the end.",
        panel=_KEEPING,
    ),
]
ValidationNetworks = Annotated[
    int, option("N", "Validate quickly on this many held-out architectures.", panel=_KEEPING, least=1)
]
ValidationImages = Annotated[
    int, option("N", "Validate quickly on this many held-out images.", panel=_KEEPING, least=2)
]
TensorBoard = Annotated[
    bool,
    option(
        "--tensorboard", "Write the log for TensorBoard, too, into the folder `tensorboard/`.", panel=_KEEPING
    ),
]

Labels = Annotated[Path, option("--output -o FILE", "Write the soft labels to this .npz file.")]
Epochs = Annotated[float, option("N", "Train the classifier for this many passes over the images.")]
TeacherSeed = Annotated[
    int, option("N", "Seed the classifier's weights, and the images' order and augmentation.")
]
TeacherWidth = Annotated[int, option("N", "Give the classifier's first stage this many channels.", least=1)]

Run = Annotated[
    Path, typer.Argument(metavar="RUN", help="The output folder of `train`; the run may still be going on.")
]
Picture = Annotated[
    Path | None,
    option(
        "--output -o FILE",
        "Draw to this .svg, .png or .pdf file; the default is curve.svg in the folder of the run.",
    ),
]

Weights = Annotated[
    str,
    typer.Argument(
        metavar="WEIGHTS",
        help="The hypernetwork: a bundled name, a folder, a file or hf://ORG/REPO\\[/FILE.pt]\\[@REVISION].",
    ),
]
TestData = Annotated[
    Path, option("--data DATA", "Measure on the test split of these images, given as for `train`.")
]
Split = Annotated[
    list[str] | None,
    option(
        "--split NAME",
        "Measure this split: test, wide, deep, dense, bnfree, resnet50 or vit. Repeat the option for "
        "more; the default is all of them.",
    ),
]
Sample = Annotated[int | None, option("N", "Measure only the first N architectures of a split.", least=1)]
Count = Annotated[int | None, option("--images N", "Measure on N of the test images only.", least=2)]
Noise = Annotated[
    bool,
    option("--noise", "Measure a second time under Gaussian noise of deviation 0.08, pixels being 0 to 1."),
]
Scores = Annotated[
    Path | None,
    option(
        "--output -o FILE",
        "Write the scores to this JSON file after every network; what it has is not measured again.",
    ),
]
BFloat16 = Annotated[
    bool,
    option(
        "--bf16", "Run the networks in bfloat16: rounded, and faster only where the processor computes in it."
    ),
]
Workers = Annotated[
    int | None,
    option("N", "Measure in this many processes, one core each; the default is one per core.", least=1),
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
