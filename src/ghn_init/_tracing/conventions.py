"""Inputs of networks that follow transformers' conventions, known without importing it.

Such a network has a `config` with a `model_type` and takes arguments whose names say what they are:
`input_ids`, `pixel_values`, `input_features`. Their sizes are in the configuration, or in those inside it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from itertools import product
from typing import TYPE_CHECKING, Any, Final, TypeGuard

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

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

_MOST_ELEMENTS: Final = 1 << 31
"""Elements of an input that is believed: those of an image of 26,000 by 26,000 pixels."""


def said(owner: object, name: str) -> Any:
    """What an object or mapping says under a name; None where it says nothing, or where asking fails.

    A model's attributes are the user's code: a property may raise whatever it likes before the model is
    attached to something, say. That is no reason not to try other inputs.
    """
    try:
        return owner.get(name) if isinstance(owner, Mapping) else getattr(owner, name, None)
    except Exception:  # noqa: BLE001
        return None


def is_plausible(shape: tuple[object, ...]) -> TypeGuard[Shape]:
    """Whether an input may have this shape: whole numbers above 0, and not too many elements."""
    sizes = [size for size in shape if isinstance(size, int) and not isinstance(size, bool) and size > 0]
    return len(sizes) == len(shape) and math.prod(sizes) <= _MOST_ELEMENTS


def parameters_of_forward(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """What the forward pass takes; nothing of one that Python cannot look into."""
    try:
        return inspect.signature(model.forward).parameters
    except (TypeError, ValueError):
        return {}


class Configuration:
    """A configuration and, behind it, those inside it: attributes of the first that has one.

    Args:
        config: transformers' `PretrainedConfig`, or anything like it.
    """

    def __init__(self, config: object) -> None:
        own = said(config, "__dict__") or {}  # None of one with slots, inside which none is looked for
        inner = [value for value in own.values() if _is_configuration(value)]
        self._configs = (config, *inner)

    def get(self, *names: str, default: Any = None) -> Any:
        """The first of `names` that a configuration has and that is not None."""
        for config in self._configs:
            for name in names:
                value = said(config, name)
                if value is not None:
                    return value
        return default


def arguments(model: nn.Module) -> Iterator[Mapping[str, Tensor]]:
    """Keyword arguments, on meta, that the network may take, the fullest first; none for other networks."""
    main, own = said(model, "main_input_name"), said(model, "config")
    if not isinstance(main, str) or not _is_configuration(own):
        return
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    taken = parameters_of_forward(model)
    shapes_of = {name: _shapes(name, Configuration(own)) for name in taken if name in _SHAPES}
    known = [name for name, shapes in shapes_of.items() if shapes]
    required = [name for name in known if taken[name].default is inspect.Parameter.empty]
    tried = set()
    for names in (known, [main, *required], [main]):
        chosen = tuple(name for name in known if name in names)
        if not chosen or chosen in tried:
            continue
        tried.add(chosen)
        for shapes in product(*(shapes_of[name] for name in chosen)):
            yield {name: _empty(name, shape, dtype) for name, shape in zip(chosen, shapes, strict=True)}


def _is_configuration(value: object) -> bool:
    return not isinstance(value, Mapping) and said(value, "model_type") is not None


def _shapes(name: str, config: Configuration) -> list[Shape]:
    """The shapes that an argument may have as the configuration has it, without those that no input has."""
    try:
        shapes = _SHAPES[name](config)
    except Exception:  # noqa: BLE001 (values of any type stand where numbers are looked for)
        return []
    return [shape for shape in shapes if is_plausible(shape)]


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
