"""After how many steps of SGD or Adam has a network the accuracy that predicted weights give it at once?

    python benchmarks/sgd_equivalence.py DATA runs.jsonl --draw curves.svg

For 20 test networks of DeepNets-1M and ResNet-50 (arXiv 2110.13100, section 5.2: about 2,500 steps on
CIFAR-10): the accuracy of the whole prediction, never trained; then training from the network's own
initialisation and from predicted weights (as `predict` writes them by default) over 3 epochs, with
SGD (momentum 0.9) and Adam at a constant rate, which is chosen on the first network by the training loss of
its first steps from its own initialisation. With `--until-equal` there is only the training from its own
initialisation, which ends where it has the accuracy of the prediction. Accuracy is that on test images after
every few steps, batch norm on the statistics of batches of 64, as `ghn-init evaluate` measures it. Both
starts of a seed see the same batches, cropped and mirrored at random. With `--bf16` networks run in bfloat16,
on copies of float32 weights, as in the training of a GHN.

The file gets one JSON line for every training as it ends, and trainings that it already has are skipped: an
interrupted run goes on where it was, a later one adds networks or seeds, and `--minutes 0` only reports.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import warnings
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
import torch.nn.functional as F
from sgd_report import draw, report

import ghn_init
from ghn_init.deepnets import DeepNets1M
from ghn_init.training import Normalisation, load_images
from ghn_init.training._engine import inject, prepare_process
from ghn_init.training._layers import prepare
from ghn_init.training._records import add_record, read_records
from ghn_init.training.data import augment, batch_indices, generator, sized
from ghn_init.training.evaluate import Measure
from ghn_init.training.teacher import SmallResNet

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor, nn

RATES: Final = {"sgd": (0.001, 0.003, 0.01, 0.03), "adam": (1e-4, 3e-4, 1e-3, 3e-3)}
"""Learning rates to choose from, by optimizer."""

EPOCHS: Final = 3


@dataclass(frozen=True)
class Setting:
    """Everything that the outcome of a training depends on, beside the code.

    Attributes:
        network: "test 0" and so on, "resnet50" of DeepNets-1M, "small-resnet" (three blocks, 16 to 64
            channels), or torchvision's name of a classifier.
        start: "untrained" (the whole prediction, no training), "default" or "predicted".
        optimizer: Key of `RATES`; "" without training, as `rate` and `steps` are 0.
        rate: Learning rate.
        seed: Of initialisation and batches.
        steps: Of the optimizer.
        batch: Images in a step.
        size: Side of the images in pixels.
        every: Steps between two measurements of the accuracy.
        images: Test images that it is measured on.
        weights: Name and digest of the GHN; "" for the default start.
        until: Accuracy in percent at which the training ends early; None if it goes on.
        precision: Type in which the network runs, "float32" or "bfloat16".
    """

    network: str
    start: str
    optimizer: str
    rate: float
    seed: int
    steps: int
    batch: int
    size: int
    every: int
    images: int
    weights: str
    until: float | None = None
    precision: str = "float32"


@dataclass(frozen=True)
class Training:
    """What came of a setting.

    Attributes:
        setting: Which.
        losses: Training loss of every step; ends early where it is no longer finite.
        accuracies: In percent before the first step and after every `every` steps.
    """

    setting: Setting
    losses: tuple[float, ...]
    accuracies: tuple[float, ...]

    @property
    def area(self) -> float:
        """Mean loss over the steps; infinite if it diverged."""
        whole = len(self.losses) == self.setting.steps and all(map(math.isfinite, self.losses))
        return sum(self.losses) / len(self.losses) if whole else math.inf

    def steps_to(self, accuracy: float) -> int | None:
        """After how many steps it was first measured to have this accuracy; None if never."""
        reached = (i for i, found in enumerate(self.accuracies) if found >= accuracy)
        return next((i * self.setting.every for i in reached), None)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what the file lacks, then print the tables of what it has."""
    options = _parser().parse_args(arguments)
    prepare_process(options.threads)
    bench = Bench(options)
    deadline = time.monotonic() + 60 * options.minutes
    for setting in bench.wanted():
        if setting not in bench.done and time.monotonic() > deadline:
            print(f"stopped after {options.minutes:g} minutes; run it again to go on", file=sys.stderr)
            break
        bench.train(setting)
    chosen = [bench.done[setting] for setting in bench.known()]
    print(report(chosen, bench.names), end="")
    if options.draw:
        draw(chosen, bench.names, options.draw)
    return 0


