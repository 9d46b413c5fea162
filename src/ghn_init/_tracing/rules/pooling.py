"""Pooling, over windows and over all positions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ghn_init._graph.graph import Node
from ghn_init._tracing.arguments import as_tuple
from ghn_init._tracing.carried import Carried, Flow
from ghn_init._tracing.rules.norms import moment
from ghn_init._tracing.sketch import Operation, rule

if TYPE_CHECKING:
    import torch


@rule("max_pool1d", "max_pool2d", "max_pool3d",
      "max_pool1d_with_indices", "max_pool2d_with_indices", "max_pool3d_with_indices")  # fmt: skip
def max_pool(op: Operation) -> Carried:
    """A `max_pool` node of shape (1, 1, k, k)."""
    return _pool(op, "max_pool")


@rule("avg_pool1d", "avg_pool2d", "avg_pool3d")
def avg_pool(op: Operation) -> Carried:
    """An `avg_pool` node of shape (1, 1, k, k).

    The sketch notes it where one position is left of them all.
    """
    value = _pool(op, "avg_pool")
    if isinstance(value, Flow) and _leaves_one(op):
        op.sketch.single.update(value.sources)
    return value


def _leaves_one(op: Operation) -> bool:
    """Whether the pooling is a mean over all positions. Padding would count zeros among them."""
    before, after = op.shape(op.arg(0, "input")), op.shape(op.node)
    n = int(op.name[-2])  # avg_pool2d
    return after[-n:].numel() == 1 < before[-n:].numel() and not any(as_tuple(op.arg(3, "padding", 0), n))


def _pool(op: Operation, node_type: str) -> Carried:
    flow = op.carried(op.arg(0, "input"))
    if not isinstance(flow, Flow):
        return op.passed_on()
    kernel = as_tuple(op.arg(1, "kernel_size"), 2)
    return Flow((op.sketch.add_node(Node(node_type, None, (1, 1, *kernel[-2:])), flow.sources),))


@rule("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "_adaptive_avg_pool2d",
      "_adaptive_avg_pool3d")  # fmt: skip
def adaptive_avg_pool(op: Operation) -> Carried:
    """A `glob_avg` node, whatever the output size."""
    return _glob_avg(op)


@rule("mean")
def mean(op: Operation) -> Carried:
    """A mean over all positions of a feature map is `glob_avg`; any other has no node.

    The mean of squares is part of a normalisation; so is a mean that is then subtracted: see `norms`.
    """
    x, dims = op.arg(0, "input"), op.arg(1, "dim")
    flow = op.carried(x)
    if isinstance(flow, Flow) and flow.role == "square":
        return moment(op, dims)
    if dims is None:
        return op.passed_on()
    shape = op.shape(x)
    if not _is_over_positions(shape, {dim % len(shape) for dim in as_tuple(dims, 1)}):
        return op.passed_on()
    return _glob_avg(op, "mean")


def _is_over_positions(shape: torch.Size, dims: set[int]) -> bool:
    """Whether `dims` are all of the positions of (N, C, *positions), (N, *positions, C) or (N, T, C)."""
    n = len(shape)
    if n == 3:
        return dims in ({1}, {2}) and shape[1] > 1
    return n > 3 and dims in (set(range(2, n)), set(range(1, n - 1)))


def _glob_avg(op: Operation, role: str = "") -> Carried:
    flow = op.carried(op.arg(0, "input"))
    if not isinstance(flow, Flow):
        return flow
    return Flow((op.sketch.add_node(Node("glob_avg"), flow.sources),), role)
