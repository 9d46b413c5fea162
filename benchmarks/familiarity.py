"""How good predicted parameters are in networks of different kinds: the table in docs/familiarity.md.

Networks of DeepNets-1M and torchvision's classifiers, in groups by their norm layers, get predicted
parameters and are measured on test images, never trained, with batch norm on batch statistics.

    python benchmarks/familiarity.py DATA --images 256
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torchvision

import ghn_init
from ghn_init._tracing.trace import trace
from ghn_init.training import Normalisation, load_images
from ghn_init.training._layers import prepare
from ghn_init.training.evaluate import Case, Measure

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import nn

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


@dataclass(frozen=True)
class Result:
    """Top-1 accuracy, in percent, of a network of a group."""

    group: str
    name: str
    accuracy: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every network, each on a line on stderr, and print the table."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    ghn = ghn_init.load(options.weights).requires_grad_(False)
    test, normalise = load_images(options.data, "test"), Normalisation.of(load_images(options.data, "train"))
    measure = Measure(
        ghn, test, images=options.images, normalise=normalise, precision=getattr(torch, options.precision)
    )
    results: list[Result] = []
    for source, name, network in (*_deepnets(options.sample), *_torchvision(options.max_params * 10**6)):
        module = network.build(10, test.size) if isinstance(network, Case) else network
        try:
            group = f"{source}, {_norm(module, test.size)}"
        except ghn_init.TraceError as error:  # it downsamples too often for images this small
            print(f"left out: {error}", file=sys.stderr, flush=True)
            continue
        accuracy = measure(module) if isinstance(network, Case) else _predicted(module, measure)
        results.append(Result(group, name, accuracy))
        print(f"{group:40} {name:24} {accuracy:5.1f}", file=sys.stderr, flush=True)
    print(_table(results))
    return 0


def _predicted(module: nn.Module, measure: Measure) -> float:
    """Top-1 accuracy of a network that has parameters, such as layer scales, that no GHN predicts."""
    size = measure.data.size
    ghn_init.predict(module, measure.ghn, head="predict", example_input=(1, 3, size, size))
    prepare(module).to(measure.precision).to(memory_format=torch.channels_last).eval()
    return measure.accuracy(module)


def _deepnets(sample: int) -> Iterator[tuple[str, str, Case]]:
    for split in ("test", "deep", "bnfree", "resnet50", "vit"):
        for network in Case.of(split, sample):
            yield f"DeepNets-1M {split}", f"{split} {network.index}", network


def _torchvision(max_params: int) -> Iterator[tuple[str, str, nn.Module]]:
    for name in torchvision.models.list_models(module=torchvision.models):
        # RegNets read values while they are built, which plain meta tensors do not have
        with ghn_init.large_on_meta():
            # Inception v3 and GoogLeNet have heads for training, which need larger images
            extra = {"aux_logits": False, "init_weights": False} if name in _HEADS else {}
            model = torchvision.models.get_model(name, num_classes=10, **extra)
        if sum(param.numel() for param in model.parameters()) <= max_params:
            yield ("torchvision ResNets" if name in RESNETS else "torchvision"), name, model


_HEADS = ("googlenet", "inception_v3")


def _norm(module: nn.Module, size: int) -> str:
    """Which norms are among the nodes."""
    types = {node.type for node in trace(module, (1, 3, size, size)).nodes}
    return "batch norm" if "bn" in types else "layer norm" if "ln" in types else "no norm"


def _table(results: Sequence[Result]) -> str:
    lines = ["| networks | n | mean | lowest to highest |", "|---|---|---|---|"]
    for group in dict.fromkeys(result.group for result in results):
        found = [result.accuracy for result in results if result.group == group]
        span = f"{min(found):.1f} to {max(found):.1f}" if len(found) > 1 else ""
        lines.append(f"| {group} | {len(found)} | {statistics.mean(found):.1f} | {span} |")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", type=Path, help="CIFAR-10 in a form that `ghn-init train` takes")
    parser.add_argument("--weights", default="ghn3-cifar10", help="of the GHN")
    parser.add_argument("--images", type=int, default=256, help="test images")
    parser.add_argument("--sample", type=int, default=25, help="networks of a split of DeepNets-1M")
    parser.add_argument("--max-params", type=int, default=70, help="millions, of torchvision's networks")
    parser.add_argument("--precision", default="float32", help="in which networks run")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
