"""How `ghn-init` finds its subcommand, and what it does about errors."""

from __future__ import annotations

import os
import re
import sys
from typing import TYPE_CHECKING, Any

from typer.core import TyperCommand, TyperGroup

from ghn_init._errors import GHNInitError
from ghn_init._files import LONGEST_SHOWN, reason
from ghn_init.cli._output import in_options

if TYPE_CHECKING:
    from collections.abc import Sequence

DEFAULT_COMMAND = "predict"
DEBUG = "--debug"


class _PlainFlags:
    """Help that does not say of a flag that it takes a value: the `<bool>` that typer shows for them."""

    def get_params(self, ctx: Any) -> list[Any]:
        params = super().get_params(ctx)  # pyright: ignore[reportAttributeAccessIssue]
        for param in params:
            if getattr(param, "is_flag", False):
                param.metavar = ""
        return params


class Command(_PlainFlags, TyperCommand):
    """A command."""


class CommandGroup(_PlainFlags, TyperGroup):
    """A group in which `ghn-init SPEC` means `ghn-init predict SPEC`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Insert the default command before the first argument that is neither command nor group option.

        `--debug` may stand anywhere.
        """
        if DEBUG in args:
            args = [DEBUG, *(arg for arg in args if arg != DEBUG)]
        own = {option for param in self.get_params(ctx) for option in param.opts}
        position = next((index for index, arg in enumerate(args) if arg not in own), len(args))
        if position < len(args) and (word := args[position]) not in self.commands:
            if re.fullmatch(r"[A-Za-z]\w*", word):
                ctx.fail(
                    f"{word!r} is no command, and names no model; write FILE.py, FILE.py:NAME or "
                    "MODULE:NAME, e.g. torchvision.models:resnet50"
                )
            args = [*args[:position], DEFAULT_COMMAND, *args[position:]]
        return super().parse_args(ctx, args)

    def main(self, args: Sequence[str] | None = None, *rest: Any, **options: Any) -> Any:
        """Run the command; our errors and the system's become one line on stderr and exit status 1."""
        try:
            return super().main(args, *rest, **options)
        except (GHNInitError, OSError) as error:
            _empty_stdout()
            if DEBUG in (sys.argv if args is None else args):
                raise
            print(f"ghn-init: error: {_one_line(error)}", file=sys.stderr)  # noqa: T201
            sys.exit(1)


def _one_line(error: GHNInitError | OSError) -> str:
    """An error's message in one line; an error of the system's that names no file is one of stdout."""
    if isinstance(error, OSError):
        where = "stdout" if error.filename is None else str(error.filename)[:LONGEST_SHOWN]
        return f"{where}: {reason(error)}"
    return in_options(" ".join(str(error).split()))


def _empty_stdout() -> None:
    """Throw away what stdout does not take, lest Python complain of it when it ends."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
