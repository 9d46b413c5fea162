"""Beside other threads, and after a fork.

torch's random state is one for the whole process: who saves, seeds and restores it does so alone (`alone`,
`seeded`). Ctrl-C does not end what has to be put back or finished (`uninterrupted`).

GNU OpenMP, which torch computes with on Linux, does not notice a fork: if the parent has computed with
several threads, the first parallel kernel in the child waits for them for ever. One thread waits for nobody
(`surviving_threads`).
"""

from __future__ import annotations

import gc
import hashlib
import os
import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

_forks = 0
"""How many forks are between this process and the one that imported this module."""

_lock = threading.RLock()


def _forked() -> None:
    """The child counts, and gets a lock of its own: a thread of the parent may have held the old one."""
    global _forks, _lock
    _forks += 1
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_forked)


@contextmanager
def alone() -> Iterator[None]:
    """Inside, no other thread of ours touches the random states, and Ctrl-C waits until they are put back.

    The same thread may enter again.
    """
    with _lock, uninterrupted():
        yield


@contextmanager
def seeded(name: str, seed: int) -> Iterator[None]:
    """Inside, what is drawn on the CPU depends on these two alone; no random numbers change for others."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    with alone(), drawing_from(int.from_bytes(digest, "little", signed=True)):
        yield


@contextmanager
def drawing_from(seed: int) -> Iterator[None]:
    """Inside, what is drawn on the CPU depends on the seed; after it the random state is what it was.

    For a whole training, too: other threads and Ctrl-C do not wait.
    """
    import torch

    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would seed the accelerators as well, where nothing is put back.
        torch.default_generator.manual_seed(seed)
        yield


class _Waiting:
    """A handler of SIGINT that remembers the first signal and hands further ones to the handler before it."""

    def __init__(self, before: Callable[[int, FrameType | None], object]) -> None:
        self._before = before
        self._arrived: tuple[int, FrameType | None] | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self._arrived is None:
            self._arrived = number, frame
        else:
            self._before(number, frame)

    def deliver(self) -> None:
        """Let the handler before it have the signal that waits, if there is one."""
        if self._arrived is not None:
            self._before(*self._arrived)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Inside, Ctrl-C waits until the end, so that it finds everything put back or finished.

    A second Ctrl-C does not wait. Python handles signals in the main thread; in others, inside another of
    these, and where SIGINT has no handler of Python's, there is nothing to do.
    """
    before = signal.getsignal(signal.SIGINT)
    main = threading.current_thread() is threading.main_thread()
    if not main or isinstance(before, _Waiting | int) or before is None:
        yield
        return
    waiting = _Waiting(before)
    signal.signal(signal.SIGINT, waiting)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        waiting.deliver()


@contextmanager
def uncollected() -> Iterator[None]:
    """Inside, Python does not look for garbage: a moment in which thousands of objects are made and used.

    It would look through all of them several times, and through those of every library that is loaded.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextmanager
def surviving_threads() -> Iterator[None]:
    """Inside, torch computes with one thread if this process was forked."""
    import torch

    threads = torch.get_num_threads() if _forks else 1
    if threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
