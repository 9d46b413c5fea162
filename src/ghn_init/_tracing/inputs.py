"""Finding an example input: what a network says of itself, else its first layer and usual sizes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeGuard

import torch
from torch import Tensor, nn

from ghn_init._errors import TraceError, first_line
from ghn_init._tracing.conventions import arguments, is_plausible, parameters_of_forward, said

_SIZES: Final = {
    1: tuple((length,) for length in (1024, 128, 16000, 16)),
    2: tuple((side, side) for side in (224, 32, 299, 64, 28, 256, 384, 16, 512, 128, 96, 112, 331, 448)),
    3: tuple((frames, side, side) for frames, side in ((16, 112), (16, 224), (32, 32), (8, 64))),
}
"""Sizes of signals in samples, of images in pixels, of videos in frames and pixels: the most usual first."""

_CONVOLUTIONS: Final = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip

_IMAGES: Final = tuple(
    (1, channels, side, side)
    for channels, sides in ((3, (224, 32, 64, 112)), (1, (28, 32, 224)))
    for side in sides
)
"""Tried last: a network may make more channels of its images before its first layer (of coordinates, patches
or neighbouring pixels), or begin with layers of its own."""

_TOKENS: Final = 16
"""Length of a guessed sequence."""

_LENGTHS: Final = 1024
"""Integers up to which an example keeps its values."""

_FIRST_LAYER: Final = "first layer"
"""Origin of usual sizes that the first layer takes."""

_FIRST_PARAMETER: Final = "first parameter"
"""Origin of usual sizes that a function of the model's own first parameter takes."""

_USUAL: Final = "usual images"
"""Origin of sizes that nothing in the model speaks for."""

_POSITIONAL: Final = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)

_LIST_OF_TENSORS: Final = re.compile(r"(?i)\b(list|sequence)\[[\w.]*tensor\]")


@dataclass(frozen=True)
class ExampleInput:
    """Arguments of one call of the network, on meta.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
        described: Their shapes, for messages.
        origin: Where the shapes are from.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    described: str = ""
    origin: str = "given"


def given_input(example_input: object) -> ExampleInput:
    """The user's example: a tensor, a shape, a tuple of arguments or a dict of keyword arguments.

    Raises:
        TraceError: It is none of these, or has a shape that no tensor has.
    """
    if isinstance(example_input, Tensor):
        return ExampleInput((_on_meta(example_input),), {}, str(tuple(example_input.shape)))
    if isinstance(example_input, Mapping):
        named = _named_arguments(example_input)
        return ExampleInput((), named, ", ".join(f"{name} {_shown(named[name])}" for name in named))
    if _is_shape(example_input):
        return _of_shape(example_input)
    if isinstance(example_input, (tuple, list)):
        given = tuple(_argument(value) for value in example_input)
        return ExampleInput(given, {}, ", ".join(map(_shown, given)))
    raise TraceError(
        "example_input must be a tensor, a shape such as (1, 3, 224, 224), a tuple of positional "
        f"arguments or a dict of keyword arguments; found {type(example_input).__name__}"
    )


def _is_shape(value: object) -> TypeGuard[Sequence[int]]:
    return isinstance(value, (tuple, list)) and bool(value) and all(type(size) is int for size in value)


def _named_arguments(named: Mapping[Any, object]) -> dict[str, object]:
    """Keyword arguments as the network is called with them."""
    if alien := [key for key in named if not isinstance(key, str)]:
        raise TraceError(
            f"example_input is a dict of keyword arguments: expected their names, found {alien[0]!r:.80} "
            f"({type(alien[0]).__name__}); give a tuple for positional arguments, or for one that is a "
            "dict, a tuple of that dict alone"
        )
    return {key: _argument(value) for key, value in named.items()}


def _argument(value: object) -> object:
    """An argument of the user's with its tensors on meta; a shape becomes a tensor."""
    if isinstance(value, Tensor):
        return _on_meta(value)
    if isinstance(value, tuple) and _is_shape(value):
        return _meta(value)
    if isinstance(value, tuple):
        return tuple(_argument(item) for item in value)
    if isinstance(value, list):
        return [_argument(item) for item in value]
    if isinstance(value, dict):
        return {key: _argument(item) for key, item in value.items()}
    return value


