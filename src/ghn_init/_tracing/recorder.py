"""Recording a model's forward pass, without computing it, as a `torch.fx.Graph`.

`Recorder` is a `TorchFunctionMode`: while it is active, every torch function that the model calls
passes through it and becomes a node. Activations are meta tensors, so shapes are real and nothing is
computed; the model's own parameters and buffers are replaced, argument by argument, by meta tensors of the
same shape, so the model itself is neither read nor written. What the functions mean for a GHN's graph is not
decided here: see `ghn_init._tracing.sketch`.
"""

from __future__ import annotations

import math
import operator
import sys
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from ghn_init._network.nested import replaced, tensors_in
from ghn_init._tracing import values as v
from ghn_init._tracing.kernels import Memo
from ghn_init._tracing.outputs import OUTPUTS
from ghn_init._tracing.outputs.call import Call, Known
from ghn_init._tracing.tape import Tape, written
from ghn_init._tracing.transforms import is_wrapped, transformed, unwrapped
from ghn_init._tracing.values import Sort, UnknownValueError, Value

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from types import FrameType

_SMALL: Final = 2**16
"""Elements up to which a filled constant is made on the CPU."""

_BUFFER: Final = 16
"""Elements up to which a buffer's values can be read."""

_META: Final = torch.device("meta")

_MODULE_CALL: Final = nn.Module._call_impl.__code__  # noqa: SLF001  # the frame of a module's call


@dataclass(frozen=True)
class Recording:
    """A recorded forward pass.

    Attributes:
        graph: Its functions; without an output where the recording ended before the forward pass did.
        objects: What the targets of `get_attr` and `call_module` nodes stand for.
        shapes: Every parameter's shape; of weights that are computed from parameters those of the weights.
    """

    graph: fx.Graph
    objects: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]


