"""Arguments and options of `ghn-init measure`, `properties` and `search`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ghn_init.cli._options import option

_TRAINING, _CHOICE = "How networks are trained and measured", "Which architectures"

Weights = Annotated[
    str,
    option(
        "WEIGHTS",
        "Use this hypernetwork: a bundled name, a folder, a file or hf://ORG/REPO\\[/FILE.pt]\\[@REVISION].",
    ),
]
Split = Annotated[str, option("NAME", "Take architectures of this split of DeepNets-1M.", panel=_CHOICE)]
Sample = Annotated[
    int,
    option("N", "Take the first N architectures of the split within the limits.", panel=_CHOICE, least=1),
]
MaxParams = Annotated[
    float | None, option("MILLIONS", "Pass over architectures with more parameters.", panel=_CHOICE)
]
MaxActivations = Annotated[
    float | None,
    option(
        "MILLIONS",
        "Pass over architectures whose feature maps have more elements, roughly counted: slow ones.",
        panel=_CHOICE,
    ),
]
Width = Annotated[
    int | None,
    option(
        "C", "Give the first cell this many channels; by default those of the split.", panel=_CHOICE, least=8
    ),
]
Measured = Annotated[
    Path,
    option(
        "--output -o MEASURED",
        "Append a line for every architecture to this JSON-lines file; what it has is not measured again.",
    ),
]
Steps = Annotated[int, option("N", "Train every network for this many steps.", panel=_TRAINING, least=1)]
BatchSize = Annotated[int, option("N", "Train on this many images a step.", panel=_TRAINING, least=2)]
LearningRate = Annotated[
    float,
    option(
        "--lr RATE",
        "Begin with this learning rate; it falls to zero along half a cosine.",
        panel=_TRAINING,
    ),
]
Target = Annotated[
    float,
    option(
        "PERCENT",
        "Count the steps until the training accuracy, as the mean over 20 steps, reaches this.",
        panel=_TRAINING,
    ),
]
Count = Annotated[
    int,
    option(
        "--images N",
        "Measure accuracies on N of the training images that are held out.",
        panel=_TRAINING,
        least=2,
    ),
]
ImageSize = Annotated[
    int | None,
    option(
        "PIXELS",
        "Show networks images of this side: that of the data, or half of it.",
        panel=_TRAINING,
    ),
]
BFloat16 = Annotated[bool, option("--bf16", "Run the networks in bfloat16.", panel=_TRAINING)]

MeasuredFile = Annotated[
    Path, typer.Argument(metavar="MEASURED", help="The file of measurements that `measure` wrote.")
]
HeldOut = Annotated[
    Path | None,
    option(
        "FILE",
        "Test the regressors on these measurements of another split; by default on the last quarter of "
        "MEASURED, to which they are then not fitted.",
    ),
]
Regressors = Annotated[Path, option("--output -o FILE", "Write the regressors to this JSON file.")]
Picture = Annotated[
    Path | None,
    option("FILE", "Draw predicted against measured properties to this .svg, .png or .pdf file."),
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
Top = Annotated[int, option("N", "Measure and print the first N of the ranking.", least=1)]
Found = Annotated[
    Path,
    option(
        "--output -o FOUND",
        "Append the measured architectures to this file, of the kind that `measure` writes.",
    ),
]
