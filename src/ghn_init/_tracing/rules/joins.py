"""Sums, concatenations and products of branches; functions of each element."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from torch import fx

from ghn_init._graph.graph import SLOPE, Node
from ghn_init._tracing.carried import Carried, Derived, Flow, merged
from ghn_init._tracing.channels import LAYER_SCALE
from ghn_init._tracing.functions import ADDING, ELEMENTWISE, JOINING, MULTIPLYING
from ghn_init._tracing.rules.nodes import joined, main_parameter, note_others
from ghn_init._tracing.rules.norms import normalised, takes_vector
from ghn_init._tracing.sketch import Operation, rule

if TYPE_CHECKING:
    import torch


_RECTIFIERS: Final = frozenset(
    {
        "relu",
        "relu6",
        "hardswish",
        "silu",
        "gelu",
        "elu",
        "selu",
        "celu",
        "leaky_relu",
        "mish",
        "softplus",
        "rrelu",
    }
)
"""Activations that let positive values through, and negative ones hardly."""


@rule(*ELEMENTWISE)
def elementwise(op: Operation) -> Carried:
    """No node; beyond an activation, no normalisation goes on."""
    value = merged(op.inputs())
    if not isinstance(value, Flow):
        return op.passed_on()
    name = op.name.rstrip("_")
    if name in _RECTIFIERS or (
        name == "hardtanh" and op.arg(1, "min_val", -1) == 0
    ):  # the latter is nn.ReLU6
        op.sketch.rectified.update(value.sources)
    if value.role not in ("", "scores", "attention") and not op.name.startswith("clamp"):
        return Flow(value.sources)
    return value


@rule("prelu")
def prelu(op: Operation) -> Carried:
    """No node, for its slope neither. Torch's begins as one of those that rectify."""
    note_others(op, op.inputs(), SLOPE)
    value = op.passed_on()
    if isinstance(value, Flow):
        op.sketch.rectified.update(value.sources)
    return value


@rule(*ADDING)
def add(op: Operation) -> Carried:
    """A `sum` of two branches; of a branch and a positional encoding; of a layer and its own bias."""
    a, b = op.arg(0, "input"), op.arg(1, "other")
    of_a, of_b = op.carried(a), op.carried(b)
    value = merged((of_a, of_b))
    if isinstance(value, Flow) and value.role != "scores":
        if isinstance(of_a, Flow) and isinstance(of_b, Flow):
            return joined(op, "sum", value.sources)
        return _with_parameter(op, value, of_b if isinstance(of_a, Flow) else of_a)
    if isinstance(value, Flow):
        note_others(op, [of_a, of_b], "relative position table")
    elif (
        isinstance(value, Derived)
        and value.params
        and any(not isinstance(x, fx.Node) and x != 0 for x in (a, b))
    ):
        return replace(value, shifted=True)
    return value


@rule("index_add", "index_add_", "scatter_add", "scatter_add_")
def add_at(op: Operation) -> Carried:
    """A `sum` of two branches, one of which has only some rows: an expert's, say."""
    x, added = op.arg(0, "input"), op.arg(3, "src" if op.name.startswith("scatter") else "source")
    value = merged((op.carried(x), op.carried(added)))
    if not isinstance(value, Flow) or not isinstance(op.carried(added), Flow):
        return op.passed_on()
    return joined(op, "sum", value.sources)


def _with_parameter(op: Operation, flow: Flow, derived: Carried) -> Flow:
    """The sum of activations and something computed from parameters."""
    if not isinstance(derived, Derived) or not derived.params or takes_vector(op, flow, derived, "bias"):
        return flow
    param = main_parameter(op, derived)
    shape = op.sketch.shapes[param]
    if sum(size > 1 for size in shape) >= 2:
        return with_positions(op, flow, param)
    if len(shape) == 1 and flow.sources != (0,):
        return Flow((op.sketch.add_node(Node("bias", param, shape), flow.sources),))
    op.sketch.note_role((param,), "shift")
    return flow


def with_positions(op: Operation, flow: Flow, param: str) -> Flow:
    """A learned positional encoding and the sum that it feeds."""
    shape = op.sketch.shapes[param]
    canonical = shape if len(shape) in (3, 4) else (1, *shape)
    node = Node("pos_enc", param, canonical, stored=None if canonical == shape else shape)
    encoding = op.sketch.add_node(node, ())
    return joined(op, "sum", (*flow.sources, encoding))


@rule(*JOINING)
def concat(op: Operation) -> Carried:
    """A `concat` of several branches; parameters that are joined to a branch are tokens."""
    inputs = op.inputs()
    value = merged(inputs)
    if isinstance(value, Flow):
        note_others(op, inputs, "class token")
        return joined(op, "concat", value.sources)
    return value


@rule(*MULTIPLYING)
def mul(op: Operation) -> Carried:
    """A `cse` where a feature map meets a gate of its channels; products with parameters scale."""
    a, b = op.arg(0, "input"), op.arg(1, "other")
    of_a, of_b = op.carried(a), op.carried(b)
    value = normalised(op, of_a, of_b) or normalised(op, of_b, of_a) or merged((of_a, of_b))
    return _scaled(op, value, (a, b), (of_a, of_b)) if isinstance(value, Flow) else value


def _scaled(op: Operation, value: Flow, factors: tuple[Any, Any], carried: tuple[Carried, Carried]) -> Flow:
    """What a product carries: a gate's `cse`, a norm with its weight, or the branch that is scaled."""
    (a, b), (of_a, of_b) = factors, carried
    if isinstance(of_a, Flow) and isinstance(of_b, Flow):
        if a is b:
            return Flow(value.sources, "square")
        shapes = op.shape(a), op.shape(b)
        of_channels = _gates(*shapes) or _gates(*reversed(shapes))
        if shapes[0] == shapes[1] and len(shapes[0]) > 2 and shapes[0][2:].numel() == 1:  # a small image
            of_channels = _squeezes(op, of_a, of_b) or _squeezes(op, of_b, of_a)
        gated = value.role != "normalised" and of_channels
        return joined(op, "cse", value.sources) if gated else value
    if not takes_vector(op, value, of_b if isinstance(of_a, Flow) else of_a, "param"):
        note_others(op, [of_a, of_b], "scale of the attention" if value.role == "scores" else LAYER_SCALE)
    return value


def _gates(gate: torch.Size, features: torch.Size) -> bool:
    """Whether `gate` has one value for every channel of a feature map: (N, C, 1, 1) to (N, C, H, W)."""
    if len(gate) != len(features) or len(gate) < 3 or gate == features:
        return False
    first = gate[1] == features[1] and all(size == 1 for size in gate[2:])
    last = gate[-1] == features[-1] and all(size == 1 for size in gate[1:-1])
    return (first or last) and gate.numel() > gate[0]


def _squeezes(op: Operation, gate: Flow, features: Flow) -> bool:
    """Whether a gate is computed from the mean of the features that it meets, told where shapes do not."""
    sketch = op.sketch
    seen: set[int] = set(features.sources)
    stack = [source for source in gate.sources if source not in seen]
    while stack:
        node = stack.pop()
        before = sketch.predecessors[node]
        if sketch.nodes[node].type == "glob_avg" and before == features.sources:
            return True
        stack.extend(source for source in before if source not in seen)
        seen.update(before)
    return False
