"""`scale="auto"`: how much of a prediction is good for training, and running statistics that go with it."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ghn_init import (
    GHN,
    GHNConfig,
    OutOfDistributionWarning,
    calibrate_batchnorm,
    load,
    plan,
    predict,
    predict_to,
)
from ghn_init._hypernetwork.tile import Tile
from ghn_init._writing.entry import to_write
from ghn_init._writing.signals import (
    SAMPLES,
    SMOOTHNESS,
    Signal,
    _convolution,
    _pooled,
    _product,
    repeated,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture(scope="module")
def ghn() -> GHN:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(1)
        return GHN(GHNConfig.ghn2()).requires_grad_(False)


def block(inputs: int, outputs: int, kernel: int = 3, *, groups: int = 1, norm: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups)]
    return nn.Sequential(*layers, *([nn.BatchNorm2d(outputs)] if norm else []), nn.ReLU())


def classifier(width: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)]


def plain() -> nn.Module:
    return nn.Sequential(block(3, 16), block(16, 100, 1), block(100, 24), *classifier(24))


def shallow() -> nn.Module:
    return nn.Sequential(block(3, 16, norm=False), block(16, 24, norm=False), *classifier(24))


def deep_without_norm() -> nn.Module:
    return nn.Sequential(
        block(3, 16, norm=False), *(block(16, 16, norm=False) for _ in range(9)), *classifier(16)
    )


def residual_without_norm() -> nn.Module:
    blocks = (Residual(nn.Sequential(block(16, 16, norm=False), nn.Conv2d(16, 16, 1))) for _ in range(4))
    return nn.Sequential(block(3, 16, norm=False), *blocks, *classifier(16))


def tied_without_norm() -> nn.Module:
    twice = block(16, 16, norm=False)
    inner = (block(16, 16, norm=False) for _ in range(8))
    return nn.Sequential(block(3, 16, norm=False), twice, *inner, twice, *classifier(16))


class Residual(nn.Module):
    """Its branch added to its input."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x)


def wide_without_norm() -> nn.Module:
    inner = Residual(block(600, 600, 1, norm=False))
    return nn.Sequential(block(3, 600, 1, norm=False), inner, *classifier(600))


def depthwise() -> nn.Module:
    return nn.Sequential(block(3, 16), block(16, 16, groups=16), *classifier(16))


def separable(kernel: int = 3, dilation: int = 1) -> nn.Sequential:
    """As in DARTS' cells: no norm between a depthwise convolution and the one of 1 x 1."""
    padding = dilation * (kernel // 2)
    return nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(16, 16, kernel, padding=padding, dilation=dilation, groups=16, bias=False),
        nn.Conv2d(16, 16, 1, bias=False),
        nn.BatchNorm2d(16),
    )


class Attending(nn.Module):
    """Attention over pixels, as DeepNets-1M has it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.qkv = nn.Linear(16, 48, bias=False)
        self.out = nn.Linear(16, 16)
        self.norm2 = nn.LayerNorm(16)
        self.fc1, self.fc2 = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm(tokens)).unflatten(2, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        tokens = tokens + self.out(attended)
        tokens = tokens + self.fc2(nn.functional.gelu(self.fc1(self.norm2(tokens))))
        return tokens.transpose(1, 2).unflatten(2, x.shape[2:])


def cells() -> nn.Module:
    return nn.Sequential(block(3, 16), separable(), separable(5, 2), Attending(), *classifier(16))


def without_batch_norm() -> nn.Module:
    return nn.Sequential(block(3, 16, norm=False), Attending(), *classifier(16))


def pixelwise() -> nn.Module:
    return nn.Sequential(block(3, 16), nn.Conv2d(16, 10, 1))


def signals() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))


class Decoder(nn.Module):
    """A transposed convolution that a batch norm follows, and one that none follows."""

    def __init__(self) -> None:
        super().__init__()
        self.down = block(3, 16)
        self.up = nn.ConvTranspose2d(16, 8, 2, 2)
        self.norm = nn.BatchNorm2d(8)
        self.bare = nn.ConvTranspose2d(8, 8, 2, 2)
        self.last = nn.Conv2d(8, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.bare(self.norm(self.up(self.down(x))).relu()).relu())


def built(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build()


def with_predicted_scale(model: nn.Module, ghn: GHN, **options: object) -> set[str]:
    rows = plan(model, ghn, **options).rows  # type: ignore[arg-type]
    return {row.name for row in rows if row.tile is not None and row.rms is None}


def output(model: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad():
        return float(model.eval()(x).square().mean().sqrt())


def images(count: int = 64) -> torch.Tensor:
    """Smooth, as images are."""
    coarse = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return nn.functional.interpolate(coarse, (16, 16), mode="bilinear")


# How much is predicted


def wide_in_a_row() -> nn.Module:
    return nn.Sequential(block(3, 600, 1, norm=False), block(600, 600, norm=False), *classifier(600))


@pytest.mark.parametrize(("build", "layers"), [(deep_without_norm, 11), (wide_in_a_row, 3)])
def test_networks_without_norm_are_as_predicted_but_for_small_outputs(
    build: Callable[[], nn.Module], layers: int
) -> None:
    """However deep they are, and however often predictions repeat in them."""
    bundled = load("ghn3-cifar10").requires_grad_(False)
    model, x = built(build), images()
    before = output(model, x)
    whole = output(predict(built(build), bundled, scale="predicted"), x)
    planned = plan(model, bundled)
    factors = [row.factor for row in planned.rows if row.name.endswith("weight")]
    assert len(factors) == layers
    assert factors[:-1] == pytest.approx([factors[0]] * (layers - 1))
    assert factors[-1] >= 0.999 * factors[0]  # the classifier's, which makes up for what it reads
    after = output(planned.apply(), x)
    assert 0.1 * before < after < 10 * before
    assert after < 0.5 * whole


@pytest.mark.parametrize("build", [plain, shallow])
def test_networks_of_plain_convolutions_get_the_predicted_scales_and_norms(
    build: Callable[[], nn.Module], ghn: GHN
) -> None:
    model, whole = built(build), predict(built(build), ghn, scale="predicted")
    planned = plan(model, ghn)
    assert "predicted scale" in str(planned)
    assert planned.to_dict()["scale"] == "auto"
    planned.apply()
    for name, value in model.named_parameters():
        assert torch.equal(value, whole.get_parameter(name)), name


def test_norms_that_follow_no_convolution_are_kept_and_say_why(ghn: GHN) -> None:
    """As in DenseNets, where they read what is concatenated."""
    early = nn.Sequential(*block(3, 16), nn.MaxPool2d(2), nn.BatchNorm2d(16), block(16, 16), *classifier(16))
    found = {row.name: row.reason for row in plan(early, ghn).rows if row.action == "kept"}
    reason = "a norm that reads neither a convolution nor a sum (scale='auto')"
    assert found == dict.fromkeys(("4.weight", "4.bias"), reason)


def test_norms_that_follow_a_sum_are_predicted(ghn: GHN) -> None:
    """As in pre-activated ResNets."""
    inner = nn.Sequential(nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1))
    network = nn.Sequential(block(3, 16), Residual(inner), Residual(copy.deepcopy(inner)), *classifier(16))
    kept = {row.name for row in plan(network, ghn).rows if row.action == "kept"}
    assert not kept & {"2.inner.0.weight", "2.inner.0.bias"}


def test_norms_whose_weight_is_zero_are_predicted_in_networks_that_a_ghn_knows(ghn: GHN) -> None:
    """Branches that begin silent, as timm's ResNets do, would leave nothing of what is predicted in them."""
    network = nn.Sequential(block(3, 16), Residual(block(16, 16)[:2]), *classifier(16))
    with_ones = copy.deepcopy(network)
    nn.init.zeros_(network.get_parameter("1.inner.1.weight"))
    predict(network, ghn)
    predict(with_ones, ghn)
    assert network.get_parameter("1.inner.1.weight").all()
    for name, value in network.state_dict().items():
        assert torch.equal(value, with_ones.state_dict()[name]), name