class Recorder(TorchFunctionMode):
    """Writes everything that runs under it to a tape.

    Args:
        params: Name and tensor of every parameter of the model, ties once.
        names: Names of the model's other tensors; those that have none are called constants.
        paths: Qualified names of the model's modules, if every node is to have its module's.
    """

    def __init__(
        self,
        params: Mapping[str, Tensor],
        names: Mapping[str, Tensor],
        paths: Mapping[int, str] | None = None,
    ) -> None:
        super().__init__()
        self._memo = Memo()
        self._shapes = {name: tuple(param.shape) for name, param in params.items()}
        home = next((param.device for param in params.values()), torch.device("cpu"))
        self._tape = Tape(home, readable=paths is not None)
        self._names = {id(tensor): name for name, tensor in names.items()}
        self._names.update((id(param), name) for name, param in params.items())
        self._params = {id(param) for param in params.values()}
        self._paths = paths
        # What is known of every tensor that was seen, by identity.
        self._values: dict[int, Value] = {}
        self._known: list[Value] = []

    @property
    def home(self) -> torch.device:
        """The device of the model."""
        return self._tape.home

    @property
    def draws(self) -> bool:
        """Whether the recording is for drawing a graph, and not one that users see and run."""
        return self._paths is None

    # -- before and after -----------------------------------------------------------------------

    def add_inputs(self, inputs: Iterable[tuple[str, Any]]) -> None:
        """Make every tensor in `inputs` an input of the network; one with values may be asked for them."""
        for value in self._tape.placeholders(inputs):
            self._values[id(value.tensor)] = value
            if not value.tensor.is_meta:
                self._know(value)

    def add_parameter(self, name: str, tensor: Tensor) -> None:
        """Take `tensor`, which was computed from parameters, for a parameter called `name`."""
        self._shapes[name] = tuple(tensor.shape)
        value = self.value(tensor)
        value.constant = False
        self._tape.node_of(value).meta["parameter"] = name

    def finish(self, output: Any) -> Recording:
        """The tape, ending with the network's output."""
        result = self._tape.result(output, self._node)
        node = self._tape.append("output", "output", "output", (result,))
        node.meta["val"] = map_aggregate(result, _value_of)
        return self.recording()

    def recording(self) -> Recording:
        """The tape as it is."""
        return Recording(self._tape.graph, self._tape.objects, self._shapes)

    # -- what is known of tensors ---------------------------------------------------------------

    def value(self, tensor: Tensor) -> Value:
        """What is known of `tensor`; one that was not made while recording is the model's, or a constant."""
        value = self._values.get(id(tensor))
        if value is None:
            if is_wrapped(tensor) and self.flows(unwrapped(tensor)):
                raise transformed()
            is_param = id(tensor) in self._params
            inside = tensor.is_meta and not is_param
            value = Value(tensor, varies=False, constant=not is_param, inside=inside)
            value.name = self._names.get(id(tensor))
            self._values[id(tensor)] = value
        return value

    def is_known(self, tensor: Tensor) -> bool:
        """Whether it depends on the network's input in name only: its values were assumed."""
        value = self._values.get(id(tensor))
        return value is not None and value.known

    def varies(self, tensor: Tensor) -> bool:
        """Whether it depends on the network's input."""
        value = self._values.get(id(tensor))
        return value is not None and value.varies

    def flows(self, tensor: Tensor) -> bool:
        """Whether it is an activation, a weight, or computed from weights."""
        value = self._values.get(id(tensor))
        if value is None:
            return id(tensor) in self._params
        return tensor.is_floating_point() and (value.varies or not value.constant)

    def _node(self, tensor: Tensor) -> fx.Node:
        value = self._values.get(id(tensor))
        if value is not None and value.node is not None:
            return value.node
        return self._tape.node_of(self.value(tensor))

    def _know(self, value: Value) -> None:
        if not value.known:
            value.known = True
            self._known.append(value)

    def _forget(self, written_to: Tensor) -> None:
        """Nothing is known any longer of tensors that share memory with the tensor that was written."""
        memory = written_to.untyped_storage().data_ptr()
        for value in self._known:
            if value.tensor.untyped_storage().data_ptr() == memory:
                value.known = False
        self._known = [value for value in self._known if value.known]

    # -- the mode -------------------------------------------------------------------------------

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run `func` on meta tensors, or say what comes out, and write it down."""
        kwargs = kwargs or {}
        name = func.__name__
        if name == "__get__":
            return self._attribute(func, args)
        sort = v.sort_of(name)
        if sort.plain:
            if name == "__format__" and args[0].is_meta and not args[0].dim():
                return _formatted(*args)
            return func(*args, **kwargs)
        if name in v.OF_GRADIENTS:
            return _of_gradients(name, args[0])
        if sort.reading:
            return self._read(func, args, kwargs)
        name = sort.name
        given = args, kwargs
        changes = sort.changes and bool(args)
        if sort.host and v.is_on_meta(kwargs.get("device")):
            kwargs = {**kwargs, "device": "cpu"}
        inputs = tensors_in(args[:1] if sort.lent else (args, kwargs) if kwargs else args)
        seen = self._values
        values = [seen.get(id(tensor)) or self.value(tensor) for tensor in inputs]
        made = _made_of(values)
        if self._known and "device" not in kwargs and _all_known(values):
            output = self._computed(func, sort, args, kwargs)
            made.known = not sort.shaped
        else:
            if inputs:
                args, kwargs = self._on_meta(sort, values, args, kwargs, args[0] if changes else None)
            output = self._called(Call(func, name, args, kwargs, self._memo, made.varies), sort)
            if type(output) is Known:
                output, made.known = output.output, True
        if sort.made:
            made.varies, made.constant = False, True
        self._note(func, name, given, output, made, changes=changes)
        if changes and isinstance(given[0][0], Tensor):
            self._changed(given[0][0], args[0], made)
        return output

    def _computed(
        self, func: Callable[..., Any], sort: Sort, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """What a function gives where all values are known."""
        if sort.moves:
            return args[0]
        if sort.casts:
            args, kwargs = v.without_device(args, kwargs)
            return Tensor.to(*args)
        return func(*args, **kwargs)

    def _called(self, call: Call, sort: Sort) -> Any:
        """What `call`, its tensors on meta, gives."""
        if sort.made:
            output = call.run()
            if sort.filled and output.is_meta and output.numel() <= _SMALL:
                output = call.func(*call.args, **{**call.kwargs, "device": "cpu"})
            return output
        if sort.moves:
            return call.args[0]
        if sort.casts:
            args, kwargs = v.without_device(call.args, call.kwargs)
            call = Call(Tensor.to, "to", args, kwargs, self._memo, call.varies)
        elif sort.reshapes:
            self._keep_shape(call.args[0])
        known = OUTPUTS.get(call.name)
        return call.run() if known is None else known(call)

    def _read(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Values of the model's own tensors and of constants can be read, those of activations cannot."""
        for tensor in tensors_in(args):
            if self.varies(tensor) and not self.is_known(tensor):
                if func.__name__ == "__contains__" and not tensor.is_floating_point():
                    return False  # no token is a special one, such as padding
                raise UnknownValueError(
                    f"Tensor.{func.__name__} needs the values of activations, which have none while tracing, "
                    "whatever the input; write it without (torch.where, masks), or put it into a layer with "
                    "a rule (ghn_init.register): docs/tracing.md, Limits"
                )
        return func(*args, **kwargs)

    def _attribute(self, func: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        output = func(*args)
        if not isinstance(output, Tensor):
            return output
        value = self.value(args[0])  # x.T, x.mT, x.data, ...
        output = func(self._resolve(value))
        name = func.__self__.__name__  # type: ignore[attr-defined]  # pyright: ignore[reportFunctionMemberAccess]
        node = self._tape.append("call_function", getattr, name, (self._tape.node_of(value), name))
        self._placed(node)
        node.meta["val"] = output
        self._set(output, (), _Made(varies=value.varies, constant=value.constant, node=node))
        return output

    # -- writing it down ------------------------------------------------------------------------

    def _note(
        self, func: Callable[..., Any], name: str, given: tuple[tuple[Any, ...], dict[str, Any]],
        output: Any, made: _Made, *, changes: bool,
    ) -> None:  # fmt: skip
        """A node for the call, and what is known of its outputs; for none if it gives and changes no tensor.

        What is computed from constants alone need not be written down to draw a graph.
        """
        several = None if type(output) is Tensor else list(v.paths_in(output))
        if not (changes or several is None or several):
            return
        if self._paths is not None or not made.constant:
            node = made.node = self._write(func, name, *given)
            node.meta["val"] = output
            if made.known:
                node.meta["known"] = True
        for path, tensor in (((), output),) if several is None else several:
            value = self._set(tensor, path, made)
            if made.known and not tensor.is_meta and not made.constant:
                self._know(value)

    def _write(
        self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> fx.Node:
        if name == "registered_layer":
            layer = args[0]
            op, target, name = "call_module", layer.path, layer.path.replace(".", "_") or "layer"
            self._tape.objects[target] = layer.module
            args, kwargs = args[1], args[2]
        else:
            layer = None
            if name == "batch_norm" and self._paths is None:
                args = self._without_statistics(args)
            op, target, name = written(func, name)
        argument, node_of = self._tape.argument, self._node
        node = self._tape.append(
            op, target, name, argument(args, node_of),
            {key: argument(value, node_of) for key, value in kwargs.items()} if kwargs else None,
        )  # fmt: skip
        if layer is not None:
            node.meta["layer"] = layer.rule
            node.meta["parameters"] = {key: self._parameter(t) for key, t in layer.params.items()}
            node.meta["others"] = [self._parameter(tensor) for tensor in layer.module.parameters()]
        self._placed(node)
        return node

    def _without_statistics(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """A batch norm's arguments without its running statistics, a quarter of a ResNet's nodes."""
        return tuple([
            None if isinstance(arg, Tensor) and self.value(arg).constant else arg for arg in args
        ])  # fmt: skip

    def _parameter(self, tensor: Tensor) -> str:
        """The name of a registered layer's parameter in the graph."""
        node = self._node(tensor)
        return node.meta.get("parameter", node.target)

    def _set(self, tensor: Tensor, path: tuple[Any, ...], made: _Made) -> Value:
        """Note what is known of an output."""
        value = self._values.get(id(tensor))
        if value is None:
            value = self._values[id(tensor)] = Value(tensor, varies=made.varies, constant=made.constant)
        if path and made.node is not None:
            value.node, value.origin = None, (made.node, path)
        else:
            value.node, value.origin = made.node, None
        value.varies, value.constant = made.varies, made.constant
        return value

    def _changed(self, target: Tensor, executed: Tensor, made: _Made) -> None:
        """`target`, or in its place `executed`, was written: the caller may go on with either."""
        value = self.value(target)
        if target is not executed and value.inside:
            self._forget(target)
        for tensor in (target, executed):
            written_to = self.value(tensor)
            written_to.varies, written_to.constant = made.varies, made.constant
            if made.node is not None and made.node.target is not operator.setitem:
                written_to.node, written_to.origin = made.node, None
            if made.known and not tensor.is_meta and not made.constant:
                self._know(written_to)
            self._change_base(tensor, made)

    def _change_base(self, tensor: Tensor, made: _Made) -> None:
        """If `tensor` is a view of another, that was written too."""
        base = tensor._base  # noqa: SLF001  # torch's name for it
        value = None if base is None else self._values.get(id(base))
        if value is None:
            return
        if made.node is not None:
            made.node.meta["base"] = self._tape.node_of(value)
        for each in (value, None if value.twin is None else self._values[id(value.twin)]):
            if each is not None:
                each.varies |= made.varies
                each.constant &= made.constant

    def _keep_shape(self, tensor: Tensor) -> None:
        """A node's tensor is about to change its shape: the node keeps one of the old shape."""
        node = self.value(tensor).node
        if node is not None and node.meta.get("val") is tensor:
            node.meta["val"] = torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta"
            )

    def _placed(self, node: fx.Node) -> None:
        """Note in which modules the call was made."""
        if self._paths is not None:
            node.meta["nn_module_stack"] = _module_stack(sys._getframe(2), self._paths)  # noqa: SLF001

    # -- tensors for the functions --------------------------------------------------------------

    def _on_meta(
        self, sort: Sort, inputs: list[Value], args: tuple[Any, ...], kwargs: dict[str, Any], changed: object
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with everything on meta, unless all are constants made while recording.

        Constants and known values without dimensions, which may be sizes or places, stay as they are unless
        they are `changed` in place.
        """
        resolved: dict[int, Tensor] = {}
        as_they_are = on_meta = True
        for value in inputs:
            tensor = given = value.tensor
            if not value.inside:
                as_they_are = False
                tensor = self._resolve(value) if value.twin is None else value.twin
            if not tensor.is_meta:
                on_meta = False
            resolved[id(given)] = tensor
        if on_meta and as_they_are:
            return args, kwargs
        if not (on_meta or sort.lengths):
            self._bring_to_meta(resolved, changed)
        if sort.lent:
            return (*replaced(args[:1], resolved), *args[1:]), kwargs
        return replaced(args, resolved), replaced(kwargs, resolved) if kwargs else kwargs

    def _bring_to_meta(self, resolved: dict[int, Tensor], changed: object) -> None:
        """Put twins on meta into the place of tensors that are not, see `_on_meta`."""
        values = self._values
        if not any(tensor.is_meta or not values[id(tensor)].constant for tensor in resolved.values()):
            return
        for key, tensor in resolved.items():
            if not tensor.is_meta:
                value = values[id(tensor)]
                has_value = value.constant or value.known
                if not (tensor.ndim == 0 and key != id(changed) and has_value):
                    resolved[key] = self._twin(value, meta=True)

    def _resolve(self, value: Value) -> Tensor:
        """The tensor itself if it was made while recording, else its twin."""
        if value.inside:
            return value.tensor
        return self._twin(value, meta=not self._is_small_buffer(value.tensor))

    def _is_small_buffer(self, tensor: Tensor) -> bool:
        """Whether it is a buffer whose values the forward pass may go on to read, such as a padding."""
        return id(tensor) not in self._params and tensor.device.type == "cpu" and tensor.numel() <= _BUFFER

    def _twin(self, value: Value, *, meta: bool) -> Tensor:
        """A meta tensor of the same shape and dtype, or a copy that may be changed; one for each tensor."""
        if value.twin is None:
            tensor = value.tensor
            twin = _meta_like(tensor) if meta else tensor.detach().clone()
            value.twin = twin
            copy = self._values[id(twin)] = Value(twin, varies=value.varies, constant=value.constant)
            copy.node, copy.origin, copy.name = value.node, value.origin, value.name
        return value.twin


def _formatted(x: Tensor, spec: str) -> str:
    """A number without a value as text, for code that prints or logs what it is doing."""
    number: float | complex = math.nan if x.is_floating_point() or x.is_complex() else 0
    return number.__format__(spec) if spec else object.__format__(x, spec)


def _of_gradients(name: str, x: Tensor) -> Tensor | RemovableHandle | None:
    """What one of `OF_GRADIENTS` gives that does nothing."""
    if name == "requires_grad_":
        return x
    return None if name == "retain_grad" else RemovableHandle(OrderedDict())


def _value_of(argument: Any) -> Any:
    """What a node gave; of anything else itself."""
    return argument.meta["val"] if isinstance(argument, fx.Node) else argument


@dataclass(slots=True)
class _Made:
    """What is known of a call's outputs: see `Value`. Without a node, what was computed from constants."""

    varies: bool = False
    constant: bool = True
    known: bool = False
    node: fx.Node | None = None


def _made_of(inputs: list[Value]) -> _Made:
    """What is known of the outputs of a function of `inputs`."""
    made = _Made()
    for value in inputs:  # any() and all() take longer, and this is done for every call
        if value.varies:
            made.varies = True
        if not value.constant:
            made.constant = False
    return made


def _all_known(values: list[Value]) -> bool:
    """All are known or constants that were made while recording, and not all are constants."""
    return any(value.known for value in values) and all(
        value.known or (value.constant and value.inside and not value.tensor.is_meta) for value in values
    )


def _meta_like(tensor: Tensor) -> Tensor:
    """A contiguous meta tensor of the same shape and dtype, an ordinary one whatever class `tensor` has."""
    if type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided:  # in half of the time
        return torch.empty_like(tensor, device=_META, memory_format=torch.contiguous_format)
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=_META)


def _module_stack(frame: FrameType | None, paths: Mapping[int, str]) -> dict[str, tuple[str, str]]:
    """The modules whose calls are on Python's stack, outermost first, as torch.export writes them."""
    found: list[nn.Module] = []
    while frame is not None:
        if frame.f_code is _MODULE_CALL:
            found.append(frame.f_locals["self"])
        frame = frame.f_back
    stack = {}
    for module in reversed(found):
        path = paths.get(id(module))
        if path is not None:
            cls = type(module)
            key = "__".join(("L", "self", *filter(None, (path.replace(".", "_"),))))
            stack[key] = (path, f"{cls.__module__}.{cls.__qualname__}")
    return stack
