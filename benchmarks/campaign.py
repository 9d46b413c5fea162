"""The campaign: one long training in parts, started or continued by the same command; see docs/training.md.

    benchmarks/campaign.sh DATA RUN [--time 2h] [--fall 40m] [--processes 2]

A call spends `--time` and then stops: first parts at a constant learning rate, then, for the last `--fall`
of it, one on full-size images whose rate falls to zero. What a part trains on goes by the core-minutes of the
whole campaign (`PHASES`). Every part starts from the averaged weights of the one before it, with a seed of
its own. After the falling part, which takes some minutes more, the mean of its weights and those that the
call began from takes their place if it is better in validation. The first part of a folder RUN that is new
starts from the weights in `campaign/`, or from the bundled ones if that has only their position, or from
scratch if it has none. A part that was interrupted is completed by the next call; at a constant rate it then
ends when that call's falling part begins. After every part its weights, with the position and figures of the
campaign, are written to `campaign/`, which is there to be committed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from average import average
from validate import IMAGES, NETWORKS, shown, validated

from ghn_init import load
from ghn_init.cli._values import seconds as in_seconds
from ghn_init.training import _checkpoint
from ghn_init.training._engine import prepare_process

KEPT: Final = Path(__file__).resolve().parent.parent / "campaign"
"""Where the newest weights and their position are kept, for the next machine."""

BUNDLED: Final = "ghn3-cifar10"
"""The newest weights where `KEPT` has only their position."""

POSITION, PART, CONFIG, MEAN = "position.json", "part.json", "config.json", "mean.json"

RECIPE: Final[dict[str, Any]] = {
    "optimizer": "muon", "lr": 1e-3, "schedule": "constant", "warmup": 100, "ema": 0.998, "crop_padding": 1,
    "images": "own",
}  # fmt: skip
PRIORS: Final = {"depth_buckets": 128, "identity": True, "whitening": 3.0}
GHN: Final = {"hypernet": "transformer", "hid": 64, **PRIORS, "aligned": True, "widest": 96}
"""A GHN-3 T's graph network: at equal pairs it was ahead of the gated one, see docs/experiments.md."""

PHASES: Final[tuple[tuple[str, float, dict[str, Any]], ...]] = (
    ("small", 80, {"image_size": 16, "max_params": 1, "max_nodes": 150}),
    ("all16", 1080, {"image_size": 16, "max_params": 4}),
    ("all32", float("inf"), {"image_size": 32, "max_params": 4, "label_smoothing": 0.1}),
)
"""Names, core-minutes of the campaign at which a phase ends, and what it trains on.

A pair of 16 x 16 images costs a third of one of 32 x 32, and the falling part at 32 x 32 that ends every
call brings what was learned on them to full size.
"""

FALLING: Final[dict[str, Any]] = {**PHASES[-1][2], "schedule": "linear", "warmup": 50, "ema": 0.995}

SHORTEST: Final = 300.0
"""Seconds of the shortest part that is started: in fewer its moving average, begun anew, is of few steps."""

FIRST_SEED: Final = 11
VALIDATION: Final = (
    "--validate-every", "30m", "--validation-networks", str(NETWORKS), "--validation-images", str(IMAGES),
)  # fmt: skip


@dataclass(frozen=True)
class Position:
    """How far the campaign is.

    Attributes:
        parts: Parts that are over.
        pairs: (network, batch) pairs of all of them.
        core_minutes: Their training time, times the processes.
        figures: Last validation, and dropped networks and skipped steps, of every part by its name.
    """

    parts: int = 0
    pairs: int = 0
    core_minutes: float = 0.0
    figures: tuple[dict[str, Any], ...] = ()

    @classmethod
    def read(cls, file: Path) -> Position:
        """The position in a file that `publish` wrote."""
        values = json.loads(file.read_text())
        return cls(**{**values, "figures": tuple(values["figures"])})


