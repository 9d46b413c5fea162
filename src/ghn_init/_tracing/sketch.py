"""From a `torch.fx.Graph` to a GHN's graph: one pass over its nodes, a rule for every function that matters.

A rule gets an `Operation`, one fx node with all that is around it, adds the nodes of the GHN's graph that it
stands for (`Sketch.add_node`), and says what the fx node's output carries: `Flow`, `Derived` or `CONSTANT`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, TypeVar

from torch.fx.node import map_arg

from ghn_init._graph.graph import UNREACHED, UNUSED, Graph, Node, UnmatchedParameter
from ghn_init._tracing.arguments import argument, function_name, layout, shape_of
from ghn_init._tracing.carried import CONSTANT, Carried, Derived, Flow, merged
from ghn_init._tracing.channels import Channels
from ghn_init._tracing.effects import rectified
from ghn_init._tracing.functions import (
    ADDING,
    DEVICE_MOVES,
    DISTORTING,
    DIVIDING,
    FILLED,
    FROM_NOTHING,
    HOMOGENEOUS,
    LENDING,
    MEASURING,
    MULTIPLYING,
    RESCALING,
    STANDARDISING,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import torch
    from torch import fx

_MEASURES = {"var": "variance", "std": "deviation", "var_mean": "variance", "std_mean": "deviation"}
"""Functions that measure how weights vary -> what they give, see `Derived.measure`."""

_ROOTS = {
    ("sqrt", "variance"): "deviation", ("rsqrt", "variance"): "inverse",
    ("reciprocal", "deviation"): "inverse", ("__rdiv__", "deviation"): "inverse",
}  # fmt: skip
"""A function and what it is given -> what it gives."""

_NOTHING = 1e-2
"""A number that is added to a deviation lest one divide by zero is no more."""

_OF_THE_FIRST = DEVICE_MOVES | LENDING
"""Functions that pass on what their first argument carries, whatever else they get."""


@dataclass(slots=True)
class Operation:
    """One call of a torch function, in an fx graph.

    Attributes:
        node: The fx node: its `args`, its `users` and their neighbours are all there to be looked at.
        name: The function's name.
        sketch: The graph as far as it is drawn.
    """

    node: fx.Node
    name: str
    sketch: Sketch

    @property
    def args(self) -> tuple[Any, ...]:
        """The arguments by position."""
        return self.node.args

    def arg(self, index: int, name: str, default: Any = None) -> Any:
        """The argument at position `index` or of this keyword."""
        return argument(self.node, index, name, default)

    def carried(self, value: object) -> Carried:
        """What an argument carries; one that is no node is constant."""
        return self.sketch.carried(value)

    def shape(self, node: fx.Node) -> torch.Size:
        """The shape of an argument."""
        return shape_of(node)

    def inputs(self) -> list[Carried]:
        """What each of the node's inputs carries."""
        return [self.sketch.carried(node) for node in self.node.all_input_nodes]

    def operands(self) -> list[fx.Node]:
        """The node's inputs in the order of its arguments, one that is there twice twice."""
        found: list[fx.Node] = []
        map_arg((self.node.args, self.node.kwargs), found.append)
        return found

    def passed_on(self) -> Carried:
        """The rule of every function that has no node: its output carries what its inputs do."""
        inputs = self.inputs()
        value = merged(inputs)
        if isinstance(value, Flow):
            for other in inputs:
                if isinstance(other, Derived):
                    self.sketch.note_role(other.params, f"used by {self.name.strip('_')}")
        return value


Rule = Callable[[Operation], "Carried | tuple[Carried, ...]"]

RuleT = TypeVar("RuleT", bound=Rule)

RULES: Final[dict[str, Rule]] = {}
"""The torch function's `__name__` -> its rule."""


def rule(*names: str) -> Callable[[RuleT], RuleT]:
    """Decorator: this is the rule of the torch functions called `names`."""

    def register(function: RuleT) -> RuleT:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


