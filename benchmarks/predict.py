"""Time and memory of `ghn_init.predict` beside random initialisation, for torchvision's 80 classifiers.

Every figure of a row comes from the same process and the same model object: medians of warm runs for
tracing, the GHN and writing; `total` is `predict` itself, timed on its own; `kaiming` is
`torch.nn.init.kaiming_normal_` over all weight matrices. `extra` is what the first `predict` needs at
its peak beyond the model (Linux). `--classes`, 1000 unless given; the head is predicted too, so that every
weight is written. `default` and its `extra` are those of `predict` without options, beside which stands
`whole`, all of `scale="predicted"`.

    python benchmarks/predict.py --threads 2 --json predict.json
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import math
import platform
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import torch
import torchvision
from torch import nn

import ghn_init

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_RANDOM = {"random": ghn_init.GHNConfig.ghn2()} | {
    f"random-{size}": ghn_init.GHNConfig.ghn3(size) for size in ("t", "s", "l", "xl")
}
"""Configurations whose weights are drawn here."""

MILLISECONDS = ("trace_ms", "ghn_ms", "write_ms", "total_ms", "kaiming_ms", "default_ms", "whole_ms")


@dataclass(frozen=True)
class Result:
    """One model. Times are medians in milliseconds, sizes in megabytes (10^6 bytes)."""

    model: str
    parameters: int
    nodes: int
    trace_ms: float
    ghn_ms: float
    write_ms: float
    total_ms: float
    kaiming_ms: float
    default_ms: float
    whole_ms: float
    extra_mb: float | None
    default_extra_mb: float | None
    largest_mb: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the JSON; 1 if no model matches."""
    options = _parser().parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    names = _selected(options.models)
    if not names:
        print(f"no torchvision classification model matches {' '.join(options.models)}", file=sys.stderr)
        return 1
    ghn = _ghn(options.weights)
    ghn_init.predict(torchvision.models.alexnet(num_classes=10), ghn)  # load kernels and thread pools
    print(_environment(options.weights, options.repeats))
    print(
        _line(
            (
                *(
                    "model",
                    "params/M",
                    "nodes",
                    "trace",
                    "GHN",
                    "write",
                    "total",
                    "kaiming",
                    "default",
                    "whole",
                ),
                *("ratio", "extra/MB", "(default)"),
            )
        )
    )
    results = []
    for name in names:
        results.append(measure(name, ghn, options.repeats, options.classes))
        print(_row(results[-1]), flush=True)
    print(_means(results))
    if options.json:
        document = {
            "environment": _environment(options.weights, options.repeats),
            "results": [asdict(result) for result in results],
        }
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


def measure(name: str, ghn: ghn_init.GHN, repeats: int, classes: int) -> Result:
    """All figures of one torchvision model."""
    with _uninitialised():
        model = torchvision.models.get_model(name, num_classes=classes)
    matrices = [param for param in model.parameters() if param.dim() > 1]
    kaiming_ms = _median_ms(lambda: _kaiming(matrices), repeats)
    default_extra_mb = _peak_extra_mb(lambda: ghn_init.predict(model, ghn))
    default_ms = _median_ms(lambda: ghn_init.predict(model, ghn), repeats)
    whole_ms = _median_ms(lambda: ghn_init.predict(model, ghn, scale="predicted"), repeats)
    extra_mb = _peak_extra_mb(lambda: ghn_init.predict(model, ghn, head="predict"))
    graph = ghn_init.trace(model)
    plan = ghn_init.plan(model, ghn, head="predict")
    return Result(
        model=name,
        parameters=sum(param.numel() for param in model.parameters()),
        nodes=len(graph),
        trace_ms=_median_ms(lambda: ghn_init.trace(model), repeats),
        ghn_ms=_median_ms(lambda: ghn.predict_tiles(replace(graph)), repeats),  # a graph caches its distances
        write_ms=_median_ms(plan.apply, repeats),
        total_ms=_median_ms(lambda: ghn_init.predict(model, ghn, head="predict"), repeats),
        kaiming_ms=kaiming_ms,
        default_ms=default_ms,
        whole_ms=whole_ms,
        extra_mb=extra_mb,
        default_extra_mb=default_extra_mb,
        largest_mb=max(param.numel() * param.element_size() for param in model.parameters()) / 1e6,
    )


