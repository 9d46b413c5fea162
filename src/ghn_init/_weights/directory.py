"""A directory of `model.safetensors` and `config.json`: writing a hypernetwork there, and reading one.

Reading is strict and never runs code from a file: every tensor must be there, in its shape, finite, and as it
was saved where the file has a checksum.
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

import torch

from ghn_init._errors import CheckpointError, ConfigError
from ghn_init._files import reason, write_bytes
from ghn_init._hypernetwork.config import GHNConfig
from ghn_init._hypernetwork.model import Hypernetwork
from ghn_init._weights.files import CHECKSUM, checksum, read_json, read_tensors

if TYPE_CHECKING:
    from collections.abc import Mapping
    from importlib.abc import Traversable
    from os import PathLike

    from torch import Tensor

WEIGHTS_FILE: Final = "model.safetensors"
CONFIG_FILE: Final = "config.json"

_FLOATS: Final = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MOST_NAMED: Final = 8
"""Wrong tensors that an error names; it counts the others."""

T = TypeVar("T", bound=Hypernetwork)


def save(ghn: Hypernetwork, directory: str | PathLike[str]) -> None:
    """Write `model.safetensors` and `config.json` into `directory`, which is made if need be.

    A reader never finds half of a file.

    Raises:
        CheckpointError: They cannot be written.
    """
    import safetensors.torch

    directory = Path(directory)
    state = {name: values.detach().contiguous().cpu() for name, values in ghn.state_dict().items()}
    # One entry of metadata: the order of several changes from run to run, and so would the bytes.
    weights = safetensors.torch.save(state, {CHECKSUM: checksum(ghn.config, state)})
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_bytes(directory / WEIGHTS_FILE, weights)
        write_bytes(directory / CONFIG_FILE, (json.dumps(ghn.config.to_dict(), indent=2) + "\n").encode())
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be written: {reason(error)}") from error


def read_directory(cls: type[T], directory: Path | Traversable) -> T:
    """Read a directory that `save` wrote, into a hypernetwork of the class `cls`."""
    return read_files(cls, directory / WEIGHTS_FILE, directory / CONFIG_FILE)


def read_files(cls: type[T], weights: Path | Traversable, config: Path | Traversable) -> T:
    """Read weights and the configuration that belongs to them, into a hypernetwork of the class `cls`.

    Raises:
        CheckpointError: Weights that are missing, damaged, or not those of the configuration.
        ConfigError: A configuration with an unknown key or an impossible value.
    """
    for file in (weights, config):
        if not file.is_file():
            raise CheckpointError(
                f"{file}: no such file; expected {WEIGHTS_FILE} and {CONFIG_FILE} in one directory, "
                "as GHN.save_pretrained writes them"
            )
    settings = _config_of(config)
    ghn = _empty(cls, settings, str(weights))
    numel = sum(values.numel() for values in ghn.state_dict().values())
    state, expected = read_tensors(weights, numel * torch.float64.itemsize)
    filled = _filled(ghn, state, str(weights))
    if expected is not None and (found := checksum(settings, state)) != expected:
        raise CheckpointError(
            f"{weights}: expected the checksum {expected}, found {found}; the file or the {CONFIG_FILE} "
            "beside it changed since they were saved, so fetch or save them again"
        )
    return filled


def build(cls: type[T], config: GHNConfig, state: Mapping[str, Tensor], source: str) -> T:
    """A hypernetwork of the class `cls` with this configuration and these weights, in evaluation mode.

    `source` names the file in messages. The random state stays as it is.

    Raises:
        CheckpointError: Lists all tensors that are missing, unknown, of another shape, or not finite.
    """
    return _filled(_empty(cls, config, source), state, source)


def _empty(cls: type[T], config: GHNConfig, source: str) -> T:
    """A hypernetwork on the meta device, whose sizes may still be those of a lying configuration."""
    try:
        with torch.device("meta"):
            return cls(config)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def _filled(ghn: T, state: Mapping[str, Tensor], source: str) -> T:
    """`ghn` with the weights in `state`, checked, in evaluation mode."""
    wanted = ghn.state_dict()
    problems = [f"{name} is missing" for name in wanted if name not in state]
    problems += [f"{name} is unknown" for name in state if name not in wanted]
    faults = ((name, _fault(state[name], wanted[name])) for name in sorted(wanted.keys() & state.keys()))
    problems += [f"{name} {fault}" for name, fault in faults if fault]
    if problems:
        shown = "; ".join(textwrap.shorten(problem, 200) for problem in problems[:_MOST_NAMED])
        more = f" and {len(problems) - _MOST_NAMED} more" if len(problems) > _MOST_NAMED else ""
        raise CheckpointError(
            f"{source}: not the weights of a GHN with its configuration: {shown}{more}; "
            f"use the configuration that they were trained with ({ghn.config})"
        )
    typed = {name: values.float() if _is_float(values) else values for name, values in state.items()}
    ghn.load_state_dict({name: values.contiguous() for name, values in typed.items()}, assign=True)
    return ghn.eval()


def _fault(found: object, wanted: Tensor) -> str:
    """What is wrong with a tensor, or ""."""
    if not isinstance(found, torch.Tensor) or not _is_plain(found) or _is_float(found) != _is_float(wanted):
        return f"is no tensor of {'floats' if _is_float(wanted) else 'integers'}"
    if found.shape != wanted.shape:
        return f"is {tuple(found.shape)}, expected {tuple(wanted.shape)}"
    # As float32, which is what they become; added up in float64, where float32 cannot overflow.
    if _is_float(found) and not found.float().sum(dtype=torch.float64).isfinite():
        return "has values that are not finite"
    return ""


def _is_plain(values: Tensor) -> bool:
    """Whether the values are in memory, one by one, in a type that torch can compute with."""
    known = values.dtype in _FLOATS or not (values.is_floating_point() or values.is_complex())
    return values.layout == torch.strided and not values.is_meta and not values.is_quantized and known


def _is_float(values: Tensor) -> bool:
    return values.is_floating_point()


def _config_of(file: Path | Traversable) -> GHNConfig:
    values = read_json(file)
    try:
        return GHNConfig.from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error
