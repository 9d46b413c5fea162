"""Tiling: a small predicted block repeated along every axis and cut to the size of a parameter.

Everything here is plain periodic extension, `full[i, j, ...] = values[i % a, j % b, ...]`, because the
decoder arranges its blocks so (arXiv 2110.13100, section 4.2 repeats channels in the same way).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Tile:
    """A predicted parameter as its smallest repeating block.

    Attributes:
        values: The block, already normalised; as many dimensions as `shape`.
        shape: The parameter's shape with the output channels first.
        stored: The parameter's own shape.
        transposed: The parameter is stored as (in, out, ...).
    """

    values: Tensor
    shape: tuple[int, ...]
    stored: tuple[int, ...]
    transposed: bool = False

    @property
    def tiled(self) -> bool:
        """The parameter is larger than the block, which therefore repeats."""
        return tuple(self.values.shape) != self.shape

    def expand(self) -> Tensor:
        """The full parameter in its own shape."""
        full = tile_to(self.values.unsqueeze(0), self.shape)
        return stored_form(full, self.stored, self.transposed)[0]

    @torch.no_grad()
    def copy_into(self, param: Tensor) -> None:
        """Write the full parameter into `param`, whatever its dtype, device and strides.

        The block is written once; the rest is copied from there, or from the block, through broadcasting
        views, so that no second full-size tensor is made.
        """
        target = param.transpose(0, 1) if self.transposed else param
        if target.shape != self.shape:
            if not param.is_contiguous():
                param.copy_(self.expand())
                return
            target = (param.view(self.shape[1], self.shape[0], *self.shape[2:]).transpose(0, 1)
                      if self.transposed else param.view(self.shape))  # fmt: skip
        copy_tiled(target, self.values.to(target.device, target.dtype))


def tile_to(values: Tensor, shape: Sequence[int]) -> Tensor:
    """Repeat (n, a, b, ...) to (n, *shape), contiguous and differentiable; one copy where all divide."""
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


def sum_repeats(full: Tensor, sizes: Sequence[int]) -> Tensor:
    """The adjoint of `tile_to`: (n, *shape) to (n, *sizes), the sum over all places of the block."""
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
        ctx: Any, values: Tensor, shape: tuple[int, ...], stored: tuple[int, ...], transposed: bool
    ) -> tuple[Tensor, ...]:
        ctx.sizes, ctx.shape, ctx.transposed = values.shape[1:], shape, transposed
        return stored_form(tile_to(values, shape), stored, transposed).unbind()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Kernels are dear on a GPU and memory is on a CPU: all at once there, one by one here.
        parts = [torch.stack(grads)] if grads[0].is_cuda else [grad.unsqueeze(0) for grad in grads]
        sums = [sum_repeats(_unstored(part, ctx.shape, ctx.transposed), ctx.sizes) for part in parts]
        return (torch.cat(sums) if len(sums) > 1 else sums[0]), None, None, None


def full_size(
    values: Tensor, shape: tuple[int, ...], stored: tuple[int, ...], *, transposed: bool
) -> tuple[Tensor, ...]:
    """Blocks (n, *block) to the n full parameters, each of shape `stored`; differentiable once."""
    return _FullSize.apply(values, shape, stored, transposed)  # pyright: ignore[reportReturnType]


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
