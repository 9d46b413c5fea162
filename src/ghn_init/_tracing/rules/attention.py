"""Attention: fused, written by hand, or `nn.MultiheadAttention`; and products of matrices."""

from __future__ import annotations

from typing import Any

from torch import fx

from ghn_init._graph.graph import Node
from ghn_init._tracing.carried import Carried, Derived, Flow, merged
from ghn_init._tracing.rules.nodes import add_layer, add_vector, add_weight, is_whole_parameter, note_others
from ghn_init._tracing.rules.products import repeated_weight, weight_in_einsum, weight_of_experts
from ghn_init._tracing.sketch import Operation, rule


@rule("scaled_dot_product_attention")
def attention(op: Operation) -> Carried:
    """An `msa` node between the projections of query, key and value and the output projection."""
    query, key, value = (op.arg(index, name) for index, name in enumerate(("query", "key", "value")))
    inputs = op.inputs()
    note_others(op, [op.carried(part) for part in (query, key, value)], "learned queries")
    note_others(op, inputs, "relative position table")
    return _msa(op, merged(inputs))


def _msa(op: Operation, value: Carried) -> Carried:
    if not isinstance(value, Flow):
        return value
    return Flow((op.sketch.add_node(Node("msa"), value.sources),))


@rule("matmul", "bmm", "__matmul__", "__rmatmul__", "mm", "einsum", "baddbmm")
def matmul(op: Operation) -> Carried:
    """A product: of attention and values it is `msa`, of activations and a weight a linear layer."""
    inputs = [op.carried(node) for node in op.operands()]
    flows = [value for value in inputs if isinstance(value, Flow)]
    if len(flows) >= 2:
        value = merged(inputs)
        if any(flow.role == "attention" for flow in flows):
            return _msa(op, value)
        assert isinstance(value, Flow)
        return Flow(value.sources, "scores")
    if flows:
        layer = _layer(op, inputs)
        if layer is not None:
            return layer
        note_others(op, inputs, f"used by {op.name.strip('_')}")
    return merged(inputs)


def _layer(op: Operation, inputs: list[Carried]) -> Carried | None:
    """A product of activations and a weight; None if it is none of those that a node can stand for."""
    if op.name == "einsum":
        return weight_in_einsum(op)
    if op.name not in ("matmul", "__matmul__", "mm", "bmm") or len(inputs) != 2:
        return None
    a, b = op.arg(0, "input"), op.arg(1, "other" if op.name == "matmul" else "mat2")
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return None  # given by other keywords
    if isinstance(inputs[0], Flow) and len(op.shape(b)) == 2:
        return add_layer(op, a, b, None, "conv", transposed=True)
    if isinstance(inputs[0], Flow):
        return repeated_weight(op, a, b) or weight_of_experts(op, a, b)
    whole = len(op.shape(a)) == 2 and is_whole_parameter(op, a)
    return add_layer(op, b, a, None, "conv") if whole else None


@rule("softmax", "log_softmax", "softmin", "_softmax", "_log_softmax", "_safe_softmax")
def softmax(op: Operation) -> Carried:
    """Scores become attention."""
    value = op.carried(op.arg(0, "input"))
    if isinstance(value, Flow) and value.role == "scores":
        return Flow(value.sources, "attention")
    return value


@rule("where")
def chosen(op: Operation) -> Carried:
    """Attention in which rows without a finite score are zero, as decompositions of torch.export write it."""
    value = op.passed_on()
    choices = [op.carried(op.arg(1, "input")), op.carried(op.arg(2, "other"))]
    if isinstance(value, Flow) and any(isinstance(c, Flow) and c.role == "attention" for c in choices):
        return Flow(value.sources, "attention")
    return value


@rule("multi_head_attention_forward")
def multi_head_attention(op: Operation) -> Carried:
    """`nn.MultiheadAttention`: packed or separate input projections, `msa`, output projection."""
    names = (
        "query", "key", "value", "embed_dim_to_check", "num_heads", "in_proj_weight", "in_proj_bias",
        "bias_k", "bias_v", "add_zero_attn", "dropout_p", "out_proj_weight", "out_proj_bias",
    )  # fmt: skip
    arg = {name: op.arg(index, name) for index, name in enumerate(names)}
    inputs = [op.carried(arg[name]) for name in ("query", "key", "value")]
    value = merged(inputs)
    if not isinstance(value, Flow):
        return merged(op.inputs())
    for name in ("bias_k", "bias_v"):
        note_others(op, [op.carried(arg[name])], "bias of the attention's keys or values")
    kwargs: Any = op.node.kwargs
    if kwargs.get("use_separate_proj_weight"):
        sources = tuple(
            source
            for index, part in enumerate("qkv")
            for source in _projection(op, kwargs[f"{part}_proj_weight"], None, inputs[index])
        )
        sources = _biased(op, arg["in_proj_bias"], sources)
    else:
        sources = _projection(op, arg["in_proj_weight"], arg["in_proj_bias"], value)
    attended = Flow((op.sketch.add_node(Node("msa"), sources),))
    return Flow(_projection(op, arg["out_proj_weight"], arg["out_proj_bias"], attended))


def _projection(op: Operation, weight: fx.Node, bias: fx.Node | None, value: Carried) -> tuple[int, ...]:
    """Nodes of a linear layer inside a fused function; the index of the last.

    A weight that is no parameter of the model, as where its forward pass uses another's layer, has no shape.
    """
    sources = value.sources if isinstance(value, Flow) else ()
    derived = op.carried(weight)
    if isinstance(derived, Derived) and derived.params:
        last = add_weight(op, tuple(op.shape(weight)), derived, sources, "conv", False)
    else:
        last = op.sketch.add_node(Node("conv"), sources)
    return _biased(op, bias, (last,))


def _biased(op: Operation, bias: fx.Node | None, sources: tuple[int, ...]) -> tuple[int, ...]:
    """Where the sum of `sources` and a bias comes from."""
    derived = op.carried(bias)
    if not isinstance(derived, Derived) or not derived.params:
        return sources
    return (add_vector(op, "bias", derived, sources),)
