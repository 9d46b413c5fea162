"""Rules: which torch functions are nodes of the graph, and which nodes (arXiv 2110.13100, appendix A).

A rule gets a `Call` and returns the function's output. It decides by the function and its tensors'
shapes, never by the module around it, so a hand-written layer, `F.conv2d(x, self.w)` and
`nn.Conv2d` are the same thing. A function without a rule has no node: its inputs' sources are passed
on to its output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from ghn_init._graph import Node
from ghn_init._record import Call, Carried, Derived, Flow, merged

Rule = Callable[[Call], Any]

RULES: Final[dict[str, Rule]] = {}
"""The torch function's `__name__` -> its rule."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Decorator: this is the rule of the torch functions called `names`."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


# -- layers with weights ------------------------------------------------------------------------


@rule("conv1d", "conv2d", "conv3d")
def convolution(call: Call) -> Any:
    """A convolution: `conv`, grouped `sep_conv`, grouped and dilated `dil_conv`; then `bias`."""
    x, weight = call.arg(0, "input"), call.arg(1, "weight")
    stride, padding = call.arg(3, "stride", 1), call.arg(4, "padding", 0)
    dilation, groups = call.arg(5, "dilation", 1), call.arg(6, "groups", 1)
    output = _convolved(x, weight, stride, padding, dilation)
    if output is None or not _matches(x, weight, groups):
        output = call.run()
    return _layer(call, output, x, weight, call.arg(2, "bias"), _conv_type(dilation, groups))


def _conv_type(dilation: Any, groups: int) -> str:
    if groups == 1:
        return "conv"
    return "dil_conv" if min(_tuple(dilation, 1)) > 1 else "sep_conv"


def _tuple(value: Any, n: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, (tuple, list, torch.Size)) else (value,)
    return values * n if len(values) == 1 else values


def _convolved(x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any) -> Tensor | None:
    """An empty tensor of a convolution's output shape: the meta kernel takes ten times longer."""
    n = weight.ndim - 2
    if isinstance(padding, str) or x.ndim != n + 2:
        return None
    sizes = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(
            x.shape[2:], weight.shape[2:], _tuple(stride, n), _tuple(padding, n), _tuple(dilation, n),
            strict=True,
        )
    ]  # fmt: skip
    return x.new_empty(x.shape[0], weight.shape[0], *sizes) if min(sizes) > 0 else None


def _matches(x: Tensor, weight: Tensor, groups: int) -> bool:
    """Whether the channels agree; where they do not, the real kernel raises its own error."""
    return x.ndim == weight.ndim and x.shape[1] == weight.shape[1] * groups


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def transposed_convolution(call: Call) -> Any:
    """A transposed convolution: its weight is stored (in, out, ...)."""
    x, weight = call.arg(0, "input"), call.arg(1, "weight")
    kind = _conv_type(call.arg(7, "dilation", 1), call.arg(6, "groups", 1))
    return _layer(call, call.run(), x, weight, call.arg(2, "bias"), kind, transposed=True)


@rule("linear")
def linear(call: Call) -> Any:
    """A linear layer: a `conv` whose kernel is 1x1; then `bias`."""
    x, weight = call.arg(0, "input"), call.arg(1, "weight")
    fits = weight.ndim == 2 and x.ndim >= 1 and x.shape[-1] == weight.shape[1]
    output = x.new_empty(*x.shape[:-1], weight.shape[0]) if fits else call.run()
    return _layer(call, output, x, weight, call.arg(2, "bias"), "conv")


@rule("addmm")
def addmm(call: Call) -> Any:
    """`torch.addmm(bias, x, w)`, a linear layer whose weight is stored (in, out)."""
    bias, x, weight = call.arg(0, "input"), call.arg(1, "mat1"), call.arg(2, "mat2")
    return _layer(call, call.run(), x, weight, bias, "conv", transposed=True)


