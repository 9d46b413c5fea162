"""The graph of an architecture, written from its specification: what tracing finds, without a network."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ghn_init._graph.graph import Graph, Node
from ghn_init.deepnets._shapes import cell_shapes, stem_width
from ghn_init.deepnets._space import LARGE_INPUT

if TYPE_CHECKING:
    from ghn_init.deepnets._architecture import Architecture
    from ghn_init.deepnets._shapes import CellShape


def graph_of(arch: Architecture, num_classes: int, image_size: int) -> Graph:
    """See `Architecture.graph`."""
    found = _Walk(arch, num_classes, image_size)
    return Graph(tuple(Node(*values) for values in found.nodes), tuple(sorted(found.edges)), name="Network")


def num_nodes(arch: Architecture) -> int:
    """Nodes of the graph, of which there are as many for images of every size."""
    return len(_Walk(arch, 10, 32).nodes)


class _Walk:
    """Follows the used part of a network and notes a node for every operation, in the order of execution.

    A state is represented by the number of the node that it comes from.

    Attributes:
        nodes: What each `Node` is made of: type, parameter, shape and bias.
        edges: Numbers of the nodes at both ends.
    """

    def __init__(self, arch: Architecture, num_classes: int, image_size: int) -> None:
        self.arch, self.image_size = arch, image_size
        self.sides = arch.sides(image_size)
        self.nodes: list[tuple[str, str | None, tuple[int, ...] | None, str | None]] = []
        self.edges: list[tuple[int, int]] = []
        self.add("input")
        shapes, features = cell_shapes(arch, image_size)
        older, newer = self.stem()
        for index, (shape, used) in enumerate(zip(shapes, arch.plan.used, strict=True)):
            older, newer = newer, self.cell(f"cells.{index}", shape, older, newer) if used else -1
        self.head(newer, features, num_classes)

    def add(
        self,
        kind: str,
        *sources: int,
        shape: tuple[int, ...] | None = None,
        param: str | None = None,
        bias: str | None = None,
    ) -> int:
        """Note a node; returns its number."""
        self.nodes.append((kind, param, shape, bias))
        self.edges += [(source, len(self.nodes) - 1) for source in sources]
        return len(self.nodes) - 1

    def join(self, kind: str, sources: set[int]) -> int:
        """A sum or concatenation, which is no node where all comes from one node."""
        return self.add(kind, *sources) if len(sources) > 1 else next(iter(sources))

    def norm(self, kind: str, name: str, at: int, width: int) -> int:
        """A norm."""
        return self.add(kind, at, shape=(width,), param=f"{name}.weight", bias=f"{name}.bias")

    def normed(self, name: str, at: int, width: int) -> int:
        """A batch norm, if the architecture has them."""
        return self.norm("bn", name, at, width) if self.arch.norm else at

    def conv(self, name: str, at: int, c_in: int, c_out: int, kernel: int) -> int:
        """Convolution, norm."""
        at = self.add("conv", at, shape=(c_out, c_in, kernel, kernel), param=f"{name}.0.weight")
        return self.normed(f"{name}.1", at, c_out)

    def depthwise(self, kind: str, name: str, at: int, width: int, kernel: int) -> int:
        """Depthwise convolution, 1x1 convolution, norm."""
        at = self.add(kind, at, shape=(width, 1, kernel, kernel), param=f"{name}.0.weight")
        at = self.add("conv", at, shape=(width, width, 1, 1), param=f"{name}.1.weight")
        return self.normed(f"{name}.2", at, width)

    def linear(self, name: str, at: int, c_in: int, c_out: int) -> int:
        """A linear layer with a bias."""
        at = self.add("conv", at, shape=(c_out, c_in), param=f"{name}.weight")
        return self.add("bias", at, shape=(c_out,), param=f"{name}.bias")

    def halved(self, name: str, at: int, c_in: int, c_out: int) -> int:
        """A factorised reduction."""
        even = self.add("conv", at, shape=(c_out // 2, c_in, 1, 1), param=f"{name}.even.weight")
        odd = self.add("conv", at, shape=(c_out - c_out // 2, c_in, 1, 1), param=f"{name}.odd.weight")
        return self.normed(f"{name}.norm.0", self.add("concat", even, odd), c_out)

    def attention(self, name: str, at: int, width: int) -> int:
        """A transformer block."""
        normed = self.norm("ln", f"{name}.norm1", at, width)
        qkv = self.add("conv", normed, shape=(3 * width, width), param=f"{name}.qkv.weight")
        at = self.add("sum", at, self.linear(f"{name}.out", self.add("msa", qkv), width, width))
        normed = self.norm("ln", f"{name}.norm2", at, width)
        hidden = self.linear(f"{name}.fc1", normed, width, width)
        return self.add("sum", at, self.linear(f"{name}.fc2", hidden, width, width))

    def gate(self, name: str, at: int, width: int) -> int:
        """Squeeze and excitation."""
        squeezed = self.linear(f"{name}.squeeze", at, width, width // 2)
        return self.add("cse", at, self.linear(f"{name}.excite", squeezed, width // 2, width))

    def operation(self, operation: str, name: str, at: int, width: int, stride: int) -> int:
        """The operation `operation`, width -> width channels, whose module is `name`."""
        kind, _, size = operation.rpartition("_")
        kernel = int(size[0]) if size[:1].isdigit() else 0
        if operation == "skip_connect":
            return self.halved(name, at, width, width) if stride == 2 else at
        if operation == "msa":
            return self.attention(name, at, width)
        if operation == "cse":
            return self.gate(name, at, width)
        if operation == "conv_7x1_1x7":
            row = self.add("conv", at, shape=(width, width, 1, 7), param=f"{name}.0.weight")
            column = self.add("conv", row, shape=(width, width, 7, 1), param=f"{name}.1.weight")
            return self.normed(f"{name}.2", column, width)
        if kind == "conv":
            return self.conv(name, at, width, width, kernel)
        if kind == "dil_conv":
            return self.depthwise(kind, name, at, width, kernel)
        if kind == "sep_conv":
            first = self.depthwise(kind, f"{name}.0", at, width, kernel)
            return self.depthwise(kind, f"{name}.2", first, width, kernel)
        return self.add(kind, at, shape=(1, 1, kernel, kernel))

    def stem(self) -> tuple[int, int]:
        """The older and the newer input of the first cell."""
        arch, c, side = self.arch, stem_width(self.arch, self.image_size), self.sides[0]
        if arch.transformer:
            kernel = 16 if self.image_size >= LARGE_INPUT else 3
            patches = self.add("conv", 0, shape=(c, 3, kernel, kernel), param="stem.conv.weight")
            encoding = self.add("pos_enc", shape=(1, c, side, side), param="stem.pos_enc")
            both = self.add("sum", patches, encoding)
            return both, both
        if arch.stem_type == 0:
            both = self.conv("stem.conv", 0, 3, c, arch.ks)
            both = self.add("max_pool", both, shape=(1, 1, 3, 3)) if arch.stem_pool else both
            return both, both
        older = self.conv("stem.conv1", self.conv("stem.conv0", 0, 3, c // 2, arch.ks), c // 2, c, 3)
        return older, self.conv("stem.conv2", older, c, c, 3) if arch.plan.uses_stem[1] else -1

    def cell(self, path: str, shape: CellShape, older: int, newer: int) -> int:
        """A cell on its two inputs; -1 stands for what is missing."""
        plan, width, states = shape.plan, shape.width, [older, newer]
        for position, c_in in enumerate(shape.widths):
            if self.arch.preproc and plan.uses[position]:
                name, at = f"{path}.preprocess.{position}", states[position]
                factorised = shape.halved and position == 0
                states[position] = (
                    self.halved(name, at, c_in, width) if factorised else self.conv(name, at, c_in, width, 1)
                )
        for terms in plan.terms:
            sources = set()
            for edge in terms:
                operation, state = shape.edges[edge]
                stride = shape.stride if state < 2 else 1
                name = f"{path}.operations.{edge}"
                sources.add(self.operation(operation, name, states[state], width, stride))
            states.append(self.join("sum", sources) if sources else -1)
        return self.join("concat", {states[state] for state in plan.concat if plan.terms[state - 2]})

    def head(self, at: int, features: int, num_classes: int) -> None:
        """Pooling and one or two linear layers."""
        arch = self.arch
        at = self.add("glob_avg", at) if arch.glob_avg else at
        features *= 1 if arch.glob_avg else self.sides[1] ** 2
        if arch.fc_layers == 2:
            at, features = self.linear("head.0", at, features, arch.fc_dim), arch.fc_dim
        self.linear(f"head.{3 * (arch.fc_layers - 1)}", at, features, num_classes)
