"""Ranks architectures that nobody has measured, by what a regressor says of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from ghn_init._errors import TrainingError
from ghn_init.search._embeddings import batches, embed_architectures
from ghn_init.search._properties import PROPERTIES
from ghn_init.training._pool import run_all

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from ghn_init._weights.ghn import GHN
    from ghn_init.search._measure import Candidate
    from ghn_init.search._properties import Properties


@dataclass(frozen=True)
class Ranked:
    """An architecture and the property that is predicted for it, more being better."""

    candidate: Candidate
    predicted: float


def _embedded(ghn: GHN, image_size: int, part: Sequence[Candidate]) -> Tensor:
    return embed_architectures(ghn, [candidate.architecture for candidate in part], image_size)


def rank(
    candidates: Sequence[Candidate],
    properties: Properties,
    ghn: GHN,
    by: str = "accuracy",
    *,
    workers: int = 1,
    on_part: Callable[[int], None] = lambda _count: None,
) -> list[Ranked]:
    """Order architectures by a predicted property, best first; nothing is measured.

    Args:
        candidates: The architectures, at the width that was measured.
        properties: The regressors.
        ghn: The hypernetwork whose embeddings they read.
        by: "accuracy", "noise", "speed" or "convergence".
        workers: Embed them in this many processes.
        on_part: Called with the number of architectures of every part that is done.

    Raises:
        TrainingError: There is no such property, or the regressors read another hypernetwork's embeddings.
    """
    if by not in PROPERTIES:
        raise TrainingError(f"no property {by!r}; expected one of {tuple(PROPERTIES)}")
    if (found := ghn.digest()) != properties.weights_digest:
        raise TrainingError(
            f"the regressors read embeddings of {properties.weights} ({properties.weights_digest}), not of "
            f"this hypernetwork ({found}); give its weights, or fit anew with `ghn-init properties`"
        )
    regressor = properties.regressors[by]
    embed = partial(_embedded, ghn, properties.recipe.image_size)
    ranked: list[Ranked] = []
    for part, embeddings in run_all(embed, list(batches(candidates)), workers):
        values = regressor(embeddings).tolist()
        ranked += [Ranked(*pair) for pair in zip(part, values, strict=True)]
        on_part(len(values))
    return sorted(ranked, key=lambda entry: (-entry.predicted, entry.candidate.index))
