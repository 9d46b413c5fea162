"""`torch.vmap` in a forward pass: its function is followed for one example, as it is the same for all.

Inside a transform of `torch.func` tensors are wrapped, and what comes out of it was made by functions of C++
that no mode sees. So where activations or weights are mapped over, the function gets the first slice of every
argument, and what it gives is expanded to all. Other transforms of activations (`grad`, `jvp`) are refused by
`Recorder.value`.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch._functorch.vmap
from torch import Tensor
from torch.utils._pytree import tree_unflatten

from ghn_init._tracing.outputs.call import output_of
from ghn_init._tracing.values import UnknownValueError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ghn_init._tracing.outputs.call import Call

_lock = threading.Lock()
_recording: dict[int, Callable[[Tensor], bool]] = {}
"""Of every thread that records, what says whether a tensor is an activation or a weight."""

_vmap: Any = torch._functorch.vmap  # noqa: SLF001
_wrappers: Any = torch._C._functorch  # type: ignore[attr-defined]  # noqa: SLF001  # pyright: ignore[reportAttributeAccessIssue]

_batched: Callable[..., Any] = _vmap._create_batched_inputs  # noqa: SLF001
_unbatched: Callable[..., Any] = _vmap._remove_batch_dim  # noqa: SLF001


@contextmanager
def followed(flows: Callable[[Tensor], bool]) -> Iterator[None]:
    """Inside, `torch.vmap` of what `flows` says flows is followed for one example, in this thread."""
    thread = threading.get_ident()
    with _lock:
        _recording[thread] = flows
        _vmap._create_batched_inputs = _first_slices  # noqa: SLF001
        _vmap._remove_batch_dim = _expanded  # noqa: SLF001
    try:
        yield
    finally:
        with _lock:
            del _recording[thread]
            if not _recording:
                _vmap._create_batched_inputs = _batched  # noqa: SLF001
                _vmap._remove_batch_dim = _unbatched  # noqa: SLF001


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
    flows = _recording.get(threading.get_ident())
    mapped = [arg for dim, arg in zip(in_dims, args, strict=True) if dim is not None]
    if flows is None or not any(map(flows, mapped)):
        return _batched(in_dims, args, level, spec)
    sliced = [arg if dim is None else arg.select(dim, 0) for dim, arg in zip(in_dims, args, strict=True)]
    return tree_unflatten(sliced, spec)


def _expanded(output: Tensor, level: int, size: int, dim: int) -> Tensor:
    flows = _recording.get(threading.get_ident())
    if flows is None or is_wrapped(output) or not flows(output):
        return _unbatched(output, level, size, dim)
    dim %= output.ndim + 1
    return output.unsqueeze(dim).expand(*output.shape[:dim], size, *output.shape[dim:])