def _parser() -> argparse.ArgumentParser:
    description = (
        "Time and memory of ghn_init.predict beside random initialisation, over torchvision's classifiers."
    )
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--models", nargs="+", default=["*"], metavar="PATTERN", help="names or patterns (default: all)"
    )
    parser.add_argument(
        "--repeats", type=int, default=5, metavar="N", help="warm runs a median is taken of (default: 5)"
    )
    parser.add_argument(
        "--threads", type=int, default=0, metavar="N", help="torch threads (default: torch's own choice)"
    )
    parser.add_argument(
        "--weights",
        default="ghn3-cifar10",
        metavar="NAME",
        help='what ghn_init.load takes, or "random"; "random-t", "-s", "-l" or "-xl" is a GHN-3 of a '
        "published size with random weights (default: ghn3-cifar10)",
    )
    parser.add_argument(
        "--classes", type=int, default=1000, metavar="N", help="width of the classifier (default: 1000)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    return parser


def _selected(patterns: Sequence[str]) -> list[str]:
    every = torchvision.models.list_models(module=torchvision.models)
    return [name for name in every if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _ghn(weights: str) -> ghn_init.GHN:
    if weights not in _RANDOM:
        return ghn_init.load(weights).requires_grad_(False)
    torch.manual_seed(0)
    return ghn_init.GHN(_RANDOM[weights]).requires_grad_(False)


def _environment(weights: str, repeats: int) -> str:
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}"
    machine = f"{torch.get_num_threads()} threads, {platform.machine()} {platform.system()}"
    return f"ghn-init {ghn_init.__version__}, {weights}, {versions}, {machine}, medians of {repeats}, ms"


@contextlib.contextmanager
def _uninitialised() -> Iterator[None]:
    """Building a model here draws no numbers for it, which would take longer than all measurements.

    Vectors become zero: whatever is in their memory, denormal numbers say, would take its time later.
    """
    with contextlib.ExitStack() as stack:
        for name in dir(nn.init):
            if name.endswith("_") and name.partition("_")[0] not in ("", "constant", "ones", "zeros"):
                stack.enter_context(mock.patch.object(nn.init, name, _undrawn))
        yield


def _undrawn(tensor: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    return tensor if tensor.dim() > 1 else nn.init.zeros_(tensor)


def _kaiming(matrices: Sequence[torch.Tensor]) -> None:
    for matrix in matrices:
        nn.init.kaiming_normal_(matrix)


def _median_ms(action: Callable[[], object], repeats: int) -> float:
    """Median time of `repeats` calls after one that is not counted."""
    action()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return 1000 * statistics.median(times)


def _peak_extra_mb(action: Callable[[], object]) -> float | None:
    """Growth of the resident set at its peak while `action` runs, None where Linux's /proc is missing.

    Pages of libraries, which the kernel drops when memory is short and reads again, do not count.
    """
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not status.exists():
        return None
    gc.collect()
    with contextlib.suppress(AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)  # else freed memory that stays resident would be used unseen
    clear.write_text("5")  # the peak starts anew
    before, files = _status_mb(status, "VmRSS"), _status_mb(status, "RssFile")
    action()
    growth = _status_mb(status, "VmHWM") - before
    return max(growth - max(_status_mb(status, "RssFile") - files, 0.0), 0.0)


def _status_mb(status: Path, key: str) -> float:
    line = next(line for line in status.read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024 / 1e6


def _row(result: Result) -> str:
    times = [f"{getattr(result, key):.1f}" for key in MILLISECONDS]
    extra = ["-" if mb is None else f"{mb:.0f}" for mb in (result.extra_mb, result.default_extra_mb)]
    ratio = f"{result.total_ms / result.kaiming_ms:.2f}"
    return _line((result.model, f"{result.parameters / 1e6:.1f}", str(result.nodes), *times, ratio, *extra))


def _means(results: Sequence[Result]) -> str:
    """Geometric means of the times and of the ratio, and the worst cases."""
    means = [_geometric([getattr(result, key) for result in results]) for key in MILLISECONDS]
    ratio = _geometric([result.total_ms / result.kaiming_ms for result in results])
    extra = max(
        (result.extra_mb - result.largest_mb for result in results if result.extra_mb is not None),
        default=None,
    )
    slowest = max(results, key=lambda result: result.total_ms)
    lines = [
        _line(("geometric mean", "", "", *(f"{mean:.1f}" for mean in means), f"{ratio:.2f}")),
        f"slowest: {slowest.model}, {slowest.total_ms:.0f} ms",
    ]
    if extra is not None:
        lines.append(f"most extra memory beyond the largest parameter: {extra:.0f} MB")
    return "\n".join(lines)


def _geometric(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def _line(cells: Sequence[str]) -> str:
    return cells[0].ljust(20) + "".join(cell.rjust(10) for cell in cells[1:])


if __name__ == "__main__":
    sys.exit(main())
