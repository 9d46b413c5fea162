"""Outputs with as many elements as values say: while recording, as many as there can be.

Detectors choose boxes by their scores and go on with those. The graph does not depend on how many there
are, so every element is taken for chosen, and all values for equal where each distinct one is looped over.

A mixture of experts goes on with those that some token has chosen, and gives each of them its tokens. Here
every expert is chosen by every token. Which ones they are is known then: code can go by their numbers.

What checks for values that are not finite finds none.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from ghn_init._tracing.kernels import empty
from ghn_init._tracing.outputs.call import Call, Known, output_of

_COUNTED: Final = 1024
"""Elements up to which their positions are known numbers: as many experts as there may be, not boxes."""

_LARGE: Final = 2**20
"""Elements past which constants are not written out one-hot: Gemma's table of places would take 377 MB."""


@output_of("isnan", "isinf", "isposinf", "isneginf", "isfinite")
def finite(call: Call) -> Any:
    """Every value is finite."""
    x = call.arg(0, "input")
    if not _unknown(x) or not call.varies:
        return call.run()
    return Known(torch.tensor(call.name == "isfinite").expand(x.shape))


@output_of("nonzero", "argwhere")
def nonzero(call: Call) -> Any:
    """Positions of all elements: (n, dimensions), or one vector for each dimension."""
    x = call.arg(0, "input")
    if not _unknown(x):
        return call.run()
    positions = _positions(x)
    if call.kwargs.get("as_tuple", False):
        return Known(positions)
    return Known(torch.stack(positions, 1) if positions else _indices(x, x.numel(), 0))


@output_of("where")
def where(call: Call) -> Any:
    """With the condition alone it is `nonzero`."""
    condition = call.arg(0, "condition")
    if len(call.args) + len(call.kwargs) > 1 or not _unknown(condition):
        return call.run()
    return Known(_positions(condition))


@output_of("masked_select")
def masked_select(call: Call) -> Any:
    """All elements, (n,)."""
    x, mask = call.arg(0, "input"), call.arg(1, "mask")
    if not _unknown(mask):
        return call.run()
    return empty(x, (torch.broadcast_shapes(x.shape, mask.shape).numel(),))


@output_of("nms")
def nms(call: Call) -> Any:
    """Torchvision's non-maximum suppression: every box stays, (n,)."""
    boxes = call.args[0]
    return _indices(boxes, len(boxes)) if _unknown(boxes) else call.run()


@output_of("unique", "unique_consecutive", "_unique2")
def unique(call: Call) -> Any:
    """One distinct value; with what torch.unique can return beside it."""
    x = call.arg(0, "input")
    if not _unknown(x) or call.kwargs.get("dim") is not None:
        return call.run()
    extra = []
    if call.arg(2, "return_inverse", False):
        extra.append(_indices(x, *x.shape))
    if call.arg(3, "return_counts", False):
        extra.append(_indices(x, 1))
    found = empty(x, (1,))
    return (found, *extra) if extra else found


@output_of("one_hot")
def one_hot(call: Call) -> Any:
    """(*shape, classes), without values if it is large."""
    x, classes = call.arg(0, "tensor"), call.arg(1, "num_classes", -1)
    if _unknown(x) or x.numel() * classes <= _LARGE:  # -1: as many as the values say
        return call.run()
    return torch.empty(*x.shape, classes, dtype=torch.long, device="meta")


@output_of("_is_all_true")
def all_true(call: Call) -> Any:
    """What only assertions ask, `torch._check_tensor_all`: they hold."""
    return Known(torch.tensor(True)) if _unknown(call.args[0]) else call.run()


@output_of("__getitem__")
def getitem(call: Call) -> Any:
    """Indexing by a mask: every element is chosen."""
    x, index = call.args
    items = index if isinstance(index, tuple) else (index,)
    if not any(isinstance(item, Tensor) and item.dtype == torch.bool for item in items) or not _unknown(x):
        return call.run()
    chosen: list[Any] = []
    for item in items:
        is_mask = isinstance(item, Tensor) and item.dtype == torch.bool and item.ndim
        chosen.extend((p.to("meta") for p in _positions(item)) if is_mask else (item,))
    return call.func(x, tuple(chosen))


def _unknown(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.is_meta


def _positions(mask: Tensor) -> tuple[Tensor, ...]:
    """For each dimension of `mask` an index of every element; with values if there are not many."""
    if mask.numel() <= _COUNTED:
        return torch.ones(mask.shape, dtype=torch.bool).nonzero(as_tuple=True)
    return tuple(_indices(mask, mask.numel()) for _ in range(mask.ndim))


def _indices(like: Tensor, *shape: int) -> Tensor:
    return empty(like, shape, torch.long)
