"""Replacing functions of torch's while a thread records, for that thread."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterator

T = TypeVar("T")


class Replacement(Generic[T]):
    """Functions in the place of others while a thread records; there is never a second one (`alone`).

    Attributes of modules and classes are the whole process', so the functions have to ask `of_this_thread`
    whether they are called by the thread that records, and elsewhere be the original ones.

    Args:
        owner: The module or class.
        functions: The functions by the names of the attributes.
    """

    def __init__(self, owner: Any, **functions: Any) -> None:
        self._owner, self._functions = owner, functions
        self._before = {name: getattr(owner, name) for name in functions}
        self._recording: tuple[int, T] | None = None

    def original(self, name: str) -> Any:
        """The function that is replaced."""
        return self._before[name]

    def of_this_thread(self) -> T | None:
        """The value with which this thread records; None if it does not."""
        recording = self._recording
        return recording[1] if recording is not None and recording[0] == threading.get_ident() else None

    @contextmanager
    def active(self, value: T) -> Iterator[None]:
        """Inside, this thread records with `value`."""
        outer, self._recording = self._recording, (threading.get_ident(), value)
        self._put(self._functions)
        try:
            yield
        finally:
            self._recording = outer
            if outer is None:
                self._put(self._before)

    def _put(self, functions: dict[str, Any]) -> None:
        for name, function in functions.items():
            setattr(self._owner, name, function)
