"""What the caller of `plan` and `predict` may choose, checked."""

from __future__ import annotations

import difflib
import operator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal, get_args

from ghn_init._errors import PredictError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Head = Literal["auto", "predict", "keep"]
Scale = Literal["auto", "own", "predicted"]
Frozen = Literal["keep", "predict"]
Diversify = Literal["noise", "orthogonal"]


@dataclass(frozen=True, slots=True)
class Options:
    """The caller's choices; `plan` says what they mean.

    Raises:
        PredictError: A value that is not one of the choices.
    """

    head: Head = "auto"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    diversify: Diversify | None = None
    seed: int = 0
    strict: bool = False
    scale: Scale = "auto"
    frozen: Frozen = "keep"

    def __post_init__(self) -> None:
        for option, value, known in (
            ("head", self.head, get_args(Head)),
            ("scale", self.scale, get_args(Scale)),
            ("frozen", self.frozen, get_args(Frozen)),
        ):
            if value not in known:
                raise PredictError(f"{option}={value!r}: expected one of {', '.join(map(repr, known))}")
        if self.diversify is not None and self.diversify not in get_args(Diversify):
            choices = ", ".join(map(repr, get_args(Diversify)))
            raise PredictError(f"diversify={self.diversify!r}: expected None, {choices}")
        object.__setattr__(self, "seed", _checked_seed(self.seed))

    @property
    def own_scale(self) -> bool:
        """Whether the prediction is to be trained, not used as it is: what "auto" means depends on `head`."""
        return self.scale == "own" or (self.scale == "auto" and self.head != "predict")

    def check_patterns(self, names: Sequence[str]) -> None:
        """Check that every pattern has something to match.

        Raises:
            PredictError: A pattern matches none of `names`; the message says what comes close.
        """
        for option, patterns in (("include", self.include), ("exclude", self.exclude)):
            for pattern in patterns:
                if not any(matches(name, pattern) for name in names):
                    raise PredictError(
                        f"{option}: the pattern {pattern!r} matches none of {len(names)} parameters; "
                        f"{_hint(pattern, names)}"
                    )


def matches(name: str, pattern: str) -> bool:
    """Whether `include` or `exclude` mean a parameter: by its own name, brackets and all, or a glob."""
    return name == pattern or fnmatchcase(name, pattern)


def as_patterns(option: str, patterns: str | Iterable[str] | None) -> tuple[str, ...]:
    """Normalise `include` or `exclude`: None, one pattern, or several.

    Raises:
        PredictError: Something else, or a pattern that is no text.
    """
    if patterns is None:
        return ()
    try:
        listed = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    except TypeError as error:
        raise PredictError(
            f"{option}={patterns!r:.80}: expected a name pattern such as 'layer1.*', or several in a list"
        ) from error
    for pattern in listed:
        if not isinstance(pattern, str):
            raise PredictError(f"{option}={patterns!r}: expected name patterns, found {pattern!r}")
    return listed


def _checked_seed(seed: Any) -> int:
    """The seed as Python's own integer, which numpy's are not."""
    try:
        if not isinstance(seed, bool):
            return operator.index(seed)
    except TypeError:
        pass
    raise PredictError(f"seed={seed!r:.80}: expected an integer")


def _hint(pattern: str, names: Sequence[str]) -> str:
    inside = f"{pattern.rstrip('.')}.*"
    if any(fnmatchcase(name, inside) for name in names):
        return f"did you mean {inside!r}?"
    close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4) or list(names[:3])
    return f"close names: {', '.join(close)}"
