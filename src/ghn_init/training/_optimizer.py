"""The optimizers of a training run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

from ghn_init.training._ranks import Ranks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from ghn_init.training._config import TrainConfig

_QUINTIC: Final = (3.4445, -4.7750, 2.0315)
"""Coefficients of the Newton-Schulz iteration of Jordan et al. 2024 (kellerjordan.github.io/posts/muon)."""

_ITERATIONS: Final = 5

_MIRRORED: Final = 256
"""Side of a symmetric product from which on only three quarters of it are computed."""

_MOMENTUM: Final = 0.95
_BETAS: Final = (0.9, 0.999)
_EPS: Final = 1e-8
_ADAM_RMS: Final = 0.2
"""Root mean square of Adam's usual update, in learning rates (arXiv 2502.16982, section 2.2)."""


def make_optimizer(model: nn.Module, config: TrainConfig, ranks: Ranks | None = None) -> Optimizer:
    """The optimizer that `config.optimizer` names, over all parameters of `model`.

    Args:
        model: What is trained.
        config: The run's.
        ranks: The processes that train it; without them this one alone.
    """
    settings: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.optimizer == "muon":
        return Muon(model.named_parameters(), **settings, ranks=ranks or Ranks())
    adam = AdamW if config.optimizer == "adamw" else Adam
    return adam(model.parameters(), **settings)


class Muon(Optimizer):
    """Orthogonalised momentum for the matrices, Adam for embeddings and vectors.

    A matrix M (1 x 1 convolutions count as such) moves by `-lr * 0.2 * sqrt(max(M.shape)) * U V^T`, where
    `U S V^T` is its momentum: the same learning rate then suits both halves (arXiv 2502.16982, eq. 4).
    torch's own class of this name is for matrices only and asks for torch 2.9.

    Processes on CPUs share the matrices: each orthogonalises its part of them and gets the others' updates,
    which are those that it would have computed. GPUs compute them sooner than the updates would come.

    Args:
        named: Names and parameters; an embedding is told by its name.
        lr: Learning rate.
        weight_decay: Decoupled.
        ranks: The processes, which all have the same gradients.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        lr: float,
        weight_decay: float,
        ranks: Ranks = Ranks(),  # noqa: B008 (it is frozen)
    ) -> None:
        named = list(named)
        matrices = [p for name, p in named if _is_matrix(name, p)]
        others = [p for name, p in named if not _is_matrix(name, p)]
        groups: list[dict[str, Any]] = [
            {"params": matrices, "orthogonal": True},
            {"params": others, "orthogonal": False},
        ]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})
        self._ranks = ranks if ranks.device.type == "cpu" else Ranks(device=ranks.device)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of every parameter that has a gradient."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            moving = [parameter for parameter in group["params"] if parameter.grad is not None]
            updates = self._orthogonal(moving) if group["orthogonal"] else map(self._adam, moving)
            for parameter, update in zip(moving, updates, strict=True):
                _step(parameter, update, group["lr"], group["weight_decay"])
        return loss

    def _orthogonal(self, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
        directions = [_direction(parameter, self.state[parameter]) for parameter in parameters]
        parts = _shares([direction.shape for direction in directions], self._ranks.world)
        for index in parts[self._ranks.rank]:
            directions[index] = _orthogonal(directions[index])
        return self._ranks.exchange(directions, parts)

    def _adam(self, parameter: Tensor) -> Tensor:
        return _adam(_gradient(parameter), self.state[parameter])


def _shares(shapes: Sequence[tuple[int, ...]], world: int) -> list[list[int]]:
    """Which matrices each of the processes orthogonalises, in about equal times."""
    costs = [min(shape) ** 2 * (2 * max(shape) + 3 * _ITERATIONS * min(shape)) for shape in shapes]
    shares: list[list[int]] = [[] for _ in range(world)]
    spent = [0] * world
    for index in sorted(range(len(costs)), key=costs.__getitem__, reverse=True):
        rank = spent.index(min(spent))
        shares[rank].append(index)
        spent[rank] += costs[index]
    return shares


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _is_matrix(name: str, parameter: Tensor) -> bool:
    return parameter.squeeze().ndim == 2 and "embed" not in name


def _step(parameter: Tensor, update: Tensor, lr: float, decay: float) -> None:
    """Move a parameter; a decay that is too small for its dtype to tell takes no time."""
    if lr * decay > torch.finfo(parameter.dtype).eps / 4:
        parameter.mul_(1 - lr * decay)
    parameter.add_(update.view_as(parameter), alpha=-lr)


def _direction(parameter: Tensor, state: dict[str, Tensor]) -> Tensor:
    """Nesterov's momentum of a matrix, (m, n)."""
    gradient = _gradient(parameter)
    if not state:
        state["momentum_buffer"] = torch.zeros_like(gradient)
    momentum = state["momentum_buffer"].lerp_(gradient, 1 - _MOMENTUM)
    return gradient.lerp(momentum, _MOMENTUM).flatten(1)


def _orthogonal(matrix: Tensor) -> Tensor:
    return orthogonalise(matrix).mul_(_ADAM_RMS * max(matrix.shape) ** 0.5)


def _adam(gradient: Tensor, state: dict[str, Tensor]) -> Tensor:
    if not state:
        state["step"] = torch.zeros(())
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
    (first, second), step = _BETAS, state["step"].add_(1).item()
    mean = state["exp_avg"].lerp_(gradient, 1 - first) / (1 - first**step)
    square = state["exp_avg_sq"].lerp_(gradient.square(), 1 - second) / (1 - second**step)
    return mean / square.sqrt_().add_(_EPS)


def orthogonalise(matrix: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly: singular values come out between 0.7 and 1.2.

    The iteration `X <- aX + b(XX^T)X + c(XX^T)^2 X` only ever multiplies X from the left, so its factors
    are collected in a matrix of the smaller side's size: two products with the long side, not fifteen. They
    are polynomials in X X^T: symmetric, and their order does not count.

    Args:
        matrix: (m, n).
    """
    tall = matrix.shape[0] > matrix.shape[1]
    square = matrix.square().sum().clamp(min=1e-24)  # of its Frobenius norm, by which it is divided
    gram = (_symmetric(matrix.mT, matrix) if tall else _symmetric(matrix, matrix.mT)) / square
    factor = together = _factor(gram)
    for _ in range(_ITERATIONS - 1):
        gram = _symmetric(factor, _symmetric(factor, gram))
        factor = _factor(gram)
        together = _symmetric(factor, together)
    together = together / square.sqrt()
    return matrix @ together if tall else together @ matrix


def _factor(gram: Tensor) -> Tensor:
    """`a + b (XX^T) + c (XX^T)^2`, of X X^T."""
    a, b, c = _QUINTIC
    factor = torch.add(b * gram, _symmetric(gram, gram), alpha=c)
    factor.diagonal().add_(a)
    return factor


def _symmetric(left: Tensor, right: Tensor) -> Tensor:
    """The product of two matrices, which is known to be symmetric: of large ones a part is mirrored."""
    n = len(left)
    if n < _MIRRORED:
        return left @ right
    half, product = n // 2, left.new_empty(n, n)
    product[:half, :half] = _symmetric(left[:half], right[:, :half])
    product[half:, half:] = _symmetric(left[half:], right[:, half:])
    product[:half, half:] = left[:half] @ right[:, half:]
    product[half:, :half] = product[:half, half:].mT
    return product