@pytest.mark.parametrize(("groups", "options"), [(4, {}), (1, {"scale": "own"})])
def test_norms_whose_weight_is_zero_stay_silent_elsewhere_with_their_biases(
    ghn: GHN, groups: int, options: dict[str, Any]
) -> None:
    convolution = nn.Conv2d(16, 16, 3, padding=1, groups=groups, bias=False)
    branch = Residual(nn.Sequential(convolution, nn.BatchNorm2d(16)))
    network = nn.Sequential(block(3, 16), branch, *classifier(16))
    nn.init.zeros_(network.get_parameter("1.inner.1.weight"))
    reasons = {row.name: row.reason for row in plan(network, ghn, **options).rows}
    for name in ("1.inner.1.weight", "1.inner.1.bias"):
        if options:
            assert reasons[name].startswith("norm layer"), reasons[name]
        else:
            assert reasons[name] == "its norm layer begins at zero (kept unless scale='predicted')"
    predict(network, ghn, **options)
    x = images(2)[:, :1].repeat(1, 16, 1, 1)
    assert torch.equal(branch(x), x)


def test_a_bias_beside_a_weight_of_zeros_stays(ghn: GHN) -> None:
    """A spatial transformer begins with the identity so (Jaderberg et al. 2015, arXiv 1506.02025)."""
    model = nn.Sequential(block(3, 16), *classifier(16))
    last = model[-1]
    nn.init.zeros_(last.weight)
    nn.init.uniform_(last.bias)
    before = last.bias.detach().clone()
    rows = {row.name: row for row in plan(model, ghn).rows}
    assert rows["3.bias"].reason == "its layer's weight begins at zero (kept unless scale='predicted')"
    predict(model, ghn)
    assert torch.equal(last.bias, before)


def test_networks_of_darts_cells_get_the_predicted_scales_and_layer_norms(ghn: GHN) -> None:
    model, whole = built(cells), predict(built(cells), ghn, scale="predicted")
    planned = plan(model, ghn)
    kept = {row.name for row in planned.rows if row.action == "kept"}
    assert kept == set()
    planned.apply()
    for name, value in model.named_parameters():
        assert torch.equal(value, whole.get_parameter(name)), name


def test_statistics_behind_a_predicted_layer_norm_are_those_of_training(ghn: GHN) -> None:
    model, x = nn.Sequential(*list(built(cells))[:-3], separable(), *classifier(16)), images()
    predict(model, ghn)
    at_first = output(model, x)
    assert 0.5 < at_first / output(calibrate_batchnorm(model, [x]), x) < 2


def test_layer_norms_of_networks_at_their_own_scale_stay_as_they_were(ghn: GHN) -> None:
    wide = [nn.Conv2d(16, 600, 1), nn.ReLU(), nn.Conv2d(600, 600, 1), nn.ReLU()]
    copies = nn.Sequential(*list(built(cells))[:-3], *wide, *classifier(600))
    assert with_predicted_scale(copies, ghn) == set()
    for planned in (plan(copies, ghn), plan(built(cells), ghn, diversify="orthogonal")):
        assert {row.action for row in planned.rows if row.node == "ln"} == {"kept"}


def test_attention_without_batch_norms_keeps_its_own_scale(ghn: GHN) -> None:
    assert with_predicted_scale(built(cells), ghn)
    assert with_predicted_scale(built(without_batch_norm), ghn) == set()


@pytest.mark.parametrize("build", [wide_without_norm, depthwise, pixelwise])
def test_other_networks_keep_their_own_scale(build: Callable[[], nn.Module], ghn: GHN) -> None:
    example = (1, 3, 16, 16)
    model, own = (built(build) for _ in range(2))
    assert with_predicted_scale(model, ghn, example_input=example) == set()
    predict(model, ghn, example_input=example)
    predict(own, ghn, example_input=example, scale="own")
    classifier = plan(model, ghn, example_input=example).graph.nodes[-2].param
    for (name, a), b in zip(model.named_parameters(), own.parameters(), strict=True):
        assert torch.equal(a, b) or (name == classifier and a.square().sum() < b.square().sum()), name


def without_norm() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 3, 3))


def along_one_axis() -> nn.Module:
    return nn.Sequential(nn.Conv1d(8, 16, 3), nn.BatchNorm1d(16), nn.ReLU(), nn.Flatten(), nn.Linear(96, 10))


OTHER_WIDTH = "classifier of width 3; the GHN was trained for 10 (head='predict' forces it)"
NO_NORM = "no batch norm takes its scale out of what it gives (scale='auto')"
LATE = "it is behind the first third of a network whose branches meet (scale='auto')"
NO_IMAGES = "its network reads no images (scale='auto')"


@pytest.mark.parametrize(
    ("build", "example", "reason"),
    [
        (residual_without_norm, (1, 3, 16, 16), NO_NORM),
        (tied_without_norm, (1, 3, 16, 16), NO_NORM),
        (without_norm, (1, 3, 16, 16), NO_NORM),
        (signals, (2, 8), NO_IMAGES),
        (along_one_axis, (1, 8, 8), NO_IMAGES),
    ],
)
def test_networks_that_predictions_would_do_no_good_stay_as_they_are_and_that_is_told(
    build: Callable[[], nn.Module], example: tuple[int, ...], reason: str, ghn: GHN
) -> None:
    model, meta = built(build), built(build).to("meta")
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(OutOfDistributionWarning, match=r"nothing is predicted.*scale='own'"):
        planned = plan(model, ghn, example_input=example)
    assert {row.reason for row in planned.rows if row.node == "conv"} <= {reason, OTHER_WIDTH}
    assert planned.apply() is model
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert to_write(plan(model, ghn, example_input=example, scale="own").rows)
    with pytest.warns(OutOfDistributionWarning, match="nothing is predicted"):
        predict(meta, ghn, example_input=example)
    assert not any(value.is_meta for value in meta.state_dict().values())
    assert all(value.std() > 0 for name, value in meta.named_parameters() if name == "0.weight")


