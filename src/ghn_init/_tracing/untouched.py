"""Putting back whatever a forward pass changes: attributes, containers, hooks, random states."""

from __future__ import annotations

import operator
import random
from collections import OrderedDict, defaultdict, deque
from functools import partial
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

from ghn_init._network.walk import modules_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

_own_containers: Final = operator.itemgetter(
    *(name for name, value in vars(nn.Module()).items() if isinstance(value, dict))
)
"""Of a module's attributes the dictionaries that every module has: parameters, modules, hooks, ..."""

_OWN: Final = frozenset(vars(nn.Module()))
"""Attributes that every module has."""

_HOOKS: Final = ("_forward_pre_hooks", "_forward_hooks")

_EVERYWHERE: Final[tuple[dict[Any, Any], ...]] = (
    global_hooks._global_forward_pre_hooks, global_hooks._global_forward_hooks,  # noqa: SLF001
)  # fmt: skip
"""The hooks of all modules, `torch.nn.modules.module.register_module_forward_hook`."""

_MUTABLE: Final = frozenset({list, dict, set, deque, OrderedDict, defaultdict})
"""Types of containers whose contents are put back; a subclass may do anything when it is read."""

_ATOMS: Final = frozenset({int, float, bool, str, type(None), torch.Size, torch.dtype, torch.device})
"""Types of most attributes, which cannot change."""


_DEPTH: Final = 3
"""So many objects in objects are put back, as a cache with an entry for each layer is. Further away are those
of trainers and loggers, which other threads change meanwhile."""


def snapshot(model: nn.Module) -> Callable[[], None]:
    """A function that puts back whatever a forward pass changes on the model's modules and in random states.

    In-place changes cannot reach the model's tensors, because the recorder hands out stand-ins; what can be
    changed is attributes (caches, counters) of modules, of their classes and of objects that they hold,
    buffers that are assigned, hooks, random states, and the lists, dicts and sets that modules, their
    forward passes and their hooks hold, to which a forward pass may append.
    """
    modules = [module for _, module in modules_of(model)]
    states = [vars(module) for module in modules]
    containers = [container for state in states for container in _own_containers(state)]
    # Most containers are empty, and there are a dozen for every module: these need neither a copy nor a look
    # each.
    empty = [container for container in containers if not container]
    before = [(filled, filled.copy()) for filled in (*states, *(c for c in containers if c))]
    put_back_random_states = _random_states()
    contents = _Contents()
    for module, state in zip(modules, states, strict=True):
        contents.of_module(module, state)
    for hooks in _EVERYWHERE:
        for hook in hooks.values():
            contents.of_callable(hook)

    def put_back() -> None:
        put_back_random_states()
        for container, content in before:
            if _differs(container, content):
                container.clear()
                container.update(content)
        if any(empty):
            for container in empty:
                container.clear()
        contents.put_back()

    return put_back


