"""Recording a model's forward pass without computing it.

`Recorder` is a `TorchFunctionMode`: while it is active, every torch function that the model calls
passes through it. Activations are meta tensors, so shapes are real and nothing is computed; the
model's own parameters and buffers are replaced, argument by argument, by meta tensors of the same
shape, so the model itself is neither read nor written. For every tensor the recorder keeps what it
carries (`Flow`, `Derived` or `CONSTANT`), and the rules of `_ops` turn the functions that matter into
graph nodes as they pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ghn_init._graph.graph import Graph, Node, UnmatchedParameter
from ghn_init._network.nested import replaced, tensors_in
from ghn_init._tracing.kernels import Memo

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from ghn_init._tracing.rules import Rule


@dataclass(frozen=True, slots=True)
class Flow:
    """A tensor that depends on the network's input.

    Attributes:
        sources: The graph nodes whose outputs it carries, ascending. Operations that have no node
            pass their inputs' sources on: that is how they are removed and their neighbours linked.
        role: "", or the part of an operation written by hand that it is. Of attention: "scores" (query
            times key) or "attention" (scores after the softmax). Of a normalisation: "square", "mean",
            "moment" (the mean of squares, or what is computed from it), "batch moment" (over the
            examples too), "normalised" (divided by a moment).
    """

    sources: tuple[int, ...]
    role: str = ""


@dataclass(frozen=True, slots=True)
class Derived:
    """A tensor computed from parameters and constants alone.

    Attributes:
        params: The parameters' names.
        shifted: A number was added, as in (1 + weight): the parameter is not the weight itself.
    """

    params: tuple[str, ...]
    shifted: bool = False


CONSTANT: Final = Derived(())
"""What a tensor carries that depends on neither the input nor a parameter."""

Carried = Flow | Derived

_PLAIN: Final = frozenset({
    "size", "dim", "ndimension", "numel", "nelement", "stride", "is_contiguous", "is_floating_point",
    "is_complex", "is_nonzero", "get_device", "element_size", "storage_offset", "data_ptr", "requires_grad_",
    "__len__", "__repr__", "__format__", "__hash__", "is_same_size", "register_hook",
})  # fmt: skip
"""Functions that read what a tensor is and make none: called as they are."""

_VALUES: Final = frozenset({
    "item", "tolist", "__bool__", "__int__", "__float__", "__index__", "__complex__", "numpy", "__array__",
    "__contains__", "equal", "allclose",
})  # fmt: skip
"""Functions that read a tensor's values and make none."""

_DEVICE_MOVES: Final = frozenset({"cpu", "cuda", "xpu", "mps"})

_FROM_NOTHING: Final = frozenset({
    "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like",
    "new_zeros", "new_ones", "new_empty", "new_full", "new_tensor",
})  # fmt: skip
"""Functions that take a shape from their tensor argument, not its values."""

_HOST_FACTORIES: Final = frozenset({"arange", "linspace", "tensor", "as_tensor", "eye", "scalar_tensor"})
"""Small constants that code may go on to read: made on the CPU even where it asks for x.device."""

_FILLED: Final = frozenset({
    "ones", "zeros", "full", "ones_like", "zeros_like", "full_like", "new_ones", "new_zeros", "new_full",
})  # fmt: skip
"""Constants that code may go on to read, if they are small: masks above all."""

_SMALL: Final = 2**16
"""Elements up to which a filled constant is made on the CPU."""

_BUFFER: Final = 16
"""Elements up to which a buffer's values can be read."""


class UnknownValueError(Exception):
    """The forward pass reads a value of an activation, which has none while it is recorded."""


