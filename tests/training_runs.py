"""Small training runs for the tests, in this process or as a script in one of its own."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ghn_init.training import Images, RunOptions, TrainConfig, Trainer
from ghn_init.training._ranks import Ranks

if TYPE_CHECKING:
    from ghn_init.training._log import Record

TINY_GHN = {"hid": 8, "max_shape": [16, 16, 11, 11]}


def random_images(count: int = 48, size: int = 16, classes: int = 10, seed: int = 0) -> Images:
    """Noise, in which there is nothing to learn."""
    rng = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 3, size, size), generator=rng, dtype=torch.uint8)
    return Images(pixels, torch.arange(count) % classes, tuple(f"class{i}" for i in range(classes)))


def tiny_config(**changes: Any) -> TrainConfig:
    """Two small networks a step on four images."""
    values = {
        "ghn": TINY_GHN, "steps": 6, "meta_batch": 2, "batch_size": 4, "prefetch": 0, "precision": "float32",
        "curriculum": 10**9, "curriculum_nodes": 90, "max_params": 1.5, "warmup": 2, "schedule": "step",
        "ema": 0.9,
    }  # fmt: skip
    return TrainConfig.from_dict({**values, **changes})


def tiny_trainer(output: Path, config: TrainConfig | None = None, **options: Any) -> Trainer:
    """A trainer on random images; a quick validation of one network only at the end."""
    chosen = {"save_every": 1e9, "validate_every": 0, "validation_networks": 1, "validation_images": 8}
    chosen |= {"log_every": 1, **options}
    return Trainer(
        config or tiny_config(),
        random_images(),
        random_images(16, seed=1),
        RunOptions(output=output, **chosen),
    )


def figures(record: Record) -> tuple[int, float, float, float | None]:
    """What has to be the same in two runs that are the same."""
    return record.step, record.loss, record.accuracy, record.grad_norm


def main() -> None:
    """Run with the settings in the JSON argument; print the figures of every step as a JSON line."""
    torch.set_num_threads(1)
    wanted = json.loads(sys.argv[1])
    if (world := wanted.get("world", 1)) > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{wanted['meet']}", rank=wanted["rank"], world_size=world
        )

    def on_step(record: Record) -> None:
        print(json.dumps(figures(record)), flush=True)
        if record.step == wanted.get("kill_at"):
            os.kill(os.getpid(), signal.SIGKILL)

    config = tiny_config(**wanted.get("config", {}))
    tiny_trainer(Path(wanted["output"]), config, **wanted.get("options", {})).run(on_step)
    Ranks.leave()


if __name__ == "__main__":
    main()
