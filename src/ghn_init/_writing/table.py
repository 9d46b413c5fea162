"""A plan as a table of text."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ghn_init._writing.entry import Action, Entry


def table_of(entries: Sequence[Entry]) -> str:
    """One line for every parameter: what happens to it, and why."""
    return _aligned([("parameter", "shape", "node", "action", ""), *map(_cells, entries)])


def summary_of(entries: Sequence[Entry], counts: Mapping[Action, tuple[int, int]]) -> str:
    """Counts and shares for every action, and the reasons for keeping."""
    total = max(sum(elements for _, elements in counts.values()), 1)
    lines = [("action", "parameters", "elements", "share")]
    for action, (parameters, elements) in counts.items():
        lines.append((action, str(parameters), f"{elements:,}", f"{elements / total:.1%}"))
    reasons = Counter(entry.reason for entry in entries if entry.action == "kept")
    kept = [f"kept, {count} of them: {reason}" for reason, count in reasons.most_common()]
    return "\n".join([_aligned(lines, right=(1, 2, 3)), *kept])


def _cells(entry: Entry) -> tuple[str, ...]:
    tied = f"tied to {', '.join(entry.also)}" if entry.also else ""
    through = f"through {entry.through}" if entry.through and entry.action != "kept" else ""
    note = ", ".join(filter(None, (entry.reason, _scale(entry), through, tied)))
    return entry.name, "x".join(map(str, entry.shape)) or "scalar", entry.node or "-", entry.action, note


def _scale(entry: Entry) -> str:
    """Which scale the prediction has, where one of two was chosen."""
    if entry.action == "kept" or (entry.rms is None and entry.own is None):
        return ""
    return "predicted scale" if entry.rms is None else f"own scale {entry.rms:.3g}"


def _aligned(table: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """A plain table, columns two spaces apart; the columns in `right` are aligned there."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for row in table:
        cells = (
            c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
