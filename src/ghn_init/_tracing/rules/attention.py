"""Attention: fused, written by hand, or `nn.MultiheadAttention`; and products of matrices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ghn_init._graph.graph import Node
from ghn_init._tracing.record import Call, Carried, Derived, Flow, merged
from ghn_init._tracing.rules.nodes import add_layer, add_vector, add_weight, note_others
from ghn_init._tracing.rules.products import is_whole_parameter, weight_in_einsum, weight_of_experts
from ghn_init._tracing.rules.table import rule


@rule("scaled_dot_product_attention")
def attention(call: Call) -> Any:
    """An `msa` node between the projections of query, key and value and the output projection."""
    query, key, value = (call.arg(index, name) for index, name in enumerate(("query", "key", "value")))
    inputs = call.inputs()
    note_others(call, [call.carried(part) for part in (query, key, value)], "learned queries")
    note_others(call, inputs, "relative position table")
    return _msa(call, query.new_empty(*query.shape[:-1], value.shape[-1]), inputs)


def _msa(call: Call, output: Any, inputs: list[Carried]) -> Any:
    value = merged(inputs)
    if not isinstance(value, Flow):
        return call.gives(output, value)
    return call.gives(output, Flow((call.recorder.add_node(Node("msa"), value.sources),)))


@rule("matmul", "bmm", "__matmul__", "__rmatmul__", "mm", "einsum", "baddbmm")
def matmul(call: Call) -> Any:
    """A product: of attention and values it is `msa`, of activations and a weight a linear layer."""
    inputs = call.inputs()
    flows = [value for value in inputs if isinstance(value, Flow)]
    output = call.run()
    if len(flows) >= 2:
        if any(flow.role == "attention" for flow in flows):
            return _msa(call, output, inputs)
        value = merged(inputs)
        assert isinstance(value, Flow)
        return call.gives(output, Flow(value.sources, "scores"))
    if flows:
        layer = _layer(call, output, inputs)
        if layer is not None:
            return layer
        note_others(call, inputs, f"used by {call.name.strip('_')}")
    return call.gives(output, merged(inputs))


def _layer(call: Call, output: Any, inputs: list[Carried]) -> Any | None:
    """A product of activations and a weight; None if it is none of those that a node can stand for."""
    if call.name == "einsum":
        return weight_in_einsum(call, output)
    if call.name not in ("matmul", "__matmul__", "mm", "bmm") or len(inputs) != 2:
        return None
    a, b = call.arg(0, "input"), call.arg(1, "other" if call.name == "matmul" else "mat2")
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return None  # given by other keywords
    if isinstance(inputs[0], Flow) and b.ndim == 2:
        return add_layer(call, output, a, b, None, "conv", transposed=True)
    if isinstance(inputs[0], Flow):
        return weight_of_experts(call, output, a, b)
    whole = a.ndim == 2 and is_whole_parameter(call, a)
    return add_layer(call, output, b, a, None, "conv") if whole else None


@rule("softmax", "log_softmax", "softmin")
def softmax(call: Call) -> Any:
    """Scores become attention."""
    value = call.carried(call.arg(0, "input"))
    output = call.run()
    if isinstance(value, Flow) and value.role == "scores":
        value = Flow(value.sources, "attention")
    return call.gives(output, value)


@rule("multi_head_attention_forward")
def multi_head_attention(call: Call) -> Any:
    """`nn.MultiheadAttention`: packed or separate input projections, `msa`, output projection."""
    names = (
        "query", "key", "value", "embed_dim_to_check", "num_heads", "in_proj_weight", "in_proj_bias",
        "bias_k", "bias_v", "add_zero_attn", "dropout_p", "out_proj_weight", "out_proj_bias",
    )  # fmt: skip
    arg = {name: call.arg(index, name) for index, name in enumerate(names)}
    output = _attended_shape(call, arg)
    inputs = [call.carried(arg[name]) for name in ("query", "key", "value")]
    value = merged(inputs)
    if not isinstance(value, Flow):
        return call.gives(output, merged(call.inputs()))
    for name in ("bias_k", "bias_v"):
        note_others(call, [call.carried(arg[name])], "bias of the attention's keys or values")
    if call.kwargs.get("use_separate_proj_weight"):
        sources = tuple(
            _projection(call, call.kwargs[f"{part}_proj_weight"], None, inputs[index])
            for index, part in enumerate("qkv")
        )
        if arg["in_proj_bias"] is not None:
            sources = (_bias_node(call, arg["in_proj_bias"], sources),)
    else:
        sources = (_projection(call, arg["in_proj_weight"], arg["in_proj_bias"], value),)
    attended = Flow((call.recorder.add_node(Node("msa"), sources),))
    last = _projection(call, arg["out_proj_weight"], arg["out_proj_bias"], attended)
    return call.gives(output, Flow((last,)))


def _attended_shape(call: Call, arg: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Empty outputs of `F.multi_head_attention_forward`: (L, N, E), and the weights where wanted."""
    query, key = arg["query"], arg["key"]
    if arg["bias_k"] is not None or arg["add_zero_attn"] or query.ndim != 3:
        return call.run()  # longer keys, or no batch: rare enough to ask the real function
    if query.shape[-1] != arg["embed_dim_to_check"]:
        return call.run()  # raises its own error
    weights = None
    if call.arg(15, "need_weights", True):
        heads = () if call.arg(24, "average_attn_weights", True) else (arg["num_heads"],)
        weights = query.new_empty(query.shape[1], *heads, query.shape[0], key.shape[0])
    return torch.empty_like(query), weights


def _projection(call: Call, weight: Tensor, bias: Tensor | None, value: Carried) -> int:
    """Nodes of a linear layer inside a fused function; the index of the last."""
    sources = value.sources if isinstance(value, Flow) else ()
    derived = call.carried(weight)
    assert isinstance(derived, Derived)
    assert derived.params
    last = add_weight(call, weight, derived, sources, "conv", False)
    return last if bias is None else _bias_node(call, bias, (last,))


def _bias_node(call: Call, bias: Tensor, sources: tuple[int, ...]) -> int:
    derived = call.carried(bias)
    assert isinstance(derived, Derived)
    assert derived.params
    return add_vector(call, "bias", derived, sources)
