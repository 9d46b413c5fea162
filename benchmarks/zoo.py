"""`ghn_init.predict` over whole zoos: every network of torchvision and timm, and a list from transformers.

    python benchmarks/zoo.py survey zoo.jsonl    # on the meta device: is it traced, what is predicted
    python benchmarks/zoo.py time times.jsonl    # on the CPU: beside the network's own initialisation
    python benchmarks/zoo.py report zoo.jsonl times.jsonl > docs/coverage.md

The files get one JSON line for each network as it is done, and networks that a file already has are
skipped, so an interrupted run goes on where it was. Of every kind of network the first comes first, then the
second of every kind: what there is so far is always a sample of the whole zoo.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import sys
import time
import warnings
from collections import Counter
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from zoo_checks import faults
from zoo_models import ZOOS, Network, networks
from zoo_report import Kept, Survey, Timing, report

import ghn_init
from ghn_init._network.wrappers import unwrapped
from ghn_init._tracing.trace import traced

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    from ghn_init._tracing.trace import Traced


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says; 1 if no network matches, or a surveyed one breaks a rule."""
    options = _parser().parse_args(arguments)
    if options.command == "report":
        print(report(_read(options.survey), _read(options.times) if options.times else []), end="")
        return 0
    if options.threads:
        torch.set_num_threads(options.threads)
    chosen = _chosen(options.zoo, options.kind, options.only)
    if not chosen:
        print("no network matches", file=sys.stderr)
        return 1
    ghn = ghn_init.load("ghn3-cifar10").requires_grad_(False)
    measure = survey if options.command == "survey" else measured
    done = {(record["zoo"], record["name"]) for record in _continued(options.file)}
    crashed = False
    with options.file.open("a") as file:
        for network in chosen:
            if (network.zoo, network.name) not in done:
                result = measure(network, ghn)
                crashed |= isinstance(result, Survey) and result.status == "crashed"
                print(json.dumps(asdict(result)), file=file, flush=True)
                print(result.line(), flush=True)
    return int(crashed)


