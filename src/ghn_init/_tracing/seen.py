"""The tensors that a recording has seen: what is known of each, and what functions get in its place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from ghn_init._network.nested import replaced
from ghn_init._tracing.transforms import is_wrapped, transformed, unwrapped
from ghn_init._tracing.values import Value

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ghn_init._tracing.functions import Sort
    from ghn_init._tracing.values import Made

_BUFFER: Final = 16
"""Elements up to which a buffer's values can be read."""

_META: Final = torch.device("meta")


class Seen:
    """The tensors of a recording, by identity.

    Args:
        params: Name and tensor of every parameter of the model, ties once.
        names: Names of the model's other tensors.

    Attributes:
        known: Those that depend on the input in name only.
    """

    def __init__(self, params: Mapping[str, Tensor], names: Mapping[str, Tensor]) -> None:
        self._names = {id(tensor): name for name, tensor in (*names.items(), *params.items())}
        self._params = {id(param) for param in params.values()}
        self._values: dict[int, Value] = {}
        self.known: list[Value] = []

    # -- what is known --------------------------------------------------------------------------

    def of(self, tensor: Tensor) -> Value:
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

    def of_all(self, tensors: Sequence[Tensor]) -> list[Value]:
        """The same of several."""
        seen = self._values
        return [seen.get(id(tensor)) or self.of(tensor) for tensor in tensors]

    def get(self, tensor: Tensor) -> Value | None:
        """What is known of `tensor`, if it was met."""
        return self._values.get(id(tensor))

    def flows(self, tensor: Tensor) -> bool:
        """Whether it is an activation, a weight, or computed from weights."""
        value = self._values.get(id(tensor))
        if value is None:
            return id(tensor) in self._params
        return tensor.is_floating_point() and (value.varies or not value.constant)

    # -- what becomes known ---------------------------------------------------------------------

    def add(self, value: Value) -> None:
        """An input of the network; one with values may be asked for them."""
        self._values[id(value.tensor)] = value
        if not value.tensor.is_meta:
            self.know(value)

    def note(self, tensor: Tensor, path: tuple[Any, ...], made: Made) -> Value:
        """What is known of an output of a call, at `path` among its outputs."""
        value = self._values.get(id(tensor))
        if value is None:
            value = self._values[id(tensor)] = Value(tensor, varies=made.varies, constant=made.constant)
        if path and made.node is not None:
            value.node, value.origin = None, (made.node, path)
        else:
            value.node, value.origin = made.node, None
        value.varies, value.constant = made.varies, made.constant
        return value

    def know(self, value: Value) -> None:
        """The values of this tensor can be relied on."""
        if not value.known:
            value.known = True
            self.known.append(value)

    def forget(self, written_to: Tensor) -> None:
        """Nothing is known any longer of tensors that share memory with the tensor that was written."""
        memory = written_to.untyped_storage().data_ptr()
        for value in self.known:
            if value.tensor.untyped_storage().data_ptr() == memory:
                value.known = False
        self.known = [value for value in self.known if value.known]

    # -- tensors for the functions --------------------------------------------------------------

    def on_meta(
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
                tensor = self.resolve(value) if value.twin is None else value.twin
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
        """Put twins on meta into the place of tensors that are not, see `on_meta`."""
        values = self._values
        if not any(tensor.is_meta or not values[id(tensor)].constant for tensor in resolved.values()):
            return
        for key, tensor in resolved.items():
            if not tensor.is_meta:
                value = values[id(tensor)]
                has_value = value.constant or value.known
                if not (tensor.ndim == 0 and key != id(changed) and has_value):
                    resolved[key] = self._twin(value, meta=True)

    def resolve(self, value: Value) -> Tensor:
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


def _meta_like(tensor: Tensor) -> Tensor:
    """A contiguous meta tensor of the same shape and dtype, an ordinary one whatever class `tensor` has."""
    if type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided:  # in half of the time
        return torch.empty_like(tensor, device=_META, memory_format=torch.contiguous_format)
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=_META)
