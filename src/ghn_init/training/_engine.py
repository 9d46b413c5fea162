"""Runs networks with predicted parameters, one after another.

A network's gradient goes to leaf copies of its parameters, which keeps the graphs of different networks
apart: memory holds one network's activations, and one backward pass through the GHN takes all gradients.
Several cores are used by several processes (`_ranks`): small networks use two cores badly within an
operation, and two Python threads wait for each other.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghn_init.training._layers import prepare

if TYPE_CHECKING:
    from collections.abc import Mapping


KERNELS: Final = 8192
"""Compiled kernels that oneDNN keeps in a process of ours; by default 1,024.

Every shape of every layer needs some, networks bring shapes of their own, and compiling those of a small
layer takes as long as running them.
"""


LARGEST_GRADIENT: Final = 1e6
"""Norm of a network's gradients from which on they count as not finite; usual ones are below 100.

Clipping would leave nothing of the other networks' gradients, and the optimizer's momentum keeps it for long.
"""


def prepare_process(threads: int = 1) -> None:
    """Set up a process for running many small networks, before it runs the first.

    One thread, because small networks are slower on several: cores are for processes. And room for compiled
    kernels, unless ONEDNN_PRIMITIVE_CACHE_CAPACITY says how much.
    """
    torch.set_num_threads(threads)
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KERNELS))


def fast_precision(device: torch.device) -> torch.dtype:
    """The type in which networks run fastest on a device: bfloat16 if it computes in it, else float32.

    A processor without bfloat16 arithmetic converts at every call and takes three to six times as long.
    """
    if device.type != "cpu":
        return torch.bfloat16
    computes = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()  # noqa: SLF001
    return torch.bfloat16 if computes else torch.float32  # (torch 2.6 has no public name for them)


@dataclass(frozen=True)
class Result:
    """What one network did with one batch: mean cross-entropy, hits among the images, gradients by name."""

    loss: float
    correct: int
    gradients: dict[str, Tensor]

    @property
    def sound(self) -> bool:
        """Whether loss and gradients are finite, and small enough to leave something of other networks'."""
        if not math.isfinite(self.loss):
            return False
        norm = torch.nn.utils.get_total_norm(self.gradients.values())
        return bool(norm < LARGEST_GRADIENT)  # NaN is not


@dataclass(frozen=True)
class Engine:
    """Forward and backward of networks with predicted parameters.

    Attributes:
        precision: Type in which networks run; norm layers' parameters stay in float32.
        label_smoothing: Label smoothing of the cross-entropy.
    """

    precision: torch.dtype = torch.float32
    label_smoothing: float = 0.0

    def run(
        self,
        network: nn.Module,
        params: Mapping[str, Tensor],
        images: Tensor,
        labels: Tensor,
        seed: int = 0,
        targets: Tensor | None = None,
    ) -> Result:
        """Loss and gradients of a network, which is taken over and may be on the meta device.

        Args:
            network: A network of `deepnets`.
            params: Its parameters by name, in float32.
            images: (B, 3, H, W), normalised.
            labels: (B,).
            seed: The seed of its dropout.
            targets: (B, classes), probabilities to learn instead of the labels.
        """
        prepare(network, seed=seed, fast=images.device.type == "cpu").train()
        leaves = inject(network, params, self.precision, gradients=True)
        return self.backward(self.forward(network, images), leaves, labels, targets)

    def forward(self, network: nn.Module, images: Tensor) -> Tensor:
        """Logits (B, classes) of a network with parameters."""
        return network(images.to(self.precision)).float()

    def backward(
        self, logits: Tensor, leaves: Mapping[str, Tensor], labels: Tensor, targets: Tensor | None = None
    ) -> Result:
        """Loss of these logits and its gradients by `leaves`."""
        wanted = labels if targets is None else targets
        loss = F.cross_entropy(logits, wanted, label_smoothing=self.label_smoothing)
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

    They are registered directly, which is what `torch.func.functional_call` does around a call, without its
    checks. Convolution weights get the channels-last layout, which the CPU's kernels prefer. Returns the
    leaves by name; with `gradients` they ask for gradients.
    """
    leaves: dict[str, Tensor] = {}
    norms = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm)  # noqa: SLF001 (the class has no public name)
    for prefix, module in network.named_modules():
        dtype = torch.float32 if isinstance(module, norms) else precision
        for attribute in module._parameters:  # noqa: SLF001 (functional_call writes there, too)
            name = f"{prefix}.{attribute}" if prefix else attribute
            if name not in params:
                continue
            leaf = params[name].detach().to(dtype)
            if leaf.ndim == 4:
                leaf = leaf.contiguous(memory_format=torch.channels_last)
            leaves[name] = leaf.requires_grad_(gradients)
            module._parameters[attribute] = leaf  # noqa: SLF001  # pyright: ignore[reportArgumentType]
    return leaves
