"""Walks over a network find what torch's own find, in the same order."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
import torchvision
from torch import nn

from ghn_init._network.walk import modules_of, params_of, tensors_of
from ghn_init._tracing.inputs import ExampleInput
from ghn_init._tracing.recorded import recorded
from ghn_init._tracing.recorder import Recorder


class Shared(nn.Module):
    """A module at two paths, a tied parameter, a child and a parameter that are None."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.absent = None
        self.register_module("nothing", None)
        self.register_parameter("missing", None)
        self.again = self.first
        self.last = nn.Linear(4, 4)
        self.last.register_parameter("weight", next(self.first.parameters()))
        self.own = nn.Parameter(torch.zeros(3))


MODELS = {
    "shared": Shared,
    "a layer": lambda: nn.Linear(2, 2),
    "lists": lambda: nn.ModuleList([nn.ModuleDict({"a": nn.ReLU(), "b": Shared()}), nn.ParameterList([])]),
    "densenet": lambda: torchvision.models.DenseNet(8, (2, 2, 2, 2), 16, num_classes=3),
}


@pytest.mark.parametrize("name", MODELS)
def test_walks_find_what_torch_finds_in_its_order(name: str) -> None:
    model = MODELS[name]()
    modules = modules_of(model)
    assert modules == list(model.named_modules())
    assert modules_of(model, every_path=True) == list(model.named_modules(remove_duplicate=False))
    assert list(params_of(modules).items()) == list(model.named_parameters())
    found = {id(tensor) for tensor in tensors_of(modules)}
    assert found == {id(tensor) for tensor in chain(model.parameters(), model.buffers())}


def test_the_recorded_graph_is_a_valid_graph_of_fx() -> None:
    model = torchvision.models.DenseNet(8, (2, 2, 2, 2), 16, num_classes=3)
    names = params_of(modules_of(model))
    example = ExampleInput((torch.empty(1, 3, 32, 32, device="meta"),))
    recording, _ = recorded(Recorder(names, {}), model, {}, example, "as it is")
    graph = recording.graph
    graph.lint()
    nodes = list(graph.nodes)
    assert len(graph.nodes) == len(nodes) == len({node.name for node in nodes})
    assert graph.find_nodes(op="get_attr") == [node for node in nodes if node.op == "get_attr"]
    for node in nodes:
        assert all(node in used.users for used in node.all_input_nodes)
