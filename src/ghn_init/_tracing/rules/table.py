"""The table of rules: torch function -> what it is in a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeVar

from ghn_init._tracing.carried import Carried
from ghn_init._tracing.sketch import Operation

Rule = Callable[[Operation], Carried | tuple[Carried, ...]]

RuleT = TypeVar("RuleT", bound=Rule)

RULES: Final[dict[str, Rule]] = {}
"""The torch function's `__name__` -> its rule."""


def rule(*names: str) -> Callable[[RuleT], RuleT]:
    """Decorator: this is the rule of the torch functions called `names`."""

    def register(function: RuleT) -> RuleT:
        for name in names:
            RULES[name] = function
        return function

    return register
