"""The nodes of weights, biases and whatever is computed from them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from torch import fx

from ghn_init._graph.graph import Node
from ghn_init._tracing.arguments import function_name
from ghn_init._tracing.carried import Carried, Derived, Flow, merged

if TYPE_CHECKING:
    from ghn_init._tracing.sketch import Operation

SHIFTED: Final = "a norm's weight, stored as its distance from a number"
"""What Gemma's norms have: the parameter plus one is the weight, so it is not what a GHN predicts."""


IN_FIRST: Final = "weights of experts, stored as (experts, in, out)"
"""No matrix has the outputs of all experts for rows then."""


EMPTY: Final = "no elements"
"""What a layer without outputs has, such as `nn.Linear(10, 0)`."""


def add_layer(
    op: Operation, x: Any, weight: Any, bias: Any, node_type: str,
    *, transposed: bool = False, shape: tuple[int, ...] | None = None,
) -> Carried:  # fmt: skip
    """Add the node of a weight and, if there is one, of its bias; the output comes out of the last.

    `x` is a node or what one carries; `shape` is that of the weight as a matrix, where it has more
    dimensions.
    """
    inputs = [x if isinstance(x, (Flow, Derived)) else op.carried(x), op.carried(weight), op.carried(bias)]
    flow, of_weight, of_bias = inputs
    if not isinstance(flow, Flow) or not isinstance(of_weight, Derived) or not of_weight.params:
        # A layer of constants (a table of relative positions, say), or a weight that the network
        # computes from its input: neither has a weight that could be predicted.
        value = merged(inputs)
        if isinstance(value, Flow):
            note_others(op, inputs, f"weight or bias of a dynamic {node_type}")
        return value
    shape = tuple(op.shape(weight)) if shape is None else shape
    if transposed and len(shape) == 2 and shape[0] == shape[1]:
        transposed = not _is_transpose_in_export(weight)
    last = add_weight(op, shape, of_weight, flow.sources, node_type, transposed)
    if isinstance(of_bias, Derived) and of_bias.params:
        last = add_vector(op, "bias", of_bias, (last,))
    return Flow((last,))


def _is_transpose_in_export(weight: fx.Node) -> bool:
    """Whether a square weight, whose shape does not tell, was transposed on the way to a product.

    In a graph of torch.export a linear layer may be a product with a transpose.
    """
    turns, node = 0, weight
    while isinstance(node.target, torch._ops.OpOverload) and node.all_input_nodes:  # noqa: SLF001
        turns += function_name(node) in ("t", "transpose", "permute")
        node = node.all_input_nodes[0]
    return turns % 2 == 1


def add_weight(
    op: Operation, shape: tuple[int, ...], derived: Derived, sources: tuple[int, ...], node_type: str,
    transposed: bool,
) -> int:  # fmt: skip
    """The node of a weight that the layer gets in `shape`; its index."""
    param = main_parameter(op, derived)
    stored = op.sketch.shapes[param]
    if 0 in stored:
        op.sketch.note_role((param,), EMPTY)
        return op.sketch.add_node(Node(node_type), sources)
    if _is_distorted(op, param, derived):
        return op.sketch.add_node(Node(node_type, None, tuple(shape)), sources)
    if len(stored) == 3 and stored[1:] == shape:  # one of several experts
        if transposed:
            op.sketch.note_role((param,), IN_FIRST)
            return op.sketch.add_node(Node(node_type), sources)
        shape = (stored[0] * shape[0], shape[1])
    elif torch.Size(shape).numel() != torch.Size(stored).numel():
        shape = stored  # the parameter was cut or resized on the way to the layer
    if len(shape) == 2 and stored == shape[::-1] != shape:
        transposed, shape = not transposed, stored
    if transposed:
        shape = (shape[1], shape[0], *shape[2:])
    as_stored = (shape[1], shape[0], *shape[2:]) if transposed else shape
    node = Node(node_type, param, shape, None, transposed, None if as_stored == stored else stored)
    index = op.sketch.add_node(node, sources)
    if param in derived.rescaled:
        op.sketch.rescaled[index] = derived.rescaled[param]
    return index


def add_vector(
    op: Operation, node_type: str, derived: Derived, sources: tuple[int, ...], bias: str | None = None
) -> int:
    """The node of a vector; its index."""
    param = main_parameter(op, derived)
    stored = op.sketch.shapes[param]
    if 0 in stored:
        op.sketch.note_role((param,), EMPTY)
        return op.sketch.add_node(Node(node_type), sources)
    shape = (torch.Size(stored).numel(),)
    if _is_distorted(op, param, derived):
        return op.sketch.add_node(Node(node_type, None, shape, bias), sources)
    node = Node(node_type, param, shape, bias, stored=None if shape == stored else stored)
    return op.sketch.add_node(node, sources)


def _is_distorted(op: Operation, param: str, derived: Derived) -> bool:
    """Whether a layer's weight is a function of the parameter, and no other weight: nobody predicts those."""
    function = derived.distorted.get(param)
    if function is not None:
        op.sketch.note_role((param,), f"goes through {function} before a layer uses it")
    return function is not None


def add_norm(
    op: Operation, node_type: str, of_weight: Carried, of_bias: Carried, sources: tuple[int, ...]
) -> int:
    """One node for the weight and the bias of a normalisation, or for neither."""
    bias = main_parameter(op, of_bias) if isinstance(of_bias, Derived) and of_bias.params else None
    if isinstance(of_weight, Derived) and of_weight.params:
        if not of_weight.shifted:
            return add_vector(op, node_type, of_weight, sources, bias)
        op.sketch.note_role(of_weight.params, SHIFTED)
    shape = None if bias is None else op.sketch.shapes[bias]
    return op.sketch.add_node(Node(node_type, None, shape, bias), sources)


def main_parameter(op: Operation, derived: Derived) -> str:
    """The largest of the parameters that a weight was computed from: the others reparametrise it.

    A gate of its shape, `sigmoid(mask) * weight`, is none that is a weight.
    """
    shapes, distorted = op.sketch.shapes, derived.distorted
    main = max(derived.params, key=lambda name: (torch.Size(shapes[name]).numel(), name not in distorted))
    op.sketch.note_role([name for name in derived.params if name != main], f"reparametrises {main}")
    return main


def note_others(op: Operation, inputs: list[Carried], role: str) -> None:
    """Say what the parameters among `inputs` are."""
    for value in inputs:
        if isinstance(value, Derived):
            op.sketch.note_role(value.params, role)


def joined(op: Operation, node_type: str, sources: tuple[int, ...]) -> Flow:
    """A node of `node_type` if it joins several nodes; with one incoming edge it is removed."""
    if len(sources) < 2:
        return Flow(sources)
    return Flow((op.sketch.add_node(Node(node_type), sources),))


def is_whole_parameter(op: Operation, weight: fx.Node) -> bool:
    """Whether `weight` is one whole parameter; a table that was projected, say, is computed from two."""
    value = op.carried(weight)
    if not isinstance(value, Derived) or len(value.params) != 1:
        return False
    return op.shape(weight).numel() == torch.Size(op.sketch.shapes[value.params[0]]).numel()
