"""The values of KEY=VALUE."""

from __future__ import annotations

import ast
from typing import Any, Final

_OF_JSON: Final = {"true": True, "false": False, "null": None}


def literal(text: str) -> Any:
    """The value in KEY=VALUE: a Python literal, JSON's `true`, `false` and `null`, or else the text."""
    if text in _OF_JSON:
        return _OF_JSON[text]
    try:
        return ast.literal_eval(text)
    # What `literal_eval` is documented to raise; unhashable keys are a TypeError.
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return text
