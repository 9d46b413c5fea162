"""Weight files as they are on disk: read without trust, never running code from them.

A file may be cut off, damaged, something else, or made to harm. Whatever it is, reading ends in values or in
a `CheckpointError`, and takes memory in proportion to the file, not to what its headers claim.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import zipfile
import zlib
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Final

import torch

from ghn_init._errors import CheckpointError, first_line
from ghn_init._files import LONGEST_SHOWN, reason
from ghn_init._threads import alone
from ghn_init._weights.pickled_state import LEGACY, read_state

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from importlib.abc import Traversable
    from pathlib import Path

    from torch import Tensor

    from ghn_init._hypernetwork.config import GHNConfig

CHECKSUM: Final = "checksum"
"""The entry of a safetensors file's metadata that `checksum` fills."""

_LARGEST_CONFIG: Final = 1 << 16
"""Bytes of a configuration; a real one has some three hundred."""

_LARGEST_HEADER: Final = 1 << 20
"""Bytes of a safetensors header; a GHN's has some three thousand."""

_CALLED: Final = re.compile(r"GLOBAL ([\w.]*\w)")
"""The functions and classes in torch's message about a file that it refuses."""

_ZIP: Final = b"PK\x03\x04"
_PICKLE: Final = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))

_COMPRESSED: Final = (b"\x78", b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x5d\x00", b'\x04"M\x18')
"""What joblib's compressed files begin with: zlib, gzip, bz2, xz, lzma, lz4."""


@contextmanager
def readable(weights: object) -> Iterator[None]:
    """Inside, `weights` are read, whatever they are: what the system refuses is an error that names them.

    Raises:
        CheckpointError: An OSError inside: no permission, a name too long, a file that only looks like one.
    """
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{str(weights)[:LONGEST_SHOWN]}: cannot be read: {reason(error)}") from error


def checksum(config: GHNConfig, state: Mapping[str, Tensor]) -> str:
    """A checksum of a GHN's weights and configuration, which finds damage and is no signature.

    Covers the names, types, shapes and bytes of all tensors, and the fields of the configuration that are not
    at their defaults, so that a field that is added later, with a default, changes nothing.
    """
    default = type(config)()
    told = {
        field.name: getattr(config, field.name)
        for field in fields(config)
        if getattr(config, field.name) != getattr(default, field.name)
    }
    crc = zlib.crc32(json.dumps(told, sort_keys=True).encode())
    for name, values in sorted(state.items()):
        crc = zlib.crc32(f"{name} {values.dtype} {tuple(values.shape)}".encode(), crc)
        data: Any = values.contiguous().flatten().view(torch.uint8).numpy()
        crc = zlib.crc32(data, crc)
    return f"crc32:{crc:08x}"


def read_json(file: Path | Traversable) -> dict[str, Any]:
    """Read a small JSON object.

    Raises:
        CheckpointError: The file is something else, or larger than any configuration.
    """
    with file.open("rb") as opened:
        content = opened.read(_LARGEST_CONFIG + 1)
    if len(content) > _LARGEST_CONFIG:
        raise CheckpointError(
            f"{file}: expected a configuration of at most {_LARGEST_CONFIG:,} bytes, found a larger file"
        )
    try:
        values = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # JSON and UTF-8 errors, brackets without end
        raise CheckpointError(f"{file}: expected JSON, found {error}; the file is damaged") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: expected a JSON object, found {type(values).__name__}")
    return values


def read_tensors(file: Path | Traversable, largest: int) -> tuple[dict[str, Tensor], str | None]:
    """Read the tensors of a safetensors file, and the checksum in its metadata if there is one.

    Args:
        file: The file.
        largest: Bytes of tensors that it may hold; a larger file is not read.

    Raises:
        CheckpointError: The file is larger, damaged, or something else.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load as parse

    with file.open("rb") as opened:
        size = opened.seek(0, os.SEEK_END)
        if size > largest + _LARGEST_HEADER:
            raise CheckpointError(
                f"{file}: expected at most {largest + _LARGEST_HEADER:,} bytes for this configuration, found "
                f"{size:,}; these are not its weights"
            )
        opened.seek(0)
        content = opened.read()
    try:
        state = parse(content)
    # Damage shows as a SafetensorError or, for a type that torch lacks, as a KeyError; nothing is promised.
    except Exception as error:
        found = str(error) if isinstance(error, SafetensorError) else first_line(error)
        raise CheckpointError(
            f"{file}: expected a whole safetensors file, found {found}; the file is damaged or was not "
            "copied to its end, so fetch or save it again"
        ) from error
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return state, (header.get("__metadata__") or {}).get(CHECKSUM)


def read_pickled(path: Path) -> Any:
    """Read a file that `torch.save` wrote, or joblib, if it holds plain values and tensors only.

    Raises:
        CheckpointError: The file is damaged, something else, or would run code.
    """
    with path.open("rb") as file:
        start = file.read(len(LEGACY))
    if start.startswith(_PICKLE) and start != LEGACY:
        return read_state(path)
    if start.startswith(_COMPRESSED):
        raise CheckpointError(
            f"{path}: expected a checkpoint of torch.save, or an uncompressed one of joblib, found a "
            "compressed file; read it with joblib.load, if you trust it, and save the result with torch.save"
        )
    _check_archive(path)
    try:
        return _load(path)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: expected a checkpoint of plain tensors, found a file that is damaged or that needs "
            f"code to be run to read it, which is refused ({_refused(error)}); save only state_dict and "
            "config with torch.save, or fetch the file again"
        ) from error
    # What else torch.load raises for such files is not documented, and wide: RuntimeError, EOFError, ...
    except Exception as error:
        raise CheckpointError(_unreadable(path, first_line(error))) from error


def _load(path: Path) -> Any:
    """What `torch.load` makes of a file, with the one class that published training checkpoints need.

    `args` is there an `argparse.Namespace`, a bag of values. torch's list of classes is one for the process,
    so it is changed, for a moment, only where it has to be.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "argparse.Namespace" not in str(error):
            raise
    with alone(), torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _check_archive(path: Path) -> None:
    """Check what torch does not: the zip file's checksums, and that it is not larger inside than outside.

    `torch.save` does not compress. Files of torch before 1.6 are no zip files and have no checksums.

    Raises:
        CheckpointError: The file is damaged or made to exhaust memory.
    """
    with path.open("rb") as file:
        if file.read(len(_ZIP)) != _ZIP:
            return
    try:
        with zipfile.ZipFile(path) as archive:
            fault = _fault(archive, path.stat().st_size)
    except Exception as error:  # zipfile promises as little as torch does
        raise CheckpointError(_unreadable(path, first_line(error))) from error
    if fault:
        raise CheckpointError(_unreadable(path, fault))


def _fault(archive: zipfile.ZipFile, size: int) -> str:
    """What is wrong with a zip file of this size, or ""."""
    claimed = sum(entry.file_size for entry in archive.infolist())
    if claimed > size:
        return f"{claimed:,} bytes packed into {size:,}"
    broken = archive.testzip()
    return f"wrong checksum of {broken}" if broken else ""


def _unreadable(path: Path, found: str) -> str:
    return (
        f"{path}: expected a checkpoint written by torch.save, found a file that torch cannot read "
        f"({found}); it is damaged or something else, so fetch it again"
    )


def _refused(error: pickle.UnpicklingError) -> str:
    """What the safe unpickler objected to, without torch's advice to read the file unsafely."""
    names = ", ".join(dict.fromkeys(_CALLED.findall(str(error))))
    return f"it calls {names}" if names else "its pickle does more than hold tensors"
