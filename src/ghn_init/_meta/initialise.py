"""Values for the tensors of a meta model that are not predicted.

A model that was built on the meta device has lost what its constructors would have put into its tensors.
For every module that owns such tensors these are asked, in this order, until each has a value:

1. a transformers model's own `_init_weights(module)`;
2. the module's `reset_parameters()`;
3. its methods that compute buffers: `init_non_persistent_buffers()` (timm), `define_*()` (torchvision);
4. `init_weights()` and `reset_parameters()` of the modules around it, the nearest first;
5. `_init_weights(module)` of the modules around it.

While they run, every other tensor of the model is on the meta device, where initialising costs and
changes nothing. A tensor that nobody gives a value is an error, not garbage: a scale that multiplies
activations, say, may be 1e-6 or 20, and neither its name nor the defaults of constructors tell.
"""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn

from ghn_init._errors import PredictError, listing
from ghn_init._network.locations import Location, hidden, locations_of
from ghn_init._network.pretrained import is_pretrained
from ghn_init._threads import seeded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


_RESETS: Final = ("reset_parameters", "_reset_parameters")
"""Methods that initialise a module's own tensors; nn.MultiheadAttention's has the underscore."""

_CHUNK: Final = 1 << 24
"""Elements that are looked at together: what is made on the way stays small."""

_BUFFERS: Final = "init_non_persistent_buffers"
"""timm's method that computes a module's buffers, on the device of its weights."""

_AROUND: Final = ("init_weights", "reset_parameters")
"""Methods that initialise a module and what is inside it."""


Source = tuple[str, "Callable[[], object]"]
"""An initialiser: its place, for messages, and its call."""


class Initialiser:
    """Gives values to lost tensors, one module at a time.

    Args:
        model: The model that they belong to.
        lost: Their places; each one's tensor is on the meta device.
        seed: Seeds random numbers; each module's depend on this and its path alone.
    """

    def __init__(self, model: nn.Module, lost: Sequence[Location], seed: int) -> None:
        self._model = model
        self._seed = seed
        self._modules = dict(model.named_modules())
        self.owners: dict[str, list[Location]] = {}
        for location in lost:
            self.owners.setdefault(location.path, []).append(location)

    def values(self, path: str) -> dict[str, Tensor]:
        """Names and values, on the CPU, of the lost tensors that the module at `path` owns.

        Every other tensor of the model must be hidden; the module is left as it was.

        Raises:
            PredictError: Nobody gives one of them a value.
        """
        locations = self.owners[path]
        before = [(location, location.get()) for location in locations]
        try:
            for location, old in before:
                location.put(_marked(old))
            marked = [(location, location.get(), _version(location.get())) for location in locations]
            failures = self._run(path, marked)
            missing = [
                location for location, tensor, version in marked if not _written(location, tensor, version)
            ]
            if missing:
                raise self._no_value(missing, failures)
            return {location.name: location.get().detach() for location in locations}
        finally:
            for location, old in before:
                location.put(old)

    def _run(self, path: str, marked: Sequence[tuple[Location, Tensor, int]]) -> list[str]:
        """Ask one initialiser after the other until nothing is missing; returns what failed."""
        with seeded(path, self._seed):
            return _ask(self._own(path), marked) + _ask(self._around(path), marked)

    def own_calls(self, path: str) -> Iterator[Callable[[], None]]:
        """What initialises the tensors of the module at `path` first, call by call; failures are silent.

        Every other tensor of the model must be hidden.
        """
        for place, initialise in self._own(path):
            yield lambda source=(place, initialise): _ask_one(source, [])

    def _own(self, path: str) -> Iterator[Source]:
        """What a transformers model does for the module at `path`, and its own methods."""
        module = self._modules[path]
        for place, outer in self._outers(path):
            if is_pretrained(outer):
                yield _dotted(place, "_init_weights"), _bound(outer, module)
        buffers = [name for name in dir(type(module)) if name.startswith("define_")]
        for method in (*_RESETS, _BUFFERS, *buffers):
            if _takes(getattr(module, method, None), 0):
                call = getattr(module, method)
                yield _dotted(path, method), _as_if_on_cpu(module, call) if method == _BUFFERS else call

    def _around(self, path: str) -> Iterator[Source]:
        """What the module at `path` and those around it do for everything inside them."""
        for place, outer in self._outers(path):
            for method in _AROUND:
                if _takes(getattr(outer, method, None), 0):
                    yield _dotted(place, method), getattr(outer, method)
        for place, outer in self._outers(path):
            if not is_pretrained(outer) and _takes(getattr(outer, "_init_weights", None), 1):
                yield _dotted(place, "_init_weights"), _bound(outer, self._modules[path])

    def _outers(self, path: str) -> list[tuple[str, nn.Module]]:
        """The module at `path` and those that contain it, with their paths, the innermost first."""
        paths = [path]
        while paths[-1]:
            paths.append(paths[-1].rpartition(".")[0])
        return [(p, self._modules[p]) for p in paths if p in self._modules]

    def _no_value(self, missing: Sequence[Location], failures: Sequence[str]) -> PredictError:
        names = listing([location.name for location in missing], 40)
        told = "".join(f"; {failure}" for failure in failures)
        return PredictError(
            f"{type(self._model).__name__} is on the meta device, and {names} would have no value: neither "
            f"predicted nor initialised by a module{told}. Build the model "
            "inside `with ghn_init.large_on_meta():`, which keeps values of small tensors, or give it one "
            "first (`module.name = nn.Parameter(torch.zeros(...))`, or `= torch.arange(...)` for a buffer)"
        )


