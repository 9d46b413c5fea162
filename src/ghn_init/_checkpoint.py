"""Finding, reading and writing the weights of a GHN.

Our own form is a directory of `model.safetensors` and `config.json`; published weights are `.pt` files.
Loading is strict and never runs code from a file: every tensor must be there, in its shape, finite.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from importlib import resources
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from ghn_init._config import GHNConfig
from ghn_init._errors import CheckpointError, ConfigError
from ghn_init._model import GHN

if TYPE_CHECKING:
    from collections.abc import Mapping
    from importlib.abc import Traversable

    from torch import Tensor, nn

DEFAULT_WEIGHTS: Final = "ghn2-cifar10"
"""The bundled weights that are used where none are named."""

WEIGHTS_FILE: Final = "model.safetensors"
CONFIG_FILE: Final = "config.json"

_HUB: Final = re.compile(r"hf://(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>.+))?")
_TORCH_ERRORS: Final = (
    RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError, AttributeError, IndexError,
    AssertionError, zipfile.BadZipFile,
)  # fmt: skip
"""What `torch.load` raises for files that are damaged or something else."""


def load(
    weights: str | PathLike[str] | GHN = DEFAULT_WEIGHTS,
    *,
    device: torch.device | str | None = None,
    gnn: nn.Module | None = None,
) -> GHN:
    """Load a GHN, in evaluation mode.

    Args:
        weights: The name of bundled weights; a directory with `model.safetensors` and `config.json`, or
            the path of such a `model.safetensors`; a published `.pt` file; "hf://org/repo" or
            "hf://org/repo@revision" on the Hugging Face hub (or in its cache); or a GHN, which is returned.
        device: Where to put it; None: the CPU, and a given GHN stays where it is.
        gnn: The graph network of weights whose configuration names one that is not part of this package
            (`GHNConfig.hypernet`). It becomes part of the GHN and gets the weights.

    Raises:
        CheckpointError: Weights that are missing, damaged, or not those of a GHN.
        ConfigError: A configuration with an unknown key or an impossible value, or that names a graph
            network which is not given.
    """
    if isinstance(weights, GHN) and gnn is not None:
        raise ConfigError("a GHN and a graph network; expected only one of them: the GHN has its own")
    ghn = weights if isinstance(weights, GHN) else _find(weights, gnn)
    return ghn if device is None else ghn.to(device)


def bundled_names() -> list[str]:
    """Names of the weights that come with the package."""
    folder = _bundled_folder()
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in folder.iterdir() if (entry / WEIGHTS_FILE).is_file())


def save(ghn: GHN, directory: str | PathLike[str]) -> None:
    """Write `model.safetensors` and `config.json` into `directory`, which is made if need be.

    The files are written beside their places and moved there, so that a reader never finds half of one.
    """
    from safetensors.torch import save_file

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = {name: values.detach().contiguous().cpu() for name, values in ghn.state_dict().items()}
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        draft = directory / f".{name}.part"
        if name == WEIGHTS_FILE:
            save_file(state, draft, metadata={"format": "pt"})
        else:
            draft.write_text(json.dumps(ghn.config.to_dict(), indent=2) + "\n", encoding="utf-8")
        draft.replace(directory / name)


def read_directory(directory: Path | Traversable, gnn: nn.Module | None = None) -> GHN:
    """Read a directory that `save` wrote."""
    return read_safetensors(directory / WEIGHTS_FILE, directory / CONFIG_FILE, gnn)


def read_safetensors(
    weights: Path | Traversable, config: Path | Traversable, gnn: nn.Module | None = None
) -> GHN:
    """Read weights and the configuration that belongs to them."""
    from safetensors import SafetensorError
    from safetensors.torch import load as parse

    for file in (weights, config):
        if not file.is_file():
            raise CheckpointError(
                f"{file}: no such file; expected {WEIGHTS_FILE} and {CONFIG_FILE} in one directory, "
                "as GHN.save_pretrained writes them"
            )
    settings = _read_config(config)
    try:
        state = parse(weights.read_bytes())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{weights}: expected a whole safetensors file, found {error}; the file is damaged or was not "
            "copied to its end, so fetch or save it again"
        ) from error
    return build(settings, state, str(weights), gnn)


def read_published(path: Path, gnn: nn.Module | None = None) -> GHN:
    """Read a published `.pt` file; its configuration is the one in the file."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: expected a checkpoint of plain tensors, found a file that is damaged or that needs "
            f"code to be run to read it, which is refused ({_refused(error)}); save only state_dict and "
            "config with torch.save, or fetch the file again"
        ) from error
    except _TORCH_ERRORS as error:
        raise CheckpointError(
            f"{path}: expected a checkpoint written by torch.save, found a file that torch cannot read "
            f"({_first_line(error)}); it is damaged or something else, so fetch it again"
        ) from error
    missing = [key for key in ("state_dict", "config") if not isinstance(_get(found, key), dict)]
    if missing:
        keys = sorted(map(str, found)) if isinstance(found, dict) else type(found).__name__
        raise CheckpointError(
            f"{path}: expected a dictionary with state_dict and config, found {keys}; without its "
            "configuration a state dict cannot be read"
        )
    try:
        config = GHNConfig.from_published(found["config"])
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return build(config, found["state_dict"], str(path), gnn)


