"""A network's embedding: the mean of what the decoder would read."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
import torchvision
from torch import nn

import ghn_init
from ghn_init import GHN, GHNConfig, Graph, GraphError
from test_model import random_graph
from test_transformer import gated_block

GHN2 = GHNConfig.ghn2(5, hid=8, max_shape=(3, 4, 3, 3))
GHN3 = GHNConfig.ghn3("t", 5, hid=8, layers=2, heads=2, max_shape=(3, 4, 4, 4))


def network(width: int = 8) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3),
        nn.BatchNorm2d(width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 5),
    )


@pytest.mark.parametrize("config", [GHN2, GHN3, GHNConfig.mlp(5, hid=8)], ids=["ghn2", "ghn3", "mlp"])
def test_the_embedding_is_the_mean_of_what_the_decoder_reads(config: GHNConfig) -> None:
    ghn = GHN(config)
    graph = random_graph(1)
    batch = ghn.batch(graph)
    features = ghn.encode(batch)[list(batch.nodes[0])].detach()
    found = ghn_init.embed(graph, ghn)
    assert found.shape == (8,)
    assert not found.requires_grad
    torch.testing.assert_close(found, features.mean(0))
    each = ghn_init.embed(graph, ghn, nodes=True)
    assert each.shape == (len(graph), 8)
    torch.testing.assert_close(each, features)


def test_a_model_gives_what_its_graph_does_and_stays_as_it_is() -> None:
    model = network()
    before = {name: values.clone() for name, values in model.state_dict().items()}
    found = ghn_init.embed(model)
    assert found.shape == (ghn_init.load().config.hid,)
    assert torch.equal(found, ghn_init.embed(ghn_init.trace(model)))
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())
    with torch.no_grad():
        for values in model.parameters():
            values.zero_()
    assert torch.equal(found, ghn_init.embed(model, example_input=(1, 3, 32, 32)))


def test_structure_and_shapes_tell_networks_apart() -> None:
    ghn = GHN(GHN2)
    models = (network(), network(16), nn.Sequential(nn.Conv2d(3, 3, 1), network()))
    for one, two in combinations((ghn_init.embed(model, ghn) for model in models), 2):
        assert not torch.allclose(one, two, atol=1e-3)


def test_alike_networks_are_nearer_than_others() -> None:
    """With the bundled weights: a deeper network of the same family, and one of another."""
    resnet, deeper, vgg = (
        ghn_init.embed(torchvision.models.get_model(name, num_classes=10))
        for name in ("resnet18", "resnet34", "vgg11")
    )
    assert torch.dist(resnet, deeper) < torch.dist(resnet, vgg)


def test_nodes_that_a_ghn3_does_not_read_have_no_features() -> None:
    graph, ghn = gated_block(), GHN(GHN3)
    assert len(ghn_init.embed(graph, GHN(GHN2), nodes=True)) == len(graph) == 8
    assert len(ghn_init.embed(graph, ghn, nodes=True)) == len(ghn.reads(graph)) == 7


def test_a_graph_without_nodes_is_refused() -> None:
    with pytest.raises(GraphError, match="one of them empty"):
        ghn_init.embed(Graph((), ()), GHN(GHN2))
