"""The rules, on small `torch.fx` graphs written by hand: which nodes and edges each function gives."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ghn_init import Graph, trace
from ghn_init._tracing.rules.registered import LayerRule
from ghn_init._tracing.sketch import Sketch

if TYPE_CHECKING:
    from collections.abc import Callable

    Build = Callable[["Tape"], fx.Node]


class Tape(fx.Graph):
    """A graph whose inputs are activations `x` and parameters that it is given the shapes of."""

    def __init__(self) -> None:
        super().__init__()
        self.x = self.placeholder("x")
        self.root = nn.Module()

    def weight(self, name: str, *shape: int) -> fx.Node:
        """A parameter."""
        self.root.register_parameter(name, nn.Parameter(torch.zeros(shape)))
        return self.get_attr(name)

    def layer(self, name: str, module: nn.Module, x: fx.Node) -> fx.Node:
        """The call of a module."""
        self.root.add_module(name, module)
        return self.call_module(name, (x,))

    def conv(self, name: str, x: fx.Node | None = None, inputs: int = 4) -> fx.Node:
        """A 1x1 convolution to four channels, without a bias."""
        return self.call(F.conv2d, self.x if x is None else x, self.weight(name, 4, inputs, 1, 1))

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """The call of a function."""
        return self.call_function(function, args, kwargs)


def drawn(build: Build, shape: tuple[int, ...] = (2, 4, 8, 8)) -> Graph:
    """The GHN's graph of a graph written by hand."""
    tape = Tape()
    tape.output(build(tape))
    tape.lint()
    return trace(fx.GraphModule(tape.root, tape), shape)


def check(graph: Graph, nodes: str, edges: set[tuple[int, int]] | None = None) -> None:
    """Types and parameters of all nodes but the input; without `edges` they are a chain."""
    found = [node.type + (f"({node.param})" if node.param else "") for node in graph.nodes]
    assert found == ["input", *nodes.split()]
    wanted = {(index, index + 1) for index in range(len(found) - 1)} if edges is None else edges
    assert set(graph.edges) == wanted


@pytest.mark.parametrize("keyword", ["dim", "axis"])
def test_keywords_of_numpy_are_those_of_torch(keyword: str) -> None:
    def pooled(tape: Tape) -> fx.Node:
        return tape.call(torch.mean, tape.conv("a"), **{keyword: (2, 3)})

    def standardised(tape: Tape) -> fx.Node:
        x = tape.conv("a")
        centred = tape.call(operator.sub, x, tape.call(torch.mean, x, **{keyword: 1}, keepdim=True))
        spread = tape.call(torch.var, x, **{keyword: 1}, keepdim=True)
        scaled = tape.call(operator.truediv, centred, tape.call(torch.sqrt, spread))
        return tape.call(operator.mul, scaled, tape.weight("w", 4, 1, 1))

    check(drawn(pooled), "conv(a) glob_avg")
    assert [node.type for node in drawn(standardised).nodes] == ["input", "conv", "ln"]
    joined = drawn(lambda tape: tape.call(torch.cat, [tape.conv("a"), tape.conv("b")], **{keyword: 1}))
    assert [node.type for node in joined.nodes] == ["input", "conv", "conv", "concat"]


@pytest.mark.parametrize("name", ["mul", "mul_", "multiply", "multiply_", "__imul__", "__rmul__"])
def test_every_name_of_a_product_makes_a_gate(name: str) -> None:
    def gated(tape: Tape) -> fx.Node:
        x = tape.conv("a")
        gate = tape.call(torch.sigmoid, tape.conv("b", tape.call(torch.mean, x, (2, 3), True)))
        return tape.call_method(name, (x, gate))

    assert "cse" in [node.type for node in drawn(gated).nodes]