@contextmanager
def initialising(model: nn.Module, lost: Sequence[Location], seed: int) -> Iterator[Initialiser]:
    """Inside, the initialiser of `lost` may be used: all tensors of the model are hidden, if any is lost.

    At the end every place holds what it held before, whatever the initialisers put there.
    """
    with hidden(locations_of(model) if lost else ()):
        yield Initialiser(model, lost, seed)


def _ask(sources: Iterator[Source], marked: Sequence[tuple[Location, Tensor, int]]) -> list[str]:
    """Call initialisers until nothing is missing; returns what failed."""
    failures: list[str] = []
    for source in sources:
        if all(_written(*mark) for mark in marked):
            break
        _ask_one(source, failures)
    return failures


def _ask_one(source: Source, failures: list[str]) -> None:
    """Call an initialiser; adds to `failures` why it failed."""
    place, initialise = source
    try:
        initialise()
    except Exception as error:  # noqa: BLE001 the model's own code; told where it matters
        failures.append(f"{place}() failed: {error}")


def _bound(outer: nn.Module, module: nn.Module) -> Callable[[], object]:
    return lambda: outer._init_weights(module)  # noqa: SLF001 # pyright: ignore[reportCallIssue]


def _as_if_on_cpu(module: nn.Module, call: Callable[[], object]) -> Callable[[], object]:
    """`call`, for which the meta tensors in `module` are on the CPU: one NaN each, of any shape."""

    def run() -> None:
        lent = []
        for location in [location for location in locations_of(module) if location.get().is_meta]:
            old = location.get()
            # A value that is made of these is NaN, too, and taken for missing.
            one = torch.full((), float("nan")).to(old.dtype).expand(old.shape)
            location.put(nn.Parameter(one, False) if isinstance(old, nn.Parameter) else one)
            lent.append((location, old, location.get()))
        try:
            call()
        finally:
            for location, old, stand_in in lent:
                if location.get() is stand_in:  # else it is a buffer that was just computed
                    location.put(old)

    return run


def _takes(function: object, required: int) -> bool:
    """Whether `function` can be called with `required` positional arguments and must have them."""
    if not callable(function):
        return False
    must = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty]
    positional = [p for p in must if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(positional) == required and not any(p.kind is p.KEYWORD_ONLY for p in must)


def _dotted(path: str, method: str) -> str:
    return f"{path}.{method}" if path else f"the model's {method}"


def _marked(old: Tensor) -> Tensor:
    """A tensor like `old` on the CPU, full of a value that no initialiser leaves."""
    new = torch.empty(old.shape, dtype=old.dtype, device="cpu")
    if new.is_floating_point() or new.is_complex():
        new.fill_(float("nan"))
    elif new.dtype != torch.bool:
        new.fill_(torch.iinfo(new.dtype).max)
    return nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new


def _version(tensor: Tensor) -> int:
    """The number of in-place changes that autograd counted."""
    return tensor._version  # noqa: SLF001 documented for exactly this, no public name


def _written(location: Location, tensor: Tensor, version: int) -> bool:
    """The initialiser replaced the tensor or wrote all of it, in place or through `.data`."""
    now = location.get()
    if now.is_meta:
        return False
    if now.is_floating_point() or now.is_complex():
        return not any(bool(part.isnan().any()) for part in now.detach().reshape(-1).split(_CHUNK))
    if now is not tensor or _version(now) != version:
        return True
    return now.dtype != torch.bool and not bool((now == torch.iinfo(now.dtype).max).all())
