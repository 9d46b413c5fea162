"""What `ghn-init properties` and `search` print, as Markdown."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ghn_init.search._properties import PROPERTIES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ghn_init.search._properties import Fitted, Properties
    from ghn_init.search._rank import Ranked
    from ghn_init.search._recipe import Measurement


def properties_table(fitted: Sequence[Fitted]) -> str:
    """Kendall's tau of every way to predict every property, with its interval: five-fold, and held out."""
    names = [prediction.name for prediction in fitted[0].predictions]
    lines = [f"| property | on | n | {' | '.join(names)} |", "|---|---|---|" + "---|" * len(names)]
    for found in fitted:
        for where, taus in (
            ("five folds", [prediction.folds_tau for prediction in found.predictions]),
            ("held out", [prediction.held_out_tau for prediction in found.predictions]),
        ):
            lines.append(f"| {found.prop.name} | {where} | {taus[0].n} | {' | '.join(map(str, taus))} |")
    return "\n".join(lines)


def ranking_table(
    ranked: Sequence[Ranked], measured: Mapping[int, Measurement], properties: Properties, by: str
) -> str:
    """The first of a ranking beside what was measured of them; last, the medians of what was fitted to."""
    prop, recipe = PROPERTIES[by], properties.recipe
    lines = [
        f"| rank | architecture | {by} predicted, {prop.unit} | measured | trained, % | under noise, % | "
        "steps to target | images/s | parameters | nodes |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for place, entry in enumerate(ranked, 1):
        found = measured[entry.candidate.index]
        lines.append(
            f"| {place} | {found.index} | {entry.predicted:.2f} | {prop.of(found, recipe):.2f} | "
            f"{found.trained:.1f} | {found.trained_noise:.1f} | {found.convergence or '-'} | "
            f"{found.speed:,.0f} | {found.params:,} | {found.nodes} |"
        )
    median = properties.medians[by]
    lines.append(f"median of the {len(properties.indices)} architectures that were fitted to: {median:.2f}")
    return "\n".join(lines)
