"""How an argument or option is declared, and those that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final, Literal

import typer

PLACES: Final = "a bundled name, a folder, a file or hf://ORG/REPO\\[/FILE.pt]\\[@REVISION]"
"""Where a hypernetwork may be."""


def option(usage: str, text: str, *, panel: str | None = None, least: int | None = None) -> Any:
    """An option of the command line, with names and metavar as in "-o --output FILE".

    Without names they follow from the parameter's; names alone are those of a flag. `text` is its help,
    listed under the heading `panel`. What only one command takes is declared there.
    """
    names = [word for word in usage.split() if word.startswith("-")]
    metavar = usage.split()[-1] if len(usage.split()) > len(names) else None
    return typer.Option(*names, metavar=metavar, help=text, rich_help_panel=panel, min=least)


def argument(metavar: str, text: str) -> Any:
    """An argument of the command line."""
    return typer.Argument(metavar=metavar, help=text)


Spec = Annotated[
    str,
    argument(
        "SPEC",
        "Name the model as FILE.py, FILE.py:NAME or MODULE:NAME; NAME is an nn.Module instance, or a class "
        "or function that makes one.",
    ),
]
Settings = Annotated[
    list[str] | None,
    option(
        "--set KEY=VALUE",
        "Pass a keyword argument to the class or function. VALUE is a Python literal, true, false or null, "
        "or else a string. Repeat the option for more.",
    ),
]
Weights = Annotated[str, option("WEIGHTS", f"Use this hypernetwork: {PLACES}.")]
Head = Annotated[
    Literal["auto", "predict", "keep"],
    option("", "Predict the classifier, keep it, or (auto) predict it if its width is known."),
]
Scale = Annotated[
    Literal["auto", "own", "predicted"],
    option(
        "",
        "Prepare the network for training (auto): weights are as predicted in classifiers of the kind that "
        "the hypernetwork knows, later ones at most at the layers' own scale; in others weights before batch "
        "norms are, at own scale. "
        "Take own scale everywhere (own), or everything as predicted, for a network that is used untrained "
        "(predicted, and auto with --head predict).",
    ),
]
Frozen = Annotated[
    Literal["keep", "predict"],
    option("", "Keep parameters that do not require gradients, or predict them, too."),
]
Include = Annotated[
    list[str] | None,
    option("PATTERN", "Predict only parameters whose names match. Repeat the option for more."),
]
Exclude = Annotated[
    list[str] | None, option("PATTERN", "Keep parameters whose names match. Repeat the option for more.")
]
Diversify = Annotated[
    Literal["noise", "orthogonal"] | None,
    option("", "Make the copies that tiling leaves differ (arXiv 2207.10049)."),
]
Seed = Annotated[
    int, option("N", "Seed the random numbers of --diversify and of the initialisation of what is kept.")
]
Strict = Annotated[bool, option("--strict", "Fail if a parameter cannot be predicted.")]
InputShape = Annotated[
    str | None,
    option(
        "N,C,H,W",
        "Trace the model with an input of this shape, such as 1,3,224,224; by default one is found.",
    ),
]
Json = Annotated[bool, option("--json", "Print one JSON object on stdout.")]
Data = Annotated[
    Path,
    argument(
        "DATA",
        "Read images from a folder with one per class, an archive of that, torchvision's CIFAR, or an .npz.",
    ),
]
BFloat16 = Annotated[
    bool,
    option(
        "--bf16",
        "Run the networks in bfloat16, which rounds and is faster only where the processor computes in it.",
    ),
]
Workers = Annotated[
    int | None,
    option("N", "Measure in this many processes, one core each; the default is one per core.", least=1),
]

_CHOICE: Final = "Which architectures"

Split = Annotated[str, option("NAME", "Take architectures of this split of DeepNets-1M.", panel=_CHOICE)]
Sample = Annotated[
    int,
    option("N", "Take the first N architectures of the split within the limits.", panel=_CHOICE, least=1),
]
MaxParams = Annotated[
    float | None, option("MILLIONS", "Pass over architectures with more parameters than this.", panel=_CHOICE)
]
MaxActivations = Annotated[
    float | None,
    option(
        "MILLIONS",
        "Pass over slow architectures, whose feature maps have more elements than this, roughly counted.",
        panel=_CHOICE,
    ),
]
