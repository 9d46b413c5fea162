"""Where does the noise of a GHN's gradient come from: the networks of a step, or its images?

    python benchmarks/gradient_noise.py DATA --networks 20 --batches 4

Every one of `--networks` networks of the training stream meets every one of `--batches` batches of images,
and the GHN's gradient is taken for each pair. Gradients that share neither network nor images agree in the
mean gradient alone, and its squared length is what their product tells; those that share one agree in more.
So the variance of a single pair's gradient is split in three: what the network does with any images, what
the images do to any network, and what is left. A step of n networks then has

    network / n + images / (number of different batches) + rest / n

which the last lines give for two networks with the same images and with images of their own. Standard
errors are a jackknife's over the networks, and know nothing of other images. One thread; settings as the
campaign's, and the bundled weights, unless others are given.
"""

from __future__ import annotations

import argparse
import itertools
from operator import itemgetter, methodcaller
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import torch

from ghn_init import load
from ghn_init.cli._values import training_config
from ghn_init.training import RunOptions, Trainer, hold_out, load_images
from ghn_init.training._engine import prepare_process
from ghn_init.training._meta_batches import MetaBatches

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from ghn_init.training._meta_batches import MetaBatch

SETTINGS: Final = (
    "images=shared", "meta_batch=1", "max_params=4", "crop_padding=1", "label_smoothing=0.1", "prefetch=0",
    "precision=float32",
)  # fmt: skip


class Parts(NamedTuple):
    """The squared length of the mean gradient, and the variance about it in three parts."""

    mean: float
    network: float
    images: float
    rest: float

    def of_a_step(self, networks: int, batches: int) -> float:
        """Variance of the mean gradient of so many networks, which see so many different batches."""
        return self.network / networks + self.images / batches + self.rest / networks


def products_of(gradients: Sequence[Tensor]) -> Tensor:
    """(networks, batches, networks, batches) of the gradients of each network, (batches, numbers)."""
    batches, flat = len(gradients[0]), torch.cat(list(gradients))
    return (flat @ flat.T).double().unflatten(1, (-1, batches)).unflatten(0, (-1, batches))


def parts(products: Tensor) -> Parts:
    """Estimates from the gradients' products with each other, of two networks and batches or more."""
    networks, batches = products.shape[:2]
    one = torch.eye(networks, dtype=torch.bool)[:, None, :, None].expand(products.shape)
    same = torch.eye(batches, dtype=torch.bool)[None, :, None, :].expand(products.shape)
    neither = products[~one & ~same].mean().item()
    network = products[one & ~same].mean().item() - neither
    images = products[~one & same].mean().item() - neither
    return Parts(neither, network, images, products[one & same].mean().item() - neither - network - images)


def with_error(products: Tensor, figure: Callable[[Parts], float]) -> str:
    """A figure and its standard error, from what it is without each network in turn."""
    networks = len(products)
    others = [[n for n in range(networks) if n != left_out] for left_out in range(networks)]
    found = torch.tensor([figure(parts(products[kept][:, :, kept])) for kept in others])
    error = ((networks - 1) * found.var(correction=0)).sqrt()
    return f"{figure(parts(products)):.2f} ± {error:.2f}"


def gradient(trainer: Trainer, batch: MetaBatch, number: int) -> Tensor:
    """The GHN's gradient for one network and batch `number` of images, flat."""
    (task,), (predicted,) = batch.tasks, trainer.ghn(batch.graphs)
    seen = trainer._batch(number)  # noqa: SLF001 (the very images that a step gets)
    network = task.build(trainer.config.ghn.num_classes, trainer.image_size)
    result = trainer.engine.run(network, predicted, seen.images, seen.labels, task.index)
    parameters = list(trainer.ghn.parameters())
    found = torch.autograd.grad(
        [predicted[name] for name in result.gradients],
        parameters,
        list(result.gradients.values()),
        allow_unused=True,
    )
    return torch.cat([
        (torch.zeros_like(parameter) if grad is None else grad).flatten()
        for parameter, grad in zip(parameters, found, strict=True)
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="images, as for `ghn-init train`")
    parser.add_argument("--weights", default="ghn3-cifar10", help="of the GHN")
    parser.add_argument("--networks", type=int, default=20)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    given = parser.parse_args()
    if given.networks < 3 or given.batches < 2:
        parser.error("the variance's parts and their errors take three networks and two batches, or more")

    prepare_process()
    images, validation = hold_out(load_images(given.data, "train"))
    ghn = load(given.weights)
    config = training_config(None, [*SETTINGS, *given.settings], 1, None)[0]
    config = type(config).from_dict({**config.to_dict(), "ghn": ghn.config.to_dict()})
    trainer = Trainer(config, images, validation, RunOptions(output=Path("unused")), start=ghn)
    stream = itertools.islice(MetaBatches(config, trainer.image_size), given.networks)
    rows = [
        torch.stack([gradient(trainer, batch, number) for number in range(given.batches)]) for batch in stream
    ]
    products, size = products_of(rows), config.batch_size
    print(f"{given.networks} networks, {given.batches} batches of {size} images")
    print("| mean gradient, squared | variance by network | by images | rest |\n|---|---|---|---|")
    columns = [with_error(products, itemgetter(place)) for place in range(4)]
    print(f"| {' | '.join(columns)} |\n")
    for seen, batches in (("the same images", 1), ("images of their own", 2)):
        print(f"two networks, {seen}: {with_error(products, methodcaller('of_a_step', 2, batches))}")


if __name__ == "__main__":
    main()
