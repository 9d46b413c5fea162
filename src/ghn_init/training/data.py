"""Images in memory: splitting, shuffling and augmenting them as whole batches. `_reading.py` reads them.

Images are uint8 tensors (N, 3, H, W) throughout; a batch becomes float when it is normalised.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from ghn_init._errors import TrainingError

VALIDATION_IMAGES: Final = 5_000
"""Training images held out for validation (arXiv 2110.13100, section 5)."""

_SPLIT_SEED: Final = 20211025
"""Seed of the shuffle before the hold-out; fixed, so that every run holds out the same images."""


@dataclass(frozen=True)
class Images:
    """Labelled images: `pixels` (N, 3, H, W) uint8, `labels` (N,) int64, names of the classes.

    `soft` (N, classes) are probabilities of the classes beside the labels, where a teacher gave them.
    """

    pixels: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    soft: Tensor | None = None

    def __post_init__(self) -> None:
        if self.pixels.ndim != 4 or self.pixels.shape[1] != 3 or self.pixels.dtype != torch.uint8:
            raise TrainingError(
                f"images of shape {tuple(self.pixels.shape)} and type {self.pixels.dtype}; "
                "expected (N, 3, H, W) uint8"
            )
        if self.labels.shape != self.pixels.shape[:1]:
            raise TrainingError(
                f"{len(self.pixels)} images and labels of shape {tuple(self.labels.shape)}; "
                "expected one label for every image"
            )
        if len(self.labels) and not 0 <= self.labels.min() <= self.labels.max() < len(self.classes):
            raise TrainingError(
                f"labels from {self.labels.min()} to {self.labels.max()} and {len(self.classes)} classes; "
                f"expected 0 to {len(self.classes) - 1}, the place of each image's class among their names"
            )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def size(self) -> int:
        """Side of the images in pixels."""
        return self.pixels.shape[-1]

    def digest(self) -> str:
        """A short digest of pixels and labels, order included."""
        found = hashlib.blake2b(self.pixels.contiguous().numpy().data, digest_size=12)
        found.update(self.labels.contiguous().numpy().data)
        return found.hexdigest()

    def take(self, index: Tensor | slice) -> Images:
        """The images at these places."""
        soft = None if self.soft is None else self.soft[index]
        return replace(self, pixels=self.pixels[index], labels=self.labels[index], soft=soft)

    def spread(self, count: int) -> Images:
        """So many of the images, spread evenly over the set, or all where there are fewer."""
        return self if count >= len(self) else self.take(torch.linspace(0, len(self) - 1, count).long())

    def targets(self, softness: float) -> Tensor:
        """(N, classes): the labels, with the soft ones in a share of `softness`."""
        hard = F.one_hot(self.labels, len(self.classes)).float()
        return hard if self.soft is None else torch.lerp(hard, self.soft, softness)


@dataclass(frozen=True)
class Normalisation:
    """Mean and standard deviation of every channel, of pixels between 0 and 1; 1 where all are alike."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @classmethod
    def of(cls, images: Images) -> Normalisation:
        """Mean and standard deviation of all pixels of `images`."""
        counts = torch.stack([torch.bincount(c.flatten(), minlength=256) for c in images.pixels.unbind(1)])
        values = torch.arange(256, dtype=torch.float64) / 255
        weights = counts.double() / counts.sum(1, keepdim=True)
        mean = weights @ values
        std = (weights @ values.square() - mean.square()).clamp_min(0).sqrt()
        std = torch.where(std > _CONSTANT, std, 1.0)  # a channel without any differences stays one
        return cls(tuple(mean.tolist()), tuple(std.tolist()))  # pyright: ignore[reportArgumentType]

    def __call__(self, pixels: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) to float32 of mean 0 and deviation 1, channels last in memory."""
        values = 255 * torch.tensor([self.mean, self.std], device=pixels.device)
        mean, std = values[:, None, :, None, None]
        return pixels.float().sub_(mean).div_(std).contiguous(memory_format=torch.channels_last)


SPLITS: Final = ("train", "test")
"""What a source of images has."""

_CONSTANT: Final = 1e-6
"""A standard deviation that is a rounding error; one grey level in a million pixels gives more."""

CIFAR10: Final = Normalisation((0.491, 0.482, 0.447), (0.245, 0.243, 0.261))
"""The normalisation of CIFAR-10's training images, as JPEG of quality 75."""


