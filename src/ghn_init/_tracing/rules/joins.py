"""Sums, concatenations and products of branches; functions of each element."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from ghn_init._graph.graph import Node
from ghn_init._tracing.kernels import like
from ghn_init._tracing.record import Call, Carried, Derived, Flow, merged
from ghn_init._tracing.rules.nodes import as_tuple, joined, main_parameter, note_others
from ghn_init._tracing.rules.norms import normalised, takes_vector
from ghn_init._tracing.rules.table import rule


@rule("relu", "relu6", "hardtanh", "hardswish", "hardsigmoid", "silu", "gelu", "elu", "selu", "celu",
      "leaky_relu", "mish", "sigmoid", "tanh", "softplus", "dropout", "dropout1d", "dropout2d", "dropout3d",
      "alpha_dropout", "feature_alpha_dropout", "relu_", "relu6_", "hardtanh_", "hardswish_",
      "hardsigmoid_", "silu_", "elu_", "leaky_relu_", "sigmoid_", "tanh_", "dropout_",
      "normalize", "roll", "clamp", "clamp_", "masked_fill", "masked_fill_")  # fmt: skip
def elementwise(call: Call) -> Any:
    """No node; the output's shape is the input's, known without asking the (often slow) meta kernel."""
    x = call.arg(0, "input")
    value = merged(call.inputs())
    if not isinstance(value, Flow):
        return call.passed_on()
    if value.role not in ("scores", "attention") and not call.name.startswith("clamp"):
        value = Flow(value.sources)  # beyond an activation, no normalisation goes on
    in_place = call.name.endswith("_") or call.kwargs.get("inplace", False)
    return call.gives(x if in_place else like(x), value)


@rule("grid_sample", "grid_sampler")
def sampled(call: Call) -> Any:
    """No node; features (N, C, ...) at the places of a grid (N, *places, 2 or 3) are (N, C, *places)."""
    x, grid = call.arg(0, "input"), call.arg(1, "grid")
    fits = (
        x.is_meta
        and x.dtype == grid.dtype
        and x.ndim == grid.ndim == grid.shape[-1] + 2
        and x.shape[0] == grid.shape[0]
        and min(x.shape[2:]) > 0
    )
    return call.passed_on(x.new_empty(*x.shape[:2], *grid.shape[1:-1]) if fits else None)


@rule("interpolate", "upsample")
def resized(call: Call) -> Any:
    """No node; features (N, C, *sizes) at other places are (N, C, *wanted sizes)."""
    x, wanted = call.arg(0, "input"), call.arg(1, "size")
    n = x.ndim - 2
    known = call.arg(3, "mode", "nearest") in _MODES.get(n, ()) and call.arg(2, "scale_factor") is None
    if wanted is None or not known or not (x.is_meta and x.is_contiguous()):
        return call.passed_on()
    sizes = as_tuple(wanted, n)
    fits = len(sizes) == n and all(type(size) is int and size > 0 for size in (*sizes, *x.shape))
    return call.passed_on(x.new_empty(*x.shape[:2], *sizes) if fits else None)


_MODES: Final = {
    1: ("nearest", "nearest-exact", "linear"),
    2: ("nearest", "nearest-exact", "bilinear", "bicubic"),
    3: ("nearest", "nearest-exact", "trilinear"),
}
"""Axes of places -> the interpolations that there are."""


@rule("add", "add_", "__add__", "__radd__", "__iadd__")
def add(call: Call) -> Any:
    """A `sum` of two branches; of a branch and a positional encoding; of a layer and its own bias."""
    a, b = call.arg(0, "input"), call.arg(1, "other")
    of_a, of_b = call.carried(a), call.carried(b)
    output = _combined(call, a, b)
    value = merged((of_a, of_b))
    if isinstance(value, Flow) and value.role != "scores":
        if isinstance(of_a, Flow) and isinstance(of_b, Flow):
            value = joined(call, "sum", value.sources)
        else:
            value = _with_parameter(call, value, of_b if isinstance(of_a, Flow) else of_a)
    elif isinstance(value, Flow):
        note_others(call, [of_a, of_b], "relative position table")
    elif value.params and any(not isinstance(x, Tensor) and x != 0 for x in (a, b)):
        value = Derived(value.params, shifted=True)
    return call.gives(output, value)


@rule("index_add", "index_add_", "scatter_add", "scatter_add_")
def add_at(call: Call) -> Any:
    """A `sum` of two branches, one of which has only some rows: an expert's, say."""
    x, added = call.arg(0, "input"), call.arg(3, "src" if call.name.startswith("scatter") else "source")
    value = merged((call.carried(x), call.carried(added)))
    if not isinstance(value, Flow) or not isinstance(call.carried(added), Flow):
        return call.passed_on()
    output = call.run()
    return call.gives(output, joined(call, "sum", value.sources))


