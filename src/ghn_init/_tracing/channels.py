"""Which channels of which nodes a tensor carries, where code cuts feature maps.

A GHN's graph has whole feature maps. Networks of cross stages or dual paths cut them along the channels and
join the parts again, in an order of their own, and of channels of different scales it matters which of them a
layer reads. Others multiply a branch by a parameter that begins nearly at zero. So channels are followed
through functions that keep them in their order; where anything else is done with them nothing is said, and
the graph has what it has of every network.
"""

from __future__ import annotations

from itertools import accumulate, chain, pairwise
from typing import TYPE_CHECKING, Any, Final

from torch.fx.node import map_arg

from ghn_init._graph.graph import Part
from ghn_init._tracing.arguments import argument, layout
from ghn_init._tracing.carried import Derived, Flow
from ghn_init._tracing.functions import (
    ADDING,
    DEVICE_MOVES,
    DIVIDING,
    ELEMENTWISE,
    JOINING,
    LENDING,
    MULTIPLYING,
    SUBTRACTING,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import fx

    from ghn_init._graph.graph import Parts
    from ghn_init._tracing.sketch import Sketch

LAYER_SCALE: Final = "layer scale"
"""The role of parameters that branches are multiplied by."""

_CUTTING: Final = frozenset(
    {"chunk", "split", "tensor_split", "split_with_sizes", "narrow", "slice", "__getitem__"}
)

_OF_ELEMENTS: Final = frozenset(ELEMENTWISE) - {"roll"}

_KEEPING: Final = _OF_ELEMENTS | DEVICE_MOVES | LENDING | ADDING | SUBTRACTING | MULTIPLYING | DIVIDING | {
    "__neg__", "contiguous", "clone", "detach", "float", "half", "bfloat16", "type", "pad",
    "constant_pad_nd", "interpolate", "upsample", "upsample_nearest1d", "upsample_nearest2d",
    "upsample_nearest3d", "upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d",
    "upsample_trilinear3d", "view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "exp", "sqrt",
    "square", "pow", "abs",
}  # fmt: skip
"""Functions that keep channels in their order where they keep the first two sizes."""

_DIMENSIONS: Final = (2, 4, 5)
"""Of tensors whose second axis is that of the channels; of three it may be one of tokens."""


class Channels:
    """The channels that tensors carry, while a graph is drawn.

    Args:
        sketch: What is drawn.

    Attributes:
        reads: See `Graph`.
    """

    def __init__(self, sketch: Sketch) -> None:
        self.reads: dict[int, tuple[Parts, ...]] = {}
        self._sketch = sketch
        # Terms whose sum a tensor is, where it is no whole node; of functions that give several tensors, the
        # channels of each.
        self._terms: dict[fx.Node, tuple[Parts, ...]] = {}
        self._several: dict[fx.Node, list[Parts]] = {}
        self._unknown: set[fx.Node] = set()

    def follow(self, node: fx.Node, name: str, value: object, added: int | None) -> None:
        """Note what `node`, a call of the function `name` that carries `value`, does to channels.

        Args:
            node: The call.
            name: The function's name.
            value: What it carries.
            added: Index of the first graph node that it stands for; None if there is none.
        """
        if added is not None:
            if name in JOINING or self._terms:
                self._read(node, added)
        elif isinstance(value, Flow):
            if name == "__setitem__":
                self._unknown.add(node.args[0])  # pyright: ignore[reportArgumentType]
            elif name in _CUTTING:
                self._cut(node, name)
            elif name in JOINING:
                self._join(node)
            else:
                self._pass(node, name)

    def one_of(self, several: fx.Node, index: Any, node: fx.Node) -> None:
        """Note that `node` is one of the outputs of `several`."""
        if several in self._unknown or not isinstance(index, int):
            self._unknown.add(node)
        elif several in self._several:
            self._terms[node] = (self._several[several][index],)

    def _of(self, node: fx.Node) -> tuple[Parts, ...]:
        """The terms of a tensor; none if they are not known."""
        if node in self._unknown or node in self._several:
            return ()
        value = self._sketch.carried(node)
        whole = value.sources if isinstance(value, Flow) else ()
        return self._terms.get(node) or tuple((Part(source),) for source in whole)

    def _flows(self, node: fx.Node) -> list[fx.Node]:
        """The activations that a call gets, in the order of its arguments, one that is there twice twice."""
        found: list[fx.Node] = []
        map_arg((node.args, node.kwargs), found.append)
        return [x for x in found if isinstance(self._sketch.carried(x), Flow)]

    def _read(self, node: fx.Node, added: int) -> None:
        """A graph node reads tensors: note of what they consist, where its edges do not say it."""
        kind, sources = self._sketch.nodes[added].type, self._sketch.predecessors[added]
        if kind == "concat" and (not _joins_channels(node) or self._are_in_order(node, sources)):
            return
        operands = [self._of(x) for x in self._flows(node)]
        known = [parts for terms in operands for parts in terms]
        if not all(operands) or {part.node for parts in known for part in parts} != set(sources):
            return
        if kind != "sum" and len(known) > len(operands):
            return
        if kind == "concat":
            known = [tuple(chain.from_iterable(known))]
            whole = [tuple(map(Part, sources))]
        else:  # in the order of the edges
            known.sort(key=lambda parts: parts[0].node)
            whole = [(Part(source),) for source in sources]
        if known != whole:
            self.reads[added] = tuple(known)

    def _are_in_order(self, node: fx.Node, sources: Sequence[int]) -> bool:
        """Whether whole nodes are joined in the order of the edges, told in a tenth of the time."""
        joined = argument(node, 0, "tensors")
        found: list[int] = []
        for x in joined if isinstance(joined, (tuple, list)) else ():
            value = self._sketch.carried(x)
            if x in self._terms or not isinstance(value, Flow):
                return False
            found += value.sources
        return found == list(sources)

    def _pass(self, node: fx.Node, name: str) -> None:
        """A function that has no node."""
        if name in _OF_ELEMENTS and len(node.all_input_nodes) == 1:  # most are, and this takes no time
            x = node.all_input_nodes[0]
            if x not in self._terms and x not in self._unknown:
                return
        flows = self._flows(node)[:1] if name in LENDING else self._flows(node)
        operands = [self._of(x) for x in flows]
        terms = tuple(chain.from_iterable(operands))
        kept = all(operands) and all(_sizes(x) == _sizes(node) != () for x in flows)
        scale = self._scale(node, name)
        if not kept or name not in (_KEEPING if len(flows) == 1 else SUBTRACTING):
            self._unknown.add(node)
        elif scale is not None:
            if all(part == Part(part.node) for parts in terms for part in parts):
                self._terms[node] = tuple((parts[0]._replace(scale=scale),) for parts in terms)
            else:
                self._unknown.add(node)
        elif any(x in self._terms for x in flows):
            self._terms[node] = terms

    def _scale(self, node: fx.Node, name: str) -> str | None:
        """The parameter by which activations are multiplied, if it has the role of a layer scale."""
        if name not in MULTIPLYING:
            return None
        carried = [self._sketch.carried(x) for x in node.all_input_nodes]
        params = [param for value in carried if isinstance(value, Derived) for param in value.params]
        of_layer = len(params) == 1 and self._sketch.roles.get(params[0]) == LAYER_SCALE
        return params[0] if of_layer else None

    def _join(self, node: fx.Node) -> None:
        """Parts of one node, joined again."""
        flows = self._flows(node)
        operands = [self._of(x) for x in flows]
        if not _joins_channels(node) or any(len(terms) != 1 for terms in operands):
            self._unknown.add(node)
            return
        parts = (_bounded(terms[0], _shape(x)[1]) for terms, x in zip(operands, flows, strict=True))
        self._terms[node] = (_merged(chain.from_iterable(parts)),)

    def _cut(self, node: fx.Node, name: str) -> None:
        x: Any = argument(node, 0, "input")
        terms = list(self._of(x)) if x in self._flows(node) else []
        ranges = _ranges(node, name, _shape(x)) if len(terms) == 1 and len(_shape(x)) in _DIMENSIONS else None
        if ranges is None:
            self._unknown.add(node)
            return
        width = _shape(x)[1]
        parts = _bounded(terms[0], width)
        found = [_sliced(parts, first, end) for first, end in ranges]
        if isinstance(layout(node), (tuple, list)):
            self._several[node] = found
        elif ranges != [(0, width)]:
            self._terms[node] = (found[0],)
        elif x in self._terms:
            self._terms[node] = tuple(terms)


def _shape(node: fx.Node) -> tuple[int, ...]:
    """Of the tensor that a node gives; of one that gives anything else ()."""
    return tuple(getattr(layout(node), "shape", ()))


def _sizes(node: fx.Node) -> tuple[int, ...]:
    """The first two of them."""
    return _shape(node)[:2]


def _joins_channels(node: fx.Node) -> bool:
    """Whether tensors are joined along the channels."""
    return argument(node, 1, "dim", 0) in (1, 1 - len(_shape(node)))


def _ranges(node: fx.Node, name: str, shape: Sequence[int]) -> list[tuple[int, int]] | None:
    """First channel and the one after the last of what a call cuts out; None if it does anything else."""
    if name == "__getitem__":
        return _indexed(node.args[1], shape)
    dim, outputs = argument(node, 1 if name in ("narrow", "slice") else 2, "dim", 0), layout(node)
    several = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    if dim not in (1, 1 - len(shape)):
        whole = all(output.shape[:2] == shape[:2] for output in several)
        return [(0, shape[1])] * len(several) if whole else None
    if outputs is several:
        return list(pairwise(accumulate((output.shape[1] for output in several), initial=0)))
    first = argument(node, 2, "start", 0) or 0
    first = first + shape[1] if isinstance(first, int) and first < 0 else first
    if not isinstance(first, int) or (name == "slice" and argument(node, 4, "step", 1) != 1):
        return None
    return [(first, first + several[0].shape[1])]


def _indexed(index: Any, shape: Sequence[int]) -> list[tuple[int, int]] | None:
    """The same of x[index]."""
    items = index if isinstance(index, tuple) else (index,)
    if ... in items:
        place = items.index(...)
        items = (*items[:place], *(slice(None),) * (len(shape) + 1 - len(items)), *items[place + 1 :])
    items = (*items, slice(None))
    if items[0] != slice(None) or not all(isinstance(item, (int, slice)) for item in items):
        return None
    channels = items[1]
    bounds = (channels.start, channels.stop, channels.step) if isinstance(channels, slice) else ("", "", "")
    if any(bound is not None and not isinstance(bound, int) for bound in bounds):
        return None
    first, end, step = slice(*bounds).indices(shape[1])
    return [(first, end)] if step == 1 and first < end else None


def _bounded(parts: Parts, width: int) -> Parts:
    """The same with bounds for what is whole."""
    return tuple(part if part.cut else part._replace(cut=(0, width, width)) for part in parts)


def _merged(parts: Iterable[Part]) -> Parts:
    """The same with those in one that follow on each other."""
    found: list[Part] = []
    for part in parts:
        before = found[-1] if found else None
        if (
            before and before.cut and part.cut and before.cut[1] == part.cut[0]
            and before == part._replace(cut=before.cut)
        ):  # fmt: skip
            found[-1] = part._replace(cut=(before.cut[0], *part.cut[1:]))
        else:
            found.append(part)
    if len(found) == 1 and (cut := found[0].cut) and cut[:2] == (0, cut[2]):
        return (found[0]._replace(cut=None),)
    return tuple(found)


def _sliced(parts: Parts, first: int, end: int) -> Parts:
    """The channels from `first` to `end` of parts side by side."""
    found, start = [], 0
    for part in parts:
        low, high, of = part.cut or (0, 0, 0)
        a, b = max(first - start, 0), min(end - start, high - low)
        if a < b:
            found.append(part._replace(cut=(low + a, low + b, of)))
        start += high - low
    return tuple(found)
