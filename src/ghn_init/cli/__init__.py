"""The command `ghn-init`.

`_group` dispatches and reports errors, `_options` declares what the commands share, `_commands` and
`_convert` are the commands themselves, `_output` is what they print and write. torch is loaded when a
command runs, not for `--help`; `train` and `evaluate` load `ghn_init.training` when they run.
"""

from __future__ import annotations

from typing import Annotated

import typer

from ghn_init import __version__
from ghn_init.cli._commands import inspect, predict
from ghn_init.cli._convert import convert
from ghn_init.cli._group import DEBUG, CommandGroup

app = typer.Typer(
    name="ghn-init", cls=CommandGroup, no_args_is_help=True, add_completion=False,
    subcommand_metavar="SPEC | COMMAND [ARGS]...",
    pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip
app.command("predict")(predict)
app.command("inspect")(inspect)
app.command("convert")(convert)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ghn-init {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    *,
    _version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
    _debug: Annotated[bool, typer.Option(DEBUG, help="Show the traceback of an error.")] = False,
) -> None:
    """Initialise any PyTorch network with weights that a graph hypernetwork predicts.

    `ghn-init SPEC` is short for `ghn-init predict SPEC`. SPEC is a file (model.py), something in it
    (model.py:build_model) or in a module (torchvision.models:resnet50).
    """


def main() -> None:
    """Run the command on `sys.argv`.

    Exit status: 0; 1 for an error of ours (one line on stderr, no traceback); 2 for wrong usage.
    """
    app(prog_name="ghn-init")
