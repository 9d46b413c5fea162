"""Tables and curves of `sgd_equivalence.py`."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from sgd_equivalence import Training

GREY = "#7d8590"
"""Text and axes of the picture, which has no background: readable on white and on black."""

COLOURS = {"default": "#8b949e", "predicted": "#e8710a"}
STYLES = {"sgd": "-", "adam": "--"}

Trainings = dict[str, dict[tuple[str, str], list["Training"]]]
"""By network, then by start and optimizer; one for every seed."""


def grouped(trainings: Sequence[Training], names: Sequence[str]) -> Trainings:
    """Those of the networks named, in this order; those that have none are left out."""
    found: Trainings = {name: {} for name in names}
    for training in trainings:
        of = training.setting
        found[of.network].setdefault((of.start, of.optimizer), []).append(training)
    return {name: groups for name, groups in found.items() if groups}


def report(trainings: Sequence[Training], names: Sequence[str]) -> str:
    """How long the default start takes to be as good, and what predicted weights do for training."""
    groups = grouped(trainings, names)
    optimizers = list(dict.fromkeys(t.setting.optimizer for t in trainings if t.setting.optimizer))
    if not optimizers:
        return "nothing to compare yet\n"
    longest = max(t.setting.steps for t in trainings)
    rates = {t.setting.optimizer: t.setting.rate for t in trainings}
    heads = [f"steps of {name} ({rates[name]:g}) to it" for name in optimizers]
    heads += [f"{name}: area, accuracy at the end" for name in optimizers]
    lines = [
        f"| network | predicted, never trained, % | {' | '.join(heads)} |",
        "|---" * (2 + len(heads)) + "|",
    ]
    steps: dict[str, list[float]] = {name: [] for name in optimizers}
    ratios: dict[str, list[float]] = {name: [] for name in optimizers}
    for network, of in groups.items():
        cells = [_accuracy(of)]
        for name in optimizers:
            found = equivalent(of, name)
            steps[name] += [] if found is None else [found]
            cells.append("-" if found is None else _steps(found, of, name))
        for name in optimizers:
            ratio, ends = gain(of, name)
            ratios[name] += [] if ratio is None else [ratio]
            cells.append("-" if ratio is None else f"{ratio:.2f}, {ends[0]:.1f} to {ends[1]:.1f}")
        lines.append(f"| {network} | {' | '.join(cells)} |")
    lines.append("")
    for name in optimizers:
        if steps[name]:
            middle = statistics.median(steps[name])
            reached = sum(map(math.isfinite, steps[name]))
            shown = f"{middle:g}" if math.isfinite(middle) else f"more than {longest}"
            lines.append(
                f"- {name}: median over networks {shown} steps ({reached} of {len(steps[name])} got there)"
            )
        if ratios[name]:
            mean = math.exp(statistics.fmean(math.log(min(ratio, 1e30)) for ratio in ratios[name]))
            lines.append(
                f"- {name}: area under the loss relative to the default start's, geometric mean {mean:.3f}, "
                f"{min(ratios[name]):.2f} to {max(ratios[name]):.2f}"
            )
    return "\n".join([*lines, ""])


def equivalent(of: Mapping[tuple[str, str], Sequence[Training]], optimizer: str) -> float | None:
    """Steps from the default start to the accuracy of the prediction, median over seeds.

    Infinite if it was not reached; None if there is nothing to compare.
    """
    untrained, default = of.get(("untrained", "")), of.get(("default", optimizer))
    if not untrained or not default:
        return None
    wanted = untrained[0].accuracies[0]
    each = [training.steps_to(wanted) for training in default]
    return statistics.median_low([math.inf if steps is None else steps for steps in each])


def gain(
    of: Mapping[tuple[str, str], Sequence[Training]], optimizer: str
) -> tuple[float | None, tuple[float, float]]:
    """Area under the loss from predicted weights relative to the default start's, and both last accuracies.

    Medians over the seeds that both have; None without any.
    """
    own = {t.setting.seed: t for t in of.get(("default", optimizer), ())}
    pairs = [(own[t.setting.seed], t) for t in of.get(("predicted", optimizer), ()) if t.setting.seed in own]
    if not pairs:
        return None, (math.nan, math.nan)
    default, predicted = ([pair[side] for pair in pairs] for side in (0, 1))
    area = statistics.median(t.area for t in predicted) / statistics.median(t.area for t in default)
    ends = [statistics.median(t.accuracies[-1] for t in side) for side in (default, predicted)]
    return area, (ends[0], ends[1])


def _accuracy(of: Mapping[tuple[str, str], Sequence[Training]]) -> str:
    untrained = of.get(("untrained", ""))
    return f"{untrained[0].accuracies[0]:.1f}" if untrained else "-"


def _steps(found: float, of: Mapping[tuple[str, str], Sequence[Training]], optimizer: str) -> str:
    if math.isfinite(found):
        return f"{found:g}"
    return f"> {of['default', optimizer][0].setting.steps}"


def draw(trainings: Sequence[Training], names: Sequence[str], path: Path) -> None:
    """Accuracy on test images over the steps, a panel for every network; without a background.

    Lines are medians over seeds, the band goes from the lowest to the highest one; the dotted line is the
    accuracy of the whole prediction, never trained.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    keys = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    colours: Any = {"svg.hashsalt": "sgd equivalence"} | dict.fromkeys(keys, GREY)
    groups = grouped(trainings, names)
    columns = max(1, min(4, len(groups)))
    rows = max(1, math.ceil(len(groups) / columns))
    with mpl.rc_context(colours):
        figure = Figure(figsize=(max(2.9 * columns, 6), 2.4 * rows + 0.5), layout="constrained")
        axes: Any = figure.subplots(rows, columns, squeeze=False).flatten()
        for axis, (network, of) in zip(axes, groups.items(), strict=False):
            _panel(axis, of)
            axis.set_title(network, fontsize=9)
        for axis in axes[len(groups) :]:
            axis.set_axis_off()
        axes[0].set_ylabel("test accuracy, %")
        if groups:
            handles, labels = axes[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside upper center", ncols=5, fontsize=8, frameon=False)
        figure.supxlabel("steps", fontsize=9)
        figure.savefig(path, transparent=True, metadata={"Date": None} if path.suffix == ".svg" else None)


def _panel(axis: Any, of: Mapping[tuple[str, str], Sequence[Training]]) -> None:
    for (start, optimizer), trainings in of.items():
        if start == "untrained":
            axis.axhline(
                trainings[0].accuracies[0], color=COLOURS["predicted"], linestyle=":", linewidth=1,
                label="predicted whole, never trained",
            )  # fmt: skip
            continue
        values = list(zip(*(t.accuracies for t in trainings), strict=False))
        steps = [index * trainings[0].setting.every for index in range(len(values))]
        colour, style = COLOURS[start], STYLES[optimizer]
        label = f"{start}, {optimizer.upper() if optimizer == 'sgd' else 'Adam'}"
        axis.plot(steps, [statistics.median(each) for each in values], style, color=colour, label=label)
        axis.fill_between(
            steps, *zip(*((min(v), max(v)) for v in values), strict=True), color=colour, alpha=0.2
        )
    axis.tick_params(labelsize=7)
    axis.grid(color=GREY, alpha=0.25, linewidth=0.5)
    axis.spines[["top", "right"]].set_visible(False)