# -- layers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("groups", "dilation", "kind"), [
    (1, 1, "conv"), (1, 2, "conv"), (4, 1, "sep_conv"), (4, 2, "dil_conv"), (2, (2, 3), "dil_conv"),
    (2, (1, 2), "sep_conv"),
])  # fmt: skip
def test_convolutions_are_told_by_groups_and_dilation(
    groups: int, dilation: int | tuple[int, int], kind: str
) -> None:
    def build(tape: Tape) -> fx.Node:
        weight = tape.weight("w", 8, 4 // groups, 3, 3)
        return tape.call(torch.conv2d, tape.x, weight, groups=groups, padding=3, dilation=dilation)

    graph = drawn(build)
    check(graph, f"{kind}(w)")
    assert graph.nodes[1].shape == (8, 4 // groups, 3, 3)


def test_a_convolution_with_a_bias_is_two_nodes() -> None:
    check(drawn(lambda t: t.call(F.conv2d, t.x, t.weight("w", 8, 4, 3, 3), t.weight("b", 8))),
          "conv(w) bias(b)")  # fmt: skip
    check(drawn(lambda t: t.layer("stem", nn.Conv2d(4, 8, 3), t.x)), "conv(stem.weight) bias(stem.bias)")


def test_a_transposed_convolution_has_its_weight_in_first() -> None:
    graph = drawn(lambda t: t.call(F.conv_transpose2d, t.x, t.weight("w", 4, 6, 2, 2), t.weight("b", 6)))
    check(graph, "conv(w) bias(b)")
    assert (graph.nodes[1].shape, graph.nodes[1].transposed) == ((6, 4, 2, 2), True)


def test_linear_layers_are_convolutions_of_two_dimensions() -> None:
    check(drawn(lambda t: t.call(F.linear, t.x, t.weight("w", 3, 4), t.weight("b", 3)), (2, 4)),
          "conv(w) bias(b)")  # fmt: skip
    check(drawn(lambda t: t.call(F.linear, t.x, t.weight("w", 3, 4)), (2, 4)), "conv(w)")
    graph = drawn(lambda t: t.call(torch.addmm, t.weight("b", 3), t.x, t.weight("w", 4, 3)), (2, 4))
    check(graph, "conv(w) bias(b)")
    assert (graph.nodes[1].shape, graph.nodes[1].transposed) == ((3, 4), True)


def test_a_table_of_embeddings_has_no_node() -> None:
    def build(tape: Tape) -> fx.Node:
        found = tape.call(F.embedding, tape.call_method("long", (tape.x,)), tape.weight("table", 10, 4))
        return tape.call(F.linear, found, tape.weight("w", 3, 4))

    graph = drawn(build, (2, 5))
    check(graph, "conv(w)")
    assert [(p.name, p.role) for p in graph.unmatched] == [("table", "embedding table")]


# -- products -----------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [torch.matmul, operator.matmul])
def test_activations_times_a_weight_are_a_layer(function: Callable[..., Any]) -> None:
    graph = drawn(lambda t: t.call(function, t.x, t.weight("w", 4, 3)), (2, 4))
    check(graph, "conv(w)")
    assert (graph.nodes[1].shape, graph.nodes[1].transposed) == ((3, 4), True)


def test_einsum_of_a_weight_is_a_layer() -> None:
    graph = drawn(lambda t: t.call(torch.einsum, "bti,ihd->bthd", t.x, t.weight("w", 4, 2, 3)), (2, 5, 4))
    check(graph, "conv(w)")
    assert (graph.nodes[1].shape, graph.nodes[1].stored) == ((6, 4), (4, 2, 3))


# -- normalisation ------------------------------------------------------------------------------


@pytest.mark.parametrize(("function", "kind"), [(torch.batch_norm, "bn"), (torch.instance_norm, "ln")])
def test_norms_of_torch_itself_have_weight_and_bias_before_the_statistics(
    function: Callable[..., Any], kind: str
) -> None:
    def build(tape: Tape) -> fx.Node:
        w, b = tape.weight("w", 4), tape.weight("b", 4)
        return tape.call(function, tape.x, w, b, None, None, True, 0.1, 1e-5, False)

    graph = drawn(build)
    check(graph, f"{kind}(w)")
    assert graph.nodes[1].bias == "b"


def test_norms_called_as_functions_are_nodes() -> None:
    def batch(tape: Tape) -> fx.Node:
        w, b = tape.weight("w", 4), tape.weight("b", 4)
        return tape.call(F.batch_norm, tape.x, None, None, w, b, True)

    for build, kind in (
        (batch, "bn"),
        (lambda t: t.call(F.layer_norm, t.x, (8,), t.weight("w", 8), t.weight("b", 8)), "ln"),
        (lambda t: t.call(F.group_norm, t.x, 2, t.weight("w", 4), t.weight("b", 4)), "ln"),
    ):
        graph = drawn(build)
        check(graph, f"{kind}(w)")
        assert graph.nodes[1].bias == "b"
    check(drawn(lambda t: t.call(F.rms_norm, t.x, (8,), t.weight("w", 8))), "ln(w)")
    check(drawn(lambda t: t.call(F.layer_norm, t.x, (8,))), "ln")


def by_hand(tape: Tape, dims: tuple[int, ...]) -> fx.Node:
    """(x - mean) / sqrt(mean of squares) * w + b."""
    w, b = tape.weight("w", 1, 4, 1, 1), tape.weight("b", 1, 4, 1, 1)
    mean = tape.call_method("mean", (tape.x, dims), {"keepdim": True})
    centred = tape.call(operator.sub, tape.x, mean)
    squares = tape.call_method("mean", (tape.call_method("pow", (centred, 2)), dims), {"keepdim": True})
    root = tape.call(torch.sqrt, tape.call(operator.add, squares, 1e-5))
    scaled = tape.call(operator.mul, tape.call(operator.truediv, centred, root), w)
    return tape.call(operator.add, scaled, b)


@pytest.mark.parametrize(("dims", "kind"), [((1,), "ln"), ((1, 2, 3), "ln"), ((0, 2, 3), "bn")])
def test_norms_written_by_hand_are_nodes(dims: tuple[int, ...], kind: str) -> None:
    graph = drawn(lambda t: by_hand(t, dims))
    check(graph, f"{kind}(w)")
    node = graph.nodes[1]
    assert (node.shape, node.stored, node.bias) == ((4,), (1, 4, 1, 1), "b")


def test_divided_by_something_else_is_no_norm() -> None:
    def build(tape: Tape) -> fx.Node:
        y = tape.conv("w")
        return tape.call(operator.truediv, y, tape.call(operator.add, tape.call(torch.abs, y), 1.0))

    check(drawn(build), "conv(w)")


# -- pooling ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("function", "args", "kind"), [
    (F.max_pool2d, (3,), "max_pool"), (F.avg_pool2d, ((3, 3),), "avg_pool"),
    (F.adaptive_avg_pool2d, (1,), "glob_avg"), (F.adaptive_avg_pool2d, ((2, 2),), "glob_avg"),
    (torch.mean, ((2, 3),), "glob_avg"), (torch.mean, ((1, 2),), "glob_avg"),
])  # fmt: skip
def test_poolings_are_nodes(function: Callable[..., Any], args: tuple[Any, ...], kind: str) -> None:
    graph = drawn(lambda t: t.call(function, t.x, *args))
    check(graph, kind)
    assert graph.nodes[1].shape == (None if kind == "glob_avg" else (1, 1, 3, 3))


