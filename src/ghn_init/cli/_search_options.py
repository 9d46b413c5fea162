"""Arguments and options of `ghn-init measure`, `properties` and `search`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

_TRAINING, _CHOICE = "How networks are trained and measured", "Which architectures"

Weights = Annotated[
    str,
    typer.Option(
        metavar="WEIGHTS",
        help="Use this hypernetwork: a bundled name, a folder, a file, or "
        "hf://ORG/REPO\\[/FILE.pt]\\[@REVISION].",
    ),
]
Split = Annotated[
    str,
    typer.Option(
        metavar="NAME", help="Take architectures of this split of DeepNets-1M.", rich_help_panel=_CHOICE
    ),
]
Sample = Annotated[
    int,
    typer.Option(
        metavar="N",
        min=1,
        help="Take the first N architectures of the split that are within the limits.",
        rich_help_panel=_CHOICE,
    ),
]
MaxParams = Annotated[
    float | None,
    typer.Option(
        metavar="MILLIONS", help="Pass over architectures with more parameters.", rich_help_panel=_CHOICE
    ),
]
MaxActivations = Annotated[
    float | None,
    typer.Option(
        metavar="MILLIONS",
        help="Pass over architectures whose feature maps have more elements, roughly counted: slow ones.",
        rich_help_panel=_CHOICE,
    ),
]
Width = Annotated[
    int | None,
    typer.Option(
        metavar="C",
        help="Give the first cell this many channels; by default those of the split.",
        rich_help_panel=_CHOICE,
    ),
]
Measured = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        metavar="MEASURED",
        help="Append a line for every architecture to this JSON-lines file; what it has is not measured "
        "again.",
    ),
]
Steps = Annotated[
    int,
    typer.Option(
        metavar="N", min=1, help="Train every network for this many steps.", rich_help_panel=_TRAINING
    ),
]
BatchSize = Annotated[
    int,
    typer.Option(metavar="N", min=2, help="Train on this many images a step.", rich_help_panel=_TRAINING),
]
LearningRate = Annotated[
    float,
    typer.Option(
        "--lr",
        metavar="RATE",
        help="Begin with this learning rate; it falls to zero along half a cosine.",
        rich_help_panel=_TRAINING,
    ),
]
Target = Annotated[
    float,
    typer.Option(
        metavar="PERCENT",
        help="Count the steps until the training accuracy, as the mean over 20 steps, reaches this.",
        rich_help_panel=_TRAINING,
    ),
]
Count = Annotated[
    int,
    typer.Option(
        "--images",
        metavar="N",
        min=2,
        help="Measure accuracies on N of the training images that are held out.",
        rich_help_panel=_TRAINING,
    ),
]
ImageSize = Annotated[
    int | None,
    typer.Option(
        metavar="PIXELS",
        help="Show networks images of this side, which is that of the data or half of it.",
        rich_help_panel=_TRAINING,
    ),
]
BFloat16 = Annotated[
    bool,
    typer.Option("--bf16", help="Run the networks in bfloat16.", rich_help_panel=_TRAINING),
]

MeasuredFile = Annotated[
    Path, typer.Argument(metavar="MEASURED", help="The file of measurements that `measure` wrote.")
]
HeldOut = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Test the regressors on these measurements of another split; by default on the last quarter of "
        "MEASURED, to which they are then not fitted.",
    ),
]
Regressors = Annotated[
    Path,
    typer.Option("--output", "-o", metavar="FILE", help="Write the regressors to this JSON file."),
]
Picture = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Draw predicted against measured properties to this .svg, .png or .pdf file."
    ),
]

Properties = Annotated[
    Path, typer.Argument(metavar="PROPERTIES", help="The file of regressors that `properties` wrote.")
]
By = Annotated[
    Literal["accuracy", "noise", "speed", "convergence"],
    typer.Option(
        help="Rank by this property: accuracy after training, the same under noise, images a second, or "
        "steps to the target accuracy."
    ),
]
Top = Annotated[int, typer.Option(metavar="N", min=1, help="Measure and print the first N of the ranking.")]
Found = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        metavar="FOUND",
        help="Append the measured architectures to this file, of the kind that `measure` writes.",
    ),
]
