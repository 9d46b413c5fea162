"""Do the networks of a zoo get every value when they are built on the meta device?

    python benchmarks/meta.py --zoo timm                  # built inside torch.device("meta")
    python benchmarks/meta.py --zoo timm --large-on-meta  # built inside ghn_init.large_on_meta()

The first network of every kind is planned, and what is kept is initialised as `predict` and `predict_to` do;
nothing that is predicted is written. Prints the networks that are refused and why, and counts.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections import Counter
from typing import TYPE_CHECKING

import torch
from zoo_models import ZOOS, Network, networks

import ghn_init
from ghn_init._meta.materialise import kept_values
from ghn_init._writing.entry import to_write

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Try the first network of every kind."""
    parser = argparse.ArgumentParser(description="Values for what is kept of models on the meta device.")
    parser.add_argument("--zoo", choices=ZOOS, default="timm")
    parser.add_argument("--large-on-meta", action="store_true", help="build inside ghn_init.large_on_meta()")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")  # that networks are far from what the GHN was trained on
    ghn = ghn_init.load("ghn3-cifar10").requires_grad_(False)
    first = {network.kind: network for network in reversed(networks(options.zoo))}
    counts = Counter[str]()
    for network in first.values():
        outcome, reason = tried(network, ghn, large_on_meta=options.large_on_meta)
        counts[outcome] += 1
        if reason:
            print(f"{network.kind}: {network.name} {outcome}: {reason[:200]}", flush=True)
    print(", ".join(f"{outcome} {count}" for outcome, count in counts.items()))
    return 0


def tried(network: Network, ghn: ghn_init.GHN, *, large_on_meta: bool) -> tuple[str, str]:
    """What came of one network, and why if it is not complete."""
    try:
        with ghn_init.large_on_meta() if large_on_meta else torch.device("meta"):
            model = network.build()
    except Exception as error:  # noqa: BLE001  # the network's own code; told
        return "cannot be built", f"{type(error).__name__}: {error}"
    try:
        plan = ghn_init.plan(model, ghn, head="predict")
        predicted = [name for row in to_write(plan.rows) for name in row.written]
        kept_values(model, predicted, seed=0)
    except ghn_init.GHNInitError as error:
        return "refused", str(error)
    return "complete", ""


if __name__ == "__main__":
    sys.exit(main())
