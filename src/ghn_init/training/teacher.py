"""Soft labels for the training images, from a small classifier that is trained for it in minutes.

A hypernetwork trained on the classes' probabilities instead of one class (Hinton et al. 2015, arXiv
1503.02531) gets gradients of less variance: an image that looks like two classes pulls towards both.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghn_init._errors import TrainingError
from ghn_init._files import replacing
from ghn_init._threads import drawing_from
from ghn_init.training._engine import fast_precision
from ghn_init.training._output import writing
from ghn_init.training.data import Normalisation, augment, batch_indices, generator

if TYPE_CHECKING:
    from collections.abc import Callable
    from os import PathLike

    from ghn_init.training.data import Images

_BATCH: Final = 128
_LR: Final = 0.1
_MOMENTUM: Final = 0.9
_DECAY: Final = 5e-4
_SMALL: Final = 16  # pixels; below it the last stage would see single pixels


class SmallResNet(nn.Module):
    """A residual network for small images (He et al. 2015, arXiv 1512.03385, section 4.2).

    Three stages of `blocks` residual blocks, `width` channels in the first and twice as many in each next.
    """

    def __init__(self, classes: int, width: int = 32, blocks: int = 1) -> None:
        super().__init__()
        from torchvision.models.resnet import BasicBlock

        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        layers: list[nn.Module] = []
        inside = width
        for stage in range(3):
            outside = width << stage
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                shortcut = None
                if stride > 1 or inside != outside:
                    shortcut = nn.Sequential(
                        nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside)
                    )
                layers.append(BasicBlock(inside, outside, stride, shortcut))
                inside = outside
        self.stages = nn.Sequential(*layers)
        self.fc = nn.Linear(inside, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) to logits (B, classes)."""
        return self.fc(self.stages(self.stem(x)).mean((2, 3)))


def train_teacher(
    images: Images,
    *,
    epochs: float,
    seed: int = 0,
    width: int = 32,
    on_step: Callable[[float, float], None] | None = None,
) -> SmallResNet:
    """Train a small classifier by SGD with a learning rate that falls linearly to zero.

    Args:
        images: Training images, hold-out already taken off.
        epochs: Passes over the images.
        seed: The seed of weights, order and augmentation.
        width: Channels of the first stage.
        on_step: Called after every step with (fraction done, loss).

    Raises:
        TrainingError: Too few or too small images; no such number of epochs or seed; a loss that is not
            finite.
    """
    if not 0 < epochs < math.inf or not 0 <= seed < 2**63:
        raise TrainingError(f"epochs={epochs}, seed={seed}; expected above 0, and from 0 to 2**63 - 1")
    if len(images) < _BATCH or images.size < _SMALL:
        raise TrainingError(
            f"{len(images)} images of {images.size} pixels for a teacher; "
            f"expected at least {_BATCH} of {_SMALL}"
        )
    with drawing_from(seed):
        network = SmallResNet(len(images.classes), width)
    network = network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    normalise = Normalisation.of(images)
    optimizer = torch.optim.SGD(
        network.parameters(), lr=_LR, momentum=_MOMENTUM, weight_decay=_DECAY, nesterov=True
    )
    steps = max(round(epochs * len(images) / _BATCH), 1)
    for step in range(steps):
        batch = images.take(batch_indices(len(images), _BATCH, step, seed))
        x = normalise(augment(batch.pixels, generator(seed, "teacher", step)))
        loss = F.cross_entropy(_logits(network, x), batch.labels)
        if not loss.isfinite():
            raise TrainingError(f"teacher: loss {loss.item()} in step {step}; expected a finite one")
        for group in optimizer.param_groups:
            group["lr"] = _LR * (1 - step / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if on_step is not None:
            on_step((step + 1) / steps, loss.item())
    return network.eval()


@torch.no_grad()
def soft_labels(network: nn.Module, images: Images, normalise: Normalisation) -> Tensor:
    """Probabilities of the classes for every image, (N, classes): means over it and its mirror image."""
    parts: list[Tensor] = []
    for start in range(0, len(images), 512):
        x = normalise(images.pixels[start : start + 512])
        parts.append((_logits(network, x).softmax(1) + _logits(network, x.flip(3)).softmax(1)) / 2)
    return torch.cat(parts)


def accuracy(labels: Tensor, images: Images) -> float:
    """Percentage of the images whose most probable class is the right one."""
    return (labels.argmax(1) == images.labels).float().mean().item() * 100


def save_soft_labels(path: str | PathLike[str], labels: Tensor, images: Images) -> None:
    """Write soft labels as .npz, with a digest of the images that they belong to, in one piece.

    Raises:
        TrainingError: `path` cannot be written.
    """
    with writing(str(path)), replacing(path) as partial, partial.open("wb") as file:
        np.savez(file, soft_labels=labels.half().numpy(), images=np.array(images.digest()))


def with_soft_labels(images: Images, path: str | PathLike[str]) -> Images:
    """`images` with the soft labels that `save_soft_labels` wrote for them.

    Raises:
        TrainingError: A file that cannot be read, or of other images.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            labels, theirs = torch.from_numpy(file["soft_labels"]).float(), str(file["images"])
    except Exception as error:  # numpy, zipfile and zlib each have their own for a damaged file
        raise TrainingError(f"{path}: cannot be read as soft labels ({error})") from error
    if theirs != images.digest() or labels.shape != (len(images), len(images.classes)):
        raise TrainingError(
            f"{path}: soft labels {tuple(labels.shape)} of other images; expected those of these "
            f"{len(images)} training images: make them anew with `ghn-init teach`"
        )
    return replace(images, soft=labels)


def _logits(network: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=fast_precision(x.device) == torch.bfloat16):
        return network(x).float()
