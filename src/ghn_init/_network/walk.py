"""Walks over a network's modules, parameters and buffers, as torch's own but in a fifth of the time.

torch's are generators inside generators, one for each level of modules; a prediction goes over a network a
dozen times.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor, nn


def modules_of(model: nn.Module, *, every_path: bool = False) -> list[tuple[str, nn.Module]]:
    """Qualified names and modules, as `named_modules` gives them: every one once, or once for each path."""
    found: list[tuple[str, nn.Module]] = []
    seen: set[int] = set()
    todo = [("", model)]
    while todo:
        path, module = todo.pop()
        if not every_path:
            if id(module) in seen:
                continue
            seen.add(id(module))
        found.append((path, module))
        if children := module._modules:  # noqa: SLF001
            prefix = f"{path}." if path else ""
            below = [(prefix + name, child) for name, child in children.items() if child is not None]
            todo += below[::-1]
    return found


def params_of(modules: Iterable[tuple[str, nn.Module]]) -> dict[str, nn.Parameter]:
    """The parameters of these modules by qualified name, tied ones once, as `named_parameters` gives them."""
    seen: set[int] = set()
    found = {}
    for path, module in modules:
        for name, param in module._parameters.items():  # noqa: SLF001
            if param is not None and id(param) not in seen:
                seen.add(id(param))
                found[f"{path}.{name}" if path else name] = param
    return found


def tensors_of(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[Tensor]:
    """The parameters and buffers of these modules, tied ones as often as they are there."""
    for _, module in modules:
        for tensors in (module._parameters, module._buffers):  # noqa: SLF001
            for tensor in tensors.values():
                if tensor is not None:
                    yield tensor
