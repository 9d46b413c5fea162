"""DeepNets-1M: how fast architectures are made, and their statistics beside the published ones.

The statistics are over `--samples` architectures of each split: nodes of the graph, and millions of
parameters of the CIFAR-10 network at the evaluation width. Published: arXiv 2110.13100, table 1 and the
files published with it. Every published figure is itself a sample, so its standard error stands beside
the differences: std / sqrt(n) of the mean, std / sqrt(2 n) of the deviation (normal approximation).

    python benchmarks/deepnets.py --threads 1 --write docs/deepnets.md
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, pstdev
from typing import TYPE_CHECKING

import numpy as np
import torch

from ghn_init import trace
from ghn_init.deepnets import Architecture, Stream, evaluation_width, sample, training_width

if TYPE_CHECKING:
    from collections.abc import Sequence

IMAGE_SIZE = 32


@dataclass(frozen=True)
class Published:
    """Statistics of a published split; parameters in millions, None where not published."""

    n: int
    nodes: tuple[int, int, int, int]  # min, max, mean, std
    params: tuple[float, float, float] | None = None  # mean, std, max


PUBLISHED = {
    "train": Published(1000, (35, 681, 192, 95)),
    "val": Published(500, (33, 549, 191, 94), (3.28, 0.76, 7.3)),
    "test": Published(500, (43, 579, 186, 91), (3.34, 1.65, 34.8)),
    "wide": Published(100, (48, 381, 179, 75), (51.6, 12.9, 101)),
    "deep": Published(100, (74, 1017, 391, 177), (3.99, 2.41, 15.3)),
    "dense": Published(100, (57, 993, 355, 182), (3.76, 1.35, 8.8)),
    "bnfree": Published(100, (33, 503, 135, 78), (3.19, 0.83, 7.7)),
}


@dataclass(frozen=True)
class Speed:
    """Specifications a second; medians over training networks, milliseconds; their mean nodes."""

    specifications: float
    build_ms: float
    trace_ms: float
    nodes: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write the page if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--samples", type=int, default=2000, help="architectures of each split")
    parser.add_argument("--networks", type=int, default=200, help="training networks built and traced")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the page, docs/deepnets.md")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    page = _page(_speed(options.samples, options.networks), options.samples, options.networks)
    print(page)
    if options.write:
        options.write.write_text(page, encoding="utf-8")
    return 0


def _speed(samples: int, networks: int) -> Speed:
    start = time.perf_counter()
    architectures = [sample("train", index) for index in range(samples)]
    specifications = samples / (time.perf_counter() - start)
    times = [_build_and_trace(arch, index) for index, arch in enumerate(architectures[:networks])]
    build, tracing, nodes = zip(*times, strict=True)
    return Speed(specifications, median(build), median(tracing), mean(nodes))


def _build_and_trace(arch: Architecture, index: int) -> tuple[float, float, int]:
    width, fc_dim = training_width(arch, Stream(0, 100, index), IMAGE_SIZE)
    start = time.perf_counter()
    with torch.device("meta"):
        network = arch.build(image_size=IMAGE_SIZE, C=width, fc_dim=fc_dim, running_stats=False)
    built = time.perf_counter()
    graph = trace(network, (1, 3, IMAGE_SIZE, IMAGE_SIZE))
    return 1e3 * (built - start), 1e3 * (time.perf_counter() - built), len(graph)


def _row(split: str, samples: int) -> str:
    """One line of the table."""
    published = PUBLISHED[split]
    source, factor = ("test", 4) if split == "wide" else (split, 1)
    architectures = [sample(source, index) for index in range(samples)]
    nodes = [arch.num_nodes() for arch in architectures]
    params = [
        dataclasses.replace(arch, C=factor * evaluation_width(arch)).num_params() / 1e6
        for arch in architectures
    ]
    low, high, center, spread = published.nodes
    cells = (
        split,
        f"{low}-{high}, {center} ± {spread} ({published.n})",
        f"{min(nodes)}-{max(nodes)}, {mean(nodes):.0f} ± {pstdev(nodes):.0f}",
        f"{100 * (mean(nodes) / center - 1):+.1f} (± {100 * spread / math.sqrt(published.n) / center:.1f})",
        f"{100 * (pstdev(nodes) / spread - 1):+.1f} (± {100 / math.sqrt(2 * published.n):.1f})",
        "{:.2f} ± {:.2f} ({:g})".format(*published.params) if published.params else "",
        f"{mean(params):.2f} ± {pstdev(params):.2f} ({max(params):.1f})",
    )
    return f"| {' | '.join(cells)} |"


def _machine() -> str:
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}"
    return f"{platform.machine()}, threads: {torch.get_num_threads()}, {versions}"


def _page(speed: Speed, samples: int, networks: int) -> str:
    rows = "\n".join(_row(split, samples) for split in PUBLISHED)
    return f"""# DeepNets-1M: statistics and speed

Written by `benchmarks/deepnets.py`: {samples:,} architectures of each split with seed 0; {_machine()}.

## Statistics beside the published ones

Nodes of the graph; parameters in millions, of the CIFAR-10 network at the evaluation width. Range,
mean ± standard deviation, in brackets the number of networks or the maximum. Differences are ours
against the published figure, in brackets the standard error that the published figure has because it
is itself a sample. `wide` is the first 100 networks of `test`, four times as wide; here {samples:,} of them.

What the definition leaves open is what a rejection redraws. Of six readings we took the one whose node
counts lie nearest the published ones (size drawn once, the rest redrawn), so that the means agree is
partly by choice and no independent confirmation.

| split | nodes, published (n) | ours | mean, % | deviation, % | parameters, published | ours |
|---|---|---|---|---|---|---|
{rows}

## Speed

| what | figure |
|---|---|
| specifications drawn (train, rejected ones included), one core | {speed.specifications:,.0f} a second |
| building a training network on the meta device, median of {networks} | {speed.build_ms:.1f} ms |
| tracing it | {speed.trace_ms:.1f} ms |
| its graph, mean | {speed.nodes:.0f} nodes |
"""


if __name__ == "__main__":
    sys.exit(main())