def hold_out(images: Images, count: int | None = None) -> tuple[Images, Images]:
    """Training and validation images: the last `count` of a fixed shuffle are held out.

    Without a count they are 5,000, but at most a fifth.

    Raises:
        TrainingError: No more images than that.
    """
    if count is None:
        count = min(VALIDATION_IMAGES, len(images) // 5)
    if not 0 < count < len(images):
        raise TrainingError(
            f"cannot hold out {count} of {len(images)} images; expected more than {count:,} training images"
        )
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    return images.take(order[:-count]), images.take(order[-count:])


def batch_indices(count: int, batch: int, step: int, seed: int) -> Tensor:
    """Places of the images of step `step`, (batch,): every epoch is a permutation of its own.

    An epoch has `count // batch` steps; the images left over differ from epoch to epoch. It depends on
    nothing but the arguments, so a run can be taken up at any step.
    """
    epoch, place = divmod(step, max(count // batch, 1))
    return _epoch_order(count, seed, epoch)[place * batch : (place + 1) * batch]


@lru_cache(maxsize=1)
def _epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=generator(seed, "images", epoch))


def generator(seed: int, stream: str, counter: int) -> torch.Generator:
    """A random generator for entry `counter` of a named stream: no state to save between entries."""
    digest = hashlib.blake2b(f"{seed}/{stream}/{counter}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def augment(pixels: Tensor, rng: torch.Generator, padding: int = 4) -> Tensor:
    """Random crop after zero padding and horizontal flip, one draw per image; (N, 3, H, W) uint8."""
    n, channels, height, width = pixels.shape
    padded = F.pad(pixels, (padding,) * 4).permute(0, 2, 3, 1).reshape(-1, channels)
    top, left = torch.randint(0, 2 * padding + 1, (2, n, 1), generator=rng)
    flip = torch.rand((n, 1), generator=rng) < 0.5
    rows = top + torch.arange(height) + torch.arange(n)[:, None] * (height + 2 * padding)
    columns = left + torch.where(flip, torch.arange(width - 1, -1, -1), torch.arange(width))
    places = rows[:, :, None] * (width + 2 * padding) + columns[:, None, :]
    return padded.index_select(0, places.flatten()).view(n, height, width, channels).permute(0, 3, 1, 2)


def sized(x: Tensor, side: int) -> Tensor:
    """Images (N, C, H, W) at the side that networks see: their own, or half of it by averages over 2 x 2."""
    return x if x.shape[-1] == side else F.avg_pool2d(x, 2).contiguous(memory_format=torch.channels_last)


def check_side(images: Images, side: int) -> None:
    """See that networks can be shown these images at this side.

    Raises:
        TrainingError: It is neither their own nor half of it; they are not square.
    """
    height, width = images.pixels.shape[2:]
    if height != width:
        raise TrainingError(f"images of {height} x {width} pixels; expected square ones")
    if side not in (images.size, images.size // 2):
        raise TrainingError(f"image_size={side} and images of {images.size} pixels; expected that or half")


def check_splits(train: Images, test: Images) -> None:
    """See that the labels of both mean the same, and that images have one size.

    Raises:
        TrainingError: The classes or the sizes differ.
    """
    sizes = [tuple(split.pixels.shape[2:]) for split in (train, test)]
    if sizes[0] != sizes[1]:
        raise TrainingError(
            f"training images of {sizes[0][0]} x {sizes[0][1]} pixels and test images of {sizes[1][0]} x "
            f"{sizes[1][1]}; expected one size"
        )
    if train.classes == test.classes:
        return
    both = (set(train.classes), set(test.classes))
    alone = [
        f"{sorted(mine - others)[:3]} in {split} only"
        for split, mine, others in zip(SPLITS, both, both[::-1], strict=True)
        if mine - others
    ]
    raise TrainingError(
        f"{len(train.classes)} classes of training images and {len(test.classes)} of test images "
        f"({'; '.join(alone) or 'in another order'}); expected the same"
    )
