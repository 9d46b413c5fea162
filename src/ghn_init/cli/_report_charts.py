"""Charts of the report: scales before and after, on a logarithmic axis."""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_WIDTH: Final = 1000
_NAMES: Final = 330
"""Pixels on the left for names."""
_ROW: Final = 16
_LONGEST: Final = 52
"""Characters of a name that fit there; its end says more than its beginning."""
_BINS: Final = 40
_HEIGHT: Final = 120


class _Axis:
    """A logarithmic axis from `left` to `right` pixels that has room for these values."""

    def __init__(self, values: Iterable[float], left: float, right: float) -> None:
        logs = [math.log10(value) for value in values]
        self.low, self.high = math.floor(min(logs) * 2) / 2, math.ceil(max(logs) * 2) / 2
        if self.low == self.high:
            self.low, self.high = self.low - 0.5, self.high + 0.5
        self.left, self.right = left, right

    def __call__(self, value: float) -> float:
        share = (math.log10(value) - self.low) / (self.high - self.low)
        return self.left + share * (self.right - self.left)

    def ticks(self, top: float, bottom: float, text: float) -> list[str]:
        """Lines at powers of ten, and between them where there are few, with numbers at the height `text`."""
        wide = self.high - self.low > 3
        powers = range(math.floor(self.low), math.ceil(self.high) + 1)
        values = [10.0**power * factor for power in powers for factor in ((1,) if wide else (1, 2, 5))]
        lines = []
        for value in values:
            if self.low - 1e-9 <= math.log10(value) <= self.high + 1e-9:
                x = self(value)
                lines.append(
                    f'<path d="M{x:.1f} {top}V{bottom}" stroke="currentColor" stroke-opacity="0.25"/>'
                    f'<text x="{x:.1f}" y="{text}" text-anchor="middle">{value:g}</text>'
                )
        return lines


def histogram(before: Sequence[float], after: Sequence[float]) -> str:
    """How many weights have which scale: filled before, an outline after."""
    axis = _Axis([*before, *after], 20, _WIDTH - 20)
    span = (axis.right - axis.left) / _BINS
    counts = [[0] * _BINS, [0] * _BINS]
    for which, values in enumerate((before, after)):
        for value in values:
            counts[which][min(int((axis(value) - axis.left) / span), _BINS - 1)] += 1
    unit = (_HEIGHT - 8) / max(map(max, counts))
    tops = [[_HEIGHT - unit * count for count in which] for which in counts]
    bars = [
        f'<rect x="{axis.left + span * index:.1f}" y="{top:.1f}" width="{span:.1f}" '
        f'height="{_HEIGHT - top:.1f}"/>'
        for index, top in enumerate(tops[0])
        if counts[0][index]
    ]
    outline = "".join(f"V{top:.1f}h{span:.2f}" for top in tops[1])
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT + 22}" role="img" '
        'aria-label="histogram of scales before and after">'
        f"{''.join(axis.ticks(4, _HEIGHT, _HEIGHT + 14))}"
        f'<g class="bars-before">{"".join(bars)}</g>'
        f'<path class="bars-after" d="M{axis.left} {_HEIGHT}{outline}V{_HEIGHT}"/></svg>'
    )


def dumbbells(pairs: Sequence[tuple[str, float, float]]) -> str:
    """One line for every weight: its name, a ring at its scale before and a dot at that after."""
    axis = _Axis([value for _, *both in pairs for value in both], _NAMES + 20, _WIDTH - 20)
    bottom = _ROW * len(pairs) + 24
    lines = [
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {bottom + 4}" role="img" '
        'aria-label="scale of every weight before and after">',
        *axis.ticks(16, bottom, 11),
    ]
    for index, (name, before, after) in enumerate(pairs):
        y = _ROW * index + 30
        shown = name if len(name) <= _LONGEST else f"…{name[1 - _LONGEST :]}"
        x, u = axis(before), axis(after)
        lines.append(
            f"<g><title>{escape(name)}: {before:.3g} before, {after:.3g} after</title>"
            f'<text x="{_NAMES}" y="{y + 4}" text-anchor="end">{escape(shown)}</text>'
            f'<path d="M{x:.1f} {y}H{u:.1f}" stroke="currentColor" stroke-width="2"/>'
            f'<circle class="before" cx="{x:.1f}" cy="{y}" r="5" stroke-width="2"/>'
            f'<circle class="after" cx="{u:.1f}" cy="{y}" r="3.2"/></g>'
        )
    return "\n".join([*lines, "</svg>"])
