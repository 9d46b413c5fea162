"""The page of `--report`: what is done to a network, and what to expect, in one HTML file.

It loads nothing, runs nothing, and says the same for the same network: names come from the user's module and
are escaped, a policy in the page forbids whatever is not in it.
"""

from __future__ import annotations

import math
from collections import Counter
from html import escape
from typing import TYPE_CHECKING, Final

import torch

from ghn_init._errors import PredictError
from ghn_init._files import reason, write_bytes
from ghn_init._graph.draw import COLOURS
from ghn_init._graph.structure import has_batch_norms
from ghn_init._graph.svg import MOST_NODES, to_svg
from ghn_init._network.scale import computable
from ghn_init.cli._output import in_options
from ghn_init.cli._report_charts import dumbbells, histogram

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from ghn_init._graph.graph import Graph
    from ghn_init._writing.entry import Entry
    from ghn_init._writing.plan import Plan

Scales = dict[str, float]
"""Root mean square of the values of parameters, by name; those without any are left out."""

_STYLE: Final = """
:root { color-scheme: light dark; --text: #1f2328; --soft: #59636e; --line: #d1d9e0; --back: #fff;
  --raised: #f6f8fa; --before: #6e7781; --after: #bc4c00; --good: #1a7f37; --warn: #9a6700; }
@media (prefers-color-scheme: dark) { :root { --text: #e6edf3; --soft: #9198a1; --line: #3d444d;
  --back: #0d1117; --raised: #151b23; --before: #9198a1; --after: #f0883e; --good: #3fb950;
  --warn: #d29922; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 75rem; padding: 1.5rem; font: 15px/1.5 system-ui, sans-serif;
  color: var(--text); background: var(--back); }
h1 { font-size: 1.6rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p { max-width: 46rem; } .soft { color: var(--soft); } code { font-size: .92em; overflow-wrap: anywhere; }
.cards { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0; }
.card { flex: 1 1 11rem; padding: .7rem 1rem; border: 1px solid var(--line); border-radius: 8px;
  background: var(--raised); }
.card b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.bar { display: flex; height: 10px; border-radius: 5px; overflow: hidden; background: var(--line); }
.bar i { display: block; } .predicted { background: var(--good); } .tiled { background: var(--after); }
.kept { background: var(--before); }
.key { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .35em;
  border: 1px solid var(--soft); }
ul.legend { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; }
.scroll { overflow: auto; max-height: 42rem; border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-size: 13px; }
th { position: sticky; top: 0; background: var(--raised); text-align: left; font-weight: 600; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.name { overflow-wrap: anywhere; min-width: 12rem; font-family: ui-monospace, monospace; }
.action::before { content: ""; display: inline-block; width: .6em; height: .6em; border-radius: 2px;
  margin-right: .45em; background: currentColor; }
.action { background: none; white-space: nowrap; } .action.predicted { color: var(--good); }
.action.tiled { color: var(--after); } .action.kept { color: var(--before); }
.warn { border-left: 4px solid var(--warn); padding-left: .8rem; }
svg { display: block; color: var(--soft); } svg.chart { width: 100%; height: auto; }
.scroll svg.chart { min-width: 40rem; }
svg text { fill: var(--text); font: 11px system-ui, sans-serif; }
svg .before { fill: var(--back); stroke: var(--before); } svg .after { fill: var(--after); }
svg .bars-before { fill: var(--before); fill-opacity: .35; }
svg .bars-after { fill: none; stroke: var(--after); stroke-width: 1.6; }
.pad { padding: .8rem; } @media print { .scroll { max-height: none; overflow: visible; } }
"""

