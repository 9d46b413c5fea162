"""The scale of a tensor's values: their root mean square, and whether they are all one number."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch

from ghn_init._network.sharded import is_sharded

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor
    from torch.distributed.tensor import DTensor

_CHUNK: Final = 1 << 22
"""Elements that are summed in float32 at a time; the sums of the chunks are added in float64."""

_BITS: Final = 8
"""Binary digits of a root mean square that count."""


@dataclass(frozen=True, slots=True)
class Magnitude:
    """How large a tensor's values are.

    Attributes:
        rms: Their root mean square, of which eight binary digits count, so that the order of a sum does not
            show: a tensor gives the same scale in one piece and in shards, and one that is multiplied to
            have this scale gives it again. Off by 0.2 % at most; not finite if the values are not.
        constant: The number that all values are, or None if they differ.
    """

    rms: float
    constant: float | None = None

    @classmethod
    def of_sum(cls, squares: float, count: int, low: float, high: float) -> Magnitude:
        """The scale of `count` values whose squares have this sum, between `low` and `high`."""
        if low == high:
            return cls(abs(low), low)
        return cls(rounded(math.sqrt(squares / count)))


def rounded(value: float) -> float:
    """A positive number with the binary digits that count."""
    if not value or not math.isfinite(value):
        return value
    fraction, exponent = math.frexp(value)
    return math.ldexp(round(fraction * 2**_BITS), exponent - _BITS)


@torch.no_grad()
def scales_of(tensors: Sequence[Tensor]) -> list[Magnitude]:
    """The scale of every tensor, none of them on the meta device or empty.

    Each is read once, and no copy of it is made. Of a DTensor it is that of the whole: its ranks add up a few
    numbers for each of theirs, so that all have to call this.
    """
    facts = _facts(tensors, sums=True)
    return [
        Magnitude.of_sum(squares, t.numel(), *ends)
        for t, (squares, *ends) in zip(tensors, facts, strict=True)
    ]


@torch.no_grad()
def constants_of(tensors: Sequence[Tensor]) -> list[float | None]:
    """`Magnitude.constant` of every tensor, for which most need not be read."""
    return [low if low == high else None for _, low, high in _facts(tensors, sums=False)]


def _facts(tensors: Sequence[Tensor], *, sums: bool) -> list[tuple[float, float, float]]:
    """(sum of squares or 0, least value, largest value) of every tensor."""
    found = _own_facts([tensor.to_local() if is_sharded(tensor) else tensor for tensor in tensors], sums=sums)
    sharded = {index: tensor for index, tensor in enumerate(tensors) if is_sharded(tensor)}
    for index, row in _over_ranks(sharded, found).items():
        found[index] = row
    return found


def _own_facts(tensors: Sequence[Tensor], *, sums: bool) -> list[tuple[float, float, float]]:
    """The same of plain tensors.

    Where the first row already has different values its ends stand for those of the tensor.
    """
    found = [(0.0, math.inf, -math.inf)] * len(tensors)  # what a rank's empty share has
    there = [index for index, tensor in enumerate(tensors) if tensor.numel()]
    parts = {index: _parts(tensors[index]) if sums else () for index in there}
    norms = iter(_numbers([_norm(part) for index in there for part in parts[index]]))
    ends = ends_of([tensors[index][0] if tensors[index].ndim > 1 else tensors[index] for index in there])
    alike = [n for n, (low, high) in enumerate(ends) if low == high and tensors[there[n]].ndim > 1]
    for n, whole in zip(alike, ends_of([tensors[there[n]] for n in alike]), strict=True):
        ends[n] = whole
    for index, (low, high) in zip(there, ends, strict=True):
        found[index] = (sum(next(norms) ** 2 for _ in parts[index]), low, high)
    return found


def _parts(tensor: Tensor) -> Sequence[Tensor]:
    """Views of a tensor, with few enough elements to be summed in float32."""
    if tensor.numel() <= _CHUNK or not tensor.ndim:
        return (tensor,)
    return tensor.split(max(1, _CHUNK * len(tensor) // tensor.numel()))


def _norm(values: Tensor) -> Tensor:
    values = computable(values)
    double = values.dtype == torch.float64
    return torch.linalg.vector_norm(values, dtype=torch.float64 if double else torch.float32)


def computable(values: Tensor) -> Tensor:
    """`values`, or what their size goes by: real numbers of more than one byte, as torch computes with."""
    if values.is_complex():
        return values.abs()
    wide = values.is_floating_point() and values.dtype.itemsize > 1
    return values if wide else values.float()


def ends_of(tensors: Sequence[Tensor]) -> list[tuple[float, float]]:
    """The least and the largest value of every tensor."""
    numbers = iter(_numbers([end for tensor in tensors for end in torch.aminmax(computable(tensor))]))
    return list(zip(numbers, numbers, strict=True))


def _numbers(scalars: Sequence[Tensor]) -> list[float]:
    """The values of tensors without dimensions: one transfer for every device and dtype."""
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, scalar in enumerate(scalars):
        groups.setdefault((scalar.device, scalar.dtype), []).append(index)
    found = [0.0] * len(scalars)
    for indices in groups.values():
        values = torch.stack([scalars[index] for index in indices]).tolist()
        for index, value in zip(indices, values, strict=True):
            found[index] = value
    return found


def _over_ranks(
    tensors: dict[int, DTensor], local: Sequence[tuple[float, float, float]]
) -> dict[int, tuple[float, float, float]]:
    """The facts of whole DTensors from those of their parts: one exchange for tensors that are cut alike."""
    groups: dict[tuple[Any, tuple[int, ...]], list[int]] = {}
    for index, tensor in tensors.items():
        cut = tuple(
            dimension
            for dimension, placement in enumerate(tensor.placements)
            if type(placement).__name__ != "Replicate" and tensor.device_mesh.size(dimension) > 1
        )
        groups.setdefault((tensor.device_mesh, cut), []).append(index)
    found: dict[int, tuple[float, float, float]] = {}
    for (mesh, cut), indices in groups.items():
        columns = zip(*(local[index] for index in indices), strict=True)
        sums, lows, highs = (
            torch.tensor(column, dtype=torch.float64, device=mesh.device_type) for column in columns
        )
        for dimension in cut:
            _reduce(mesh.get_group(dimension), sums, lows, highs)
        for index, *row in zip(indices, sums.tolist(), lows.tolist(), highs.tolist(), strict=True):
            found[index] = (row[0], row[1], row[2])
    return found


def _reduce(group: Any, sums: Tensor, lows: Tensor, highs: Tensor) -> None:
    """Add, and take the least and largest, over the ranks of a group, in place."""
    import torch.distributed as dist

    reduce: Callable[..., Any] = dist.all_reduce
    reduce(sums, dist.ReduceOp.SUM, group=group)
    reduce(lows, dist.ReduceOp.MIN, group=group)
    reduce(highs, dist.ReduceOp.MAX, group=group)
