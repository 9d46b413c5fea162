"""The scale that the modules of a meta model give their tensors when they initialise themselves.

Nothing is drawn where it can be read off: initialisers run on the meta tensors, where they cost nothing, and
what they would have done last is written down, `uniform_(-0.1, 0.1)` say. Other ways of making values, such
as truncated normals and orthogonal matrices, are carried out, one module at a time, and measured.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ghn_init._errors import PredictError
from ghn_init._meta.initialise import Initialiser, initialising
from ghn_init._network.locations import locations_of
from ghn_init._network.scale import Magnitude, rounded, scales_of
from ghn_init._threads import seeded

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from torch import Tensor

    from ghn_init._network.locations import Location


def initial_scales(network: nn.Module, names: Collection[str], seed: int) -> dict[str, Magnitude]:
    """Scales of tensors on the meta device, by name; those that nobody gives a value are not among them.

    Args:
        network: The network; it is left as it was.
        names: Qualified names of the tensors.
        seed: Of what has to be drawn.
    """
    wanted = [place for place in locations_of(network) if place.name in names and place.get().is_meta]
    found: dict[str, Magnitude] = {}
    with initialising(network, wanted, seed) as initialiser, seeded("scales", seed):
        for path, locations in initialiser.owners.items():
            found |= _of_module(initialiser, path, locations)
    return found


def _of_module(initialiser: Initialiser, path: str, locations: list[Location]) -> dict[str, Magnitude]:
    """The scales of the tensors that the module at `path` owns."""
    if found := _read_off(initialiser, path, locations):
        return found
    try:
        values = initialiser.values(path)
    except PredictError:  # told when the values themselves are missed
        return {}
    return dict(zip(values, scales_of(list(values.values())), strict=True))


def _read_off(initialiser: Initialiser, path: str, locations: list[Location]) -> dict[str, Magnitude]:
    """The same without drawing a number; empty if that tells too little."""
    before = [(location, location.get()) for location in locations]
    try:
        for location, old in before:  # whole and plain, where the model is sharded
            plain = torch.empty(old.shape, dtype=old.dtype, device="meta")
            location.put(nn.Parameter(plain, False) if isinstance(old, nn.Parameter) else plain)
        recorder = _Recorder(location.get() for location in locations)
        for call in initialiser.own_calls(path):
            with recorder:
                call()
            if recorder.complete:
                return {location.name: recorder.scale(location.get()) for location in locations}
        return {}
    finally:
        for location, old in before:
            location.put(old)


_FILLS: Final = frozenset({"uniform_", "normal_", "fill_", "zero_"})
"""Functions that give a whole tensor values of a scale that their arguments tell."""


def usual_scale(shape: Sequence[int]) -> Magnitude:
    """Where nothing tells: that which `nn.Linear` gives a weight of this shape, output channels first."""
    return Magnitude(rounded(1 / math.sqrt(3 * math.prod(shape[1:]))))


class _Recorder(TorchDispatchMode):
    """Writes down the scale of what functions in place would make of some meta tensors."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self._scales: dict[int, Magnitude | None] = {_storage(tensor): None for tensor in tensors}

    @property
    def complete(self) -> bool:
        """Whether every tensor's scale is known."""
        return None not in self._scales.values()

    def scale(self, tensor: Tensor) -> Magnitude:
        """That of one of the tensors, once it is known."""
        scale = self._scales[_storage(tensor)]
        assert scale is not None  # see `complete`
        return scale

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function, and write down what it does to the first tensor if it is one of ours."""
        name = func.overloadpacket.__name__
        # A part that is set, as the row of a padding token, does not change the scale of the whole.
        if name.endswith("_") and args and _is_whole(args[0]) and (key := _storage(args[0])) in self._scales:
            self._scales[key] = _made(name, args[1:], kwargs or {}) if name in _FILLS else None
        return func(*args, **(kwargs or {}))


def _storage(tensor: Any) -> int:
    """What a tensor and its `.data` have in common."""
    return tensor.untyped_storage()._cdata  # noqa: SLF001 meta tensors have no address


def _is_whole(tensor: Any) -> bool:
    """Whether it is no part of another tensor."""
    return tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()


def _made(name: str, args: Any, kwargs: Mapping[str, Any]) -> Magnitude:
    """The scale of the values of a filling function."""
    if name in ("fill_", "zero_"):
        value = float(args[0]) if args else 0.0
        return Magnitude(abs(value), value)
    names, defaults = (("from", "to"), (0, 1)) if name == "uniform_" else (("mean", "std"), (0, 1))
    given = dict(zip(names, args, strict=False))
    first, second = (float(given.get(n, kwargs.get(n, d))) for n, d in zip(names, defaults, strict=True))
    if name == "uniform_":
        return Magnitude(rounded(math.sqrt((first**2 + first * second + second**2) / 3)))
    return Magnitude(rounded(math.hypot(first, second)))
