"""Decoders: node features to parameter tensors (arXiv 2110.13100, section 3.2 and appendix B).

Only what is used is computed. The first layer makes the wanted corner of the K x K kernel, the last one
the wanted corner of the O x I channels; parameters with an equal corner go through together.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ghn_init._batch import KINDS
from ghn_init._gated import MLP

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ghn_init._batch import ParamGroup, ParamKey
    from ghn_init._config import GHNConfig

_WEIGHT, _CLASS_WEIGHT, _NORM, _BIAS, _CLASS_BIAS = range(len(KINDS))


class ConvDecoder(nn.Module):
    """Makes weights of two or more dimensions and the classifier's weight."""

    def __init__(self, config: GHNConfig) -> None:
        super().__init__()
        out, into, kernel, _ = config.max_shape
        width = 4 * config.hid
        self.max_shape = config.max_shape
        self.fc = nn.Sequential(nn.Linear(config.hid, width * kernel * kernel), nn.ReLU())
        self.conv = nn.Sequential(nn.Conv2d(width, 2 * width, 1), nn.ReLU(), nn.Conv2d(2 * width, out * into, 1))
        self.class_layer_predictor = nn.Sequential(nn.ReLU(), nn.Conv2d(out, config.num_classes, 1))

    def features(self, x: Tensor, kernel: tuple[int, ...]) -> Tensor:
        """Node features (n, d) to the hidden features (n, h, w, 8d) of every place of the kernel."""
        height, width = kernel
        layer, conv = self.fc[0], self.conv[0]
        side = self.max_shape[3]
        channels = layer.weight.shape[0] // side**2
        # Rows of the layer are (4d, K, K); take the corner, channels last.
        weight = layer.weight.view(channels, side, side, -1)[:, :height, :width].permute(1, 2, 0, 3)
        bias = layer.bias.view(channels, side, side)[:, :height, :width].permute(1, 2, 0)
        places = F.relu(F.linear(x, weight.flatten(0, 2), bias.flatten())).view(-1, channels)
        return F.relu(F.linear(places, conv.weight.flatten(1), conv.bias)).view(len(x), height, width, -1)

    def weights(self, hidden: Tensor, block: tuple[int, ...]) -> Tensor:
        """Hidden features (n, h, w, 8d) to the corner (o, i) = `block` of the weights, (n, h, w, o, i)."""
        conv = self.conv[2]
        most = self.max_shape[:2]
        weight, bias = conv.weight.view(*most, -1), conv.bias.view(most)
        if block != most:
            weight, bias = weight[: block[0], : block[1]], bias[: block[0], : block[1]]
        return F.linear(hidden, weight.flatten(0, 1), bias.flatten()).unflatten(-1, block)

    def class_weights(self, hidden: Tensor, block: tuple[int, ...]) -> Tensor:
        """Hidden features (n, 1, 1, 8d) to classifiers' weights (n, 1, 1, classes, in)."""
        conv = self.class_layer_predictor[1]
        decoded = F.relu(self.weights(hidden, (self.max_shape[0], block[1])))
        weight, bias = conv.weight.flatten(1)[: block[0]], conv.bias[: block[0]]
        return weight @ decoded + bias[:, None]


