"""The results of an evaluation: kept in a JSON file from which an interrupted one goes on."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch

from ghn_init._errors import TrainingError
from ghn_init._files import write_bytes
from ghn_init.training._output import writing
from ghn_init.training.evaluate import BATCH_SIZE, SPLITS, Case, Measure, Score

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


TARGETS = {
    ("test", False): 66.9, ("wide", False): 64.0, ("deep", False): 60.5, ("dense", False): 65.8,
    ("bnfree", False): 36.8, ("resnet50", False): 58.6, ("vit", False): 11.4, ("test", True): 48.6,
}  # fmt: skip
"""Published top-1 of GHN-2 on CIFAR-10 in percent (arXiv 2110.13100), by split and whether under noise."""


class Results:
    """Accuracies by split, noise and network; written to `path` after every network.

    Args:
        measure: How networks are measured.
        path: JSON file; what is in it already is taken over. None: nothing is kept.
        weights: Name of what is measured, for the file.

    Raises:
        TrainingError: The file is of something else, or was measured otherwise.
    """

    def __init__(self, measure: Measure, path: Path | None = None, weights: str = "") -> None:
        self._path, self._weights = path, weights
        self._images, self._available = len(measure.data), measure.available
        self._header = {
            "weights_digest": measure.ghn.digest(),
            "images": self._images,
            "images_digest": _digest_of_images(measure),
            "batch_size": BATCH_SIZE,
            "seed": measure.seed,
            "precision": str(measure.precision).removeprefix("torch."),
        }
        self._accuracies: dict[tuple[str, float], dict[int, float]] = {}
        if path is not None and path.exists():
            self._read(path)

    def _read(self, path: Path) -> None:
        try:
            saved = json.loads(path.read_text())
            found = {key: saved[key] for key in self._header}
            accuracies = {
                (score["split"], score["noise"]): {int(k): v for k, v in score["accuracies"].items()}
                for score in saved["scores"]
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise TrainingError(f"{path}: not a file of results ({error!r}); give another one") from error
        if different := [key for key, value in self._header.items() if found[key] != value]:
            raise TrainingError(f"{path}: holds results of other {', '.join(different)}; give another file")
        self._accuracies = accuracies

    def __contains__(self, network: Case) -> bool:
        return network.index in self._accuracies.get((network.split, network.noise), {})

    def add(self, network: Case, accuracy: float) -> None:
        """Take up and keep the accuracy of a network, in percent."""
        key = (network.split, network.noise)
        self._accuracies.setdefault(key, {})[network.index] = round(accuracy, 3)
        self.write()

    def scores(self) -> list[Score]:
        """One score for each split and noise, in the order of `SPLITS`."""
        known = {split: place for place, split in enumerate(SPLITS)}
        keys = sorted(self._accuracies, key=lambda key: (known.get(key[0], len(known)), key))
        return [self._score(*key) for key in keys]

    def _score(self, split: str, noise: float) -> Score:
        by_index = sorted(self._accuracies[split, noise].items())
        return Score.of(split, [accuracy for _, accuracy in by_index], self._images, noise, self._available)

    def write(self) -> None:
        """Write the file, if there is one.

        Raises:
            TrainingError: It cannot be written.
        """
        if self._path is None:
            return
        scores: list[dict[str, Any]] = []
        for score in self.scores():
            by_index = dict(sorted(self._accuracies[score.split, score.noise].items()))
            values = score.to_dict() | {"accuracies": by_index}
            scores.append({k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()})
        result = {"weights": self._weights, **self._header, "torch": torch.__version__, "scores": scores}
        with writing(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(self._path, (json.dumps(result, indent=1) + "\n").encode())


def _digest_of_images(measure: Measure) -> str:
    """Of the images as networks see them, normalised."""
    seen = f"{measure.data.digest()} {measure.normalise}"
    return hashlib.blake2b(seen.encode(), digest_size=8).hexdigest()


def table(scores: Sequence[Score]) -> str:
    """Scores beside the published ones, as a Markdown table.

    The error of having measured on some of the images stands after that over networks, where there is one.
    """
    lines = [
        "| networks | n | images | noise | top-1 % (mean ± standard error) | max | GHN-2 on CIFAR-10 |",
        "|---|---|---|---|---|---|---|",
    ]
    for score in scores:
        published = TARGETS.get((score.split, score.noise > 0))
        errors = f" ± {score.standard_error:.1f}" if score.n > 1 else ""
        errors += f" ± {score.image_error:.1f} (images)" if score.image_error else ""
        lines.append(
            f"| {score.split} | {score.n} | {score.images} | {score.noise:g} | {score.mean:.1f}{errors} | "
            f"{score.maximum:.1f} | {published or '-'} |"
        )
    return "\n".join(lines)
