"""Prints how much memory predicting takes beyond each model of `test_memory`, in bytes, as JSON.

A process of its own, in which nothing but predicting has happened: in one that has run other tests, memory
that they left and pages of libraries that were dropped and come back count as that of whoever is measured.
"""

from __future__ import annotations

import ctypes
import gc
import json
import warnings
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import ghn_init
from ghn_init._graph.graph import graph_from_edges

if TYPE_CHECKING:
    from collections.abc import Callable

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
SIDE, LAYERS = 4096, 4
"""Four tensors of 67 million bytes."""


def resident(key: str) -> int:
    """VmRSS, VmHWM (the peak of it) or RssFile (files that are mapped, libraries above all), in bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def peak_beyond(action: Callable[[], object]) -> int:
    """How much the process grows at most while `action` runs, without pages of libraries, in bytes."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else freed memory that stays resident would be used unseen
    CLEAR.write_text("5")  # the peak starts anew
    before, files = resident("VmRSS"), resident("RssFile")
    action()
    # The kernel drops pages of libraries when memory is short, and reads them again when they are called.
    return resident("VmHWM") - before - max(0, resident("RssFile") - files)


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
    for layer in model.children():
        weight_norm(layer)
    return model


def wide(side: int = SIDE) -> nn.Module:
    """A tensor of 268 million bytes: its orthogonal factor takes a second."""
    return filled((256 * side, side // 64 or 1))


def tall(side: int = SIDE) -> nn.Module:
    """Another, with more outputs than inputs."""
    return filled((side // 16 or 1, 64 * side))


def grouped(side: int = SIDE) -> nn.Module:
    """Batch norms between convolutions of many groups: 64 activations are as large as a weight."""
    channels, groups = 2 * side, side // 32 or 1
    layers = [
        nn.Conv2d(3, channels, 1),
        *(nn.Conv2d(channels, channels, 1, groups=groups) for _ in range(48)),
    ]
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.BatchNorm2d(channels))))


CASES: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {
    "plain": (large, {"head": "predict"}),
    "half precision": (lambda side=SIDE: large(side).bfloat16(), {"head": "predict"}),
    "diversified with noise": (large, {"head": "predict", "diversify": "noise"}),
    "made orthogonal": (wide, {"head": "predict", "diversify": "orthogonal"}),
    "made orthogonal, more outputs than inputs": (tall, {"head": "predict", "diversify": "orthogonal"}),
    "weight norm": (normalised, {"head": "predict"}),
    "running statistics, by default": (grouped, {}),
}


def measured(name: str) -> dict[str, Any]:
    """What predicting takes, the size of the largest tensor in float32, and whether all values are finite."""
    make, options = CASES[name]
    ghn = ghn_init.load()
    # What torch loads once does not count: the first meta kernel that is written in Python brings 100 MB.
    ghn_init.predict(make(8), ghn, **options)
    model = make()
    extra = peak_beyond(lambda: ghn_init.predict(model, ghn, **options))
    return {
        "extra": extra,
        "largest": max(param.numel() * 4 for param in model.parameters()),
        "finite": all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values()),
    }


def attention(size: str, nodes: int) -> int:
    """What a GHN-3 as wide as this takes to embed so many nodes; layers come one after another, two do."""
    ghn = ghn_init.GHN(ghn_init.GHNConfig.ghn3(size, layers=2, max_shape=(16, 16, 16, 16))).eval()
    ghn_init.embed(shortcuts(10), ghn)
    graph = shortcuts(nodes)
    return peak_beyond(lambda: ghn_init.embed(graph, ghn))


def shortcuts(count: int) -> ghn_init.Graph:
    """So many nodes one after another, with an edge past every third."""
    edges = [*pairwise(range(count)), *((node, node + 2) for node in range(0, count - 2, 3))]
    return graph_from_edges([ghn_init.Node("input"), *[ghn_init.Node("sum")] * (count - 1)], edges)


def give_back() -> None:
    """Have the C library give freed memory back at once: what it keeps varies by 80 MB from run to run."""
    for parameter in (-3, -1):  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h; elsewhere without effect
        if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
            mallopt(parameter, 1 << 17)


if __name__ == "__main__":
    give_back()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", ghn_init.OutOfDistributionWarning)
    sizes = {f"{size} {nodes}": attention(size, nodes) for size, nodes in (("xl", 1000), ("t", 4000))}
    print(json.dumps({"predicting": {name: measured(name) for name in CASES}, "attention": sizes}))
