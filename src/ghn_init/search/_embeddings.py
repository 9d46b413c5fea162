"""Embeddings of many architectures, batch by batch."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Final, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch import Tensor

    from ghn_init._weights.ghn import GHN
    from ghn_init.deepnets import Architecture

T = TypeVar("T")

BATCH: Final = 4
"""Graphs that the hypernetwork reads at once. In larger batches each takes longer, because a level gets as
many slots as its widest graph needs: 7 ms each in batches of 1 to 4, 11 in those of 8, 24 of 16, 41 of 32
(128 networks of the search split, one thread of a busy Xeon)."""


class Embedder:
    """Embeds architectures as `ghn_init.embed` does their networks, but without making these.

    Args:
        ghn: The hypernetwork.
        image_size: Side of the images that the networks would see, in pixels.
    """

    def __init__(self, ghn: GHN, image_size: int) -> None:
        self.ghn, self.image_size = ghn, image_size

    @torch.no_grad()
    def __call__(self, architectures: Sequence[Architecture]) -> Tensor:
        """(n, d) float32: for every architecture the mean of its nodes' features before the decoder."""
        classes = self.ghn.config.num_classes
        graphs = [architecture.graph(classes, self.image_size) for architecture in architectures]
        batch = self.ghn.batch(graphs, names=())
        features = self.ghn.encode(batch)
        return torch.stack([features[list(rows)].mean(dim=0) for rows in batch.nodes]).cpu()


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
