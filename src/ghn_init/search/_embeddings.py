"""Embeddings of many architectures, batch by batch."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Final, TypeVar

import torch

from ghn_init._tracing.trace import trace

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch import Tensor

    from ghn_init._graph.graph import Graph
    from ghn_init._weights.ghn import GHN
    from ghn_init.deepnets import Architecture

T = TypeVar("T")

BATCH: Final = 16
"""Graphs that the hypernetwork reads at once."""


class Embedder:
    """Embeds architectures as `ghn_init.embed` does their networks, but in batches.

    Networks are built and traced on the meta device, as in training: a graph has one way to be made.

    Args:
        ghn: The hypernetwork.
        image_size: Side of the images that the networks would see, in pixels.
    """

    def __init__(self, ghn: GHN, image_size: int) -> None:
        self.ghn, self.image_size = ghn, image_size

    @torch.no_grad()
    def __call__(self, architectures: Sequence[Architecture]) -> Tensor:
        """(n, d) float32: for every architecture the mean of its nodes' features before the decoder."""
        batch = self.ghn.batch([self._graph(architecture) for architecture in architectures], names=())
        features = self.ghn.encode(batch)
        return torch.stack([features[list(rows)].mean(dim=0) for rows in batch.nodes]).cpu()

    def _graph(self, architecture: Architecture) -> Graph:
        with torch.device("meta"):
            network = architecture.build(self.ghn.config.num_classes, self.image_size, running_stats=False)
        return trace(network, (1, 3, self.image_size, self.image_size))


def embed_architectures(ghn: GHN, architectures: Iterable[Architecture], image_size: int = 32) -> Tensor:
    """The embeddings of architectures, (n, d) float32, in their order; see `ghn_init.embed`.

    Args:
        ghn: The hypernetwork.
        architectures: At least one.
        image_size: Side of the images that their networks would see, in pixels.
    """
    embedder = Embedder(ghn, image_size)
    return torch.cat([embedder(part) for part in batches(architectures)])


def batches(items: Iterable[T]) -> Iterator[tuple[T, ...]]:
    """Parts of `BATCH` architectures, or whatever stands for them, the last one shorter."""
    rest = iter(items)
    while part := tuple(islice(rest, BATCH)):
        yield part
