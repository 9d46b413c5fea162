"""The mean of the weights of several GHNs that one training went through; see docs/experiments.md.

    python benchmarks/average.py GHN GHN ... -o FOLDER

Each is a bundled name, a folder or a file. Their configurations have to be the same; buffers, which hold what
was computed from images, are those of the last one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from ghn_init import GHN, load


def average(ghns: list[GHN]) -> GHN:
    """The last of `ghns` with the mean of all their parameters, computed in double precision.

    Raises:
        SystemExit: They are not all of one configuration.
    """
    result = ghns[-1]
    if any(ghn.config != result.config for ghn in ghns):
        raise SystemExit(
            "GHNs of different configurations have no mean: " + "; ".join(str(g.config) for g in ghns)
        )
    parameters = zip(*(ghn.parameters() for ghn in ghns), strict=True)
    with torch.no_grad():
        for values in parameters:
            values[-1].copy_(torch.stack([value.double() for value in values]).mean(0))
    return result


def main() -> int:
    """Write the mean to a folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ghns", nargs="+", metavar="GHN")
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args()
    average([load(ghn) for ghn in given.ghns]).save_pretrained(given.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
