"""Finding, reading and writing the weights of a GHN.

Our own form is a directory of `model.safetensors` and `config.json`; published weights are `.pt` files.
Loading is strict and never runs code from a file: every tensor must be there, in its shape, finite, and as
it was saved where the file has a checksum. docs/checkpoints.md describes the forms.
"""

from __future__ import annotations

import json
import re
import textwrap
from importlib import resources
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch

from ghn_init._errors import CheckpointError, ConfigError
from ghn_init._files import reason, write_bytes
from ghn_init._hypernetwork.config import GHNConfig
from ghn_init._hypernetwork.model import GHN
from ghn_init._weights import published
from ghn_init._weights.files import CHECKSUM, checksum, read_json
from ghn_init._weights.files import read_safetensors as read_tensors

if TYPE_CHECKING:
    from collections.abc import Mapping
    from importlib.abc import Traversable

    from torch import Tensor, nn

DEFAULT_WEIGHTS: Final = "ghn2-cifar10"
"""The bundled weights that are used where none are named."""

WEIGHTS_FILE: Final = "model.safetensors"
CONFIG_FILE: Final = "config.json"

_HUB: Final = re.compile(
    r"hf://(?P<repo>[^/@]+/[^/@]+)"
    # The revision stands before the file, as in huggingface_hub's addresses, or at the end.
    r"(?:(?:@(?P<first>refs/pr/\d+|[^/@]+))?/(?P<file>(?:(?!\.\.?/)[^/@]+/)*[^/@]+\.pth?))?"
    r"(?(first)|(?:@(?P<last>.+))?)"
)
_FLOATS: Final = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_LONGEST_SHOWN: Final = 200
"""Characters of a place that an error repeats."""

_MOST_NAMED: Final = 8
"""Wrong tensors that an error names; it counts the others."""


def load(
    weights: str | PathLike[str] | GHN = DEFAULT_WEIGHTS,
    *,
    device: torch.device | str | None = None,
    gnn: nn.Module | None = None,
    config: GHNConfig | None = None,
) -> GHN:
    """Load a GHN, in evaluation mode.

    Args:
        weights: The name of bundled weights; a directory with `model.safetensors` and `config.json`, or
            the path of such a `model.safetensors`; a published `.pt` file of a GHN-1, GHN-2 or GHN-3;
            "hf://org/repo", for such a directory on the Hugging Face hub (or in its cache), or
            "hf://org/repo/FILE.pt" for a published file there, either with "@revision" at its end; or a
            GHN, which is returned.
        device: Where to put it; None: the CPU, and a given GHN stays where it is.
        gnn: The graph network of weights whose configuration names one that is not part of this package
            (`GHNConfig.hypernet`). It becomes part of the GHN and gets the weights.
        config: The configuration of a published file that has none. Without it all sizes are those of the
            tensors, and the GHN has virtual edges and normalises weights, unless it is a GHN-1.

    Raises:
        CheckpointError: Weights that are missing, damaged, not those of a GHN, or cannot be read.
        ConfigError: A configuration with an unknown key or an impossible value, or that names a graph
            network which is not given; or one that is given for weights that have their own.
    """
    if isinstance(weights, GHN) and gnn is not None:
        raise ConfigError("a GHN and a graph network; expected only one of them: the GHN has its own")
    if isinstance(weights, GHN) and config is not None:
        raise ConfigError("a GHN and a configuration; expected only one of them: the GHN has its own")
    try:
        ghn = weights if isinstance(weights, GHN) else _find(weights, gnn, config)
    except OSError as error:  # no permission, a name too long, a file that only looks like one
        raise CheckpointError(f"{str(weights)[:_LONGEST_SHOWN]}: cannot be read: {reason(error)}") from error
    return ghn if device is None else ghn.to(device)


def bundled_names() -> list[str]:
    """Names of the weights that come with the package."""
    folder = _bundled_folder()
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in folder.iterdir() if (entry / WEIGHTS_FILE).is_file())


def save(ghn: GHN, directory: str | PathLike[str]) -> None:
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


def read_directory(directory: Path | Traversable, gnn: nn.Module | None = None) -> GHN:
    """Read a directory that `save` wrote."""
    return read_safetensors(directory / WEIGHTS_FILE, directory / CONFIG_FILE, gnn)


