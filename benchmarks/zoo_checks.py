"""What has to hold for the graph and the plan of any network, whoever wrote it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from ghn_init import Graph, Plan

_SOURCES = frozenset({"input", "pos_enc"})
"""Types of the nodes that may have no predecessor."""


def faults(model: nn.Module, plan: Plan[nn.Module]) -> list[str]:
    """What is wrong with the plan of `model` and its graph, in words; empty if nothing is."""
    return [*_graph_faults(plan.graph), *_parameter_faults(model, plan.graph), *_plan_faults(model, plan)]


def _graph_faults(graph: Graph) -> Iterator[str]:
    """One input, from which every node but positional encodings is reached."""
    inputs = [index for index, node in enumerate(graph.nodes) if node.type == "input"]
    if inputs != [0]:
        yield f"inputs at {inputs}, expected one at 0"
    if len(graph) < 2:
        yield "the graph has no operation"
    for index, node in enumerate(graph.nodes):
        if not graph.predecessors[index] and node.type not in _SOURCES:
            yield f"node {index} ({node.type} {node.param or ''}) has no predecessor"
    reached = {0}
    for u, v in graph.edges:  # sorted by u, and u < v
        if u in reached:
            reached.add(v)
    lost = [node for i, node in enumerate(graph.nodes) if i not in reached and node.type != "pos_enc"]
    if lost:
        yield f"{len(lost)} nodes cannot be reached from the input, the first: {lost[0]}"


def _parameter_faults(model: nn.Module, graph: Graph) -> Iterator[str]:
    """Every parameter is on a node or named as unmatched, not both; shapes have its number of elements."""
    shapes = {name: tuple(param.shape) for name, param in model.named_parameters()}
    on_nodes = {name for node in graph.nodes for name in (node.param, node.bias) if name is not None}
    unmatched = {parameter.name for parameter in graph.unmatched}
    parametrised = {name for name in shapes if ".parametrizations." in name}
    if missing := set(shapes) - on_nodes - unmatched - parametrised:
        yield f"{len(missing)} parameters are neither on a node nor unmatched: {sorted(missing)[:3]}"
    if both := on_nodes & unmatched:
        yield f"{len(both)} parameters are on a node and unmatched: {sorted(both)[:3]}"
    for node in graph.nodes:
        if node.param in shapes and math.prod(node.shape or ()) != math.prod(shapes[node.param]):
            yield f"{node.param}: node of shape {node.shape}, parameter of {shapes[node.param]}"


def _plan_faults(model: nn.Module, plan: Plan[nn.Module]) -> Iterator[str]:
    """One row for each parameter; whatever is kept has a reason, whatever is not has none."""
    names = [name for name, _ in model.named_parameters()]
    if [row.name for row in plan.rows] != names:
        yield f"{len(plan.rows)} rows for {len(names)} parameters"
    for row in plan.rows:
        if (row.action == "kept") != bool(row.reason):
            yield f"{row.name} is {row.action}, reason {row.reason!r}"
