"""The usual initial value of a tensor, known by what it is.

The last resort for tensors of a meta model that their modules cannot initialise (`_initial`). Only
where one value is usual: a scale that multiplies activations, say, may be 1e-6 or 20, and gets none.
The default of a constructor's argument does not tell either: timm's CaiT, XCiT, MetaFormer and SwiftFormer
pass others.

| tensor | value |
|---|---|
| class token, position embedding, relative position table | normal, std 0.02, cut at two std (ViT, Swin) |
| layer scale, if it is called so | 1e-6 (ConvNeXt, arXiv 2201.03545) |
| `logit_scale` of an attention, one for each head | log 10 (Swin V2, arXiv 2111.09883) |
| `temperature` of an attention, one for each head | 1 (XCiT, arXiv 2106.09681) |
| `gating_param` | 1 (ConViT, arXiv 2103.10697, section 3) |
| `skipinit_gain` | 0 (SkipInit, arXiv 2002.10444) |
| weight and bias of GlobalResponseNorm | 0 (ConvNeXt V2, arXiv 2301.00808) |
| weight and bias of a norm | 1 and 0 |
| other biases and shifts | 0 |
| weight of a convolution or linear layer | uniform as nn.Linear draws it (Kaiming, a = sqrt 5) |
| embedding table | normal, std 1 as nn.Embedding draws it |
| `relative_position_index` of a square window | the pairwise offsets (Swin, arXiv 2103.14030) |
| `position_ids` | 0, 1, 2, ... |
| FrozenBatchNorm2d | 1, 0, and the statistics 0, 1 |
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ghn_init._network.locations import Location

TOKEN_STD: Final = 0.02
LAYER_SCALE: Final = 1e-6

_NORMAL: Final = frozenset({"class token", "pos_enc", "relative position table"})
_NORMS: Final = frozenset({"bn", "ln"})
_ZERO: Final = frozenset({"bias", "shift", "bias of the attention's keys or values"})
_WEIGHTS: Final = frozenset({"conv", "sep_conv", "dil_conv"})

_NAMED: Final = {
    ("scale of the attention", "logit_scale"): math.log(10),
    ("scale of the attention", "temperature"): 1.0,
    ("layer scale", "gating_param"): 1.0,
    ("layer scale", "skipinit_gain"): 0.0,
}
"""What a parameter is, and the name that its paper's code gives it -> its value."""

_FROZEN_NORM: Final = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}


@torch.no_grad()
def fill_usual(location: Location, kind: str) -> None:
    """Give the tensor at `location`, which is on the CPU, its usual initial value if there is one.

    Args:
        location: Where the tensor is registered.
        kind: What a parameter is: an entry of `kinds_of`, "" where that is unknown.
    """
    tensor, attribute = location.get(), location.attribute
    if location.is_buffer:
        value = _usual_buffer(location)
        if value is not None:
            tensor.copy_(value)
    elif kind in _NORMAL:
        drawn = torch.empty(tensor.shape)  # not every dtype can be drawn from this distribution
        tensor.copy_(nn.init.trunc_normal_(drawn, std=TOKEN_STD, a=-2 * TOKEN_STD, b=2 * TOKEN_STD))
    elif kind == "layer scale" and "layer_scale" in attribute:
        tensor.fill_(LAYER_SCALE)
    elif (kind, attribute) in _NAMED:
        tensor.fill_(_NAMED[kind, attribute])
    elif type(location.module).__name__ == "GlobalResponseNorm":
        tensor.zero_()
    elif kind in _NORMS:
        tensor.fill_(1)
    elif kind in _ZERO:
        tensor.zero_()
    elif kind in _WEIGHTS and tensor.ndim > 1:
        nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))
    elif kind == "embedding table":
        tensor.normal_()


def _usual_buffer(location: Location) -> Tensor | None:
    tensor, attribute = location.get(), location.attribute
    if attribute == "relative_position_index" and not tensor.is_floating_point():
        return _relative_position_index(tensor)
    if attribute == "position_ids" and not tensor.is_floating_point():
        return torch.arange(tensor.shape[-1]).expand(tensor.shape)
    if type(location.module).__name__ == "FrozenBatchNorm2d" and attribute in _FROZEN_NORM:
        return torch.full(tensor.shape, _FROZEN_NORM[attribute])
    return None


def _relative_position_index(tensor: Tensor) -> Tensor | None:
    """The row of the table for every pair of positions in a square window, (n * n, n * n) or flat."""
    side = round(tensor.numel() ** 0.25)
    if side**4 != tensor.numel() or tensor.ndim > 2:
        return None
    places = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")).flatten(1)
    offsets = places[:, :, None] - places[:, None, :] + side - 1
    return (offsets[0] * (2 * side - 1) + offsets[1]).view(tensor.shape)
