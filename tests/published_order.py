"""Which channel gates the published implementation recognises as `cse`: a rule found from its graphs.

It has been inferred from the reference values alone, so it describes them and explains nothing more. The
published graphs come from the backward graph, listed in topological order, and a channel gate counts as a
`cse` if one of the two nodes after its hardswish in that list is a gate's product. Where nodes of other
branches stand between the two, the operation is overlooked, and its neighbours are linked as they are for
any operation without a node.

`recognised_gates` repeats this on the backward graph of the same network, written with as many backward
nodes as agree with the reference: nine in the branch of a gate (the hardswish next to last), four for
the shifted input of a factorized reduction, one ReLU for every operation that begins with one.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ghn_init.deepnets import _network, _ops

if TYPE_CHECKING:
    from torch import nn

    from ghn_init.deepnets import Architecture

Node = Any
"""A node of the backward graph."""


def recognised_gates(arch: Architecture) -> set[str]:
    """Module paths of the channel gates for which the published graph has a `cse` node."""
    gates: dict[nn.Module, tuple[Node, Node]] = {}
    image = torch.empty(2, 3, 32, 32, device="meta", requires_grad=True)
    with pytest.MonkeyPatch.context() as patch:
        _write_out(patch, gates)
        with torch.device("meta"):
            network = dataclasses.replace(arch, C=16, fc_dim=16).build()
        order = _topological(network(image).grad_fn, image)
    position = {node: number for number, node in enumerate(order)}
    products = {product for _, product in gates.values()}
    names = {module: name for name, module in network.named_modules()}
    return {
        names[gate]
        for gate, (hardswish, _) in gates.items()
        if not products.isdisjoint(order[position[hardswish] + 1 : position[hardswish] + 3])
    }


def _write_out(patch: pytest.MonkeyPatch, gates: dict[nn.Module, tuple[Node, Node]]) -> None:
    """Give networks the backward nodes that the rule counts; the values stay as they are."""

    def gate(self: Any, x: Tensor) -> Tensor:
        means = _passed_on(x.mean((2, 3)), 3)
        y = F.hardswish(self.excite(F.relu(self.squeeze(means))))
        product = x * y.view(*y.shape, 1, 1)
        gates[self] = y.grad_fn, product.grad_fn
        return _ops.subsampled(product, self.stride)

    def factorized_reduction(self: Any, x: Tensor) -> Tensor:
        shifted = x.narrow(2, 1, x.shape[2] - 1).narrow(3, 1, x.shape[3] - 1)
        return self.norm(torch.cat([self.even(x), self.odd(_passed_on(shifted, 2))], 1))

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-2, -1) * 0.5).softmax(-1) @ v

    patch.setattr(_network.State, "rectified", property(lambda state: F.relu(state.x)))
    patch.setattr(_ops.ChannelGate, "forward", gate)
    patch.setattr(_ops.FactorizedReduction, "forward", factorized_reduction)
    patch.setattr(_ops, "_attention", attention)


def _passed_on(x: Tensor, times: int) -> Tensor:
    """`x` with so many nodes more in its backward graph."""
    for _ in range(times):
        x = x.view_as(x)
    return x


def _topological(output: Node, image: Tensor) -> list[Node]:
    """The backward graph from the input on: Kahn's algorithm over edges listed as a depth-first walk ends."""
    successors: dict[Node, list[Node]] = {}
    waiting: dict[Node, int] = {}
    for node, preds in _walked(output, image):
        waiting[node] = len(preds)
        for pred in preds:
            successors.setdefault(pred, []).append(node)
    order: list[Node] = []
    ready = deque(node for node, number in waiting.items() if number == 0)
    while ready:
        order.append(ready.popleft())
        for node in successors.get(order[-1], ()):
            waiting[node] -= 1
            if waiting[node] == 0:
                ready.append(node)
    return order


def _walked(output: Node, image: Tensor) -> list[tuple[Node, list[Node]]]:
    """Every node after those that it depends on, and these, parameters left out."""

    def inputs(node: Node) -> list[Node]:
        found = [pred for pred, _ in node.next_functions if pred is not None]
        return [pred for pred in dict.fromkeys(found) if not _is_parameter(pred, image)]

    walked: list[tuple[Node, list[Node]]] = []
    first = inputs(output)
    seen, stack = {output}, [(output, first, iter(first))]
    while stack:
        node, preds, left = stack[-1]
        following = next((pred for pred in left if pred not in seen), None)
        if following is None:
            walked.append((node, preds))
            stack.pop()
        else:
            seen.add(following)
            further = inputs(following)
            stack.append((following, further, iter(further)))
    return walked


def _is_parameter(node: Node, image: Tensor) -> bool:
    """A parameter's end of the backward graph, or its transposition."""
    if node.name() == "torch::autograd::AccumulateGrad":
        return node.variable is not image
    return node.name() == "TBackward0" and all(
        _is_parameter(pred, image) for pred, _ in node.next_functions if pred is not None
    )