def build(config: GHNConfig, state: Mapping[str, Tensor], source: str, gnn: nn.Module | None = None) -> GHN:
    """A GHN with this configuration and these weights, in evaluation mode.

    `source` names the file in messages; `gnn` is a foreign graph network. The random state stays as it is.

    Raises:
        CheckpointError: Lists all tensors that are missing, unknown, of another shape, or not finite.
        ConfigError: A foreign graph network that is missing, or not wanted.
    """
    try:
        with torch.device("meta"):
            ghn = GHN(config, gnn=gnn)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error
    wanted = ghn.state_dict()
    problems = [f"{name} is missing" for name in wanted if name not in state]
    problems += [f"{name} is unknown" for name in state if name not in wanted]
    for name in sorted(wanted.keys() & state.keys()):
        found = state[name]
        if not isinstance(found, torch.Tensor) or _is_float(found) != _is_float(wanted[name]):
            problems.append(f"{name} is no tensor of {'floats' if _is_float(wanted[name]) else 'integers'}")
        elif found.shape != wanted[name].shape:
            problems.append(f"{name} is {tuple(found.shape)}, expected {tuple(wanted[name].shape)}")
        elif not found.sum().isfinite():
            problems.append(f"{name} has values that are not finite")
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise CheckpointError(
            f"{source}: not the weights of a GHN with its configuration: {'; '.join(problems[:8])}{more}; "
            f"use the configuration that they were trained with ({config})"
        )
    typed = {name: values.float() if _is_float(values) else values for name, values in state.items()}
    ghn.load_state_dict({name: values.contiguous() for name, values in typed.items()}, assign=True)
    return ghn.eval()


def _is_float(values: Tensor) -> bool:
    return values.is_floating_point()


def _find(weights: str | PathLike[str], gnn: nn.Module | None) -> GHN:
    """Tell the kinds of sources apart and read."""
    if isinstance(weights, str):
        if weights in bundled_names():
            return read_directory(_bundled_folder() / weights, gnn)
        if weights.startswith("hf://"):
            return _read_hub(weights, gnn)
    if not isinstance(weights, str | PathLike):
        raise CheckpointError(f"weights of type {type(weights).__name__}; expected a name, a path or a GHN")
    path = Path(weights)
    if path.is_dir():
        return read_directory(path, gnn)
    if not path.is_file():
        raise CheckpointError(
            f"{str(weights)!r}: no such weights; expected a bundled name "
            f"({', '.join(bundled_names()) or 'none in this installation'}), a directory, a .safetensors or "
            ".pt file, or hf://org/repo"
        )
    if path.suffix == ".safetensors":
        return read_safetensors(path, path.with_name(CONFIG_FILE), gnn)
    return read_published(path, gnn)


def _read_hub(address: str, gnn: nn.Module | None) -> GHN:
    match = _HUB.fullmatch(address)
    if match is None:
        raise CheckpointError(f"{address!r}: expected hf://org/repo or hf://org/repo@revision")
    from ghn_init._hub import read_hub

    return read_hub(match["repo"], match["revision"], gnn)


def _read_config(path: Path | Traversable) -> GHNConfig:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSON and UTF-8 errors
        raise CheckpointError(f"{path}: expected JSON, found {error}; the file is damaged") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(values).__name__}")
    try:
        return GHNConfig.from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _bundled_folder() -> Traversable:
    return resources.files("ghn_init") / "weights"


def _get(found: Any, key: str) -> Any:
    return found.get(key) if isinstance(found, dict) else None


def _refused(error: pickle.UnpicklingError) -> str:
    """What the safe unpickler objected to, without torch's advice to read the file unsafely."""
    return str(error).rpartition("WeightsUnpickler error: ")[2].strip().partition(" Please use")[0]


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
