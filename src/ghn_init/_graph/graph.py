"""The computational graph that a graph hypernetwork reads.

Nodes are operations of 15 types (Knyazev et al. 2021, arXiv 2110.13100, section 3), edges are the
flow of activations. A `Graph` is immutable and knows nothing of modules: the tracer makes it, the
GHN and the writer read it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from ghn_init._errors import GraphError
from ghn_init._graph.draw import draw

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence
    from os import PathLike

    import numpy.typing as npt

NODE_TYPES: Final = (
    "max_pool", "avg_pool", "sep_conv", "dil_conv", "conv", "msa", "cse", "sum", "concat",
    "input", "bias", "bn", "ln", "pos_enc", "glob_avg",
)  # fmt: skip
"""Names of the node types. The index is the row of the type embedding in every checkpoint."""

TYPE_INDEX: Final = {name: index for index, name in enumerate(NODE_TYPES)}

LAYER_TYPES: Final = frozenset({"conv", "sep_conv", "dil_conv"})
"""Node types whose outputs are sums of their inputs, weighted by the parameter."""

WEIGHT_TYPES: Final = LAYER_TYPES | {"pos_enc"}
"""Node types whose parameter the convolutional decoder makes."""

NORM_TYPES: Final = frozenset({"bn", "ln"})
"""Node types that stand for two vectors, the layer's weight (`param`) and its bias (`bias`)."""

_AFTER_A_HEAD: Final = frozenset({"bias", "glob_avg", "avg_pool", "max_pool"})

MAX_DISTANCE: Final = 50
"""Virtual edges longer than this are dropped (arXiv 2110.13100, section 4.1)."""


@dataclass(frozen=True, slots=True)
class Node:
    """One operation.

    Attributes:
        type: One of `NODE_TYPES`.
        param: Qualified name of the parameter that the node stands for, or None.
        shape: Shape of that parameter with the output channels first (a linear layer is (out, in));
            (1, 1, k, k) for a pooling layer; None where there is neither.
        bias: For `bn` and `ln`, the qualified name of the layer's bias, which the node stands for too.
        transposed: The parameter is stored as (in, out, ...), as in transposed convolutions, so the
            predicted tensor has its first two axes swapped before it is written.
        stored: The parameter's own shape where it differs from `shape` by more than `transposed`, e.g.
            a norm weight of shape (C, 1, 1); same number of elements. None: no difference.
    """

    type: str
    param: str | None = None
    shape: tuple[int, ...] | None = None
    bias: str | None = None
    transposed: bool = False
    stored: tuple[int, ...] | None = None


class Part(NamedTuple):
    """Channels of one node, as another one reads them.

    Attributes:
        node: The index of the node.
        cut: The first channel, the one after the last, and how many the node has; None: all of them.
        scale: Name of the parameter that they are multiplied by, such as a layer scale, if any.
    """

    node: int
    cut: tuple[int, int, int] | None = None
    scale: str | None = None


Parts = tuple[Part, ...]
"""Channels side by side."""


UNUSED: Final = "unused"
UNREACHED: Final = "does not reach the output"
"""Roles of parameters that do not matter for what the network computes."""

SLOPE: Final = "slope of an activation"
"""The role of a PReLU's parameter."""


@dataclass(frozen=True, slots=True)
class UnmatchedParameter:
    """A parameter of the model that no node stands for.

    `role` is what it was found to be, in words: "class token", "layer scale",
    "relative position table", "unused", ...
    """

    name: str
    shape: tuple[int, ...]
    role: str

    @property
    def used(self) -> bool:
        """Whether it matters for what the network computes."""
        return self.role not in (UNUSED, UNREACHED)


