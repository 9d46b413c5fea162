"""Regressors from embeddings to a property: fitted by scikit-learn, kept as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from ghn_init._errors import TrainingError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt

    Array = npt.NDArray[np.float64]

Kind = Literal["svr", "ridge"]
KINDS: Final[tuple[Kind, ...]] = ("svr", "ridge")

_FOLDS: Final = 5

_ALPHAS: Final = (0.1, 1.0, 10.0, 100.0, 1000.0)
_SVR: Final = {"C": (1.0, 10.0, 100.0), "epsilon": (0.03, 0.3), "gamma": (0.1, 0.3, 1.0)}
"""Settings that are tried; gamma is divided by the width of an embedding. Embeddings and properties are
standardised."""


@dataclass(frozen=True)
class Regressor:
    """A function of embeddings: `offset + kernel(x) @ weights`, where x is a standardised embedding.

    Attributes:
        kind: "svr", whose kernel is `exp(-gamma |x - s|^2)` for every support vector s, or "ridge", whose
            kernel is x itself.
        mean: (d,), of the embeddings that it was fitted to.
        std: (d,), likewise.
        weights: (m,) or (d,), in the property's unit.
        offset: In the property's unit.
        support: (m, d), standardised support vectors; (0, d) for ridge.
        gamma: Of the kernel; 0 for ridge.
    """

    kind: Kind
    mean: Array
    std: Array
    weights: Array
    offset: float
    support: Array
    gamma: float = 0.0

    def __call__(self, embeddings: npt.ArrayLike) -> Array:
        """(n, d) to (n,)."""
        x = (np.asarray(embeddings, dtype=np.float64) - self.mean) / self.std
        if self.kind == "svr":
            squares = (x**2).sum(1)[:, None] + (self.support**2).sum(1) - 2 * x @ self.support.T
            x = np.exp(-self.gamma * squares)
        return x @ self.weights + self.offset

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in vars(self).items()}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Regressor:
        """What `to_dict` wrote.

        Raises:
            TrainingError: Fields are missing, unknown or of shapes that do not fit together.
        """
        try:
            arrays = {k: np.array(values[k], dtype=np.float64) for k in ("mean", "std", "weights", "support")}
            d, m = len(arrays["mean"]), len(arrays["weights"])
            if not arrays[
                "support"
            ].size:  # of ridge, or where all values were equal: JSON has no shape for it
                arrays["support"] = np.empty((0, d))
            found = Regressor(**{**values, **arrays})
            expected = {"mean": (d,), "std": (d,), "weights": (m,), "support": (m, d)}
            if found.kind == "ridge":
                expected |= {"weights": (d,), "support": (0, d)}
            shapes = {name: array.shape for name, array in arrays.items()}
            numbers = [*arrays.values(), np.array([found.offset, found.gamma], dtype=np.float64)]
            good = found.kind in KINDS and all(np.isfinite(array).all() for array in numbers)
        except (KeyError, TypeError, ValueError) as error:
            raise TrainingError(f"not a regressor ({error!r})") from error
        if not good or shapes != expected:
            raise TrainingError(f"not a regressor: kind {found.kind!r}, shapes {shapes}, or not finite")
        return found


def fit(kind: Kind, embeddings: npt.ArrayLike, values: npt.ArrayLike) -> Regressor:
    """Fit a regressor; its settings are those of a grid with the least squared error on what is left out.

    That is one of five folds, for ridge regression one architecture.

    Args:
        kind: Support vector regression with a Gaussian kernel (arXiv 2110.13100, section 5.3), or ridge
            regression.
        embeddings: (n, d).
        values: (n,), the property.

    Raises:
        TrainingError: scikit-learn is missing, or there are fewer than ten architectures.
    """
    x, y = np.asarray(embeddings, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if len(x) < 2 * _FOLDS:
        raise TrainingError(f"{len(x)} architectures; expected at least {2 * _FOLDS} to fit regressors to")
    mean, std = x.mean(0), _deviation(x)
    y_mean, y_std = float(y.mean()), float(_deviation(y))
    found = _search(kind, (x - mean) / std, (y - y_mean) / y_std)
    if kind == "ridge":
        weights, support, gamma = found.coef_, np.empty((0, x.shape[1])), 0.0
    else:
        weights, support, gamma = found.dual_coef_[0], found.support_vectors_, found.gamma
    offset = float(np.ravel(found.intercept_)[0])
    return Regressor(kind, mean, std, y_std * weights, y_mean + y_std * offset, support, float(gamma))


def out_of_fold(kind: Kind, embeddings: npt.ArrayLike, values: npt.ArrayLike) -> Array:
    """For every architecture what a regressor says that was fitted to four fifths without it, (n,)."""
    x, y = np.asarray(embeddings, dtype=np.float64), np.asarray(values, dtype=np.float64)
    found = np.empty(len(y))
    for part in np.array_split(np.random.default_rng(0).permutation(len(y)), _FOLDS):
        rest = np.setdiff1d(np.arange(len(y)), part)
        found[part] = fit(kind, x[rest], y[rest])(x[part])
    return found


def _deviation(values: Array) -> Array:
    """Standard deviation along the first axis, 1 where all values are equal."""
    std = values.std(0)
    return np.where(std > 1e-12, std, 1.0)


def _search(kind: Kind, x: Array, y: Array) -> Any:
    """The estimator with the best settings, fitted to all of (n, d) and (n,)."""
    try:
        from sklearn import config_context
        from sklearn.linear_model import RidgeCV
        from sklearn.model_selection import GridSearchCV, KFold
        from sklearn.svm import SVR
    except ImportError as error:
        raise TrainingError(
            f"scikit-learn, which fits regressors, cannot be imported ({error}); pip install scikit-learn"
        ) from error
    if kind == "ridge":
        return RidgeCV(_ALPHAS).fit(x, y)
    grid = {**_SVR, "gamma": [gamma / x.shape[1] for gamma in _SVR["gamma"]]}
    folds = KFold(_FOLDS, shuffle=True, random_state=0)
    search = GridSearchCV(SVR(), grid, cv=folds, scoring="neg_mean_squared_error")
    # Checks of arguments take longer than fitting to so few architectures.
    with config_context(assume_finite=True, skip_parameter_validation=True):
        return search.fit(x, y).best_estimator_
