"""The published meta files, `deepnets1m_eval_meta.json` and `deepnets1m_train_meta.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ghn_init._errors import ArchitectureError
from ghn_init.deepnets._architecture import Architecture

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from os import PathLike


def read_published(path: str | PathLike[str], split: str) -> tuple[Architecture, ...]:
    """The architectures of one split of a meta file.

    The HDF5 file beside it is not needed: graphs are traced from the networks.

    Raises:
        ArchitectureError: The file is not such a file, has no such split, or one of its networks is
            not valid; the message says which.
    """
    nets = _nets(Path(path), split)
    architectures: list[Architecture] = []
    for index, net_args in enumerate(nets):
        try:
            architectures.append(Architecture.from_net_args(net_args))
        except (ArchitectureError, TypeError, AttributeError) as error:  # noqa: PERF203
            raise ArchitectureError(f"{path}: {split}[{index}]: {error}") from error
    return tuple(architectures)


def _nets(path: Path, split: str) -> Sequence[Mapping[str, Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArchitectureError(f"{path} cannot be read as a meta file of DeepNets-1M: {error}") from error
    if not isinstance(content, dict) or split not in content:
        found = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise ArchitectureError(f"{path} has no split {split!r}; found {found}")
    entry = content[split]
    if not isinstance(entry, dict) or not isinstance(entry.get("nets"), list):
        raise ArchitectureError(f"{path}: split {split!r} is not {{'nets': [...], 'meta': {{...}}}}")
    return entry["nets"]