@dataclass(frozen=True)
class Graph:
    """An immutable directed acyclic graph of operations, numbered in a topological order.

    Attributes:
        nodes: The operations; node 0 is the input.
        edges: Pairs (u, v), u < v; they are sorted, and each is there once.
        unmatched: Parameters of the model that no node stands for.
        name: What was traced, for messages: the model's class.
        rectified: Indices of the nodes whose output goes through an activation such as ReLU or SiLU. A GHN
            does not see them: activations have no nodes (arXiv 2110.13100, section 3).
        enlarged: Indices of the nodes whose output is enlarged, by interpolation or a shuffle of pixels. A
            GHN does not see that either.
        cropped: Of the convolutions of whose filters much lies beside the image, by the node's index: for
            every axis, and for every place of the output along it, the first row of the filter that lies in
            the image and the one after the last. A GHN does not see the image's size.
        reads: Of the nodes that read some of another node's channels, read them multiplied by a parameter, or
            join nodes in another order than that of their indices, by index: what each operand consists of;
            a `concat` has one. A GHN sees whole nodes.
        rescaled: Of the nodes whose layer multiplies or standardises its parameter before it uses it, by
            index: the root mean square of what it uses; None where that is unknown.
        absolute: Indices of the nodes of whose output not the directions alone count: it is an output of the
            network, or goes through a function that does not pass a factor on, as a sigmoid. (A ReLU does.)
        bare: Of the batch norms without a weight, the paths of their modules, by index.
        grouped: Indices of the `ln` nodes that are group norms of feature maps, several channels in a group.
        single: Indices of the `avg_pool` nodes that are means over all positions of feature maps.

    Raises:
        GraphError: A node of unknown type, or an edge that is not (u, v) with 0 <= u < v < n.
    """

    nodes: tuple[Node, ...]
    edges: tuple[tuple[int, int], ...]
    unmatched: tuple[UnmatchedParameter, ...] = ()
    name: str = "graph"
    rectified: frozenset[int] = field(default=frozenset(), compare=False, repr=False)
    enlarged: frozenset[int] = field(default=frozenset(), compare=False, repr=False)
    cropped: Mapping[int, tuple[tuple[tuple[int, int], ...], ...]] = field(
        default_factory=dict, compare=False, repr=False
    )
    reads: Mapping[int, tuple[Parts, ...]] = field(default_factory=dict, compare=False, repr=False)
    rescaled: Mapping[int, float | None] = field(default_factory=dict, compare=False, repr=False)
    absolute: frozenset[int] = field(default=frozenset(), compare=False, repr=False)
    bare: Mapping[int, str] = field(default_factory=dict, compare=False, repr=False)
    grouped: frozenset[int] = field(default=frozenset(), compare=False, repr=False)
    single: frozenset[int] = field(default=frozenset(), compare=False, repr=False)

    def __post_init__(self) -> None:
        n = len(self.nodes)
        for index, node in enumerate(self.nodes):
            if node.type not in TYPE_INDEX:
                raise GraphError(
                    f"{self.name}: node {index} has type {node.type!r}; expected one of {NODE_TYPES}"
                )
        if any(first >= second for first, second in pairwise(self.edges)):
            object.__setattr__(self, "edges", tuple(sorted(set(self.edges))))
        for u, v in self.edges:
            if not 0 <= u < v < n:
                raise GraphError(
                    f"{self.name}: edge ({u}, {v}) is not (u, v) with 0 <= u < v < {n}; "
                    "number the nodes in a topological order"
                )

    def __len__(self) -> int:
        return len(self.nodes)

    @cached_property
    def predecessors(self) -> tuple[tuple[int, ...], ...]:
        """For every node the indices of the nodes with an edge to it."""
        return _neighbours(len(self), ((v, u) for u, v in self.edges))

    @cached_property
    def successors(self) -> tuple[tuple[int, ...], ...]:
        """For every node the indices of the nodes that its edges lead to."""
        return _neighbours(len(self), self.edges)

    @cached_property
    def distances(self) -> npt.NDArray[np.uint8]:
        """The matrix s of virtual edges, (n, n): s[u, v] is the length of the shortest path u -> v.

        0 where there is no path or where it is longer than `MAX_DISTANCE`; 1 for a real edge.
        Dynamic programming over the topological order: a node is one step further from each of its
        ancestors than the nearest of its predecessors is.
        """
        n = len(self.nodes)
        far = MAX_DISTANCE + 1
        # Row v holds the distances *to* v, so that each step works on contiguous memory.
        to = np.full((n, n), far, dtype=np.uint8)
        for v, preds in enumerate(self.predecessors):
            row = to[v]
            if len(preds) == 1:
                np.add(to[preds[0]], 1, out=row)
            elif preds:
                np.add(to[list(preds)].min(axis=0), 1, out=row)
            np.minimum(row, far, out=row)
            row[v] = 0
        to[to == far] = 0
        distances = np.ascontiguousarray(to.T)
        distances.setflags(write=False)
        return distances

    @cached_property
    def depths(self) -> npt.NDArray[np.int64]:
        """Length of the longest path from a source to every node, (n,)."""
        depths = np.zeros(len(self.nodes), dtype=np.int64)
        for v, preds in enumerate(self.predecessors):
            if preds:
                depths[v] = 1 + max(depths[u] for u in preds)
        return depths

    @cached_property
    def heights(self) -> npt.NDArray[np.int64]:
        """Length of the longest path from every node to a sink, (n,)."""
        heights = np.zeros(len(self.nodes), dtype=np.int64)
        for v in range(len(self.nodes) - 1, -1, -1):
            for u in self.predecessors[v]:
                heights[u] = max(heights[u], heights[v] + 1)
        return heights

    @cached_property
    def classifier(self) -> tuple[int | None, int | None]:
        """Indices of the classifier's weight and bias: the linear layer that ends the graph.

        Its weight is the last node but one and its bias the last (or the weight is the last node, of
        a layer without bias); (None, None) if the graph ends with anything else.
        """
        last = len(self.nodes) - 1
        if last >= 1 and self.nodes[last].type == "bias" and (last - 1, last) in self.edges:
            return (last - 1, last) if self.nodes[last - 1].type == "conv" else (None, None)
        if last >= 0 and self.nodes[last].type == "conv":
            return last, None
        return None, None

    @cached_property
    def heads(self) -> tuple[tuple[int, int | None], ...]:
        """Indices of weight and bias of every layer that ends the network: after it come only poolings.

        Usually the classifier alone; several for networks with auxiliary classifiers. Beside
        `classifier`, which is what a GHN's class layer is for, these include a classifier that is
        pooled afterwards, as SqueezeNet's.
        """
        ends = [False] * len(self.nodes)
        for index in range(len(self.nodes) - 1, -1, -1):
            after = self.successors[index]
            ends[index] = all(ends[v] and self.nodes[v].type in _AFTER_A_HEAD for v in after)
        weights = [i for i, node in enumerate(self.nodes) if ends[i] and node.type == "conv"]
        return tuple(
            (i, next((v for v in self.successors[i] if self.nodes[v].type == "bias"), None)) for i in weights
        )

    def draw(self, path: str | PathLike[str]) -> None:
        """Draw the graph to `path` (.svg, .pdf, .png, .dot), coloured by node type, with a legend.

        Needs graphviz for everything but .dot: `pip install graphviz` and the `dot` program.
        """
        draw(self, path)


