"""Several graphs as arrays: all that depends on the graphs and the configuration but not on weights.

A `GraphBatch` is made once per batch in numpy, can be pickled (workers of a data loader make it) and
moved to a device. Every node stands in a *slot* of its graph, and all B graphs share the S slots: those
of the first topological level (the longest path from a source), of the second, and so on, as many for
each as its widest graph needs. Nodes of one level, whichever graph they belong to, do not reach each
other, so that the gated network updates a level at once, in this order and in its reverse. Arrays over
nodes have R = S B rows, `slot * B + graph`; slots that a graph does not need hold nodes without edges.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import torch

from ghn_init._errors import GraphError
from ghn_init._graph.graph import LAYER_TYPES, NORM_TYPES, TYPE_INDEX, WEIGHT_TYPES, Graph, Node
from ghn_init._graph.structure import places_read, predicted_for_means
from ghn_init._hypernetwork.channels import axis_of, of_parameter, stretches_read
from ghn_init._hypernetwork.config import channel_sizes, spatial_sizes
from ghn_init._hypernetwork.priors import NO_PRIOR, handed_out, priors_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy.typing as npt
    from torch import Tensor

    from ghn_init._hypernetwork.config import GHNConfig

KINDS: Final = ("weight", "class_weight", "norm", "bias", "class_bias")
"""The kinds of parameters, each decoded in its own way, in the order in which a batch keeps them."""

MOST_EDGES: Final = 100
"""Degrees from here on share the last row of GHN-3's tables (arXiv 2303.04143)."""

FARTHEST: Final = 1024
"""Depths from here on share the last bucket."""

_POSITION_KERNEL: Final = 11
"""A positional encoding with at least this side is not normalised."""