def test_where_branches_meet_the_first_third_of_an_unknown_network_is_predicted(ghn: GHN) -> None:
    def reasons(network: nn.Module) -> dict[str, str]:
        rows = plan(network, ghn, example_input=(1, 3, 16, 16)).rows
        return {row.name: row.reason for row in rows if row.node in ("conv", "sep_conv")}

    def spatial() -> nn.Module:
        return nn.Sequential(nn.Conv2d(16, 16, 5, padding=2, groups=16), nn.ReLU(), nn.BatchNorm2d(16))

    layers = [block(3, 16), Residual(spatial()), block(16, 16), Residual(spatial()), block(16, 16)]
    meeting = built(lambda: nn.Sequential(*layers, *classifier(16)))
    alone = built(lambda: nn.Sequential(*(getattr(x, "inner", x) for x in layers), *classifier(16)))
    names = ("0.0", "1.inner.0", "2.0", "3.inner.0", "4.0", "7")
    assert list(reasons(meeting).values()) == ["", "", LATE, LATE, LATE, ""]
    assert list(reasons(meeting)) == [f"{name}.weight" for name in names]
    assert set(reasons(alone).values()) == {""}


def test_classifiers_are_predicted_in_unknown_networks_with_batch_norms_alone(ghn: GHN) -> None:
    def reasons(network: nn.Module) -> set[str]:
        return {row.reason for row in plan(network, ghn).rows if row.key == "head.weight"}

    class Enlarging(nn.Module):
        def __init__(self, norm: nn.Module) -> None:
            super().__init__()
            self.stem, self.up = nn.Conv2d(3, 16, 3, padding=1), nn.ConvTranspose2d(16, 16, 2, 2)
            self.norm, self.head = norm, nn.Linear(16, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.norm(self.up(self.stem(x))).relu().mean((2, 3)))

    assert reasons(built(lambda: Enlarging(nn.BatchNorm2d(16)))) == {""}
    assert reasons(built(lambda: Enlarging(nn.Identity()))) == {NO_NORM}


def test_a_parameter_that_no_node_stands_for_makes_a_network_unknown(ghn: GHN) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = built(plain)
            self.gain = nn.Parameter(torch.full((3, 1, 1), 0.5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(self.gain * x)

    assert with_predicted_scale(built(plain), ghn)
    assert not with_predicted_scale(Scaled(), ghn)


def test_a_network_for_other_classes_is_predicted_alike_but_for_its_classifier(ghn: GHN) -> None:
    ends = {f"{len(built(plain)) - 1}.{name}" for name in ("weight", "bias")}
    predicted = with_predicted_scale(built(plain), ghn)
    assert ends < predicted
    others = nn.Sequential(*built(plain)[:-1], nn.Linear(24, 7))
    for network, head in ((built(plain), "keep"), (others, "auto")):
        assert with_predicted_scale(network, ghn, head=head) == predicted - ends
        assert {row.name for row in plan(network, ghn, head=head).rows if row.action == "kept"} == ends


def test_late_weights_before_batch_norms_are_no_larger_than_their_own(ghn: GHN) -> None:
    """So that they turn as fast; the first third of them, and what no batch norm follows, is as predicted."""

    def deep(factor: float) -> nn.Module:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(3)
            model = nn.Sequential(block(3, 32), *(block(32, 32) for _ in range(5)), *classifier(32))
        for index in range(6):
            model.get_parameter(f"{index}.0.weight").data.mul_(factor)
        return model

    small, large = ({row.name: row for row in plan(deep(by), ghn).rows} for by in (1e-4, 1e4))
    assert not any(row.rms for row in large.values())
    assert {name for name, row in small.items() if row.rms} == {f"{i}.0.weight" for i in range(2, 6)}
    model = predict(deep(1e-4), ghn)
    for index in range(2, 6):
        own, now = (
            network.get_parameter(f"{index}.0.weight").detach().square().mean()
            for network in (deep(1e-4), model)
        )
        assert now.item() == pytest.approx(own.item(), rel=1e-2)
    first = copy.deepcopy(model.state_dict())
    predict(model, ghn)
    assert all(torch.equal(value, first[name]) for name, value in model.state_dict().items())


def test_smaller_late_weights_give_the_same_function(ghn: GHN) -> None:
    model, x = built(plain), images()
    for name in ("1.0.weight", "2.0.weight"):
        model.get_parameter(name).data.mul_(0.1)
    rows = {row.name: row for row in plan(model, ghn, exclude="5.*").rows}
    assert {name for name, row in rows.items() if row.rms} == {"1.0.weight", "2.0.weight"}
    whole = predict(copy.deepcopy(model), ghn, scale="predicted", exclude="5.*")
    torch.testing.assert_close(predict(model, ghn, exclude="5.*")(x), whole(x), rtol=1e-2, atol=1e-2)


def test_orthogonal_weights_have_no_use_for_the_predicted_scale(ghn: GHN) -> None:
    assert with_predicted_scale(built(plain), ghn, diversify="noise")
    planned = plan(built(plain), ghn, diversify="orthogonal")
    assert all(row.rms is not None for row in planned.rows if row.tile is not None)
    assert not planned.statistics


def test_a_bare_transposed_convolution_is_kept_and_says_why(ghn: GHN) -> None:
    reasons = {row.name: row.reason for row in plan(built(Decoder), ghn).rows}
    assert reasons["bare.weight"] == "a transposed convolution without batch norm (scale='auto')"
    assert reasons["up.weight"] == ""
    assert {row.name: row.reason for row in plan(built(Decoder), ghn, scale="own").rows}["bare.weight"] == ""


class SkipConnected(nn.Module):
    """A U-Net of one level, whose image may be enlarged before the network reads it."""

    def __init__(self, up: nn.Module, *, images: float = 1) -> None:
        super().__init__()
        self.images, self.left, self.bottom, self.up = images, block(3, 8), block(8, 16), up
        self.joined = nn.Sequential(block(16, 8), block(8, 8))
        self.last = nn.Conv2d(8, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left = self.left(nn.functional.interpolate(x, scale_factor=self.images))
        up = self.up(self.bottom(nn.functional.max_pool2d(left, 2)))
        return self.last(self.joined(torch.cat([up, left], 1)))


@pytest.mark.parametrize(
    ("up", "bare"),
    [
        (lambda: nn.Sequential(nn.ConvTranspose2d(16, 8, 2, 2), nn.BatchNorm2d(8)), {"up.0.weight"}),
        (lambda: nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(16, 8, 1)), {"up.1.weight"}),
        (lambda: nn.Sequential(nn.Conv2d(16, 32, 1), nn.PixelShuffle(2)), {"up.0.weight"}),
    ],
)
@pytest.mark.parametrize("enlarged", [1, 2])
def test_what_is_behind_a_skip_connection_to_a_decoder_is_kept_and_says_why(
    up: Callable[[], nn.Module], bare: set[str], enlarged: float, ghn: GHN
) -> None:
    rows = plan(built(lambda: SkipConnected(up(), images=enlarged)), ghn).rows
    weights = {row.name: row.reason for row in rows if row.node == "conv"}
    behind = {
        name
        for name, why in weights.items()
        if why == "it is behind a skip connection to a decoder (scale='auto')"
    }
    assert behind == {"joined.0.0.weight", "joined.1.0.weight"}
    assert {name for name, why in weights.items() if why in (NO_NORM, LATE)} == bare
    assert {name for name, why in weights.items() if why} == {*behind, *bare, "last.weight"}


def test_joins_without_a_decoder_and_decoders_without_a_join_are_predicted(ghn: GHN) -> None:
    kept = {row.name: row.reason for row in plan(built(Branched), ghn).rows if row.node == "conv"}
    assert not {why for why in kept.values() if "decoder" in why}
    decoder = nn.Sequential(block(3, 16), nn.Upsample(scale_factor=2), block(16, 8), nn.Conv2d(8, 3, 1))
    assert [row.name for row in plan(decoder, ghn).rows if row.node == "conv" and row.reason] == ["3.weight"]


def test_gates_are_kept_and_say_why(ghn: GHN) -> None:
    rows = [row for row in plan(built(gated), ghn).rows if row.reason == "it is a gate (scale='auto')"]
    assert [row.name for row in rows] == [
        f"1.{layer}.{name}" for layer in ("squeeze", "excite") for name in ("weight", "bias")
    ]
    planned = plan(built(gated), ghn, scale="own")
    assert {row.reason for row in planned.rows if row.name == "1.squeeze.weight"} == {""}


class Biased(nn.Module):
    """A network with or without biases before batch norms, some of them with more than a norm in between."""

    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=bias), nn.BatchNorm2d(16), nn.ReLU())
        self.late = nn.Sequential(
            nn.Conv2d(16, 32, 3, 1, 1, bias=bias), nn.ReLU(), nn.MaxPool2d(2), nn.BatchNorm2d(32)
        )
        self.left, self.right = (nn.Conv2d(32, 32, 1, bias=bias) for _ in range(2))
        self.norm = nn.BatchNorm2d(32)
        self.bare = nn.Conv2d(32, 32, 3, 1, 1)
        self.hidden = nn.Sequential(nn.Linear(32, 24, bias=bias), nn.BatchNorm1d(24), nn.ReLU())
        self.head = nn.Linear(24, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.late(self.stem(x))
        x = self.norm(self.left(x) + self.right(x)).relu()
        return self.head(self.hidden((x + self.bare(x)).mean((2, 3))))


BEFORE_NORMS = {f"{name}.bias" for name in ("stem.0", "late.0", "left", "right", "hidden.0")}


@pytest.mark.parametrize("options", [{}, {"scale": "own"}, {"scale": "predicted"}, {"diversify": "noise"}])
def test_biases_before_batch_norms_are_zero_and_change_no_prediction(
    options: dict[str, Any], ghn: GHN
) -> None:
    bare, biased = Biased(bias=False), Biased(bias=True)
    biased.load_state_dict(bare.state_dict(), strict=False)
    planned = plan(biased, ghn, strict=True, **options)
    assert {row.name for row in planned.rows if row.rms == 0} == BEFORE_NORMS
    planned.apply()
    predict(bare, ghn, **options)
    assert not any(biased.get_parameter(name).any() for name in BEFORE_NORMS)
    wanted = dict(bare.named_parameters())
    found = {name: param for name, param in biased.named_parameters() if name not in BEFORE_NORMS}
    assert {name for name, param in found.items() if not torch.equal(param, wanted[name])} == set()


def test_biases_before_batch_norms_alone_can_be_predicted(ghn: GHN) -> None:
    model = Biased(bias=True)
    before = {name: param.clone() for name, param in model.named_parameters()}
    predict(model, ghn, include="stem.0.bias")
    changed = {name for name, param in model.named_parameters() if not torch.equal(param, before[name])}
    assert changed == {"stem.0.bias"}
    assert not model.stem[0].bias.any()


def test_biases_before_batch_norms_of_a_meta_model_are_zero(ghn: GHN) -> None:
    with torch.device("meta"):
        model = Biased(bias=True)
    predict(model, ghn)
    assert not any(model.get_parameter(name).any() for name in BEFORE_NORMS)


def test_running_statistics_know_biases_that_are_kept(ghn: GHN) -> None:
    model = built(lambda: Biased(bias=True))
    nn.init.constant_(model.get_parameter("stem.0.bias"), 5.0)
    predict(model, ghn, exclude="*.bias")
    assert 4 < float(model.get_buffer("stem.1.running_mean").mean()) < 6


def group_norms(groups: int = 4, **options: Any) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 16), (16, 32), (32, 24)):
        layers += [nn.Conv2d(inputs, outputs, 3, 1, 1, **options), nn.GroupNorm(groups, outputs), nn.ReLU()]
    return nn.Sequential(*layers, *classifier(24))


