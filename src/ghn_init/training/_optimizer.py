"""The optimizers of a training run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ghn_init.training._config import TrainConfig

_QUINTIC: Final = (3.4445, -4.7750, 2.0315)
"""Coefficients of the Newton-Schulz iteration of Jordan et al. 2024 (kellerjordan.github.io/posts/muon)."""

_ITERATIONS: Final = 5
_MOMENTUM: Final = 0.95
_BETAS: Final = (0.9, 0.999)
_EPS: Final = 1e-8
_ADAM_RMS: Final = 0.2
"""Root mean square of Adam's usual update, in learning rates (arXiv 2502.16982, section 2.2)."""


def make_optimizer(model: nn.Module, config: TrainConfig) -> Optimizer:
    """The optimizer that `config.optimizer` names, over all parameters of `model`."""
    settings: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.optimizer == "muon":
        return Muon(model.named_parameters(), **settings)
    adam = AdamW if config.optimizer == "adamw" else Adam
    return adam(model.parameters(), **settings)


class Muon(Optimizer):
    """Orthogonalised momentum for the matrices, Adam for embeddings and vectors.

    A matrix M (1 x 1 convolutions count as such) moves by `-lr * 0.2 * sqrt(max(M.shape)) * U V^T`, where
    `U S V^T` is its momentum: the same learning rate then suits both halves (arXiv 2502.16982, eq. 4).
    torch's own class of this name is for matrices only and asks for torch 2.9.

    Args:
        named: Names and parameters; an embedding is told by its name.
        lr: Learning rate.
        weight_decay: Decoupled.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], lr: float, weight_decay: float) -> None:
        named = list(named)
        matrices = [p for name, p in named if _is_matrix(name, p)]
        others = [p for name, p in named if not _is_matrix(name, p)]
        groups: list[dict[str, Any]] = [
            {"params": matrices, "orthogonal": True},
            {"params": others, "orthogonal": False},
        ]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of every parameter that has a gradient."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            lr, decay = group["lr"], group["weight_decay"]
            for parameter in group["params"]:
                if (gradient := parameter.grad) is None:
                    continue
                state = self.state[parameter]
                update = _orthogonal(gradient, state) if group["orthogonal"] else _adam(gradient, state)
                parameter.mul_(1 - lr * decay).add_(update.view_as(parameter), alpha=-lr)
        return loss


def _is_matrix(name: str, parameter: Tensor) -> bool:
    return parameter.squeeze().ndim == 2 and "embed" not in name


def _orthogonal(gradient: Tensor, state: dict[str, Tensor]) -> Tensor:
    if not state:
        state["momentum_buffer"] = torch.zeros_like(gradient)
    momentum = state["momentum_buffer"].lerp_(gradient, 1 - _MOMENTUM)
    matrix = gradient.lerp(momentum, _MOMENTUM).flatten(1)  # Nesterov's
    return orthogonalise(matrix) * (_ADAM_RMS * max(matrix.shape) ** 0.5)


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
    are collected in a matrix of the smaller side's size: two products with the long side, not fifteen.

    Args:
        matrix: (m, n).
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
    x = wide / wide.norm().clamp(min=1e-12)
    a, b, c = _QUINTIC
    gram = x @ x.mT
    identity = torch.eye(len(gram), dtype=x.dtype, device=x.device)
    left = identity
    for _ in range(_ITERATIONS):
        factor = a * identity + b * gram + c * (gram @ gram)
        left = factor @ left
        gram = factor @ gram @ factor  # factor is symmetric and commutes with gram
    result = left @ x
    return result if wide is matrix else result.mT