def survey(network: Network, ghn: ghn_init.GHN) -> Survey:
    """Plan one network on the meta device; what came of it."""
    found = Survey(network.zoo, network.kind, network.name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a network is far from what the GHN was trained on
            model, found.build_ms = _timed(network.on_meta)
            plan, found.plan_ms = _timed(lambda: ghn_init.plan(model, ghn, head="predict"))
            again, found.trace_ms = _timed(lambda: traced(model))
    except ghn_init.GHNInitError as error:
        expected = network.refusal is not None and network.refusal in str(error)
        found.status, found.error = ("refused" if expected else "failed"), str(error)[:600]
    except Exception as error:  # noqa: BLE001  # a finding of the survey, which goes on
        found.status, found.error = "crashed", f"{type(error).__name__}: {error}"[:600]
    else:
        wrong = faults(model, plan)
        wrong += ["traced twice, the graphs differ"] if again.graph != plan.graph else []
        found.status, found.error = ("crashed", "; ".join(wrong[:5])) if wrong else ("planned", "")
        found.input, found.path = again.example.described, _path(model, again)
        found.nodes = len(plan.graph)
        found.elements = {action: elements for action, (_, elements) in plan.counts().items()}
        found.kept = _kept(plan)
    return found


def _path(model: nn.Module, found: Traced) -> str:
    """How the network was traced: inside what, where the shape of the input is from, in which mode."""
    network = unwrapped(model)
    wrapper = "" if network is model else f"inside {type(model).__name__}, "
    return f"{wrapper}{found.example.origin}{', evaluating' if found.mode == 'evaluating' else ''}"


def _kept(plan: ghn_init.Plan[nn.Module]) -> list[Kept]:
    """The kept parameters by reason."""
    reasons: dict[str, Kept] = {}
    for row in plan.rows:
        if row.action == "kept":
            kept = reasons.setdefault(row.reason, Kept(row.reason, row.name))
            kept.parameters += 1
            kept.elements += row.numel
    return list(reasons.values())


def measured(network: Network, ghn: ghn_init.GHN) -> Timing:
    """Build one network on the CPU as its zoo does, then predict it; the fastest of up to three times."""
    model, build_ms = _timed(network.build)
    largest = max((p.numel() * p.element_size() for p in model.parameters()), default=0) / 1e6
    timing = Timing(network.zoo, network.kind, network.name, build_ms=build_ms, largest_mb=largest)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            _, timing.trace_ms = _timed(lambda: ghn_init.trace(model))
            before = _resident_mb("VmRSS", afresh=True)
            _, timing.predict_ms = _timed(lambda: ghn_init.predict(model, ghn, head="predict"))
        except ghn_init.GHNInitError:
            return timing  # the survey says why
        timing.extra_mb = max(_resident_mb("VmHWM") - before, 0.0)
        while timing.runs < 3 and timing.runs * (timing.build_ms + timing.predict_ms) < _PATIENCE:
            timing.runs += 1
            timing.build_ms = min(timing.build_ms, _timed(network.build)[1])
            timing.trace_ms = min(timing.trace_ms, _timed(lambda: ghn_init.trace(model))[1])
            again = _timed(lambda: ghn_init.predict(model, ghn, head="predict"))[1]
            timing.predict_ms = min(timing.predict_ms, again)
    return timing


def _resident_mb(key: str, *, afresh: bool = False) -> float:
    """Resident memory now (VmRSS) or at its peak (VmHWM), which `afresh` lets start anew (Linux)."""
    if afresh:
        gc.collect()
        with contextlib.suppress(AttributeError):  # not glibc
            ctypes.CDLL(None).malloc_trim(0)  # else freed memory that stays resident would be used unseen
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{key}:")).split()[1]) * 1024 / 1e6


_PATIENCE: Final = 2000
"""Milliseconds after which a network is not measured once more."""


def _timed(action: Callable[[], Any]) -> tuple[Any, float]:
    """The result and the milliseconds of CPU time it took: other programs change them less than the clock."""
    started = time.process_time()
    result = action()
    return result, round(1000 * (time.process_time() - started), 2)


def _chosen(zoo: str | None, kind: str, only: str) -> list[Network]:
    """The networks that match; the first of every kind, then the second of every kind, and so on."""
    seen = Counter[tuple[str, str]]()
    found: list[tuple[int, Network]] = []
    for each in ZOOS if zoo is None else (zoo,):
        for network in networks(each):
            if fnmatchcase(network.kind, kind) and fnmatchcase(network.name, only):
                found.append((seen[each, network.kind], network))
                seen[each, network.kind] += 1
    return [network for _, network in sorted(found, key=lambda pair: pair[0])]


def _continued(path: Path) -> list[dict[str, Any]]:
    """The records of a file that is to be continued; a last line that was not written out is cut off."""
    if path.exists():
        whole, _, rest = path.read_bytes().rpartition(b"\n")
        if rest:
            path.write_bytes(whole + b"\n" if whole else b"")
    return _read(path)


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="ghn_init.predict over the networks of whole zoos.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (("survey", "what is predicted, on the meta device"), ("time", "how long it takes")):
        command = commands.add_parser(name, help=what)
        command.add_argument("file", type=Path, help="JSON lines, written or continued")
        command.add_argument("--zoo", choices=ZOOS, help="one zoo (default: all that are installed)")
        command.add_argument("--kind", default="*", metavar="PATTERN", help="such as detection, resnet")
        command.add_argument("--only", default="*", metavar="PATTERN", help="names of networks")
        command.add_argument("--threads", type=int, default=0, metavar="N", help="torch threads")
    command = commands.add_parser("report", help="print docs/coverage.md")
    command.add_argument("survey", type=Path)
    command.add_argument("times", type=Path, nargs="?")
    return parser


if __name__ == "__main__":
    sys.exit(main())
