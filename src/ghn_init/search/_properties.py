"""What regressors say of architectures' properties from their embeddings, and how far to trust it."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ghn_init._errors import GHNInitError, TrainingError
from ghn_init._files import reason, write_bytes
from ghn_init.search._embeddings import embed_architectures
from ghn_init.search._kendall import Correlation, correlation
from ghn_init.search._recipe import Measurement, Recipe
from ghn_init.search._regressors import KINDS, Regressor, fit, out_of_fold
from ghn_init.training._output import writing

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from ghn_init._weights.ghn import GHN
    from ghn_init.search._records import Records
    from ghn_init.search._regressors import Array

    Measurements = Sequence[Measurement]

_FORMAT: Final = "ghn-init properties 1"

_LEAST: Final = 13
"""Architectures to fit to, of which ten are in any four of five folds."""

HELD_OUT: Final = 0.25
"""Share of the architectures that is held out where there is no other file for that."""


@dataclass(frozen=True)
class Property:
    """A property as regressors see it: more is better."""

    name: str
    unit: str
    of: Callable[[Measurement, Recipe], float]


def _convergence(measurement: Measurement, recipe: Recipe) -> float:
    """Steps, negative; an architecture that did not reach the target comes after all that did."""
    return -float(recipe.steps + 1 if measurement.convergence is None else measurement.convergence)


PROPERTIES: Final = {
    found.name: found
    for found in (
        Property("accuracy", "%", lambda m, _: m.trained),
        Property("noise", "% under noise", lambda m, _: m.trained_noise),
        Property("speed", "ln(images/s)", lambda m, _: math.log(m.speed)),
        Property("convergence", "-steps", _convergence),
    )
}
"""Properties by their names on the command line (arXiv 2110.13100, section 5.3)."""

BASELINES: Final[dict[str, Callable[[Measurement], float]]] = {
    "parameters": lambda m: m.params,
    "nodes": lambda m: m.nodes,
    "predicted accuracy": lambda m: m.predicted,
}
"""What orders architectures without any fit but that of the order's direction."""


@dataclass(frozen=True)
class Prediction:
    """One way to predict a property, and what it said of architectures that it was not fitted to.

    Attributes:
        name: "svr", "ridge", or that of a baseline.
        folds: (n,), five-fold; for a baseline its own values.
        held_out: (m,), of the architectures that were held out.
        folds_tau: Against what was measured.
        held_out_tau: Likewise.
    """

    name: str
    folds: Array
    held_out: Array
    folds_tau: Correlation
    held_out_tau: Correlation


@dataclass(frozen=True)
class Fitted:
    """A property of measured architectures, and every way to predict it.

    Attributes:
        prop: Which.
        measured: (n,), of the architectures that regressors were fitted to.
        measured_held_out: (m,), of those that were held out.
        predictions: By regressors, then by baselines.
        regressors: By kind, fitted to all n.
    """

    prop: Property
    measured: Array
    measured_held_out: Array
    predictions: tuple[Prediction, ...]
    regressors: dict[str, Regressor]

    @property
    def best(self) -> Prediction:
        """The regressor with the higher five-fold correlation."""
        return max(self.predictions[: len(KINDS)], key=lambda prediction: prediction.folds_tau.tau)