def _shown(value: object) -> str:
    """An argument in messages: the shape of a tensor, else the type."""
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def _on_meta(tensor: Tensor) -> Tensor:
    """Its shape and dtype; of integers in one dimension on the CPU, such as lengths, the values too."""
    if tensor.is_nested:
        raise TraceError(
            "example_input has a nested tensor, whose parts differ in shape; give a padded tensor, or its "
            "shape"
        )
    is_integer = not (tensor.is_floating_point() or tensor.is_complex()) and tensor.dtype != torch.bool
    if is_integer and tensor.ndim <= 1 and tensor.device.type == "cpu" and tensor.numel() <= _LENGTHS:
        return tensor.detach().clone()
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _meta(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of a shape that the user or the model gives."""
    try:
        return torch.empty(tuple(shape), dtype=dtype, device="meta")
    except (RuntimeError, TypeError) as error:  # a size below 0, or more elements than torch can count
        raise TraceError(f"there is no input of shape {tuple(shape)}: {first_line(error)}") from error


def _of_shape(
    shape: Sequence[int], dtype: torch.dtype = torch.float32, origin: str = "given"
) -> ExampleInput:
    return ExampleInput((_meta(shape, dtype),), {}, str(tuple(shape)), origin)


def candidate_inputs(model: nn.Module) -> Iterator[ExampleInput]:
    """Inputs that the network may take, the likeliest first."""
    for named in arguments(model):
        described = ", ".join(f"{name} {tuple(value.shape)}" for name, value in named.items())
        yield ExampleInput((), named, described, "config, by names of arguments")
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    seen: set[tuple[int, ...]] = set()
    count, listed = _images_wanted(model)
    named = _named_alone(model)
    usual = [(_FIRST_LAYER, shape) for shape in _shapes_of_first_layer(model)]
    bare = [(_FIRST_PARAMETER, shape) for shape in _shapes_of_first_parameter(model)]
    last = [(_USUAL, shape) for shape in _IMAGES]
    for origin, shape in (*_declared_shapes(model), *usual, *bare, *last):
        if shape not in seen:
            seen.add(shape)
            one = _of_shape(shape, dtype, origin)
            yield _by_name(one, named) if named else _images(one, count, listed)
    if isinstance(_first_layer(model), nn.Embedding):
        yield _of_shape((1, _TOKENS), torch.long, _FIRST_LAYER)


def _images_wanted(model: nn.Module) -> tuple[int, bool]:
    """How many images the forward pass has to get, and whether it says that it takes a list of images.

    A forward pass with two arguments that have no default, as of optical flow, gets the same image twice.
    """
    parameters = parameters_of_forward(model).values()
    required = [p for p in parameters if p.default is p.empty and p.kind in _POSITIONAL]
    listed = bool(required) and _LIST_OF_TENSORS.search(str(required[0].annotation)) is not None
    return max(len(required), 1), listed


def _named_alone(model: nn.Module) -> list[str]:
    """The arguments that the forward pass takes by their names, if it takes none by its place."""
    parameters = parameters_of_forward(model).values()
    if any(p.kind in (*_POSITIONAL, p.VAR_POSITIONAL) for p in parameters):
        return []
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]


def _by_name(one: ExampleInput, names: Sequence[str]) -> ExampleInput:
    """The same for each of these arguments."""
    named = dict.fromkeys(names, one.args[0])
    described = ", ".join(f"{name} {one.described}" for name in names)
    return ExampleInput((), named, described, f"{one.origin}, by name")


def _images(one: ExampleInput, count: int, listed: bool) -> ExampleInput:
    """`count` arguments like that of `one`; as a list of single images if `listed`."""
    if listed:
        single = _of_shape(one.args[0].shape[1:], one.args[0].dtype)
        return ExampleInput((list(single.args),), {}, f"[{single.described}]", f"{one.origin}, a list")
    if count == 1:
        return one
    return ExampleInput(one.args * count, {}, f"{count} x {one.described}", f"{one.origin}, {count} times")


def _declared_shapes(model: nn.Module) -> Iterator[tuple[str, tuple[int, ...]]]:
    """What the model's attributes say, and which: timm's default_cfg, image_size, a config.

    What they say need not be meant as it is understood here, so shapes that no input has are left out.
    """
    for origin, sizes in _declared_sizes(model):
        shape = (1, *sizes) if isinstance(sizes, (tuple, list)) else ()
        if shape and is_plausible(shape):
            yield origin, shape


def _declared_sizes(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(channels, height, width) as the model's attributes have them, whatever these hold, and which."""
    for attribute in ("pretrained_cfg", "default_cfg"):
        yield "default_cfg", said(said(model, attribute), "input_size")
    config = said(model, "config")
    channels = said(config, "num_channels")
    if not is_plausible((channels,)):
        channels = _channels(model)
    for origin, owner in (("image_size", model), ("config", config)):
        for side in (said(owner, "image_size"), said(owner, "img_size")):
            if isinstance(side, int):
                yield origin, (channels, side, side)
            elif isinstance(side, (tuple, list)) and len(side) == 2:
                yield origin, (channels, *side)


def _channels(model: nn.Module) -> int:
    layer = _first_layer(model)
    return layer.in_channels if isinstance(layer, nn.Conv2d) else 3


def _first_layer(model: nn.Module) -> nn.Module | None:
    layers = (*_CONVOLUTIONS, nn.Linear, nn.Embedding, nn.RNNBase)
    return next((m for m in model.modules() if isinstance(m, layers)), None)


def _shapes_of_first_layer(model: nn.Module) -> Iterator[tuple[int, ...]]:
    layer = _first_layer(model)
    if isinstance(layer, _CONVOLUTIONS):
        yield from ((1, layer.in_channels, *sizes) for sizes in _SIZES[len(layer.kernel_size)])
    elif isinstance(layer, nn.Linear):
        yield (1, layer.in_features)
        yield (1, _TOKENS, layer.in_features)
        yield from _flattened_images(layer.in_features)
    elif isinstance(layer, nn.RNNBase):
        yield (1, _TOKENS, layer.input_size)
    else:
        yield (1, 3, 224, 224)


def _shapes_of_first_parameter(model: nn.Module) -> Iterator[tuple[int, ...]]:
    """What a function takes that the first weight is an argument of, `F.conv2d(x, self.weight)`, say."""
    shapes = (param.shape for param in model.parameters(recurse=False))
    shape = next((shape for shape in shapes if len(shape) > 1 and shape[0] > 1), torch.Size())
    if len(shape) == 2:  # (out, in), or (in, out) of a product
        yield from ((1, shape[1]), (1, shape[0]), (1, _TOKENS, shape[1]), (1, _TOKENS, shape[0]))
    elif len(shape) - 2 in _SIZES:
        yield from ((1, shape[1], *sizes) for sizes in _SIZES[len(shape) - 2])


def _flattened_images(features: int) -> Iterator[tuple[int, ...]]:
    """Images that flatten to so many features: MLPs on MNIST or CIFAR-10 flatten them themselves."""
    for channels in (1, 3):
        side = round((features / channels) ** 0.5)
        if side > 1 and channels * side * side == features:
            yield (1, channels, side, side)