@dataclass(frozen=True)
class Part:
    """One run of `ghn-init train`: its folder, configuration, first weights, and the position before it."""

    folder: Path
    config: dict[str, Any]
    start: str | None
    processes: int
    before: Position

    @classmethod
    def read(cls, folder: Path) -> Part:
        """The part that has its files in `folder`."""
        values = json.loads((folder / PART).read_text())
        before = Position(**{**values["before"], "figures": tuple(values["before"]["figures"])})
        return cls(folder, values["config"], values["start"], values["processes"], before)

    def write(self) -> None:
        """Note the part in its folder, before it starts or goes on."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / CONFIG).write_text(json.dumps(self.config, indent=1) + "\n")
        values = asdict(self) | {"folder": self.folder.name}
        (self.folder / PART).write_text(json.dumps(values, indent=1) + "\n")

    @property
    def weights(self) -> Path:
        """Where its weights are when it is over: its own, or the mean that is better (`settle`)."""
        mean = self.folder / "mean"
        return mean if mean.exists() else self.trained

    @property
    def trained(self) -> Path:
        """Where its own are."""
        return self.folder / "ghn"

    @property
    def over(self) -> bool:
        """Whether it came to its end."""
        return (self.trained / "training.json").exists()

    @property
    def settled(self) -> bool:
        """Whether there is no mean to be made at its end any more."""
        return self.config["schedule"] == "constant" or (self.folder / MEAN).exists()

    @property
    def seconds(self) -> float:
        """For how long it was trained, if it is not over."""
        checkpoint = _checkpoint.newest(self.folder)
        return _checkpoint.load(checkpoint).state["state"]["seconds"] if checkpoint else 0.0

    def validation(self) -> dict[str, Any]:
        """The figures of its last validation, if it had one."""
        lines = (json.loads(line) for line in (self.folder / "log.jsonl").read_text().splitlines())
        return shown(next((line for line in reversed([*lines]) if "validation" in line), {}))

    def after(self) -> Position:
        """The position after it; it has to be over."""
        run = json.loads((self.trained / "training.json").read_text())
        spent = run["seconds"] * self.processes / 60
        mean = self.folder / MEAN
        pairs, core_minutes = self.before.pairs + run["networks"], self.before.core_minutes + spent
        figures = {
            "part": self.folder.name,
            "pairs": pairs,
            "core_minutes": round(core_minutes, 1),
            "image_size": self.config["image_size"],
            "skipped": run["skipped"],
            **self.validation(),
            **({"mean": json.loads(mean.read_text())} if mean.exists() else {}),
        }
        return Position(self.before.parts + 1, pairs, core_minutes, (*self.before.figures, figures))


def next_part(
    run: Path, position: Position, start: str | None, seconds: float, fall: float, processes: int
) -> Part:
    """The part with which a call goes on that has so many seconds left, the last `fall` for falling."""
    name, level, values = "fall", seconds, FALLING
    for phase, end, settings in PHASES:
        possible = min(seconds - fall, (end - position.core_minutes) * 60 / processes)
        if possible >= SHORTEST:
            name, level, values = phase, possible, settings
            break
    config = {
        **RECIPE, **values, "ghn": GHN, "seed": FIRST_SEED + position.parts, "meta_batch": processes,
        "duration": round(level, 1),
    }  # fmt: skip
    return Part(run / f"{position.parts + 1:03d}-{name}", config, start, processes, position)


def fitted(part: Part, seconds: float, fall: float) -> Part:
    """An interrupted part with the length that suits a call of so many seconds, if its rate is constant."""
    if part.config["schedule"] != "constant":
        return part
    end = next((end for _, end, values in PHASES if values.items() <= part.config.items()), float("inf"))
    most = (end - part.before.core_minutes) * 60 / part.processes
    length = max(min(part.seconds + seconds - fall, most), part.seconds, SHORTEST)
    return replace(part, config={**part.config, "duration": round(length, 1)})


def parts_of(run: Path) -> list[Part]:
    """The parts in a folder, in their order."""
    return [Part.read(file.parent) for file in sorted(run.glob(f"*/{PART}"))]


def sharing(part: Part, processes: int) -> int:
    """How many of so many processes can share the part's meta-batches evenly."""
    most = min(processes, part.config["meta_batch"])
    return next(n for n in range(most, 0, -1) if not part.config["meta_batch"] % n)


def command(part: Part, data: Path, limit: float) -> list[str]:
    """What trains a part, or goes on with it, for `limit` seconds at most, in each of its processes."""
    options = ["-o", str(part.folder), "--config", str(part.folder / CONFIG), "--time-limit", f"{limit:.0f}s"]
    # Not again: what it names may have become other weights since.
    options += ["--from", part.start] if part.start and not _checkpoint.newest(part.folder) else []
    return [sys.executable, "-m", "ghn_init", "train", str(data), *options, *VALIDATION]