NORMS = {f"{index}.{name}" for index in (1, 4, 7) for name in ("weight", "bias")}


def test_group_norms_are_predicted_like_batch_norms(ghn: GHN) -> None:
    grouped, batched = group_norms(bias=False), group_norms(bias=False)
    for index, layer in enumerate(batched):
        if isinstance(layer, nn.GroupNorm):
            batched[index] = nn.BatchNorm2d(layer.num_channels)
    whole = predict(batched, ghn, scale="predicted")
    for name, param in predict(copy.deepcopy(grouped), ghn, scale="predicted").named_parameters():
        assert torch.equal(param, whole.get_parameter(name)), name
    planned = plan(grouped, ghn)
    rows = {row.name: row for row in planned.rows}
    assert {row.action for row in rows.values()} == {"predicted"}
    assert {row.name for row in rows.values() if row.node == "ln"} == NORMS
    assert {name for name, row in rows.items() if row.rms is None} >= {"0.weight", *NORMS}
    assert not planned.statistics
    assert {planned.graph.nodes[index].type for index in planned.graph.grouped} == {"ln"}


def test_group_norms_before_a_kept_classifier_stay_and_weights_keep_their_scale(ghn: GHN) -> None:
    rows = {row.name: row for row in plan(group_norms(bias=False), ghn, head="keep").rows}
    kept = {name for name, row in rows.items() if row.action == "kept"}
    assert kept == {*NORMS, "11.weight", "11.bias"}
    assert all(row.rms is not None for name, row in rows.items() if name not in kept)


@pytest.mark.parametrize(
    "layers",
    [
        lambda: [nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 3, 3)],  # no classifier
        lambda: [nn.Conv2d(3, 16, 3), nn.InstanceNorm2d(16, affine=True), nn.ReLU(), *classifier(16)],
        lambda: [nn.Conv2d(3, 16, 3), nn.GroupNorm(16, 16), nn.ReLU(), *classifier(16)],
    ],
)
def test_other_norms_of_single_images_are_no_batch_norms(
    layers: Callable[[], list[nn.Module]], ghn: GHN
) -> None:
    model = nn.Sequential(*layers())
    assert {row.action for row in plan(model, ghn, example_input=(1, 3, 8, 8)).rows} == {"kept"}


def test_a_batch_norm_of_the_images_changes_no_prediction(ghn: GHN) -> None:
    alone = built(plain)
    model = nn.Sequential(nn.BatchNorm2d(3), *copy.deepcopy(alone))
    norm = model.get_submodule("0")
    nn.init.constant_(norm.get_parameter("weight"), 0.7)
    for scale, weight in (("auto", 0.7), ("predicted", 1.0)):
        predict(alone, ghn, scale=scale)  # type: ignore[arg-type]
        predict(model, ghn, scale=scale)  # type: ignore[arg-type]
        for mine, other in zip(list(model)[1:], alone, strict=True):
            assert all(map(torch.equal, mine.parameters(), other.parameters()))
        assert torch.equal(norm.get_parameter("weight"), torch.full((3,), weight))
        assert not norm.get_parameter("bias").any()


