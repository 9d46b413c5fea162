"""The splits of DeepNets-1M."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, overload

from ghn_init._errors import ArchitectureError
from ghn_init.deepnets._architecture import Architecture
from ghn_init.deepnets._sample import sample
from ghn_init.deepnets._space import LARGE_INPUT, Genotype
from ghn_init.deepnets._widths import evaluation_width

if TYPE_CHECKING:
    from torch import nn

SPLITS: Final = {
    "train": 1_000_000, "val": 500, "test": 500, "wide": 100, "deep": 100, "dense": 100, "bnfree": 100,
    "search": 100_000, "predefined": 2,
}  # fmt: skip
"""Published number of architectures of every split."""

_FIXED_WIDTH: Final = frozenset({"val", "test", "deep", "dense", "bnfree"})

VIT: Final = Architecture(
    Genotype(
        normal=(("none", 0), ("msa", 1)), normal_concat=(2,),
        reduce=(("none", 0), ("avg_pool_3x3", 1)), reduce_concat=(2,),
    ),
    n_cells=12, preproc=False, C=128,
)  # fmt: skip
"""The predefined vision transformer."""


@dataclass(frozen=True)
class ResNet50:
    """The predefined ResNet-50, torchvision's; for small images with a 3x3 stem and no max pooling."""

    def supports(self, image_size: int) -> bool:
        """Whether `build` takes images of this side: all."""
        return image_size >= 1

    def build(self, num_classes: int = 10, image_size: int = 32) -> nn.Module:
        """Make the network."""
        from torch import nn
        from torchvision.models import resnet50

        model = resnet50(num_classes=num_classes)
        if image_size < LARGE_INPUT:
            model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
            model.maxpool = nn.Identity()  # type: ignore[assignment]
        return model


class DeepNets1M(Sequence["Architecture | ResNet50"]):
    """A split of DeepNets-1M; `DeepNets1M(split)[i]` makes architecture i by itself, without files.

    Widths: `train` and `search` have C = 32 and fc_dim = 256 (training draws them for every use,
    `training_width`); in the evaluation splits C gives 2.5 million parameters on CIFAR-10
    (`evaluation_width`); `wide` is four times as wide as `test`, twice for large images.

    Args:
        split: One of `SPLITS`.
        seed: Another seed gives another million.
        image_size: Matters for `wide` only.

    Raises:
        ArchitectureError: There is no such split, or no such seed.
    """

    def __init__(self, split: str, seed: int = 0, *, image_size: int = 32) -> None:
        if not 0 <= seed < 2**64:
            raise ArchitectureError(f"seed {seed} of DeepNets-1M; expected 0 to 2**64 - 1")
        if split not in SPLITS:
            raise ArchitectureError(f"no split {split!r} in DeepNets-1M; expected one of {tuple(SPLITS)}")
        self.split = split
        self.seed = seed
        self.image_size = image_size

    def __len__(self) -> int:
        return SPLITS[self.split]

    def __repr__(self) -> str:
        return f"DeepNets1M({self.split!r}, seed={self.seed}): {len(self):,} architectures"

    @overload
    def __getitem__(self, index: int) -> Architecture | ResNet50: ...
    @overload
    def __getitem__(self, index: slice) -> list[Architecture | ResNet50]: ...
    def __getitem__(self, index: int | slice) -> Architecture | ResNet50 | list[Architecture | ResNet50]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        index = operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self!r} has no index {index}")
        index %= len(self)
        if self.split == "predefined":
            return (ResNet50(), VIT)[index]
        arch = sample("test" if self.split == "wide" else self.split, index, self.seed)
        if self.split == "wide":
            factor = 2 if self.image_size >= LARGE_INPUT else 4
            return dataclasses.replace(arch, C=evaluation_width(arch) * factor)
        return dataclasses.replace(arch, C=evaluation_width(arch)) if self.split in _FIXED_WIDTH else arch
