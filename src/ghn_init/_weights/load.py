"""`load`: finding and reading the weights of a GHN.

Our own form is a directory of `model.safetensors` and `config.json`; published weights are `.pt` files.
Loading is strict and never runs code from a file: every tensor must be there, in its shape, finite, and as
it was saved where the file has a checksum. docs/checkpoints.md describes the forms.
"""

from __future__ import annotations

import re
from importlib import resources
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ghn_init._errors import CheckpointError, ConfigError
from ghn_init._weights import DEFAULT_WEIGHTS, published
from ghn_init._weights.directory import CONFIG_FILE, WEIGHTS_FILE, build, read_directory, read_files
from ghn_init._weights.files import readable
from ghn_init._weights.ghn import GHN

if TYPE_CHECKING:
    from importlib.abc import Traversable

    import torch

    from ghn_init._hypernetwork.config import GHNConfig

_HUB: Final = re.compile(
    r"hf://(?P<repo>[^/@]+/[^/@]+)"
    # The revision stands before the file, as in huggingface_hub's addresses, or at the end.
    r"(?:(?:@(?P<first>refs/pr/\d+|[^/@]+))?/(?P<file>(?:(?!\.\.?/)[^/@]+/)*[^/@]+\.pth?))?"
    r"(?(first)|(?:@(?P<last>.+))?)"
)


def load(
    weights: str | PathLike[str] | GHN = DEFAULT_WEIGHTS,
    *,
    device: torch.device | str | None = None,
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
        config: The configuration of a published file that has none. Without it all sizes are those of the
            tensors, and the GHN has virtual edges and normalises weights, unless it is a GHN-1.

    Raises:
        CheckpointError: Weights that are missing, damaged, not those of a GHN, or cannot be read.
        ConfigError: A configuration with an unknown key or an impossible value, or one that is given for
            weights that have their own.
    """
    if isinstance(weights, GHN) and config is not None:
        raise ConfigError("a GHN and a configuration; expected only one of them: the GHN has its own")
    if isinstance(weights, GHN):
        ghn = weights
    else:
        with readable(weights):
            ghn = _find(weights, config)
    return ghn if device is None else ghn.to(device)


def bundled_names() -> list[str]:
    """Names of the weights that come with the package."""
    folder = _bundled_folder()
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in folder.iterdir() if (entry / WEIGHTS_FILE).is_file())


def read_published(path: Path, config: GHNConfig | None = None) -> GHN:
    """Read a published file; see `published.read` for its forms and for `config`."""
    found = published.read(path, config)
    return build(GHN, found.config, found.state, str(path))


def _find(weights: str | PathLike[str], config: GHNConfig | None) -> GHN:
    """Tell the sources apart and read."""
    if not isinstance(weights, str | PathLike):
        raise CheckpointError(f"weights of type {type(weights).__name__}; expected a name, a path or a GHN")
    if weights == "":  # which is the current folder for `Path`
        raise CheckpointError(f"weights='': the name is empty; {_expected()}")
    place: Path | Traversable = Path(weights)
    if isinstance(weights, str) and weights in bundled_names():
        place = _bundled_folder() / weights
    elif isinstance(weights, str) and weights.startswith("hf://"):
        place = _on_hub(weights)
    if isinstance(place, Path) and place.is_file() and place.suffix != ".safetensors":
        return read_published(place, config)
    if config is not None:
        raise ConfigError(f"{weights}: a configuration for weights that have their own; leave config out")
    if place.is_dir():
        return read_directory(GHN, place)
    if not isinstance(place, Path) or not place.is_file():
        raise CheckpointError(f"{str(weights)!r}: no such weights; {_expected()}")
    return read_files(GHN, place, place.with_name(CONFIG_FILE))


def _expected() -> str:
    bundled = ", ".join(bundled_names()) or "none in this installation"
    return f"expected a bundled name ({bundled}), a directory, a .safetensors or .pt file, or hf://org/repo"


def _on_hub(address: str) -> Path:
    """The folder or file in the hub's cache that an address names, fetched if need be."""
    match = _HUB.fullmatch(address)
    if match is None:
        raise CheckpointError(
            f"{address!r}: expected hf://org/repo or hf://org/repo@revision, or a file there, "
            "hf://org/repo/FILE.pt or hf://org/repo/FILE.pt@revision"
        )
    from ghn_init._weights.hub import fetch

    return fetch(match["repo"], match["file"], revision=match["first"] or match["last"])


def _bundled_folder() -> Traversable:
    return resources.files("ghn_init") / "weights"
