"""Tables and curves of `starting_point.py`."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from starting_panel import Member
    from starting_point import Training

KNOWN = 0.80
"""Aim for networks like those that the hypernetwork has learned from, at the best rate of each start."""
WORST = 1.02
"""Aim for the worst ratio over all networks and rates."""
MEAN = 0.90
"""Aim for the geometric mean over the panel at the best rates."""
OUTPUT = 10.0
"""Aim for the outputs in evaluation mode, as a factor either way."""

SUITS = 2.0
"""A rate suits the default start if its area is at most so many times that at its best rate."""


@dataclass(frozen=True)
class Comparison:
    """A start beside the default one, for a network and an optimizer.

    Attributes:
        member: The network.
        optimizer: Which.
        ratios: Area under the loss curve relative to the default start's, by rate, medians over seeds; of the
            rates that suit the default start.
        at_best: The same, each start at its own best rate.
        best: That best rate of the default start.
        spread: Lowest and highest ratio of a seed, at that rate.
        seeds: Their number there.
        quality: Of the default start and of this one, each at its best rate, in percent.
        output: Size of the outputs in evaluation mode before training, relative to the default start's with
            batch norms that know the images.
    """

    member: Member
    optimizer: str
    ratios: dict[float, float]
    at_best: float
    best: float
    spread: tuple[float, float]
    seeds: int
    quality: tuple[float, float]
    output: float

    @property
    def worst(self) -> float:
        """The highest ratio over the rates."""
        return max(self.ratios.values())


def compared(trainings: Iterable[Training], members: Sequence[Member], start: str) -> list[Comparison]:
    """Every network and optimizer for which there are both starts at a common rate."""
    groups: dict[tuple[str, str], dict[str, list[Training]]] = {}
    for training in trainings:
        of = training.setting
        groups.setdefault((of.network, of.optimizer), {}).setdefault(of.start, []).append(training)
    found = []
    for member in members:
        for (network, optimizer), starts in groups.items():
            if network == member.name and "default" in starts and start in starts:
                found.append(_comparison(member, optimizer, starts["default"], starts[start]))
    return [comparison for comparison in found if comparison is not None]


def _comparison(
    member: Member, optimizer: str, default: Sequence[Training], other: Sequence[Training]
) -> Comparison | None:
    """Of the seeds and rates that both starts have; None if there are none."""
    pairs: dict[float, list[tuple[Training, Training]]] = {}
    mates = {(t.setting.rate, t.setting.seed): t for t in other}
    for training in default:
        mate = mates.get((training.setting.rate, training.setting.seed))
        if mate is not None:
            pairs.setdefault(training.setting.rate, []).append((training, mate))
    areas = {
        rate: tuple(statistics.median(pair[side].area for pair in both) for side in (0, 1))
        for rate, both in sorted(pairs.items())
    }
    least = min(own for own, _ in areas.values())
    suiting = [rate for rate, (own, _) in areas.items() if own <= SUITS * least < math.inf]
    ratios = {rate: statistics.median(_ratios(pairs[rate], pairs[rate])) for rate in suiting}
    if not ratios:
        return None
    best = min(ratios, key=lambda rate: areas[rate][0])
    mine = min(areas, key=lambda rate: areas[rate][1])
    each = _ratios(pairs[best], pairs[best])
    qualities = (
        statistics.median(a.quality for a, _ in pairs[best]),
        statistics.median(b.quality for _, b in pairs[mine]),
    )
    output = statistics.median(b.output / max(a.output, 1e-30) for a, b in pairs[best])
    return Comparison(
        member, optimizer, ratios, statistics.median(_ratios(pairs[best], pairs[mine]) or each), best,
        (min(each), max(each)), len(each), qualities, output,
    )  # fmt: skip


def _ratios(
    own: Sequence[tuple[Training, Training]], mine: Sequence[tuple[Training, Training]]
) -> list[float]:
    """Area of this start in `mine` relative to the default one's in `own`, for every seed in both."""
    areas = {default.setting.seed: default.area for default, _ in own}
    return [
        other.area if math.isinf(other.area) else other.area / areas[other.setting.seed]
        for _, other in mine
        if other.setting.seed in areas
    ]


def report(trainings: Sequence[Training], members: Sequence[Member]) -> str:
    """One table for every start but the default one, and what the promise comes to."""
    starts = dict.fromkeys(t.setting.start for t in trainings if t.setting.start != "default")
    return "\n".join(_table(start, compared(trainings, members, start)) for start in starts)


