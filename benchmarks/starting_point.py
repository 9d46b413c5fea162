"""Do networks train better from predicted weights than from their own initialisation?

    python benchmarks/starting_point.py DATA runs.jsonl --draw curves.svg

trains every network of four panels (`starting_panel.py`, `starting_second.py` and so on) from its
own initialisation and from predicted weights, with SGD (momentum 0.9) and AdamW, at learning rates that are a
factor of 3 apart around the best one for its own initialisation, and prints how the areas under the
training-loss curves compare. Both starts of a seed see the same batches. It also compares the outputs before
training: those from predicted weights in evaluation mode, as they are, with those that the network's own
initialisation gives when its batch norms know the images. Without that a network's own outputs say nothing: a
MobileNet's are 1e-10. DATA is CIFAR-10 in a form that `ghn-init train` takes.

The file gets one JSON line for every training as it ends, and trainings that it already has are skipped: an
interrupted run goes on where it was, a later one adds seeds, rates, networks or other weights, and
`--minutes 0` only reports. A changed rule of `predict` needs a new file. Where nothing is predicted,
what came of the own initialisation is taken for what would come of the same weights.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
import warnings
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from starting_fourth import FOURTH
from starting_panel import PANEL, Member, Task
from starting_report import draw, report
from starting_second import SECOND
from starting_third import THIRD
from torch.nn.modules.batchnorm import _BatchNorm

import ghn_init
from ghn_init.training import load_images
from ghn_init.training._records import add_record, read_records
from ghn_init.training.data import Normalisation, batch_indices, generator

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor, nn

    from ghn_init.training.data import Images

MEMBERS: Final = (*PANEL, *SECOND, *THIRD, *FOURTH)

STARTS: Final[dict[str, Mapping[str, Any] | None]] = {
    "default": None,
    "predicted": {},
    "whole": {"scale": "predicted"},
    "noise": {"diversify": "noise"},
    "orthogonal": {"diversify": "orthogonal"},
    "other-classes": {"head": "keep"},
}
"""What becomes of a network before it is trained: nothing, or `ghn_init.predict` with these arguments.