class Decoders(nn.Module):
    """Everything from node features to normalised blocks. A mixin: its parts are the GHN's own."""

    config: GHNConfig
    decoder: ConvDecoder
    decoder_1d: MLP
    bias_class: nn.Sequential

    def decode(self, x: Tensor, scales: Tensor | None, groups: Sequence[ParamGroup]) -> list[Tensor]:
        """The blocks of all groups, each (n, *block) with the layout of `tile_to`.

        Args:
            x: (P, d) features of the node of every parameter, in the order of the groups.
            scales: (P,) normalisation of the weights; None: leave weights and vectors as decoded.
            groups: What to decode.
        """
        split = next((group.start for group in groups if group.key.kind >= _NORM), len(x))
        matrices, vectors = x.split([split, len(x) - split])
        blocks = list(self._decode_weights(matrices, scales, [g for g in groups if g.key.kind < _NORM]))
        return blocks + list(
            self._decode_vectors(vectors, [g for g in groups if g.key.kind >= _NORM], scales is not None)
        )

    def _decode_weights(
        self, x: Tensor, scales: Tensor | None, groups: Sequence[ParamGroup]
    ) -> Iterator[Tensor]:
        by_kernel = _grouped(groups, lambda key: (key.kind, key.kernel))
        for part, alike in zip(_split(x, by_kernel), by_kernel, strict=True):
            hidden = self.decoder.features(part, alike[0].key.kernel)
            by_block = _grouped(alike, lambda key: key.block)
            for rows, same in zip(_split(hidden, by_block), by_block, strict=True):
                yield from self._decode_block(rows, scales, same)

    def _decode_block(
        self, hidden: Tensor, scales: Tensor | None, groups: Sequence[ParamGroup]
    ) -> Iterator[Tensor]:
        key = groups[0].key
        decoder = self.decoder
        make = decoder.class_weights if key.kind == _CLASS_WEIGHT else decoder.weights
        values = make(hidden, key.block)
        if scales is not None:
            values = values * scales[groups[0].start : groups[-1].stop, None, None, None, None]
        values = values.permute(0, 3, 4, 1, 2)
        for part, group in zip(_split(values, [[group] for group in groups]), groups, strict=True):
            yield arrange(part, group.key)

    def _decode_vectors(self, x: Tensor, groups: Sequence[ParamGroup], normalise: bool) -> Iterator[Tensor]:
        """Vectors: one row of the MLP's two for norm weights, the other for all biases."""
        by_kind = _grouped(groups, lambda key: key.kind)
        longest = max(self.config.max_shape[:2])
        first, last = self.decoder_1d.fc[0], self.decoder_1d.fc[2]
        hidden = F.relu(first(x))
        for rows, alike in zip(_split(hidden, by_kind), by_kind, strict=True):
            kind = alike[0].key.kind
            half = slice(0, longest) if kind == _NORM else slice(longest, 2 * longest)
            values = F.linear(rows, last.weight[half], last.bias[half])
            if kind == _CLASS_BIAS:
                values = self.bias_class(values)
            if normalise:
                values = 2 * torch.sigmoid(values / 2) if kind == _NORM else torch.tanh(values / 5)
            for part, group in zip(_split(values, [[group] for group in alike]), alike, strict=True):
                yield part[:, : group.key.block[0]]


def arrange(values: Tensor, key: ParamKey) -> Tensor:
    """Decoded (n, o, i, h, w) as blocks with the dimensions of the parameter, ready to be repeated."""
    dims = len(key.shape)
    if key.positional and dims < 4:
        return _position_block(values, key.shape)
    if dims == 2:
        return values[..., 0, 0]
    if dims == 3:
        return values[..., 0, :]
    return values if dims == 4 else values.unsqueeze(3)


def _position_block(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A positional encoding (n, 1, C, s', s') for T tokens as a block (n, 1, s*s, C) or (n, s*s, C).

    Tokens beyond the s x s grid come first (class and distillation tokens do), so the grid is aligned with
    the last tokens and the ones before it take its values cyclically.
    """
    tokens = shape[-2]
    side = math.isqrt(tokens)
    repeats = -(-side // values.shape[-1])
    grid = values.repeat(1, 1, 1, repeats, repeats)[..., :side, :side]
    block = grid.flatten(3).transpose(2, 3).roll(tokens - side * side, dims=2)
    return block if len(shape) == 3 else block[:, 0]


def _grouped(groups: Sequence[ParamGroup], key) -> list[list[ParamGroup]]:
    return [list(alike) for _, alike in itertools.groupby(groups, lambda group: key(group.key))]


def _split(x: Tensor, parts: Sequence[Sequence[ParamGroup]]) -> tuple[Tensor, ...]:
    """The rows of `x` that belong to each part."""
    return x.split([part[-1].stop - part[0].start for part in parts]) if parts else ()
