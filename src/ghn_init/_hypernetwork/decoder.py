"""Decoders: node features to parameter tensors (arXiv 2110.13100, section 3.2 and appendix B).

Only what is used is computed. The first layer makes the wanted part of the K x K kernel, the last one
the wanted corner of the O x I channels; parameters with an equal corner go through together.

The largest published decoder has 2.4 GB of weights and makes blocks as large as most parameters are. So
without gradients no large part of a weight is copied, and few parameters are made before they go on.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any, Final, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ghn_init._hypernetwork.batch import KINDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ghn_init._hypernetwork.batch import ParamGroup, ParamKey
    from ghn_init._hypernetwork.config import GHNConfig
    from ghn_init._hypernetwork.gated import MLP

_PART: Final = 1 << 24
"""Bytes of a weight that may be copied, and, without gradients, of values that are made at once."""

_Part = tuple[slice, slice]
"""Of a layer's outputs, along the first two of their dimensions."""

_WEIGHT, _CLASS_WEIGHT, _NORM, _BIAS, _CLASS_BIAS = range(len(KINDS))


class ConvDecoder(nn.Module):
    """Makes weights of two or more dimensions and the classifier's weight."""

    def __init__(self, config: GHNConfig) -> None:
        super().__init__()
        out, into, kernel, _ = config.max_shape
        width = 4 * config.hid
        self.max_shape = config.max_shape
        self.from_middle = config.transformer
        self.fc = nn.Sequential(nn.Linear(config.hid, width * kernel * kernel), nn.ReLU())
        self.conv = nn.Sequential(
            nn.Conv2d(width, 2 * width, 1), nn.ReLU(), nn.Conv2d(2 * width, out * into, 1)
        )
        self.class_layer_predictor = nn.Sequential(nn.ReLU(), nn.Conv2d(out, config.num_classes, 1))

    def forward(self, x: Tensor, groups: Sequence[ParamGroup]) -> Iterator[tuple[Tensor, list[ParamGroup]]]:
        """Node features (n, d) of sorted groups to (values, the groups that share them).

        Values are (m, h, w, o, i): the corner that these groups use of what the decoder makes.
        """
        hidden: list[Tensor] = []
        blocks: list[list[ParamGroup]] = []
        by_kernel = grouped(groups, lambda key: (key.kind, key.kernel))
        kernels = [alike[0].key.kernel for alike in by_kernel]
        for part, alike in zip(self.features(split_rows(x, by_kernel), kernels), by_kernel, strict=True):
            by_block = grouped(alike, lambda key: key.block)
            hidden += split_rows(part, by_block)
            blocks += by_block
        decoded = self._decoded(hidden, blocks) if torch.is_grad_enabled() else self._in_parts(hidden, blocks)
        for values, block in decoded:
            key = block[0].key
            yield self.class_weights(values, key.block[0]) if key.kind == _CLASS_WEIGHT else values, block

    def _decoded(
        self, hidden: Sequence[Tensor], blocks: Sequence[list[ParamGroup]]
    ) -> Iterator[tuple[Tensor, list[ParamGroup]]]:
        """The last layer, differentiably: hidden features (n, h, w, 8d) to (n, h, w, o, i), all at once."""
        corners = [self._corner(block[0].key) for block in blocks]
        decoded = _PartLinear.apply(_corner_linear, *self._last(), corners, *hidden)
        return zip(decoded, blocks, strict=True)  # pyright: ignore[reportArgumentType, reportReturnType]

    def _in_parts(
        self, hidden: Sequence[Tensor], blocks: Sequence[list[ParamGroup]]
    ) -> Iterator[tuple[Tensor, list[ParamGroup]]]:
        """What `_decoded` gives, without gradients and made when it is wanted, a few groups at a time."""
        weight, bias = self._last()
        for x, block in zip(hidden, blocks, strict=True):
            corner = self._corner(block[0].key)
            size = math.prod(part.stop for part in corner) * math.prod(x.shape[1:3]) * x.element_size()
            parts = _parts(block, max(1, _PART // size))
            for rows, part in zip(split_rows(x, parts), parts, strict=True):
                yield _corner_linear(rows, weight, bias, corner), part

    def _last(self) -> tuple[Tensor, Tensor]:
        """Weight (O, I, 8d) and bias (O, I) of the last layer."""
        layer, most = cast("nn.Conv2d", self.conv[2]), self.max_shape[:2]
        return layer.weight.view(*most, -1), _bias(layer).view(most)

    def features(self, inputs: Sequence[Tensor], kernels: Sequence[tuple[int, ...]]) -> Iterator[Tensor]:
        """Node features (n, d) to the hidden features (n, h, w, 8d) of every place of the kernel, of each."""
        layer, conv = cast("nn.Linear", self.fc[0]), cast("nn.Conv2d", self.conv[0])
        side = self.max_shape[3]
        channels = layer.weight.shape[0] // side**2
        # Rows of the layer are (4d, K, K); channels go last.
        weight = layer.weight.view(channels, side, side, -1).permute(1, 2, 0, 3)
        bias = layer.bias.view(channels, side, side).permute(1, 2, 0)
        parts = [(self._span(height), self._span(width)) for height, width in kernels]
        if torch.is_grad_enabled():
            every = _PartLinear.apply(_places_linear, weight, bias, parts, *inputs)
        else:
            every = (_places_linear(x, weight, bias, part) for x, part in zip(inputs, parts, strict=True))
        for places in every:
            hidden = F.linear(F.relu(places).view(-1, channels), conv.weight.flatten(1), conv.bias)
            yield F.relu(hidden).view(*places.shape[:3], -1)

    def _span(self, size: int) -> slice:
        """The places of a kernel's axis that make `size` of it: the first, or in GHN-3 the middle ones."""
        middle = self.max_shape[3] // 2
        return (
            slice(max(0, middle - size // 2), middle + (size + 1) // 2) if self.from_middle else slice(size)
        )

    def class_weights(self, decoded: Tensor, classes: int) -> Tensor:
        """Decoded (n, 1, 1, O, i) to the first rows of classifiers' weights, (n, 1, 1, classes, i)."""
        conv = cast("nn.Conv2d", self.class_layer_predictor[1])
        # Classes are the columns of a plain product: a few rows are added up in an order that depends on the
        # number of threads (on AMD processors), and `matmul` of more axes goes by `requires_grad`, too.
        read = F.relu(decoded).mT
        rows = F.linear(
            read.reshape(-1, read.shape[-1]), conv.weight.flatten(1)[:classes], _bias(conv)[:classes]
        )
        return rows.view(*read.shape[:-1], classes).mT

    def _corner(self, key: ParamKey) -> _Part:
        """The corner of (O, I) to decode: a classifier's layer reads all output channels."""
        outputs, inputs = key.block
        return slice(self.max_shape[0] if key.kind == _CLASS_WEIGHT else outputs), slice(inputs)


class _PartLinear(torch.autograd.Function):
    """A linear layer with outputs of several dimensions, of which each input gets a part of its own.

    In one function, so that the gradients of all parts add up in place in one tensor: autograd would
    make a weight of zeros around each.
    """

    @staticmethod
    def forward(
        ctx: Any,
        linear: Callable[[Tensor, Tensor, Tensor, _Part], Tensor],
        weight: Tensor,
        bias: Tensor,
        parts: Sequence[_Part],
        *inputs: Tensor,
    ) -> tuple[Tensor, ...]:
        """Weight (*outputs, e), bias (*outputs), inputs (..., e) to (..., *part), by `linear`."""
        ctx.parts = parts
        ctx.save_for_backward(weight, *inputs)
        return tuple(linear(x, weight, bias, part) for x, part in zip(inputs, parts, strict=True))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, *inputs = ctx.saved_tensors
        dweight, dbias = torch.zeros_like(weight), weight.new_zeros(weight.shape[:-1])
        dinputs = []
        for x, part, grad in zip(inputs, ctx.parts, grads, strict=True):
            used = weight[part]
            rows, outputs = x.flatten(0, -2), grad.reshape(-1, used.shape[:-1].numel())
            dinputs.append((outputs @ used.flatten(0, -2)).view_as(x))
            dweight[part] += (outputs.T @ rows).view(used.shape)
            dbias[part] += outputs.sum(0).view(used.shape[:-1])
        return None, dweight, dbias, None, *dinputs


def _places_linear(x: Tensor, weight: Tensor, bias: Tensor, part: _Part) -> Tensor:
    """Inputs (n, d) to the outputs (n, h, w, C) at some places of the kernel of weight (K, K, C, d)."""
    weight, bias = weight[part], bias[part]
    if weight.numel() * weight.element_size() <= _PART:
        return F.linear(x, weight.flatten(0, 2), bias.flatten()).view(len(x), *bias.shape)
    every = itertools.product(*map(range, bias.shape[:2]))  # place by place, which copies nothing
    places = [F.linear(x, weight[place], bias[place]) for place in every]
    return torch.stack(places, 1).view(len(x), *bias.shape)


def _corner_linear(x: Tensor, weight: Tensor, bias: Tensor, corner: _Part) -> Tensor:
    """Inputs (..., e) to the corner (..., o, i) of the outputs of a layer with weight (O, I, e)."""
    o, i = (part.stop for part in corner)
    large = o * i * weight.shape[2] * weight.element_size() > _PART
    if not large or (i == weight.shape[1] and x.numel() == x.shape[-1]):
        return F.linear(x, weight[:o, :i].flatten(0, 1), bias[:o, :i].flatten()).unflatten(-1, (o, i))
    # The corner is not contiguous. One product for each output channel reads it where it is, without a copy.
    columns = x.flatten(0, -2).T.expand(o, -1, -1)
    values = torch.bmm(weight[:o, :i], columns).add_(bias[:o, :i, None])
    return values.permute(2, 0, 1).unflatten(0, x.shape[:-1])


class Decoders(nn.Module):
    """Everything from node features to normalised blocks. A mixin: its parts are the GHN's own."""

    config: GHNConfig
    decoder: ConvDecoder
    decoder_1d: MLP
    bias_class: nn.Sequential

    def decode(self, x: Tensor, scales: Tensor | None, groups: Sequence[ParamGroup]) -> Iterator[Tensor]:
        """The blocks of all groups in their order, each (n, *block) with the layout of `tile_to`.

        Args:
            x: (P, d) features of the node of every parameter, in the order of the groups.
            scales: (P,) normalisation of the weights; None: leave weights and vectors as decoded.
            groups: What to decode.
        """
        weights = [group for group in groups if group.key.kind < _NORM]
        vectors = list(groups[len(weights) :])
        split = vectors[0].start if vectors else len(x)
        x_weights, x_vectors = x.split([split, len(x) - split])
        if weights:
            yield from self._decode_weights(x_weights, scales, weights)
        yield from self._decode_vectors(x_vectors, vectors, normalise=scales is not None)

    def _decode_weights(
        self, x: Tensor, scales: Tensor | None, groups: Sequence[ParamGroup]
    ) -> Iterator[Tensor]:
        for values, alike in self.decoder(x, groups):
            if scales is not None:
                factors = scales[alike[0].start : alike[-1].stop, None, None, None, None]
                values = values * factors if torch.is_grad_enabled() else values.mul_(factors)
            values = values.permute(0, 3, 4, 1, 2)
            for part, group in zip(split_rows(values, [[group] for group in alike]), alike, strict=True):
                yield arrange(part, group.key)

    def _decode_vectors(
        self, x: Tensor, groups: Sequence[ParamGroup], *, normalise: bool
    ) -> Iterator[Tensor]:
        """Vectors: one row of the MLP's two for norm weights, the other for all biases."""
        by_kind = grouped(groups, lambda key: key.kind)
        longest = max(self.config.max_shape[:2])
        first, last = self.decoder_1d.linear(0), self.decoder_1d.linear(1)
        hidden = F.relu(first(x))
        for rows, alike in zip(split_rows(hidden, by_kind), by_kind, strict=True):
            kind = alike[0].key.kind
            half = slice(0, longest) if kind == _NORM else slice(longest, 2 * longest)
            values = F.linear(rows, last.weight[half], last.bias[half])
            if kind == _CLASS_BIAS:
                values = self.bias_class(values)
            if normalise:
                values = 2 * torch.sigmoid(values / 2) if kind == _NORM else torch.tanh(values / 5)
            for part, group in zip(split_rows(values, [[group] for group in alike]), alike, strict=True):
                yield part[:, : group.key.block[0]]


def _bias(layer: nn.Conv2d) -> Tensor:
    """The bias of a layer that has one."""
    return cast("Tensor", layer.bias)


def arrange(values: Tensor, key: ParamKey) -> Tensor:
    """Decoded (n, o, i, h, w) as blocks with the dimensions of the parameter, ready to be repeated."""
    dims = len(key.shape)
    if key.resized != key.kernel:
        values = F.interpolate(values.flatten(1, 2), key.resized, mode="bilinear").unflatten(
            1, values.shape[1:3]
        )
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


def grouped(groups: Sequence[ParamGroup], key: Callable[[ParamKey], Any]) -> list[list[ParamGroup]]:
    """Runs of sorted groups that agree in `key`."""
    return [list(alike) for _, alike in itertools.groupby(groups, lambda group: key(group.key))]


def _parts(groups: Sequence[ParamGroup], most: int) -> list[list[ParamGroup]]:
    """Runs of groups with at most so many parameters in all, but one group at least."""
    parts: list[list[ParamGroup]] = []
    for group in groups:
        if parts and group.stop - parts[-1][0].start <= most:
            parts[-1].append(group)
        else:
            parts.append([group])
    return parts


def split_rows(x: Tensor, parts: Sequence[Sequence[ParamGroup]]) -> tuple[Tensor, ...]:
    """The rows of `x` that belong to each part."""
    return x.split([part[-1].stop - part[0].start for part in parts]) if parts else ()
