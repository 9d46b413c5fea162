"""Low-shot transfer: does a network learn more from few images if it starts from predicted weights?

After arXiv 2110.13100, section 5.3: a network is trained on N images of each class, from its own
initialisation and from predicted weights, and measured on test images.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import warnings
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
import torch.nn.functional as F

from ghn_init._errors import ConfigError, TraceError, TrainingError
from ghn_init._threads import drawing_from
from ghn_init._tracing.record import record
from ghn_init._weights import DEFAULT_WEIGHTS
from ghn_init._weights.ghn import GHN
from ghn_init._weights.load import load
from ghn_init._writing.familiarity import OutOfDistributionWarning
from ghn_init._writing.plan import predict
from ghn_init.training._records import add_record, read_records
from ghn_init.training.data import Normalisation, augment, batch_indices, check_splits, generator, hold_out

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from os import PathLike
    from pathlib import Path

    from torch import Tensor, nn

    from ghn_init.training.data import Images

STARTS: Final[dict[str, Mapping[str, Any] | None]] = {
    "default": None,
    "predicted": {},
    "noise": {"diversify": "noise"},
    "orthogonal": {"diversify": "orthogonal"},
    "whole": {"scale": "predicted"},
}
"""What becomes of a network before it is trained: nothing, or `ghn_init.predict` with these arguments."""

RATES: Final[dict[str, tuple[float, ...]]] = {"sgd": (0.01, 0.03, 0.1, 0.3), "adamw": (3e-4, 1e-3, 3e-3)}
"""Learning rates that are tried, by optimizer, unless others are asked for."""

_DECAY: Final = {"sgd": 5e-4, "adamw": 0.05}
_MOMENTUM: Final = 0.9
_MEASURED_AT_ONCE: Final = 256

_T: Final = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""The 97.5 % quantile of Student's t with 1, 2, ... degrees of freedom."""


_AT_LEAST: Final = {"seeds": 1, "steps": 1, "validation": 1, "batch_size": 2, "images": 0}


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferConfig:
    """How networks are compared; with the network and the images it determines the result.

    Attributes:
        shots: Numbers of training images of each class; the smaller sets are parts of the larger ones.
        starts: Keys of `STARTS`; "default" is always among them, because the others are compared with it.
        optimizer: "sgd" (Nesterov momentum 0.9, weight decay 5e-4) or "adamw" (weight decay 0.05).
        rates: Learning rates to choose from, each falling linearly to zero; empty: those of `RATES`.
        seeds: Number of seeds. A seed chooses the images, their order and the network's own initialisation.
        steps: Of the optimizer, the same for any number of shots.
        batch_size: Images of a step.
        augmented: Crop training images at random (4 pixels of zeros around them) and mirror half of them.
        validation: Training images held out for choosing the rate: so many, but at most a fifth of them.
        images: Test images measured on, spread evenly; 0: all.

    Raises:
        ConfigError: A value that no comparison can have.
    """

    shots: tuple[int, ...] = (10, 100)
    starts: tuple[str, ...] = ("default", "predicted", "noise", "orthogonal")
    optimizer: Literal["sgd", "adamw"] = "sgd"
    rates: tuple[float, ...] = ()
    seeds: int = 5
    steps: int = 100
    batch_size: int = 32
    augmented: bool = True
    validation: int = 500
    images: int = 1000

    def __post_init__(self) -> None:
        for name, least in _AT_LEAST.items():
            if not _is_whole(value := getattr(self, name), least):
                raise ConfigError(f"transfer: {name}={value!r}; expected a whole number of at least {least}")
        if not self.shots or not all(_is_whole(shots, 1) for shots in self.shots):
            raise ConfigError(f"transfer: shots={self.shots}; expected numbers of images, at least 1 each")
        if self.optimizer not in RATES:
            raise ConfigError(f"transfer: optimizer={self.optimizer!r}; expected one of {tuple(RATES)}")
        if not all(0 < rate < math.inf for rate in self.rates):
            raise ConfigError(f"transfer: rates={self.rates}; expected finite ones above 0")
        if unknown := [start for start in self.starts if start not in STARTS]:
            raise ConfigError(f"transfer: starts {unknown}; expected some of {tuple(STARTS)}")

    @property
    def compared(self) -> tuple[str, ...]:
        """The starts in the order of `STARTS`, the default one first."""
        return tuple(start for start in STARTS if start == "default" or start in self.starts)

    @property
    def tried(self) -> tuple[float, ...]:
        """The rates to choose from, in ascending order."""
        return tuple(sorted(set(self.rates or RATES[self.optimizer])))

    @property
    def trainings(self) -> int:
        """How many trainings a whole comparison takes."""
        return len(set(self.shots)) * len(self.compared) * (len(self.tried) + self.seeds - 1)


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


