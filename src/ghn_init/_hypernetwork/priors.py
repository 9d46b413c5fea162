"""What predicted weights start from: the identity on channels, and filters that whiten images.

A GHN of its own accord begins with networks that map the image into random features, each into others, so
that nothing it learns on one network helps the next. With these priors, which are added to what is decoded,
all networks begin as nearly the same function: a stem of fixed filters whose features are carried through.

Which layer gets which is told by the graph alone. Both are periodic in the channels, as the decoded block is,
so that a predicted tensor stays a small repeating block. Their sum is larger where a prior has no such
period: as the kernel where that is larger than the decoded one, and as all outputs of grouped convolutions
whose groups do not divide the block. There the two stay apart in a `Tile`, and only training adds them up.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Final

import torch

from ghn_init._graph.graph import LAYER_TYPES
from ghn_init._hypernetwork.channels import per_place
from ghn_init._hypernetwork.tile import Prior

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor

    from ghn_init._graph.graph import Graph
    from ghn_init._hypernetwork.batch import ParamKey
    from ghn_init._hypernetwork.config import GHNConfig

NO_PRIOR: Final = ("", 0)
"""Of a parameter that is what is decoded and nothing else."""

STEM_SIDE: Final = 3
"""Side of the patches that are whitened, in pixels."""

STEM_CHANNELS: Final = 3

_LEAST_INPUTS: Final = 16
"""A layer of fewer input channels has too few to carry features through."""

_MIRRORED: Final = 0.5
"""Share of the neighbouring channel that is taken off: a ReLU then passes a feature as a leaky one would."""

_RIDGE: Final = 0.01
"""Added to the variances of patches before they are divided by; pixels have deviation 1."""

# Told by the graph


def priors_of(graph: Graph, config: GHNConfig) -> Mapping[int, tuple[str, int]]:
    """The priors of the nodes that have one: its name, "identity", "groups" or "stem", and its first channel.

    "stem": a convolution that reads the network's input, of three channels. "identity": every other weight
    with enough input channels, but for heads and the linear layers right before them, gates and positional
    encodings. "groups": the same within the groups of a grouped convolution. Of convolutions that read one
    node and meet in a concatenation, as the halves of a factorised reduction do, each begins with the channel
    at which the one before it ended.
    """
    found: dict[int, tuple[str, int]] = {}
    if config.whitening:
        found |= {index: ("stem", 0) for index in _weights(graph) if _is_stem(graph, index)}
    if config.identity:
        without = _heads(graph) | _gates(graph)
        begins = _beginnings(graph)
        for index in _weights(graph):
            name = _identity_of(graph, index)
            if name and index not in without and not _reads_input(graph, index):
                found[index] = (name, begins.get(index, 0))
    return found


def _weights(graph: Graph) -> list[int]:
    """Nodes with a weight of at least two dimensions, positional encodings left out."""
    types = LAYER_TYPES
    return [i for i, node in enumerate(graph.nodes) if node.type in types and len(node.shape or ()) > 1]


def _identity_of(graph: Graph, index: int) -> str:
    """The name of the prior that carries features through a weight, or ""."""
    node = graph.nodes[index]
    assert node.shape is not None
    if node.type != "conv":
        return "groups"
    return "identity" if node.shape[1] >= _LEAST_INPUTS else ""


def _reads_input(graph: Graph, index: int) -> bool:
    return all(graph.nodes[u].type == "input" for u in graph.predecessors[index])


def _is_stem(graph: Graph, index: int) -> bool:
    node = graph.nodes[index]
    assert node.shape is not None
    wide = len(node.shape) >= 4 and node.shape[1] == STEM_CHANNELS
    return wide and node.type == "conv" and not node.transposed and _reads_input(graph, index)


def _heads(graph: Graph) -> set[int]:
    """Weights of the heads and of the linear layers that lead to one with nothing but biases between."""
    found = {index for index, _ in graph.heads} | {i for i in graph.classifier[:1] if i is not None}
    for start in tuple(found):
        index = start
        while len(before := graph.predecessors[index]) == 1:
            (index,) = before
            node = graph.nodes[index]
            if node.type == "conv" and len(node.shape or ()) == 2:
                found.add(index)
            elif node.type != "bias":
                break
    return found


def _gates(graph: Graph) -> set[int]:
    """Weights on the paths that lead from a feature map, by themselves, to the `cse` node that scales it."""
    found: set[int] = set()
    for index, node in enumerate(graph.nodes):
        if node.type == "cse":
            inputs = graph.predecessors[index]
            for last in inputs:
                path, at = [last], last
                while len(before := graph.predecessors[at]) == 1 and before[0] not in inputs:
                    (at,) = before
                    path.append(at)
                if len(before) == 1:
                    found.update(path)
    return found


def _beginnings(graph: Graph) -> dict[int, int]:
    """First channel of the convolutions that read one node and whose outputs are put side by side."""
    begins: dict[int, int] = {}
    for index in handed_out(graph):
        start = 0
        for part in graph.predecessors[index]:
            begins[part] = start
            start += (graph.nodes[part].shape or (0,))[0]
    return begins


def handed_out(graph: Graph) -> set[int]:
    """The concatenations of convolutions that read one node: their parts are one output in pieces."""
    found: set[int] = set()
    for index, node in enumerate(graph.nodes):
        parts = graph.predecessors[index] if node.type == "concat" else ()
        sources = {graph.predecessors[u] for u in parts}
        convolutions = all(graph.nodes[u].type == "conv" and graph.nodes[u].shape for u in parts)
        if len(parts) > 1 and len(sources) == 1 and convolutions:
            found.add(index)
    return found


# Added to blocks


def prior_of(
    sizes: tuple[int, ...], key: ParamKey, config: GHNConfig, whitening: Tensor | None
) -> Prior | None:
    """What is added to decoded blocks of these sizes of parameters with this key, if anything is.

    Args:
        sizes: Those of a block, arranged as the parameter's dimensions are.
        key: The parameters' key.
        config: The GHN's.
        whitening: Its whitening filters, (27, 3, 3, 3).
    """
    name, _ = key.prior
    if not name:
        return None
    sizes = _grown(sizes, key)
    kernel = sizes[2:][-2:]
    if name == "stem":
        assert whitening is not None
        places, values = _middle(kernel), stem_filters(whitening, sizes[0], kernel) * config.whitening
    else:
        places = tuple((size - 1) // 2 for size in kernel)
        values = _carrying(sizes[:2], key)
    if len(key.shape) > 4:  # the frames of a three-dimensional kernel share a prior
        values = values.unsqueeze(2) / math.prod(key.shape[2:-2])
    return Prior(sizes, places, values)


def _grown(sizes: tuple[int, ...], key: ParamKey) -> tuple[int, ...]:
    """Sizes of the block that a prior is added to: `sizes`, or what it takes for the prior to be periodic."""
    (name, _), shape = key.prior, key.shape
    kernel = tuple(shape[2:][-2:])
    grown = (*sizes[: len(sizes) - len(kernel)], *kernel)
    if name != "groups":
        return grown
    axis = int(key.transposed)
    rows, columns, group = sizes[axis], sizes[1 - axis], shape[1 - axis]
    if rows % group == 0 or (group % rows == 0 and rows % columns == 0):
        return grown
    return (*grown[:axis], shape[axis], *grown[axis + 1 :])


def _carrying(sizes: tuple[int, ...], key: ParamKey) -> Tensor:
    """The identity of a block with so many (outputs, inputs)."""
    name, begin = key.prior
    if name == "groups":
        return _groups(*sizes, *key.shape[:2], key.transposed)
    return _identity(*sizes, key.channels, begin)


@lru_cache(maxsize=256)
def _identity(rows: int, columns: int, inputs: tuple[int, ...], begin: int) -> Tensor:
    """(rows, columns) of a block for input channels in such stretches: output o carries input `begin + o`.

    Where inputs repeat the columns, their average is carried.
    """
    # Outputs beyond the inputs carry nothing, unless channels are handed out: those begin again.
    return _carried([(row + begin) % columns if begin else row for row in range(rows)], columns, inputs)


@lru_cache(maxsize=256)
def _groups(rows: int, columns: int, out: int, inputs: int, transposed: bool) -> Tensor:
    """(rows, columns) of a block of a grouped convolution: every group carries its own inputs."""
    if transposed:
        return _groups(columns, rows, inputs, out, False).T
    return _carried(range(inputs), columns, (inputs,))[torch.arange(rows) % inputs]


def _carried(channels: Sequence[int], columns: int, inputs: tuple[int, ...]) -> Tensor:
    """(rows, columns), row o with 1 at channel c of `channels` and -1/2 at its neighbour, c xor 1."""
    counts = per_place(inputs, columns)
    matrix = torch.zeros(len(channels), columns, dtype=torch.float32)
    for row, channel in enumerate(channels):
        for carried, share in ((channel, 1.0), (channel ^ 1, -_MIRRORED)):
            if carried < max(inputs):
                matrix[row, carried % columns] += share / counts[carried % columns]
    return matrix


# Whitening


def stem_filters(whitening: Tensor, rows: int, kernel: Sequence[int]) -> Tensor:
    """(rows, 3, h, w): every filter followed by its negative, over and over, cropped to the kernel."""
    pairs = torch.stack([whitening, -whitening], 1).flatten(0, 1)
    starts = [max((STEM_SIDE - size + 1) // 2, 0) for size in kernel]
    stops = [start + min(size, STEM_SIDE) for start, size in zip(starts, kernel, strict=True)]
    return pairs[torch.arange(rows) % len(pairs), :, starts[0] : stops[0], starts[1] : stops[1]]


def _middle(kernel: Iterable[int]) -> tuple[slice, ...]:
    """Where the filters stand in a kernel."""
    starts = [max((size - STEM_SIDE) // 2, 0) for size in kernel]
    return tuple(slice(start, start + STEM_SIDE) for start in starts)


def empty_filters() -> Tensor:
    """What whitening filters are before any images were seen: nothing, (27, 3, 3, 3)."""
    count = STEM_CHANNELS * STEM_SIDE**2
    return torch.zeros(count, STEM_CHANNELS, STEM_SIDE, STEM_SIDE, dtype=torch.float32)


def whitening_filters(images: Tensor) -> Tensor:
    """Filters (27, 3, 3, 3) whose answers to the images' patches are uncorrelated, of deviation 1 or less.

    The eigenvectors of the covariance of all 3 x 3 patches, each divided by the square root of its eigenvalue
    + 0.01, largest first.

    Args:
        images: (N, 3, H, W) floats of mean 0 and deviation 1.
    """
    size = len(empty_filters())
    total, products, count = torch.zeros(size).double(), torch.zeros(size, size).double(), 0
    for part in images.split(256):
        patches = (
            torch.nn.functional.unfold(part.float(), STEM_SIDE).transpose(1, 2).reshape(-1, size).double()
        )
        total, products, count = total + patches.sum(0), products + patches.T @ patches, count + len(patches)
    mean = total / count
    values, vectors = torch.linalg.eigh(products / count - mean.outer(mean))
    filters = vectors / (values.clamp(min=0) + _RIDGE).sqrt()
    # An eigenvector's sign is anyone's: the largest entry is positive.
    signs = filters.gather(0, filters.abs().argmax(0, keepdim=True)).sign()
    return (filters * signs).T.flip(0).reshape_as(empty_filters()).float()
