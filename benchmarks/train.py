"""Seconds per (network, batch) of training GHN-2, and where they go.

The trainer itself runs, on random images, at the published training distribution: meta-batches of 8
networks of DeepNets-1M, batches of 64 images of 32 x 32 pixels. Parts:

    host      draw the networks, write their graphs and batch them (a second thread does that while training)
    predict   the GHN's forward pass
    forward   the networks
    backward  the networks
    update    the GHN's backward pass, exchange of gradients between processes, optimizer
    rest      images, injecting parameters, bookkeeping

One process with one thread:            python benchmarks/train.py --steps 8
Several processes that train one GHN:   torchrun --nproc-per-node 2 benchmarks/train.py --steps 8
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ghn_init.training import Images, RunOptions, TrainConfig, Trainer
from ghn_init.training._engine import Engine, Result, prepare_process
from ghn_init.training._meta_batches import MetaBatches

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor, nn

PARTS = ("host", "predict", "forward", "backward", "update", "rest")


@dataclass
class Clock:
    """Seconds by part of a step: those of `time`, which may count this process's alone."""

    time: Callable[[], float] = time.perf_counter
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Add the time that a block takes."""
        started = self.time()
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + self.time() - started


@dataclass(frozen=True)
class TimedEngine(Engine):
    """An engine that times its two passes."""

    clock: Clock = field(default_factory=Clock)

    def forward(self, network: nn.Module, images: Tensor) -> Tensor:
        """Logits of a network."""
        with self.clock("forward"):
            return super().forward(network, images)

    def backward(self, *args: Any) -> Result:
        """Loss and gradients."""
        with self.clock("backward"):
            return super().backward(*args)


class TimedTrainer(Trainer):
    """A trainer that times its parts."""

    def __init__(self, clock: Clock, *args: Any) -> None:
        super().__init__(*args)
        self.clock = clock
        self.engine = TimedEngine(self.engine.precision, self.engine.label_smoothing, self.clock)
        predict = self.ghn.forward

        def timed(graphs: Any) -> list[dict[str, Tensor]]:
            with self.clock("predict"):
                return predict(graphs)

        self.ghn.forward = timed

    def _update(self, *args: Any) -> float | None:
        with self.clock("update"):
            return super()._update(*args)


def measure(
    config: TrainConfig, image_size: int, steps: int, warmup: int, clock: Clock
) -> list[dict[str, float]]:
    """Seconds by part of every step after the first `warmup` ones; "total" is all of them but host."""
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (512, 3, image_size, image_size), generator=rng, dtype=torch.uint8)
    images = Images(pixels, torch.arange(512) % 10, tuple(map(str, range(10))))
    found: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = TimedTrainer(clock, config, images, images, RunOptions(output=Path(folder)))
        batches = iter(MetaBatches(config, image_size, ranks=trainer.ranks))
        for _ in range(warmup + steps):
            trainer.clock.seconds.clear()
            with trainer.clock("host"):
                batch = next(batches)
            with trainer.clock("total"):
                trainer.step(batch)
            seconds = dict(trainer.clock.seconds)
            seconds["rest"] = seconds["total"] - sum(seconds[part] for part in PARTS[1:-1])
            found.append(seconds)
    return found[warmup:]


def report(found: Sequence[Mapping[str, float]], networks: int, world: int) -> dict[str, Any]:
    """Mean seconds per (network, batch) by part, and the spread of the total over the steps."""
    per = {part: statistics.fmean(step[part] for step in found) / networks for part in (*PARTS, "total")}
    totals = sorted(step["total"] / networks for step in found)
    return {
        "steps": len(found),
        "networks": networks * len(found),
        "processes": world,
        "threads": torch.get_num_threads(),
        "seconds": per,
        "total_median": statistics.median(totals),
        "total_least": totals[0],
        "total_most": totals[-1],
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }


def show(result: Mapping[str, Any]) -> str:
    """The report as text."""
    seconds = result["seconds"]
    lines = [f"  {part:9}{1000 * seconds[part]:8.1f} ms" for part in PARTS]
    return "\n".join([
        f"torch {result['torch']}, {result['machine']}; {result['processes']} process(es) of "
        f"{result['threads']} thread(s); {result['steps']} steps, {result['networks']} (network, batch)",
        "per (network, batch):",
        *lines,
        f"without host {seconds['total']:.3f} s (median over steps {result['total_median']:.3f}, "
        f"{result['total_least']:.3f} to {result['total_most']:.3f}), "
        f"with it {seconds['total'] + seconds['host']:.3f} s",
    ])  # fmt: skip


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=16, help="steps to measure (16)")
    parser.add_argument("--warmup", type=int, default=1, help="steps before (1)")
    parser.add_argument("--meta-batch", type=int, default=8, help="networks of a step (8)")
    parser.add_argument("--batch-size", type=int, default=64, help="images of a step (64)")
    parser.add_argument("--image-size", type=int, default=32, help="side of the images (32)")
    parser.add_argument("--max-params", type=float, default=0.0, help="millions; without larger networks")
    parser.add_argument("--precision", choices=("auto", "bfloat16", "float32"), default="auto")
    parser.add_argument("--threads", type=int, default=1, help="threads of every process (1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--cpu-time", action="store_true", help="count the processor time of every process, on a busy machine"
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    return parser.parse_args()


def main() -> None:
    chosen = arguments()
    prepare_process(chosen.threads)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        torch.distributed.init_process_group("gloo")
    config = TrainConfig(
        steps=chosen.steps + chosen.warmup, meta_batch=chosen.meta_batch, batch_size=chosen.batch_size,
        max_params=chosen.max_params, precision=chosen.precision, seed=chosen.seed, prefetch=0,
    )  # fmt: skip
    clock = Clock(time.process_time if chosen.cpu_time else time.perf_counter)
    found = measure(config, chosen.image_size, chosen.steps, chosen.warmup, clock)
    if int(os.environ.get("RANK", "0")) == 0:
        result = report(found, chosen.meta_batch, world)
        print(show(result))
        if chosen.json:
            chosen.json.write_text(json.dumps(result, indent=2) + "\n")
    if world > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
