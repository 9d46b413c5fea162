"""A streaming writer of sharded safetensors checkpoints.

`safetensors.torch.save_file` wants all tensors of a file in memory, and the hub's `save_torch_model` those of
the whole model. The format itself (https://huggingface.co/docs/safetensors) is made for streaming: eight
bytes with the header's length, a JSON header with every tensor's dtype, shape and place, then the raw
values. Which tensor goes into which file is left to huggingface_hub.
"""

from __future__ import annotations

import json
import operator
import os
import re
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final, SupportsIndex

import torch

from ghn_init._errors import PredictError
from ghn_init._files import making_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from os import PathLike

    from torch import Tensor

PATTERN: Final = "model{suffix}.safetensors"
INDEX: Final = "model.safetensors.index.json"

_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT]B)", re.IGNORECASE)
_UNITS: Final = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}

_DTYPES: Final = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.complex64: "C64",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Spec:
    """What a checkpoint says of a tensor before its values."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_checkpoint(
    folder: Path, specs: Mapping[str, Spec], value: Callable[[str], Tensor], max_shard_size: int | str
) -> Path:
    """Write a checkpoint into `folder`, asking for one tensor at a time.

    Args:
        folder: An existing folder without a checkpoint.
        specs: Every tensor of the checkpoint, in order.
        value: A tensor by name; asked once for every name, shard by shard, in the order of `specs` among
            tensors whose elements have the same size.
        max_shard_size: Bytes of values in a file at most, or text such as "5GB". A larger tensor gets a file
            of its own.

    Returns:
        What to open: the only file, or the index.

    Raises:
        PredictError: Not a size, a dtype that safetensors has no name for, or a file that cannot be written.
    """
    files = _split(specs, max_shard_size)
    try:
        for file, names in files.items():
            _write_file(folder / file, {name: specs[name] for name in names}, value)
        if len(files) == 1:
            return folder / next(iter(files))
        weight_map = {name: file for file, names in files.items() for name in names}
        total = sum(spec.nbytes for spec in specs.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    except OSError as error:
        raise PredictError(f"{folder} cannot be written: {error}") from error
    return folder / INDEX


def _split(specs: Mapping[str, Spec], max_shard_size: int | str) -> dict[str, list[str]]:
    """File names and the names of the tensors in them."""
    from huggingface_hub import split_state_dict_into_shards_factory

    unknown = sorted({str(spec.dtype) for spec in specs.values() if spec.dtype not in _DTYPES})
    if unknown:
        raise PredictError(f"safetensors cannot hold {', '.join(unknown)}")
    split = split_state_dict_into_shards_factory(
        dict(specs),
        get_storage_size=lambda spec: spec.nbytes,
        filename_pattern=PATTERN,
        max_shard_size=size_in_bytes(max_shard_size),
    )
    return split.filename_to_tensors


def size_in_bytes(size: int | str) -> int:
    """The largest size of a shard in bytes, given so or as text such as "5GB" (of 10^9 bytes).

    Raises:
        PredictError: It is neither, or not above 0.
    """
    match = _SIZE.fullmatch(size.strip()) if isinstance(size, str) else None
    if match:
        found = int(float(match[1]) * _UNITS[match[2].upper()])
    else:  # numpy's integers have an index, too
        found = operator.index(size) if isinstance(size, SupportsIndex) and not isinstance(size, bool) else 0
    if found < 1:
        raise PredictError(
            f"max_shard_size={size!r:.80}: expected a number of bytes above 0, or text such as '5GB' "
            "in KB, MB, GB or TB"
        )
    return found


def _write_file(path: Path, specs: Mapping[str, Spec], value: Callable[[str], Tensor]) -> None:
    # Wide elements first, as safetensors itself does: so every tensor is aligned to its element size.
    names = sorted(specs, key=lambda name: -specs[name].dtype.itemsize)
    with path.open("xb") as file:
        file.write(_header(names, specs))
        for name in names:
            _write_values(file, name, specs[name], value(name))


def _header(names: Sequence[str], specs: Mapping[str, Spec]) -> bytes:
    """Length and JSON, padded to eight bytes."""
    # The one entry that transformers asks for. With more, readers may order them as they like.
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in names:
        spec = specs[name]
        end = start + spec.nbytes
        header[name] = {"dtype": _DTYPES[spec.dtype], "shape": spec.shape, "data_offsets": (start, end)}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_values(file: BinaryIO, name: str, spec: Spec, tensor: Tensor) -> None:
    if (tensor.dtype, tuple(tensor.shape)) != (spec.dtype, spec.shape):
        raise PredictError(f"{name}: expected {spec}, found {tensor.dtype} of shape {tuple(tensor.shape)}")
    if tensor.numel():
        # numpy has no bfloat16; bytes it has. Little-endian, as every machine that torch is built for.
        file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


@contextmanager
def fresh_folder(folder: str | PathLike[str]) -> Iterator[Path]:
    """Inside, a new folder to write into, which becomes `folder` at the end; after an error nothing is left.

    Raises:
        PredictError: As for `folder_to_fill`, or it cannot be made.
    """
    target = folder_to_fill(folder)
    missing = [parent for parent in target.parents if not parent.exists()]
    try:
        with making_folder(target) as partial:
            yield partial
    except OSError as error:
        raise PredictError(f"{target} cannot be written: {error}") from error
    finally:
        with suppress(OSError):  # not empty, as after a success
            for parent in missing:
                parent.rmdir()


def folder_to_fill(folder: str | PathLike[str]) -> Path:
    """Where a folder of this name will be; symbolic links are followed.

    Raises:
        PredictError: It is no path, exists and is not empty, or is the folder that the process is in.
    """
    name = _path(folder)
    try:
        target, here = Path(os.path.realpath(name)), Path(os.path.realpath("."))
        taken = os.path.lexists(target) and (not target.is_dir() or any(target.iterdir()))
    except OSError as error:  # a link to itself, or a folder that nobody may look into
        raise PredictError(f"{name} cannot be made: {error}") from error
    if target == here:
        raise PredictError(f"{name} is the folder that this process is in; expected another")
    if taken:
        raise PredictError(f"{target} exists and is not an empty folder; remove it, or write elsewhere")
    return target


def _path(folder: str | PathLike[str]) -> Path:
    """What the caller gave for the folder, which may be anything."""
    name = os.fspath(folder) if isinstance(folder, (str, os.PathLike)) else None
    if not isinstance(name, str) or not name or "\0" in name:
        raise PredictError(f"{folder!r:.80} names no folder; expected a path such as 'checkpoint'")
    return Path(name)
