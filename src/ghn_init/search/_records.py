"""Files of measurements: JSON lines, the first of which says how was measured; one more for each network."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ghn_init._errors import TrainingError
from ghn_init._files import destination, write_bytes
from ghn_init.search._recipe import Measurement, Recipe
from ghn_init.training import teacher
from ghn_init.training._results import digest

if TYPE_CHECKING:
    from pathlib import Path

    from ghn_init._weights.ghn import GHN
    from ghn_init.training.data import Images


@dataclass(frozen=True)
class Header:
    """What all measurements of a file have in common.

    Attributes:
        split: The split of DeepNets-1M.
        seed: Its seed.
        weights: Name of the hypernetwork that predicted weights.
        weights_digest: Of its configuration and weights.
        images_digest: Of the images that networks were trained on.
        recipe: How was measured.
        torch: Version with which the file was begun.
    """

    split: str
    seed: int
    weights: str
    weights_digest: str
    images_digest: str
    recipe: Recipe
    torch: str = torch.__version__

    @classmethod
    def of(cls, split: str, weights: str, ghn: GHN, train: Images, recipe: Recipe) -> Header:
        """The header of measurements with this hypernetwork and these images."""
        return cls(split, 0, weights, digest(ghn), teacher.digest(train), recipe)

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return {**vars(self), "recipe": self.recipe.to_dict()}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Header:
        """What `to_dict` wrote; raises KeyError, TypeError or TrainingError otherwise."""
        return Header(**{**values, "recipe": Recipe(**values["recipe"])})

    def differences(self, other: Header) -> list[str]:
        """Names of the fields in which measurements are not comparable."""
        free = {"weights", "torch", "recipe"}
        mine, theirs = vars(self), vars(other)
        recipes = self.recipe.to_dict(), other.recipe.to_dict()
        found = [name for name in mine if name not in free and mine[name] != theirs[name]]
        return found + [f"recipe.{name}" for name in recipes[0] if recipes[0][name] != recipes[1][name]]


@dataclass(frozen=True)
class Records:
    """The measurements of a file, by their place in the split, and what they have in common."""

    header: Header
    measurements: dict[int, Measurement]


def read_records(path: Path) -> Records:
    """Read a file of measurements; a last line without its end, of a killed process, is passed over.

    Raises:
        TrainingError: It is none, or damaged; the message names the line.
    """
    try:
        first, *lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        header = Header.from_dict(json.loads(first))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(
            f"{path}: not a file of measurements ({error!r}); expected one of `ghn-init measure`"
        ) from error
    found: dict[int, Measurement] = {}
    for number, line in enumerate(lines, 2):
        if not line.endswith("\n"):
            break
        try:
            measurement = Measurement.from_dict(json.loads(line))
        except (ValueError, AttributeError, TrainingError) as error:
            raise TrainingError(f"{path}, line {number}: {error}; remove the line") from error
        found[measurement.index] = measurement
    return Records(header, found)


class Recorder:
    """Appends measurements to a file, which is taken over if it is there.

    Args:
        path: The file; made if need be.
        header: How is measured now.

    Raises:
        TrainingError: The file is something else, or was measured in another way.
        OSError: It cannot be written.
    """

    def __init__(self, path: Path, header: Header) -> None:
        self._path, self.split = destination(path), header.split
        self.measurements: dict[int, Measurement] = {}
        lines = [header.to_dict()]
        if path.exists():
            records = read_records(path)
            if different := records.header.differences(header):
                raise TrainingError(
                    f"{path}: was measured with other {', '.join(different)}; give another file, or the "
                    "same options"
                )
            self.measurements = records.measurements
            lines = [records.header.to_dict(), *(m.to_dict() for m in self.measurements.values())]
        write_bytes(self._path, "".join(map(_line, lines)).encode())

    def add(self, measurement: Measurement) -> None:
        """Take up and keep one more."""
        self.measurements[measurement.index] = measurement
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_line(measurement.to_dict()))


def _line(values: dict[str, Any]) -> str:
    return json.dumps(values, allow_nan=False) + "\n"
