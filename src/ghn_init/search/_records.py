"""Files of measurements: JSON lines, the first of which says how was measured; one more for each network."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ghn_init._errors import GHNInitError, TrainingError
from ghn_init.search._recipe import Measurement, Recipe
from ghn_init.training import _records

if TYPE_CHECKING:
    from os import PathLike

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
        return cls(split, 0, weights, ghn.digest(), train.digest(), recipe)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Header:
        """What `asdict` gives; raises KeyError, TypeError or ConfigError otherwise."""
        return Header(**{**values, "recipe": Recipe(**values["recipe"])})

    def differences(self, other: Header) -> list[str]:
        """Names of the fields in which measurements are not comparable."""
        mine, theirs = asdict(self), asdict(other)
        recipes = mine.pop("recipe"), theirs.pop("recipe")
        found = [name for name in mine if name not in ("weights", "torch") and mine[name] != theirs[name]]
        return found + [f"recipe.{name}" for name in recipes[0] if recipes[0][name] != recipes[1][name]]


@dataclass(frozen=True)
class Records:
    """The measurements of a file, by their place in the split, and what they have in common."""

    header: Header
    measurements: dict[int, Measurement]


def read_records(path: str | PathLike[str]) -> Records:
    """Read a file of measurements; a last line without its end, of a killed process, is passed over.

    Raises:
        TrainingError: It is none, or damaged; the message names the line.
    """
    path = Path(path)
    if not path.exists():
        raise TrainingError(f"{path}: no such file; expected one of `ghn-init measure`")
    first, *others = _records.read_records(path) or [{}]
    try:
        header = Header.from_dict(first)
    except (KeyError, TypeError, GHNInitError) as error:
        raise TrainingError(
            f"{path}: not a file of measurements (first line: {error}); expected one of `ghn-init measure`"
        ) from error
    found: dict[int, Measurement] = {}
    for number, values in enumerate(others, 2):
        try:
            measurement = Measurement.from_dict(values)
        except TrainingError as error:
            raise TrainingError(f"{path}, line {number}: {error}; remove the line") from error
        found[measurement.index] = measurement
    return Records(header, found)


class MeasurementFile:
    """Appends measurements to a file, which is taken over if it is there.

    Args:
        path: The file; made with the first measurement if need be.
        header: How is measured now.

    Raises:
        TrainingError: The file is something else, or was measured in another way.
    """

    def __init__(self, path: Path, header: Header) -> None:
        self._path, self._header, self.split = path, header, header.split
        self.measurements: dict[int, Measurement] = {}
        self._begun = bool(_records.read_records(path))  # not if it was killed while it wrote the first line
        if not self._begun:
            return
        records = read_records(path)
        if different := records.header.differences(header):
            raise TrainingError(
                f"{path}: was measured with other {', '.join(different)}; give another file, or the "
                "same options"
            )
        self.measurements = records.measurements

    def add(self, measurement: Measurement) -> None:
        """Take up and keep one more.

        Raises:
            TrainingError: The file cannot be written.
        """
        self.measurements[measurement.index] = measurement
        first = () if self._begun else (asdict(self._header),)
        _records.add_record(self._path, *first, measurement.to_dict())
        self._begun = True
