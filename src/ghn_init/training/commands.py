"""The commands `ghn-init train` and `ghn-init evaluate`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ghn_init.training._log import Record
    from ghn_init.training.evaluate import Score

TARGETS = {
    ("test", False): 66.9, ("wide", False): 64.0, ("deep", False): 60.5, ("dense", False): 65.8,
    ("bnfree", False): 36.8, ("resnet50", False): 58.6, ("vit", False): 11.4, ("test", True): 48.6,
}  # fmt: skip
"""Published top-1 of GHN-2 on CIFAR-10 in percent (arXiv 2110.13100), by split and whether under noise."""

_TRAIN = "Run"
_MODEL = "Hypernetwork"
_KEEP = "Keeping"


def train(
    data: Annotated[
        Path, typer.Argument(help="Images: an ImageFolder (or .tar.xz of one), torchvision's CIFAR, or .npz.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for checkpoint, log and weights.")
    ] = Path("runs/ghn2"),
    config: Annotated[
        Path | None, typer.Option(help="JSON file of TrainConfig fields; options below override it.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Length of the run in steps.", rich_help_panel=_TRAIN)
    ] = None,
    duration: Annotated[
        str | None,
        typer.Option(help="Length of the run in training time: 90s, 30m, 2h.", rich_help_panel=_TRAIN),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            rich_help_panel=_MODEL,
            help="Any field of TrainConfig (lr=3e-4), or of GHNConfig with ghn. before it (ghn.hid=64).",
        ),
    ] = None,
    time_limit: Annotated[
        str | None,
        typer.Option(help="Stop cleanly after this long; run again to go on.", rich_help_panel=_KEEP),
    ] = None,
    save_every: Annotated[str, typer.Option(help="Between checkpoints.", rich_help_panel=_KEEP)] = "60s",
    validate_every: Annotated[
        str, typer.Option(help="Between quick validations; 0s: none.", rich_help_panel=_KEEP)
    ] = "5m",
    validation_networks: Annotated[int, typer.Option(rich_help_panel=_KEEP)] = 12,
    validation_images: Annotated[int, typer.Option(rich_help_panel=_KEEP)] = 320,
) -> None:
    """Train a graph hypernetwork; run the same command again to take up where it stopped."""
    import torch

    from ghn_init.training._config import TrainConfig
    from ghn_init.training.data import hold_out, load_images
    from ghn_init.training.trainer import RunOptions, Trainer

    values = json.loads(config.read_text()) if config else {}
    _override(values, set_ or [])
    if steps is not None:
        values["steps"] = steps
    if duration is not None:
        values["duration"] = seconds(duration)
    settings = TrainConfig.from_dict(values)
    torch.set_num_threads(1)  # small networks are slower on several threads; cores are for processes
    if "WORLD_SIZE" in os.environ:  # torchrun, accelerate launch
        torch.distributed.init_process_group("gloo")
    images, validation = hold_out(load_images(data, "train"))
    options = RunOptions(
        output=output,
        time_limit=None if time_limit is None else seconds(time_limit),
        save_every=seconds(save_every),
        validate_every=seconds(validate_every),
        validation_networks=validation_networks,
        validation_images=validation_images,
    )
    trainer = Trainer(settings, images, validation, options)
    with _Progress() as progress:
        finished = trainer.run(progress.step)
    where = output / "ghn" if finished else output
    typer.echo(
        f"{'done' if finished else 'stopped; run again to go on'}: step {trainer.state.step}, "
        f"{trainer.state.networks} networks, {trainer.state.skipped} steps skipped, {where}",
        err=True,
    )


def evaluate(
    weights: Annotated[str, typer.Argument(help="Bundled name, directory, published .pt, hf://org/repo.")],
    data: Annotated[Path, typer.Option("--data", help="Images, as for `train`; the test split is used.")],
    split: Annotated[
        list[str] | None, typer.Option("--split", help="Splits; default: all. Also resnet50 and vit.")
    ] = None,
    sample: Annotated[int | None, typer.Option(help="Only the first N architectures of a split.")] = None,
    images: Annotated[int | None, typer.Option(help="Only N test images.")] = None,
    noise: Annotated[bool, typer.Option("--noise", help="Also under Gaussian noise of std 0.08.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSON file; written after every split.")
    ] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Run networks in bfloat16 (faster, rounded).")] = False,
) -> None:
    """Measure the accuracy of networks with predicted parameters, split by split."""
    import torch

    from ghn_init import load
    from ghn_init.training.data import Normalisation, load_images
    from ghn_init.training.evaluate import NOISE, SPLITS
    from ghn_init.training.evaluate import evaluate as measure

    ghn = load(weights)
    normalise = Normalisation.of(load_images(data, "train"))
    test = load_images(data, "test")
    scores: list[Score] = []
    for name in split or SPLITS:
        for level in (0.0, NOISE) if noise else (0.0,):
            with _Line(f"{name}, noise {level:g}") as line:
                scores.append(
                    measure(
                        ghn, name, test, n=sample, images=images, noise=level, normalise=normalise,
                        precision=torch.bfloat16 if bf16 else torch.float32, on_network=line.network,
                    )
                )  # fmt: skip
            if output:
                result = {
                    "weights": weights,
                    "torch": torch.__version__,
                    "scores": [s.to_dict() for s in scores],
                }
                output.write_text(json.dumps(result, indent=2) + "\n")
    typer.echo(table(scores))


def table(scores: Sequence[Score]) -> str:
    """Scores beside the published ones, as a Markdown table."""
    lines = [
        "| networks | n | images | noise | top-1 % (mean ± standard error) | max | published GHN-2 |",
        "|---|---|---|---|---|---|---|",
    ]
    for score in scores:
        published = TARGETS.get((score.split, score.noise > 0))
        lines.append(
            f"| {score.split} | {score.n} | {score.images} | {score.noise:g} | {score.mean:.1f} ± "
            f"{score.standard_error:.1f} | {score.maximum:.1f} | {published or '-'} |"
        )
    return "\n".join(lines)


def seconds(text: str) -> float:
    """A length of time as 90, 90s, 30m or 2h, in seconds.

    Raises:
        typer.BadParameter: Anything else.
    """
    units = {"s": 1.0, "m": 60.0, "h": 3600.0}
    number, unit = (text[:-1], units[text[-1]]) if text[-1:] in units else (text, 1.0)
    try:
        return float(number) * unit
    except ValueError:
        raise typer.BadParameter(f"{text!r}; expected a length of time such as 90s, 30m or 2h") from None


def _override(values: dict[str, Any], settings: Sequence[str]) -> None:
    """Write KEY=VALUE settings into `values`; values are JSON, or else strings."""
    for setting in settings:
        key, sign, text = setting.partition("=")
        if not sign:
            raise typer.BadParameter(f"{setting!r}; expected KEY=VALUE")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        if key.startswith("ghn."):
            values.setdefault("ghn", {})[key.removeprefix("ghn.")] = value
        else:
            values[key] = value


class _Progress:
    """A progress bar of a run on stderr where that is a terminal."""

    def __enter__(self) -> _Progress:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("step {task.fields[step]}"), BarColumn(),
            "[progress.percentage]{task.percentage:>4.1f}%",
            TextColumn("{task.fields[figures]}"), TimeElapsedColumn(), TimeRemainingColumn(),
            console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task("training", total=1.0, step=0, figures="")
        self._mean: dict[str, float] = {}
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    def step(self, record: Record) -> None:
        """Show one step; figures are running means."""
        new = {"loss": record.loss, "acc": record.accuracy, "net/s": record.networks / record.step_seconds}
        self._mean = {key: 0.95 * self._mean.get(key, value) + 0.05 * value for key, value in new.items()}
        figures = "  ".join(f"{key} {value:.3g}" for key, value in self._mean.items())
        if record.skipped:
            figures += f"  skipped {record.skipped}"
        self._bar.update(self._task, completed=record.done, step=record.step, figures=figures)


class _Line:
    """One progress line of an evaluation on stderr."""

    def __init__(self, title: str) -> None:
        self._title = title

    def __enter__(self) -> _Line:
        from rich.console import Console
        from rich.progress import Progress

        console = Console(stderr=True)
        self._bar = Progress(console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task(self._title, total=None)
        self._bar.start()
        self._sum = 0.0
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    def network(self, index: int, count: int, accuracy: float) -> None:
        """Show one network more."""
        self._sum += 100 * accuracy
        mean = f"{self._title}: {self._sum / (index + 1):.1f} %"
        self._bar.update(self._task, total=count, completed=index + 1, description=mean)


def app() -> typer.Typer:
    """Both commands, for `python -m ghn_init.training`."""
    application = typer.Typer(add_completion=False, no_args_is_help=True)
    application.command()(train)
    application.command()(evaluate)
    return application
