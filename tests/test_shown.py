"""Networks that compute what one of DeepNets-1M's would, written otherwise, get the same prediction."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ghn_init import GHN, GHNConfig, plan, predict, trace
from ghn_init._hypernetwork.tile import tile_to
from ghn_init._writing.known import as_learned
from ghn_init._writing.shown import _in_groups, shown

if TYPE_CHECKING:
    from collections.abc import Callable

    from ghn_init._graph.graph import Graph
    from ghn_init._writing.entry import Entry

IMAGES = (2, 3, 8, 8)


@pytest.fixture(scope="module")
def ghn() -> GHN:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(1)
        return GHN(GHNConfig.ghn2(identity=True)).requires_grad_(False)


def body(channels: int = 3) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in ((channels, 16), (16, 80)):
        layer = nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False)
        layers += [layer, nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


def usual(channels: int = 3, hidden: int = 0) -> nn.Module:
    ends = [nn.Linear(80, hidden), nn.ReLU()] if hidden else []
    return nn.Sequential(
        body(channels), nn.AdaptiveAvgPool2d(1), nn.Flatten(), *ends, nn.Linear(hidden or 80, 10)
    )


class ChannelsLast(nn.Module):
    """A linear classifier of every place, whose scores are averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = body(), nn.Linear(80, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).permute(0, 2, 3, 1)).mean((1, 2))