class _Contents:
    """What a forward pass can reach, without its arguments, and change in place.

    The contents of lists, dicts, sets and deques, attributes of objects and classes, and the states of random
    number generators.
    """

    def __init__(self) -> None:
        self._before: dict[int, tuple[Any, Any]] = {}
        self._classes: list[tuple[type, dict[str, Any]]] = []
        self._states: list[Callable[[], object]] = []
        self._seen: set[int] = set()

    def of_module(self, module: nn.Module, state: dict[str, Any]) -> None:
        """Note what a module holds, what its class' forward pass refers to, and what its hooks do."""
        cls = type(module)
        torchs = _is_of_torch(cls)
        for key in state.keys() - _OWN:
            kind = type(state[key])
            if kind not in _ATOMS and not (kind is tuple and torchs):  # sizes of kernels and the like
                self._of_value(state[key])
        if not _is_of_torch(cls.forward):
            self.of_callable(cls.forward)
        if not torchs:
            self._of_class(cls)
        for attribute in _HOOKS:
            for hook in state[attribute].values():
                self.of_callable(hook)

    def put_back(self) -> None:
        """Give every container, object, class and generator what it had, if it has anything else."""
        for container, content in self._before.values():
            if isinstance(container, dict):
                other = _differs(container, content)
            elif isinstance(container, set):
                other = container != content
            else:
                other = len(container) != len(content) or not all(map(operator.is_, container, content))
            if other:
                container.clear()
                fill = container.update if isinstance(container, (dict, set)) else container.extend
                fill(content)
        for cls, content in self._classes:
            _put_back_class(cls, content)
        for put_back in self._states:
            put_back()

    def _of_value(self, value: Any, depth: int = _DEPTH) -> None:
        """Note a container and what is in it; of another object of the user's, what it holds, so deep."""
        if type(value) in _MUTABLE:
            self._of_container(value, depth)
        elif type(value) is tuple:
            for item in value:
                if type(item) not in _ATOMS and self._is_new(item):
                    self._of_value(item, depth)
        elif _is_generator(value):
            self._of_generator(value)
        elif depth and _is_plain_object(value):
            self._of_container(vars(value), depth - 1)

    def _of_container(self, container: Any, depth: int) -> None:
        if id(container) in self._before:
            return
        self._before[id(container)] = container, container.copy()
        for item in container.values() if isinstance(container, dict) else container:
            if type(item) not in _ATOMS:
                self._of_value(item, depth)

    def _of_generator(self, generator: Any) -> None:
        if self._is_new(generator):
            self._states.append(_state_of(generator))

    def _of_class(self, cls: type) -> None:
        """Note the attributes of a class, such as a counter of all its modules."""
        for base in cls.__mro__:
            if not _is_of_torch(base) and base is not object and self._is_new(base):
                self._classes.append((base, dict(vars(base))))

    def of_callable(self, function: Any) -> None:
        """Note what a function refers to: by closure, by a global name, in its arguments, as `self`."""
        if not self._is_new(function):
            return
        if isinstance(function, partial):
            for value in (function.func, *function.args, *function.keywords.values()):
                self._of_referred(value)
        elif isinstance(function, MethodType):
            self.of_callable(function.__func__)
            self._of_referred(function.__self__)
        elif isinstance(function, FunctionType):
            for value in _referred(function):
                self._of_referred(value)
        else:
            self._of_value(function)
            self._of_referred(vars(type(function)).get("__call__"))

    def _of_referred(self, value: Any) -> None:
        if isinstance(value, (FunctionType, MethodType, partial)):
            self.of_callable(value)
        elif not isinstance(value, nn.Module):
            self._of_value(value)

    def _is_new(self, value: object) -> bool:
        new = id(value) not in self._seen
        self._seen.add(id(value))
        return new


def _is_of_torch(function: Any) -> bool:
    return (function.__module__ or "").partition(".")[0] == "torch"


def _put_back_class(cls: type, before: Mapping[str, Any]) -> None:
    """Give a class the attributes that it had."""
    now = dict(vars(cls))
    for name in now.keys() - before.keys():
        delattr(cls, name)
    for name, value in before.items():
        if now.get(name, _MISSING) is not value:
            setattr(cls, name, value)


_MISSING: Final = object()


def _is_generator(value: object) -> bool:
    return isinstance(value, (torch.Generator, random.Random, np.random.Generator, np.random.RandomState))


def _state_of(generator: Any) -> Callable[[], object]:
    """What puts a generator of random numbers back into its state."""
    if isinstance(generator, torch.Generator):
        return partial(generator.set_state, generator.get_state())
    if isinstance(generator, random.Random):
        return partial(generator.setstate, generator.getstate())
    if isinstance(generator, np.random.RandomState):
        return partial(generator.set_state, generator.get_state())
    bits = generator.bit_generator
    return partial(setattr, bits, "state", bits.state)


def _referred(function: FunctionType) -> Iterator[Any]:
    """What a function's closure and defaults hold, and the containers that it knows by a global name."""
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # noqa: PERF203  # not bound yet
            continue
    yield from function.__defaults__ or ()
    names = function.__globals__
    for name in function.__code__.co_names:
        value = names.get(name)
        if type(value) in _MUTABLE:
            yield value


def _is_plain_object(value: object) -> bool:
    """An object with attributes that is no module, tensor, class, function or Python module."""
    cls = type(value)
    return (
        hasattr(value, "__dict__")
        and cls.__module__.partition(".")[0] not in ("builtins", "torch", "types", "functools")
        and not isinstance(value, (nn.Module, Tensor, type))
    )


def _differs(now: dict[Any, object], before: dict[Any, object]) -> bool:
    """Whether a key is new, gone, in another place or holds another object."""
    return (
        len(now) != len(before)
        or not all(map(operator.is_, now.values(), before.values()))
        or list(now) != list(before)
    )


def draw_alike() -> None:
    """Seed all random numbers, so that a forward pass that draws its structure always draws the same."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.default_generator.manual_seed(0)


def _random_states() -> Callable[[], None]:
    """A function that restores Python's, numpy's and torch's random states: layer drop and the like draw."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.random.get_rng_state()  # noqa: NPY002
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def restore() -> None:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.random.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)

    return restore
