"""The graph of an architecture, written from its specification: what tracing finds, without a network."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ghn_init._graph.graph import Graph, Node
from ghn_init.deepnets._space import LARGE_INPUT

if TYPE_CHECKING:
    from ghn_init.deepnets._architecture import Architecture


def graph_of(arch: Architecture, num_classes: int, image_size: int) -> Graph:
    """See `Architecture.graph`."""
    return _GraphWriter(arch, image_size).write(num_classes)


class _GraphWriter:
    """Follows the used part of a network and writes a node for every operation, in the order of execution.

    A state is represented by the number of the node that it comes from.
    """

    def __init__(self, arch: Architecture, image_size: int) -> None:
        self.arch, self.large = arch, image_size >= LARGE_INPUT
        self.sides = arch.sides(image_size)
        self.nodes = [Node("input")]
        self.edges: list[tuple[int, int]] = []

    def add(self, kind: str, *sources: int, shape: tuple[int, ...] | None = None, param: str = "") -> int:
        """Write a node, of the parameter `param` if it has one; returns its number."""
        self.nodes.append(Node(kind, f"{param}.weight" if param else None, shape))
        return self.reached(*sources)

    def reached(self, *sources: int) -> int:
        """The edges to the newest node; returns its number."""
        self.edges += [(source, len(self.nodes) - 1) for source in sources]
        return len(self.nodes) - 1

    def join(self, kind: str, sources: set[int]) -> int:
        """A sum or concatenation, which is no node where all comes from one node."""
        return self.add(kind, *sources) if len(sources) > 1 else next(iter(sources))

    def norm(self, kind: str, name: str, at: int, width: int) -> int:
        """A norm."""
        self.nodes.append(Node(kind, f"{name}.weight", (width,), f"{name}.bias"))
        return self.reached(at)

    def normed(self, name: str, at: int, width: int) -> int:
        """A batch norm, if the architecture has them."""
        return self.norm("bn", name, at, width) if self.arch.norm else at

    def conv(self, name: str, at: int, c_in: int, c_out: int, kernel: int) -> int:
        """Convolution, norm."""
        at = self.add("conv", at, shape=(c_out, c_in, kernel, kernel), param=f"{name}.0")
        return self.normed(f"{name}.1", at, c_out)

    def depthwise(self, kind: str, name: str, at: int, width: int, kernel: int) -> int:
        """Depthwise convolution, 1x1 convolution, norm."""
        at = self.add(kind, at, shape=(width, 1, kernel, kernel), param=f"{name}.0")
        at = self.add("conv", at, shape=(width, width, 1, 1), param=f"{name}.1")
        return self.normed(f"{name}.2", at, width)

    def linear(self, name: str, at: int, c_in: int, c_out: int) -> int:
        """A linear layer with a bias."""
        at = self.add("conv", at, shape=(c_out, c_in), param=name)
        self.nodes.append(Node("bias", f"{name}.bias", (c_out,)))
        return self.reached(at)

    def halved(self, name: str, at: int, c_in: int, c_out: int) -> int:
        """A factorised reduction."""
        even = self.add("conv", at, shape=(c_out // 2, c_in, 1, 1), param=f"{name}.even")
        odd = self.add("conv", at, shape=(c_out - c_out // 2, c_in, 1, 1), param=f"{name}.odd")
        return self.normed(f"{name}.norm.0", self.add("concat", even, odd), c_out)

    def attention(self, name: str, at: int, width: int) -> int:
        """A transformer block."""
        normed = self.norm("ln", f"{name}.norm1", at, width)
        qkv = self.add("conv", normed, shape=(3 * width, width), param=f"{name}.qkv")
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
            row = self.add("conv", at, shape=(width, width, 1, 7), param=f"{name}.0")
            column = self.add("conv", row, shape=(width, width, 7, 1), param=f"{name}.1")
            return self.normed(f"{name}.2", column, width)
        if kind == "conv":
            return self.conv(name, at, width, width, kernel)
        if kind == "dil_conv":
            return self.depthwise(kind, name, at, width, kernel)
        if kind == "sep_conv":
            first = self.depthwise(kind, f"{name}.0", at, width, kernel)
            return self.depthwise(kind, f"{name}.2", first, width, kernel)
        return self.add(kind, at, shape=(1, 1, kernel, kernel))

    def write(self, num_classes: int) -> Graph:
        """The whole graph."""
        arch, plan = self.arch, self.arch.plan
        stem_width, older, newer = self.stem()
        widths, width = (stem_width, stem_width), arch.C
        halved = arch.stem_type == 1 and not arch.transformer
        for index in range(arch.n_cells):
            reduction = index in plan.reductions
            width *= arch.C_mult if reduction else 1
            out = self.cell(index, (older, newer), widths, width, halved=halved) if plan.used[index] else -1
            older, newer, halved = newer, out, reduction and not arch.transformer
            widths = widths[1], width * len(plan.cells[index].concat)
        self.head(newer, widths[1], num_classes)
        return Graph(tuple(self.nodes), tuple(sorted(self.edges)), name="Network")

    def stem(self) -> tuple[int, int, int]:
        """Width of the stem's outputs, the older and the newer one."""
        arch, c = self.arch, self.arch.C
        if arch.transformer:
            kernel = 16 if self.large else 3
            patches = self.add("conv", 0, shape=(c, 3, kernel, kernel), param="stem.conv")
            self.nodes.append(Node("pos_enc", "stem.pos_enc", (1, c, self.sides[0], self.sides[0])))
            both = self.add("sum", patches, self.reached())
            return c, both, both
        if arch.stem_type == 0:
            c *= 3 if arch.preproc and not self.large else 1
            both = self.conv("stem.conv", 0, 3, c, arch.ks)
            both = self.add("max_pool", both, shape=(1, 1, 3, 3)) if arch.stem_pool else both
            return c, both, both
        older = self.conv("stem.conv1", self.conv("stem.conv0", 0, 3, c // 2, arch.ks), c // 2, c, 3)
        return c, older, self.conv("stem.conv2", older, c, c, 3) if arch.plan.uses_stem[1] else -1

    def cell(
        self, index: int, inputs: tuple[int, int], widths: tuple[int, int], width: int, *, halved: bool
    ) -> int:
        """A cell on its older and newer input; -1 stands for what is missing."""
        arch = self.arch
        plan, reduction = arch.plan.cells[index], index in arch.plan.reductions
        states = list(inputs)
        for position in (0, 1) if arch.preproc else ():
            if plan.uses[position]:
                name, at, c_in = f"cells.{index}.preprocess.{position}", states[position], widths[position]
                factorised = halved and position == 0
                states[position] = (
                    self.halved(name, at, c_in, width) if factorised else self.conv(name, at, c_in, width, 1)
                )
        edges = arch.genotype.edges(reduction=reduction)
        for terms in plan.terms:
            sources = set()
            for edge in terms:
                operation, state = edges[edge]
                stride = 2 if reduction and state < 2 and not arch.transformer else 1
                name = f"cells.{index}.operations.{edge}"
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