def start(arguments: list[str], processes: int) -> bool:
    """Run a command in processes that meet; SIGTERM and Ctrl-C end it after its step, with a checkpoint.

    The first process decides for all. (torchrun would print a traceback, and kill a long validation.)

    Returns:
        False if it was asked to end.

    Raises:
        SystemExit: A process failed; the others are ended.
    """
    asked = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1])}
    running: list[subprocess.Popen[bytes]] = []

    def stop(*_: object) -> None:
        asked.set()
        for process in running[:1]:
            process.terminate()

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for rank in range(processes):
            place = {"WORLD_SIZE": str(processes), "RANK": str(rank), "LOCAL_RANK": str(rank)}
            running.append(subprocess.Popen(arguments, env=os.environ | meeting | place))
        if asked.is_set():  # before there was a process
            stop()
        with ThreadPoolExecutor(processes) as waiting:
            for ended in as_completed([waiting.submit(process.wait) for process in running]):
                if ended.result():
                    for process in running:
                        process.terminate()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    codes = [process.returncode for process in running]
    # A process that does not yet take note of SIGTERM is ended by it.
    if any(code and not (asked.is_set() and code == -signal.SIGTERM) for code in codes):
        raise SystemExit(f"training failed: its processes ended with status {codes}, see above")
    return not asked.is_set()


def settle(part: Part, data: Path) -> None:
    """Make the mean of a falling part's weights and those that its call began from, and keep the better.

    Those are the weights of the last falling part before it, or what the folder began with. A part at a
    constant rate and a falling one after it end elsewhere in the same valley: see the means in
    docs/experiments.md.
    """
    earlier = [p for p in parts_of(part.folder.parent) if p.folder.name < part.folder.name]
    falls = [p for p in earlier if p.config["schedule"] != "constant"]
    first = str(falls[-1].weights) if falls else (earlier or [part])[0].start
    figures: dict[str, Any] = {}
    if first is not None:
        mean = average([load(first), load(str(part.trained))])
        (figures,) = validated(data, [mean])
        if figures["validation"] > part.validation().get("validation", 0.0):
            mean.save_pretrained(part.folder / "mean")
    (part.folder / MEAN).write_text(json.dumps(figures, indent=1) + "\n")


def publish(part: Part) -> Position:
    """Keep the weights of a part that is over, and the position after it; print it."""
    position = part.after()
    KEPT.mkdir(exist_ok=True)
    for name in ("model.safetensors", "config.json"):
        shutil.copy(part.weights / name, KEPT / name)
    (KEPT / POSITION).write_text(json.dumps(asdict(position), indent=1) + "\n")
    print(json.dumps(position.figures[-1]), flush=True)
    return position


def beginning(run: Path) -> tuple[Position, str | None]:
    """Where a call begins that has no part to complete: the position, and the weights to start from."""
    if parts := parts_of(run):
        return parts[-1].after(), str(parts[-1].weights)
    if (KEPT / POSITION).exists():
        return Position.read(KEPT / POSITION), _first_weights(run)
    return Position(), None


def _first_weights(run: Path) -> str:
    """The kept weights, or the bundled ones, copied into the folder: later ones will take their place."""
    copied = run / "000-start"
    if (KEPT / "model.safetensors").exists():
        shutil.copytree(KEPT, copied, dirs_exist_ok=True)
    else:
        load(BUNDLED).save_pretrained(copied)
    return str(copied)


def campaign(data: Path, run: Path, seconds: float, fall: float, processes: int) -> None:
    """Spend `seconds` on the campaign."""
    deadline = time.monotonic() + seconds

    def left() -> float:
        return deadline - time.monotonic()

    def train(part: Part) -> bool:
        part.write()
        whole = start(command(part, data, max(left(), 1.0)), sharing(part, processes))
        if part.over:
            publish(part)
        if not whole:
            print(f"{run}: stopped; the same command goes on", file=sys.stderr)
        return whole and part.over

    _settle_last(run, data)  # of a call that was ended before
    goes_on = all(train(fitted(last, left(), fall)) for last in parts_of(run)[-1:] if not last.over)
    while goes_on and left() >= SHORTEST:
        goes_on = train(next_part(run, *beginning(run), left(), fall, processes))
    if goes_on:
        _settle_last(run, data)


def _settle_last(run: Path, data: Path) -> None:
    """Settle the last part of a folder, if it is over and is not settled yet."""
    for last in parts_of(run)[-1:]:
        if last.over and not last.settled:
            settle(last, data)
            publish(last)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="images, as for `ghn-init train`")
    parser.add_argument("run", type=Path, help="folder of the campaign's parts")
    parser.add_argument("--time", default="2h", help="what this call spends: 30m, 2h")
    parser.add_argument("--fall", default="", help="of it, at a falling rate at the end; default: a third")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    given = parser.parse_args()
    whole = in_seconds(given.time)
    fall = in_seconds(given.fall) if given.fall else whole / 3
    prepare_process()
    campaign(given.data, given.run, whole, fall, given.processes)


if __name__ == "__main__":
    main()
