"""Pooling, over windows and over all positions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ghn_init._graph.graph import Node
from ghn_init._tracing.record import Call, Flow
from ghn_init._tracing.rules.nodes import as_tuple
from ghn_init._tracing.rules.norms import mean_of_squares
from ghn_init._tracing.rules.table import rule

if TYPE_CHECKING:
    from torch import Tensor


@rule("max_pool1d", "max_pool2d", "max_pool3d",
      "max_pool1d_with_indices", "max_pool2d_with_indices", "max_pool3d_with_indices")  # fmt: skip
def max_pool(call: Call) -> Any:
    """A `max_pool` node of shape (1, 1, k, k)."""
    return _pool(call, "max_pool")


@rule("avg_pool1d", "avg_pool2d", "avg_pool3d")
def avg_pool(call: Call) -> Any:
    """An `avg_pool` node of shape (1, 1, k, k)."""
    return _pool(call, "avg_pool")


def _pool(call: Call, kind: str) -> Any:
    flow = call.carried(call.arg(0, "input"))
    if not isinstance(flow, Flow):
        return call.passed_on()
    kernel = as_tuple(call.arg(1, "kernel_size"), 2)
    node = call.recorder.add_node(Node(kind, None, (1, 1, *kernel[-2:])), flow.sources)
    return call.gives(call.run(), Flow((node,)))


@rule("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d")
def adaptive_avg_pool(call: Call) -> Any:
    """A `glob_avg` node, whatever the output size."""
    x = call.arg(0, "input")
    n = int(call.name[-2])
    wanted = as_tuple(call.arg(1, "output_size"), n)
    sizes = [have if want is None else want for have, want in zip(x.shape[-n:], wanted, strict=True)]
    return _glob_avg(call, x.new_empty(*x.shape[:-n], *sizes))


@rule("mean")
def mean(call: Call) -> Any:
    """A mean over all positions of a feature map is `glob_avg`; any other has no node.

    The mean of squares is part of a normalisation; so is a mean that is then subtracted: see `_norms`.
    """
    x = call.arg(0, "input")
    dims = call.arg(1, "dim")
    flow = call.carried(x)
    if isinstance(flow, Flow) and flow.role == "square":
        return mean_of_squares(call)
    if dims is None or not _is_over_positions(x, {dim % x.ndim for dim in as_tuple(dims, 1)}):
        return call.passed_on()
    return _glob_avg(call, call.run(), "mean")


def _is_over_positions(x: Tensor, dims: set[int]) -> bool:
    """Whether `dims` are all of the positions of (N, C, *positions), (N, *positions, C) or (N, T, C)."""
    if x.ndim == 3:
        return dims in ({1}, {2}) and x.shape[1] > 1
    return x.ndim > 3 and dims in (set(range(2, x.ndim)), set(range(1, x.ndim - 1)))


def _glob_avg(call: Call, output: Any, role: str = "") -> Any:
    flow = call.carried(call.arg(0, "input"))
    if not isinstance(flow, Flow):
        return call.gives(output, flow)
    return call.gives(output, Flow((call.recorder.add_node(Node("glob_avg"), flow.sources),), role))
