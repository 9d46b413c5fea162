"""`embed`: what a hypernetwork makes of a network before it decodes: a vector that describes it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ghn_init._graph.graph import Graph
from ghn_init._tracing.trace import trace
from ghn_init._weights import DEFAULT_WEIGHTS
from ghn_init._writing.predictions import ghn_of, plain_torch

if TYPE_CHECKING:
    from os import PathLike

    from torch import Tensor, nn

    from ghn_init._weights.ghn import GHN


def embed(
    model: nn.Module | Graph,
    weights: str | PathLike[str] | GHN = DEFAULT_WEIGHTS,
    *,
    example_input: object = None,
    nodes: bool = False,
) -> Tensor:
    """The embedding of a network's graph: the mean of its nodes' features before the decoder.

    Networks that are alike in structure get vectors that are near each other, so that a regressor can predict
    a network's properties from them (arXiv 2110.13100). What is seen is the graph and the shapes
    of the parameters; their values make no difference.

    Args:
        model: A network, which is traced and left as it is, or its graph.
        weights: See `plan`.
        example_input: What the network is called with; see `trace`.
        nodes: The features of every node in place of their mean, in the order of
            `load(weights).reads(graph).nodes`. These are the nodes of the graph, but for a GHN-3, which does
            not read the poolings inside squeeze-and-excitation blocks.

    Returns:
        (d,) float32, with d = `GHNConfig.hid`, or (n, d), on the hypernetwork's device, without gradient.

    Raises:
        TraceError: The network could not be traced.
        GraphError: A graph without nodes.
        CheckpointError: The weights could not be loaded.
    """
    with plain_torch():
        graph = model if isinstance(model, Graph) else trace(model, example_input)
        ghn = ghn_of(weights)
        batch = ghn.batch(graph, names=())
        features = ghn.encode(batch)[list(batch.nodes[0])]
        return features if nodes else features.mean(dim=0)