With `other-classes` the classifier is kept, as if the hypernetwork did not know so many classes.
"""

BASE_RATES: Final = {"sgd": 0.02, "adamw": 0.001}
"""Learning rates from which the search for the best one starts, by optimizer."""

FARTHEST: Final = 4
"""Factors of 3 from the base rate at which the search ends."""

VALIDATION: Final = 256
"""Images of the test split on which a trained network is measured."""


@dataclass(frozen=True)
class Setting:
    """Everything that a training's outcome depends on, beside the code.

    Attributes:
        network: Name in the panel.
        start: Key of `STARTS`.
        optimizer: Key of `BASE_RATES`.
        power: The rate is the base rate times 3 to this.
        seed: Of initialisation, batches and noise.
        steps: Of the optimizer.
        batch: Images in a step.
        size: Side of the images, before networks that need larger ones enlarge them.
        weights: Name and digest of the hypernetwork's; "" for the default start.
    """

    network: str
    start: str
    optimizer: str
    power: int
    seed: int
    steps: int
    batch: int
    size: int
    weights: str

    @property
    def rate(self) -> float:
        """The learning rate."""
        return BASE_RATES[self.optimizer] * 3.0**self.power


@dataclass(frozen=True)
class Training:
    """What came of a setting.

    Attributes:
        setting: Which.
        losses: Training loss of every step; ends early where it is no longer finite.
        quality: Of the trained network on test images, in percent, see `Task.quality`.
        output: Root mean square of the outputs on test images in evaluation mode before the first step; of
            the default start with batch norms that know these images.
    """

    setting: Setting
    losses: tuple[float, ...]
    quality: float
    output: float

    @property
    def area(self) -> float:
        """Mean loss over the steps; infinite if it diverged."""
        whole = len(self.losses) == self.setting.steps and all(map(math.isfinite, self.losses))
        return sum(self.losses) / len(self.losses) if whole else math.inf


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what the file lacks, then print the tables of what it has."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    members = [member for member in MEMBERS if not options.networks or member.name in options.networks]
    bench = Bench(options, [_training(record) for record in read_records(options.file)])
    deadline = time.monotonic() + 60 * options.minutes
    for setting in _wanted(members, options, bench):
        if time.monotonic() > deadline:
            print(f"stopped after {options.minutes:g} minutes; run it again to go on", file=sys.stderr)
            break
        bench.train(setting)
    chosen = [t for t in bench.done.values() if bench.belongs(t.setting)]
    print(report(chosen, members), end="")
    if options.draw:
        draw(chosen, members, options.draw)
    return 0


class Bench:
    """Trains, and remembers in a file.

    Args:
        options: Of the command line.
        done: What the file has.
    """

    def __init__(self, options: argparse.Namespace, done: Sequence[Training]) -> None:
        self.options = options
        self.done = {training.setting: training for training in done}
        self.ghn = ghn_init.load(options.weights).requires_grad_(False)
        self.weights = f"{options.weights} {self.ghn.digest()[:8]}"
        self.train_images = load_images(options.data, "train")
        self.test_images = load_images(options.data, "test")
        self.normalise = Normalisation.of(self.train_images)

    def setting(
        self, network: str, start: str, optimizer: str, power: int, seed: int, steps: int = 0
    ) -> Setting:
        """The setting of these, at the sizes of the command line; `steps` but for its own: the search."""
        chosen = self.options
        weights = "" if start == "default" else self.weights
        return Setting(
            network, start, optimizer, power, seed, steps or chosen.steps, chosen.batch, chosen.size, weights
        )

    def best_on_record(self, network: str, optimizer: str) -> int | None:
        """The best rate for a network's own initialisation among the trainings in the file, as a power."""
        found = {
            setting.power: training.area
            for setting, training in self.done.items()
            if setting
            == self.setting(network, "default", optimizer, setting.power, 0, self.options.search_steps)
        }
        return min(found, key=lambda power: (found[power], abs(power)), default=None)

    def belongs(self, setting: Setting) -> bool:
        """Whether a training in the file is one of those that the command line speaks of."""
        chosen = self.options
        starts = {"default", *chosen.starts}
        same = self.setting(setting.network, setting.start, setting.optimizer, setting.power, setting.seed)
        wanted = setting.start in starts and setting.optimizer in chosen.optimizers
        return wanted and setting.seed < chosen.seeds and setting == same

    def train(self, setting: Setting) -> Training:
        """The training of this setting: from the file, or done now and added to it."""
        if setting not in self.done:
            started = time.perf_counter()
            training = self.done[setting] = self._trained(setting)
            add_record(self.options.file, asdict(training))
            seconds = time.perf_counter() - started
            told = f"{setting.network:16} {setting.start:12} {setting.optimizer:6} {setting.rate:9.2g}"
            print(f"{told} {setting.seed} {training.area:9.4g} {seconds:6.1f} s", file=sys.stderr, flush=True)
        return self.done[setting]

    def _task(self, member: Member, images: Images) -> Task:
        return Task(member.kind, images, self.normalise, max(self.options.size, member.enlarged))

    def _trained(self, setting: Setting) -> Training:
        member = next(member for member in MEMBERS if member.name == setting.network)
        task = self._task(member, self.train_images)
        held = self._task(member, self.test_images)
        places = torch.linspace(0, len(self.test_images) - 1, min(VALIDATION, len(self.test_images))).long()
        x, y = held.batch(places, generator(0, "held out", 0))
        torch.manual_seed(setting.seed)
        network = member.build(task.size)
        arguments = STARTS[setting.start]
        own = copy.deepcopy(network.state_dict())
        if arguments is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ghn_init.OutOfDistributionWarning)
                ghn_init.predict(network, self.ghn, example_input=x[:1], **arguments)
        output = _outputs(_informed(network, x) if arguments is None else network, x)
        rms = float(output.double().square().mean().sqrt())
        default = self.done.get(replace(setting, start="default", weights=""))
        if default is not None and _same(own, network.state_dict()):  # nothing was predicted
            return replace(default, setting=setting, output=rms)
        losses = _losses(network, task, setting)
        quality = task.quality(_outputs(network, x), y)
        return Training(setting, tuple(losses), quality, rms)


