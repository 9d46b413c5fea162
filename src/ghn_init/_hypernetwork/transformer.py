"""The graph network of GHN-3: a transformer over the nodes of a graph (arXiv 2303.04143).

Every node attends to every node; what it knows of the edges is a bias on the attention's logits, one number
for each head and each length of the shortest path between the two. Time and memory grow with the square of
the number of nodes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ghn_init._graph.graph import MAX_DISTANCE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ghn_init._hypernetwork.batch import GraphBatch
    from ghn_init._hypernetwork.config import GHNConfig

_EDGE_ROWS: Final = 257
"""Rows of the published table of distances, of which those from 2 (no path) to 52 (the longest) are read."""

_NO_PATH: Final = 2


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

    def forward(self, x: Tensor, biases: Sequence[Tensor]) -> Tensor:
        """Features (N, d) of the nodes of all graphs, one after the other, and (H, n, n) for each graph."""
        sizes = [bias.shape[-1] for bias in biases]
        parts = self.to_qkv(x).unflatten(1, (3, self.heads, -1)).permute(1, 2, 0, 3).split(sizes, dim=2)
        # With a batch axis: torch's kernels without the full matrix of logits take four dimensions.
        mixed = [
            F.scaled_dot_product_attention(*part.unsqueeze(1), attn_mask=bias.unsqueeze(0))
            for part, bias in zip(parts, biases, strict=True)
        ]
        return self.to_out(torch.cat([part[0] for part in mixed], dim=1).transpose(0, 1).flatten(1))

    def biases(self) -> Tensor:
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

    def forward(self, x: Tensor, biases: Sequence[Tensor]) -> Tensor:
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

    def biases(self, batch: GraphBatch) -> list[Tensor]:
        """For every graph the bias (H, n, n) of each head for (query, key), in the order of its nodes."""
        table = self[0].attn.biases()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
        found = []
        for index, rows in enumerate(batch.nodes):
            slots = torch.tensor(rows, device=batch.device) // len(batch)
            forward = batch.distances[index][slots[:, None], slots]
            forward = forward.masked_fill(forward > self.longest, 0)
            back = forward.T
            columns = forward + torch.where(back > 0, back + MAX_DISTANCE, 0)
            found.append(_looked_up(table, columns))
        return found


def _looked_up(table: Tensor, columns: Tensor) -> Tensor:
    """The columns of a table (H, k) that `columns` (n, n) names, (H, n, n)."""
    return table.index_select(1, columns.flatten().int()).unflatten(1, columns.shape)
