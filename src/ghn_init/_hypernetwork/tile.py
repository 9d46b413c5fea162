"""Tiling: a small predicted block repeated along every axis and cut to the size of a parameter.

Everything here is plain periodic extension, `full[i, j, ...] = values[i % a, j % b, ...]`, because the
decoder arranges its blocks so (arXiv 2110.13100, section 4.2 repeats channels in the same way).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ghn_init._hypernetwork.channels import axis_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Prior:
    """What is added to decoded blocks, and how large they have to be for the sum to be periodic.

    Attributes:
        sizes: Sizes that a block is repeated to before this is added.
        place: Where in the kernel it is added, an index for each of the last dimensions.
        values: What is added there, for all channels.
        factor: It is added so many times.
    """

    sizes: tuple[int, ...]
    place: tuple[slice | int, ...]
    values: Tensor
    factor: float = 1.0

    def stays_apart(self, blocks: Tensor) -> bool:
        """Whether the sum with blocks (n, *block) is larger than they are, in channels alone."""
        return self.sizes[:2] != blocks.shape[1:3] and self.sizes[2:] == blocks.shape[3:]

    def added_to(self, blocks: Tensor) -> Tensor:
        """Blocks (n, *block) repeated to (n, *sizes) and this added; differentiable.

        Without gradients it is added in place to blocks that have these sizes.
        """
        full = blocks if tuple(blocks.shape[1:]) == self.sizes else tile_to(blocks, self.sizes)
        values = self.values.to(full.device, full.dtype)
        if torch.is_grad_enabled():
            return _Added.apply(full, (..., *self.place), values * self.factor)  # pyright: ignore[reportReturnType]
        full[(..., *self.place)].add_(values, alpha=self.factor)
        return full

    def where_added(self, block: Tensor) -> Tensor:
        """What stands at `place` once this is added to a block that it stays apart from."""
        part = tile_to(block[(..., *self.place)].unsqueeze(0), self.values.shape)[0]
        return part.add(self.values.to(part.device, part.dtype), alpha=self.factor)


class _Added(torch.autograd.Function):
    """A constant added to a part of a tensor, in one copy of it; its gradient passes."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, place: tuple[Any, ...], constant: Tensor) -> Tensor:  # noqa: ARG004
        full = values.clone(memory_format=torch.contiguous_format)
        full[place] += constant
        return full

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ARG004
        return grads[0], None, None