def _same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether two state dicts have the same values."""
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def _losses(network: nn.Module, task: Task, setting: Setting) -> list[float]:
    """Train the network; the loss of every step until one is not finite."""
    if setting.optimizer == "sgd":
        optimizer = torch.optim.SGD(network.parameters(), setting.rate, momentum=0.9)
    else:
        optimizer = torch.optim.AdamW(network.parameters(), setting.rate)
    network.train()
    losses = []
    for step in range(setting.steps):
        index = batch_indices(len(task.images), setting.batch, step, setting.seed)
        x, y = task.batch(index, generator(setting.seed, "noise", step))
        loss = task.loss(network(x), y)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def _informed(network: nn.Module, x: Tensor) -> nn.Module:
    """A copy whose batch norms have the statistics of these inputs."""
    network = copy.deepcopy(network)
    if any(isinstance(module, _BatchNorm) for module in network.modules()):
        with torch.random.fork_rng(devices=()):  # dropout draws
            ghn_init.calibrate_batchnorm(network, [x])
    return network


@torch.no_grad()
def _outputs(network: nn.Module, x: Tensor) -> Any:
    """What the network gives in evaluation mode."""
    output: Any = network.eval()(x)
    return getattr(output, "logits", output)


def _wanted(members: Sequence[Member], options: argparse.Namespace, bench: Bench) -> Iterator[Setting]:
    """The settings in the order in which they are wanted; the best rate is searched for on the way."""
    for member in members:
        for optimizer in options.optimizers:
            known = None if options.search else bench.best_on_record(member.name, optimizer)
            best: int = known if known is not None else 0
            if known is None:
                best = yield from _search(
                    lambda power, name=member.name, how=optimizer: bench.setting(
                        name, "default", how, power, 0, options.search_steps
                    ),
                    lambda setting: bench.done[setting].area,
                )
            half = options.rates // 2
            powers = sorted(range(best - half, best - half + options.rates), key=lambda p: abs(p - best))
            for seed in range(options.seeds):
                for power in powers:
                    for start in ("default", *options.starts):
                        yield bench.setting(member.name, start, optimizer, power, seed)


def _search(setting: Callable[[int], Setting], area: Callable[[Setting], float]) -> Any:
    """Yield the settings that the search for the best rate needs; returns its power."""
    areas: dict[int, float] = {}
    best = 0
    while True:
        for power in (best, best - 1, best + 1):
            if power not in areas and abs(power) <= FARTHEST:
                yield setting(power)
                areas[power] = area(setting(power))
        found = min(areas, key=lambda power: (areas[power], abs(power)))
        if found == best:
            return best
        best = found


def _training(record: dict[str, Any]) -> Training:
    return Training(
        Setting(**{field.name: record["setting"][field.name] for field in fields(Setting)}),
        tuple(record["losses"]),
        record["quality"],
        record["output"],
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", type=Path, help="CIFAR-10 in a form that `ghn-init train` takes")
    parser.add_argument("file", type=Path, help="one JSON line for every training; read and added to")
    parser.add_argument("--weights", default="ghn3-cifar10", help="of the GHN")
    parser.add_argument("--networks", nargs="+", choices=[member.name for member in MEMBERS], metavar="NAME")
    parser.add_argument("--starts", nargs="+", choices=list(STARTS)[1:], default=["predicted"])
    parser.add_argument("--optimizers", nargs="+", choices=list(BASE_RATES), default=list(BASE_RATES))
    parser.add_argument("--rates", type=int, default=3, help="number of rates around the best one")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--steps", type=int, default=300, help="of a training")
    parser.add_argument("--search-steps", type=int, default=0, help="of those that find the best rate")
    parser.add_argument(
        "--no-search", dest="search", action="store_false", help="take the best rate in FILE where it has one"
    )
    parser.add_argument("--batch", type=int, default=64, help="images in a step")
    parser.add_argument("--size", type=int, default=32, help="side of the images")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so many; 0 only reports")
    parser.add_argument("--draw", type=Path, help="picture of the curves, .svg or .png (needs matplotlib)")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
