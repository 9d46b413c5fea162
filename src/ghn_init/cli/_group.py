"""How `ghn-init` finds its subcommand, and what it does about errors."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from ghn_init._errors import GHNInitError

DEFAULT_COMMAND = "predict"
DEBUG = "--debug"

LAZY_COMMANDS = {
    "train": "Train a graph hypernetwork on sampled architectures.",
    "curve": "Draw the learning curve of a training run, finished or not.",
    "teach": "Train a small classifier for soft labels to train on.",
    "evaluate": "Measure how well a graph hypernetwork's predictions classify.",
}
"""Commands that `ghn_init.training.commands` defines, and the line that `--help` shows for them."""


class LazyCommand(TyperCommand):
    """A command whose function is imported when it runs, so that `--help` stays quick."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Hand over to the real command, its own `--help` included."""
        return self._real().make_context(info_name, args, parent=parent, **extra)

    def _real(self) -> Any:
        function = getattr(import_module("ghn_init.training.commands"), str(self.name))
        app = typer.Typer(add_completion=False)
        app.command(self.name)(function)
        return typer.main.get_command(app)


class CommandGroup(TyperGroup):
    """A group in which `ghn-init SPEC` means `ghn-init predict SPEC`."""

    def __init__(self, **attrs: Any) -> None:
        super().__init__(**attrs)
        for name, summary in LAZY_COMMANDS.items():
            self.add_command(LazyCommand(name=name, help=summary))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Insert the default command before the first argument that is neither command nor group option.

        `--debug` may stand anywhere.
        """
        if DEBUG in args:
            args = [DEBUG, *(arg for arg in args if arg != DEBUG)]
        own = {option for param in self.get_params(ctx) for option in param.opts}
        position = next((index for index, arg in enumerate(args) if arg not in own), len(args))
        if position < len(args) and args[position] not in self.commands:
            args = [*args[:position], DEFAULT_COMMAND, *args[position:]]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the subcommand; an error of ours becomes one line on stderr and exit status 1."""
        try:
            return super().invoke(ctx)
        except GHNInitError as error:
            if ctx.params.get("_debug"):
                raise
            print(f"ghn-init: error: {' '.join(str(error).split())}", file=sys.stderr)  # noqa: T201
            raise typer.Exit(1) from None