_OWN: Final = (
    "This is the start of a training. In classifiers of the kind that the hypernetwork knows, weights are as "
    "predicted, but for later ones, which are no larger than they were. In others they have predicted "
    "directions, at the scale which each layer had, or less where predicted filters are more alike than the "
    "layer's own were, and norm layers and values that are all one number stayed as they were, so that "
    "learning rates that suited the network still do."
)
_PREDICTED: Final = (
    "This is for using the network untrained: everything is as predicted, norm layers and scales included. "
    "To train it, start with the default, --scale auto."
)
_FAMILIAR: Final = (
    "No reason was found to expect less than usual, which is no promise: images, batch norm and size are as "
    "in the networks that the hypernetwork was trained on."
)
_STATISTICS: Final = (
    "Batch norms behind predicted weights got running statistics that belong to these, so that evaluation "
    "mode works at once; those of your data are better: train the network, or call "
    "ghn_init.calibrate_batchnorm."
)
_NO_STATISTICS: Final = (
    "No running statistics of batch norms were set: train the network, or call "
    "ghn_init.calibrate_batchnorm, before it is used in evaluation mode."
)


class Page:
    """A report on a plan, made before anything is written, because it shows the scales that values had.

    Args:
        plan: What will be written.
        origin: Where the network came from.
    """

    def __init__(self, plan: Plan, origin: str) -> None:
        self.plan, self.origin = plan, origin
        self.before = _scales_of(plan.rows)

    def write(self, path: Path, *, in_place: bool) -> None:
        """Write the page, replacing a file in one piece.

        Args:
            path: The file.
            in_place: The plan has been applied. Otherwise the model still has its old values.

        Raises:
            PredictError: The file cannot be written.
        """
        if in_place:
            after = _scales_of(self.plan.rows)
        else:
            after = self.before | {name: rms(value) for name, value in self.plan.tensors() if value.numel()}
        try:
            write_bytes(path, self.html(after).encode("utf-8", "xmlcharrefreplace"))
        except OSError as error:
            raise PredictError(f"{path} cannot be written: {reason(error)}") from error

    def html(self, after: Scales) -> str:
        """The page with these scales afterwards."""
        plan, before = self.plan, self.before
        title = escape(type(plan.model).__name__)
        policy = "default-src 'none'; style-src 'unsafe-inline'"
        parts = [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            f"<title>{title}: predicted weights</title><style>{_STYLE}</style></head><body>",
            f"<h1>{title}</h1>",
            f'<p class="soft"><code>{escape(self.origin)}</code>, weights '
            f"<code>{escape(plan.weights)}</code></p>",
            _counts(plan),
            *_expectations(plan),
            *_scales(plan.rows, before, after),
            *_graph(plan.graph),
            *_table(plan.rows, before, after),
            "</body></html>",
            "",
        ]
        return "\n".join(parts)


def rms(value: Tensor) -> float:
    """Root mean square of a tensor that is not empty."""
    values = computable(value.detach())
    return float(torch.linalg.vector_norm(values, dtype=torch.float32)) / value.numel() ** 0.5


def _scales_of(rows: Iterable[Entry]) -> Scales:
    """Those of the values that the parameters have now, but of empty ones and those on the meta device."""
    return {row.name: rms(row.param) for row in rows if row.numel and not row.param.is_meta}


def _counts(plan: Plan) -> str:
    counts = plan.counts()
    total = max(sum(elements for _, elements in counts.values()), 1)
    says = {
        "predicted": "every element has a prediction of its own",
        "tiled": "the prediction is smaller, and repeats",
        "kept": "not written",
    }
    cards, bar = [], []
    for action, (parameters, elements) in counts.items():
        cards.append(
            f'<div class="card"><span class="action {action}">{action}</span><b>{elements / total:.1%}</b>'
            f'<span class="soft">{elements:,} elements, {parameters} parameters: {says[action]}</span></div>'
        )
        bar.append(f'<i class="{action}" style="width:{100 * elements / total:.3f}%"></i>')
    return f'<div class="cards">{"".join(cards)}</div><div class="bar">{"".join(bar)}</div>'


