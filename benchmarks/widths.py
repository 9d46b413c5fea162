"""Accuracy of the same architectures at several widths, by ways of showing widths to a GHN.

    python benchmarks/widths.py DATA GHN [--widths 32 48 64 80 96 112 128 144] [--networks 6] [--transformers]
    python benchmarks/widths.py DATA GHN --widths 64 320 448 --widest 0 96 192 [--norm-free]

A GHN that has learned what a layer does to its features predicts it at any width. Compared are channels
as published and aligned, or, with `--widest`, aligned channels with these values of `ghn.widest`: see
docs/training.md. The networks are validation architectures with batch norm, or those of the split without;
the images are held out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Final

import torch

from ghn_init import GHN, load
from ghn_init.deepnets import Architecture, DeepNets1M
from ghn_init.training import hold_out, load_images
from ghn_init.training._engine import fast_precision, prepare_process
from ghn_init.training.data import Normalisation
from ghn_init.training.evaluate import Measure

if TYPE_CHECKING:
    from collections.abc import Iterator


_WIDEST: Final = 112
"""Evaluation width of an architecture that is taken: those of few parameters for their width take long."""


def architectures(*, transformers: bool, norm: bool = True) -> Iterator[Architecture]:
    """Validation architectures with batch norm or those without it, with attention or without."""
    split = DeepNets1M("val" if norm else "bnfree")
    for index in range(len(split)):
        arch = split[index]
        if not isinstance(arch, Architecture):
            continue
        if bool(arch.norm) == norm and arch.transformer == transformers and arch.C <= _WIDEST:
            yield arch


def read_so(ghn: GHN, **reading: Any) -> GHN:
    """The same weights, with this changed in their configuration."""
    other = GHN(dataclasses.replace(ghn.config, **reading))
    other.load_state_dict(ghn.state_dict())
    return other.requires_grad_(False).eval()


def main() -> int:
    """Print a line of JSON for every reading and width."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="images, as for `ghn-init train`")
    parser.add_argument("ghn")
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 48, 64, 80, 96, 112, 128, 144])
    parser.add_argument("--networks", type=int, default=6)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--transformers", action="store_true")
    parser.add_argument("--norm-free", action="store_true", help="networks without batch norm")
    parser.add_argument("--widest", type=int, nargs="+", default=[], help="values of `ghn.widest` to compare")
    given = parser.parse_args()
    prepare_process()
    training, held_out = hold_out(load_images(given.data, "train"))
    normalise = Normalisation.of(training)
    found = architectures(transformers=given.transformers, norm=not given.norm_free)
    few = list(islice(found, given.networks))
    weights = load(given.ghn)
    readings: list[dict[str, Any]] = [{"aligned": True, "widest": widest} for widest in given.widest]
    for reading in readings or [{"aligned": aligned, "widest": 0} for aligned in (False, True)]:
        ghn = read_so(weights, **reading)
        measure = Measure(
            ghn, held_out, images=given.images, normalise=normalise, precision=fast_precision(ghn.device),
            image_size=held_out.size,
        )  # fmt: skip
        for width in given.widths:
            accuracies = []
            for arch in few:
                with torch.device("meta"):
                    network = dataclasses.replace(arch, C=width).build(ghn.config.num_classes, held_out.size)
                accuracies.append(round(measure(network), 1))
            line = {**reading, "width": width, "mean": round(fmean(accuracies), 1)}
            print(json.dumps({**line, "accuracies": accuracies}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