@dataclass(frozen=True, slots=True)
class Tile:
    """A predicted parameter as its smallest repeating block.

    Attributes:
        block: The block, already normalised; as many dimensions as `shape`.
        shape: The parameter's shape with the output channels first.
        stored: The parameter's own shape.
        transposed: The parameter is stored as (in, out, ...).
        prior: What is still to be added, where the sum has more channels than the block.
        stretches: Lengths of the parts of the axis of what is read (`channels.axis_of`) in each of which the
            block begins anew; () if it is one.
    """

    block: Tensor
    shape: tuple[int, ...]
    stored: tuple[int, ...]
    transposed: bool = False
    prior: Prior | None = None
    stretches: tuple[int, ...] = ()

    @property
    def values(self) -> Tensor:
        """What repeats: the block and its prior, where there is one as long as the parameter.

        An axis of several stretches is whole.
        """
        values = self.block if self.prior is None else self.prior.added_to(self.block.unsqueeze(0))[0]
        if not self.stretches:
            return values
        axis = axis_of(self.shape)
        sizes = (*values.shape[:axis], self.shape[axis], *values.shape[axis + 1 :])
        return tile_to(values.unsqueeze(0), sizes, self.stretches)[0]

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes of what repeats, or begins anew in every stretch."""
        return tuple(self.block.shape) if self.prior is None else self.prior.sizes

    @property
    def tiled(self) -> bool:
        """The parameter is larger than what therefore repeats."""
        return self.sizes != self.shape

    def scaled(self, factor: float) -> Tile:
        """The same, multiplied."""
        prior = self.prior and replace(self.prior, factor=factor * self.prior.factor)
        return replace(self, block=self.block * factor, prior=prior)

    def first(self, rows: int) -> Tensor:
        """At most so many of the first rows, of as many columns as `sizes` has."""
        if self.stretches and axis_of(self.shape) == 0:
            return self.values[:rows]
        if self.prior is None:
            return self.block[:rows]
        values = self.prior.values[:rows]
        few = replace(self.prior, sizes=(len(values), *self.prior.sizes[1:]), values=values)
        return few.added_to(self.block[:rows].unsqueeze(0).clone())[0]

    def expand(self) -> Tensor:
        """The full parameter in its own shape."""
        full = tile_to(self.values.unsqueeze(0), self.shape)
        return stored_form(full, self.stored, self.transposed)[0]

    @torch.no_grad()
    def copy_into(self, param: Tensor) -> None:
        """Write the full parameter into `param`, whatever its dtype, device and strides.

        The block is written as often as it fits, through broadcasting views, so that no second full-size
        tensor is made, and then over it what the prior changes.
        """
        target = param.transpose(0, 1) if self.transposed else param
        if target.shape != self.shape:
            if not param.is_contiguous():
                param.copy_(self.expand())
                return
            target = (param.view(self.shape[1], self.shape[0], *self.shape[2:]).transpose(0, 1)
                      if self.transposed else param.view(self.shape))  # fmt: skip
        self._copy(target, self.block)
        if self.prior is not None:
            self._copy(target[(..., *self.prior.place)], self.prior.where_added(self.block))

    def _copy(self, target: Tensor, values: Tensor) -> None:
        """Fill `target`, of the tile's channels, with repeated values."""
        values = values.to(target.device, target.dtype)
        for part in target.split(self.stretches, axis_of(self.shape)) if self.stretches else (target,):
            copy_tiled(part, values)


