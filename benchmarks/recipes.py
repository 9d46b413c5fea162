"""The table of docs/experiments.md that compares recipes: finished runs of equal budgets beside a reference.

    python benchmarks/recipes.py runs/base runs/muon runs/smooth ...

The first run is the reference. A row is named by the settings in which a run differs from it. Validation
is that at the end of each run, so all of them need the same `--validation-networks` and
`--validation-images`; its difference to the first row is the mean over the same networks with its standard
error. What another seed changes is in neither: run the reference with two.

Runs that draw the same networks and images are compared step by step as well, on their training batches:
the mean difference in accuracy over the second half of the steps that both made. That is far more
sensitive, and knows nothing about the time of a step or of what a falling learning rate gives at the end.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

LAST = 0.9
"""Training figures are those from this fraction of a run on."""

SAME_STREAM = (
    "seed", "meta_batch", "batch_size", "image_size", "max_nodes", "max_params", "curriculum",
    "curriculum_nodes",
)  # fmt: skip
"""Settings on which the networks and images of a step depend."""

HEADER = (
    "recipe", "steps", "pairs", "training loss (median), accuracy in the last tenth",
    "validation, % (mean, standard error, median)", "validation to the first row",
    "training accuracy to the first row, same steps",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        name: Of its folder.
        settings: Its configuration, the GHN's fields as `ghn.NAME`.
        steps: Optimizer steps.
        pairs: (network, batch) pairs.
        minutes: Its training time.
        loss: Median of the training loss in the last tenth.
        accuracy: Mean accuracy on the training batches there, in percent.
        validation: Accuracy of every validation network, in percent.
        training: Accuracy on the training batches, in percent, by the steps at which it was logged.
    """

    name: str
    settings: Mapping[str, Any]
    steps: int
    pairs: int
    minutes: float
    loss: float
    accuracy: float
    validation: tuple[float, ...]
    training: Mapping[int, float]

    @classmethod
    def read(cls, folder: Path) -> Run:
        """The run in this folder.

        Raises:
            SystemExit: It is no finished run.
        """
        try:
            figures = json.loads((folder / "ghn" / "training.json").read_text())
            log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        except OSError as error:
            raise SystemExit(f"{folder}: no finished run ({error})") from error
        config = dict(figures["config"])
        settings = {f"ghn.{name}": value for name, value in config.pop("ghn").items()} | config
        lines = [line for line in log if line.get("loss") is not None]
        last = [line for line in lines if line["done"] >= LAST]
        return cls(
            name=folder.name,
            settings=settings,
            steps=figures["steps"],
            pairs=figures["networks"],
            minutes=figures["seconds"] / 60,
            loss=statistics.median(line["loss"] for line in last),
            accuracy=100 * statistics.mean(line["accuracy"] for line in last),
            validation=tuple([line for line in log if "validation" in line][-1]["accuracies"]),
            training={line["step"]: 100 * line["accuracy"] for line in lines},
        )

    def row(self, reference: Run) -> tuple[str, ...]:
        """The cells of this run's row.

        Raises:
            SystemExit: It was validated on another number of networks.
        """
        if len(self.validation) != len(reference.validation):
            raise SystemExit(
                f"{self.name}: validated on {len(self.validation)} networks; "
                f"expected {len(reference.validation)}, as {reference.name}"
            )
        mean, error = mean_and_error(self.validation)
        values = zip(self.validation, reference.validation, strict=True)
        return (
            self.label(reference),
            f"{self.steps:,}",
            f"{self.pairs:,}",
            f"{self.loss:.2f}, {self.accuracy:.1f} %",
            f"{mean:.1f} ± {error:.1f}, {statistics.median(self.validation):.1f}",
            "" if self is reference else gain([mine - theirs for mine, theirs in values]),
            "" if self is reference else gain(self.same_steps(reference)),
        )

    def same_steps(self, reference: Run) -> list[float]:
        """Differences in training accuracy, in the second half of the steps that both runs made.

        Empty if networks or images were not the same.
        """
        if any(self.settings.get(name) != reference.settings.get(name) for name in SAME_STREAM):
            return []
        both = sorted(self.training.keys() & reference.training.keys())
        return [self.training[step] - reference.training[step] for step in both[len(both) // 2 :]]

    def label(self, reference: Run) -> str:
        """The settings that differ from the reference's."""
        if self is reference:
            return "as above"
        changed = [
            f"`{name}={value}`"
            for name, value in self.settings.items()
            if value != reference.settings.get(name)
        ]
        return ", ".join(changed) or self.name


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return statistics.mean(values), deviation / math.sqrt(len(values))


def gain(differences: Sequence[float]) -> str:
    """Mean and standard error of differences, nothing if there are none."""
    if not differences:
        return ""
    mean, error = mean_and_error(differences)
    return f"{mean:+.1f} ± {error:.1f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs, the reference first")
    runs = [Run.read(folder) for folder in parser.parse_args(arguments).runs]
    print("| " + " | ".join(HEADER) + " |")
    print("|---" * len(HEADER) + "|")
    for run in runs:
        print("| " + " | ".join(run.row(runs[0])) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