@dataclass(frozen=True, slots=True)
class Setting:
    """Everything that the outcome of a training depends on, beside the code.

    Attributes:
        network: The network's name, and a digest of the names and shapes of its parameters.
        data: Digest of training and test images.
        weights: Digest of the GHN; "" for the default start.
        start: Key of `STARTS`.
        shots: Training images of each class.
        rate: Learning rate at the first step.
        seed: See `TransferConfig`, as for the rest.
    """

    network: str
    data: str
    weights: str
    start: str
    shots: int
    rate: float
    seed: int
    optimizer: str
    steps: int
    batch_size: int
    augmented: bool
    validation: int
    images: int


@dataclass(frozen=True, slots=True)
class Training:
    """What came of a setting.

    Attributes:
        setting: Which.
        validation: Accuracy on the held-out training images, in percent.
        test: Accuracy on the test images, in percent.
        diverged: Its loss was not finite in some step; both accuracies count as 0 then.
    """

    setting: Setting
    validation: float
    test: float
    diverged: bool


@dataclass(frozen=True, slots=True)
class LowShot:
    """Test accuracy of a start with so many images of each class.

    Attributes:
        shots: Training images of each class.
        start: Key of `STARTS`.
        rate: The learning rate, chosen on held-out images with the first seed.
        at_edge: It is the lowest or the highest of those tried, so that a better one may lie beyond.
        n: Seeds.
        mean: Over the seeds, in percent.
        interval: Half of the 95 % interval of the mean (Student's t); NaN for one seed.
        gain: Mean difference to the default start with the same seed; 0 for the default start itself.
        gain_interval: Half of its 95 % interval, from the differences of the seeds.
        diverged: Seeds whose loss was not finite.
        accuracies: Of every seed, in percent.
    """

    shots: int
    start: str
    rate: float
    at_edge: bool
    n: int
    mean: float
    interval: float
    gain: float
    gain_interval: float
    diverged: int
    accuracies: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values; NaN is null."""
        return {key: None if value != value else value for key, value in asdict(self).items()}


def transfer(
    build: Callable[[], nn.Module],
    train: Images,
    test: Images,
    config: TransferConfig | None = None,
    *,
    weights: str | PathLike[str] | GHN = DEFAULT_WEIGHTS,
    name: str = "network",
    file: Path | None = None,
    on_training: Callable[[Training], None] | None = None,
) -> list[LowShot]:
    """Train a network on few images from several starts and compare what it reaches on test images.

    For every number of shots and every start, each rate is tried with the first seed; the one with the best
    accuracy on held-out training images, which no network is trained on, is taken for the other seeds. All
    starts of a seed see the same images in the same order. Test images choose nothing. Networks are measured
    in evaluation mode, after the last step. One network is trained after the other, with torch's threads.

    Args:
        build: Makes the network, a classifier with an output for every class, whose own initialisation draws
            from torch's global generator.
        train: Training images, from which the few are drawn; a part is held out.
        test: Test images of the same classes.
        config: How to compare.
        weights: The GHN, as for `predict`.
        name: Of the network, for the file.
        file: JSON lines, one for every training as it ends. Trainings that it already has are not repeated.
        on_training: Called after every training that was wanted, repeated or not.

    Returns:
        One row for every number of shots and start, in this order.

    Raises:
        TrainingError: Other classes in `test`; too few images of a class; a network with another number of
            outputs; a file that is none of ours.
        PredictError: See `plan`.
        TraceError: The network could not be traced.
    """
    bench = _Bench(build, train, test, config or TransferConfig(), weights, name, file, on_training)
    rows: list[LowShot] = []
    for shots in sorted(set(bench.config.shots)):
        default: LowShot | None = None
        for start in bench.config.compared:
            rows.append(bench.row(shots, start, default))
            default = default or rows[-1]
    return rows


def _code(network: nn.Module, x: Tensor) -> str:
    """The functions that a network computes with, as text."""
    try:
        return record(network, x).code
    except TraceError:  # predictions, if there are any among the starts, are refused with the reason
        return repr(network)


class _Bench:
    """Trains networks, and remembers in a file."""

    def __init__(
        self,
        build: Callable[[], nn.Module],
        train: Images,
        test: Images,
        config: TransferConfig,
        weights: str | PathLike[str] | GHN,
        name: str,
        file: Path | None,
        on_training: Callable[[Training], None] | None,
    ) -> None:
        check_splits(train, test)
        if len(train) < 5:
            raise TrainingError(f"{len(train)} training images; expected at least 5")
        self.build, self.config, self.file, self.on_training = build, config, file, on_training
        self.train, self.held = hold_out(train, min(config.validation, len(train) // 5))
        self.normalise = Normalisation.of(train)
        self.test = test.spread(config.images or len(test))
        self.places = _places_by_class(self.train, max(config.shots))
        self.ghn = weights if isinstance(weights, GHN) else load(weights)
        self.digest = self.ghn.digest()
        self.data = f"{train.digest()} {test.digest()}"
        self.network = f"{name} {self._checked(name)}"
        self.done = {training.setting: training for training in (_read(file) if file else ())}

    def _checked(self, name: str) -> str:
        """Digest of the network's parameters and of what it computes; it is run once on two images."""
        network, expected = self.build(), (2, len(self.train.classes))
        if not any(param.requires_grad for param in network.parameters()):
            raise TrainingError(f"{name}: none of its parameters has requires_grad; expected some to train")
        for mode in ("evaluation", "training"):
            x = self.normalise(self.test.pixels[:2])
            found = _shape(network.train(mode == "training"), x, name)
            if found != expected:
                what = f"of shape {found}" if isinstance(found, tuple) else f"that are a {found}"
                raise TrainingError(
                    f"{name}: outputs {what} for two images in {mode} mode; expected a tensor of shape "
                    f"{expected}, one number for each class (a setting such as num_classes={expected[1]})"
                )
        shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
        told = json.dumps(shapes, sort_keys=True) + _code(network, x)
        return hashlib.blake2b(told.encode(), digest_size=4).hexdigest()

    def row(self, shots: int, start: str, default: LowShot | None) -> LowShot:
        """Choose the rate, train with every seed, and sum up."""
        rates = self.config.tried
        tried = [self.trained(shots, start, rate, 0) for rate in rates]
        best = max(tried, key=lambda training: training.validation)
        rest = [self.trained(shots, start, best.setting.rate, seed) for seed in range(1, self.config.seeds)]
        trainings = [best, *rest]
        accuracies = tuple(training.test for training in trainings)
        gains = (
            [mine - own for mine, own in zip(accuracies, default.accuracies, strict=True)] if default else []
        )
        return LowShot(
            shots=shots,
            start=start,
            rate=best.setting.rate,
            at_edge=len(rates) > 1 and best.setting.rate in (rates[0], rates[-1]),
            n=len(accuracies),
            mean=statistics.fmean(accuracies),
            interval=interval(accuracies),
            gain=statistics.fmean(gains) if gains else 0.0,
            gain_interval=interval(gains) if gains else 0.0,
            diverged=sum(training.diverged for training in trainings),
            accuracies=accuracies,
        )

    def trained(self, shots: int, start: str, rate: float, seed: int) -> Training:
        """The training of this setting: from the file, or done now and added to it."""
        of = self.config
        setting = Setting(
            self.network, self.data, "" if start == "default" else self.digest, start, shots, rate, seed,
            of.optimizer, of.steps, of.batch_size, of.augmented, of.validation, of.images,
        )  # fmt: skip
        if setting not in self.done:
            training = self.done[setting] = self._train(setting)
            if self.file is not None:
                add_record(self.file, asdict(training))
        if self.on_training is not None:
            self.on_training(self.done[setting])
        return self.done[setting]

    def _train(self, setting: Setting) -> Training:
        with drawing_from(setting.seed):
            network = self.build().to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
            if (arguments := STARTS[setting.start]) is not None:
                example = self.normalise(self.train.pixels[:1])
                with warnings.catch_warnings():  # what comes of it is what is measured
                    warnings.simplefilter("ignore", OutOfDistributionWarning)
                    predict(network, self.ghn, example_input=example, seed=setting.seed, **arguments)
            few = self.train.take(self._few(setting))
            finite = all(math.isfinite(loss) for loss in self._losses(network, few, setting))
        held, test = (self._accuracy(network, part) if finite else 0.0 for part in (self.held, self.test))
        return Training(setting, held, test, not finite)

    def _few(self, setting: Setting) -> Tensor:
        """Places of the first `shots` images of every class, in an order that the seed gives."""
        chosen = []
        for label, places in enumerate(self.places):
            order = torch.randperm(len(places), generator=generator(setting.seed, "shots", label))
            chosen.append(places[order[: setting.shots]])
        return torch.cat(chosen)

    def _losses(self, network: nn.Module, few: Images, setting: Setting) -> Iterator[float]:
        """Train the network; the loss of every step. Whoever stops asking stops the training."""
        network.train()
        optimizer = _optimizer(network, setting)
        size = min(setting.batch_size, len(few))
        for step in range(setting.steps):
            batch = few.take(batch_indices(len(few), size, step, setting.seed))
            pixels = batch.pixels
            if setting.augmented:
                pixels = augment(pixels, generator(setting.seed, "augmentation", step))
            for group in optimizer.param_groups:
                group["lr"] = setting.rate * (1 - step / setting.steps)
            loss = F.cross_entropy(network(self.normalise(pixels)), batch.labels)
            yield loss.item()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    @torch.no_grad()
    def _accuracy(self, network: nn.Module, images: Images) -> float:
        """Top-1 accuracy in evaluation mode, in percent."""
        network.eval()
        hits = 0
        for start in range(0, len(images), _MEASURED_AT_ONCE):
            part = images.take(slice(start, start + _MEASURED_AT_ONCE))
            hits += int((network(self.normalise(part.pixels)).argmax(1) == part.labels).sum())
        return 100 * hits / len(images)


