"""Running statistics of batch norms from data; `statistics.py` has those from the weights alone."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from ghn_init._errors import PredictError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import nn

ModelT = TypeVar("ModelT", bound="nn.Module")


def calibrate_batchnorm(
    model: ModelT, loader: Iterable[Any], device: torch.device | str | int | None = None
) -> ModelT:
    """Set the running mean and variance of every batch norm to their averages over `loader`, in place.

    One pass through `torch.optim.swa_utils.update_bn`, in train mode and without gradients; the modes and
    momenta of all modules are put back. A few hundred images are usually enough.

    Args:
        model: The module, usually just predicted.
        loader: Batches: tensors, or lists or tuples that begin with the input tensor.
        device: Where batches are moved first; None leaves them where they are.

    Returns:
        The same module.

    Raises:
        PredictError: No batch norm keeps running statistics, or the loader is empty or no iterable. Whatever
            fails, and that includes errors of the model and the loader, the statistics are put back.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not norms:
        raise PredictError(
            f"{type(model).__name__} has no batch norm with running statistics: there is nothing to calibrate"
        )
    if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):  # `iter` starts workers
        raise PredictError(
            f"loader: expected batches to go over, found {type(loader).__name__}; give a DataLoader or "
            "a list of tensors"
        )
    batches = _Counted(loader)
    with _restored(model, norms):
        update_bn(batches, model, None if device is None else torch.device(device))
        if batches.count == 0:
            raise PredictError(
                f"{type(model).__name__}: the loader gave no batch, so there are no statistics to take; "
                "a loader that is an iterator can be used once only"
            )
    return model


class _Counted:
    """An iterable that counts what it hands out."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader
        self.count = 0

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            self.count += 1
            yield batch


@contextmanager
def _restored(model: nn.Module, norms: list[_BatchNorm]) -> Iterator[None]:
    """Put back modes and momenta at the end, and the statistics as well after an error."""
    modes = [(module, module.training) for module in model.modules()]
    momenta = [(norm, norm.momentum) for norm in norms]
    statistics = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers(recurse=False)]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for buffer, before in statistics:
                buffer.copy_(before)
        raise
    finally:
        for norm, momentum in momenta:
            norm.momentum = momentum
        for module, training in modes:
            module.training = training