class Sketch:
    """A GHN's graph while it is drawn.

    Args:
        shapes: Name and shape of every parameter of the model.

    Attributes:
        nodes: The nodes so far; node 0 is the input.
        predecessors: For each of them where its edges come from.
        roles: What parameters without a node were found to be.
        rectified: The nodes whose output goes through an activation, see `Graph`.
        enlarged: The nodes whose output is enlarged, see `Graph`.
        rescaled: The nodes whose weight is rescaled, see `Graph`.
        absolute: The nodes behind which a factor is not passed on, see `Graph`.
        bare: The paths of batch norms without a weight, see `Graph`.
        grouped: The group norms of feature maps, see `Graph`.
        single: The poolings that are means over all positions, see `Graph`.
        cropped: Of the filters of which much lies beside the image, what lies in it, see `Graph`.
        channels: Which channels tensors carry.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.nodes: list[Node] = [Node("input")]
        self.predecessors: list[tuple[int, ...]] = [()]
        self.roles: dict[str, str] = {}
        self.rectified: set[int] = set()
        self.enlarged: set[int] = set()
        self.rescaled: dict[int, float | None] = {}
        self.absolute: set[int] = set()
        self.bare: dict[int, str] = {}
        self.grouped: set[int] = set()
        self.single: set[int] = set()
        self.cropped: dict[int, tuple[tuple[tuple[int, int], ...], ...]] = {}
        self.channels = Channels(self)
        self.shapes = shapes
        self._carried: dict[fx.Node, Carried | tuple[Carried, ...]] = {}
        self._ends: tuple[int, ...] | None = None

    def carried(self, node: object) -> Carried:
        """What the output of an fx node carries; of several outputs, what they carry together."""
        value = self._carried.get(node, CONSTANT)  # type: ignore[call-overload]
        return merged(value) if isinstance(value, tuple) else value

    def add_node(self, node: Node, sources: Iterable[int]) -> int:
        """Append `node` with edges from `sources`; returns its index."""
        self.nodes.append(node)
        self.predecessors.append(tuple(sorted(set(sources))))
        return len(self.nodes) - 1

    def note_role(self, params: Iterable[str], role: str) -> None:
        """Say what parameters without a node are; the first use decides."""
        for param in params:
            self.roles.setdefault(param, role)

    def draw(self, graph: fx.Graph) -> None:
        """Go over the nodes of `graph` in their order, each by the rule of its function."""
        carried, shapes = self._carried, self.shapes
        for node in graph.nodes:
            op = node.op
            if op == "get_attr":
                name = node.meta.get("parameter", node.target)
                if name in shapes:
                    carried[node] = Derived((name,))
            elif op == "placeholder":
                carried[node] = Flow((0,))
            elif op == "output":
                value = merged(map(self.carried, node.all_input_nodes))
                self._ends = value.sources if isinstance(value, Flow) else None
            else:
                value = self._called(node)
                name = node.meta.get("parameter")
                carried[node] = value if name not in shapes else Derived((name,))
                if "base" in node.meta:  # its first argument is a view of this, which has changed too
                    changed = value if isinstance(value, (Flow, Derived)) else merged(value)
                    carried[node.meta["base"]] = merged((self.carried(node.meta["base"]), changed))

    def _called(self, node: fx.Node) -> Carried | tuple[Carried, ...]:
        """What a call carries; its nodes are added."""
        if node.op == "call_module":
            value = RULES["call_module"](Operation(node, "call_module", self))
            if isinstance(value, Flow):  # nobody knows what the user's layer makes of a factor
                self.absolute.update(value.sources)
            return value
        name = function_name(node)
        args: Any = node.args
        if name in FROM_NOTHING or name in FILLED:
            return CONSTANT
        if name == "__get__":  # x.T, x.data
            return self.carried(args[0])
        if name in _OF_THE_FIRST:
            value = self.carried(args[0])
            self.channels.follow(node, name, value, None)
            return value
        if name == "__getitem__" and isinstance(layout(args[0]), (tuple, list)):
            several, index = args
            self.channels.one_of(several, index, node)
            return self._one_of(several, index)
        operation = Operation(node, name, self)
        found = RULES.get(name)
        count = len(self.nodes)
        if node.meta.get("known"):  # indices and counts: no activations, whatever is computed with them
            value = merged(operation.inputs())
        else:
            value = operation.passed_on() if found is None else found(operation)
        if name == "__setitem__":
            self._carried[args[0]] = value
        if isinstance(value, tuple) and name in _MEASURES:
            value = (_computed(operation, value[0]), value[1]) if isinstance(value[0], Derived) else value
        elif isinstance(value, Derived) and value.params:
            value = _computed(operation, value)
        self.rectified |= rectified(self, node, name, value)
        if len(self.nodes) == count and isinstance(value, Flow) and not _passes_factors(operation):
            self.absolute.update(value.sources)
        self.channels.follow(node, name, value, count if len(self.nodes) > count else None)
        return value

    def _one_of(self, several: fx.Node, index: Any) -> Carried:
        """What one of several outputs carries."""
        value = self._carried.get(several, CONSTANT)
        return value[index] if isinstance(value, tuple) and isinstance(index, int) else self.carried(several)

    # -- the result -----------------------------------------------------------------------------

    def graph(self, name: str) -> Graph:
        """The nodes that reach the output, renumbered, as a `Graph`.

        All are taken to where the recording ended before the forward pass did, and where no activation was
        found in its output.
        """
        live = self._live(range(len(self.nodes)) if self._ends is None else self._ends)
        number = {old: new for new, old in enumerate(sorted(live))}
        nodes = tuple(self.nodes[old] for old in sorted(live))
        edges = tuple(sorted((number[u], number[v]) for v in live for u in self.predecessors[v]))
        covered = _params_of(nodes)
        roles = self.roles | dict.fromkeys(_params_of(self.nodes), UNREACHED)
        unmatched = tuple(
            UnmatchedParameter(param, shape, roles.get(param, UNUSED))
            for param, shape in self.shapes.items()
            if param not in covered
        )
        rectified, enlarged, grouped, single = (
            frozenset(number[old] for old in live & told)
            for told in (self.rectified, self.enlarged, self.grouped, self.single)
        )
        ends = live if self._ends is None else live.intersection(self._ends)
        absolute = frozenset(number[old] for old in ends | (live & self.absolute))
        rescaled = {number[old]: rms for old, rms in self.rescaled.items() if old in live}
        bare = {number[old]: path for old, path in self.bare.items() if old in live}
        cropped = {number[old]: rows for old, rows in self.cropped.items() if old in live}
        reads = {
            number[old]: tuple(
                tuple(part._replace(node=number[part.node]) for part in parts) for parts in operands
            )
            for old, operands in self.channels.reads.items()
            if old in live
        }
        return Graph(
            nodes, edges, unmatched, name, rectified, enlarged, cropped, reads, rescaled, absolute, bare,
            grouped, single,
        )  # fmt: skip

    def all_used(self) -> bool:
        """Whether every parameter was used."""
        return self.shapes.keys() <= _params_of(self.nodes) | self.roles.keys()

    def _live(self, ends: Iterable[int]) -> set[int]:
        """Indices of the nodes from which `ends` can be reached; the input is always one."""
        live = {0}
        stack = list(ends)
        while stack:
            node = stack.pop()
            if node not in live:
                live.add(node)
                stack.extend(self.predecessors[node])
        return live


def _passes_factors(op: Operation) -> bool:
    """Whether what a call gives is as many times larger as the one activation that it gets."""
    if op.name.rstrip("_") in HOMOGENEOUS or op.name in HOMOGENEOUS:
        return True
    flows = [isinstance(op.carried(operand), Flow) for operand in op.operands()]
    return sum(flows) == 1 and (op.name in MULTIPLYING or (op.name in DIVIDING and flows[0]))


def _computed(op: Operation, derived: Derived) -> Derived:
    """What is `derived` from parameters alone, once it went through a function."""
    name, before = op.name.rstrip("_") if not op.name.startswith("__") else op.name, _measure_of_operand(op)
    measure = _measure(op, name, before)
    if name in RESCALING:
        derived = replace(derived, rescaled=dict.fromkeys(derived.params, _new_scale(op, derived)))
    if _is_measure(op, name):
        derived = replace(derived, distorted={})
    elif name in DISTORTING and not before:
        derived = replace(derived, distorted=dict.fromkeys(derived.params, name.strip("_")))
    return derived if measure == derived.measure else replace(derived, measure=measure)


def _measure_of_operand(op: Operation) -> str:
    """What the only operand that is computed from parameters says of them; "" where there are several."""
    values = [op.carried(operand) for operand in op.operands()]
    derived = [value for value in values if isinstance(value, Derived) and value.params]
    return derived[0].measure if len(derived) == 1 else ""


def _is_measure(op: Operation, name: str) -> bool:
    """Whether a function says something of a weight; `max` and `min` of two tensors give the one or other."""
    return name in MEASURING and not (name in ("max", "min") and len(op.operands()) > 1)


def _measure(op: Operation, name: str, before: str) -> str:
    """What the result of a function says of the parameters that it is derived from, see `Derived`."""
    if name in _MEASURES:
        return _MEASURES[name]
    if _is_measure(op, name):
        return "size"
    if not before or name in HOMOGENEOUS:
        return before
    numbers = [arg for arg in (*op.args, *op.node.kwargs.values()) if isinstance(arg, (int, float))]
    if name in ADDING or name in ("clamp", "clamp_min"):  # 1e-5 more is nothing
        return before if len(op.operands()) == 1 and all(abs(x) <= _NOTHING for x in numbers) else "size"
    if name in ("pow", "__pow__") and len(numbers) == 1:
        name = {0.5: "sqrt", -0.5: "rsqrt", -1: "reciprocal"}.get(numbers[0], name)
    return _ROOTS.get((name, before), "size")


def _is_standardised(op: Operation) -> bool:
    """Whether a weight is divided by its own deviation."""
    values = [op.carried(operand) for operand in op.operands()]
    measures = [value.measure for value in values if isinstance(value, Derived)]
    if len(measures) != 2 or len({value.params for value in values if isinstance(value, Derived)}) != 1:
        return False
    return (op.name in DIVIDING and measures == ["", "deviation"]) or (
        op.name in MULTIPLYING and sorted(measures) == ["", "inverse"]
    )


def _new_scale(op: Operation, derived: Derived) -> float | None:
    """The root mean square of a weight behind one of `RESCALING`, see `Derived`.

    Standardised weights have 1, times a number if one follows.
    """
    if op.name in STANDARDISING:
        return 1.0 if len(op.operands()) == 1 else None
    if op.name == "sign" or _is_standardised(op):
        return 1.0
    known = set(derived.rescaled.values())
    numbers = [arg for arg in op.args if isinstance(arg, (int, float))]
    if len(numbers) != 1 or len(known) != 1 or (rms := known.pop()) is None:
        return None
    if op.name in MULTIPLYING:
        return rms * numbers[0]
    return rms / numbers[0] if op.name in DIVIDING and op.args[1] is numbers[0] and numbers[0] else None


def _params_of(nodes: Iterable[Node]) -> set[str]:
    """Names of the parameters that `nodes` stand for."""
    return {name for node in nodes for name in (node.param, node.bias) if name is not None}