def _combined(call: Call, a: Any, b: Any) -> Any:
    """The output of a sum or product: known from the operands' shapes, but for constants and scalars."""
    if (
        not (isinstance(a, Tensor) and isinstance(b, Tensor) and a.is_meta)
        or a.dtype != b.dtype
        or "out" in call.kwargs
    ):
        return call.run()
    if call.name.startswith("__i") or (call.name.endswith("_") and not call.name.startswith("__")):
        return a  # in place
    return a.new_empty(a.shape if a.shape == b.shape else torch.broadcast_shapes(a.shape, b.shape))


def _with_parameter(call: Call, flow: Flow, derived: Carried) -> Flow:
    """The sum of activations and something computed from parameters."""
    if not isinstance(derived, Derived) or not derived.params or takes_vector(call, flow, derived, "bias"):
        return flow
    param = main_parameter(call, derived)
    shape = call.recorder.shapes[param]
    if sum(size > 1 for size in shape) >= 2:
        return with_positions(call, flow, param)
    if len(shape) == 1 and flow.sources != (0,):
        return Flow((call.recorder.add_node(Node("bias", param, shape), flow.sources),))
    call.recorder.note_role((param,), "shift")
    return flow


def with_positions(call: Call, flow: Flow, param: str) -> Flow:
    """A learned positional encoding and the sum that it feeds."""
    shape = call.recorder.shapes[param]
    canonical = shape if len(shape) in (3, 4) else (1, *shape)
    node = Node("pos_enc", param, canonical, stored=None if canonical == shape else shape)
    encoding = call.recorder.add_node(node, ())
    return joined(call, "sum", (*flow.sources, encoding))


@rule("cat", "concat", "concatenate")
def concat(call: Call) -> Any:
    """A `concat` of several branches; parameters that are joined to a branch are tokens."""
    inputs = call.inputs()
    value = merged(inputs)
    output = _concatenated(call)
    if isinstance(value, Flow):
        note_others(call, inputs, "class token")
        value = joined(call, "concat", value.sources)
    return call.gives(output, value)


def _concatenated(call: Call) -> Any:
    """An empty tensor of a concatenation's shape where its parts agree; else what torch says."""
    parts, dim = list(call.arg(0, "tensors")), call.arg(1, "dim", call.kwargs.get("axis", 0))
    first = parts[0]
    alike = all(
        part.is_meta
        and part.dtype == first.dtype
        and part.ndim == first.ndim
        and _but(part, dim) == _but(first, dim)
        for part in parts
    )
    if not alike or "out" in call.kwargs:
        return call.run()
    shape = list(first.shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    return first.new_empty(shape)


def _but(tensor: Tensor, dim: int) -> list[int]:
    """The sizes of `tensor` without that of `dim`."""
    sizes = list(tensor.shape)
    if -len(sizes) <= dim < len(sizes):
        del sizes[dim]
    return sizes


@rule("mul", "mul_", "__mul__", "__rmul__", "__imul__", "multiply")
def mul(call: Call) -> Any:
    """A `cse` where a feature map meets a gate of its channels; products with parameters scale."""
    a, b = call.arg(0, "input"), call.arg(1, "other")
    of_a, of_b = call.carried(a), call.carried(b)
    output = _combined(call, a, b)
    value = normalised(call, of_a, of_b) or normalised(call, of_b, of_a) or merged((of_a, of_b))
    if isinstance(value, Flow):
        value = _scaled(call, value, (a, b), (of_a, of_b))
    return call.gives(output, value)


def _scaled(call: Call, value: Flow, factors: tuple[Any, Any], carried: tuple[Carried, Carried]) -> Flow:
    """What a product carries: a gate's `cse`, a norm with its weight, or the branch that is scaled."""
    (a, b), (of_a, of_b) = factors, carried
    if isinstance(of_a, Flow) and isinstance(of_b, Flow):
        if a is b:
            return Flow(value.sources, "square")
        gated = value.role != "normalised" and (_gates(a, b) or _gates(b, a))
        return joined(call, "cse", value.sources) if gated else value
    if not takes_vector(call, value, of_b if isinstance(of_a, Flow) else of_a, "param"):
        note_others(call, [of_a, of_b], "scale of the attention" if value.role == "scores" else "layer scale")
    return value


def _gates(gate: Tensor, features: Tensor) -> bool:
    """Whether `gate` has one value for every channel of a feature map: (N, C, 1, 1) to (N, C, H, W)."""
    if gate.ndim != features.ndim or gate.ndim < 3 or gate.shape == features.shape:
        return False
    first = gate.shape[1] == features.shape[1] and all(size == 1 for size in gate.shape[2:])
    last = gate.shape[-1] == features.shape[-1] and all(size == 1 for size in gate.shape[1:-1])
    return (first or last) and gate.numel() > gate.shape[0]


@rule("embedding", "embedding_bag")
def embedding(call: Call) -> Any:
    """A table of embeddings: no node type fits; positions looked up in it are a positional encoding."""
    inputs = call.inputs()
    value = merged(inputs)
    if isinstance(value, Flow):
        note_others(call, inputs, "embedding table")
    return call.gives(call.run(), value)
