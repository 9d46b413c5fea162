"""A plan as a table of text."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ghn_init._writing.entry import Action, Entry


def table_of(entries: Sequence[Entry], *, own_scale: bool) -> str:
    """One line for every parameter: what happens to it, and why; of two scales which, where there are two."""
    rows = (_cells(entry, own_scale=own_scale) for entry in entries)
    return _aligned([("parameter", "shape", "node", "action", ""), *rows])


def summary_of(entries: Sequence[Entry], counts: Mapping[Action, tuple[int, int]]) -> str:
    """Counts and shares for every action, and the reasons for keeping."""
    total = max(sum(elements for _, elements in counts.values()), 1)
    lines = [("action", "parameters", "elements", "share")]
    for action, (parameters, elements) in counts.items():
        lines.append((action, str(parameters), f"{elements:,}", f"{elements / total:.1%}"))
    reasons = Counter(entry.reason for entry in entries if entry.action == "kept")
    kept = [f"kept, {count} of them: {reason}" for reason, count in reasons.most_common()]
    return "\n".join([_aligned(lines, right=(1, 2, 3)), *kept])


def _cells(entry: Entry, *, own_scale: bool) -> tuple[str, ...]:
    tied = f"tied to {', '.join(entry.also)}" if entry.also else ""
    through = f"through {entry.through}" if entry.through and entry.action != "kept" else ""
    chosen = own_scale and entry.action != "kept"
    predicted = "predicted scale" if entry.factor == 1 else f"{entry.factor:.2g} x predicted scale"
    own = f"own scale {entry.rms:.3g}" if entry.rms else "zero"
    scale = predicted if entry.rms is None else own
    note = ", ".join(filter(None, (entry.reason, scale if chosen else "", through, tied)))
    return entry.name, "x".join(map(str, entry.shape)) or "scalar", entry.node or "-", entry.action, note


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
