"""Whether a network is like those that a GHN is trained on; untrained, others are near random.

The bounds are those of the networks of DeepNets-1M (arXiv 2110.13100, section 4) and of measured accuracy:
see docs/familiarity.md. By default predictions are made ready to be trained, and do such networks little
harm, so that there is nothing to warn of. What was measured and makes no difference is not looked at: how
much of a network is tiled, depth, width.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from sys import _getframe
from typing import TYPE_CHECKING, Final

from ghn_init._errors import listing
from ghn_init._graph import structure
from ghn_init._graph.graph import WEIGHT_TYPES
from ghn_init._writing.entry import Cause

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ghn_init._graph.graph import Graph, Node
    from ghn_init._writing.entry import Entry
    from ghn_init._writing.options import Options

_LARGEST_KEPT: Final = 0.05
"""Share of the elements that no node stands for. At most 0.4 % in torchvision's 80 classifiers and 0 in
DeepNets-1M; 12 % and more where there are token embeddings or recurrent layers."""

_MOST_NODES: Final = 1000
"""DeepNets-1M's deepest and densest test networks have up to 863, torchvision's classifiers up to 877."""

_OF_THE_CALLER: Final = frozenset({Cause.PATTERN, Cause.FROZEN})


class OutOfDistributionWarning(UserWarning):
    """The network is far from those that the GHN was trained on: expect little of the predictions."""


@dataclass(frozen=True, slots=True)
class Remark:
    """Something in which a network is far from those that a GHN is trained on.

    Attributes:
        text: What it is.
        nothing: It is that nothing is predicted.
        trained: It matters for training, too; else for accuracy untrained alone.
    """

    text: str
    nothing: bool = False
    trained: bool = False


def unfamiliar(
    graph: Graph, entries: Sequence[Entry], num_classes: int, options: Options
) -> tuple[Remark, ...]:
    """In which ways a network is far from those that a GHN is trained on; empty if it is not.

    Args:
        graph: Its graph.
        entries: What happens to its parameters.
        num_classes: Width of the classifier that the GHN was trained for.
        options: The caller's choices.
    """
    return tuple(_remarks(graph, entries, num_classes, options))


def warn(model: str, reasons: Sequence[str]) -> None:
    """Warn, if there are reasons, at the caller's line outside of this package.

    By Python's default filter that is once for each line and message.
    """
    if reasons:
        text = f"{described(model, reasons)}; see print(ghn_init.plan(model)) and docs/familiarity.md"
        warnings.warn(text, OutOfDistributionWarning, stacklevel=_frames_inside() + 1)


def described(model: str, reasons: Sequence[str]) -> str:
    """The reasons as one line."""
    return f"{model} is unlike the networks that the GHN was trained on, expect little: {', '.join(reasons)}"


def _remarks(graph: Graph, entries: Sequence[Entry], num_classes: int, options: Options) -> Iterator[Remark]:
    if not reads_images(graph):
        yield Remark("no 2-d convolution reads its input, so it is no image network")
    if not structure.has_batch_norms(graph):
        yield Remark("no batch norm")
    if (share := _kept_share(entries)) > _LARGEST_KEPT:
        yield Remark(f"{share:.0%} of its parameters fit no node type")
    if len(graph) > _MOST_NODES:
        yield Remark(f"{len(graph):,} nodes")
    if (width := _predicted_width(graph, entries)) not in (None, num_classes):
        yield Remark(f"a predicted classifier of width {width} where the GHN knows {num_classes}")
    if _only_the_classifier_trains(graph, entries):
        yield Remark("all but the classifier is frozen, and kept", trained=True)
    if options.own_scale and options.scale == "auto" and _all_are_kept(entries):
        yield Remark(_nothing(entries), nothing=True, trained=True)


def _nothing(entries: Sequence[Entry]) -> str:
    """That nothing is predicted, and the commonest reasons why; what to do, where something can be done."""
    counts = Counter[str]()
    for entry in entries:
        chosen = entry.decision.cause is Cause.AUTO  # what can be done is said once, at the end
        counts[entry.decision.reason if chosen else entry.reason] += entry.numel
    why = listing([reason for reason, _ in counts.most_common()], 2)
    remedy = any(entry.decision.cause is Cause.AUTO for entry in entries)
    return f"nothing is predicted ({why})" + ("; scale='own' predicts all the same" if remedy else "")


def _all_are_kept(entries: Sequence[Entry]) -> bool:
    """Whether nothing is predicted, neither by choice nor because nothing can be written."""
    causes = {entry.decision.cause for entry in entries}
    return not causes & {None, Cause.INFERENCE} and not causes <= _OF_THE_CALLER


def reads_images(graph: Graph, *, volumes: bool = False) -> bool:
    """Whether a 2-d convolution, or a 3-d one too, is among the first weights that the input meets."""
    sizes = (4, 5) if volumes else (4,)
    return any(node.shape is not None and len(node.shape) in sizes for node in _first_weights(graph))


def _first_weights(graph: Graph) -> Iterator[Node]:
    """The nodes with a weight that the input reaches through nodes without one."""
    reached = {0}
    for index, preds in enumerate(graph.predecessors):
        if reached.isdisjoint(preds):
            continue
        if graph.nodes[index].type in WEIGHT_TYPES:
            yield graph.nodes[index]
        else:
            reached.add(index)


def _kept_share(entries: Sequence[Entry]) -> float:
    """Share of the elements that are used and that no node stands for."""
    used = [entry for entry in entries if entry.decision.cause is not Cause.UNUSED]
    lost = sum(e.numel for e in used if e.key is None and not (e.decision.predict or e.decision.meant))
    return lost / max(sum(entry.numel for entry in used), 1)


def _predicted_width(graph: Graph, entries: Sequence[Entry]) -> int | None:
    """Width of the classifier, if it is predicted."""
    index, _ = graph.classifier
    if index is None or (shape := graph.nodes[index].shape) is None:
        return None
    name = graph.nodes[index].param
    return shape[0] if any(entry.key == name and entry.decision.predict for entry in entries) else None


def _only_the_classifier_trains(graph: Graph, entries: Sequence[Entry]) -> bool:
    """Whether a frozen backbone is kept beside a classifier that is not frozen."""
    heads = structure.head_params(graph)
    trained = [entry.key for entry in entries if entry.decision.cause is not Cause.FROZEN]
    return len(trained) < len(entries) and bool(trained) and heads.issuperset(trained)


def _frames_inside() -> int:
    """How many frames above the caller belong to this package."""
    package, depth = str(Path(__file__).parents[1]) + os.sep, 0
    frame = _getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(package):
        depth, frame = depth + 1, frame.f_back
    return depth