def tile_to(values: Tensor, shape: Sequence[int], stretches: tuple[int, ...] = ()) -> Tensor:
    """Repeat (n, a, b, ...) to (n, *shape), contiguous and differentiable; one copy where all divide.

    In each of the stretches along their axis it begins anew.
    """
    if stretches:
        axis = axis_of(shape)
        made: dict[int, Tensor] = {}
        for length in stretches:
            if length not in made:
                made[length] = tile_to(values.narrow(axis + 1, 0, min(length, values.shape[axis + 1])),
                                       (*shape[:axis], length, *shape[axis + 1 :]))  # fmt: skip
        return torch.cat([made[length] for length in stretches], axis + 1)
    sizes = values.shape[1:]
    if tuple(sizes) == tuple(shape):
        return values.contiguous()
    repeats = [-(-want // have) for want, have in zip(shape, sizes, strict=True)]
    blocks = values.reshape(-1, *itertools.chain.from_iterable((1, size) for size in sizes))
    blocks = blocks.expand(-1, *itertools.chain.from_iterable(zip(repeats, sizes, strict=True)))
    full = blocks.reshape(-1, *(many * size for many, size in zip(repeats, sizes, strict=True)))
    for axis, want in enumerate(shape, 1):
        full = full.narrow(axis, 0, want) if full.shape[axis] != want else full
    return full.contiguous()


def sum_repeats(full: Tensor, sizes: Sequence[int], stretches: tuple[int, ...] = ()) -> Tensor:
    """The adjoint of `tile_to`: (n, *shape) to (n, *sizes), the sum over all places of the block."""
    if stretches:
        axis = axis_of(full.shape[1:])
        total = full.new_zeros(len(full), *sizes)
        for part in full.split(stretches, axis + 1):
            length = min(part.shape[axis + 1], sizes[axis])
            shorter = (*sizes[:axis], length, *sizes[axis + 1 :])
            total.narrow(axis + 1, 0, length).add_(sum_repeats(part, shorter))
        return total
    for axis, size in enumerate(sizes, 1):
        count, rest = divmod(full.shape[axis], size)
        if count == 1 and not rest:
            continue
        whole = full.narrow(axis, 0, count * size).unflatten(axis, (count, size)).sum(axis)
        if rest:
            whole.narrow(axis, 0, rest).add_(full.narrow(axis, count * size, rest))
        full = whole
    return full


class _FullSize(torch.autograd.Function):
    """Blocks (n, *block) to the n full parameters in their own shape.

    A function of its own because autograd would stack the n gradients and fill zeros around each cut
    before it sums them, which on a CPU costs more than all other steps of the decoder.
    """

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        shape: tuple[int, ...],
        stored: tuple[int, ...],
        transposed: bool,
        stretches: tuple[int, ...],
    ) -> tuple[Tensor, ...]:
        ctx.sizes, ctx.shape, ctx.transposed, ctx.stretches = values.shape[1:], shape, transposed, stretches
        return stored_form(tile_to(values, shape, stretches), stored, transposed).unbind()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Kernels are dear on a GPU and memory is on a CPU: all at once there, one by one here.
        parts = [torch.stack(grads)] if grads[0].is_cuda else [grad.unsqueeze(0) for grad in grads]
        sums = [
            sum_repeats(_unstored(part, ctx.shape, ctx.transposed), ctx.sizes, ctx.stretches)
            for part in parts
        ]
        return (torch.cat(sums) if len(sums) > 1 else sums[0]), None, None, None, None


def full_size(
    values: Tensor,
    shape: tuple[int, ...],
    stored: tuple[int, ...],
    *,
    transposed: bool,
    stretches: tuple[int, ...] = (),
) -> tuple[Tensor, ...]:
    """Blocks (n, *block) to the n full parameters, each of shape `stored`; differentiable once."""
    return _FullSize.apply(values, shape, stored, transposed, stretches)  # pyright: ignore[reportReturnType]


def _unstored(full: Tensor, shape: Sequence[int], transposed: bool) -> Tensor:
    """The inverse of `stored_form`."""
    if not transposed:
        return full.reshape(-1, *shape)
    return full.reshape(-1, shape[1], shape[0], *shape[2:]).transpose(1, 2)


def stored_form(full: Tensor, stored: Sequence[int], transposed: bool) -> Tensor:
    """(n, out, in, ...) as the n parameters are stored, (n, *stored)."""
    if transposed:
        full = full.transpose(1, 2)
    return full.reshape(-1, *stored)


def copy_tiled(target: Tensor, values: Tensor) -> None:
    """Fill `target` with repeated `values` of as many dimensions, in place."""
    spans = [_blocks(have, size) for have, size in zip(target.shape, values.shape, strict=True)]
    for parts in itertools.product(*spans):
        view, source = target, values
        outer: list[int] = []  # the shape of `view` with repeated axes split in (count, size), ...
        inner: list[int] = []  # ... and that of `source`, which broadcasts along the counts
        # Every call costs about as much as copying a vector does, so axes that need nothing get nothing.
        for axis, (start, count, size) in enumerate(parts):
            if count * size != view.shape[axis]:
                view = view.narrow(axis, start, count * size)
            if size != source.shape[axis]:
                source = source.narrow(axis, 0, size)
            outer += (count, size) if count > 1 else (size,)
            inner += (1, size) if count > 1 else (size,)
        if len(outer) > len(parts):
            view, source = view.view(outer), source.view(inner)
        view.copy_(source)


def _blocks(length: int, size: int) -> list[tuple[int, int, int]]:
    """An axis as (start, count, size) of its whole blocks and of what remains."""
    count, rest = divmod(length, size)
    whole = [(0, count, size)] if count else []
    return whole + ([(count * size, 1, rest)] if rest else [])