@dataclass(frozen=True)
class Properties:
    """Regressors for all properties, as a file of `ghn-init properties` keeps them.

    Attributes:
        weights: Name of the hypernetwork whose embeddings they read.
        weights_digest: Of its configuration and weights.
        split: The split of the architectures that they were fitted to.
        indices: Places of those in the split.
        recipe: How those were measured.
        regressors: By property, the one with the higher five-fold correlation.
        medians: By property, over the architectures that they were fitted to.
    """

    weights: str
    weights_digest: str
    split: str
    indices: tuple[int, ...]
    recipe: Recipe
    regressors: dict[str, Regressor]
    medians: dict[str, float]

    def save(self, path: Path) -> None:
        """Write them as JSON, in one piece.

        Raises:
            TrainingError: `path` cannot be written.
        """
        values = {**vars(self), "recipe": asdict(self.recipe), "format": _FORMAT}
        values["regressors"] = {name: found.to_dict() for name, found in self.regressors.items()}
        with writing(path):
            write_bytes(path, (json.dumps(values, allow_nan=False) + "\n").encode())

    @staticmethod
    def load(path: Path) -> Properties:
        """Read what `save` wrote: numbers only, nothing in the file is run.

        Raises:
            TrainingError: It is not such a file.
        """
        try:
            values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if values.pop("format") != _FORMAT:
                raise ValueError("another format")
            if any(set(values[part]) != set(PROPERTIES) for part in ("regressors", "medians")):
                raise ValueError(f"expected regressors and medians of {', '.join(PROPERTIES)}")
            values["regressors"] = {n: Regressor.from_dict(v) for n, v in values["regressors"].items()}
            values["recipe"], values["indices"] = Recipe(**values["recipe"]), tuple(values["indices"])
            return Properties(**values)
        except OSError as error:
            raise TrainingError(
                f"{path} cannot be read: {reason(error)}; expected a file of `ghn-init properties`"
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError, GHNInitError) as error:
            raise TrainingError(
                f"{path}: no regressors ({error}); expected a file of `ghn-init properties`"
            ) from error


def fit_properties(
    records: Records, ghn: GHN, weights: str, held_out: Records | None = None
) -> tuple[Properties, list[Fitted]]:
    """Fit regressors from embeddings to every property, and compare them with baselines.

    Args:
        records: The measured architectures.
        ghn: The hypernetwork that embeds them.
        weights: Its name.
        held_out: Architectures of another split, measured in the same way; None: the last quarter of
            `records` is held out.

    Raises:
        TrainingError: Too few architectures, or those held out were measured otherwise.
    """
    recipe = records.header.recipe
    measured = [records.measurements[index] for index in sorted(records.measurements)]
    if held_out is None:
        count = math.ceil(HELD_OUT * len(measured))
        known, others = measured[: len(measured) - count], measured[len(measured) - count :]
    else:
        if held_out.header.recipe != recipe or held_out.header.split == records.header.split:
            raise TrainingError(
                f"held-out architectures of split {held_out.header.split}, measured by "
                f"{held_out.header.recipe}; expected another split than {records.header.split} and {recipe}"
            )
        known, others = measured, list(held_out.measurements.values())
    if len(known) < _LEAST:
        raise TrainingError(
            f"{len(known)} of {len(measured)} architectures are not held out; expected at least {_LEAST} to "
            "fit regressors to: measure more, with a larger --sample"
        )
    if len(others) < 2:
        raise TrainingError(f"{len(others)} architectures are held out; expected at least 2")
    x, x_others = (
        embed_architectures(ghn, [m.architecture for m in part], recipe.image_size).double().numpy()
        for part in (known, others)
    )
    fitted = [_fit(prop, (known, others), (x, x_others), recipe) for prop in PROPERTIES.values()]
    properties = Properties(
        weights=weights,
        weights_digest=ghn.digest(),
        split=records.header.split,
        indices=tuple(m.index for m in known),
        recipe=recipe,
        regressors={f.prop.name: f.regressors[f.best.name] for f in fitted},
        medians={f.prop.name: median(f.measured.tolist()) for f in fitted},
    )
    return properties, fitted


def _fit(
    prop: Property, parts: tuple[Measurements, Measurements], embeddings: tuple[Array, Array], recipe: Recipe
) -> Fitted:
    y, y_others = (np.array([prop.of(m, recipe) for m in part]) for part in parts)
    x, x_others = embeddings
    regressors = {str(kind): fit(kind, x, y) for kind in KINDS}
    values = [(str(kind), out_of_fold(kind, x, y), regressors[kind](x_others)) for kind in KINDS]
    for name, baseline in BASELINES.items():
        known, others = (np.array([baseline(m) for m in part], dtype=np.float64) for part in parts)
        # The one thing that is fitted of a baseline: whether more or less of it is better.
        sign = -1.0 if correlation(known, y).tau < 0 else 1.0
        values.append((name, sign * known, sign * others))
    predictions = tuple(
        Prediction(name, known, others, correlation(known, y), correlation(others, y_others))
        for name, known, others in values
    )
    return Fitted(prop, y, y_others, predictions, regressors)
