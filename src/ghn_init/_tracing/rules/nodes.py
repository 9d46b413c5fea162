"""The nodes of weights, biases and whatever is computed from them."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from ghn_init._graph.graph import Node
from ghn_init._tracing.record import Call, Carried, Derived, Flow, merged

SHIFTED: Final = "a norm's weight, stored as its distance from a number"
"""What Gemma's norms have: the parameter plus one is the weight, so it is not what a GHN predicts."""


IN_FIRST: Final = "weights of experts, stored as (experts, in, out)"
"""No matrix has the outputs of all experts for rows then."""


def add_layer(
    call: Call, output: Any, x: Tensor, weight: Tensor, bias: Tensor | None, kind: str,
    *, transposed: bool = False,
) -> Any:  # fmt: skip
    """Add the node of a weight and, if there is one, of its bias; `output` comes out of the last."""
    inputs = [call.carried(x), call.carried(weight), call.carried(bias)]
    flow, of_weight, of_bias = inputs
    if not isinstance(flow, Flow) or not isinstance(of_weight, Derived) or not of_weight.params:
        # A layer of constants (a table of relative positions, say), or a weight that the network
        # computes from its input: neither has a weight that could be predicted.
        value = merged(inputs)
        if isinstance(value, Flow):
            note_others(call, inputs, f"weight or bias of a dynamic {kind}")
        return call.gives(output, value)
    last = add_weight(call, weight, of_weight, flow.sources, kind, transposed)
    if isinstance(of_bias, Derived) and of_bias.params and bias is not None:
        last = add_vector(call, "bias", of_bias, (last,))
    return call.gives(output, Flow((last,)))


def add_weight(
    call: Call, weight: Tensor, derived: Derived, sources: tuple[int, ...], kind: str, transposed: bool
) -> int:
    param = main_parameter(call, derived)
    stored, shape = call.recorder.shapes[param], tuple(weight.shape)
    if len(stored) == 3 and stored[1:] == shape:  # one of several experts
        if transposed:
            call.recorder.note_role((param,), IN_FIRST)
            return call.recorder.add_node(Node(kind), sources)
        shape = (stored[0] * shape[0], shape[1])
    elif weight.numel() != torch.Size(stored).numel():
        shape = stored  # the parameter was cut or resized on the way to the layer
    if len(shape) == 2 and stored == shape[::-1] != shape:
        transposed, shape = not transposed, stored
    if transposed:
        shape = (shape[1], shape[0], *shape[2:])
    as_stored = (shape[1], shape[0], *shape[2:]) if transposed else shape
    node = Node(kind, param, shape, None, transposed, None if as_stored == stored else stored)
    return call.recorder.add_node(node, sources)


def add_vector(
    call: Call, kind: str, derived: Derived, sources: tuple[int, ...], bias: str | None = None
) -> int:
    param = main_parameter(call, derived)
    stored = call.recorder.shapes[param]
    shape = (torch.Size(stored).numel(),)
    node = Node(kind, param, shape, bias, stored=None if shape == stored else stored)
    return call.recorder.add_node(node, sources)


def add_norm(call: Call, kind: str, of_weight: Carried, of_bias: Carried, sources: tuple[int, ...]) -> int:
    """One node for the weight and the bias of a normalisation, or for neither."""
    bias = main_parameter(call, of_bias) if isinstance(of_bias, Derived) and of_bias.params else None
    if isinstance(of_weight, Derived) and of_weight.params:
        if not of_weight.shifted:
            return add_vector(call, kind, of_weight, sources, bias)
        call.recorder.note_role(of_weight.params, SHIFTED)
    shape = None if bias is None else call.recorder.shapes[bias]
    return call.recorder.add_node(Node(kind, None, shape, bias), sources)


def main_parameter(call: Call, derived: Derived) -> str:
    """The largest of the parameters that a weight was computed from: the others reparametrise it."""
    shapes = call.recorder.shapes
    main = max(derived.params, key=lambda name: torch.Size(shapes[name]).numel())
    call.recorder.note_role([name for name in derived.params if name != main], f"reparametrises {main}")
    return main


def note_others(call: Call, inputs: list[Carried], role: str) -> None:
    for value in inputs:
        if isinstance(value, Derived):
            call.recorder.note_role(value.params, role)


def joined(call: Call, kind: str, sources: tuple[int, ...]) -> Flow:
    """A node of `kind` if it joins several nodes; with one incoming edge it is removed."""
    if len(sources) < 2:
        return Flow(sources)
    return Flow((call.recorder.add_node(Node(kind), sources),))


def as_tuple(value: Any, n: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, (tuple, list, torch.Size)) else (value,)
    return values * n if len(values) == 1 else values