class Bench:
    """Trains, and remembers in a file."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.names = [f"test {index}" for index in range(options.networks)] + options.also
        names = [field.name for field in fields(Setting)]
        self.done: dict[Setting, Training] = {}
        for record in read_records(options.file):
            setting = Setting(**{name: value for name, value in record["setting"].items() if name in names})
            self.done[setting] = Training(setting, tuple(record["losses"]), tuple(record["accuracies"]))
        self.ghn = ghn_init.load(options.weights).requires_grad_(False)
        self.weights = f"{options.weights} {self.ghn.digest()}"
        self.images = load_images(options.data, "train")
        self.size = options.size or self.images.size
        self.normalise = Normalisation.of(self.images)
        self.precision = torch.bfloat16 if options.bf16 else torch.float32
        self.measure = Measure(
            self.ghn, load_images(options.data, "test"), images=options.images, normalise=self.normalise,
            precision=self.precision, image_size=self.size,
        )  # fmt: skip
        self.steps: int = options.steps or EPOCHS * len(self.images) // options.batch

    def setting(
        self, network: str, start: str, optimizer: str, rate: float, seed: int = 0, steps: int = 0
    ) -> Setting:
        """The setting of these, at the sizes of the command line; `steps` other than all are for tuning."""
        of = self.options
        steps = 0 if start == "untrained" else steps or self.steps
        every = min(of.every, steps)
        weights = "" if start == "default" else self.weights
        return Setting(
            network, start, optimizer, rate, seed, steps, of.batch, self.size, every, len(self.measure.data),
            weights, precision=str(self.precision).removeprefix("torch."),
        )  # fmt: skip

    def wanted(self) -> Iterator[Setting]:
        """The settings in the order in which they are wanted: first those that choose the rates."""
        for optimizer in self.options.optimizers:
            yield from self.tuning(optimizer)
        rates = {optimizer: self.rate(optimizer) for optimizer in self.options.optimizers}
        yield from self.compared(rates)

    def known(self) -> Iterator[Setting]:
        """Those of the comparison that have been done."""
        tuned = {
            optimizer: self.rate(optimizer)
            for optimizer in self.options.optimizers
            if all(setting in self.done for setting in self.tuning(optimizer))
        }
        yield from (setting for setting in self.compared(tuned) if setting in self.done)

    def compared(self, rates: dict[str, float]) -> Iterator[Setting]:
        """The settings of the comparison, network by network."""
        for network in self.names:
            yield (untrained := self.setting(network, "untrained", "", 0.0))
            if self.options.until_equal:
                yield from self.until(untrained, rates)
                continue
            for seed in range(self.options.seeds):
                for optimizer, rate in rates.items():
                    for start in ("default", "predicted"):
                        yield self.setting(network, start, optimizer, rate, seed)

    def until(self, untrained: Setting, rates: dict[str, float]) -> Iterator[Setting]:
        """Trainings from the own initialisation up to the accuracy of the prediction, once that is known."""
        if untrained in self.done:
            accuracy = self.done[untrained].accuracies[0]
            for seed in range(self.options.seeds):
                for optimizer, rate in rates.items():
                    whole = self.setting(untrained.network, "default", optimizer, rate, seed)
                    yield replace(whole, until=accuracy)

    def tuning(self, optimizer: str) -> list[Setting]:
        """The trainings of the first network, from its own initialisation, that choose the rate."""
        steps = min(self.options.tuning, self.steps)
        rates = RATES[optimizer]
        return [self.setting(self.names[0], "default", optimizer, rate, steps=steps) for rate in rates]

    def rate(self, optimizer: str) -> float:
        """The rate with the smallest mean loss of those trainings."""
        return min(self.tuning(optimizer), key=lambda setting: self.done[setting].area).rate

    def train(self, setting: Setting) -> Training:
        """The training of this setting: from the file, or done now and added to it."""
        if setting not in self.done:
            started = time.perf_counter()
            training = self.done[setting] = self._trained(setting)
            add_record(self.options.file, asdict(training))
            told = f"{setting.network:12} {setting.start:10} {setting.optimizer:5} {setting.rate:8.2g}"
            shown = " ".join(f"{accuracy:.1f}" for accuracy in training.accuracies[-1:])
            print(f"{told} {shown:>5} % {time.perf_counter() - started:6.1f} s", file=sys.stderr, flush=True)
        return self.done[setting]

    def _trained(self, setting: Setting) -> Training:
        if setting.start == "untrained":
            with torch.device("meta"):
                network = self._network(setting.network)
            return Training(setting, (), (round(self.measure(network), 3),))
        torch.manual_seed(setting.seed)
        network = self._network(setting.network)
        if setting.start == "predicted":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ghn_init.OutOfDistributionWarning)
                ghn_init.predict(network, self.ghn, example_input=(1, 3, self.size, self.size))
        prepare(network, seed=setting.seed).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        losses: list[float] = []
        own = {name: parameter.detach().requires_grad_() for name, parameter in network.named_parameters()}
        inject(network, own, self.precision)
        accuracies = [self._accuracy(network)]
        for loss in self._losses(network, own, setting):
            losses.append(round(loss, 5))
            if not math.isfinite(loss):
                break
            if len(losses) % setting.every == 0:
                accuracies.append(self._accuracy(network))
                if setting.until is not None and accuracies[-1] >= setting.until:
                    break
        return Training(setting, tuple(losses), tuple(accuracies))

    def _network(self, name: str) -> nn.Module:
        classes = self.ghn.config.num_classes
        if name == "small-resnet":
            return SmallResNet(classes, 16)
        if name != "resnet50" and not name.startswith("test "):
            import torchvision

            return torchvision.models.get_model(name, num_classes=classes)
        split, index = ("predefined", 0) if name == "resnet50" else ("test", int(name.split()[1]))
        return DeepNets1M(split, image_size=self.size)[index].build(classes, self.size)

    def _accuracy(self, network: nn.Module) -> float:
        return round(self.measure.accuracy(network.eval()), 3)

    def _losses(self, network: nn.Module, own: dict[str, Tensor], setting: Setting) -> Iterator[float]:
        """Train the network's `own` weights, of which it runs on copies; the loss of every step, after it."""
        if setting.optimizer == "sgd":
            optimizer = torch.optim.SGD(own.values(), setting.rate, momentum=0.9)
        else:
            optimizer = torch.optim.Adam(own.values(), setting.rate)
        for step in range(setting.steps):
            batch = self.images.take(batch_indices(len(self.images), setting.batch, step, setting.seed))
            x = self.normalise(augment(batch.pixels, generator(setting.seed, "augmentation", step)))
            copies = inject(network, own, self.precision, gradients=True)
            x = sized(x, setting.size).to(self.precision).contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(network.train()(x).float(), batch.labels)
            loss.backward()
            for name, copied in copies.items():
                own[name].grad = None if copied.grad is None else copied.grad.float()
            optimizer.step()
            inject(network, own, self.precision)
            yield loss.item()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", type=Path, help="CIFAR-10 in a form that `ghn-init train` takes")
    parser.add_argument("file", type=Path, help="one JSON line for every training; read and added to")
    parser.add_argument("--weights", default="ghn3-cifar10", help="of the GHN")
    parser.add_argument("--networks", type=int, default=20, help="so many test networks of DeepNets-1M")
    parser.add_argument(
        "--also", nargs="*", default=["resnet50"], metavar="NAME",
        help="resnet50 of DeepNets-1M, small-resnet, or classifiers of torchvision's",
    )  # fmt: skip
    parser.add_argument(
        "--until-equal", action="store_true",
        help="train from the own initialisation alone, up to the accuracy of the prediction",
    )  # fmt: skip
    parser.add_argument("--optimizers", nargs="+", choices=list(RATES), default=list(RATES))
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds")
    parser.add_argument("--steps", type=int, help=f"of a training; default: {EPOCHS} epochs")
    parser.add_argument("--tuning", type=int, default=200, help="steps after which the rate is chosen")
    parser.add_argument("--batch", type=int, default=64, help="images in a step")
    parser.add_argument("--size", type=int, help="side of the images: their own, the default, or half of it")
    parser.add_argument("--every", type=int, default=50, help="steps between two measurements")
    parser.add_argument("--images", type=int, default=1000, help="test images that are measured on")
    parser.add_argument("--bf16", action="store_true", help="run networks in bfloat16")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so many; 0 only reports")
    parser.add_argument("--draw", type=Path, help="picture of the curves, .svg or .png (needs matplotlib)")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
