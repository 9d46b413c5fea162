"""The table of rules: torch function -> what it is in a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from ghn_init._tracing.record import Call

Rule = Callable[[Call], Any]

RULES: Final[dict[str, Rule]] = {}
"""The torch function's `__name__` -> its rule."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Decorator: this is the rule of the torch functions called `names`."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register
