"""`predict`: the one-line replacement for random initialisation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ghn_init._plan import ModelT, plan

if TYPE_CHECKING:
    from collections.abc import Iterable
    from os import PathLike

    from ghn_init._model import GHN
    from ghn_init._select import Diversify, Head


def predict(
    model: ModelT,
    weights: str | PathLike[str] | GHN = "ghn2-cifar10",
    *,
    example_input: object = None,
    head: Head = "auto",
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    diversify: Diversify | None = None,
    seed: int = 0,
    strict: bool = False,
) -> ModelT:
    """Replace the parameters of `model`, in place, by those that a graph hypernetwork predicts.

    The same as `plan(...).apply()`; see `plan` for the arguments and `Plan.apply` for what is written. A
    failure leaves the model as it was. The same model, weights and seed give the same bits every time.

    Running statistics of batch norms are not predicted: train, or call `calibrate_batchnorm`.

    Returns:
        The same module.

    Raises:
        PredictError: See `plan` and `Plan.apply`.
        TraceError: The network could not be traced.
        CheckpointError: The weights could not be loaded.
    """
    return plan(
        model,
        weights,
        example_input=example_input,
        head=head,
        include=include,
        exclude=exclude,
        diversify=diversify,
        seed=seed,
        strict=strict,
    ).apply()