def _neighbours(count: int, pairs: Iterable[tuple[int, int]]) -> tuple[tuple[int, ...], ...]:
    """For each of so many nodes the others of the pairs that it is the first of."""
    lists: list[list[int]] = [[] for _ in range(count)]
    for node, other in pairs:
        lists[node].append(other)
    return tuple(map(tuple, lists))


def graph_from_edges(
    nodes: Sequence[Node],
    edges: Sequence[tuple[int, int]],
    *,
    unmatched: Sequence[UnmatchedParameter] = (),
    name: str = "graph",
) -> Graph:
    """Make a `Graph` from lists: edges are sorted and repeated ones dropped."""
    return Graph(tuple(nodes), tuple(sorted(set(edges))), tuple(unmatched), name)


def without(graph: Graph, gone: Collection[int], before: Mapping[int, Node] | None = None) -> Graph:
    """The graph without these nodes, the neighbours of each linked, as a GHN reads it.

    What no GHN sees (`Graph.rectified` and the attributes after it) is left out: nodes have other numbers.

    Args:
        graph: The graph.
        gone: Indices of the nodes that are left out.
        before: By the index of a node that is not, one that is put before it, and reads what it reads.
    """
    before = before or {}
    if not gone and not before:
        return graph
    nodes: list[Node] = []
    read: list[tuple[int, ...]] = []  # for every node those that are read where it is
    edges: list[tuple[int, int]] = []
    for index, sources in enumerate(graph.predecessors):
        place = tuple(dict.fromkeys(earlier for source in sources for earlier in read[source]))
        for node in (before.get(index), None if index in gone else graph.nodes[index]):
            if node is not None:
                edges += [(earlier, len(nodes)) for earlier in place]
                place = (len(nodes),)
                nodes.append(node)
        read.append(place)
    left = graph_from_edges(nodes, edges)
    return replace(left, unmatched=graph.unmatched, name=graph.name)
