"""Arguments and options that the commands share, and how their text becomes values."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ghn_init._errors import ModelSpecError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ghn_init.cli._spec import ModelSpec

Spec = Annotated[
    str,
    typer.Argument(
        metavar="SPEC",
        help="The model: FILE.py, FILE.py:NAME or MODULE:NAME, NAME being an nn.Module instance, a class "
        "or a function that builds one.",
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Keyword argument of the class or function; a Python literal, else a string. Repeatable.",
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "-o",
        "--output",
        metavar="FILE",
        help="Where to write the state dict; NAME.safetensors here if left out. Replaced if it exists. With "
        "--max-shard-size a folder, NAME if left out, which must be new or empty.",
    ),
]
MaxShardSize = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Write a folder of files of at most this size, e.g. 5GB, tensor by tensor: a model that a class "
        "or function builds takes memory for its largest tensor only.",
    ),
]
Drawing = Annotated[
    Path | None,
    typer.Option("--draw", metavar="FILE", dir_okay=False, help="Draw the graph: .svg, .pdf, .png or .dot."),
]
Weights = Annotated[
    str, typer.Option(help="Bundled name, file, folder or hf://ORG/REPO\\[@REVISION] of the hypernetwork.")
]
Head = Annotated[
    Literal["auto", "predict", "keep"],
    typer.Option(help="The classifier: predict it, keep it, or predict it if its width is known (auto)."),
]
Include = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Predict only parameters whose names match. Repeatable."),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Keep parameters whose names match. Repeatable."),
]
Diversify = Annotated[
    Literal["noise", "orthogonal"] | None,
    typer.Option(help="Make the copies that tiling leaves differ (arXiv 2207.10049)."),
]
Seed = Annotated[int, typer.Option(help="Of --diversify, and of the initialisation of what is kept.")]
Strict = Annotated[bool, typer.Option("--strict", help="Fail if a parameter cannot be predicted.")]
InputShape = Annotated[
    str | None,
    typer.Option(metavar="N,C,H,W", help="Shape of the example input, e.g. 1,3,224,224; found if left out."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


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
    """
    from ghn_init.cli._spec import parse_settings, parse_spec  # loads torch

    try:
        parsed, keywords = parse_spec(spec), parse_settings(settings or ())
    except ModelSpecError as error:
        raise typer.BadParameter(str(error)) from error
    return Request(parsed, keywords, weights, {"example_input": parse_shape(input_shape), **arguments})


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
