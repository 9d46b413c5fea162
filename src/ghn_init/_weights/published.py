"""Files as the published implementations write them: which model one holds, and of what sizes.

The first form is a dictionary with `state_dict` and `config`; the other, that of GHN-3's files on the hub, is
a state dict alone. The names of the tensors tell which model it is, because `config` does not always say:
that of a GHN-3 calls its graph network "gatedgnn". Without a configuration the sizes are those of the
tensors.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

from ghn_init._errors import CheckpointError, ConfigError, shown, shown_names
from ghn_init._hypernetwork.config import GHNConfig
from ghn_init._weights.files import read_pickled

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

_LAYER: Final = re.compile(r"gnn\.\d+\.ln1\.weight")
_TRANSFORMER: Final = "gnn.0.attn.to_qkv.weight"
_HEADS: Final = "gnn.0.attn.proj_e.2.weight"
_MLP: Final = "gnn.fc.0.weight"
_GATED: Final = "gnn.gru.weight_ih"

_WITHIN_LAYER: Final = re.compile(
    r"gnn\.0\.(?=(centrality_embed_in|centrality_embed_out|input_dist_embed)\.)"
)
"""What training checkpoints put before the names of three tables that the hub's files have without it."""

_LINEAR: Final = ("decoder.conv.0.weight", "decoder.conv.2.weight", "decoder.class_layer_predictor.1.weight")
"""1 x 1 convolutions that newer files have as linear layers: weights of two dimensions in place of four."""


class Published(NamedTuple):
    """What a file holds: the configuration, and the tensors under our names and in our shapes."""

    config: GHNConfig
    state: dict[str, Tensor]


def read(path: Path, config: GHNConfig | None = None) -> Published:
    """Read a published file; `config` is for one without a configuration.

    Raises:
        CheckpointError: The file is damaged, something else, or would run code.
        ConfigError: A configuration with unknown keys or impossible values, or one that is given although the
            file has its own.
    """
    found = read_pickled(path)
    state, told = _parts(found, path)
    _check_memory(state, path)
    try:
        if told is None:
            settings = config or inferred(state)
        elif config is not None:
            raise ConfigError("a configuration for a file that has its own; leave config out")
        else:
            settings = GHNConfig.from_published(told, transformer=_TRANSFORMER in state)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return Published(settings, {_renamed(name): _reshaped(name, values) for name, values in state.items()})


def inferred(state: Mapping[str, Tensor]) -> GHNConfig:
    """The configuration that follows from the names and shapes of a state dict, but for two fields.

    No tensor tells whether predicted weights are normalised, and none of a transformer whether it sees
    virtual edges. All published models do both but GHN-1, which does neither and lacks an MLP for them.

    Raises:
        CheckpointError: Not the tensors of a GHN.
        ConfigError: Sizes that no GHN has.
    """
    hid = _shape(state, "embed.weight")[1]
    num_classes, out = _shape(state, "decoder.class_layer_predictor.1.weight")[:2]
    into = _shape(state, "decoder.conv.2.weight")[0] // max(out, 1)
    side = math.isqrt(_shape(state, "decoder.fc.0.weight")[0] // max(4 * hid, 1))
    hypernet = "transformer" if _TRANSFORMER in state else "mlp" if _MLP in state else "gatedgnn"
    if hypernet == "gatedgnn" and _GATED not in state:
        raise CheckpointError(
            f"expected the tensors of a GHN, found neither {_GATED} (GHN-2, GHN-1), {_TRANSFORMER} (GHN-3) "
            f"nor {_MLP} (MLP)"
        )
    virtual = hypernet != "gatedgnn" or "gnn.mlp_ve.fc.0.weight" in state
    values: dict[str, Any] = {
        "max_shape": (out, into, side, side), "num_classes": num_classes, "hypernet": hypernet,
        "weight_norm": virtual, "ve": virtual, "layernorm": "ln.weight" in state, "hid": hid,
    }  # fmt: skip
    if hypernet == "transformer":
        layers = sum(_LAYER.fullmatch(name) is not None for name in state)
        values |= {"layers": layers, "heads": _shape(state, _HEADS)[0]}
    return GHNConfig.from_dict(values)


def _parts(found: Any, path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The state dict of a file, and its configuration if it has one."""
    state, told = found, None
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        state, told = found["state_dict"], found.get("config")
    named = isinstance(state, dict) and any(isinstance(values, torch.Tensor) for values in state.values())
    if not named or not isinstance(told, dict | None):
        keys = shown_names(found)[:8] if isinstance(found, dict) else type(found).__name__
        raise CheckpointError(
            f"{path}: expected a dictionary with state_dict and config, or a state dict, found {keys}"
        )
    return {name if isinstance(name, str) else shown(name): values for name, values in state.items()}, told


def _check_memory(state: Mapping[str, Tensor], path: Path) -> None:
    """Refuse tensors that share values so that they would take more memory than the file is long."""
    tensors = [values for values in state.values() if isinstance(values, torch.Tensor)]
    claimed, size = sum(values.numel() * values.element_size() for values in tensors), path.stat().st_size
    if claimed > size:
        raise CheckpointError(
            f"{path}: expected tensors of at most {size:,} bytes, the length of the file, found {claimed:,}"
        )


def _shape(state: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    """The shape of a tensor that has two dimensions or more."""
    values = state.get(name)
    shape = tuple(values.shape) if isinstance(values, torch.Tensor) else ()
    if len(shape) < 2:
        raise CheckpointError(
            f"expected a configuration or the tensors of a GHN, found no tensor {name} of two dimensions"
        )
    return shape


def _renamed(name: str) -> str:
    return _WITHIN_LAYER.sub("", name)


def _reshaped(name: str, values: Tensor) -> Tensor:
    linear = name in _LINEAR and isinstance(values, torch.Tensor) and values.ndim == 2
    return values[..., None, None] if linear else values