def read_safetensors(
    weights: Path | Traversable, config: Path | Traversable, gnn: nn.Module | None = None
) -> GHN:
    """Read weights and the configuration that belongs to them."""
    for file in (weights, config):
        if not file.is_file():
            raise CheckpointError(
                f"{file}: no such file; expected {WEIGHTS_FILE} and {CONFIG_FILE} in one directory, "
                "as GHN.save_pretrained writes them"
            )
    settings = _config_of(config)
    ghn = _empty(settings, str(weights), gnn)
    numel = sum(values.numel() for values in ghn.state_dict().values())
    state, expected = read_tensors(weights, numel * torch.float64.itemsize)
    filled = _filled(ghn, state, str(weights))
    if expected is not None and (found := checksum(settings, state)) != expected:
        raise CheckpointError(
            f"{weights}: expected the checksum {expected}, found {found}; the file or the {CONFIG_FILE} "
            "beside it changed since they were saved, so fetch or save them again"
        )
    return filled


def read_published(path: Path, gnn: nn.Module | None = None, config: GHNConfig | None = None) -> GHN:
    """Read a published file; see `published.read` for its forms and for `config`."""
    found = published.read(path, config)
    return build(found.config, found.state, str(path), gnn)


def build(config: GHNConfig, state: Mapping[str, Tensor], source: str, gnn: nn.Module | None = None) -> GHN:
    """A GHN with this configuration and these weights, in evaluation mode.

    `source` names the file in messages; `gnn` is a foreign graph network. The random state stays as it is.

    Raises:
        CheckpointError: Lists all tensors that are missing, unknown, of another shape, or not finite.
        ConfigError: A foreign graph network that is missing, or not wanted.
    """
    return _filled(_empty(config, source, gnn), state, source)


def _empty(config: GHNConfig, source: str, gnn: nn.Module | None) -> GHN:
    """A GHN on the meta device, whose sizes may still be those of a lying configuration."""
    try:
        with torch.device("meta"):
            return GHN(config, gnn=gnn)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def _filled(ghn: GHN, state: Mapping[str, Tensor], source: str) -> GHN:
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


def _find(weights: str | PathLike[str], gnn: nn.Module | None, config: GHNConfig | None) -> GHN:
    """Tell the kinds of sources apart and read."""
    if not isinstance(weights, str | PathLike):
        raise CheckpointError(f"weights of type {type(weights).__name__}; expected a name, a path or a GHN")
    place: Path | Traversable = Path(weights)
    if isinstance(weights, str) and weights in bundled_names():
        place = _bundled_folder() / weights
    elif isinstance(weights, str) and weights.startswith("hf://"):
        place = _on_hub(weights)
    if isinstance(place, Path) and place.is_file() and place.suffix != ".safetensors":
        return read_published(place, gnn, config)
    if config is not None:
        raise ConfigError(f"{weights}: a configuration for weights that have their own; leave config out")
    if place.is_dir():
        return read_directory(place, gnn)
    if not isinstance(place, Path) or not place.is_file():
        raise CheckpointError(
            f"{str(weights)!r}: no such weights; expected a bundled name "
            f"({', '.join(bundled_names()) or 'none in this installation'}), a directory, a .safetensors or "
            ".pt file, or hf://org/repo"
        )
    return read_safetensors(place, place.with_name(CONFIG_FILE), gnn)


def _on_hub(address: str) -> Path:
    """The folder or file in the hub's cache that an address names, fetched if need be."""
    match = _HUB.fullmatch(address)
    if match is None:
        raise CheckpointError(
            f"{address!r}: expected hf://org/repo or hf://org/repo@revision, or a file there, "
            "hf://org/repo/FILE.pt or hf://org/repo/FILE.pt@revision"
        )
    from ghn_init._weights.hub import fetch

    return fetch(match["repo"], match["first"] or match["last"], match["file"])


def _config_of(file: Path | Traversable) -> GHNConfig:
    values = read_json(file)
    try:
        return GHNConfig.from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error


def _bundled_folder() -> Traversable:
    return resources.files("ghn_init") / "weights"
