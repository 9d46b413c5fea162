"""What the commands print and write: progress, the summary, the state dict."""

from __future__ import annotations

import re
import sys
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ghn_init._errors import PredictError, listing
from ghn_init._files import LONGEST_SHOWN, destination, reason, replacing

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from torch import nn

    from ghn_init._writing.plan import Plan
    from ghn_init.cli._spec import FoundModel

_OPTIONS = (
    (
        "example_input=, a shape such as (1, 3, 224, 224) or the arguments of its call",
        "--input-shape, such as 1,3,224,224; arguments that are no tensor are for ghn_init.predict in Python",
    ),
    ("example_input=", "--input-shape"),
    ("strict=True", "--strict"),
)
"""Arguments of the library's functions that its messages name, and what they are on the command line."""

_CHOICES: Final = re.compile(r"\b(head|scale|frozen|diversify)='(\w+)'")
"""Those that are called as the option is."""

PATIENCE = 1.0
"""Seconds before a progress bar appears."""


def say(text: str) -> None:
    """Print to stderr: stdout is for results that a program may read."""
    typer.echo(text, err=True)


def in_options(text: str) -> str:
    """A message of the library's, with options where it names arguments of its functions."""
    for argument, option in _OPTIONS:
        text = text.replace(argument, option)
    return _CHOICES.sub(r"--\1 \2", text)


def check_output(path: Path, inputs: Iterable[Path] = (), *, hint: str = "-o") -> None:
    """See, before anything is computed, that a file may be written to `path`.

    Args:
        path: What the user gave.
        inputs: Files that the command reads, which it therefore does not replace.
        hint: The option that `path` was given with.

    Raises:
        typer.BadParameter: Something stands there that is no file, is read-only or is one of the inputs, or
            the folder does not exist (exit status 2).
    """

    def refused(why: str) -> typer.BadParameter:
        return typer.BadParameter(f"{str(path)[:LONGEST_SHOWN]} {why}", param_hint=hint)

    if str(path) == "-":
        raise refused("would be a file of that name; give a FILE, results for programs come with --json")
    if path.suffix == ".py":
        raise refused("is the name of a Python file, which is not overwritten")
    try:
        target = destination(path)
        if any(file.exists() and target.exists() and target.samefile(file) for file in inputs):
            raise refused("is what the command reads; write elsewhere")
        if not target.parent.is_dir():
            raise refused(f"cannot be written: the folder {path.parent} does not exist")
    except OSError as error:
        raise refused(f"cannot be written: {reason(error)}") from error


class Steps:
    """Times the steps of a command, and shows a bar on a terminal once they take more than a second."""

    def __init__(self, total: int) -> None:
        console = Console(file=sys.stderr)
        self.milliseconds: dict[str, float] = {}
        self._bar = Progress(
            BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn(),
            console=console, transient=True, redirect_stdout=False, redirect_stderr=False,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=total)
        self._timer = threading.Timer(PATIENCE, self._bar.start)
        self._timer.daemon = True

    def __enter__(self) -> Steps:
        if self._bar.console.is_terminal:
            self._timer.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._timer.cancel()
        if self._timer.ident is not None:
            self._timer.join()  # it may be starting the bar just now
        if self._bar.live.is_started:
            self._bar.stop()

    @contextmanager
    def __call__(self, label: str) -> Iterator[None]:
        """Time one step; the first word of `label` names it in `milliseconds`."""
        self._bar.update(self._task, description=label)
        started = time.perf_counter()
        yield
        self.milliseconds[label.split()[0]] = round(1000 * (time.perf_counter() - started), 1)
        self._bar.advance(self._task)


def summary(found: FoundModel, plan: Plan, milliseconds: Mapping[str, float], path: Path, size: int) -> str:
    """What was done, for a person: counts by action, what was kept and why, times, the file."""
    lines = [f"{found.name} from {found.origin}, weights {plan.weights}"]
    for action, (parameters, elements) in plan.counts().items():
        if parameters:
            lines.append(f"  {action:9} {parameters:5} parameters {elements:14,} elements")
    reasons: dict[str, list[str]] = {}
    for row in plan.rows:
        if row.action == "kept":
            reasons.setdefault(row.reason, []).append(row.name)
    lines += [f"    {listing(names, limit=4)}: {in_options(why)}" for why, names in reasons.items()]
    done = milliseconds["predicting"] + milliseconds["writing"]
    lines.append(f"{done:.0f} ms to predict and write; saved {path}, {size / 1e6:.1f} MB")
    return "\n".join(lines)


def save(model: nn.Module, path: Path) -> int:
    """Write the state dict to `path` in one piece and return its size in bytes.

    Tied parameters are written once, as `safetensors.torch.load_model` expects. A file of that name is
    replaced, and only by a complete one.

    Raises:
        PredictError: The file cannot be written, or the state dict holds more than tensors.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_model

    alien = [name for name, value in model.state_dict().items() if not isinstance(value, torch.Tensor)]
    if alien:
        raise PredictError(
            f"{type(model).__name__}: the state dict holds {', '.join(alien)}, which are no tensors and do "
            "not fit into safetensors; use ghn_init.predict in Python and torch.save"
        )
    try:
        with replacing(path) as partial:
            # One entry of metadata: with more, their order, and so the file's bytes, changes from run to run.
            save_model(model, str(partial), {"format": "pt"})
            return partial.stat().st_size
    except OSError as error:
        raise PredictError(f"{path} cannot be written: {reason(error)}") from error
    except KeyError as error:  # what safetensors makes of a dtype that it has no name for
        raise PredictError(
            f"{path} cannot be written: safetensors cannot hold {error.args[0]}; use ghn_init.predict in "
            "Python and torch.save"
        ) from error
    except (SafetensorError, RuntimeError) as error:
        raise PredictError(f"{path} cannot be written: {error}") from error
