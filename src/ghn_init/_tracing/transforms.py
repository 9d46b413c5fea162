"""`torch.vmap` and `torch.autocast` in a forward pass.

Inside a transform of `torch.func` tensors are wrapped, and what comes out of it was made by functions of C++
that no mode sees. So where activations or weights are mapped over, the function, which is the same for all
examples, is followed for one: it gets the first slice of every argument, and what it gives is expanded to
all. Of other transforms `jvp` is refused here, `grad` by `Seen.of`.

Code that turns autocast on or off for the device of an activation gets the meta device while recording, which
has none: it is given that of the model's.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch._functorch.vmap
from torch import Tensor
from torch.utils._pytree import tree_unflatten

from ghn_init._tracing.outputs.call import output_of
from ghn_init._tracing.replacing import Replacement
from ghn_init._tracing.values import UnknownValueError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ghn_init._tracing.outputs.call import Call

_wrappers: Any = torch._C._functorch  # noqa: SLF001  # pyright: ignore[reportAttributeAccessIssue]


@contextmanager
def followed(flows: Callable[[Tensor], bool] | None, home: torch.device) -> Iterator[None]:
    """Inside, `vmap` and `autocast` of this thread are those of a forward pass that is recorded.

    Args:
        flows: Whether a tensor is an activation or a weight; None if maps over such are not to be followed.
        home: The device of the model.
    """
    with ExitStack() as stack:
        stack.enter_context(_AUTOCAST.active("cpu" if home.type == "meta" else home.type))
        if flows is not None:
            stack.enter_context(_VMAP.active(flows))
        yield


def is_wrapped(tensor: Tensor) -> bool:
    """Whether it stands for another tensor inside a transform."""
    return _wrappers.is_functorch_wrapped_tensor(tensor)


def unwrapped(tensor: Tensor) -> Tensor:
    """The tensor that wrapped ones stand for."""
    while is_wrapped(tensor):
        tensor = _wrappers.get_unwrapped(tensor)
    return tensor


def transformed() -> UnknownValueError:
    """For a transform that cannot be followed."""
    return UnknownValueError(
        "a function of activations or weights is transformed (torch.func.grad, jvp, or vmap where a graph is "
        "to run again), which cannot be recorded; put it into a layer with a rule (ghn_init.register)"
    )


@output_of("_make_dual")
def _dual(_call: Call) -> NoReturn:
    raise transformed()


def _first_slices(in_dims: list[int | None], args: list[Any], level: int, spec: Any) -> Any:
    flows = _VMAP.of_this_thread()
    mapped = [arg for dim, arg in zip(in_dims, args, strict=True) if dim is not None]
    if flows is None or not any(map(flows, mapped)):
        return _VMAP.original("_create_batched_inputs")(in_dims, args, level, spec)
    sliced = [arg if dim is None else arg.select(dim, 0) for dim, arg in zip(in_dims, args, strict=True)]
    return tree_unflatten(sliced, spec)


def _expanded(output: Tensor, level: int, size: int, dim: int) -> Tensor:
    flows = _VMAP.of_this_thread()
    if flows is None or is_wrapped(output) or not flows(output):
        return _VMAP.original("_remove_batch_dim")(output, level, size, dim)
    dim %= output.ndim + 1
    return output.unsqueeze(dim).expand(*output.shape[:dim], size, *output.shape[dim:])


def _autocast(self: torch.autocast, device_type: str, *args: Any, **kwargs: Any) -> None:
    home = _AUTOCAST.of_this_thread()
    known = home if home is not None and device_type == "meta" else device_type
    _AUTOCAST.original("__init__")(self, known, *args, **kwargs)


_VMAP: Replacement[Callable[[Tensor], bool]] = Replacement(
    torch._functorch.vmap, _create_batched_inputs=_first_slices, _remove_batch_dim=_expanded  # noqa: SLF001
)  # fmt: skip
_AUTOCAST: Replacement[str] = Replacement(torch.autocast, __init__=_autocast)
