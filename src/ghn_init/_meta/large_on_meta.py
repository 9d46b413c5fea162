"""`large_on_meta`: building a model whose large tensors take no memory and whose small ones have values.

A model that is built on the meta device loses every number that its constructors put into tensors: layer
scales, tables, indices. Nothing tells them afterwards (the layer scales of timm's ConvNeXt, CaiT and XCiT are
1e-6, 1e-5 or 1, by the model), so they must not get lost: what is small is made on the CPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from ghn_init._errors import PredictError
from ghn_init._network.nested import tensors_in
from ghn_init._tracing.functions import is_in_place

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_SHAPED: Final = frozenset({
    "empty", "empty_permuted", "empty_strided", "eye", "full", "ones", "rand", "randint", "randn", "zeros",
    "new_empty", "new_empty_strided", "new_full", "new_ones", "new_zeros",
})  # fmt: skip
"""Functions that make a tensor of any given shape: on the meta device if it is large."""

_GIVEN: Final = frozenset({
    "arange", "linspace", "logspace", "new_tensor", "randperm", "range", "scalar_tensor", "tensor",
    "tril_indices", "triu_indices",
})  # fmt: skip
"""Functions that make tables of numbers, which others are computed from: on the CPU."""

SMALL: Final = 2**16
"""Elements up to which a tensor is made on the CPU: 256 kB in float32."""


class large_on_meta(TorchFunctionMode):  # noqa: N801  used like torch.no_grad, torch.device
    """Inside, tensors with more than `limit` elements are made on the meta device, others on the CPU.

    Build a network in it that does not fit into memory, or need not be initialised, and pass it to `predict`
    or `predict_to`. Unlike `torch.device("meta")` it keeps the values that constructors give small tensors
    (layer scales, class tokens, tables, indices), and code that reads values of small tensors runs.

    Functions of tensors of both kinds give meta tensors. A device other than these two, which the code asks
    for by name, is respected; the meta device is not, because it is where another tensor happens to be.

    Args:
        limit: Elements of the largest tensor on the CPU.

    Raises:
        PredictError: `limit` is not a number of elements; or, inside, a small tensor would be changed by a
            large one, whose values are not there.
    """

    def __init__(self, limit: int = SMALL) -> None:
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 0:
            raise PredictError(f"large_on_meta(limit={limit!r}): expected a number of elements")
        super().__init__()
        self.limit = limit

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run `func` where its result belongs."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _SHAPED | _GIVEN and _is_open(args, kwargs):
            return self._made(func, name, args, kwargs)
        if name == "to" and not args[0].is_meta:
            moved = func(*args, **kwargs)
            return args[0].to(moved.dtype) if moved.is_meta else moved
        if not _is_mixed(args, kwargs):
            return func(*args, **kwargs)
        if is_in_place(name):
            _check_target(name, args[0])
            return func(*args, **kwargs)
        args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
        return func(*args, **kwargs)

    def _made(
        self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A new tensor, on the device of its size."""
        if name in _SHAPED:
            made = func(*args, **{**kwargs, "device": "meta"})
            if made.numel() > self.limit:
                return made
        return func(*args, **{**kwargs, "device": "cpu"})


def _is_open(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether it is not said where the new tensor belongs, or that it belongs to a meta tensor."""
    device = kwargs.get("device")
    if device is None and args and isinstance(args[0], Tensor) and not args[0].is_meta:
        return False  # where the other is: `x.new_zeros(3)`
    return kwargs.get("out") is None and (device is None or torch.device(device).type == "meta")


def _check_target(name: str, target: Tensor) -> None:
    """Torch itself lets some functions go on as if nothing were to be written.

    Raises:
        PredictError: `target` is not on the meta device.
    """
    if not target.is_meta:
        raise PredictError(
            f"large_on_meta: {name} changes a small tensor {tuple(target.shape)} by one on the meta device, "
            "which has no values; give a larger limit=, or build the model on the CPU"
        )


def _is_mixed(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether there are tensors both on the meta device and on the CPU among the arguments."""
    devices = {tensor.device.type for tensor in tensors_in((args, kwargs))}
    return {"meta", "cpu"} <= devices