@pytest.mark.parametrize("dims", [(0,), (1,), (2,)])
def test_a_mean_over_anything_but_all_positions_has_no_node(dims: tuple[int, ...]) -> None:
    check(drawn(lambda t: t.call(torch.mean, t.conv("w"), dims)), "conv(w)")


# -- joins --------------------------------------------------------------------------------------


def test_a_sum_joins_two_branches() -> None:
    check(drawn(lambda t: t.call(operator.add, t.conv("a"), t.conv("b"))), "conv(a) conv(b) sum",
          {(0, 1), (0, 2), (1, 3), (2, 3)})  # fmt: skip


def test_a_residual_joins_the_input() -> None:
    check(drawn(lambda t: t.call(torch.add, t.x, t.conv("a"))), "conv(a) sum", {(0, 1), (0, 2), (1, 2)})


def test_a_sum_of_one_branch_has_no_node() -> None:
    def build(tape: Tape) -> fx.Node:
        y = tape.conv("a")
        return tape.call(operator.add, y, tape.call(F.relu, y))

    check(drawn(build), "conv(a)")


def test_three_branches_meet_in_a_concatenation() -> None:
    check(drawn(lambda t: t.call(torch.cat, [t.conv("a"), t.conv("b"), t.x], 1)), "conv(a) conv(b) concat",
          {(0, 1), (0, 2), (0, 3), (1, 3), (2, 3)})  # fmt: skip


