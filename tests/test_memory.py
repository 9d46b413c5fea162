"""Memory: beyond the model, predicting needs less than its largest tensor, or twice that, and 100 MB."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import ghn_init

if TYPE_CHECKING:
    from collections.abc import Callable

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
SIDE, LAYERS = 4096, 4
"""Four tensors of 67 million bytes."""


def resident(key: str) -> int:
    """VmRSS or VmHWM, the peak of it, in bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def peak_beyond(action: Callable[[], object]) -> int:
    """How much the process grows at most while `action` runs, in bytes."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else freed memory that stays resident would be used unseen
    CLEAR.write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    action()
    return resident("VmHWM") - before


def large(side: int = SIDE) -> nn.Module:
    return filled(*[(side, side)] * LAYERS)


def filled(*layers: tuple[int, int]) -> nn.Module:
    """Linear layers of these inputs and outputs."""
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(*sizes, bias=False) for sizes in layers))
    model.to_empty(device="cpu")
    for param in model.parameters():
        param.detach().fill_(1.0)  # memory that was never written does not count yet
    return model


def normalised(side: int = SIDE) -> nn.Module:
    model = large(side)
    for layer in model:
        weight_norm(layer)
    return model


def wide(side: int = SIDE) -> nn.Module:
    """A tensor of 268 million bytes: its orthogonal factor takes a second."""
    return filled((256 * side, side // 64 or 1))


def tall(side: int = SIDE) -> nn.Module:
    """Another, with more outputs than inputs."""
    return filled((side // 16 or 1, 64 * side))


CASES: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {
    "plain": (large, {}),
    "half precision": (lambda side=SIDE: large(side).bfloat16(), {}),
    "diversified with noise": (large, {"diversify": "noise"}),
    "made orthogonal": (wide, {"diversify": "orthogonal"}),
    "made orthogonal, more outputs than inputs": (tall, {"diversify": "orthogonal"}),
    "weight norm": (normalised, {}),
}


@pytest.mark.skipif(not CLEAR.exists(), reason="Linux tells how much memory was used, other systems do not")
@pytest.mark.parametrize("name", CASES)
def test_beyond_the_model_there_is_room_for_its_largest_tensor(name: str) -> None:
    make, options = CASES[name]
    ghn = ghn_init.load()
    # What torch loads once does not count: the first meta kernel that is written in Python brings 100 MB.
    ghn_init.predict(make(8), ghn, head="predict", **options)
    model = make()
    extra = peak_beyond(lambda: ghn_init.predict(model, ghn, head="predict", **options))
    # LAPACK wants the transpose of a matrix with more outputs; a computed weight at times takes three.
    tensors = {tall: 2, normalised: 3}.get(make, 1)
    assert extra < tensors * max(param.numel() * 4 for param in model.parameters()) + 100e6
    assert all(param.isfinite().all() for param in model.parameters())
