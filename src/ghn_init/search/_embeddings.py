"""Embeddings of many architectures, batch by batch."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Final, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor

    from ghn_init._weights.ghn import GHN
    from ghn_init.deepnets import Architecture

T = TypeVar("T")

BATCH: Final = 4
"""Graphs that the hypernetwork reads at once. In larger batches each takes longer, because a level gets as
many slots as its widest graph needs: 7 ms each in batches of 1 to 4, 11 in those of 8, 24 of 16, 41 of 32
(128 networks of the search split, one thread of a busy Xeon)."""


@torch.no_grad()
def embed_architectures(ghn: GHN, architectures: Iterable[Architecture], image_size: int = 32) -> Tensor:
    """The embeddings of architectures, (n, d) float32, as `ghn_init.embed` of networks that are not made.

    Each is the mean of its nodes' features before the decoder.

    Args:
        ghn: The hypernetwork.
        architectures: At least one.
        image_size: Side of the images that their networks would see, in pixels.
    """
    found: list[Tensor] = []
    for part in batches(architectures):
        graphs = [architecture.graph(ghn.config.num_classes, image_size) for architecture in part]
        batch = ghn.batch(graphs, names=())
        features = ghn.encode(batch)
        found += [features[list(rows)].mean(dim=0).cpu() for rows in batch.nodes]
    return torch.stack(found)


def batches(items: Iterable[T]) -> Iterator[tuple[T, ...]]:
    """Parts of `BATCH` architectures, or whatever stands for them, the last one shorter."""
    rest = iter(items)
    while part := tuple(islice(rest, BATCH)):
        yield part
