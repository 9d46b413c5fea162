"""The command `ghn-init`.

`_group` dispatches and reports errors; `_commands`, `_convert`, `_training`, `_transfer` and `_search` are
the commands, with what they share of options in `_options`, whose text `_values` reads; `_spec` finds the
model, `_output` and `_bars` print and write. torch is loaded when a command runs, not for `--help`; so is
`ghn_init.training`.
"""

from __future__ import annotations

import signal
import sys
from typing import Annotated

import typer

from ghn_init import __version__
from ghn_init.cli import _search, _training
from ghn_init.cli._commands import inspect, predict
from ghn_init.cli._convert import convert
from ghn_init.cli._group import DEBUG, Command, CommandGroup
from ghn_init.cli._transfer import transfer

app = typer.Typer(
    name="ghn-init", cls=CommandGroup, no_args_is_help=True, subcommand_metavar="SPEC | COMMAND [ARGS]...",
    pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip
for _command in (
    predict, inspect, convert, _training.train, _training.curve, _training.teach, _training.evaluate,
    transfer, _search.measure, _search.properties, _search.search,
):  # fmt: skip
    app.command(_command.__name__, cls=Command)(_command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ghn-init {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    *,
    _version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version),
    ] = False,
    _debug: Annotated[
        bool, typer.Option(DEBUG, help="Show the traceback of an error; this may stand anywhere.")
    ] = False,
) -> None:
    """Initialise any PyTorch network with weights that a graph hypernetwork predicts.

    `ghn-init SPEC` is short for `ghn-init predict SPEC`. SPEC is a file
    (model.py), something in it (model.py:build_model) or in a module
    (torchvision.models:resnet50).
    """


def main() -> None:
    """Run the command on `sys.argv`.

    Exit status: 0; 1 for an error of ours or the system's (one line on stderr, no traceback); 2 for wrong
    usage; 143 after SIGTERM, which leaves no unfinished file behind.
    """
    signal.signal(signal.SIGTERM, _terminate)
    try:
        app(prog_name="ghn-init")
    except _Terminated:
        sys.exit(128 + signal.SIGTERM)


class _Terminated(BaseException):
    """SIGTERM arrived. Not `SystemExit`, which the user's code may raise, too, and is then told about."""


def _terminate(_number: int, _frame: object) -> None:
    raise _Terminated