def _shape(network: nn.Module, x: Tensor, name: str) -> tuple[int, ...] | str:
    """The shape of a network's outputs, or what they are if no tensor."""
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            found = network(x)
    except Exception as error:  # of the user's code, whatever it is
        raise TrainingError(
            f"{name}: cannot be run on images of shape {tuple(x.shape)} ({type(error).__name__}: {error})"
        ) from error
    return tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__


def _optimizer(network: nn.Module, setting: Setting) -> torch.optim.Optimizer:
    decay = _DECAY[setting.optimizer]
    params = [param for param in network.parameters() if param.requires_grad]
    if setting.optimizer == "sgd":
        return torch.optim.SGD(params, setting.rate, momentum=_MOMENTUM, weight_decay=decay, nesterov=True)
    return torch.optim.AdamW(params, setting.rate, weight_decay=decay)


def _places_by_class(images: Images, least: int) -> list[Tensor]:
    """For every class the places of its images, at least so many.

    Raises:
        TrainingError: A class has fewer.
    """
    places = [(images.labels == label).nonzero().flatten() for label in range(len(images.classes))]
    for name, found in zip(images.classes, places, strict=True):
        if len(found) < least:
            raise TrainingError(
                f"class {name} has {len(found)} training images beside those held out; expected at least "
                f"{least}: take fewer shots, or hold fewer images out"
            )
    return places


def interval(values: Sequence[float]) -> float:
    """Half of the 95 % confidence interval of the mean, by Student's t; NaN for fewer than two values."""
    n = len(values)
    if n < 2:
        return math.nan
    return _t_quantile(n - 1) * statistics.stdev(values) / math.sqrt(n)


def _t_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t; from 11 on by its expansion about the normal one (to 2e-5)."""
    if freedom <= len(_T):
        return _T[freedom - 1]
    z = 1.959964
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def _read(file: Path) -> list[Training]:
    """The trainings in the file.

    Raises:
        TrainingError: It holds something else.
    """
    try:
        return [Training(Setting(**record.pop("setting")), **record) for record in read_records(file)]
    except (KeyError, TypeError) as error:
        raise TrainingError(f"{file}: not a file of transfers ({error!r}); give another one") from error