@pytest.mark.parametrize("norm_of_images", [False, True])
def test_filters_of_grey_images_are_those_of_the_same_image_in_three_channels(
    *, norm_of_images: bool, ghn: GHN
) -> None:
    def reading(channels: int) -> nn.Module:
        first = [nn.BatchNorm2d(channels)] if norm_of_images else []
        return nn.Sequential(*first, block(channels, 100), block(100, 16), *classifier(16))

    grey, coloured = (predict(reading(channels), ghn, scale="predicted") for channels in (1, 3))
    x = torch.randn(4, 1, 8, 8)
    torch.testing.assert_close(grey(x), coloured(x.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4)
    assert {row.action for row in plan(reading(1), ghn).rows if row.node == "conv"} <= {"predicted", "tiled"}


def test_a_weight_that_reads_grey_images_and_another_map_is_shown_as_it_is(ghn: GHN) -> None:
    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 3, 1, 1, bias=False)
            self.last = nn.Sequential(nn.BatchNorm2d(1), *classifier(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.conv(self.conv(x)))

    assert plan(Again(), ghn, scale="predicted").rows[0].tile is not None


FLATTENED = 32 * 4 * 4


@pytest.mark.parametrize(
    ("end", "kept"),
    [
        ([nn.Flatten(), nn.Linear(FLATTENED, 24), nn.BatchNorm1d(24), nn.ReLU()], "hidden, norm"),
        ([nn.Flatten(), nn.Linear(FLATTENED, 24, bias=False), nn.ReLU(), nn.BatchNorm1d(24)], "hidden, norm"),
        ([nn.Flatten(), nn.Linear(FLATTENED, 24), nn.BatchNorm1d(24, affine=False), nn.ReLU()], "hidden"),
        ([nn.Flatten(), nn.Linear(FLATTENED, 24), nn.ReLU()], ""),
        ([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 24), nn.BatchNorm1d(24), nn.ReLU()], ""),
        ([nn.Conv2d(32, 24, 4), nn.BatchNorm2d(24), nn.Flatten()], ""),
    ],
)  # fmt: skip
def test_a_layer_over_all_places_before_a_norm_is_kept_with_it_and_says_why(
    end: list[nn.Module], kept: str, ghn: GHN
) -> None:
    net = nn.Sequential(block(3, 16), nn.MaxPool2d(2), block(16, 32), *end, nn.Linear(24, 10))
    rows = {row.name: row.reason for row in plan(net, ghn, example_input=(1, 3, 8, 8)).rows}
    hidden = {name for name, why in rows.items() if why.startswith("a norm follows it, and it reads all")}
    norm = {name for name, why in rows.items() if why.startswith("a norm of a layer that reads all places")}
    paths = [f"{len(net) - 1 - len(end) + place}" for place in range(len(end))]
    parameters = {
        kind: {f"{path}.{name}" for path, layer in zip(paths, end, strict=True) if isinstance(layer, kind)
               for name, _ in layer.named_parameters()}
        for kind in (nn.Linear, nn.BatchNorm1d)
    }  # fmt: skip
    assert hidden == (parameters[nn.Linear] if "hidden" in kept else set())
    assert norm == (parameters[nn.BatchNorm1d] if "norm" in kept else set())
    whole = plan(net, ghn, example_input=(1, 3, 8, 8), scale="predicted")
    assert not any(row.reason for row in whole.rows)


def test_what_is_one_pixel_wide_is_kept_behind_filters_and_says_why(ghn: GHN) -> None:
    def kept(network: nn.Module, size: int) -> set[str]:
        rows = plan(network, ghn, example_input=(1, 3, size, size)).rows
        return {
            row.name for row in rows if row.reason == "its feature maps are one pixel wide (scale='auto')"
        }

    def network(groups: int) -> nn.Module:
        layers = [nn.MaxPool2d(8), block(3, 16, 1), block(16, 16, groups=groups), block(16, 24, 1)]
        return nn.Sequential(*layers, *classifier(24))

    names = {f"{layer}.0.{name}" for layer in (2, 3) for name in ("weight", "bias")}
    assert kept(built(lambda: network(16)), 8) == names
    assert kept(built(lambda: network(16)), 16) == set()
    assert kept(built(lambda: network(1)), 8) == set()


def test_what_reads_a_layer_norm_or_the_input_before_it_is_kept_and_says_why(ghn: GHN) -> None:
    first, second, third, fourth = (nn.Conv2d(*width, 1) for width in ((3, 16), *[(16, 16)] * 3))
    layers = [first, nn.GELU(), second, nn.GroupNorm(16, 16), third, nn.GELU(), fourth, nn.GELU()]
    pooled = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)]
    planned = plan(nn.Sequential(*layers, *pooled), ghn, strict=True)
    reasons = {row.name: row.reason for row in planned.rows if row.node != "ln"}
    layers_kept = {
        "0": "it reads the input of a network with layer norms (scale='auto')",
        "2": NO_NORM,
        "4": "it reads a layer norm (scale='auto')",
        "6": NO_NORM,
        "10": NO_NORM,
    }
    assert reasons == {
        f"{path}.{name}": why for path, why in layers_kept.items() for name in ("weight", "bias")
    }


def gated() -> nn.Module:
    return nn.Sequential(block(3, 16), Inverted(16, 64), block(16, 400, 1), *classifier(400))


def test_a_classifier_of_many_copies_gives_no_larger_outputs_than_its_own_in_known_networks() -> None:
    def built(width: int) -> nn.Module:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(3)
            return nn.Sequential(block(3, 64), block(64, width), *classifier(width))

    for width, reduced in ((256, False), (1024, True)):
        network = built(width)
        rows = {row.name: row for row in plan(network, example_input=images(2)).rows}
        assert rows["0.0.weight"].rms is None  # at predicted scale
        assert (rows["4.weight"].rms is not None) == reduced
        own = output(calibrate_batchnorm(network, [images()]).eval(), images())
        predicted = predict(built(width), example_input=images(2))
        got = output(calibrate_batchnorm(predicted, [images()]).eval(), images())
        assert not reduced or got < 2 * own


def test_classifiers_of_unknown_networks_give_outputs_no_larger_than_their_own(tmp_path: Path) -> None:
    """With the bundled weights, whose classifier agrees with the features that it reads."""
    x = images()
    usual = output(calibrate_batchnorm(built(gated), [x]), x)
    own, auto = (calibrate_batchnorm(predict(built(gated), scale=scale), [x]) for scale in ("own", "auto"))
    assert output(own, x) > 1.5 * usual
    assert output(auto, x) < 1.4 * usual
    head, before = auto[-1].weight, own[-1].weight
    torch.testing.assert_close(head * (before.norm() / head.norm()), before)
    predict_to(built(gated), tmp_path / "disk")
    assert torch.equal(load_file(tmp_path / "disk" / "model.safetensors")[f"{len(auto) - 1}.weight"], head)


# Classifiers and layers that are used again


