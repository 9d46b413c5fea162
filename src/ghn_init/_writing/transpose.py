"""Transposing a matrix in its own memory.

A tall matrix is a column of squares and a rest. Each square is transposed by swapping blocks; then their rows
are put side by side, and the rest's columns after them, which is all that needs memory besides.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK: Final = 512
"""Side of the blocks that are swapped: two of them stay in a processor's cache."""

_SMALL: Final = 1 << 22
"""Elements up to which a copy does no harm (16 MB)."""


def transpose(values: Tensor, rows: int, columns: int) -> None:
    """Make `values`, a matrix (rows, columns) row by row with rows >= columns, (columns, rows) row by row.

    Takes memory for rows % columns of the rows; small ones are copied, which is faster.
    """
    if values.numel() <= _SMALL:
        values.copy_(values.view(rows, columns).T.reshape(-1))
        return
    squares = rows // columns
    length = squares * columns
    rest = values[length * columns :].view(rows - length, columns).T.clone()
    _transpose_squares(values, squares, columns)
    _permute(values[: length * columns].view(-1, columns), squares, columns)
    if rest.numel():
        for row in range(columns - 1, -1, -1):  # from the end, so that nothing is overwritten
            moved = values[row * length : (row + 1) * length].clone()
            values[row * rows : row * rows + length] = moved
            values[row * rows + length : (row + 1) * rows] = rest[row]


def transpose_back(values: Tensor, rows: int, columns: int) -> None:
    """Undo `transpose` with the same arguments."""
    if values.numel() <= _SMALL:
        values.copy_(values.view(columns, rows).T.reshape(-1))
        return
    squares = rows // columns
    length = squares * columns
    rest = values.view(columns, rows)[:, length:].T.clone()
    if rest.numel():
        for row in range(columns):
            moved = values[row * rows : row * rows + length].clone()
            values[row * length : (row + 1) * length] = moved
    _permute(values[: length * columns].view(-1, columns), columns, squares)
    _transpose_squares(values, squares, columns)
    values[length * columns :].view(rows - length, columns).copy_(rest)


def _transpose_squares(values: Tensor, squares: int, side: int) -> None:
    """Transpose every matrix in (squares, side, side)."""
    for square in values[: squares * side * side].view(squares, side, side):
        for top in range(0, side, _BLOCK):
            for left in range(top, side, _BLOCK):
                above = square[top : top + _BLOCK, left : left + _BLOCK]
                below = square[left : left + _BLOCK, top : top + _BLOCK]
                kept = above.clone()
                above.copy_(below.T.clone())
                below.copy_(kept.T)


def _permute(vectors: Tensor, outer: int, inner: int) -> None:
    """Bring the vectors in (outer * inner, n) from the order (outer, inner) into the order (inner, outer)."""
    if outer == 1 or inner == 1:
        return
    done = bytearray(len(vectors))
    for start in range(len(vectors)):
        if done[start]:
            continue
        first, place = vectors[start].clone(), start
        while not done[place]:
            done[place] = True
            source = place % outer * inner + place // outer
            vectors[place] = first if source == start else vectors[source]
            place = source
