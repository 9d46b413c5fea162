"""Does what a GHN learns on one network help the next? It should: that is what makes training one fast.

    python benchmarks/transfer.py DATA --steps 1000 --set ghn.identity=true --set ghn.whitening=3

For every K in `--sets` a GHN is trained from scratch on the first K architectures of the training stream in
turn, one a step, for `--steps` steps, and the accuracy on its training batches is printed, a mean over the
last tenth. Beside it: SGD on the parameters of each of the first `--direct` architectures, for as many steps
on the same images. With K = 1 a GHN does what SGD does; with full transfer every K would give what K = 1
does. One core, one network a step; settings as for `ghn-init train`, with small networks on halved images,
Muon and a rate that falls to zero as defaults.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from ghn_init.cli._values import training_config
from ghn_init.training import Images, RunOptions, TrainConfig, Trainer, hold_out, load_images
from ghn_init.training._engine import Engine, prepare_process
from ghn_init.training._meta_batches import MetaBatch, MetaBatches

if TYPE_CHECKING:
    from collections.abc import Sequence

DEFAULTS: Final = (
    "seed=11", "optimizer=muon", "lr=1e-3", "schedule=linear", "warmup=100", "meta_batch=1", "max_params=1",
    "max_nodes=150", "crop_padding=1", "ghn.depth_buckets=128", "prefetch=0",
)  # fmt: skip

SGD_RATE: Final = 0.05
SGD_MOMENTUM: Final = 0.9
SGD_CLIP: Final = 5.0


def batches(config: TrainConfig, image_size: int, count: int) -> list[MetaBatch]:
    """The first `count` architectures of the stream, each a meta-batch of its own."""
    return list(itertools.islice(MetaBatches(config, image_size), count))


def train_ghn(config: TrainConfig, images: Images, validation: Images, networks: int) -> float:
    """Accuracy in percent of a GHN on the training batches, in the last tenth of its steps."""
    trainer = Trainer(config, images, validation, RunOptions(output=Path("unused")))
    assert config.steps is not None
    turns = itertools.cycle(batches(config, trainer.image_size, networks))
    return last_tenth([trainer.step(next(turns)).accuracy for _ in range(config.steps)])


def train_directly(config: TrainConfig, images: Images, validation: Images, index: int) -> float:
    """The same of SGD on the parameters of network `index` of the stream, in their usual initialisation."""
    trainer = Trainer(config, images, validation, RunOptions(output=Path("unused")))
    (task,) = batches(config, trainer.image_size, index + 1)[index].tasks
    assert config.steps is not None
    torch.manual_seed(config.seed)
    network = task.architecture.build(config.ghn.num_classes, trainer.image_size, running_stats=False)
    params = {name: value.detach() for name, value in network.named_parameters()}
    leaves = [value.requires_grad_() for value in params.values()]
    optimizer = torch.optim.SGD(leaves, SGD_RATE, SGD_MOMENTUM, nesterov=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, config.steps)
    engine, accuracies = Engine(trainer.precision), []
    for step in range(config.steps):
        x, labels, _ = trainer._batch(step)  # noqa: SLF001 (the very images that the GHN gets)
        copy = task.build(config.ghn.num_classes, trainer.image_size)
        result = engine.run(copy, params, x, labels, step)
        for name, value in params.items():
            found = result.gradients.get(name)
            value.grad = None if found is None else found.to(value.dtype)
        torch.nn.utils.clip_grad_norm_(leaves, SGD_CLIP)
        optimizer.step()
        schedule.step()
        accuracies.append(result.correct / len(labels))
    return last_tenth(accuracies)


def last_tenth(accuracies: Sequence[float]) -> float:
    """Mean over the last tenth, in percent."""
    return 100 * statistics.fmean(accuracies[-max(len(accuracies) // 10, 1) :])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="images, as for `ghn-init train`")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--sets", type=int, nargs="*", default=[1, 8, 64], help="numbers of architectures")
    parser.add_argument("--direct", type=int, default=1, help="architectures that SGD trains")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    given = parser.parse_args()

    prepare_process()
    images, validation = hold_out(load_images(given.data, "train"))
    halved = [f"image_size={images.size // 2}"]
    config = training_config(None, [*DEFAULTS, *halved, *given.settings], given.steps, None)[0]
    print(f"{given.steps} steps; accuracy on the training batches in the last tenth, %", flush=True)
    found: list[float] = []
    for index in range(given.direct):
        found.append(train_directly(config, images, validation, index))
        print(f"SGD, architecture {index + 1}: {found[-1]:.1f}", flush=True)
    figures: dict[str, Any] = {f"GHN, K = {many}": many for many in given.sets}
    for name, many in figures.items():
        print(f"{name}: {train_ghn(config, images, validation, many):.1f}", flush=True)


if __name__ == "__main__":
    main()
