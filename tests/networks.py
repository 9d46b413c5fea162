"""Networks and graphs that several test modules build."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING
from unittest import mock

import torch
import torchvision
from torch import nn

from ghn_init._graph.graph import graph_from_edges

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ghn_init import Graph


@contextlib.contextmanager
def without_initialisation() -> Iterator[None]:
    """Modules built here keep uninitialised memory, which costs no time and is never touched.

    Not `torch.device("meta")`: torchvision's RegNets compute their widths with tensors.
    """
    with contextlib.ExitStack() as stack:
        for name in dir(nn.init):
            if name.endswith("_") and not name.startswith("_"):
                stack.enter_context(mock.patch.object(nn.init, name, lambda tensor, *_, **__: tensor))
        yield


def resnet50_cifar(num_classes: int = 10) -> nn.Module:
    """ResNet-50 for 32 x 32 images: 3x3 stem of stride 1, no max pooling."""
    model = torchvision.models.resnet50(num_classes=num_classes)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()  # type: ignore[assignment]
    return model


def reference_network(name: str) -> nn.Module:
    """One of the ten networks of the reference graphs, on meta."""
    with torch.device("meta"):
        if name == "resnet50_cifar":
            return resnet50_cifar()
        return torchvision.models.get_model(name, num_classes=10)


def bridged(graph: Graph, drop: set[int]) -> Graph:
    """`graph` without the nodes in `drop`, their predecessors linked to their successors."""
    sources: list[set[int]] = []
    for index, preds in enumerate(graph.predecessors):
        reaching = set().union(*(sources[u] if u in drop else {u} for u in preds))
        sources.append(reaching)
        assert index not in drop or reaching
    kept = [index for index in range(len(graph)) if index not in drop]
    number = {old: new for new, old in enumerate(kept)}
    edges = [(number[u], number[v]) for v in kept for u in sources[v]]
    return graph_from_edges([graph.nodes[index] for index in kept], edges)