class Rectified(nn.Module):
    """Its classes' scores go through an activation, as SqueezeNet's."""

    def __init__(self, *, pooled: bool = True) -> None:
        super().__init__()
        self.features, self.end, self.pooled = (
            nn.Sequential(block(3, 32), block(32, 64)),
            nn.Conv2d(64, 10, 1),
            pooled,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.end(self.features(x))
        return (x.relu() if self.pooled else x).mean((2, 3))


def test_classes_that_an_activation_could_silence_are_kept() -> None:
    rows = {row.name: row for row in plan(built(Rectified)).rows}
    assert "go through an activation" in rows["end.weight"].reason
    assert rows["end.bias"].action == "kept"
    assert rows["features.1.0.weight"].action == "predicted"
    for plain in (plan(built(lambda: Rectified(pooled=False))), plan(built(Rectified), head="predict")):
        assert {row.name: row for row in plain.rows}["end.weight"].action == "predicted"


class Again(nn.Module):
    """One convolution, so many times."""

    def __init__(self, times: int, *, norm: bool = False) -> None:
        super().__init__()
        self.first, self.again, self.times = block(3, 32, norm=norm), block(32, 32, norm=norm), times
        self.end = nn.Sequential(*classifier(32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for _ in range(self.times):
            x = self.again(x)
        return self.end(x)


def test_a_weight_that_reads_what_it_gives_needs_a_norm() -> None:
    def predicted(model: nn.Module) -> bool:
        return any(row.tile is not None for row in plan(model, example_input=(1, 3, 32, 32)).rows)

    assert predicted(Again(1))
    assert not predicted(Again(2))
    assert predicted(Again(6, norm=True))


# Running statistics


def residuals() -> nn.Module:
    return nn.Sequential(block(3, 32), *(block(32, 32) for _ in range(6)), block(32, 150), *classifier(150))


class Inverted(nn.Module):
    """A depthwise convolution between two pointwise ones, gated, without an activation at its end."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.expand, self.depthwise = block(width, inner, 1), block(inner, inner, groups=inner)
        self.expand[2], self.depthwise[2] = nn.ReLU6(), nn.Hardswish()
        self.squeeze, self.excite = nn.Conv2d(inner, 8, 1), nn.Conv2d(8, inner, 1)
        self.project = nn.Sequential(nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.depthwise(self.expand(x))
        gate = self.excite(self.squeeze(h.mean((2, 3), keepdim=True)).relu())
        return x + self.project(h * nn.functional.hardsigmoid(gate))


def inverted() -> nn.Module:
    """As MobileNets are initialised, by the number of outputs: next to nothing from depthwise filters."""
    network = nn.Sequential(block(3, 24), *(Inverted(24, 96) for _ in range(4)), *classifier(24))
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
    return network


def narrow() -> nn.Module:
    """What a MobileNet is at 32 x 32 pixels: images end up one pixel wide, and the `eps` of norms counts."""
    layers = [nn.AvgPool2d(16), block(3, 24, 1)]
    for _ in range(4):
        layers += [block(24, 96, 1), block(96, 96, 5, groups=96), block(96, 24, 1)]
    network = nn.Sequential(*layers, *classifier(24))
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-3
    return network


class Shuffled(nn.Module):
    """A ShuffleNet's unit, which leaves half of the channels alone, then one that halves the image."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(block(width // 2, width // 2, 1), self.depthwise(width // 2, 1))
        self.left = self.depthwise(width, 2)
        self.right = nn.Sequential(block(width, width, 1), self.depthwise(width, 2))

    @staticmethod
    def depthwise(width: int, stride: int) -> nn.Module:
        filters = nn.Conv2d(width, width, 3, stride, 1, groups=width)
        return nn.Sequential(filters, nn.BatchNorm2d(width), block(width, width, 1))

    @staticmethod
    def shuffled(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.cat((x, y), 1).unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            a, b = x.chunk(2, dim=1)
            x = self.shuffled(a, self.body(b))
        return self.shuffled(self.left(x), self.right(x))


def shuffled() -> nn.Module:
    return nn.Sequential(block(3, 24), Shuffled(24), Shuffled(48), block(96, 200, 1), *classifier(200))


def enlarging() -> nn.Module:
    return SkipConnected(nn.Sequential(nn.ConvTranspose2d(16, 8, 2, 2), nn.BatchNorm2d(8)))


def mixing() -> nn.Module:
    """A ConvMixer: each GELU is before its norm, so that channels that a ReLU would silence still vary."""

    def normed(*convolution: int, groups: int = 1) -> nn.Sequential:
        filters = nn.Conv2d(*convolution, padding=2 if groups > 1 else 0, groups=groups)
        return nn.Sequential(filters, nn.GELU(), nn.BatchNorm2d(64))

    layers = [normed(3, 64, 2, 2)]
    for _ in range(4):
        layers += [Residual(normed(64, 64, 5, groups=64)), normed(64, 64, 1)]
    return nn.Sequential(*layers, *classifier(64))


class DualPath(nn.Module):
    """Cuts what it makes: some channels are added, the others joined to those before (arXiv 1707.01629)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*block(3, 64))
        widths = range(64, 64 + 8 * 16, 16)
        self.units = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 80, 3, padding=1))
            for width in widths
        )
        self.end = nn.Sequential(nn.BatchNorm2d(192), nn.ReLU(), *classifier(192))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        added = self.stem(x)
        joined = added[:, :0]
        for unit in self.units:
            h = unit(torch.cat((added, joined), 1))
            added, joined = added + h[:, :64], torch.cat((joined, h[:, 64:]), 1)
        return self.end(torch.cat((added, joined), 1))


class CrossStages(nn.Module):
    """Half of the channels goes through residual blocks, then beside the other half (arXiv 1911.11929)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*block(3, 64))
        self.units = nn.ModuleList(
            nn.ModuleList(nn.Sequential(*block(32, 32), *block(32, 32)[:2]) for _ in range(3))
            for _ in range(3)
        )
        self.joins = nn.ModuleList(nn.Sequential(*block(64, 64)) for _ in range(3))
        self.end = nn.Sequential(*classifier(64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for units, join in zip(self.units, self.joins, strict=True):
            kept, h = x.chunk(2, dim=1)
            for unit in units:
                h = torch.relu(h + unit(h))
            x = join(torch.cat((h, kept), 1))
        return self.end(x)


def bare() -> nn.Module:
    """Batch norms without parameters."""
    layers = [
        (nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o, affine=False), nn.ReLU())
        for i, o in ((3, 32), (32, 32), (32, 48), (48, 48), (48, 100), (100, 100))
    ]
    return nn.Sequential(*(layer for three in layers for layer in three), *classifier(100))


@pytest.mark.parametrize(
    ("build", "most"),
    [
        (residuals, 4), (inverted, 7), (narrow, 4), (shuffled, 4), (enlarging, 4), (mixing, 10),
        (DualPath, 4), (CrossStages, 3), (bare, 3),
    ],
)  # fmt: skip
def test_evaluation_mode_gives_outputs_of_the_size_that_training_mode_gives(
    build: Callable[[], nn.Module], most: float
) -> None:
    """With the bundled weights, whose filters are alike."""
    x = images()
    model = built(build)
    planned = plan(model, example_input=x[:1])
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert f"running statistics of {norms} batch norms: from the weights" in str(planned)
    assert planned.to_dict()["statistics"] == list(planned.statistics)
    found = output(planned.apply(), x)
    assert found / most < output(calibrate_batchnorm(model, [x]), x) < found * most


def test_batch_norms_without_parameters_keep_statistics_of_kept_weights(ghn: GHN) -> None:
    assert not plan(built(bare), ghn, exclude="*").statistics
    seen = calibrate_batchnorm(built(bare), [images()])
    told = plan(seen, ghn, include="0.weight").statistics
    assert {name.split(".")[0] for name in told} == {"1"}


def test_a_branch_that_begins_at_zero_adds_nothing_to_the_statistics(ghn: GHN) -> None:
    class Branch(nn.Module):
        def __init__(self, weight: float) -> None:
            super().__init__()
            self.first, self.branch = block(3, 16), nn.Sequential(*block(16, 16)[:2])
            self.last = nn.Sequential(*block(16, 16), *classifier(16))
            nn.init.constant_(self.branch[1].weight, weight)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.first(x)
            return self.last(h + self.branch(h))

    nothing, next_to_nothing, something = (
        plan(built(lambda weight=weight: Branch(weight)), ghn, exclude="branch.1.*").statistics[
            "last.1.running_var"
        ]
        for weight in (0.0, 1e-6, 1.0)
    )
    torch.testing.assert_close(nothing, next_to_nothing, rtol=1e-3, atol=0)
    assert something.mean() > 1.2 * nothing.mean()


def test_the_norms_own_weight_counts(ghn: GHN) -> None:
    def scaled(factor: float) -> nn.Module:
        model = built(plain)
        with torch.no_grad():
            model.get_parameter("0.1.weight").copy_(factor * torch.arange(1, 17))
        return model

    one, ten = (plan(scaled(by), ghn, exclude="*.1.*").statistics["1.1.running_var"] for by in (1.0, 10.0))
    torch.testing.assert_close(ten, 100 * one)


@pytest.mark.parametrize("width", [48, 100])
def test_predicted_norms_count_as_their_values_do_once_written(width: int, ghn: GHN) -> None:
    """Whose blocks repeat with the convolution's, or not: 64 of 100."""
    model = built(lambda: nn.Sequential(block(3, 64), block(64, width), block(width, 16), *classifier(16)))
    first = plan(model, ghn).apply()
    found = {name: value.clone() for name, value in first.named_buffers() if "running" in name}
    again = plan(model, ghn, exclude=["*.1.weight", "*.1.bias"])  # as they are now
    assert {row.action for row in again.rows if row.node == "bn"} == {"kept"}
    for name, value in again.statistics.items():
        torch.testing.assert_close(value, found[name])


def test_the_norms_eps_counts(ghn: GHN) -> None:
    def damped(eps: float) -> nn.Module:
        model = built(plain)
        model.get_submodule("0.1").eps = eps
        return model

    one, hundredth = (plan(damped(eps), ghn).statistics["1.1.running_var"] for eps in (1e6, 1e8))
    torch.testing.assert_close(one, 100 * hundredth, rtol=1e-2, atol=0)


def test_a_kept_bias_is_in_the_mean_that_a_norm_gets(ghn: GHN) -> None:
    model = built(plain)
    bias = torch.arange(1.0, 101)
    with torch.no_grad():
        model.get_parameter("1.0.bias").copy_(bias)
    statistics = plan(model, ghn, exclude="1.0.*").statistics
    torch.testing.assert_close(statistics["1.1.running_mean"], bias, rtol=0.1, atol=1)
    assert statistics["1.1.running_var"].mean() < 10


@pytest.mark.parametrize(
    ("groups", "rows", "columns", "taps"),
    [(1, 5, 3, 9), (3, 4, 2, 9), (6, 1, 1, 25), (6, 2, 1, 9), (1, 4, 3, 90)],
)
@pytest.mark.parametrize("cropped", [False, True])
def test_a_kernels_places_see_what_other_samples_have(
    groups: int, rows: int, columns: int, taps: int, *, cropped: bool
) -> None:
    mask = (torch.rand(SAMPLES, taps) < 0.3).float() if cropped else torch.ones(SAMPLES, taps)
    values, kernels = torch.randn(SAMPLES, groups, columns), torch.randn(groups, rows, columns, taps)
    varied = values - values.mean(0)
    expected = torch.zeros(SAMPLES, groups, rows)
    for tap in range(taps):
        seen = math.sqrt(SMOOTHNESS) * varied + math.sqrt(1 - SMOOTHNESS) * varied.roll(-1 - tap, 0)
        seen = (values.mean(0) + seen) * mask[:, tap, None, None]
        expected += torch.einsum("sgc,grc->sgr", seen, kernels[..., tap])
    found = _convolution(values, kernels, mask if cropped else None)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_copies_of_a_channel_have_the_same_statistics(ghn: GHN) -> None:
    model = predict(built(plain), ghn)
    mean, variance = (model.get_buffer(f"1.1.running_{name}") for name in ("mean", "var"))
    assert mean.shape == (100,)
    period = plan(built(plain), ghn).rows[4].tile.values.shape[0]  # type: ignore[union-attr]
    assert 36 <= period < 100
    assert torch.equal(variance[period:], variance[: 100 - period])


@pytest.mark.parametrize(("period", "rows"), [(8, 8), (4, 8), (8, 4)])
@pytest.mark.parametrize("seen", [False, True], ids=["whole filters", "in small images"])
def test_depthwise_filters_that_repeat_as_their_inputs_do_are_followed_once(
    period: int, rows: int, seen: bool
) -> None:
    torch.manual_seed(0)
    shape = (20, 1, 3, 3)
    tile = Tile(torch.randn(rows, 1, 3, 3), shape, shape)
    signal = Signal(values=torch.randn(SAMPLES, period), channels=20)
    unrolled = replace(signal, values=repeated(torch.as_tensor(signal.values), 20))
    taps = torch.rand(SAMPLES, 9).round() if seen else None
    found = _product(tile, signal, taps)
    assert found.shape == (SAMPLES, 8)
    torch.testing.assert_close(repeated(found, 20), _product(tile, unrolled, taps))


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("largest", [False, True], ids=["average", "largest"])
def test_pooling_makes_of_a_mean_square_what_it_makes_of_samples(positive: bool, largest: bool) -> None:
    torch.manual_seed(0)
    values = torch.randn(SAMPLES, 5000)
    if positive:
        values = math.sqrt(2) * values.relu()
    found = _pooled(Signal(values=values), 9, largest=largest).values
    assert found is not None
    expected = _pooled(Signal(1.0, positive=positive), 9, largest=largest).square
    if positive and not largest:
        expected += (1 - SMOOTHNESS) * (1 - 1 / 9) / math.pi  # their mean stays whole
    assert float(found.square().mean()) == pytest.approx(expected, rel=0.06)
    alone = _pooled(Signal(values=values), 1, largest=largest).values
    assert alone is not None
    assert float(alone.square().mean()) == pytest.approx(1, rel=0.06)


def test_what_batch_norms_saw_of_weights_that_are_no_more_counts_for_nothing(ghn: GHN) -> None:
    """A model is often called once before, to see that it works."""
    model, fresh = built(residuals), predict(built(residuals), ghn)
    model(images(4))
    planned = plan(model, ghn)
    assert "running statistics of 8 batch norms: from the weights" in str(planned)
    assert sum(name.endswith("num_batches_tracked") for name in planned.statistics) == 8
    planned.apply()
    for name, value in fresh.named_buffers():
        assert torch.equal(model.get_buffer(name), value), name
    with torch.no_grad():
        ratio = model.eval()(images()).std() / model.train()(images()).std()
    assert 0.3 < ratio < 3


def test_batch_norms_that_have_seen_data_of_kept_weights_keep_their_statistics(ghn: GHN) -> None:
    model = calibrate_batchnorm(built(plain), [images()])
    before = copy.deepcopy(dict(model.named_buffers()))
    predict(model, ghn, exclude=["1.0.*", "2.0.*"])  # what these read is predicted
    changed = {name for name, value in model.named_buffers() if not torch.equal(value, before[name])}
    assert changed == {f"0.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}


def test_statistics_that_a_prediction_wrote_are_written_anew_by_the_next(ghn: GHN) -> None:
    torch.manual_seed(2)
    other = GHN(GHNConfig.ghn2()).requires_grad_(False)
    model = predict(built(plain), other)
    first = model.get_buffer("1.1.running_var").clone()
    for _ in range(2):
        predict(model, ghn)
    once = predict(built(plain), ghn)
    for name, value in once.named_buffers():
        assert torch.equal(model.get_buffer(name), value), name
    assert not torch.equal(model.get_buffer("1.1.running_var"), first)


def test_norms_that_count_no_batches_keep_statistics_that_are_not_initial(ghn: GHN) -> None:
    model = built(plain)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.num_batches_tracked = None
    norms[1].running_mean.fill_(0.5)  # type: ignore[union-attr]
    assert plan(model, ghn, exclude="1.0.*").statistics.keys() == {
        f"{path}.running_{name}" for path in ("0.1", "2.1") for name in ("mean", "var")
    }
    assert len(plan(model, ghn).statistics) == 2 * 3


class OfOtherNumbers(nn.Module):
    """A weight that no prediction is for, before a batch norm."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.first, self.weight = block(3, 16), nn.Parameter(weight, requires_grad=False)
        self.norm, self.last = nn.BatchNorm2d(16), nn.Sequential(*classifier(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        if self.weight.is_complex():
            x = nn.functional.conv2d(x.to(self.weight.dtype), self.weight).abs()
        else:
            x = nn.functional.conv2d(x, self.weight.to(x.dtype))
        return self.last(torch.relu(self.norm(x)))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int8, torch.bool, torch.float8_e4m3fn])
@pytest.mark.parametrize("scale", ["auto", "own"])
def test_kept_weights_of_any_numbers_have_a_scale(ghn: GHN, dtype: torch.dtype, scale: str) -> None:
    torch.manual_seed(0)
    values = (2 * torch.randn(16, 16, 1, 1)).to(dtype)
    model = predict(OfOtherNumbers(values), ghn, scale=scale)  # pyright: ignore[reportArgumentType]
    assert torch.equal(model.weight.view(torch.uint8), values.view(torch.uint8))
    variance = model.get_buffer("norm.running_var")
    assert variance.isfinite().all()
    assert not torch.equal(variance, torch.ones(16))


class Shifted(nn.Module):
    """A factor and a shift for all channels together, as in HGNet-V2's blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.factor, self.shift = nn.Parameter(torch.ones(1)), nn.Parameter(torch.full((1,), 0.1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.factor * x + self.shift


def test_one_shift_for_all_channels_leaves_them_what_they_are(ghn: GHN) -> None:
    def shifted() -> nn.Module:
        widths = [3, 16, 16, 32, 32, 32]
        layers = [
            layer
            for n, (i, o) in enumerate(itertools.pairwise(widths))
            for layer in (block(i, o, 1 + 2 * (n % 2)), Shifted())
        ]
        return nn.Sequential(*layers, *classifier(32))

    model = predict(built(shifted), ghn)
    with torch.no_grad():
        ratio = model.eval()(images()).std() / model.train()(images()).std()
    assert 0.3 < ratio < 3


def test_only_what_predicted_weights_reach_gets_statistics(ghn: GHN) -> None:
    assert plan(built(plain), ghn, exclude="0.*").statistics.keys() == {
        f"{path}.running_{name}" for path in ("1.1", "2.1") for name in ("mean", "var")
    }
    assert len(plan(built(plain), ghn, scale="own").statistics) == 2 * 3
    assert plan(built(plain), ghn, scale="predicted").statistics == {}


def test_statistics_are_planned_then_written_everywhere(ghn: GHN, tmp_path: Path) -> None:
    model = built(plain)
    planned = plan(model, ghn)
    assert torch.equal(model.get_buffer("0.1.running_var"), torch.ones(16))
    tensors = dict(planned.tensors())
    planned.save(tmp_path / "planned")
    planned.apply()
    with torch.device("meta"):
        meta = built(plain)
    predict_to(meta, tmp_path / "meta", ghn)
    predict(meta, ghn)
    on_disk = load_file(tmp_path / "planned" / "model.safetensors")
    from_meta = load_file(tmp_path / "meta" / "model.safetensors")
    for name, value in planned.statistics.items():
        for found in (model.get_buffer(name), tensors[name], on_disk[name]):
            assert torch.equal(found, value), name
        assert torch.equal(from_meta[name], meta.get_buffer(name))
        assert value.isfinite().all()
        assert not torch.equal(value, value.new_full(value.shape, float(name.endswith("var"))))
    assert int(model.get_buffer("0.1.num_batches_tracked")) == 0


def test_statistics_fit_the_dtype_of_their_buffers(ghn: GHN) -> None:
    planned = plan(built(plain).half(), ghn)
    assert {value.dtype for value in planned.statistics.values()} == {torch.float16}
    assert all(value.isfinite().all() for value in planned.statistics.values())


class Branched(nn.Module):
    """Joins, gates, groups, more channels than a block has, and an image that becomes channels."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = block(3, 24), block(3, 40)
        self.squeeze, self.excite = nn.Conv2d(64, 8, 1), nn.Conv2d(8, 64, 1)
        self.grouped = block(64, 96, groups=4)
        self.depthwise = block(96, 96, groups=96)
        self.short = nn.Conv2d(64, 96, 1)
        self.norm = nn.BatchNorm2d(96)
        self.fc = nn.Linear(96 * 4, 130)
        self.last = nn.Sequential(nn.BatchNorm1d(130), nn.ReLU(), nn.Linear(130, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.left(x), self.right(x)], 1)
        x = x * self.excite(self.squeeze(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        x = self.norm(self.depthwise(self.grouped(x)) + self.short(x)).relu()
        return self.last(self.fc(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)))


def test_every_kind_of_join_gives_statistics_of_the_right_shape() -> None:
    model = built(Branched)
    planned = plan(model)
    assert len(planned.statistics) == 2 * 6
    for name, value in planned.statistics.items():
        assert value.shape == model.get_buffer(name).shape
        assert value.isfinite().all()
    x = images()
    found = output(planned.apply(), x)
    assert found / 4 < output(calibrate_batchnorm(model, [x]), x) < found * 4
