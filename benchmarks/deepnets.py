"""DeepNets-1M: how fast architectures are made, and their statistics beside the published ones.

The statistics are over `--samples` architectures of each split: nodes of the graph, and millions of
parameters of the CIFAR-10 network at the evaluation width. Published: arXiv 2110.13100, table 1 and the
files published with it. Published figures and ours are both samples, so the standard error of their
difference stands beside it.

With `--reference`, choices are counted as well: in the training networks of that file (a JSON list of
{"net_args": ...}, the first 100 of which are taken) and in ours.

    python benchmarks/deepnets.py --threads 1 --reference deepnets_visible.json.gz --write docs/deepnets.md
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import math
import platform
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, pstdev
from typing import TYPE_CHECKING

import numpy as np
import torch

from ghn_init import trace
from ghn_init.deepnets import Architecture, Stream, evaluation_width, sample, training_width

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

IMAGE_SIZE = 32
REFERENCE_NETWORKS = 100


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
    """Specifications a second of CPU time; medians over training networks, CPU milliseconds; mean nodes."""

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
    parser.add_argument("--reference", type=Path, metavar="FILE", help="reference networks (.json.gz)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    page = _page(_speed(options.samples, options.networks), options.samples, options.networks)
    if options.reference:
        page += _choices(_read_reference(options.reference), options.samples)
    print(page)
    if options.write:
        options.write.write_text(page, encoding="utf-8")
    return 0


def _speed(samples: int, networks: int) -> Speed:
    start = time.process_time()
    architectures = [sample("train", index) for index in range(samples)]
    specifications = samples / (time.process_time() - start)
    times = [_build_and_trace(arch, index) for index, arch in enumerate(architectures[:networks])]
    build, tracing, nodes = zip(*times, strict=True)
    return Speed(specifications, median(build), median(tracing), mean(nodes))


def _build_and_trace(arch: Architecture, index: int) -> tuple[float, float, int]:
    width, fc_dim = training_width(arch, Stream(0, 100, index), IMAGE_SIZE)
    start = time.process_time()
    with torch.device("meta"):
        drawn = dataclasses.replace(arch, C=width, fc_dim=fc_dim)
        network = drawn.build(image_size=IMAGE_SIZE, running_stats=False)
    built = time.process_time()
    graph = trace(network, (1, 3, IMAGE_SIZE, IMAGE_SIZE))
    return 1e3 * (built - start), 1e3 * (time.process_time() - built), len(graph)


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
    error = math.sqrt(1 / published.n + 1 / samples)
    # The relative standard error of a deviation is sqrt((kurtosis - 1) / 4 n), of a normal one sqrt(1 / 2 n).
    tails = math.sqrt((_kurtosis(nodes) - 1) / 4)
    larger = mean(n >= low for n in nodes) ** published.n
    cells = (
        split,
        f"{low}-{high}, {center} ± {spread} ({published.n})",
        f"{min(nodes)}-{max(nodes)}, {mean(nodes):.0f} ± {pstdev(nodes):.0f}",
        f"{100 * (mean(nodes) / center - 1):+.1f} (± {100 * error * spread / center:.1f})",
        f"{100 * (pstdev(nodes) / spread - 1):+.1f} (± {100 * error * tails:.1f})",
        f"{100 * larger:.1f} %",
        "{:.2f} ± {:.2f} ({:g})".format(*published.params) if published.params else "",
        f"{mean(params):.2f} ± {pstdev(params):.2f} ({max(params):.1f})",
    )
    return f"| {' | '.join(cells)} |"


def _kurtosis(values: Sequence[int]) -> float:
    """The fourth standardised moment; 3 for a normal distribution."""
    center, spread = mean(values), pstdev(values)
    return mean(((value - center) / spread) ** 4 for value in values)


def _passive(arch: Architecture) -> bool:
    return {name for name, _ in arch.genotype.reduce} <= {
        "none",
        "max_pool_3x3",
        "avg_pool_3x3",
        "skip_connect",
    }


CHOICES: dict[str, Callable[[Architecture], object]] = {
    "cells": lambda arch: f"{arch.n_cells // 5 * 5}-{arch.n_cells // 5 * 5 + 4}",
    "steps": lambda arch: arch.genotype.steps,
    "concatenated states": lambda arch: len(arch.genotype.normal_concat),
    "`C_mult`": lambda arch: arch.C_mult,
    "stem kernel": lambda arch: arch.ks,
    "`stem_type`, `stem_pool`": lambda arch: f"{arch.stem_type}, {'yes' if arch.stem_pool else 'no'}",
    "`fc_layers`": lambda arch: arch.fc_layers,
    "batch norm": lambda arch: "no" if arch.norm is None else "yes",
    "preprocessing": lambda arch: "yes" if arch.preproc else "no",
    "transformer": lambda arch: "yes" if arch.genotype.transformer else "no",
    "contains `cse`": lambda arch: "yes" if "cse" in arch.genotype.operations else "no",
    "pools and skips only in reduction cells": lambda arch: "yes" if _passive(arch) else "no",
    "cells that the output does not use": lambda arch: "no" if all(arch.plan.used) else "yes",
}


def _read_reference(path: Path) -> list[Architecture]:
    with gzip.open(path) as file:
        return [
            Architecture.from_net_args(entry["net_args"]) for entry in json.load(file)[:REFERENCE_NETWORKS]
        ]


def _choices(reference: Sequence[Architecture], samples: int) -> str:
    """The section that counts choices in reference networks and in ours."""
    ours = [sample("train", index) for index in range(samples)]
    rows = [_choice_row(name, choice, reference, ours) for name, choice in CHOICES.items()]
    return "\n".join([_CHOICES_HEAD.format(n=len(reference), samples=samples), *rows]) + "\n"


def _choice_row(
    name: str,
    choice: Callable[[Architecture], object],
    reference: Sequence[Architecture],
    ours: Sequence[Architecture],
) -> str:
    """Percentages, and Pearson's statistic for two samples with its degrees of freedom."""
    ref, own = Counter(map(choice, reference)), Counter(map(choice, ours))
    total = len(reference) + len(ours)
    statistic = 0.0
    for value in set(ref) | set(own):
        for counts, n in ((ref, len(reference)), (own, len(ours))):
            expected = (ref[value] + own[value]) * n / total
            statistic += (counts[value] - expected) ** 2 / expected
    values = sorted(set(ref) | set(own), key=lambda value: (len(str(value)), str(value)))
    shares = "; ".join(
        f"{value}: {100 * ref[value] / len(reference):.0f}, {100 * own[value] / len(ours):.1f}"
        for value in values
    )
    return f"| {name} | {shares} | {statistic:.1f} ({len(values) - 1}) |"