class ParamKey(NamedTuple):
    """What parameters that are decoded together have in common; its order is that of decoding.

    Attributes:
        kind: Index into `KINDS`.
        kernel: (height, width) of the decoded kernel, at most K x K; () for vectors.
        resized: (height, width) that the decoded kernel is interpolated to (GHN-3); `kernel` where it is not.
        block: Channels that are decoded, (out, in) at most (O, I); (n,) for vectors.
        shape: Shape with the output channels first, as in `Node.shape`.
        stored: The parameter's own shape.
        transposed: The stored tensor is (in, out, ...).
        positional: A positional encoding.
        prior: Name of what is added to what is decoded, and its first channel; see `priors`.
        stretches: Those of the channels that are read, () if they are one; see `channels`.
        pixels: Inputs of each of these channels, of a linear layer that reads flattened maps; they share what
            is decoded for their mean.
    """

    kind: int
    kernel: tuple[int, ...]
    resized: tuple[int, ...]
    block: tuple[int, ...]
    shape: tuple[int, ...]
    stored: tuple[int, ...]
    transposed: bool
    positional: bool
    prior: tuple[str, int] = NO_PRIOR
    stretches: tuple[int, ...] = ()
    pixels: int = 1

    @property
    def channels(self) -> tuple[int, ...]:
        """The stretches of the channels that are read, of a weight with an axis for these."""
        return tuple(length // self.pixels for length in self.stretches or (self.shape[1],))


@dataclass(frozen=True, slots=True)
class ParamGroup:
    """Parameters with one key: entries `start` to `stop` of a batch's `rows` and `scales`.

    `members` holds the graph's index and the parameter's qualified name for each of them.
    """

    key: ParamKey
    start: int
    stop: int
    members: tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class GraphBatch:
    """B graphs as arrays over R = S B rows for their nodes and over their P decodable parameters.

    Attributes:
        config: The configuration that the arrays were made for.
        num_nodes: Number of nodes of every graph.
        levels: First slot of every topological level, and S.
        types: (R,) int64, rows of the type embedding.
        shapes: (R, 4) int64, rows of the two channel and the two spatial embeddings.
        places: (R, 2) int64, buckets of depth and height; (R, 0) without depth embeddings.
        degrees: (R, 3) int64, rows of GHN-3's embeddings of the number of edges in and out and of the
            distance from the input; (R, 0) for others.
        distances: (B, S, S) uint8, lengths of shortest paths u -> v, 0 where there is none.
        nodes: For every graph the rows of its nodes, in the graph's order.
        rows: (P,) int64, the row from which each parameter is decoded.
        scales: (P,) float32, the normalisation sqrt(beta / fan_in) of each weight, 1 for vectors.
        groups: The parameters that are decoded together, in the order of `rows`.
    """

    config: GHNConfig
    num_nodes: tuple[int, ...]
    levels: tuple[int, ...]
    types: Tensor
    shapes: Tensor
    places: Tensor
    degrees: Tensor
    distances: Tensor
    nodes: tuple[tuple[int, ...], ...]
    rows: Tensor
    scales: Tensor
    groups: tuple[ParamGroup, ...]

    @classmethod
    def from_graphs(
        cls, graphs: Sequence[Graph], config: GHNConfig, *, names: Iterable[str] | None = None
    ) -> GraphBatch:
        """Make a batch; with `names`, only those parameters are decoded (others are passed over).

        Raises:
            GraphError: No graph, an empty one, or a parameter of a shape that no decoder makes.
        """
        if not graphs or not all(len(graph) for graph in graphs):
            raise GraphError(f"a batch of {len(graphs)} graphs, one of them empty; expected one node or more")
        depths = [graph.depths for graph in graphs]
        levels = _levels(depths)
        slots = [_slots(depth, levels) for depth in depths]
        total, count = int(levels[-1]), len(graphs)
        where = np.concatenate([slot * count + index for index, slot in enumerate(slots)])

        nodes = [node for graph in graphs for node in graph.nodes]
        types = np.zeros(total * count, dtype=np.int64)
        types[where] = [TYPE_INDEX[node.type] for node in nodes]
        shapes = np.zeros((total * count, 4), dtype=np.int64)
        shapes[where] = [row for graph in graphs for row in _shape_rows(graph, config)]
        places = np.zeros((total * count, 2 if config.depth_buckets else 0), dtype=np.int64)
        if config.depth_buckets:
            places[where] = _places(graphs, config.depth_buckets)
        degrees = np.zeros((total * count, 3 if config.transformer else 0), dtype=np.int64)
        if config.transformer:
            degrees[where] = np.concatenate([_degrees(graph, config) for graph in graphs])
        distances = np.zeros((count, total, total), dtype=np.uint8)
        for matrix, graph, slot in zip(distances, graphs, slots, strict=True):
            matrix[np.ix_(slot, slot)] = graph.distances
        rows_of = tuple(tuple((slot * count + index).tolist()) for index, slot in enumerate(slots))
        rows, scales, groups = _decodable(graphs, rows_of, config, names)
        return cls(
            config=config,
            num_nodes=tuple(len(graph) for graph in graphs),
            levels=tuple(levels.tolist()),
            types=torch.from_numpy(types),
            shapes=torch.from_numpy(shapes),
            places=torch.from_numpy(places),
            degrees=torch.from_numpy(degrees),
            distances=torch.from_numpy(distances),
            nodes=rows_of,
            rows=torch.from_numpy(rows),
            scales=torch.from_numpy(scales),
            groups=groups,
        )

    def __len__(self) -> int:
        """Number of graphs."""
        return len(self.num_nodes)

    @property
    def device(self) -> torch.device:
        return self.types.device

    def edges(self, longest: int = 1) -> tuple[Tensor, Tensor]:
        """The graphs' edges, or virtual edges of a length up to `longest`, as torch_geometric wants them.

        Returns:
            (2, E) int64, rows of the nodes that each edge leads from and to, and (E,) uint8, its length s.
        """
        found = (self.distances > 0) & (self.distances <= longest)
        graph, source, target = found.nonzero(as_tuple=True)
        return torch.stack([source, target]) * len(self) + graph, self.distances[found]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> GraphBatch:
        """The batch with its arrays on `device`."""
        if self.device == torch.device(device):
            return self
        arrays: dict[str, Any] = {
            name: getattr(self, name).to(device, non_blocking=non_blocking)
            for name in ("types", "shapes", "places", "degrees", "distances", "rows", "scales")
        }
        return replace(self, **arrays)


def _levels(depths: Sequence[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    """First slot of every level, and the number of slots: each level as wide as in its widest graph."""
    deepest = max(int(depth.max()) for depth in depths) + 1
    widths = np.stack([np.bincount(depth, minlength=deepest) for depth in depths]).max(axis=0)
    return np.concatenate([[0], np.cumsum(widths)])


def _slots(depth: npt.NDArray[np.int64], levels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The slot of every node of a graph: the first free one of its level."""
    order = np.argsort(depth, kind="stable")
    sorted_depth = depth[order]
    rank = np.arange(len(depth)) - np.searchsorted(sorted_depth, sorted_depth)
    slots = np.empty_like(depth)
    slots[order] = levels[sorted_depth] + rank
    return slots


def _places(graphs: Sequence[Graph], buckets: int) -> npt.NDArray[np.int64]:
    """Buckets of depth and height of all nodes in the graphs' order, (N, 2)."""
    lengths = [np.concatenate([g.depths for g in graphs]), np.concatenate([g.heights for g in graphs])]
    return _bucket_table(buckets)[np.minimum(np.stack(lengths, axis=1), FARTHEST)]


@lru_cache(maxsize=8)
def _bucket_table(buckets: int) -> npt.NDArray[np.int64]:
    """The bucket of every length 0..`FARTHEST`: half of them exact, then logarithmic, as in T5.

    T5's relative position buckets: Raffel et al. 2020, arXiv 1910.10683, section 2.1.
    """
    half = buckets // 2
    lengths = np.arange(FARTHEST + 1)
    growth = np.log(np.maximum(lengths, half) / half) / math.log(FARTHEST / half)
    far = np.minimum(half + (growth * (buckets - half)).astype(np.int64), buckets - 1)
    return np.where(lengths < half, lengths, far)


def _degrees(graph: Graph, config: GHNConfig) -> npt.NDArray[np.int64]:
    """Real edges in and out of every node and its distance from the input, 0 without a path, (n, 3)."""
    steps = graph.distances
    away = steps[0].astype(np.int64)
    if not config.ve:
        away[away > 1] = 0
    edges = (steps == 1).sum(axis=0), (steps == 1).sum(axis=1)
    return np.stack([*np.minimum(edges, MOST_EDGES), away], axis=1)


# Shapes of nodes


def canonical_shape(node: Node) -> tuple[int, int, int, int] | None:
    """The shape of a node as (out, in, height, width), or None without a parameter or kernel.

    Linear (a, b) -> (a, b, 1, 1); vector (n,) -> (n, 1, 1, 1); one-dimensional convolution (o, i, k) ->
    (o, i, 1, k); three-dimensional (o, i, t, h, w) -> (o, i, h, w), which is repeated over t;
    positional encoding (1, T, C) or (T, C) -> (1, C, s, s) with s = floor(sqrt(T)). A size of 0, of a layer
    without elements, counts as 1.

    Raises:
        GraphError: A shape that fits none of these.
    """
    if node.shape is None:
        return None
    shape = tuple(max(size, 1) for size in node.shape)
    dims = len(shape)
    vector = node.type in NORM_TYPES or node.type == "bias"
    if (dims == 1) != vector or not 1 <= dims <= 5:
        wanted = "one dimension" if vector else "two to five dimensions"
        raise GraphError(f"{node.type} node of {node.param}: shape {node.shape}; expected {wanted}")
    if node.type == "pos_enc" and dims <= 3:
        side = math.isqrt(shape[-2])
        return (1, shape[-1], side, side)
    if dims == 1:
        return (shape[0], 1, 1, 1)
    height = shape[-2] if dims > 3 else 1
    width = shape[-1] if dims > 2 else 1
    return (shape[0], shape[1], height, width)


@lru_cache(maxsize=4096)
def _nearest(sizes: tuple[int, ...], size: int) -> int:
    """Index of the entry nearest to `size`, ties to the smaller; one past the end takes the last."""
    return min(range(len(sizes)), key=lambda index: (abs(sizes[index] - size), index))


@lru_cache(maxsize=4096)
def _indices(
    shape: tuple[int, int, int, int], num_classes: int, largest: int, widest: int
) -> tuple[int, ...]:
    channels, kernels = channel_sizes(num_classes), spatial_sizes(largest)
    # 4 to 7 channels count as 8 and a side of 2 as 3, whichever entry is nearest.
    wide = [8 if 4 <= size <= 7 else size for size in shape[:2]]
    if widest:  # classes are no width
        wide = [size if size == num_classes else min(size, widest) for size in wide]
    tall = (3 if size == 2 else size for size in shape[2:])
    return (*(_nearest(channels, size) for size in wide), *(_nearest(kernels, size) for size in tall))


def _shape_rows(graph: Graph, config: GHNConfig) -> list[tuple[int, ...]]:
    """Rows of the channel (twice) and spatial (twice) embeddings for every node."""
    return [_shape_indices(node, config) for node in graph.nodes]


def _shape_indices(node: Node, config: GHNConfig) -> tuple[int, ...]:
    shape = canonical_shape(node)
    if shape is None:
        dummy = len(channel_sizes(config.num_classes)), len(spatial_sizes(config.max_shape[3]))
        return (dummy[0], dummy[0], dummy[1], dummy[1])
    return _indices(shape, config.num_classes, config.max_shape[3], config.widest)


# Parameters to decode


def _decodable(
    graphs: Sequence[Graph],
    rows_of: Sequence[Sequence[int]],
    config: GHNConfig,
    names: Iterable[str] | None,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], tuple[ParamGroup, ...]]:
    """The parameters of all graphs, grouped: their rows (P,), their scales (P,), the groups."""
    wanted = None if names is None else frozenset(names)
    found: dict[ParamKey, list[tuple[int, int, str]]] = {}
    for index, (graph, at) in enumerate(zip(graphs, rows_of, strict=True)):
        for place, name, key in _parameters(graph, config):
            if wanted is None or name in wanted:
                found.setdefault(key, []).append((at[place], index, name))
    groups: list[ParamGroup] = []
    rows, scales = [], []
    for key in sorted(found):
        members = found[key]
        start = len(rows)
        rows += [row for row, _, _ in members]
        scale = 1.0
        if config.weight_norm and not (config.transformer and _is_exempt(key)):
            scale = weight_scale(key) * share_of_copies(key, config.widest)
        scales += [scale] * len(members)
        groups.append(ParamGroup(key, start, len(rows), tuple((index, name) for _, index, name in members)))
    return np.array(rows, dtype=np.int64), np.array(scales, dtype=np.float32), tuple(groups)


def _parameters(graph: Graph, config: GHNConfig) -> Iterable[tuple[int, str, ParamKey]]:
    """Yield (node, parameter's name, key) for every parameter that a node stands for.

    A parameter of several nodes (a module that is called several times) is decoded from the first.
    """
    seen: set[str] = set()
    for index, name, key in _node_parameters(graph, config):
        if name not in seen:
            seen.add(name)
            yield index, name, key


def _node_parameters(graph: Graph, config: GHNConfig) -> Iterable[tuple[int, str, ParamKey]]:
    """Yield (node, parameter's name, key) node by node."""
    weight, bias = graph.classifier
    if weight is not None and (canonical_shape(graph.nodes[weight]) or ())[2:] != (1, 1):
        weight = bias = None
    priors = priors_of(graph, config)
    read = _stretches_read(graph, config)
    means = config.aligned and predicted_for_means(graph)
    for index, node in enumerate(graph.nodes):
        if node.shape is None or 0 in node.shape:  # no parameter, or one without elements
            continue
        if node.type in NORM_TYPES:
            if node.param is not None:
                yield index, node.param, _vector_key(node, "norm", config, read[index])
            if node.bias is not None:
                yield index, node.bias, _vector_key(node, "bias", config, read[index])
        elif node.param is None:
            continue
        elif node.type in WEIGHT_TYPES:
            prior = priors.get(index, NO_PRIOR)
            pixels = places_read(graph, index, sum(read[index])) if means else 1
            yield index, node.param, _weight_key(node, index == weight, prior, config, read[index], pixels)
        elif node.type == "bias":
            kind = "class_bias" if index == bias else "bias"
            yield index, node.param, _vector_key(node, kind, config, read[index])


def _stretches_read(graph: Graph, config: GHNConfig) -> Sequence[tuple[int, ...]]:
    """For every node the stretches of the channels that it reads; () of all without `config.aligned`."""
    if not config.aligned:
        return [()] * len(graph)
    return stretches_read(graph, config.max_shape[1], handed_out(graph))


def _weight_key(
    node: Node,
    classifier: bool,
    prior: tuple[str, int],
    config: GHNConfig,
    read: tuple[int, ...],
    pixels: int,
) -> ParamKey:
    canonical, shape = canonical_shape(node), node.shape
    assert canonical is not None
    assert shape is not None
    most_out, most_in, _, most_kernel = config.max_shape
    stored = (shape[1], shape[0], *shape[2:]) if node.transposed else shape
    kernel = (min(canonical[2], most_kernel), min(canonical[3], most_kernel))
    stretches = ()
    if node.type in LAYER_TYPES:
        stretches = of_parameter(shape, tuple(length * pixels for length in read))
    wide = [canonical[0], canonical[1] // pixels]
    if stretches:
        wide[axis_of(shape)] = max(stretches) // pixels
    return ParamKey(
        kind=KINDS.index("class_weight" if classifier else "weight"),
        kernel=kernel,
        resized=canonical[2:] if config.transformer else kernel,
        block=(min(wide[0], config.num_classes if classifier else most_out), min(wide[1], most_in)),
        shape=shape,
        stored=stored if node.stored is None else node.stored,
        transposed=node.transposed,
        positional=node.type == "pos_enc",
        prior=prior,
        stretches=stretches,
        pixels=pixels,
    )


def _vector_key(node: Node, kind: str, config: GHNConfig, read: tuple[int, ...]) -> ParamKey:
    assert node.shape is not None
    canonical_shape(node)  # raises where the shape is no vector's
    longest = config.num_classes if kind == "class_bias" else max(config.max_shape[:2])
    stored = node.shape if node.stored is None else node.stored
    stretches = of_parameter(node.shape, read)
    block = (min(max(stretches, default=node.shape[0]), longest),)
    return ParamKey(
        KINDS.index(kind), (), (), block, node.shape, stored, transposed=False, positional=False,
        stretches=stretches,
    )  # fmt: skip


def _is_exempt(key: ParamKey) -> bool:
    """Whether GHN-3 leaves a weight as it is: it tests the sizes of the tensor, not what it is for.

    So every positional encoding (1, T, C) of 11 channels or more is left as it is, whatever its grid.
    """
    shape = key.shape
    return len(shape) > 2 and shape[0] == 1 and shape[2] >= _POSITION_KERNEL


def weight_scale(key: ParamKey) -> float:
    """The normalisation of a weight: sqrt(beta / fan_in) with the final shape; 1 for a vector.

    fan_in is the number of elements of one output filter, of all inputs that share one (`ParamKey.pixels`)
    a single one. beta is 2, for ReLU networks (He et al. 2015), but 1 for a depthwise convolution and for a
    kernel with height < width, the first half of a factorised pair without an activation between. A large
    positional encoding is left as it is (arXiv 2110.13100, section 4.2).
    """
    shape = key.shape
    if len(shape) < 2:
        return 1.0
    if key.positional:
        side = math.isqrt(shape[-2]) if len(shape) < 4 else shape[-1]
        if side >= _POSITION_KERNEL:
            return 1.0
        return math.sqrt(2 / (shape[-1] * side * side if len(shape) < 4 else math.prod(shape[1:])))
    single = len(shape) >= 3 and shape[1] == 1
    factorised = len(shape) >= 4 and shape[-2] < shape[-1]
    return math.sqrt((1 if single or factorised else 2) / (math.prod(shape[1:]) // key.pixels))


def share_of_copies(key: ParamKey, widest: int) -> float:
    """What a weight of more than `widest` input channels is multiplied by to give what one of so many gives.

    Channels beyond those of a block are copies: their sum grows with their number, the normalisation falls
    with its root alone, so that a layer of twice the width gave values larger by the root of 2, while what a
    prior carries is averaged. 1 where channels are not added up, and with `widest` 0.
    """
    shape = key.shape
    if not widest or key.positional or len(shape) < 2 or axis_of(shape) == 0:
        return 1.0
    return math.sqrt(min(1.0, widest * key.pixels / shape[1]))