def _expectations(plan: Plan) -> list[str]:
    """What the predictions are good for, what speaks against them, and what was kept and why."""
    own = plan.options.own_scale
    lines = ["<h2>What to expect</h2>", f"<p>{_OWN if own else _PREDICTED}</p>"]
    if plan.unfamiliar:
        reasons = "".join(f"<li>{escape(in_options(why))}</li>" for why in plan.unfamiliar)
        lines.append(
            '<div class="warn"><p>The network is unlike those that the hypernetwork was trained on'
            f"{'' if plan.warned else ', which matters without training'}:</p><ul>{reasons}</ul><p>"
            + ("Expect about as much as from its own initialisation." if own else "Expect little.")
            + "</p></div>"
        )
    else:
        lines.append(f"<p>{_FAMILIAR}</p>")
    if has_batch_norms(plan.graph):
        running = any(name.endswith("running_mean") for name in plan.statistics)
        lines.append(f"<p>{_STATISTICS if running else _NO_STATISTICS}</p>")
    kept = Counter(row.reason for row in plan.rows if row.action == "kept")
    if kept:
        reasons = "".join(f"<li>{count}: {escape(in_options(why))}</li>" for why, count in kept.most_common())
        lines.append(f"<p>Parameters that were kept:</p><ul>{reasons}</ul>")
    return lines


def _scales(rows: Sequence[Entry], before: Scales, after: Scales) -> list[str]:
    """The scale of every weight matrix before and after: a histogram of all, and one line for each."""
    weights = [row for row in rows if len(row.shape) > 1]
    shown = [row for row in weights if all(0 < of.get(row.name, 0) < math.inf for of in (before, after))]
    lines = ["<h2>Scale of the weights, before and after</h2>"]
    if not shown:
        return [*lines, "<p>Not known: the values were never in memory, or are all zero.</p>"]
    pairs = [(row.name, before[row.name], after[row.name]) for row in shown]
    left = len(weights) - len(shown)
    lines.append(
        '<p class="soft">Root mean square of the values of each weight with two or more dimensions; '
        '<span class="key" style="background:var(--before)"></span>before, '
        '<span class="key" style="background:var(--after)"></span>after'
        + (f". Left out are {left} without a scale (all zero, or not in memory)" if left else "")
        + ".</p>"
    )
    lines.append(histogram([a for _, a, _ in pairs], [b for _, _, b in pairs]))
    return [*lines, f'<div class="scroll pad">{dumbbells(pairs)}</div>']


def _graph(graph: Graph) -> list[str]:
    counts = Counter(node.type for node in graph.nodes)
    legend = "".join(
        f'<li><span class="key" style="background:{colour}"></span>{name} ({counts[name]})</li>'
        for name, colour in COLOURS.items()
        if name in counts
    )
    lines = ["<h2>The graph that the hypernetwork reads</h2>"]
    if len(graph) > MOST_NODES:
        lines.append(f"<p>Its {len(graph):,} nodes are too many for a picture.</p>")
    else:
        lines.append(
            '<p class="soft">From the input, top left, to the output; a row goes on in the next one. Point '
            f'at a node for its parameter.</p><div class="scroll pad">{to_svg(graph)}</div>'
        )
    return [*lines, f'<ul class="legend">{legend}</ul>']


def _table(rows: Sequence[Entry], before: Scales, after: Scales) -> list[str]:
    heads = "<th>parameter</th><th>shape</th><th>node</th><th>action</th>" + "".join(
        f'<th class="n">{head}</th>' for head in ("scale before", "after")
    )
    lines = [
        "<h2>The plan</h2>",
        f'<div class="scroll"><table><thead><tr>{heads}<th>note</th></tr></thead><tbody>',
    ]
    for row in rows:
        notes = [row.reason, f"through {row.through}" if row.through and row.action != "kept" else ""]
        notes.append(f"tied to {', '.join(row.also)}" if row.also else "")
        shape = "&times;".join(map(str, row.shape)) or "scalar"
        lines.append(
            f'<tr><td class="name">{escape(row.name)}</td><td>{shape}</td>'
            f'<td>{row.node or "-"}</td><td><span class="action {row.action}">{row.action}</span></td>'
            f'<td class="n">{_number(before, row)}</td><td class="n">{_number(after, row)}</td>'
            f"<td>{escape(in_options(', '.join(filter(None, notes))))}</td></tr>"
        )
    return [*lines, "</tbody></table></div>"]


def _number(scales: Mapping[str, float], row: Entry) -> str:
    return f"{scales[row.name]:.3g}" if row.name in scales else "-"
