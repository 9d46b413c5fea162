"""Starting weights for training a GHN.

With default initial weights the decoders' outputs have whatever spread the layers before them happen to
give. The first predicted networks then explode or vanish, and the first epochs go into mending that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from ghn_init._hypernetwork.batch import KINDS
from ghn_init._threads import drawing_from

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from ghn_init._graph.graph import Graph
    from ghn_init._hypernetwork.batch import GraphBatch
    from ghn_init._weights.ghn import GHN

VECTOR_RMS: Final = 0.1
"""RMS of decoded vectors before their activation: norm weights 1 +- 0.05, biases +- 0.02."""


@torch.no_grad()
def init_for_training(ghn: GHN, graphs: Sequence[Graph] | GraphBatch, seed: int = 0) -> None:
    """Draw new weights and rescale the decoders' last layers, in place.

    Afterwards the decoded weights of `graphs` have unit RMS before the normalisation sqrt(beta / fan_in),
    for the convolutional decoder and for the classifier's, so that the first predicted networks have the
    activations of a well initialised one (He et al. 2015, arXiv 1502.01852); norm weights are near 1 (near
    0 for a GHN without normalisation, whose vectors are used as they are) and biases near 0.

    Args:
        ghn: The GHN to initialise.
        graphs: A sample of the networks that it will be trained on.
        seed: Seed of the new weights; the global random state is left alone.
    """
    with drawing_from(seed):
        fresh = type(ghn)(ghn.config)
    ghn.load_state_dict(fresh.state_dict())
    batch = ghn.batch(graphs)
    # From the inside out: the classifier's layers read what the ones before them make.
    last = ghn.decoder_1d.linear(1)
    half = last.weight.shape[0] // 2
    decoder = ghn.decoder
    for kind, layer, rows, target in (
        ("weight", decoder.conv[2], slice(None), 1.0),
        ("class_weight", decoder.class_layer_predictor[1], slice(None), 1.0),
        ("norm", last, slice(0, half), VECTOR_RMS),
        ("bias", last, slice(half, None), VECTOR_RMS),
        ("class_bias", ghn.bias_class[1], slice(None), VECTOR_RMS),
    ):
        _rescale(layer, rows, target / _rms(ghn, batch).get(kind, target))


def _rescale(layer: nn.Module, rows: slice, factor: float) -> None:
    for values in layer.parameters():
        values[rows] *= factor


def _rms(ghn: GHN, batch: GraphBatch) -> dict[str, float]:
    """RMS over all elements of the decoded blocks of each kind, before any normalisation."""
    squares: dict[str, list[Tensor]] = {}
    for values, group in zip(ghn.blocks(batch, raw=True), batch.groups, strict=True):
        squares.setdefault(KINDS[group.key.kind], []).append(values.square().flatten())
    return {kind: torch.cat(parts).mean().sqrt().item() for kind, parts in squares.items()}
