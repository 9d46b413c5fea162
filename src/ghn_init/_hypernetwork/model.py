"""The graph hypernetwork: graphs in, parameter tensors out. It never sees a Module that it predicts for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn

from ghn_init._errors import ConfigError
from ghn_init._graph.graph import NODE_TYPES, Graph
from ghn_init._hypernetwork.batch import MOST_EDGES, GraphBatch, ParamKey
from ghn_init._hypernetwork.channels import axis_of, shares
from ghn_init._hypernetwork.config import GHNConfig, channel_sizes, spatial_sizes
from ghn_init._hypernetwork.decoder import ConvDecoder, Decoders
from ghn_init._hypernetwork.gated import MLP, GatedGNN, NodeMLP
from ghn_init._hypernetwork.gates import without_gate_poolings
from ghn_init._hypernetwork.priors import empty_filters, prior_of, whitening_filters
from ghn_init._hypernetwork.tile import Tile, full_size
from ghn_init._hypernetwork.transformer import Transformer

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from ghn_init._hypernetwork.tile import Prior


def _embedding(rows: int, width: int, std: float = 1.0) -> nn.Embedding:
    """An embedding with normal entries; on the meta device none, whose kernel takes a second to import."""
    weight = torch.empty(rows, width)
    return nn.Embedding.from_pretrained(weight if weight.is_meta else weight.normal_(std=std), freeze=False)


_INPUT_DISTANCES: Final = 1001
"""Rows of the published table of distances from the input, of which the first 51 are read."""


class ShapeEncoder(nn.Module):
    """Embeds the shape of a node's parameter: two channel and two spatial sizes, d/4 features each."""

    def __init__(self, config: GHNConfig) -> None:
        super().__init__()
        part = config.hid // 4
        std = part**-0.5 if config.transformer else 1.0
        self.embed_channel = _embedding(len(channel_sizes(config.num_classes)) + 1, part, std)
        self.embed_spatial = _embedding(len(spatial_sizes(config.max_shape[3])) + 1, part, std)

    def forward(self, index: Tensor) -> Tensor:
        """(R, 4) rows of the tables to (R, d)."""
        channels, spatial = self.embed_channel(index[:, :2]), self.embed_spatial(index[:, 2:])
        return torch.cat([channels, spatial], dim=1).flatten(1)


class PlaceEncoder(nn.Module):
    """Embeds where a node stands: its bucketed depth below the input and height above the output."""

    def __init__(self, config: GHNConfig) -> None:
        super().__init__()
        self.embed_depth = _embedding(config.depth_buckets, config.hid, std=0.02)
        self.embed_height = _embedding(config.depth_buckets, config.hid, std=0.02)

    def forward(self, index: Tensor) -> Tensor:
        """(R, 2) buckets to (R, d)."""
        return self.embed_depth(index[:, 0]) + self.embed_height(index[:, 1])


def _graph_network(config: GHNConfig) -> nn.Module:
    """The graph network that a configuration asks for."""
    if config.transformer:
        return Transformer(config)
    if config.hypernet == "mlp":
        return NodeMLP(config.hid, config.hid, config.hid)
    return GatedGNN(config.hid, virtual_edges=config.ve, rounds=config.rounds)


