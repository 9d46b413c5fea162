"""Arguments and options that the commands share, and how their text becomes values."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ghn_init._errors import ModelSpecError, PredictError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ghn_init.cli._spec import ModelSpec


def option(usage: str, text: str, *, panel: str | None = None, least: int | None = None) -> Any:
    """An option of the command line, with names and metavar as in "-o --output FILE".

    Without names they follow from the parameter's. `text` is its help, listed under the heading `panel`.
    """
    names = [word for word in usage.split() if word.startswith("-")]
    metavar = usage.split()[-1] if len(usage.split()) > len(names) else None
    return typer.Option(*names, metavar=metavar, help=text, rich_help_panel=panel, min=least)


Spec = Annotated[
    str,
    typer.Argument(
        metavar="SPEC",
        help="The model, as FILE.py, FILE.py:NAME or MODULE:NAME; NAME is an nn.Module instance, or a class "
        "or function that makes one.",
    ),
]
Settings = Annotated[
    list[str] | None,
    option(
        "--set KEY=VALUE",
        "Pass a keyword argument to the class or function. VALUE is a Python literal, or else a string. "
        "Repeat the option for more.",
    ),
]
Output = Annotated[
    Path | None,
    option(
        "-o --output FILE",
        "Write the state dict to this file, which is replaced if it exists; by default NAME.safetensors "
        "in the current folder. With --max-shard-size it is a folder, by default NAME, that is new or empty.",
    ),
]
MaxShardSize = Annotated[
    str | None,
    option(
        "SIZE",
        "Write a folder of files of at most this size, such as 5GB, tensor by tensor. A model that a "
        "class or function builds then takes memory for its largest tensor only.",
    ),
]
Drawing = Annotated[
    Path | None,
    option("--draw FILE", "Draw the graph as .dot, or as .svg, .pdf or .png, which need graphviz."),
]
Report = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Write a page (HTML) to this file: what to expect, each layer's scale before and after, the "
        "graph and the plan.",
    ),
]
Weights = Annotated[
    str,
    option(
        "WEIGHTS",
        "Predict with this hypernetwork: a bundled name, a file, a folder or "
        "hf://ORG/REPO\\[/FILE.pt]\\[@REVISION].",
    ),
]
Head = Annotated[
    Literal["auto", "predict", "keep"],
    option("", "Predict the classifier, keep it, or (auto) predict it if its width is known."),
]
Scale = Annotated[
    Literal["auto", "own", "predicted"],
    option(
        "",
        "To train it (auto, the default): weights as predicted in classifiers of the kind that the "
        "hypernetwork knows, at the layers' own scale in other networks, norms as they were. Own scale "
        "everywhere (own), or everything as predicted, to use it untrained (predicted, and auto with "
        "--head predict).",
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


@dataclass(frozen=True, slots=True)
class Request:
    """What both commands hand on: the model, how to build it, the GHN, the other arguments of `plan`."""

    spec: ModelSpec
    settings: dict[str, Any]
    weights: str
    arguments: dict[str, Any]

    @property
    def seed(self) -> int:
        """The seed, which also holds for the initialisation of what is kept."""
        return self.arguments["seed"]


def make_request(
    spec: str, settings: Sequence[str] | None, weights: str, input_shape: str | None, **arguments: Any
) -> Request:
    """Parse the texts among the options.

    Raises:
        typer.BadParameter: Wrong usage (exit status 2).
        ModelSpecError: The model's file is not there.
    """
    from ghn_init.cli._spec import check_file, parse_settings, parse_spec  # loads torch

    try:
        parsed, keywords = parse_spec(spec), parse_settings(settings or ())
    except ModelSpecError as error:
        raise typer.BadParameter(str(error)) from error
    if parsed.is_file:
        check_file(parsed.source)  # at once, not after all else has been loaded
    return Request(parsed, keywords, weights, {"example_input": parse_shape(input_shape), **arguments})


def check_size(text: str) -> None:
    """See that this is a size such as 5GB.

    Raises:
        typer.BadParameter: Anything else.
    """
    from ghn_init._writing.safetensors_writer import size_in_bytes  # loads torch

    try:
        size_in_bytes(text)
    except PredictError as error:
        raise typer.BadParameter(f"{text!r} is no size; write --max-shard-size 5GB") from error


def parse_shape(text: str | None) -> tuple[int, ...] | None:
    """`1,3,224,224` as a tuple of positive integers.

    Raises:
        typer.BadParameter: Anything else.
    """
    if text is None:
        return None
    parts = text.replace("x", ",").split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise typer.BadParameter(f"{text!r} is not a shape; write --input-shape 1,3,224,224")
    return tuple(int(part) for part in parts)
