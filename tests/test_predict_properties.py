"""Random networks: never half-written, finite, the same bits twice, untouched after a failure.

More examples: `pytest tests/test_predict_properties.py --hypothesis-profile=nightly`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ghn_init import GHN, GHNConfig, PredictError, plan, predict
from ghn_init._hypernetwork.tile import Tile
from ghn_init._writing.known import as_learned
from ghn_init._writing.shown import shown

if TYPE_CHECKING:
    from ghn_init._graph.graph import Graph

EXAMPLE = (2, 3, 8, 8)
LAYERS = ("conv", "depthwise", "bn", "gn", "residual", "tied", "concat", "gate", "up", "scale", "unused")


@dataclass(frozen=True)
class Recipe:
    """What a random network is made of."""

    layers: tuple[tuple[str, int, int], ...]  # kind, width, kernel
    num_classes: int | None
    dtype: torch.dtype
    frozen: int
    channels_last: bool

    def build(self, seed: int = 0) -> RandomNet:
        torch.manual_seed(seed)
        model = RandomNet(self).to(self.dtype)
        if self.channels_last:
            model = model.to(memory_format=torch.channels_last)
        for index, param in enumerate(model.parameters()):
            param.requires_grad_(index % 3 != self.frozen)
        return model


class RandomNet(nn.Module):
    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.ModuleList()
        self.scales = nn.ParameterList()
        channels = 8
        for kind, width, kernel in recipe.layers:
            layer, channels = self.layer(kind, channels, width, kernel)
            self.layers.append(layer)
        self.head = None if recipe.num_classes is None else nn.Linear(channels, recipe.num_classes)

    def layer(self, kind: str, c: int, width: int, k: int) -> tuple[nn.Module, int]:
        def conv(n_in: int, n_out: int, **options: Any) -> nn.Conv2d:
            return nn.Conv2d(n_in, n_out, k, padding=k // 2, **options)

        if kind == "scale":
            self.scales.append(nn.Parameter(torch.ones(c, 1, 1)))
        if kind == "tied":
            pair = nn.ModuleList([conv(c, c), conv(c, c)])
            pair[1].weight = pair[0].weight
            return pair, c
        return {
            "conv": lambda: (conv(c, width), width),
            "depthwise": lambda: (conv(c, c, groups=c, bias=False), c),
            "bn": lambda: (nn.BatchNorm2d(c), c),
            "gn": lambda: (nn.GroupNorm(1, c), c),
            "residual": lambda: (conv(c, c), c),
            "concat": lambda: (nn.ModuleList([conv(c, width), conv(c, c)]), width + c),
            "gate": lambda: (nn.Conv2d(c, c, 1), c),
            "up": lambda: (nn.ConvTranspose2d(c, width, 2, stride=2), width),
            "scale": lambda: (nn.Identity(), c),
            "unused": lambda: (conv(c, width), c),
        }[kind]()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        scales = iter(self.scales)
        for (kind, _, _), layer in zip(self.recipe.layers, self.layers, strict=True):
            if kind == "residual":
                x = x + layer(x).relu()
            elif kind == "tied":
                x = layer[1](layer[0](x).relu())
            elif kind == "concat":
                x = torch.cat([branch(x) for branch in layer], 1)
            elif kind == "gate":
                x = x * layer(x.mean((2, 3), keepdim=True)).sigmoid()
            elif kind == "scale":
                x = x * next(scales)
            elif kind != "unused":
                x = layer(x).relu()
        return x if self.head is None else self.head(x.mean((2, 3)))


layers = st.tuples(st.sampled_from(LAYERS), st.sampled_from((1, 5, 24, 65, 130)), st.sampled_from((1, 3, 13)))
recipes = st.builds(
    Recipe,
    layers=st.lists(layers, max_size=6).map(tuple),
    num_classes=st.sampled_from((None, 10, 7)),
    dtype=st.sampled_from((torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)),
    frozen=st.integers(0, 3),
    channels_last=st.booleans(),
)
choices = st.fixed_dictionaries(
    {
        "head": st.sampled_from(("auto", "predict", "keep")),
        "diversify": st.sampled_from((None, None, "noise", "orthogonal")),
        "seed": st.integers(0, 3),
        "scale": st.sampled_from(("auto", "own", "predicted")),
        "frozen": st.sampled_from(("keep", "predict")),
    }
)


def _ghn(kind: type[GHN] = GHN) -> GHN:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(1)
        return kind(GHNConfig.ghn2(max_shape=(64, 64, 5, 5))).requires_grad_(False)


class Failing(GHN):
    """Fails in one of the ways that a GHN can."""

    how = "raise"
    victim = 0

    def predict_tiles(self, graph: Graph, names: Any = None) -> dict[str, Tile]:
        tiles = super().predict_tiles(graph, names)
        name = list(tiles)[self.victim % len(tiles)]
        tile = tiles[name]
        if self.how == "raise":
            raise MemoryError("no room")
        if self.how == "missing":
            del tiles[name]
        elif self.how == "shape":
            tiles[name] = replace(tile, stored=(*tile.stored, 2))
        else:
            block = tile.block.clone()
            block.view(-1)[-1] = float(self.how)
            tiles[name] = replace(tile, block=block)
        return tiles


GHN2, FAILING = _ghn(), _ghn(Failing)


def _frozen_state(model: nn.Module) -> dict[str, Any]:
    """Everything that must not change: bits, objects, modes, hooks, attributes, random state."""
    return {
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "objects": {name: id(param) for name, param in model.named_parameters(remove_duplicate=False)},
        "grads": [param.requires_grad for param in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "random": torch.get_rng_state(),
    }


def _assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for key, value in expected.items():
        if key in ("values", "random"):
            torch.testing.assert_close(found[key], value, rtol=0, atol=0, equal_nan=True)
        else:
            assert found[key] == value


@given(recipe=recipes, options=choices)
def test_predictions_are_complete_finite_and_repeatable(recipe: Recipe, options: dict[str, Any]) -> None:
    # Predictions of their own scale need nothing of what was there before.
    model, twin = recipe.build(0), recipe.build(1 if options["scale"] == "predicted" else 0)
    before = _frozen_state(model)
    planned = plan(model, GHN2, example_input=EXAMPLE, **options)
    _assert_equal(_frozen_state(model), before)
    if all(row.action == "kept" for row in planned.rows):
        return
    planned.apply()
    predict(twin, GHN2, example_input=EXAMPLE, **options)
    after = _frozen_state(model)
    for key in ("objects", "grads", "modes", "hooks", "attributes"):
        assert after[key] == before[key]
    params, others = dict(model.named_parameters()), dict(twin.named_parameters())
    assert [row.name for row in planned.rows] == list(params)
    for row in planned.rows:
        param = params[row.name]
        assert param.dtype == recipe.dtype
        assert param.isfinite().all(), row
        if row.action == "kept":
            assert torch.equal(param, before["values"][row.name]), row
        else:
            assert torch.equal(param, others[row.name]), row
    buffers = dict(twin.named_buffers())
    for name, buffer in model.named_buffers():
        expected = planned.statistics.get(name, before["values"][name])
        assert torch.equal(buffer, expected), name
        assert torch.equal(buffer, buffers[name]), name


@given(recipe=recipes)
def test_tiles_written_in_place_are_the_full_tensors(recipe: Recipe) -> None:
    recipe = replace(recipe, dtype=torch.float32)
    model = recipe.build()
    planned = plan(model, GHN2, example_input=EXAMPLE, head="predict", frozen="predict")
    view = shown(as_learned(planned.graph))
    seen = {
        name: Tile(values, tuple(values.shape), tuple(values.shape))
        for name, values in GHN2(view.graph)[0].items()
    }
    full = {name: tile.expand() for name, tile in (view.as_used(seen) | dict(view.neutral)).items()}
    planned.apply()
    for row in planned.rows:
        if row.action != "kept":
            found = model.get_parameter(row.name).detach()
            torch.testing.assert_close(found, full[row.name], rtol=1e-4, atol=1e-5)


@given(
    recipe=recipes,
    how=st.sampled_from(("raise", "missing", "shape", "nan", "inf", "-inf")),
    victim=st.integers(0, 50),
    seed=st.integers(0, 9),
)
def test_failures_leave_everything_untouched(recipe: Recipe, how: str, victim: int, seed: int) -> None:
    model = recipe.build(seed)
    FAILING.how, FAILING.victim = how, victim
    before = _frozen_state(model)
    with pytest.raises(PredictError):
        predict(model, FAILING, example_input=EXAMPLE, head="predict")
    _assert_equal(_frozen_state(model), before)


@given(recipe=recipes, options=choices)
def test_meta_models_get_the_same_predictions(recipe: Recipe, options: dict[str, Any]) -> None:
    recipe = replace(recipe, layers=tuple(layer for layer in recipe.layers if layer[0] != "scale"))
    real = recipe.build()
    with torch.device("meta"):
        meta = recipe.build()
    options["scale"] = "predicted"  # scales of their own are random where values are
    planned = plan(real, GHN2, example_input=EXAMPLE, **options)
    if all(row.action == "kept" for row in planned.rows):
        return
    planned.apply()
    predict(meta, GHN2, example_input=EXAMPLE, **options)
    for row in planned.rows:
        found, expected = meta.get_parameter(row.name), real.get_parameter(row.name)
        assert found.dtype == expected.dtype
        assert found.requires_grad == expected.requires_grad
        assert found.isfinite().all()
        if row.action != "kept":
            assert torch.equal(found, expected), row
        for alias in row.also:
            assert meta.get_parameter(alias) is found
    for name, buffer in meta.named_buffers():
        assert torch.equal(buffer, real.get_buffer(name))
