"""Inputs of networks that follow transformers' conventions, known without importing it.

Such a network has a `config` with a `model_type` and takes arguments whose names say what they are:
`input_ids`, `pixel_values`, `input_features`. Their sizes are in the configuration, or in those inside it.
"""

from __future__ import annotations

import inspect
from itertools import product
from typing import TYPE_CHECKING, Any, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor, nn

    Shape = tuple[int, ...]

_TOKENS: Final = 16
"""Length of a text in tokens."""

_SAMPLES: Final = 16_000
"""Length of a sound in samples: one second."""

_FRAMES: Final = 64
"""Length of a spectrogram in frames."""

_SIDE: Final = 224
"""Side of an image in pixels where the configuration does not say."""


class Configuration:
    """A configuration and, behind it, those inside it: attributes of the first that has one.

    Args:
        config: transformers' `PretrainedConfig`, or anything like it.
    """

    def __init__(self, config: object) -> None:
        inner = [value for value in vars(config).values() if hasattr(value, "model_type")]
        self._configs = (config, *inner)

    def get(self, *names: str, default: Any = None) -> Any:
        """The first of `names` that a configuration has and that is not None."""
        for config in self._configs:
            for name in names:
                value = getattr(config, name, None)
                if value is not None:
                    return value
        return default


def arguments(model: nn.Module) -> Iterator[Mapping[str, Tensor]]:
    """Keyword arguments, on meta, that the network may take, the fullest first; none for other networks."""
    main, own = getattr(model, "main_input_name", None), getattr(model, "config", None)
    if not isinstance(main, str) or not hasattr(own, "model_type"):
        return
    config = Configuration(own)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    taken = inspect.signature(model.forward).parameters
    known = [name for name in taken if name in _SHAPES and _SHAPES[name](config)]
    required = [name for name in known if taken[name].default is inspect.Parameter.empty]
    tried = set()
    for names in (known, [main, *required], [main]):
        chosen = tuple(name for name in known if name in names)
        if not chosen or chosen in tried:
            continue
        tried.add(chosen)
        for shapes in product(*(_SHAPES[name](config) for name in chosen)):
            yield {name: _empty(name, shape, dtype) for name, shape in zip(chosen, shapes, strict=True)}


def _empty(name: str, shape: Shape, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=torch.long if name.endswith("_ids") else dtype, device="meta")


def _tokens(config: Configuration) -> list[Shape]:
    """(1, tokens). Where images take the place of tokens, as many as an image has parts."""
    queries = config.get("num_query_tokens")
    if config.get("image_token_id", "image_token_index") is None:
        return [(1, _TOKENS)]
    if queries is not None:
        return [(1, queries)]
    height, width = _sides(config)
    patch = _pair(config.get("patch_size", default=16))
    patches = (height // patch[0]) * (width // patch[1])
    return [(1, patches), (1, patches + 1)]


def _images(config: Configuration) -> list[Shape]:
    """(1, channels, height, width), or (1, frames, channels, height, width) for a video."""
    channels = config.get("num_channels", "in_channels", "in_chans", default=3)
    image = (channels, *_sides(config))
    frames = config.get("num_frames")
    return [(1, *image)] if frames is None else [(1, frames, *image), (1, *image)]


def _sides(config: Configuration) -> tuple[int, int]:
    size = config.get("image_size", default=_SIDE)
    if isinstance(size, dict):
        return (size["height"], size["width"]) if "height" in size else _pair(next(iter(size.values())))
    return _pair(size)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def _sound(config: Configuration) -> list[Shape]:
    """(1, samples), (1, channels, samples), or the spectrogram that goes by the same name."""
    channels, bins, length = (config.get(n) for n in ("audio_channels", "num_mel_bins", "max_length"))
    if bins is not None and length is not None:
        return [(1, length, bins)]
    return [(1, _SAMPLES)] if channels is None else [(1, channels, _SAMPLES)]


def _spectrogram(config: Configuration) -> list[Shape]:
    """(1, features, frames) with the frames that the positions allow, (1, frames, features), or an image."""
    features = config.get("feature_projection_input_dim", "input_feat_per_channel", "num_mel_bins")
    if features is None:
        return []
    positions = config.get("max_source_positions")
    whole = [] if positions is None else [(1, features, 2 * positions)]
    return [*whole, (1, _FRAMES, features), (1, 1, _FRAMES, features)]


def _regions(config: Configuration) -> list[Shape]:
    """(1, regions, features): what a detector found in an image."""
    features = config.get("visual_feat_dim", "visual_embedding_dim")
    return [] if features is None else [(1, _TOKENS, features)]


_SHAPES: Final[Mapping[str, Callable[[Configuration], list[Shape]]]] = {
    "input_ids": _tokens,
    "decoder_input_ids": lambda config: [(1, _TOKENS)] if config.get("is_encoder_decoder") else [],
    "pixel_values": _images,
    "input_values": _sound,
    "input_features": _spectrogram,
    "visual_feats": _regions,
    "visual_pos": lambda config: [
        (*shape[:2], config.get("visual_pos_dim", default=4)) for shape in _regions(config)
    ],
    "visual_embeds": _regions,
}
"""Name of an argument -> the shapes that it may have, the likeliest first."""