class Recorder(TorchFunctionMode):
    """Collects the nodes and edges of everything that runs under it.

    Args:
        params: Name and tensor of every parameter of the model, ties once.
        rules: The function's name -> what it is in a graph; `ghn_init._tracing.rules.RULES`.
    """

    def __init__(self, params: Mapping[str, Tensor], rules: Mapping[str, Rule]) -> None:
        super().__init__()
        self.nodes: list[Node] = [Node("input")]
        self.predecessors: list[tuple[int, ...]] = [()]
        self.roles: dict[str, str] = {}
        self.shapes = {name: tuple(param.shape) for name, param in params.items()}
        self.memo = Memo()
        self._names = {id(param): name for name, param in params.items()}
        self._rules = rules
        # Keyed by id; the tensor is kept beside the value so that no id is used twice.
        self._carried: dict[int, tuple[Tensor, Carried]] = {}
        self._stand_ins: dict[int, tuple[Tensor, Tensor]] = {}
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}
        self._known: set[int] = set()

    # -- what tensors carry ---------------------------------------------------------------------

    def carried(self, tensor: object) -> Carried:
        """What `tensor` carries; anything that is not a recorded tensor is constant."""
        entry = self._carried.get(id(tensor))
        return entry[1] if entry is not None else CONSTANT

    def carry(self, output: object, value: Carried) -> None:
        """Note that every tensor in `output` carries `value`."""
        for tensor in (output,) if type(output) is Tensor else tensors_in(output):
            self._carried[id(tensor)] = (tensor, value)

    def assume(self, output: object, value: Carried) -> None:
        """Note that tensors in `output` carry `value` and that their values, on the CPU, can be relied on."""
        self.carry(output, value)
        self._known.update(id(tensor) for tensor in tensors_in(output) if not tensor.is_meta)

    def _forget(self, written: Any) -> None:
        """Nothing is known any longer of tensors that share memory with the tensor that was written."""
        memory = written.untyped_storage().data_ptr()
        shared = [key for key in self._known if self._carried[key][0].untyped_storage().data_ptr() == memory]
        self._known.difference_update(shared)

    def is_known(self, tensor: object) -> bool:
        """Whether it depends on the network's input in name only: its values were assumed."""
        return id(tensor) in self._known

    def add_input(self, value: object) -> None:
        """Make every tensor in `value` an input of the network."""
        self.carry(value, Flow((0,)))

    def add_parameter(self, name: str, tensor: Tensor) -> None:
        """Take `tensor`, which was computed from parameters, for a parameter called `name`."""
        self.shapes[name] = tuple(tensor.shape)
        self.carry(tensor, Derived((name,)))

    def add_node(self, node: Node, sources: Iterable[int]) -> int:
        """Append `node` with edges from `sources`; returns its index."""
        self.nodes.append(node)
        self.predecessors.append(tuple(sorted(set(sources))))
        return len(self.nodes) - 1

    def note_role(self, params: Iterable[str], role: str) -> None:
        """Say what parameters without a node are; the first use decides."""
        for param in params:
            self.roles.setdefault(param, role)

    # -- the mode -------------------------------------------------------------------------------

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run `func` on meta tensors, or let its rule say what comes out, and note what it carries."""
        kwargs = kwargs or {}
        name = func.__name__
        if name in _PLAIN:
            return func(*args, **kwargs)
        if name in _VALUES:
            return self._values(func, args, kwargs)
        if name == "__get__":
            return self._attribute(func, args)
        if name in _HOST_FACTORIES and _is_meta(kwargs.get("device")):
            kwargs = {**kwargs, "device": "cpu"}
        target = args[0] if args else None
        inputs = tensors_in((args, kwargs))
        if self._known and name not in _FROM_NOTHING and self._all_known(inputs):
            return self._on_known(Call(func, name, args, kwargs, self))
        if inputs:
            args, kwargs = self._on_meta(inputs, args, kwargs, changed=target if is_in_place(name) else None)
        output = self._called(Call(func, name, args, kwargs, self))
        if id(target) in self._carried and target is not args[0] and is_in_place(name):
            # A constant that was made while recording: the caller goes on with it, not with its stand-in.
            self._forget(target)
            self.carry(target, self.carried(args[0]))
            self._written(target)
        return output

    def _all_known(self, inputs: list[Tensor]) -> bool:
        """All are known or constants that were made while recording, and not all are constants."""
        return any(id(tensor) in self._known for tensor in inputs) and all(
            id(tensor) in self._known
            or (not tensor.is_meta and id(tensor) in self._carried and self.carried(tensor) == CONSTANT)
            for tensor in inputs
        )

    def _on_known(self, call: Call) -> Any:
        """What `call` gives, computed, where all values are known."""
        if call.name in _DEVICE_MOVES:
            return call.args[0]
        if call.name == "to":
            call = Call(call.func, call.name, *_without_device(call.args, call.kwargs), self)
        output = call.func(*call.args, **call.kwargs)
        self.assume((output, call.args[0] if is_in_place(call.name) else None), merged(call.inputs()))
        return output

    def _called(self, call: Call) -> Any:
        """What `call`, its tensors on meta, gives."""
        name, args, kwargs = call.name, call.args, call.kwargs
        if name in _FROM_NOTHING or name in _FILLED:
            output = call.run()
            if name in _FILLED and output.is_meta and output.numel() <= _SMALL:
                output = call.func(*args, **{**kwargs, "device": "cpu"})
            return call.gives(output, CONSTANT)
        if name in _DEVICE_MOVES:
            return args[0]
        if name == "to":
            call = Call(call.func, name, *_without_device(args, kwargs), self)
        rule = self._rules.get(name)
        output = rule(call) if rule is not None else call.passed_on()
        if args and is_in_place(name):
            self._written(args[0])
        return output

    def _written(self, tensor: object) -> None:
        """Something was written into `tensor`: if it is a view of another, that carries it too."""
        base = tensor._base if isinstance(tensor, Tensor) else None  # noqa: SLF001  # torch's name for it
        if base is not None:
            value = merged((self.carried(base), self.carried(tensor)))
            self.carry(base, value)
            if id(base) in self._stand_ins:  # made before this was written
                self.carry(self._stand_ins[id(base)][1], value)

    def _values(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Values of the model's own tensors and of constants can be read, those of activations cannot."""
        for tensor in tensors_in(args):
            if isinstance(self.carried(tensor), Flow) and not self.is_known(tensor):
                if func.__name__ == "__contains__" and not tensor.is_floating_point():
                    return False  # no token is a special one, such as padding
                raise UnknownValueError(
                    f"Tensor.{func.__name__} needs the values of activations, which have none while tracing"
                )
        return func(*args, **kwargs)

    def _attribute(self, func: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        output = func(*args)
        if isinstance(output, Tensor):  # x.T, x.mT, x.data, ...
            (tensor,) = args
            stand_in = self._resolve(tensor)
            output = func(stand_in)
            self.carry(output, self.carried(stand_in))
        return output

    def _on_meta(
        self, inputs: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any], changed: object
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with everything on meta, unless all are constants made while recording.

        Constants and known values without dimensions, which may be sizes or places, stay as they are unless
        they are `changed` in place.
        """
        if all(tensor.is_meta and id(tensor) in self._carried for tensor in inputs):
            return args, kwargs
        resolved = {id(tensor): self._resolve(tensor) for tensor in inputs}
        if any(tensor.is_meta or self.carried(tensor) != CONSTANT for tensor in resolved.values()):
            for key, tensor in resolved.items():
                has_value = self.carried(tensor) == CONSTANT or self.is_known(tensor)
                if not (tensor.is_meta or (tensor.ndim == 0 and key != id(changed) and has_value)):
                    resolved[key] = self._stand_in(tensor)
        return replaced(args, resolved), replaced(kwargs, resolved) if kwargs else kwargs

    def _resolve(self, tensor: Tensor) -> Tensor:
        """`tensor` itself if it was made while recording, else its stand-in."""
        if id(tensor) in self._carried:
            return tensor
        stand_in = self._copy(tensor) if self._is_small_buffer(tensor) else self._stand_in(tensor)
        if id(stand_in) not in self._carried:
            name = self._names.get(id(tensor))
            self.carry(stand_in, Derived((name,)) if name is not None else CONSTANT)
        return stand_in

    def _is_small_buffer(self, tensor: Tensor) -> bool:
        """Whether it is a buffer whose values the forward pass may go on to read, such as a padding."""
        return id(tensor) not in self._names and tensor.device.type == "cpu" and tensor.numel() <= _BUFFER

    def _copy(self, tensor: Tensor) -> Tensor:
        """A copy that may be changed, one for each tensor."""
        entry = self._copies.get(id(tensor))
        if entry is None:
            entry = self._copies[id(tensor)] = (tensor, tensor.detach().clone())
        return entry[1]

    def _stand_in(self, tensor: Tensor) -> Tensor:
        """A meta tensor of the same shape and dtype, one for each tensor."""
        if tensor.is_meta and id(tensor) not in self._names:
            return tensor
        entry = self._stand_ins.get(id(tensor))
        if entry is None:
            meta = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            entry = self._stand_ins[id(tensor)] = (tensor, meta)
            if id(tensor) in self._carried:
                self.carry(meta, self._carried[id(tensor)][1])
        return entry[1]

    # -- the result -----------------------------------------------------------------------------

    def graph(self, ends: Iterable[int], name: str) -> Graph:
        """The nodes that reach one of `ends`, renumbered, as a `Graph`."""
        live = self._live(ends)
        number = {old: new for new, old in enumerate(sorted(live))}
        nodes = tuple(self.nodes[old] for old in sorted(live))
        edges = tuple(sorted((number[u], number[v]) for v in live for u in self.predecessors[v]))
        covered = _params_of(nodes)
        dead = _params_of(self.nodes)
        unmatched = tuple(
            UnmatchedParameter(param, shape, self._role(param, dead))
            for param, shape in self.shapes.items()
            if param not in covered
        )
        return Graph(nodes, edges, unmatched, name)

    def sources_of(self, output: object) -> set[int]:
        """The nodes that any tensor in `output` carries."""
        flows = (self.carried(tensor) for tensor in tensors_in(output))
        return {source for flow in flows if isinstance(flow, Flow) for source in flow.sources}

    def ends(self) -> set[int]:
        """The nodes that nothing follows."""
        return set(range(len(self.nodes))) - {u for preds in self.predecessors for u in preds}

    def all_used(self) -> bool:
        """Whether every parameter was used by now."""
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

    def _role(self, param: str, dead: set[str]) -> str:
        if param in dead:
            return "does not reach the output"
        return self.roles.get(param, "unused")


class Call:
    """One call of a torch function, its tensors on meta."""

    __slots__ = ("args", "func", "kwargs", "name", "recorder")

    def __init__(
        self,
        func: Callable[..., Any],
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        recorder: Recorder,
    ) -> None:
        self.func = func
        self.name = name
        self.args = args
        self.kwargs = kwargs
        self.recorder = recorder

    def arg(self, index: int, name: str, default: Any = None) -> Any:
        """The argument at position `index` or of this keyword."""
        if index < len(self.args):
            return self.args[index]
        return self.kwargs.get(name, default)

    def carried(self, tensor: object) -> Carried:
        """What `tensor` carries."""
        return self.recorder.carried(tensor)

    def run(self) -> Any:
        """The function's own result on meta tensors."""
        return self.recorder.memo.run(self.func, self.name, self.args, self.kwargs)

    def gives(self, output: Any, value: Carried) -> Any:
        """`output`, noted to carry `value`."""
        self.recorder.carry(output, value)
        return output

    def inputs(self) -> list[Carried]:
        """What each of the tensor arguments carries."""
        return [self.recorder.carried(tensor) for tensor in tensors_in((self.args, self.kwargs))]

    def passed_on(self, output: Any = None) -> Any:
        """The rule of every function that has no node: its output carries what its inputs do.

        `output` is what it gives, where that is known without running it.
        """
        inputs = self.inputs()
        value = merged(inputs)
        if isinstance(value, Flow):
            for other in inputs:
                if isinstance(other, Derived):
                    self.recorder.note_role(other.params, f"used by {self.name.strip('_')}")
        if output is None:
            output = self.run()
        if self.name == "__setitem__":
            self.recorder.carry(self.args[0], value)
        self.recorder.carry(output, value)
        return output


def merged(values: Iterable[Carried]) -> Carried:
    """What the result of an operation on such tensors carries."""
    varying = [value for value in values if value is not CONSTANT]
    if len(varying) == 1:
        return varying[0]
    sources: set[int] = set()
    params: dict[str, None] = {}
    roles: set[str] = set()
    shifted = False
    for value in varying:
        if isinstance(value, Flow):
            sources.update(value.sources)
            roles.add(value.role)
        else:
            params.update(dict.fromkeys(value.params))
            shifted = shifted or value.shifted
    if roles:
        return Flow(tuple(sorted(sources)), _common_role(roles))
    return Derived(tuple(params), shifted) if params else CONSTANT


def _common_role(roles: set[str]) -> str:
    """Parts of an attention stay what they are beside anything else; other roles only among their own."""
    for role in ("scores", "attention"):
        if role in roles:
            return role
    return roles.pop() if len(roles) == 1 else ""


def _params_of(nodes: Iterable[Node]) -> set[str]:
    """Names of the parameters that `nodes` stand for."""
    return {name for node in nodes for name in (node.param, node.bias) if name is not None}


def is_in_place(name: str) -> bool:
    """Whether a function of this name changes its first argument: `add_`, `__iadd__`, `__setitem__`."""
    return name == "__setitem__" or (name.startswith("__i") if name.endswith("__") else name.endswith("_"))


def _is_meta(device: object) -> bool:
    return device is not None and torch.device(device).type == "meta"  # type: ignore[arg-type]


def _without_device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of `Tensor.to` without the device: recorded tensors never leave meta."""
    dtype = kwargs.get("dtype")
    for arg in (*args[1:], kwargs.get("other")):
        if isinstance(arg, torch.dtype):
            dtype = arg
        elif isinstance(arg, Tensor):
            dtype = arg.dtype
    return (args[0], dtype if dtype is not None else args[0].dtype), {}