def test_a_concatenation_of_one_branch_has_no_node() -> None:
    def build(tape: Tape) -> fx.Node:
        y = tape.conv("a")
        return tape.conv("b", tape.call(torch.cat, [y, y], 1), inputs=8)

    check(drawn(build), "conv(a) conv(b)")
    check(drawn(lambda t: t.conv("b", t.call(torch.cat, [t.conv("a")], 1))), "conv(a) conv(b)")


def test_a_vector_that_is_added_is_a_bias() -> None:
    check(drawn(lambda t: t.call(operator.add, t.conv("a"), t.weight("b", 8))), "conv(a) bias(b)")


def test_a_positional_encoding_feeds_a_sum() -> None:
    def build(tape: Tape) -> fx.Node:
        tokens = tape.call(F.linear, tape.x, tape.weight("w", 6, 4))
        return tape.call(operator.add, tokens, tape.weight("place", 1, 5, 6))

    graph = drawn(build, (2, 5, 4))
    check(graph, "conv(w) pos_enc(place) sum", {(0, 1), (1, 3), (2, 3)})
    assert graph.nodes[2].shape == (1, 5, 6)


# -- gates --------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [8, 1])
def test_a_gate_of_every_channel_is_a_cse_however_small_the_image_is(side: int) -> None:
    def build(tape: Tape) -> fx.Node:
        y = tape.conv("stem")
        mean = tape.call(F.adaptive_avg_pool2d, y, 1)
        gate = tape.call(torch.sigmoid, tape.conv("up", tape.call(F.relu, tape.conv("down", mean))))
        return tape.call(operator.mul, y, gate)

    check(drawn(build, (2, 4, side, side)), "conv(stem) glob_avg conv(down) conv(up) cse",
          {(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (1, 5)})  # fmt: skip


@pytest.mark.parametrize("side", [8, 1])
def test_a_product_of_two_feature_maps_is_none(side: int) -> None:
    def build(tape: Tape) -> fx.Node:
        x = tape.call(F.adaptive_avg_pool2d, tape.x, 1) if side == 1 else tape.x
        return tape.conv("out", tape.call(operator.mul, tape.conv("a", x), tape.conv("b", x)))

    nodes, first = ("glob_avg ", 1) if side == 1 else ("", 0)
    edges = {(first, first + 1), (first, first + 2), (first + 1, first + 3), (first + 2, first + 3)}
    check(drawn(build), f"{nodes}conv(a) conv(b) conv(out)", edges | {(0, first)} - {(0, 0)})


def test_a_product_with_a_parameter_scales() -> None:
    graph = drawn(lambda t: t.call(operator.mul, t.conv("a"), t.weight("gamma", 4, 1, 1)))
    check(graph, "conv(a)")
    assert [(p.name, p.role) for p in graph.unmatched] == [("gamma", "layer scale")]


# -- attention ----------------------------------------------------------------------------------


def attention_of(tape: Tape, attend: Callable[[fx.Node, fx.Node, fx.Node], fx.Node]) -> fx.Node:
    """Projections of query, key and value, and of what comes out, of 5 tokens of 4 channels."""
    q, k, v = (tape.call(F.linear, tape.x, tape.weight(name, 4, 4)) for name in "qkv")
    return tape.call(F.linear, attend(q, k, v), tape.weight("o", 4, 4))


ATTENTION = "conv(q) conv(k) conv(v) msa conv(o)", {(0, 1), (0, 2), (0, 3), (1, 4), (2, 4), (3, 4), (4, 5)}


def test_fused_attention_is_the_same_block() -> None:
    def build(tape: Tape) -> fx.Node:
        return attention_of(tape, lambda q, k, v: tape.call(F.scaled_dot_product_attention, q, k, v))

    check(drawn(build, (2, 5, 4)), *ATTENTION)


def test_attention_by_hand_is_a_transformer_block() -> None:
    def build(tape: Tape) -> fx.Node:
        def attend(q: fx.Node, k: fx.Node, v: fx.Node) -> fx.Node:
            scores = tape.call(operator.matmul, q, tape.call_method("transpose", (k, -2, -1)))
            weights = tape.call(F.softmax, tape.call(operator.truediv, scores, 2.0), dim=-1)
            return tape.call(operator.matmul, weights, v)

        return attention_of(tape, attend)

    check(drawn(build, (2, 5, 4)), *ATTENTION)


def test_attention_with_zeros_for_rows_without_a_score_is_attention() -> None:
    aten = torch.ops.aten

    def build(tape: Tape) -> fx.Node:
        def attend(q: fx.Node, k: fx.Node, v: fx.Node) -> fx.Node:
            scores = tape.call(aten.bmm.default, q, tape.call(aten.permute.default, k, [0, 2, 1]))
            masked = tape.call(aten.logical_not.default, tape.call(aten.isfinite.default, scores))
            weights = tape.call(aten._softmax.default, scores, -1, False)
            zeros = tape.call(aten.full_like.default, weights, 0)
            return tape.call(aten.bmm.default, tape.call(aten.where.self, masked, zeros, weights), v)

        return attention_of(tape, attend)

    check(drawn(build, (2, 5, 4)), *ATTENTION)


def test_scores_that_are_masked_are_no_attention_yet() -> None:
    def build(tape: Tape) -> fx.Node:
        def attend(q: fx.Node, k: fx.Node, v: fx.Node) -> fx.Node:
            scores = tape.call(operator.matmul, q, tape.call_method("transpose", (k, -2, -1)))
            masked = tape.call(torch.where, tape.call(operator.gt, scores, 0), scores, 0.0)
            return tape.call(operator.matmul, masked, v)

        return attention_of(tape, attend)

    assert "msa" not in [node.type for node in drawn(build, (2, 5, 4)).nodes]


def test_without_a_softmax_it_is_no_attention() -> None:
    def build(tape: Tape) -> fx.Node:
        def attend(q: fx.Node, k: fx.Node, v: fx.Node) -> fx.Node:
            scores = tape.call(operator.matmul, q, tape.call_method("transpose", (k, -2, -1)))
            return tape.call(operator.matmul, scores, v)

        return attention_of(tape, attend)

    graph = drawn(build, (2, 5, 4))
    check(graph, "conv(q) conv(k) conv(v) conv(o)", {(0, 1), (0, 2), (0, 3), (1, 4), (2, 4), (3, 4)})


def test_an_attention_layer_is_a_module_like_any_other() -> None:
    def build(tape: Tape) -> fx.Node:
        tape.root.add_module("attn", nn.MultiheadAttention(4, 2, batch_first=True))
        return tape.call(operator.getitem, tape.call_module("attn", (tape.x, tape.x, tape.x)), 0)

    check(drawn(build, (2, 5, 4)), "conv(attn.in_proj_weight) bias(attn.in_proj_bias) msa "
          "conv(attn.out_proj.weight) bias(attn.out_proj.bias)")  # fmt: skip


# -- layers that users register -----------------------------------------------------------------


def of_layer(
    nodes: dict[str, str],
    parameters: dict[str, tuple[int, ...]],
    *,
    transposed: str = "",
    of_input: bool = True,
) -> Graph:
    """The graph of one call of a registered layer that has these parameters, called `layer`."""
    tape = Tape()
    call = tape.layer("layer", nn.Identity(), tape.x if of_input else tape.weight("table", 2, 4))
    shapes = {f"layer.{name}": shape for name, shape in parameters.items()}
    call.meta["layer"] = LayerRule(nn.Bilinear, nodes, torch.empty_like, frozenset({transposed} - {""}))
    call.meta["parameters"] = {name: f"layer.{name}" for name in nodes if name in parameters}
    call.meta["others"] = list(shapes)
    tape.output(call)
    sketch = Sketch(shapes)
    sketch.draw(tape)
    return sketch.graph("net")


def test_a_registered_layer_is_its_nodes_one_after_the_other() -> None:
    graph = of_layer({"weight": "conv", "bias": "bias"}, {"weight": (6, 4), "bias": (6,)})
    check(graph, "conv(layer.weight) bias(layer.bias)")
    assert (graph.nodes[1].shape, graph.nodes[2].shape, graph.unmatched) == ((6, 4), (6,), ())


def test_a_registered_layer_without_a_bias_has_no_node_for_it() -> None:
    check(of_layer({"weight": "conv", "bias": "bias"}, {"weight": (6, 4)}), "conv(layer.weight)")


def test_the_second_of_two_registered_parameters_of_a_norm_is_its_bias() -> None:
    graph = of_layer({"g": "ln", "b": "ln", "w": "conv"}, {"g": (4,), "b": (4,), "w": (6, 4)})
    check(graph, "ln(layer.g) conv(layer.w)")
    assert graph.nodes[1].bias == "layer.b"
    check(of_layer({"g": "ln", "w": "conv"}, {"w": (6, 4)}), "ln conv(layer.w)")


def test_a_registered_label_is_a_node_without_a_parameter() -> None:
    check(of_layer({"in": "conv", "attend": "msa"}, {"in": (12, 4)}), "conv(layer.in) msa")


def test_a_registered_weight_may_be_stored_the_other_way_round() -> None:
    graph = of_layer({"w": "conv"}, {"w": (4, 6)}, transposed="w")
    assert (graph.nodes[1].shape, graph.nodes[1].transposed) == ((6, 4), True)


def test_a_registered_positional_encoding_feeds_a_sum() -> None:
    graph = of_layer({"w": "conv", "place": "pos_enc"}, {"w": (6, 4), "place": (1, 5, 6)})
    check(graph, "conv(layer.w) pos_enc(layer.place) sum", {(0, 1), (1, 3), (2, 3)})


def test_parameters_that_a_registered_rule_does_not_name_are_told() -> None:
    graph = of_layer({"w": "conv"}, {"w": (6, 4), "scale": (6,)})
    assert [(p.name, p.role) for p in graph.unmatched] == [("layer.scale", "not in the rule of Bilinear")]


def test_a_registered_layer_that_does_not_see_the_input_is_no_node() -> None:
    check(of_layer({"w": "conv"}, {"w": (6, 4)}, of_input=False), "")


# -- the whole ----------------------------------------------------------------------------------


def test_an_unused_branch_is_left_out() -> None:
    def build(tape: Tape) -> fx.Node:
        used = tape.conv("used")
        tape.call(F.max_pool2d, tape.conv("aside", used), 2)
        tape.weight("never", 3)
        return used

    graph = drawn(build)
    check(graph, "conv(used)")
    roles = {p.name: p.role for p in graph.unmatched}
    assert roles == {"aside": "does not reach the output", "never": "unused"}


@pytest.mark.parametrize("outputs", [4, 6])
def test_a_weight_that_is_there_once_for_every_example_is_a_linear_layer(outputs: int) -> None:
    aten = torch.ops.aten

    def build(tape: Tape) -> fx.Node:
        turned = tape.call(aten.permute.default, tape.weight("w", outputs, 4), [1, 0])
        return tape.call(aten.bmm.default, tape.x, tape.call(aten.expand.default, turned, [2, 4, outputs]))

    graph = drawn(build, (2, 5, 4))
    check(graph, "conv(w)")
    assert (graph.nodes[1].shape, graph.nodes[1].transposed) == ((outputs, 4), False)


def test_functions_of_exports_have_the_same_rules() -> None:
    aten = torch.ops.aten

    def build(tape: Tape) -> fx.Node:
        w, b = tape.weight("w", 8, 1, 3, 3), tape.weight("b", 8)
        y = tape.call(aten.convolution.default, tape.x, w, b, [1, 1], [1, 1], [1, 1], False, [0, 0], 4)
        y = tape.call(aten.relu.default, y)
        g, s = tape.weight("g", 8), tape.weight("s", 8)
        several = tape.call(aten.native_group_norm.default, y, g, s, 2, 8, 64, 2, 1e-5)
        return tape.call(aten.mean.dim, tape.call(operator.getitem, several, 0), [2, 3])

    graph = drawn(build)
    check(graph, "sep_conv(w) bias(b) ln(g) glob_avg")
    assert graph.nodes[3].bias == "s"


def test_graphs_with_shapes_are_drawn_as_they_are() -> None:
    def conv2d(x: Tensor, weight: Tensor) -> Tensor:
        raise AssertionError("run")

    tape = Tape()
    y = tape.call(conv2d, tape.x, tape.weight("w", 4, 4, 1, 1))
    mean = tape.call(torch.mean, y, (2, 3))
    tape.output(mean)
    for node, shape in ((tape.x, (2, 4, 8, 8)), (y, (2, 4, 8, 8)), (mean, (2, 4))):
        node.meta["val"] = torch.empty(shape, device="meta")
    check(trace(fx.GraphModule(tape.root, tape)), "conv(w) glob_avg")


@pytest.mark.parametrize(
    ("activation", "options", "rectifies"),
    [
        (F.relu, {}, True),
        (F.hardswish, {}, True),
        (F.hardtanh, {"min_val": 0.0, "max_val": 6.0}, True),
        (F.hardtanh, {}, False),
        (torch.sigmoid, {}, False),
        (F.dropout, {}, False),
    ],
)
def test_a_graph_tells_what_goes_through_a_rectifier(
    activation: Callable[..., Any], options: dict[str, float], *, rectifies: bool
) -> None:
    graph = drawn(lambda t: t.conv("c", t.call(activation, t.conv("b", t.conv("a")), **options)))
    assert graph.rectified == ({2} if rectifies else set())


@pytest.mark.parametrize(
    ("resize", "arguments", "enlarges"),
    [
        (F.interpolate, {"scale_factor": 2}, True),
        (F.interpolate, {"size": (8, 9)}, True),
        (F.interpolate, {"size": (8, 8)}, False),
        (F.interpolate, {"scale_factor": 0.5}, False),
        (F.pixel_shuffle, {"upscale_factor": 2}, True),
        (torch.ops.aten.upsample_nearest2d.default, {"output_size": [16, 16]}, True),
        (F.max_pool2d, {"kernel_size": 2}, False),
    ],
)
def test_a_graph_tells_what_is_enlarged(
    resize: Callable[..., Any], arguments: dict[str, Any], *, enlarges: bool
) -> None:
    def build(tape: Tape) -> fx.Node:
        larger = tape.call(resize, tape.conv("b", tape.conv("a")), **arguments)
        return tape.conv("c", larger, 1 if resize is F.pixel_shuffle else 4)

    assert drawn(build).enlarged == ({2} if enlarges else set())


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(
    ("shape", "kernel", "options"),
    [
        ((1, 1), (5, 5), {"padding": 2}),
        ((2, 2), (5, 5), {"padding": 2, "stride": 2}),
        ((2, 3), (3, 5), {"padding": (1, 2)}),
        ((4, 4), (3, 3), {"padding": 2, "dilation": 2}),
        ((3, 2), (4, 4), {"padding": "same"}),
        ((2, 9), (3, 1), {"padding": (3, 0)}),
        ((8, 8), (3, 3), {"padding": 1}),
        ((2, 2), (1, 1), {}),
        ((3, 3), (3, 3), {}),
    ],
)
def test_a_graph_tells_what_of_a_filter_lies_in_the_image(
    shape: tuple[int, int], kernel: tuple[int, int], options: dict[str, Any]
) -> None:
    """Compared with a filter for every tap, which says where its tap reads a one."""
    taps = torch.eye(kernel[0] * kernel[1]).view(-1, 1, *kernel)
    seen = F.conv2d(torch.ones(1, 1, *shape), taps, **options)[0]
    graph = drawn(
        lambda t: t.call(F.conv2d, t.conv("a"), t.weight("w", 4, 4, *kernel), **options), (2, 4, *shape)
    )
    if seen.mean() > 0.75:
        assert not graph.cropped
        return
    found = torch.zeros_like(seen)
    rows, columns = graph.cropped[2]
    for i, (top, bottom) in enumerate(rows):
        for j, (left, right) in enumerate(columns):
            found[:, i, j].view(kernel)[top:bottom, left:right] = 1
    assert torch.equal(found, seen)
