"""The GHN's side of a plan: the loaded network, and its tiles, checked."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Final

import torch

from ghn_init._errors import GHNInitError, PredictError
from ghn_init._threads import surviving_threads
from ghn_init._weights.load import bundled_names, load
from ghn_init._writing.shown import shown

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from os import PathLike

    from torch import Tensor

    from ghn_init._graph.graph import Graph
    from ghn_init._hypernetwork.tile import Tile
    from ghn_init._weights.ghn import GHN
    from ghn_init._writing.entry import Entry
    from ghn_init._writing.shown import Shown

_DEVICES: Final = ("cpu", "cuda", "xpu", "mps")


def ghn_of(weights: str | PathLike[str] | GHN) -> GHN:
    """The GHN that `weights` names, on the CPU; a GHN is returned as it is, wherever it is.

    Bundled weights are loaded once in a process and kept, because loading takes longer than predicting;
    they never change, and predicting does not change them, so threads may share them. Files,
    directories and repositories are read anew every time.
    """
    return _bundled(weights) if isinstance(weights, str) and weights in _names() else load(weights)


# Two threads that come first at the same time may both load; they get equal weights. A lock would not
# survive a fork in the other thread.
@lru_cache(maxsize=4)
def _bundled(name: str) -> GHN:
    return load(name).requires_grad_(False)


@lru_cache(maxsize=1)
def _names() -> frozenset[str]:
    return frozenset(bundled_names())


@contextmanager
def plain_torch() -> Iterator[None]:
    """Inside, what the caller set for his own tensors does not reach ours.

    Undoes, only where it is set: `torch.device(...)` contexts and `torch.set_default_device`, autocast,
    inference mode (its tensors could not be trained) and gradients. In a forked process there is one thread.
    """
    gradients = torch.is_grad_enabled()
    try:
        with ExitStack() as stack:
            stack.enter_context(surviving_threads())
            if torch.is_inference_mode_enabled():
                stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            if torch.empty(0).device.type != "cpu":  # before 2.7, get_default_device() overlooks contexts
                stack.enter_context(torch.device("cpu"))
            for device in _DEVICES:
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            yield
    finally:
        # Ctrl-C may keep a `torch.no_grad()` from putting this back; it cannot stop a function of C.
        torch._C._set_grad_enabled(gradients)  # noqa: SLF001


def with_predictions(
    ghn: GHN, graph: Graph, entries: Sequence[Entry], *, separable: bool = True
) -> list[Entry]:
    """The same entries, those that are to be predicted with their tiles; `separable` as in `shown`.

    Raises:
        PredictError: The GHN fails, misses a parameter, or predicts one with a wrong shape or with
            values that are not finite in the parameter's dtype; the message names them.
    """
    wanted = {entry.key: entry for entry in entries if entry.decision.predict and entry.key is not None}
    if not wanted:
        return list(entries)
    view = shown(graph, separable=separable)
    seen = {key: entry for key, entry in wanted.items() if key not in view.neutral}
    tiles = _decoded(ghn, view, seen) if seen else {}
    return [_with_tile(entry, tiles, view.neutral) if entry.key in wanted else entry for entry in entries]


def _with_tile(entry: Entry, tiles: Mapping[str, Tile], neutral: Mapping[str, Tile]) -> Entry:
    """The entry with its prediction, or with the one number that does nothing there."""
    assert entry.key is not None  # what has no name in the graph is not wanted
    if entry.key not in neutral:
        return replace(entry, tile=tiles[entry.key])
    tile = neutral[entry.key]
    return replace(entry, tile=tile, rms=float(tile.block.flatten()[0]))


def _decoded(ghn: GHN, view: Shown, wanted: Mapping[str, Entry]) -> dict[str, Tile]:
    """What the GHN predicts for these entries, checked."""
    name = view.graph.name
    try:
        tiles = view.as_used(ghn.predict_tiles(view.graph, names=list(wanted)))
    except GHNInitError:
        raise
    except Exception as error:
        raise PredictError(f"{name}: the GHN failed: {type(error).__name__}: {error}") from error
    faults = _faults(wanted, tiles)
    if faults:
        lines = "\n".join(f"  {name}: {fault}" for name, fault in faults.items())
        raise PredictError(
            f"{name}: {len(faults)} of {len(wanted)} predictions cannot be written; the model is as it "
            f"was. Are these the weights of a trained GHN?\n{lines}"
        )
    return tiles


def _faults(wanted: Mapping[str, Entry], tiles: Mapping[str, Tile]) -> dict[str, str]:
    """What is wrong with each tile; empty where nothing is."""
    faults = {}
    for key, entry in wanted.items():
        if key not in tiles:
            faults[key] = "not predicted"
        elif entry.computed is None and tuple(tiles[key].stored) != entry.shape:
            faults[key] = f"shape {tuple(tiles[key].stored)}, expected {entry.shape}"
    sound = [key for key in wanted if key not in faults]
    if not sound:
        return faults
    # A prior, of 1 at most, takes no number past the largest of its dtype: the sum is rounded down.
    largest = _largest([tiles[key].block for key in sound])
    dtypes = [wanted[key].param.dtype for key in sound]
    limits = torch.tensor([torch.finfo(dtype).max for dtype in dtypes], dtype=torch.float64)
    good = (largest <= limits).tolist()  # False for NaN and infinity
    return faults | {
        key: f"not finite, or past the largest {dtype}"
        for key, dtype, ok in zip(sound, dtypes, good, strict=True)
        if not ok
    }


def _largest(values: Sequence[Tensor]) -> Tensor:
    """The largest absolute value of each tensor, (n,) float64 on the CPU; NaN and infinity show."""
    # aminmax reads once, lets NaN through and is vectorised, unlike isfinite().all().
    ends = torch.stack([end for value in values for end in torch.aminmax(value)])
    ends = ends.to("cpu", torch.float64).abs().view(-1, 2)
    ends[~ends.isfinite()] = torch.inf
    return ends.max(dim=1).values
