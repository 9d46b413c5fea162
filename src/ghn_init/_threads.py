"""Beside other threads, and after a fork.

torch's random state is one for the whole process: who saves, seeds and restores it does so alone (`alone`).

GNU OpenMP, which torch computes with on Linux, does not notice a fork: if the parent has computed with
several threads, the first parallel kernel in the child waits for them for ever. One thread waits for nobody
(`surviving_threads`).
"""

from __future__ import annotations

import os
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

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
    """Inside, no other thread of ours touches the random states; the same thread may enter again."""
    with _lock:
        yield


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
