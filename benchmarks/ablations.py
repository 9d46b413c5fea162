"""The ablations of GHN-2 at a small scale: one table of variants that were trained on equally many networks.

    python benchmarks/ablations.py DATA RUNS [--pairs 8000] [--only NAME ...] [--networks 20] [--images 256]

Each of `VARIANTS` is trained in a folder of its own under RUNS by `ghn-init train`, one process, from
scratch and with the same seed, for `--pairs` (network, batch) pairs of small networks on images of 16 x 16;
then the first `--networks` networks of every split are measured on `--images` test images of that size.
What was found is written to `ablations/NAME.json` (`--kept`), which is there to be committed: a variant that
has its file is not trained again, on no machine. A file that was made with other settings is refused, before
anything is trained. On one machine the same command goes on where an interrupted one was, within a training
or an evaluation. Two commands with different `--only` can share RUNS, each on a core of its own.

The table has all variants with a file, whatever `--only` says, and the missing ones are named below it. The
rank of a variant is its place by accuracy among those of the table, a mean over the splits. The last column
has the same among GHN-2, GHN-1 and MLP only, and in brackets as it follows from the published accuracies
(arXiv 2110.13100).
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Final

import torch
from campaign import CONFIG, FIRST_SEED, PRIORS, RECIPE, start
from recipes import Run

from ghn_init import GHNConfig, GHNInitError, load
from ghn_init._files import write_bytes
from ghn_init.training import TrainConfig, load_images
from ghn_init.training._engine import prepare_process
from ghn_init.training._pool import cores, run_all
from ghn_init.training._results import TARGETS, Results
from ghn_init.training.data import Normalisation
from ghn_init.training.evaluate import BATCH_SIZE, SPLITS, Case, Measure, Score

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

KEPT: Final = Path(__file__).resolve().parent.parent / "ablations"
"""Where the figures of every variant are kept, for the next machine."""

SIZE: Final = 16
"""Side of the images, in pixels."""

META_BATCH: Final = 8
"""Networks of a step, as published for GHN-2."""

NODES: Final = 150
"""Nodes of the largest network that is trained on."""

PAIRS, NETWORKS, IMAGES = 8000, 20, 256
"""Defaults: (network, batch) pairs of a training, networks measured of every split, test images."""

SHARED: Final[dict[str, Any]] = {
    "seed": FIRST_SEED, "image_size": SIZE, "max_params": 1, "lr": 1e-3, "schedule": "linear", "warmup": 100,
    "crop_padding": 1, "precision": "float32", "meta_batch": META_BATCH,
    # `max_nodes` limits the sum over a meta-batch, a curriculum without end each of its networks, so that
    # variants with and without meta-batches draw the same networks.
    "max_nodes": NODES * META_BATCH, "curriculum": 10**9, "curriculum_nodes": NODES,
}  # fmt: skip
"""What all variants have in common unless they say otherwise."""

VARIANTS: Final[dict[str, dict[str, Any]]] = {
    "GHN-2": {"ghn": GHNConfig.ghn2()},
    "GHN-1": {"ghn": GHNConfig.ghn1(), "meta_batch": 1},
    "MLP": {"ghn": GHNConfig.mlp()},
    "no-virtual-edges": {"ghn": GHNConfig.ghn2(ve=False)},
    "no-normalisation": {"ghn": GHNConfig.ghn2(weight_norm=False)},
    "no-meta-batch": {"ghn": GHNConfig.ghn2(), "meta_batch": 1},
    "extensions": {"ghn": GHNConfig.ghn2(**PRIORS), "optimizer": RECIPE["optimizer"]},
    "GHN-3": {"ghn": GHNConfig.ghn3("t", 10, max_shape=GHNConfig().max_shape)},
    "GHN-3-extensions": {
        "ghn": GHNConfig.ghn3("t", 10, max_shape=GHNConfig().max_shape, **PRIORS),
        "optimizer": RECIPE["optimizer"],
    },
}
"""In what each differs from `SHARED`; GHN-1 was published without meta-batches, GHN-3 is the tiny one."""

PUBLISHED: Final[dict[str, dict[str, float]]] = {
    "GHN-2": {split: TARGETS[split, False] for split in SPLITS},
    "GHN-1": dict(zip(SPLITS, (51.4, 43.1, 48.3, 51.8, 13.7, 19.2, 18.2), strict=True)),
    "MLP": dict(zip(SPLITS, (42.2, 22.3, 37.9, 44.8, 23.9, 17.7, 10.0), strict=True)),
}
"""Published top-1 of the networks of a split on CIFAR-10 in percent (arXiv 2110.13100)."""

VALIDATION: Final = ("--validate-every", "30m", "--validation-networks", "2")
"""Hardly any while training: what counts is the evaluation."""


@dataclass(frozen=True)
class Row:
    """A variant that was trained and measured, a file of `KEPT`.

    Attributes:
        name: Of the variant.
        config: Of its training.
        evaluation: How it was measured, see `evaluation_of`.
        torch: Version that measured it.
        pairs: (network, batch) pairs that it was trained on.
        minutes: Its training time.
        accuracy: On the training batches in the last tenth, in percent.
        scores: One for each of `SPLITS`.
    """

    name: str
    config: TrainConfig
    evaluation: Mapping[str, Any]
    torch: str
    pairs: int
    minutes: float
    accuracy: float
    scores: tuple[Score, ...]

    @classmethod
    def read(cls, file: Path) -> Row:
        """The variant in this file.

        Raises:
            SystemExit: It holds something else.
        """
        try:
            values = json.loads(file.read_text())
            scores = [Score(**{**one, "accuracies": tuple(one["accuracies"])}) for one in values["scores"]]
            config = TrainConfig.from_dict(values["config"])
            return cls(**{**values, "config": config, "scores": tuple(scores)})
        except (ValueError, KeyError, TypeError, GHNInitError) as error:
            raise SystemExit(f"{file}: no figures of a variant ({error!r}); remove it") from error

    def write(self, file: Path) -> None:
        """Keep the variant in this file."""
        values = asdict(self) | {"config": self.config.to_dict()}
        file.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(file, (json.dumps(values, indent=1) + "\n").encode())

    def differences(self, config: TrainConfig, evaluation: Mapping[str, Any]) -> list[str]:
        """In what it was trained or measured otherwise than so, a line for each setting."""
        mine, theirs = self.config.to_dict(), config.to_dict()
        parts = [
            ("", mine, theirs),
            ("ghn.", mine.pop("ghn"), theirs.pop("ghn")),
            ("evaluation.", self.evaluation, evaluation),
        ]
        return [
            f"  {prefix}{key}: {here.get(key)}, now {now.get(key)}"
            for prefix, here, now in parts
            for key in {**here, **now}
            if here.get(key) != now.get(key)
        ]

    @property
    def accuracies(self) -> dict[str, float]:
        """Mean accuracy of every split, in percent."""
        return {score.split: score.mean for score in self.scores}


def config_of(name: str, pairs: int) -> TrainConfig:
    """The configuration of a variant's training."""
    values = {**SHARED, **VARIANTS[name]}
    return TrainConfig.from_dict({**values, "steps": pairs // values["meta_batch"]})


def evaluation_of(networks: int, images: int) -> dict[str, Any]:
    """All that decides how a variant is measured, by name."""
    return {"networks": networks, "images": images, "image_size": SIZE, "batch_size": BATCH_SIZE}


def kept(folder: Path, pairs: int, evaluation: Mapping[str, Any]) -> dict[str, Row]:
    """The variants that have a file in `folder`, in the order of `VARIANTS`.

    Raises:
        SystemExit: One of them was trained or measured otherwise.
    """
    files = {name: folder / f"{name}.json" for name in VARIANTS}
    rows = {name: Row.read(file) for name, file in files.items() if file.exists()}
    for name, row in rows.items():
        if lines := row.differences(config_of(name, pairs), evaluation):
            raise SystemExit(
                "\n".join([f"{files[name]}: was made with other settings than this command's:", *lines])
                + "\ngive the same ones, or another folder (--kept), or remove the file to train it again"
            )
    return rows


def train(name: str, data: Path, runs: Path, pairs: int) -> Path:
    """The folder of a variant's training, which is completed if it is not.

    Raises:
        SystemExit: It was stopped before its end, or the folder has another training.
    """
    folder, config = runs / name, config_of(name, pairs)
    finished = folder / "ghn" / "training.json"
    if not finished.exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(json.dumps(config.to_dict(), indent=1) + "\n")
        options = ["-o", str(folder), "--config", str(folder / CONFIG), *VALIDATION]
        start([sys.executable, "-m", "ghn_init", "train", str(data), *options], processes=1)
        if not finished.exists():
            raise SystemExit(f"{folder}: stopped; the same command goes on from there")
    if TrainConfig.from_dict(json.loads(finished.read_text())["config"]) != config:
        raise SystemExit(
            f"{folder}: was trained with another configuration than this command's (--pairs {pairs}); "
            "give the same number of pairs or another folder"
        )
    return folder


def measured(folder: Path, data: Path, networks: int, images: int) -> tuple[Score, ...]:
    """The scores of a finished training on all splits; those missing from its file are measured."""
    measure = Measure(
        load(folder / "ghn"), load_images(data, "test"), images=images, image_size=SIZE,
        normalise=Normalisation.of(load_images(data, "train")),
    )  # fmt: skip
    results = Results(measure, folder / f"scores-{networks}-{images}.json", folder.name)
    wanted = [network for split in SPLITS for network in Case.of(split, networks)]
    for network, accuracy in run_all(measure, [one for one in wanted if one not in results], cores()):
        results.add(network, accuracy)
    return tuple(results.scores())


def ranks(accuracies: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The place of every name by accuracy, from 1 for the best, a mean over the splits; equals share one."""

    def place(name: str, split: str) -> int:
        return 1 + sum(other[split] > accuracies[name][split] for other in accuracies.values())

    return {name: fmean(place(name, split) for split in SPLITS) for name in accuracies}


def table(rows: Sequence[Row]) -> str:
    """The variants, as a Markdown table, and which are missing."""
    header = ("variant", "pairs", "minutes", "training accuracy in the last tenth, %", *SPLITS, "rank")
    found = {row.name: row.accuracies for row in rows}
    among_all, paper = ranks(found), ranks(PUBLISHED)
    common = {name: found[name] for name in PUBLISHED if name in found}
    among_three = ranks(common) if len(common) == len(PUBLISHED) else {}

    def cells(row: Row) -> Iterable[str]:
        yield from (row.name, f"{row.pairs:,}", f"{row.minutes:.0f}", f"{row.accuracy:.1f}")
        for score in row.scores:
            yield f"{score.mean:.1f}" + (f" ± {score.standard_error:.1f}" if score.n > 1 else "")
        yield f"{among_all[row.name]:.1f}"
        here = f"{among_three[row.name]:.1f}" if row.name in among_three else "-"
        yield f"{here} ({paper[row.name]:.1f})" if row.name in paper else ""

    lines = [(*header, f"rank among {', '.join(PUBLISHED)} (published)"), *map(cells, rows)]
    text = ["| " + " | ".join(line) + " |" for line in lines]
    text.insert(1, "|---" * (len(header) + 1) + "|")
    if missing := [name for name in VARIANTS if name not in found]:
        text += ["", f"Missing, so that ranks are among {len(rows)} of {len(VARIANTS)}: {', '.join(missing)}"]
    return "\n".join(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and measure what has no file, and print the table of what has one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="images, as for `ghn-init train`")
    parser.add_argument("runs", type=Path, help="folder of the trainings")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="(network, batch) pairs of a training")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--networks", type=int, default=NETWORKS, help="of every split")
    parser.add_argument("--images", type=int, default=IMAGES, help="test images")
    parser.add_argument("--kept", type=Path, default=KEPT, help="folder of the figures (%(default)s)")
    given = parser.parse_args(arguments)
    if given.pairs < META_BATCH or given.pairs % META_BATCH:
        parser.error(f"--pairs {given.pairs}; expected a multiple of {META_BATCH}, the largest meta-batch")
    prepare_process()
    evaluation = evaluation_of(given.networks, given.images)
    done = kept(given.kept, given.pairs, evaluation)
    for name in given.only:
        if name not in done:
            folder = train(name, given.data, given.runs, given.pairs)
            scores = measured(folder, given.data, given.networks, given.images)
            run, config = Run.read(folder), config_of(name, given.pairs)
            figures = (run.pairs, run.minutes, run.accuracy, scores)
            Row(name, config, evaluation, torch.__version__, *figures).write(given.kept / f"{name}.json")
    rows = kept(given.kept, given.pairs, evaluation)  # another command may have added some
    print(table(list(rows.values())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
