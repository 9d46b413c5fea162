"""How the text of arguments and options becomes values."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import typer

from ghn_init._errors import ModelSpecError, PredictError
from ghn_init.cli._literals import literal

if TYPE_CHECKING:
    from collections.abc import Sequence, Set
    from pathlib import Path

    from ghn_init.cli._spec import ModelSpec
    from ghn_init.training._config import TrainConfig

_SEEDS: Final = -(1 << 63), (1 << 64) - 1
"""The least and the largest seed that `torch.manual_seed` takes."""


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
    """Parse the texts among the options, and see that torch takes the seed.

    Raises:
        typer.BadParameter: Wrong usage (exit status 2).
        ModelSpecError: The model's file is not there.
    """
    seed = arguments["seed"]
    if not _SEEDS[0] <= seed <= _SEEDS[1]:
        raise typer.BadParameter(f"{seed} is no seed; expected one of 64 bits", param_hint="--seed")
    parsed, keywords = parse_model(spec, settings)
    return Request(parsed, keywords, weights, {"example_input": parse_shape(input_shape), **arguments})


def parse_model(spec: str, settings: Sequence[str] | None) -> tuple[ModelSpec, dict[str, Any]]:
    """What SPEC and the `--set KEY=VALUE` say.

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
    return parsed, keywords


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


def seconds(text: str) -> float:
    """A length of time as 90, 90s, 30m or 2h, in seconds.

    Raises:
        typer.BadParameter: Anything else.
    """
    units = {"s": 1.0, "m": 60.0, "h": 3600.0}
    number, unit = (text[:-1], units[text[-1]]) if text[-1:] in units else (text, 1.0)
    try:
        value = float(number) * unit
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise typer.BadParameter(f"{text!r} is no length of time; write 90s, 30m or 2h")
    return value


def training_config(
    file: Path | None, settings: Sequence[str] | None, steps: int | None, duration: str | None
) -> tuple[TrainConfig, Set[str]]:
    """The configuration in `file`, overridden by settings KEY=VALUE and the run's length.

    Values are as `literal` reads them, of a key that is given twice the last; `ghn.KEY` is a field of the
    GHN's configuration.

    Returns:
        The configuration, and the fields of the GHN's that were given.

    Raises:
        typer.BadParameter: A setting without "=", a file that is no JSON object.
        ConfigError: Unknown keys, impossible values.
    """
    from ghn_init.training._config import TrainConfig

    values = _read_json(file) if file else {}
    if steps is not None or duration is not None:  # the other length of the two is then none
        values.pop("steps", None)
        values.pop("duration", None)
    for setting in settings or ():
        key, sign, text = setting.partition("=")
        if not sign:
            raise typer.BadParameter(f"--set {setting!r} is not KEY=VALUE, e.g. --set lr=3e-4")
        owner = values.setdefault("ghn", {}) if key.startswith("ghn.") else values
        if not isinstance(owner, dict):
            raise typer.BadParameter(
                f"--set {setting!r} and ghn={owner!r} exclude each other; give one of them"
            )
        owner[key.removeprefix("ghn.")] = literal(text)
    if steps is not None:
        values["steps"] = steps
    if duration is not None:
        values["duration"] = seconds(duration)
    config = TrainConfig.from_dict(values)
    return config, set(values.get("ghn", ()))


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise typer.BadParameter(f"{file} holds no JSON object with fields of TrainConfig")
    return values
