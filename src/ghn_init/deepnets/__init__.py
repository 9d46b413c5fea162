"""DeepNets-1M (Knyazev et al. 2021, arXiv 2110.13100): a million architectures to train a GHN on.

`DeepNets1M(split)[i]` is architecture i of a split, made on the spot from a counter-based random
stream; `Architecture.build()` makes the `nn.Module`.
"""

from __future__ import annotations

from ghn_init.deepnets._architecture import Architecture
from ghn_init.deepnets._published import read_published
from ghn_init.deepnets._random import Stream
from ghn_init.deepnets._sample import sample
from ghn_init.deepnets._space import OPERATIONS, Genotype
from ghn_init.deepnets._splits import SPLITS, DeepNets1M, ResNet50
from ghn_init.deepnets._widths import evaluation_width, training_width

__all__ = [
    "OPERATIONS",
    "SPLITS",
    "Architecture",
    "DeepNets1M",
    "Genotype",
    "ResNet50",
    "Stream",
    "evaluation_width",
    "read_published",
    "sample",
    "training_width",
]