def scores_pooled(*, bias: bool = True, between: nn.Module | None = None) -> nn.Module:
    last = nn.Conv2d(80, 10, 1, bias=bias)
    return nn.Sequential(body(), last, between or nn.Identity(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def flat(hidden: int = 0, places: int = 64, *poolings: nn.Module) -> nn.Module:
    ends = [nn.Linear(80 * places, hidden), nn.ReLU()] if hidden else []
    return nn.Sequential(body(), *poolings, nn.Flatten(), *ends, nn.Linear(hidden or 80 * places, 10))


class Recurrent(nn.Module):
    """Reads the columns of feature maps one after another, and gives twice as many features."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(80, 160, batch_first=True), nn.Linear(160, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.gru(x.amax(2).transpose(1, 2))[0][:, -1])


SAME: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "scores are pooled": (scores_pooled, 0),
    "dropped scores are pooled": (lambda: scores_pooled(between=nn.Dropout2d(0.0)), 0),
    "scores of every place are averaged": (ChannelsLast, 0),
    "a convolution reads what is pooled": (
        lambda: nn.Sequential(body(), nn.AdaptiveAvgPool2d(1), nn.Conv2d(80, 10, 1), nn.Flatten()),
        0,
    ),
    "an average over the whole map": (
        lambda: nn.Sequential(body(), nn.AvgPool2d(8), nn.Flatten(), nn.Linear(80, 10)),
        0,
    ),
    "scores are averaged over the whole map": (
        lambda: nn.Sequential(body(), nn.Conv2d(80, 10, 1), nn.AvgPool2d(8), nn.Flatten()),
        0,
    ),
    "a classifier of all places": (flat, 0),
    "a classifier of four means": (lambda: flat(0, 4, nn.AdaptiveAvgPool2d(2)), 0),
    "a hidden layer of all places": (lambda: flat(48), 48),
}


@pytest.mark.parametrize("scale", ["auto", "predicted"])
@pytest.mark.parametrize("name", SAME)
def test_the_same_function_gets_the_same_prediction(name: str, scale: Any, ghn: GHN) -> None:
    build, hidden = SAME[name]
    torch.manual_seed(0)
    mine, other = build().eval(), usual(hidden=hidden).eval()
    planned = plan(mine, ghn, scale=scale, example_input=IMAGES)
    assert not {row.name for row in planned.rows if row.action == "kept"}
    planned.apply()
    predict(other, ghn, scale=scale, example_input=IMAGES)
    x = torch.randn(IMAGES, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, predicted = mine(x), other(x)
    assert predicted.std() > 1e-3
    # Scales are estimated from activations of what is there: equal functions, not the same estimates.
    if scale == "auto":
        found, predicted = (scores / scores.norm() for scores in (found, predicted))
    torch.testing.assert_close(found, predicted, rtol=1e-3, atol=1e-3 * float(predicted.abs().max()))


def graph_of(model: nn.Module, example: tuple[int, ...] = IMAGES) -> Graph:
    return as_learned(trace(model, example_input=example))


@pytest.mark.parametrize(
    "build",
    [
        lambda: scores_pooled(between=nn.ReLU()),  # the mean of ReLUs is not the ReLU of a mean
        lambda: scores_pooled(between=nn.AvgPool2d(2)),
        lambda: nn.Sequential(body(), nn.Conv2d(80, 10, 3), nn.AdaptiveAvgPool2d(1)),
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)),  # no norm
        lambda: nn.Sequential(body(), Recurrent()),
        lambda: nn.Sequential(
            nn.Flatten(), nn.Linear(192, 16, bias=False), nn.BatchNorm1d(16), nn.Linear(16, 10)
        ),
    ],
)
def test_other_functions_are_shown_as_they_are(build: Callable[[], nn.Module]) -> None:
    graph = graph_of(build())
    view = shown(graph)
    assert [node.type for node in view.graph.nodes] == [node.type for node in graph.nodes]
    assert not view.refitted


def test_poolings_inside_a_network_stay_what_they_are() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.AvgPool2d(4), nn.Conv2d(16, 16, 3, 1, 1), nn.Flatten(), nn.Linear(16, 4)
    )
    graph = trace(model, example_input=IMAGES)
    assert len(graph.single) == 1
    assert [node.type for node in as_learned(graph).nodes].count("avg_pool") == 1


@pytest.mark.parametrize("padding", [0, 1])
def test_an_average_that_counts_padding_is_no_global_one(padding: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1), nn.AvgPool2d(8 + 2 * padding, padding=padding))
    assert bool(trace(model, example_input=IMAGES).single) == (padding == 0)


# Depthwise convolutions


def separable(*, norm: bool, gate: bool = False) -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(16, 16, 3, 1, 1, groups=16, bias=False)]
    layers += [nn.BatchNorm2d(16)] if norm else []
    layers += [nn.ReLU(), Gate(16)] if gate else [nn.ReLU()]
    last = nn.Conv2d(16, 80, 1, bias=False)
    first = (nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    ends = (nn.BatchNorm2d(80), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(80, 10))
    return nn.Sequential(nn.Sequential(*first), nn.Sequential(*layers), nn.Sequential(last, *ends))


class Gate(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(channels, 8, 1), nn.Conv2d(8, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.excite(self.squeeze(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


@pytest.mark.parametrize("gate", [False, True])
def test_norms_between_depthwise_convolutions_and_pointwise_ones_change_no_prediction(
    *, gate: bool, ghn: GHN
) -> None:
    mine, other = separable(norm=True, gate=gate), separable(norm=False, gate=gate)
    planned = plan(mine, ghn, scale="predicted")
    planned.apply()
    predict(other, ghn, scale="predicted")
    norm = mine.get_submodule("1.1")
    assert torch.equal(norm.get_parameter("weight"), torch.ones(16))
    assert not norm.get_parameter("bias").any()
    weights = [p for p in mine.parameters() if p is not norm.weight and p is not norm.bias]
    assert all(map(torch.equal, weights, other.parameters()))
    rows = {row.name: row for row in plan(mine, ghn).rows}  # by default, too, as in all known networks
    assert rows["2.1.weight"].action != "kept"
    assert (rows["1.1.weight"].rms, rows["1.1.bias"].rms) == (1, 0)


def test_a_norm_that_something_else_reads_is_shown() -> None:
    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm = nn.Conv2d(3, 16, 3, 1, 1), nn.BatchNorm2d(16)
            self.depthwise = nn.Conv2d(16, 16, 3, 1, 1, groups=16)
            self.last = nn.Conv2d(16, 10, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            return self.last(x + self.norm(self.depthwise(x)).relu())

    assert not {"norm.weight"} & shown(graph_of(Added())).neutral.keys()


# Images of other channels


@pytest.mark.parametrize("times", [2, 4])
@pytest.mark.parametrize("norm", ["", "batch", "instance", "instance, affine"])
def test_images_side_by_side_are_read_as_one_of_them(norm: str, times: int, ghn: GHN) -> None:
    norms: dict[str, Callable[[int], nn.Module]] = {
        "batch": nn.BatchNorm2d,
        "instance": nn.InstanceNorm2d,
        "instance, affine": lambda channels: nn.InstanceNorm2d(channels, affine=True),
    }

    def reading(channels: int) -> nn.Module:
        before = [norms[norm](channels)] if norm else []
        return nn.Sequential(*before, *usual(channels).children())

    one, several = (predict(reading(3 * n), ghn, scale="predicted") for n in (1, times))
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(several(x.repeat(1, times, 1, 1)), one(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("channels", [1, 2, 4, 5, 7, 12])
def test_filters_for_any_number_of_channels_are_predicted(channels: int, ghn: GHN) -> None:
    planned = plan(usual(channels), ghn, scale="predicted", strict=True)
    assert planned.rows[0].shape == (16, channels, 3, 3)
    values = dict(planned.tensors())["0.0.weight"]
    assert all(values[:, channel].any() for channel in range(channels))
    one = dict(plan(usual(3), ghn, scale="predicted").tensors())["0.0.weight"]
    if channels > 1:
        torch.testing.assert_close(values[:, 1], one[:, 1] * 3 / channels)


def test_an_instance_norm_of_the_images_makes_no_network_unknown(ghn: GHN) -> None:
    model = nn.Sequential(nn.InstanceNorm2d(3), *usual().children())
    rows = {row.name: row for row in plan(model, ghn).rows}
    assert {row.action for row in rows.values()} <= {"predicted", "tiled"}
    assert rows["1.0.weight"].rms is None  # at predicted scale


# Groups


def test_a_grouped_convolution_is_the_part_of_a_full_one_that_its_groups_read(ghn: GHN) -> None:
    def model(groups: int) -> nn.Sequential:
        middle = nn.Conv2d(16, 32, 3, 1, 1, groups=groups, bias=False)
        first = (nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        ends = (nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
        return nn.Sequential(*first, middle, *ends)

    grouped, full = (predict(model(groups), ghn, scale="predicted") for groups in (4, 1))
    for name, param in grouped.named_parameters():
        expected = full.get_parameter(name)
        if name == "3.weight":
            blocks = [expected[8 * g : 8 * g + 8, 4 * g : 4 * g + 4] for g in range(4)]
            expected = torch.cat(blocks) * 2
        torch.testing.assert_close(param, expected)
    assert {row.action for row in plan(model(4), ghn).rows} <= {"predicted", "tiled"}  # a known network


def test_grouped_networks_whose_branches_begin_silent_keep_their_scale(ghn: GHN) -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        middle = (nn.Conv2d(16, 32, 3, 1, 1, groups=4, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        return nn.Sequential(*list(body().children())[:3], *middle, nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def scales(*, silent: bool) -> set[bool]:
        network = nn.Sequential(model(), nn.Linear(32, 10))
        if silent:
            nn.init.zeros_(network.get_parameter("0.4.weight"))
        rows = plan(network, ghn, example_input=IMAGES).rows
        return {row.rms is None for row in rows if row.name == "0.0.weight"}

    assert scales(silent=False) == {True}
    assert scales(silent=True) == {False}


@given(
    groups=st.integers(1, 12), inputs=st.integers(1, 20), outputs=st.integers(1, 20),
    rows=st.integers(1, 64), columns=st.integers(1, 64),
)  # fmt: skip
def test_what_repeats_of_a_grouped_weight_is_all_of_it(
    groups: int, inputs: int, outputs: int, rows: int, columns: int
) -> None:
    values = torch.arange(rows * columns, dtype=torch.float32).view(rows, columns, 1, 1)
    shape = (groups * outputs, inputs, 1, 1)
    full = tile_to(values[None], (groups * outputs, groups * inputs, 1, 1))[0]
    parts = full.view(groups, outputs, groups, inputs)
    expected = torch.stack([parts[g, :, g] for g in range(groups)]).view(shape) * math.sqrt(groups)
    found = _in_groups(values, shape, groups * inputs)
    assert all(size <= limit for size, limit in zip(found.shape, shape, strict=True))
    assert torch.equal(tile_to(found[None], shape)[0], expected)


# Slopes


def test_slopes_that_are_learned_make_no_network_unknown(ghn: GHN) -> None:
    model = usual()
    sloped = copy.deepcopy(model)
    sloped[0][2] = nn.PReLU()  # type: ignore[index, operator]
    rows = {row.name: row for row in plan(sloped, ghn).rows}
    slope = rows.pop("0.2.weight")
    assert (slope.action, slope.reason) == ("kept", "no node type fits: slope of an activation")
    predict(sloped, ghn)
    assert sloped.get_parameter("0.2.weight") == 0.25

    def scales(entries: dict[str, Entry]) -> dict[str, bool]:
        return {name: entry.rms is None for name, entry in entries.items()}

    assert scales(rows) == scales({row.name: row for row in plan(model, ghn).rows})


def test_a_network_whose_hidden_layer_repeats_too_often_is_shown_with_its_norms(ghn: GHN) -> None:
    def model(*, norm: bool) -> nn.Module:
        ends = (nn.Linear(80, 4096), nn.ReLU(), nn.Linear(4096, 10))
        return nn.Sequential(*list(separable(norm=norm).children())[:-1], Ends(*ends))

    class Ends(nn.Module):
        def __init__(self, *ends: nn.Module) -> None:
            super().__init__()
            self.last, self.norm, self.ends = nn.Conv2d(16, 80, 1), nn.BatchNorm2d(80), nn.Sequential(*ends)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.ends(self.norm(self.last(x)).relu().mean((2, 3)))

    def directions(**options: Any) -> torch.Tensor:
        torch.manual_seed(0)
        values = dict(plan(model(norm=True), ghn, **options).tensors())["1.0.weight"]
        return values / values.norm()

    rows = {row.name: row for row in plan(model(norm=True), ghn).rows}
    assert rows["1.1.weight"].action == "kept"  # an unknown network's norms
    assert not torch.allclose(directions(), directions(scale="predicted"), atol=1e-4)
