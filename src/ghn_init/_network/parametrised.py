"""Weights that a module computes from other parameters, and writing through that computation.

`torch.nn.utils.parametrize` (with it `parametrizations.weight_norm`, `spectral_norm` and `orthogonal`)
replaces a weight by parameters of its own. In the graph the computed weight stands for itself, under the
name that it had; a prediction of it is solved for those parameters, by the parametrisation's `right_inverse`.

The older hooks `torch.nn.utils.weight_norm` and `spectral_norm`, which torch calls deprecated and which
torchvision, timm and transformers do not use, are traced like a computation written by hand: the direction is
predicted and the magnitude kept.
"""

from __future__ import annotations

import copy
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from ghn_init._errors import PredictError
from ghn_init._network.walk import modules_of
from ghn_init._threads import seeded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

POWER_ITERATIONS: Final = 15
"""How often a spectral norm's vectors are improved for a new weight: as often as torch does at first."""


@dataclass(frozen=True)
class Computed:
    """A weight that is computed from other parameters, by `torch.nn.utils.parametrize`.

    Attributes:
        module: The module whose weight it is.
        path: The module's qualified name.
        attribute: The weight's name in the module.
    """

    module: nn.Module
    path: str
    attribute: str

    @property
    def name(self) -> str:
        """The weight's qualified name."""
        return self._inside(self.attribute)

    @property
    def chain(self) -> Any:
        """The module that computes it, torch's `ParametrizationList`."""
        return self.module.parametrizations[self.attribute]  # pyright: ignore[reportIndexIssue, reportCallIssue, reportArgumentType]

    @property
    def _functions(self) -> list[nn.Module]:
        """The parametrisations, in the order in which they are applied."""
        chain = self.chain
        return [chain[index] for index in range(len(chain))]

    @property
    def of_parameters(self) -> bool:
        """The originals are parameters; a parametrised buffer is none of our business."""
        return len(dict(self.chain.named_parameters(recurse=False))) == len(self.parts)

    @property
    def how(self) -> str:
        """How it is computed, in words: the parametrisations' names."""
        names = ", ".join(type(function).__name__.lstrip("_") for function in self._functions)
        return f"parametrisation {names}"

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parameters that are solved for: `original`, or `original0`, `original1`, ..."""
        chain = self.chain
        names = ["original"] if chain.is_tensor else [f"original{index}" for index in range(chain.ntensors)]
        return tuple(self._deep(name) for name in names)

    @property
    def own(self) -> tuple[str, ...]:
        """Names of the tensors of the parametrisations themselves."""
        parts = set(self.parts)
        tensors = (*self.chain.named_parameters(), *self.chain.named_buffers())
        return tuple(name for inner, _ in tensors if (name := self._deep(inner)) not in parts)

    @property
    def solved(self) -> tuple[str, ...]:
        """Names of the tensors that `solve` gives a value: the originals and parametrisations' buffers."""
        return (*self.parts, *(self._deep(name) for name, _ in self.chain.named_buffers()))

    @property
    def obstacle(self) -> str:
        """Why no value can be written through it, or "": no `right_inverse`, or one that cannot work yet."""
        for function in self._functions:
            name = type(function).__name__.lstrip("_")
            if not hasattr(function, "right_inverse"):
                return f"parametrised by {name}, which has no right_inverse"
            tensors = (*function.parameters(), *function.buffers())
            if not _is_spectral(function) and any(tensor.is_meta for tensor in tensors):
                return f"parametrised by {name}, which is on the meta device itself"
        return ""

    def value(self) -> Tensor:
        """The weight as it is now, before a spectral norm divides it: what `solve` takes. Changes nothing."""
        current = [self.chain.get_parameter(name.rpartition(".")[2]) for name in self.parts]
        for function in self._functions:
            if not _is_spectral(function):
                current = [copy.deepcopy(function).eval()(*current)]
        return current[0]

    @torch.no_grad()
    def solve(self, value: Tensor, seed: int = 0) -> dict[str, Tensor]:
        """What the computation's tensors must be for the weight to become `value`, or come close.

        A pure function: neither the module nor the global random state changes. A parametrisation that
        cannot make every value, such as an orthogonal one, makes the one that its `right_inverse` finds.

        Args:
            value: The wanted weight, in the dtype and on the device of the parts.
            seed: Seeds what is drawn at random.

        Returns:
            Names (`solved`) and values.

        Raises:
            PredictError: There is no solution.
        """
        originals, functions = self._seeded(value, seed)
        buffers = {
            self._deep(f"{index}.{name}"): tensor
            for index, function in enumerate(functions)
            for name, tensor in function.named_buffers()
        }
        found = dict(zip(self.parts, originals, strict=True)) | buffers
        solution = {name: found[name] for name in self.solved}
        for name, tensor in solution.items():
            # isfinite() would make more than one tensor of this size; aminmax makes none, and NaN shows.
            if tensor.is_floating_point() and not torch.stack(tensor.aminmax()).isfinite().all():
                raise PredictError(f"{self.name}: {self.how} gives values that are not finite for {name}")
        return solution

    @torch.no_grad()
    def made_of(self, value: Tensor, seed: int = 0) -> Tensor:
        """The weight that the module will have once `solve(value)` is written: `value`, or what comes close.

        Raises:
            PredictError: As `solve`.
        """
        originals, functions = self._seeded(value, seed)
        current: Any = originals
        for function in functions:
            current = [function.eval()(*current)]
        return current[0]

    def _seeded(self, value: Tensor, seed: int) -> tuple[list[Tensor], list[nn.Module]]:
        """The originals for a value, and copies of the parametrisations as they will be.

        Raises:
            PredictError: There is no solution.
        """
        with seeded(self.name, seed):
            try:
                return self._solved(value)
            except Exception as error:
                told = f"{type(error).__name__}: {error}"
                raise PredictError(f"{self.name}: {self.how} cannot be inverted: {told}") from error

    def _solved(self, value: Tensor) -> tuple[list[Tensor], list[nn.Module]]:
        functions = [copy.deepcopy(function) for function in self._functions]
        for function in filter(_is_spectral, functions):
            for name, vector in list(function.named_buffers()):
                setattr(function, name, _direction(vector, value))
        found: Any = value
        for function in reversed(functions):
            found = function.right_inverse(found)  # pyright: ignore[reportCallIssue]
        originals = [found] if isinstance(found, Tensor) else list(found)
        for name, tensor in zip(self.parts, originals, strict=True):
            stored = self.chain.get_parameter(name.rpartition(".")[2])
            if tensor.shape != stored.shape:
                raise ValueError(f"{name} has shape {tuple(stored.shape)}, found {tuple(tensor.shape)}")
        self._settle(functions, originals)
        return originals, functions

    @staticmethod
    def _settle(functions: list[nn.Module], originals: list[Tensor]) -> None:
        """Let vectors that follow the weight, as those of a spectral norm, come to rest."""
        if not any(map(_is_spectral, functions)):
            return
        for function in functions:
            function.train()
        for _ in range(POWER_ITERATIONS):
            current: Any = originals
            for function in functions:
                current = [function(*current)]

    def _deep(self, name: str) -> str:
        return self._inside(f"parametrizations.{self.attribute}.{name}")

    def _inside(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name


def computed_weights(model: nn.Module) -> dict[str, Computed]:
    """The computed weights of `model`, by qualified name."""
    found: list[Computed] = []
    for path, module in modules_of(model):
        children = module._modules  # noqa: SLF001 hasattr takes ten times longer; TorchScript's has no `get`
        chains = children["parametrizations"] if "parametrizations" in children else None  # noqa: SIM401
        if isinstance(chains, nn.ModuleDict):
            weights = (Computed(module, path, attribute) for attribute in chains)
            found += [weight for weight in weights if weight.of_parameters]
    return {weight.name: weight for weight in found}


@contextmanager
def watched(weights: Mapping[str, Computed], seen: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Inside, `seen(name, tensor)` is called whenever one of `weights` was computed."""
    with ExitStack() as stack:
        for name, weight in weights.items():
            handle = weight.chain.register_forward_hook(lambda _module, _args, out, n=name: seen(n, out))
            stack.callback(handle.remove)
        yield


def _is_spectral(function: nn.Module) -> bool:
    return type(function).__name__ == "_SpectralNorm"


def _direction(vector: Tensor, like: Tensor) -> Tensor:
    """A random vector of length 1 like `vector`: where the power iteration starts, whatever was before."""
    drawn = torch.empty(vector.shape, dtype=torch.float32).normal_()
    return (drawn / drawn.norm()).to(like.device, like.dtype)
