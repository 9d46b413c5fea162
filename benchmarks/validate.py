"""Accuracy of weights on held-out networks and held-out images, as the campaign's trainings measure theirs.

    python benchmarks/validate.py DATA GHN ... [--networks 24] [--images 512]

It is what to choose weights by: test images and test networks are for what is reported. Each GHN is a bundled
name, a folder or a file; one line of JSON for each.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ghn_init import load
from ghn_init.training import hold_out, load_images
from ghn_init.training._engine import fast_precision, prepare_process
from ghn_init.training._validation import Validation
from ghn_init.training.data import Normalisation

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ghn_init import GHN

NETWORKS: Final = 24
IMAGES: Final = 512

SHOWN: Final = ("validation", "standard_error", "convolutional", "transformers", "norm_free")
"""The figures that are kept of a validation, in percent."""


def shown(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a validation's figures that are kept."""
    return {key: figures[key] for key in SHOWN if key in figures}


def validated(
    data: Path, ghns: Sequence[GHN], networks: int = NETWORKS, images: int = IMAGES
) -> list[dict[str, Any]]:
    """The figures of every GHN, on the same networks and images."""
    training, held_out = hold_out(load_images(data, "train"))
    validation = Validation(held_out, Normalisation.of(training), networks, images, held_out.size)
    return [shown(validation(ghn, fast_precision(ghn.device))) for ghn in ghns]


def main() -> int:
    """Print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="images, as for `ghn-init train`")
    parser.add_argument("ghns", nargs="+", metavar="GHN")
    parser.add_argument("--networks", type=int, default=NETWORKS)
    parser.add_argument("--images", type=int, default=IMAGES)
    given = parser.parse_args()
    prepare_process()
    for name in given.ghns:
        (figures,) = validated(given.data, [load(name)], given.networks, given.images)
        print(json.dumps({"weights": name, **figures}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
