"""The graph network of GHN-3: a transformer over the nodes of a graph (arXiv 2303.04143).

Every node attends to every node; what it knows of the edges is a bias on the attention's logits, one number
for each head and each length of the shortest path between the two. Time grows with the square of the number
of nodes. Of all pairs only path lengths are held, a byte for each; logits are made for a part of the queries
at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ghn_init._graph.graph import MAX_DISTANCE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ghn_init._hypernetwork.batch import GraphBatch
    from ghn_init._hypernetwork.config import GHNConfig

_EDGE_ROWS: Final = 257
"""Rows of the published table of distances, of which those from 2 (no path) to 52 (the longest) are read."""

_NO_PATH: Final = 2

_PAIRS: Final = 1 << 20
"""Pairs of nodes that are attended to at a time: 32 MB of bias for each 8 heads. A graph of up to 1,024 nodes
is one part, whose bias all layers share."""


@dataclass(frozen=True, eq=False)
class PathBias:
    """The bias of every pair of a graph's n nodes, by the length of the shortest path between them.

    Attributes:
        table: (H, 101), see `Attention.table`.
        columns: (n, n) uint8, the table's column for each (query, key).
    """

    table: Tensor
    columns: Tensor

    def __len__(self) -> int:
        return len(self.columns)

    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        """Queries, some after others, and their bias (H, q, n)."""
        if self.columns.numel() <= _PAIRS:
            yield slice(None), self._whole
            return
        step = max(1, _PAIRS // len(self))
        for start in range(0, len(self), step):
            queries = slice(start, start + step)
            yield queries, _looked_up(self.table, self.columns[queries])

    @cached_property
    def _whole(self) -> Tensor:
        return _looked_up(self.table, self.columns)


class DistanceEmbedding(nn.Module):
    """Embeds the length of a shortest path, (257, d)."""

    def __init__(self, hid: int) -> None:
        super().__init__()
        weight = torch.empty(_EDGE_ROWS, hid)
        std = hid**-0.5
        weight = weight if weight.is_meta else weight.normal_(std=std)
        self.embed = nn.Embedding.from_pretrained(weight, freeze=False)


class Attention(nn.Module):
    """Multi-head attention within each graph; the one of layer 0 also holds the weights of the bias."""

    def __init__(self, hid: int, heads: int, *, first: bool) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(hid, 3 * hid, bias=False)
        self.to_out = nn.Sequential(nn.Linear(hid, hid))
        if first:
            self.edge_embed = DistanceEmbedding(hid)
            self.proj_e = nn.Sequential(nn.Linear(2 * hid, hid), nn.ReLU(), nn.Linear(hid, heads))

    def forward(self, x: Tensor, biases: Sequence[PathBias]) -> Tensor:
        """Features (N, d) of the nodes of all graphs, one after the other, and the bias of each graph."""
        sizes = [len(bias) for bias in biases]
        # With a batch axis: torch's kernels without the full matrix of logits take four dimensions.
        parts = self.to_qkv(x).unflatten(1, (3, 1, self.heads, -1)).permute(1, 2, 3, 0, 4).split(sizes, dim=3)
        mixed = [
            F.scaled_dot_product_attention(query[:, :, queries], key, value, attn_mask=mask.unsqueeze(0))
            for (query, key, value), bias in zip(parts, biases, strict=True)
            for queries, mask in bias.parts()
        ]
        return self.to_out(torch.cat([part[0] for part in mixed], dim=1).transpose(0, 1).flatten(1))

    def table(self) -> Tensor:
        """(H, 101): the bias for no path, for 1 to 50 steps forward (from query to key), and back."""
        embed = self.edge_embed.embed.weight
        steps = embed[_NO_PATH : _NO_PATH + MAX_DISTANCE + 1]
        none = steps[:1].expand_as(steps)
        # The graph has no cycles, so that at least one of the two distances is none.
        pairs = torch.cat([torch.cat([steps, none], dim=1), torch.cat([none, steps], dim=1)[1:]])
        return self.proj_e(pairs).T


class FeedForward(nn.Module):
    """Two linear layers, d -> 4d -> d, with the exact GELU between them."""

    def __init__(self, hid: int) -> None:
        super().__init__()
        # The place without effect is a dropout of rate 0 in the published network.
        self.net = nn.Sequential(nn.Linear(hid, 4 * hid), nn.GELU(), nn.Identity(), nn.Linear(4 * hid, hid))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Layer(nn.Module):
    """A layer with its normalisations first: attention, then every node by itself."""

    def __init__(self, hid: int, heads: int, *, first: bool) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(hid)
        self.attn = Attention(hid, heads, first=first)
        self.ln2 = nn.LayerNorm(hid)
        self.ff = FeedForward(hid)

    def forward(self, x: Tensor, biases: Sequence[PathBias]) -> Tensor:
        x = x + self.attn(self.ln1(x), biases)
        return x + self.ff(self.ln2(x))


class Transformer(nn.ModuleList):
    """`layers` layers that share the bias, which is made of layer 0's weights."""

    def __init__(self, config: GHNConfig) -> None:
        layers = (Layer(config.hid, config.heads, first=not index) for index in range(config.layers))
        super().__init__(layers)
        self.longest = MAX_DISTANCE if config.ve else 1

    def forward(self, h: Tensor, batch: GraphBatch) -> Tensor:
        """Node features (R, d) in the batch's rows to their new values (R, d); unused rows stay as they are.

        Graphs do not see each other, and a graph gets what it gets alone.
        """
        rows = torch.tensor([row for rows in batch.nodes for row in rows], device=h.device)
        x, biases = h[rows], self.biases(batch)
        for layer in self:
            x = layer(x, biases)
        return h.index_copy(0, rows, x)

    def biases(self, batch: GraphBatch) -> list[PathBias]:
        """For every graph the bias of each head for (query, key), in the order of its nodes."""
        table = self[0].attn.table()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
        found = []
        for index, rows in enumerate(batch.nodes):
            slots = torch.tensor(rows, device=batch.device) // len(batch)
            forward = batch.distances[index][slots[:, None], slots]
            forward = forward.masked_fill(forward > self.longest, 0)
            back = forward.T
            columns = torch.where(back > 0, back + MAX_DISTANCE, forward)
            found.append(PathBias(table, columns))
        return found


def _looked_up(table: Tensor, columns: Tensor) -> Tensor:
    """The columns of a table (H, k) that `columns` (n, n) names, (H, n, n)."""
    return table.index_select(1, columns.flatten().int()).unflatten(1, columns.shape)