class Hypernetwork(Decoders):
    """A graph hypernetwork: GHN-2, GHN-1, GHN-3 or the MLP baseline, as its configuration says.

    Names of parameters are those of the published checkpoints. A graph network of one's own is assigned to
    `gnn`: called with the features (R, d) of all nodes and their `GraphBatch`, it returns new ones (R, d).

    Args:
        config: What it is made of; default: GHN-2 for CIFAR-10.
    """

    def __init__(self, config: GHNConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or GHNConfig()
        d, longest = config.hid, max(config.max_shape[:2])
        std = d**-0.5 if config.transformer else 1.0
        self.embed = _embedding(len(NODE_TYPES), d, std)
        self.shape_enc = ShapeEncoder(config)
        self.gnn: nn.Module = _graph_network(config)
        if config.layernorm:
            self.ln = nn.LayerNorm(d)
        if config.depth_buckets:
            self.place_enc = PlaceEncoder(config)
        if config.transformer:
            self.centrality_embed_in = _embedding(MOST_EDGES + 1, d, std)
            self.centrality_embed_out = _embedding(MOST_EDGES + 1, d, std)
            self.input_dist_embed = _embedding(_INPUT_DISTANCES, d, std)
        self.decoder = ConvDecoder(config)
        self.decoder_1d = MLP(d, 2 * d, 2 * longest, last_relu=False)
        self.bias_class = nn.Sequential(nn.ReLU(), nn.Linear(longest, config.num_classes))
        if config.whitening:
            self.register_buffer("whitening", empty_filters())

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    def batch(
        self, graphs: Graph | Sequence[Graph] | GraphBatch, *, names: Iterable[str] | None = None
    ) -> GraphBatch:
        """The graphs as a batch on this GHN's device; see `GraphBatch.from_graphs` for `names`.

        Raises:
            ConfigError: A batch that was made for another configuration.
        """
        if isinstance(graphs, Graph):
            graphs = [graphs]
        if not isinstance(graphs, GraphBatch):
            read = [self.reads(graph) for graph in graphs]
            graphs = GraphBatch.from_graphs(read, self.config, names=names)
        elif graphs.config != self.config:
            raise ConfigError(
                f"GraphBatch was made for {graphs.config}; expected that of the GHN, {self.config}"
            )
        return graphs.to(self.device)

    def reads(self, graph: Graph) -> Graph:
        """The graph as this GHN reads it: GHN-3 was trained without the poolings inside gates."""
        return without_gate_poolings(graph) if self.config.transformer else graph

    def node_features(self, batch: GraphBatch) -> Tensor:
        """Features of all nodes before any message, (R, d)."""
        h = self.embed(batch.types) + self.shape_enc(batch.shapes)
        if self.config.transformer:
            edges_in, edges_out, away = batch.degrees.unbind(1)
            h = h + self.centrality_embed_in(edges_in) + self.centrality_embed_out(edges_out)
            h = h + self.input_dist_embed(away)
        return h + self.place_enc(batch.places) if self.config.depth_buckets else h

    def encode(self, batch: GraphBatch) -> Tensor:
        """Final features of all nodes, (R, d)."""
        first = self.node_features(batch)
        h = self.gnn(first, batch)
        if h.shape != first.shape:
            raise ConfigError(
                f"the graph network {type(self.gnn).__name__} made features of shape {tuple(h.shape)} for "
                f"{len(first)} rows; expected {tuple(first.shape)}, as it got them"
            )
        h = self.ln(h) if self.config.layernorm else h
        return h + first if self.config.skip else h

    def whiten(self, images: Tensor) -> None:
        """Take the filters that whiten the patches of these images, (N, 3, H, W) of mean 0 and deviation 1.

        Without `config.whitening` there is nothing to do.
        """
        if self.config.whitening:
            self.get_buffer("whitening").copy_(whitening_filters(images))

    def blocks(self, batch: GraphBatch, *, raw: bool = False) -> list[Tensor]:
        """What the decoders make of every group of `batch.groups`: (n, *block), to be repeated.

        `raw` leaves out normalisation and priors; a configuration without `weight_norm` has no normalisation.
        """
        # In full precision, whatever the caller's autocast: these are small matrices with long chains.
        with torch.autocast(self.device.type, enabled=False):
            return [
                values if prior is None else prior.added_to(values)
                for values, prior in self._decoded(batch, raw=raw)
            ]

    def _decoded(self, batch: GraphBatch, *, raw: bool = False) -> Iterator[tuple[Tensor, Prior | None]]:
        """What is decoded for every group, made when it is wanted, and the prior to be added to it."""
        config = self.config
        scales = batch.scales if config.weight_norm and not raw else None
        filters = self.get_buffer("whitening") if config.whitening else None
        blocks = self.decode(self.encode(batch).index_select(0, batch.rows), scales, batch.groups)
        for values, group in zip(blocks, batch.groups, strict=True):
            if config.aligned and not raw:
                values = _evened(values, group.key)
            sizes = tuple(values.shape[1:])
            prior = None if raw else prior_of(sizes, group.key, config, filters)
            if (pixels := group.key.pixels) > 1 and not raw:
                values = values if prior is None else prior.added_to(values)
                values, prior = values.repeat_interleave(pixels, 2) / pixels, None
            yield values, prior

    def forward(self, graphs: Graph | Sequence[Graph] | GraphBatch) -> list[dict[str, Tensor]]:
        """Predict all parameters of every graph, differentiably.

        Returns:
            For every graph a dictionary from the parameter's qualified name to its full tensor in the
            parameter's own shape.
        """
        batch = self.batch(graphs)
        predicted: list[dict[str, Tensor]] = [{} for _ in range(len(batch))]
        blocks = self.blocks(batch)
        for values, group in zip(blocks, batch.groups, strict=True):
            key = group.key
            tensors = full_size(
                values, key.shape, key.stored, transposed=key.transposed, stretches=key.stretches
            )
            for (graph, name), tensor in zip(group.members, tensors, strict=True):
                predicted[graph][name] = tensor
        return predicted

    @torch.no_grad()
    def predict_tiles(self, graph: Graph, names: Iterable[str] | None = None) -> dict[str, Tile]:
        """Predict the parameters of a graph (or those in `names`) as blocks, without full tensors."""
        batch = self.batch(graph, names=names)
        tiles: dict[str, Tile] = {}
        with torch.autocast(self.device.type, enabled=False):
            for (values, prior), group in zip(self._decoded(batch), batch.groups, strict=True):
                key = group.key
                if prior is not None and not prior.stays_apart(values):
                    values, prior = prior.added_to(values), None
                for (_, name), block in zip(group.members, values.contiguous().unbind(), strict=True):
                    tiles[name] = Tile(block, key.shape, key.stored, key.transposed, prior, key.stretches)
        return tiles


def _evened(blocks: Tensor, key: ParamKey) -> Tensor:
    """Decoded blocks (n, *block), all of whose columns have the same share in what the layer sums up."""
    if key.positional or len(key.shape) < 2 or axis_of(key.shape) == 0:
        return blocks
    columns = shares(key.channels, blocks.shape[2])
    if columns is None:
        return blocks
    return blocks * columns.to(blocks.device, blocks.dtype).view(-1, *(1,) * (blocks.ndim - 3))
