"""The output folder of a run: one run at a time writes there, and errors of the system name what they hit."""

from __future__ import annotations

import os
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final

from ghn_init._errors import TrainingError
from ghn_init._files import reason

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LOCK: Final = ".lock"


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Inside, this run is the only one that writes to `folder`, which is made if need be.

    The lock is the kernel's, on a file that stays: it ends with the process however that ends, so that there
    is never one to clear away. Systems and file systems without locks go without.

    Raises:
        TrainingError: Another run, of this process or another, writes there; or this one may not.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _lock(descriptor, folder)
        yield
    finally:
        _unlock(descriptor)
        os.close(descriptor)


@contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Inside, an error of the system's becomes one of ours that names `path`: that of a full disk names none.

    Raises:
        TrainingError: It cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise TrainingError(f"{path} cannot be written: {reason(error)}") from error


def _lock(descriptor: int, folder: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:  # which of them depends on the file system
        raise TrainingError(
            f"{folder}: another run writes there; wait for its end, or give another output folder"
        ) from error
    except OSError:
        return  # a file system without locks


def _unlock(descriptor: int) -> None:
    """Closing is not enough where a process that was forked meanwhile has the file open, too."""
    if fcntl is not None:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
