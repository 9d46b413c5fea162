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

from ghn_init._network.nested import tensors_in
from ghn_init._tracing import functions as f
from ghn_init._tracing.kernels import Memo
from ghn_init._tracing.outputs import OUTPUTS
from ghn_init._tracing.outputs.call import Call, Known
from ghn_init._tracing.seen import Seen
from ghn_init._tracing.tape import Tape, written
from ghn_init._tracing.values import Made, UnknownValueError, Value, paths_in

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from types import FrameType

_BARE: Final = 3
"""Tensors that a batch norm without parameters is given: its input and its running statistics."""

_SMALL: Final = 2**16
"""Elements up to which a filled constant is made on the CPU."""

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
        self._paths = paths
        self._seen = Seen(params, names)

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
            self._seen.add(value)

    def add_parameter(self, name: str, tensor: Tensor) -> None:
        """Take `tensor`, which was computed from parameters, for a parameter called `name`."""
        self._shapes[name] = tuple(tensor.shape)
        value = self._seen.of(tensor)
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

    def flows(self, tensor: Tensor) -> bool:
        """Whether it is an activation, a weight, or computed from weights."""
        return self._seen.flows(tensor)

    # -- the mode -------------------------------------------------------------------------------

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run `func` on meta tensors, or say what comes out, and write it down."""
        kwargs = kwargs or {}
        name = func.__name__
        if name == "__get__":
            return self._attribute(func, args)
        sort = f.sort_of(name)
        if sort.plain:
            if name == "__format__" and args[0].is_meta and not args[0].dim():
                return _formatted(*args)
            return func(*args, **kwargs)
        if name in f.OF_GRADIENTS:
            return _of_gradients(name, args[0])
        if sort.reading:
            return self._read(func, args, kwargs)
        name = sort.name
        given = args, kwargs
        changes = sort.changes and bool(args)
        if sort.host and f.is_on_meta(kwargs.get("device")):
            kwargs = {**kwargs, "device": "cpu"}
        inputs = tensors_in(args[:1] if sort.lent else (args, kwargs) if kwargs else args)
        values = self._seen.of_all(inputs)
        made = Made.of(values)
        if self._seen.known and "device" not in kwargs and _all_known(values):
            output = self._computed(func, sort, args, kwargs)
            made.known = not sort.shaped
        else:
            if inputs:
                args, kwargs = self._seen.on_meta(sort, values, args, kwargs, args[0] if changes else None)
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
        self, func: Callable[..., Any], sort: f.Sort, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """What a function gives where all values are known."""
        if sort.moves:
            return args[0]
        if sort.casts:
            args, kwargs = f.without_device(args, kwargs)
            return Tensor.to(*args)
        return func(*args, **kwargs)

    def _called(self, call: Call, sort: f.Sort) -> Any:
        """What `call`, its tensors on meta, gives."""
        if sort.made:
            output = call.run()
            if sort.filled and output.is_meta and output.numel() <= _SMALL:
                output = call.func(*call.args, **{**call.kwargs, "device": "cpu"})
            return output
        if sort.moves:
            return call.args[0]
        if sort.casts:
            args, kwargs = f.without_device(call.args, call.kwargs)
            call = Call(Tensor.to, "to", args, kwargs, self._memo, call.varies)
        elif sort.reshapes:
            self._keep_shape(call.args[0])
        known = OUTPUTS.get(call.name)
        return call.run() if known is None else known(call)

    def _read(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Values of the model's own tensors and of constants can be read, those of activations cannot."""
        for tensor in tensors_in(args):
            value = self._seen.get(tensor)
            if value is not None and value.varies and not value.known:
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
        value = self._seen.of(args[0])  # x.T, x.mT, x.data, ...
        output = func(self._seen.resolve(value))
        name = func.__self__.__name__  # pyright: ignore[reportFunctionMemberAccess]
        node = self._tape.append("call_function", getattr, name, (self._tape.node_of(value), name))
        self._placed(node)
        node.meta["val"] = output
        self._seen.note(output, (), Made(varies=value.varies, constant=value.constant, node=node))
        return output

    # -- writing it down ------------------------------------------------------------------------

    def _note(
        self, func: Callable[..., Any], name: str, given: tuple[tuple[Any, ...], dict[str, Any]],
        output: Any, made: Made, *, changes: bool,
    ) -> None:  # fmt: skip
        """A node for the call, and what is known of its outputs; for none if it gives and changes no tensor.

        What is computed from constants alone need not be written down to draw a graph.
        """
        several = None if type(output) is Tensor else list(paths_in(output))
        if not (changes or several is None or several):
            return
        if self._paths is not None or not made.constant:
            node = made.node = self._write(func, name, *given)
            node.meta["val"] = output
            if made.known:
                node.meta["known"] = True
        for path, tensor in (((), output),) if several is None else several:
            value = self._seen.note(tensor, path, made)
            if made.known and not tensor.is_meta and not made.constant:
                self._seen.know(value)

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
                args = self._without_statistics(args, kwargs)
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

    def _without_statistics(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """A batch norm's arguments without its running statistics, a quarter of a ResNet's nodes.

        Those of one that has no parameters say which it is.
        """
        if sum(isinstance(arg, Tensor) for arg in (*args, *kwargs.values())) <= _BARE:
            return args
        return tuple([
            None if isinstance(arg, Tensor) and self._seen.of(arg).constant else arg for arg in args
        ])  # fmt: skip

    def _node(self, tensor: Tensor) -> fx.Node:
        value = self._seen.get(tensor)
        if value is not None and value.node is not None:
            return value.node
        return self._tape.node_of(self._seen.of(tensor))

    def _parameter(self, tensor: Tensor) -> str:
        """The name of a registered layer's parameter in the graph."""
        node = self._node(tensor)
        return node.meta.get("parameter", node.target)

    def _changed(self, target: Tensor, executed: Tensor, made: Made) -> None:
        """`target`, or in its place `executed`, was written: the caller may go on with either."""
        value = self._seen.of(target)
        if target is not executed and value.inside:
            self._seen.forget(target)
        for tensor in (target, executed):
            written_to = self._seen.of(tensor)
            written_to.varies, written_to.constant = made.varies, made.constant
            if made.node is not None and made.node.target is not operator.setitem:
                written_to.node, written_to.origin = made.node, None
            if made.known and not tensor.is_meta and not made.constant:
                self._seen.know(written_to)
            self._change_base(tensor, made)

    def _change_base(self, tensor: Tensor, made: Made) -> None:
        """If `tensor` is a view of another, that was written too."""
        base = tensor._base  # noqa: SLF001  # torch's name for it
        value = None if base is None else self._seen.get(base)
        if value is None:
            return
        if made.node is not None:
            made.node.meta["base"] = self._tape.node_of(value)
        for each in (value, None if value.twin is None else self._seen.of(value.twin)):
            if each is not None:
                each.varies |= made.varies
                each.constant &= made.constant

    def _keep_shape(self, tensor: Tensor) -> None:
        """A node's tensor is about to change its shape: the node keeps one of the old shape."""
        node = self._seen.of(tensor).node
        if node is not None and node.meta.get("val") is tensor:
            node.meta["val"] = torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta"
            )

    def _placed(self, node: fx.Node) -> None:
        """Note in which modules the call was made."""
        if self._paths is not None:
            node.meta["nn_module_stack"] = _module_stack(sys._getframe(2), self._paths)  # noqa: SLF001


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


def _all_known(values: list[Value]) -> bool:
    """All are known or constants that were made while recording, and not all are constants."""
    return any(value.known for value in values) and all(
        value.known or (value.constant and value.inside and not value.tensor.is_meta) for value in values
    )


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