_CHOICES_HEAD = """
## Choices in reference networks and in ours

How often each value occurs, in per cent: first among {n} training networks drawn by the published
sampler (one of those is one per cent), then among {samples:,} of ours. Last, Pearson's chi-squared for two
samples, with its degrees of freedom, which is also what to expect of it where both are drawn alike.

| choice | value: reference, ours | chi-squared (expected) |
|---|---|---|"""


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
against the published figure, in brackets their standard error: both are samples, the published ones small.
`wide` is the first 100 networks of `test`, four times as wide; here {samples:,} of them.
"No smaller" is how probable it is that as many of our networks as were published include none smaller
than the smallest published one. Where it is near zero we draw very small networks more often than the
published sampler did; we have not found why. There is no simple limit: the smallest of 130 reference
networks has 28 nodes. Some of our smallest do not use all cells, but 9 of those 130 do not either. Refusing
networks without a layer of weights in a used or in a normal cell hardly changes these probabilities.

What the definition leaves open is what a rejection redraws. Of six readings we took the one whose node
counts lie nearest the published ones (size drawn once, the rest redrawn), so that the means agree is
partly by choice and no independent confirmation.

| split | nodes, published (n) | ours | mean, % | deviation, % | no smaller | parameters, published | ours |
|---|---|---|---|---|---|---|---|
{rows}

## Speed

CPU time of one core.

| what | figure |
|---|---|
| specifications drawn (train, rejected ones included) | {speed.specifications:,.0f} a second |
| building a training network on the meta device, median of {networks} | {speed.build_ms:.1f} ms |
| tracing it | {speed.trace_ms:.1f} ms |
| its graph, mean | {speed.nodes:.0f} nodes |
"""


if __name__ == "__main__":
    sys.exit(main())
