"""Peak memory and time of `ghn_init.predict_to` for a Llama-like network of several billion parameters.

The network is built on the meta device in bfloat16 (by default Llama 2's 7B shapes: 6.7 billion parameters,
13.5 GB) and written to a folder that is deleted again. `extra` is the peak of the process's memory beyond
what it had with the package and the GHN loaded (Linux).

    python benchmarks/to_disk.py --folder /tmp/to-disk
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ghn_init

if TYPE_CHECKING:
    from collections.abc import Sequence

VOCABULARY = 32_000
HEAD_WIDTH = 128


class Block(nn.Module):
    """Attention and a gated MLP, each after an RMSNorm."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.k = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.v, self.o = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(n, tokens, width) to the same shape."""
        y = self.norm1(x)
        q, k, v = (
            layer(y).unflatten(-1, (-1, HEAD_WIDTH)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(attended.transpose(1, 2).flatten(-2))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    """A language model: token embedding, blocks, an output layer of its own."""

    def __init__(self, layers: int, width: int, hidden: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.Sequential(*(Block(width, hidden) for _ in range(layers)))
        self.norm = nn.RMSNorm(width)
        self.output = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """(n, tokens) to (n, tokens, vocabulary)."""
        return self.output(self.norm(self.blocks(self.tokens(tokens))))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, delete; 1 if the disk has no room."""
    options = _parser().parse_args(arguments)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        model = Decoder(options.layers, options.width, options.hidden)
    torch.set_default_dtype(torch.float32)
    size = sum(parameter.nbytes for parameter in model.parameters())
    options.folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(options.folder.parent).free
    if free < 1.1 * size:
        print(
            f"{options.folder.parent}: {free / 1e9:.1f} GB free, {size / 1e9:.1f} GB needed", file=sys.stderr
        )
        return 1
    try:
        print(json.dumps(_measured(model, size, options), indent=2))
    finally:
        shutil.rmtree(options.folder, ignore_errors=True)
    return 0


def _measured(model: nn.Module, size: int, options: argparse.Namespace) -> dict[str, object]:
    """Sizes in megabytes (10^6 bytes), times in seconds."""
    ghn = ghn_init.load(options.weights)
    ghn_init.predict(nn.Conv2d(3, 8, 3), ghn, head="predict")  # whatever loads on first use
    before, started = _peak(), time.perf_counter()
    plan = ghn_init.plan(model, ghn, example_input=(torch.zeros(1, 8, dtype=torch.long),))
    planned = time.perf_counter()
    plan.save(options.folder, max_shard_size=options.max_shard_size)
    written = time.perf_counter()
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "checkpoint_mb": round(size / 1e6),
        "largest_mb": round(max(parameter.nbytes for parameter in model.parameters()) / 1e6, 1),
        "extra_mb": round(_peak() - before, 1),
        "plan_s": round(planned - started, 1),
        "write_s": round(written - planned, 1),
        "files": len(list(options.folder.glob("*.safetensors"))),
        "elements": {action: elements for action, (_, elements) in plan.counts().items()},
        "torch": torch.__version__,
        "machine": platform.machine(),
    }


def _peak() -> float:
    """The process's largest resident size so far, in megabytes (10^6 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--folder", type=Path, default=Path("to-disk-benchmark"), help="where to write")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=4096, help=f"a multiple of {HEAD_WIDTH}")
    parser.add_argument("--hidden", type=int, default=11_008, help="width of the MLPs")
    parser.add_argument("--max-shard-size", default="5GB")
    parser.add_argument("--weights", default="ghn3-cifar10")
    return parser


if __name__ == "__main__":
    sys.exit(main())
