"""Checkpoints of a run: folders that are complete, or not there at all.

A checkpoint is written under a temporary name and renamed when it is on the disk, which is one operation
of the file system; the one before it is removed after that. A process killed at any moment leaves at
least one complete checkpoint, and the newest is the one to load. No file is larger than 15 MiB.
"""

from __future__ import annotations

import json
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ghn_init._errors import TrainingError
from ghn_init._files import making_folder, write_bytes
from ghn_init.training._output import writing

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch
    from torch import Tensor

FORMAT = 2
PART = 15 * 2**20
"""Bytes of the largest file; longer ones are cut into `.00`, `.01`, ..., to be read one after another."""

_PREFIX, _STATE, _SUFFIX = "checkpoint-", "state.json", ".safetensors"
_NAME = re.compile(rf"{_PREFIX}([0-9]{{8,}})")
_FILE = re.compile(r"(\w+)\.safetensors(?:\.([0-9]{2,}))?")
"""Names of the files with tensors: what they hold, and the number of the part where there are several."""


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds: tensors by file and name, and the rest as JSON values."""

    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]


def newest(folder: Path) -> Path | None:
    """The newest checkpoint of a run that keeps its files in `folder`, if there is one."""
    found = _steps(folder)
    return found[max(found)] if found else None


def step_of(path: Path) -> int:
    """The step of a checkpoint, from its name."""
    return int(path.name.removeprefix(_PREFIX))


def save(folder: Path, step: int, checkpoint: Checkpoint) -> Path:
    """Write the checkpoint of `step` and remove those of earlier steps; one of this step stays as it is.

    Those of later steps are another run's, which may still go on.

    Raises:
        TrainingError: It cannot be written; nothing is left of it then, and the others are as they were.
    """
    path = folder / f"{_PREFIX}{step:08d}"
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            _write(path, step, checkpoint)
    earlier = [other for number, other in _steps(folder).items() if number < step]
    for other in earlier:
        with suppress(OSError):  # in use on a network's file system, say: the next one tries again
            shutil.rmtree(other)
    return path


def load(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Files of other names are left alone, and so are tensors that its state does not name.

    Raises:
        TrainingError: A folder that is not one, or a damaged one, or one of another format.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load as parse

    try:
        state = json.loads((path / _STATE).read_text())
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise TrainingError(f"{path}: not a training checkpoint of format {FORMAT}")
        files = _tensor_files(path)
        # Checkpoints had no sizes at first: what is there then counts.
        sizes = state.get("bytes", dict.fromkeys(files))
        data = {name: _join(path, name, files.get(name, {}), size) for name, size in sizes.items()}
        return Checkpoint({name: parse(content) for name, content in data.items()}, state)
    except (OSError, ValueError, TypeError, AttributeError, SafetensorError) as error:
        raise TrainingError(f"{path}: cannot be read as a training checkpoint ({error})") from error


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The tensors of an optimizer's state as `<parameter's number>.<name>`."""
    state: dict[int, dict[str, Tensor]] = optimizer.state_dict()["state"]
    return {f"{number}.{name}": value for number, entry in state.items() for name, value in entry.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put `optimizer_tensors` back; the settings stay those of `optimizer`."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _steps(folder: Path) -> dict[int, Path]:
    """The checkpoints in `folder` by their steps; what only begins with the name is the user's."""
    named = ((_NAME.fullmatch(path.name), path) for path in folder.glob(f"{_PREFIX}*"))
    return {int(found[1]): path for found, path in named if found}


def _write(path: Path, step: int, checkpoint: Checkpoint) -> None:
    with making_folder(path) as partial:
        sizes = {name: _write_tensors(partial, name, tensors) for name, tensors in checkpoint.tensors.items()}
        state = {"format": FORMAT, "step": step, "bytes": sizes, **checkpoint.state}
        write_bytes(partial / _STATE, (json.dumps(state, indent=1) + "\n").encode())


def _write_tensors(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> int:
    """Write one or more files, and return their bytes."""
    from safetensors.torch import save as serialise

    data = serialise({key: value.detach().cpu().contiguous() for key, value in tensors.items()})
    if len(data) <= PART:
        write_bytes(folder / f"{name}{_SUFFIX}", data)
    else:
        for number, start in enumerate(range(0, len(data), PART)):
            write_bytes(folder / f"{name}{_SUFFIX}.{number:02d}", data[start : start + PART])
    return len(data)


def _tensor_files(path: Path) -> dict[str, dict[int, Path]]:
    """The files with tensors: by what they hold, and by the number of the part."""
    files: dict[str, dict[int, Path]] = {}
    for file in path.iterdir():
        if found := _FILE.fullmatch(file.name):
            files.setdefault(found[1], {})[int(found[2] or 0)] = file
    return files


def _join(path: Path, name: str, parts: Mapping[int, Path], size: int | None) -> bytes:
    """The content of the parts one after another, which are to have `size` bytes where that is known."""
    if missing := [number for number in range(max(parts, default=0) + 1) if number not in parts]:
        raise TrainingError(
            f"{path}: not a complete training checkpoint: {name}{_SUFFIX} lacks part {missing[0]}; put it "
            "back, or remove the folder to start from an earlier checkpoint or anew"
        )
    data = b"".join(parts[number].read_bytes() for number in sorted(parts))
    if size is not None and len(data) != size:
        raise TrainingError(
            f"{path}: not a complete training checkpoint: {name}{_SUFFIX} has {len(data)} bytes in "
            f"{len(parts)} files; expected {size}. Put back what it was, or remove the folder to start from "
            "an earlier checkpoint or anew"
        )
    return data
