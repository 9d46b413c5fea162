"""Writing files: each is complete or not there at all, and takes the place of nothing but a file."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import stat
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

_FOUND: Final = {
    stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFLNK: "a link to itself",
}  # fmt: skip
"""What may stand where a file is wanted."""

_WRITABLE: Final = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH


_PARTIAL: Final = re.compile(r"\.[0-9a-f]{16}\.partial")
"""Names of unfinished files and folders, which nobody else gives."""

_STALE: Final = 24 * 3600.0
"""Seconds after which an unfinished file that nobody writes to is one of a process that was killed."""

_UNABLE: Final = (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM, errno.ENOSYS)
"""What systems say that do not sync folders, or not this one."""

LONGEST_SHOWN: Final = 200
"""Characters of a name that an error repeats."""


def destination(path: str | os.PathLike[str]) -> Path:
    """The file that writing to `path` makes or replaces; symbolic links are followed.

    Raises:
        OSError: Something is there that is no file, or a file that is not to be written.
    """
    target = Path(os.path.realpath(path))
    try:
        mode = target.lstat().st_mode
    except FileNotFoundError:
        return target
    if not stat.S_ISREG(mode):
        raise OSError(f"it is {_FOUND.get(stat.S_IFMT(mode), 'no file')}; only a file is ever replaced")
    # The superuser may write everything, so that a file's own mode has to be asked as well.
    if not mode & _WRITABLE or not os.access(target, os.W_OK):
        raise PermissionError("it is read-only")
    return target


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Inside, an empty file beside `path` to write into; at the end it takes the place of `path`.

    After an exception of any kind `path` is what it was, and nothing else is left. A new file has the mode
    that the user's umask says, one that is replaced keeps its own.

    Raises:
        OSError: As for `destination`, or the folder does not exist or cannot be written.
    """
    target = destination(path)
    partial = partial_beside(target)
    try:
        partial.touch(exist_ok=False)
        mode = (target if target.exists() else partial).stat().st_mode
        yield partial
        partial.chmod(stat.S_IMODE(mode))
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def making_folder(target: Path) -> Iterator[Path]:
    """Inside, a new folder beside `target` to write into; at the end it is `target`, which may be empty.

    Folders above it are made. After an exception `target` is what it was, and nothing else is left.

    Raises:
        OSError: The folder cannot be made, or is not empty.
    """
    partial = partial_beside(target)
    try:
        partial.mkdir(parents=True)
        yield partial
        sync(partial)
        if target.exists():
            target.rmdir()
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # gone if it was renamed
    sync(target.parent)


def sync(folder: Path) -> None:
    """Have the names in a folder on the disk, where the system does so: some file systems refuse."""
    if os.name != "posix":
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _UNABLE:
            raise


def partial_beside(target: Path) -> Path:
    """A new hidden name beside `target` for what is not finished.

    What has such a name there and has not been written to for a day was left by a killed process, and goes.
    """
    for other in target.parent.glob(".*.partial"):
        with suppress(OSError):  # gone meanwhile, or another user's: it is no reason not to write
            if _PARTIAL.fullmatch(other.name) and _idle(other) > _STALE:
                shutil.rmtree(other) if other.is_dir() else other.unlink()
    return target.with_name(f".{secrets.token_hex(8)}.partial")


def _idle(path: Path) -> float:
    """Seconds since a file, or one in a folder, was written to."""
    files = (path, *path.iterdir()) if path.is_dir() else (path,)
    return time.time() - max(file.stat().st_mtime for file in files)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Replace a file in one step, once its new content is on the disk.

    Raises:
        OSError: As for `replacing`.
    """
    with replacing(path) as partial, partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def reason(error: OSError) -> str:
    """What an error of the system says, without the name of the file that it says it of."""
    return error.strerror or str(error)
