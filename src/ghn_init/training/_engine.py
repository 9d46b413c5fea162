"""Runs networks with predicted parameters, several side by side, each in a thread with one core.

Small networks use two cores badly within an operation, so two networks run at once. A network's gradient
goes to leaf copies of its parameters, which keeps the graphs of different networks apart: memory holds
one network's activations per thread, and one backward pass through the GHN takes all gradients.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghn_init.training._layers import prepare

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


@dataclass(frozen=True)
class Result:
    """What one network did with one batch: mean cross-entropy, hits among the images, gradients by name."""

    loss: float
    correct: int
    gradients: dict[str, Tensor]


@dataclass(frozen=True)
class Job:
    """One network of a step: how to build it, its parameters, its images, its seed."""

    build: Callable[[], nn.Module]
    params: Mapping[str, Tensor]
    images: Tensor
    seed: int
    cost: float


class Engine:
    """Runs the jobs of a step on `workers` threads; a context manager.

    Args:
        workers: Threads; with more than one, each has one core for its operations.
        precision: Type in which networks run; norm layers' parameters stay in float32.
        label_smoothing: Of the cross-entropy.
    """

    def __init__(
        self, workers: int = 2, precision: torch.dtype = torch.bfloat16, label_smoothing: float = 0.0
    ) -> None:
        self.workers, self.precision, self.label_smoothing = workers, precision, label_smoothing

    def __enter__(self) -> Engine:
        set_one = (lambda: torch.set_num_threads(1)) if self.workers > 1 else None
        self._pool = ThreadPoolExecutor(self.workers, "network", initializer=set_one)
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def run(self, jobs: Sequence[Job], labels: Tensor) -> list[Result]:
        """Forward and backward of all jobs; results in their order. The dearest start first."""
        order = sorted(range(len(jobs)), key=lambda i: -jobs[i].cost)
        futures = {i: self._pool.submit(self._run, jobs[i], labels) for i in order}
        return [futures[i].result() for i in range(len(jobs))]

    def _run(self, job: Job, labels: Tensor) -> Result:
        network = prepare(job.build(), seed=job.seed).train()
        leaves = inject(network, job.params, self.precision, gradients=True)
        logits = network(job.images.to(self.precision)).float()
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        correct = int((logits.detach().argmax(1) == labels).sum())
        found = {name: grad for name, grad in zip(leaves, grads, strict=True) if grad is not None}
        return Result(loss.item(), correct, found)


def inject(
    network: nn.Module,
    params: Mapping[str, Tensor],
    precision: torch.dtype = torch.float32,
    *,
    gradients: bool = False,
) -> dict[str, Tensor]:
    """Put `params` in the places of a network's parameters, as leaf copies of type `precision`.

    The slots are written directly, which is what `torch.func.functional_call` does around a call, without
    its checks. Convolution weights get the channels-last layout, which the CPU's kernels prefer. Returns
    the leaves by name; with `gradients` they ask for gradients.
    """
    leaves: dict[str, Tensor] = {}
    norms = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm)  # noqa: SLF001 (the class has no public name)
    for prefix, module in network.named_modules():
        dtype = torch.float32 if isinstance(module, norms) else precision
        for slot in module._parameters:  # noqa: SLF001 (functional_call writes the same slots)
            name = f"{prefix}.{slot}" if prefix else slot
            if name not in params:
                continue
            leaf = params[name].detach().to(dtype)
            if leaf.ndim == 4:
                leaf = leaf.contiguous(memory_format=torch.channels_last)
            leaves[name] = leaf.requires_grad_(gradients)
            module._parameters[slot] = leaf  # noqa: SLF001  # pyright: ignore[reportArgumentType]
    return leaves