def _table(start: str, comparisons: Sequence[Comparison]) -> str:
    lines = [
        f"## {start}",
        "",
        "| network | optimizer, best rate | ratio at a third, at the best, at three times | best to best "
        "| seeds at the best | quality, default to this | outputs |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in comparisons:
        near = [_at(row.ratios, row.best * factor) for factor in (1 / 3, 1, 3)]
        shown = " / ".join("-" if ratio is None else _number(ratio) for ratio in near)
        low, high = row.spread
        lines.append(
            f"| {row.member.name} | {row.optimizer} {row.best:.2g} | {shown} | {_number(row.at_best)} "
            f"| {row.seeds}: {_number(low)} to {_number(high)} "
            f"| {row.quality[0]:.1f} to {row.quality[1]:.1f} | {_number(row.output)} |"
        )
    return "\n".join([*lines, "", *_promise(comparisons), ""])


def _promise(comparisons: Sequence[Comparison]) -> list[str]:
    """The aims, and what was found."""
    if not comparisons:
        return ["nothing to compare yet"]
    worst = max(comparisons, key=lambda row: row.worst)
    diverged = [f"{row.member.name} ({row.optimizer})" for row in comparisons if math.isinf(row.worst)]
    known = [row.at_best for row in comparisons if row.member.known]
    mean = math.exp(statistics.fmean(math.log(min(row.at_best, 1e30)) for row in comparisons))
    off = [row for row in comparisons if not 1 / OUTPUT <= row.output <= OUTPUT]
    above = sum(row.worst > WORST for row in comparisons)
    lines = [
        f"- worst ratio {_number(worst.worst)}, {worst.member.name} with {worst.optimizer} (aim: {WORST}); "
        f"above it {above} of {len(comparisons)}",
        f"- diverged where the default start did not: {', '.join(diverged) or 'none'}",
        f"- geometric mean, best to best: {mean:.3f} (aim: {MEAN})",
        "- outputs in evaluation mode farther than a factor of 10 from the default start's: "
        + (", ".join(dict.fromkeys(row.member.name for row in off)) or "none"),
    ]
    if known:
        lines.insert(3, f"- known networks, best to best: at most {_number(max(known))} (aim: {KNOWN})")
    return lines


def _at(ratios: dict[float, float], rate: float) -> float | None:
    """The ratio at this rate, which rounding may have changed."""
    return next((ratio for key, ratio in ratios.items() if math.isclose(key, rate, rel_tol=1e-6)), None)


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0e}"


def draw(trainings: Sequence[Training], members: Sequence[Member], path: Path) -> None:
    """Training-loss curves at the default start's best rate, one panel for every network and optimizer.

    The median over seeds, as a mean over a twentieth of the steps.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "starting point"  # the same picture for the same figures
    starts = list(dict.fromkeys(t.setting.start for t in trainings))
    rows = [row for start in starts if start != "default" for row in compared(trainings, members, start)]
    cells = {(row.member.name, row.optimizer): row.best for row in rows}
    columns = max(1, min(6, len(cells)))
    height = max(1, math.ceil(len(cells) / columns))
    figure = Figure(figsize=(2.6 * columns, 2.0 * height + 0.4), layout="constrained")
    axes: Any = figure.subplots(height, columns, squeeze=False).flatten()
    for axis, ((network, optimizer), rate) in zip(axes, cells.items(), strict=False):
        axis.set_title(f"{network}, {optimizer} {rate:.2g}", fontsize=8)
        axis.tick_params(labelsize=6)
        for colour, start in enumerate(starts):
            curves = [
                t.losses for t in trainings
                if (t.setting.network, t.setting.optimizer, t.setting.start) == (network, optimizer, start)
                and t.setting.rate == rate and math.isfinite(t.area)
            ]  # fmt: skip
            if curves:
                middle = [statistics.median(values) for values in zip(*curves, strict=True)]
                width = max(1, len(middle) // 20)
                smooth = [statistics.fmean(middle[max(0, i - width + 1) : i + 1]) for i in range(len(middle))]
                axis.plot(smooth, color=f"C{colour}", label=start, linewidth=1)
    for axis in axes[len(cells) :]:
        axis.set_axis_off()
    if len(cells):
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(starts), fontsize=8)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