def _layer(
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
            _note_others(call, inputs, f"weight or bias of a dynamic {kind}")
        return call.gives(output, value)
    last = _weight_node(call, weight, of_weight, flow.sources, kind, transposed)
    if isinstance(of_bias, Derived) and of_bias.params and bias is not None:
        last = _vector_node(call, "bias", of_bias, (last,))
    return call.gives(output, Flow((last,)))


def _weight_node(
    call: Call, weight: Tensor, derived: Derived, sources: tuple[int, ...], kind: str, transposed: bool
) -> int:
    param = _main(call, derived)
    stored, shape = call.recorder.shapes[param], tuple(weight.shape)
    if weight.numel() != torch.Size(stored).numel():
        shape = stored  # the parameter was cut or resized on the way to the layer
    if len(shape) == 2 and stored == shape[::-1] != shape:
        transposed, shape = not transposed, stored
    if transposed:
        shape = (shape[1], shape[0], *shape[2:])
    as_stored = (shape[1], shape[0], *shape[2:]) if transposed else shape
    node = Node(kind, param, shape, None, transposed, None if as_stored == stored else stored)
    return call.recorder.add_node(node, sources)


def _vector_node(
    call: Call, kind: str, derived: Derived, sources: tuple[int, ...], bias: str | None = None
) -> int:
    param = _main(call, derived)
    stored = call.recorder.shapes[param]
    shape = (torch.Size(stored).numel(),)
    node = Node(kind, param, shape, bias, stored=None if shape == stored else stored)
    return call.recorder.add_node(node, sources)


def _main(call: Call, derived: Derived) -> str:
    """The largest of the parameters that a weight was computed from: the others reparametrise it."""
    shapes = call.recorder.shapes
    main = max(derived.params, key=lambda name: torch.Size(shapes[name]).numel())
    call.recorder.note_role([name for name in derived.params if name != main], f"reparametrises {main}")
    return main


def _note_others(call: Call, inputs: list[Carried], role: str) -> None:
    for value in inputs:
        if isinstance(value, Derived):
            call.recorder.note_role(value.params, role)


# -- normalisation ------------------------------------------------------------------------------


@rule("batch_norm")
def batch_norm(call: Call) -> Any:
    """A `bn` node for weight and bias."""
    return _norm(call, "bn", call.arg(3, "weight"), call.arg(4, "bias"))


@rule("instance_norm")
def instance_norm(call: Call) -> Any:
    """Statistics of one example: an `ln` node."""
    return _norm(call, "ln", call.arg(3, "weight"), call.arg(4, "bias"))


@rule("layer_norm", "group_norm", "rms_norm")
def layer_norm(call: Call) -> Any:
    """An `ln` node for weight and bias; group norm and RMS norm, of one example too, are alike."""
    return _norm(call, "ln", call.arg(2, "weight"), call.arg(3, "bias") if call.name != "rms_norm" else None)


def _norm(call: Call, kind: str, weight: Tensor | None, bias: Tensor | None) -> Any:
    x = call.arg(0, "input")
    flow, of_weight, of_bias = (call.carried(tensor) for tensor in (x, weight, bias))
    if not isinstance(flow, Flow):
        return call.passed_on()
    output = torch.empty_like(x)
    bias_name = _main(call, of_bias) if isinstance(of_bias, Derived) and of_bias.params else None
    if isinstance(of_weight, Derived) and of_weight.params and weight is not None:
        node = _vector_node(call, kind, of_weight, flow.sources, bias_name)
    else:
        shape = None if bias_name is None else call.recorder.shapes[bias_name]
        node = call.recorder.add_node(Node(kind, None, shape, bias_name), flow.sources)
    return call.gives(output, Flow((node,)))


# -- attention ----------------------------------------------------------------------------------


@rule("scaled_dot_product_attention")
def attention(call: Call) -> Any:
    """An `msa` node between the projections of query, key and value and the output projection."""
    query, value = call.arg(0, "query"), call.arg(2, "value")
    inputs = call.inputs()
    _note_others(call, inputs, "relative position table")
    return _msa(call, query.new_empty(*query.shape[:-1], value.shape[-1]), inputs)


def _msa(call: Call, output: Any, inputs: list[Carried]) -> Any:
    value = merged(inputs)
    if not isinstance(value, Flow):
        return call.gives(output, value)
    return call.gives(output, Flow((call.recorder.add_node(Node("msa"), value.sources),)))


@rule("matmul", "bmm", "__matmul__", "__rmatmul__", "einsum", "baddbmm")
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
    if call.name in ("matmul", "__matmul__") and len(flows) == 1 and isinstance(inputs[0], Flow):
        weight = call.args[1]
        if weight.ndim == 2:
            return _layer(call, output, call.args[0], weight, None, "conv", transposed=True)
    if flows:
        _note_others(call, inputs, f"used by {call.name.strip('_')}")
    return call.gives(output, merged(inputs))


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
        _note_others(call, [call.carried(arg[name])], "bias of the attention's keys or values")
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
    last = _weight_node(call, weight, derived, sources, "conv", False)
    return last if bias is None else _bias_node(call, bias, (last,))


def _bias_node(call: Call, bias: Tensor, sources: tuple[int, ...]) -> int:
    derived = call.carried(bias)
    assert isinstance(derived, Derived)
    assert derived.params
    return _vector_node(call, "bias", derived, sources)


# -- pooling ------------------------------------------------------------------------------------


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
    kernel = _tuple(call.arg(1, "kernel_size"), 2)
    node = call.recorder.add_node(Node(kind, None, (1, 1, *kernel[-2:])), flow.sources)
    return call.gives(call.run(), Flow((node,)))


@rule("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d")
def adaptive_avg_pool(call: Call) -> Any:
    """A `glob_avg` node, whatever the output size."""
    x = call.arg(0, "input")
    n = int(call.name[-2])
    wanted = _tuple(call.arg(1, "output_size"), n)
    sizes = [have if want is None else want for have, want in zip(x.shape[-n:], wanted, strict=True)]
    return _glob_avg(call, x.new_empty(*x.shape[:-n], *sizes))


@rule("mean")
def mean(call: Call) -> Any:
    """A mean over all positions of a feature map is `glob_avg`; any other has no node."""
    x = call.arg(0, "input")
    dims = call.arg(1, "dim")
    if dims is None or not _is_over_positions(x, {dim % x.ndim for dim in _tuple(dims, 1)}):
        return call.passed_on()
    return _glob_avg(call, call.run())


def _is_over_positions(x: Tensor, dims: set[int]) -> bool:
    """Whether `dims` are all of the positions of (N, C, *positions), (N, *positions, C) or (N, T, C)."""
    if x.ndim == 3:
        return dims in ({1}, {2}) and x.shape[1] > 1
    return x.ndim > 3 and dims in (set(range(2, x.ndim)), set(range(1, x.ndim - 1)))


def _glob_avg(call: Call, output: Any) -> Any:
    flow = call.carried(call.arg(0, "input"))
    if not isinstance(flow, Flow):
        return call.gives(output, flow)
    return call.gives(output, Flow((call.recorder.add_node(Node("glob_avg"), flow.sources),)))


# -- functions of each element ------------------------------------------------------------------


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
    in_place = call.name.endswith("_") or call.kwargs.get("inplace", False)
    return call.gives(x if in_place else torch.empty_like(x), value)


# -- joining ------------------------------------------------------------------------------------


@rule("add", "add_", "__add__", "__radd__", "__iadd__")
def add(call: Call) -> Any:
    """A `sum` of two branches; of a branch and a positional encoding; of a layer and its own bias."""
    a, b = call.arg(0, "input"), call.arg(1, "other")
    of_a, of_b = call.carried(a), call.carried(b)
    output = _combined(call, a, b)
    value = merged((of_a, of_b))
    if isinstance(value, Flow) and value.role != "scores":
        if isinstance(of_a, Flow) and isinstance(of_b, Flow):
            value = _joined(call, "sum", value.sources)
        else:
            value = _with_parameter(call, value, of_b if isinstance(of_a, Flow) else of_a)
    elif isinstance(value, Flow):
        _note_others(call, [of_a, of_b], "relative position table")
    return call.gives(output, value)


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


def _joined(call: Call, kind: str, sources: tuple[int, ...]) -> Flow:
    """A node of `kind` if it joins several nodes; with one incoming edge it is removed."""
    if len(sources) < 2:
        return Flow(sources)
    return Flow((call.recorder.add_node(Node(kind), sources),))


def _with_parameter(call: Call, flow: Flow, derived: Carried) -> Flow:
    """The sum of activations and something computed from parameters."""
    if not isinstance(derived, Derived) or not derived.params:
        return flow
    param = _main(call, derived)
    shape = call.recorder.shapes[param]
    if sum(size > 1 for size in shape) >= 2:
        return _with_positions(call, flow, param, shape)
    if len(shape) == 1 and flow.sources != (0,):
        return Flow((call.recorder.add_node(Node("bias", param, shape), flow.sources),))
    call.recorder.note_role((param,), "shift")
    return flow


def _with_positions(call: Call, flow: Flow, param: str, shape: tuple[int, ...]) -> Flow:
    """A learned positional encoding and the sum that it feeds."""
    canonical = shape if len(shape) in (3, 4) else (1, *shape)
    node = Node("pos_enc", param, canonical, stored=None if canonical == shape else shape)
    encoding = call.recorder.add_node(node, ())
    return _joined(call, "sum", (*flow.sources, encoding))


@rule("cat", "concat", "concatenate")
def concat(call: Call) -> Any:
    """A `concat` of several branches; parameters that are joined to a branch are tokens."""
    inputs = call.inputs()
    value = merged(inputs)
    output = _concatenated(call)
    if isinstance(value, Flow):
        _note_others(call, inputs, "class token")
        value = _joined(call, "concat", value.sources)
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
    value = merged((of_a, of_b))
    if isinstance(value, Flow):
        role = "scale of the attention" if value.role == "scores" else "layer scale"
        _note_others(call, [of_a, of_b], role)
        if isinstance(of_a, Flow) and isinstance(of_b, Flow) and (_gates(a, b) or _gates(b, a)):
            value = _joined(call, "cse", value.sources)
    return call.gives(output, value)


def _gates(gate: Tensor, features: Tensor) -> bool:
    """Whether `gate` has one value for every channel of a feature map: (N, C, 1, 1) to (N, C, H, W)."""
    if gate.ndim != features.ndim or gate.ndim < 3 or gate.shape == features.shape:
        return False
    first = gate.shape[1] == features.shape[1] and all(size == 1 for size in gate.shape[2:])
    last = gate.shape[-1] == features.shape[-1] and all(size == 1 for size in gate.shape[1:-1])
    return (first or last) and gate.numel() > gate.shape[0]


@rule("embedding")
def embedding(call: Call) -> Any:
    """A table of embeddings: no node type fits; positions looked up in it are a positional encoding."""
    inputs = call.inputs()
    value = merged(inputs)
    if isinstance(value, Flow):
        _note_others(call, inputs, "embedding table")
    return call.gives(call.run(), value)
