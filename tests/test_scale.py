"""The default of `predict`: the prediction's direction; scale and norm layers of the network's author."""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrizations

from ghn_init import GHN, GHNConfig, OutOfDistributionWarning, PredictError, plan, predict, predict_to
from ghn_init._hypernetwork.tile import Prior, Tile, tile_to
from ghn_init._meta import scales as initial
from ghn_init._network import scale as scaling
from ghn_init._network.scale import Magnitude, constants_of, scales_of
from ghn_init._writing import scale as writing

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from ghn_init import Graph

NEAR = 2.0**-8
"""Relative: eight binary digits of a scale count."""


@pytest.fixture(scope="module")
def ghn() -> GHN:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(1)
        return GHN(GHNConfig.ghn2()).requires_grad_(False)


class Net(nn.Module):
    """A stem, a residual branch that starts at zero, a layer that is tiled, a classifier."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.branch = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.grow = nn.Conv2d(16, 80, 3, stride=2)
        self.mix = nn.Conv2d(80, 100, 1, bias=False)
        self.fc = nn.Linear(100, num_classes)
        nn.init.zeros_(self.branch.weight)
        nn.init.normal_(self.mix.weight, std=3.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x)).relu()
        return self.fc(self.mix(self.grow(x + self.branch(x))).mean((2, 3)))


def network(seed: int = 0, **options: Any) -> Net:
    torch.manual_seed(seed)
    return Net(**options)


def rms(tensor: torch.Tensor) -> float:
    return float(tensor.detach().double().square().mean().sqrt())


def kept(model: nn.Module, ghn: GHN, **options: Any) -> dict[str, str]:
    return {row.name: row.reason for row in plan(model, ghn, **options).rows if row.action == "kept"}


def assert_parallel(found: torch.Tensor, expected: torch.Tensor) -> None:
    """The one is a positive multiple of the other."""
    found, expected = found.detach().flatten().double(), expected.detach().flatten().double()
    torch.testing.assert_close(found / found.norm(), expected / expected.norm(), rtol=1e-4, atol=1e-6)


# The rule


def test_directions_are_predicted_and_scales_and_norms_kept(ghn: GHN) -> None:
    model, whole = network(), predict(network(), ghn, scale="predicted")
    before = copy.deepcopy(model.state_dict())
    predict(model, ghn, scale="own")
    assert not model.get_parameter("stem.bias").any()  # a batch norm follows
    for name in ("stem.weight", "grow.weight", "mix.weight", "fc.weight", "fc.bias"):
        found = rms(model.get_parameter(name)) / rms(before[name])
        # A matrix gets less where the prediction is the more coherent one.
        assert found == pytest.approx(1, rel=NEAR) if name.endswith("bias") else 0.1 < found < 1 + NEAR, name
        assert_parallel(model.get_parameter(name), whole.get_parameter(name))
    for name in ("norm.weight", "norm.bias", "branch.weight"):
        assert torch.equal(model.get_parameter(name), before[name])
        assert not torch.equal(whole.get_parameter(name), before[name])


def test_the_plan_says_what_becomes_of_every_scale(ghn: GHN) -> None:
    planned = plan(network(), ghn, scale="own")
    rows = {row.name: row for row in planned.rows}
    assert 0.3 < rows["mix.weight"].rms < 3.1
    assert rows["mix.weight"].action == "tiled"
    assert rows["norm.bias"].reason == "norm layer (kept unless scale='predicted')"
    assert rows["branch.weight"].reason == "all its values are 0 (kept unless scale='predicted')"
    assert f"own scale {rows['stem.weight'].rms:.3g}" in str(planned)
    values = planned.to_dict()
    assert (values["scale"], values["frozen"]) == ("own", "keep")
    assert {row["name"]: row["rms"] for row in values["rows"]}["mix.weight"] == rows["mix.weight"].rms
    whole = plan(network(), ghn, scale="predicted")
    assert whole.to_dict()["scale"] == "predicted"
    assert "own scale" not in str(whole)


def test_the_classifier_of_an_unknown_width_decides_nothing_and_head_predict_asks_for_all(ghn: GHN) -> None:
    assert "fc.weight" in kept(network(num_classes=7), ghn)
    assert {"fc.weight", "norm.weight"} <= set(kept(network(num_classes=7), ghn, scale="own"))
    assert kept(network(num_classes=7), ghn, head="predict") == {}
    assert "norm.weight" in kept(network(), ghn, head="predict", scale="own")
    with pytest.raises(PredictError, match="scale='half': expected one of 'auto', 'own', 'predicted'"):
        plan(network(), ghn, scale="half")  # type: ignore[arg-type]
    with pytest.raises(PredictError, match="frozen='thaw': expected one of 'keep', 'predict'"):
        plan(network(), ghn, frozen="thaw")  # type: ignore[arg-type]


def test_strict_does_not_mind_what_keeps_its_own_values(ghn: GHN) -> None:
    assert "norm.weight" in kept(network(), ghn, strict=True, scale="own")
    assert "branch.weight" in kept(network(), ghn, strict=True)
    with pytest.raises(PredictError, match=r"2 of 10 parameters would be kept:\n  fc.weight: "):
        plan(network(num_classes=7), ghn, strict=True)


def test_predicting_again_gives_the_same_bits(ghn: GHN) -> None:
    for how in (None, "noise", "orthogonal"):
        model = predict(network(), ghn, diversify=how, scale="own")
        first = copy.deepcopy(model.state_dict())
        predict(model, ghn, diversify=how, scale="own")
        assert all(torch.equal(value, first[name]) for name, value in model.state_dict().items())
    assert rms(model.mix.weight) == pytest.approx(rms(network().mix.weight), rel=NEAR)  # no more coherent


@pytest.mark.parametrize(("factor", "first"), [(1, float("nan")), (1, float("inf")), (1e-30, 0.0)])
def test_values_that_are_not_finite_or_whose_squares_vanish_have_no_scale(
    ghn: GHN, factor: float, first: float
) -> None:
    model = network()
    model.stem.weight.data.mul_(factor).view(-1)[0] = first
    rows = {row.name: row for row in plan(model, ghn, scale="own").rows}
    assert rows["stem.weight"].rms is None
    predict(model, ghn, scale="own")
    assert torch.equal(model.stem.weight, predict(network(), ghn, scale="predicted").stem.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_keep_their_scale(ghn: GHN, dtype: torch.dtype) -> None:
    model = predict(network().to(dtype), ghn, scale="own")
    assert model.mix.weight.dtype == dtype
    assert rms(model.mix.weight) == pytest.approx(
        rms(predict(network(), ghn, scale="own").mix.weight), rel=2 * NEAR
    )


@pytest.mark.parametrize("width", [16, 130])
def test_deep_networks_without_norm_neither_explode_nor_vanish(width: int) -> None:
    """With the bundled weights, tiled and not."""
    torch.manual_seed(0)
    widths = (3, *[width] * 12)
    layers = [nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.ReLU()) for a, b in pairwise(widths)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))
    noise = torch.randn(8, 3, 16, 16)
    smooth = nn.functional.interpolate(torch.randn(8, 3, 4, 4), (16, 16), mode="bilinear")  # as images are
    usual = [rms(model(x)) for x in (noise, smooth)]
    assert 0.1 * usual[0] < rms(predict(copy.deepcopy(model), scale="own")(noise)) < 10 * usual[0]
    assert 0.1 * usual[1] < rms(predict(model)(smooth)) < 10 * usual[1]


def test_the_spectral_norm_of_a_coherent_prediction_is_kept() -> None:
    """Of the bundled weights, tiled and not; the estimate knows the first 64 filters only."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 32, 3), nn.Conv2d(32, 48, 3), nn.Conv2d(48, 256, 1)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10))
    before = copy.deepcopy(model.state_dict())
    predict(model, example_input=(1, 3, 16, 16), scale="own")
    for name in ("0.weight", "1.weight", "2.weight", "5.weight"):
        old, new = (
            torch.linalg.matrix_norm(values[name].flatten(1), 2) for values in (before, model.state_dict())
        )
        assert new < 1.25 * old, name
        assert rms(model.state_dict()[name]) <= (1 + NEAR) * rms(before[name])
    assert new > 0.5 * old


def test_coherent_values_before_make_the_prediction_as_coherent() -> None:
    """A layer wider than the tiles: their copies are coherent whatever the weights of the GHN are."""
    torch.manual_seed(0)
    independent, alike = (nn.Sequential(nn.Linear(160, 160), nn.ReLU(), nn.Linear(160, 10)) for _ in range(2))
    with torch.no_grad():
        alike[0].weight.copy_(torch.randn(1, 160).expand(160, 160) + 0.01 * torch.randn(160, 160))
        independent[0].weight.mul_(rms(alike[0].weight) / rms(independent[0].weight))
    scales = [
        next(
            row.rms for row in plan(model, example_input=(1, 160), scale="own").rows if row.name == "0.weight"
        )
        for model in (independent, alike)
    ]
    assert scales[1] == pytest.approx(rms(alike[0].weight), rel=NEAR)
    assert scales[0] < 0.8 * scales[1]


@pytest.mark.parametrize("sizes", [(4, 3, 3, 3), (5, 4, 3, 3), (8, 6, 3, 3), (4, 6), (3,)])
def test_the_root_mean_square_of_a_tile_is_that_of_the_full_tensor(sizes: tuple[int, ...]) -> None:
    shape = (8, 6, 3, 3)[: len(sizes)]
    tile = Tile(torch.randn(sizes), shape, shape)
    assert float(writing._rms(tile)) == pytest.approx(float(tile.expand().double().square().mean().sqrt()))


@pytest.mark.parametrize("kernel", [(), (3,), (3, 3), (2, 3, 3)])
def test_what_stands_apart_in_a_tile_counts_in_its_scale(kernel: tuple[int, ...]) -> None:
    block = torch.randn(8, 5, *((1,) if len(kernel) == 3 else ()), *kernel[-2:])
    place = (1,) * len(kernel[-2:])
    sizes = (24, *block.shape[1:])
    prior = Prior(sizes, place, torch.randn(24, *block.shape[1 : block.ndim - len(place)]))
    shape = (60, 12, *kernel)
    tile = Tile(block, shape, shape, prior=prior).scaled(2.0)
    full = tile.expand()
    expected = torch.zeros(sizes) + 2 * tile_to(block.unsqueeze(0), sizes)[0]
    expected[(..., *place)] += 2 * prior.values
    torch.testing.assert_close(full, tile_to(expected.unsqueeze(0), shape)[0])
    written = torch.empty_like(full)
    tile.copy_into(written)
    torch.testing.assert_close(written, full)
    assert float(writing._rms(tile)) == pytest.approx(float(full.double().square().mean().sqrt()))
    gram = writing._filters(tile)
    rows = full[:60].flatten(1)
    torch.testing.assert_close((gram @ gram.T).diagonal()[:24], (rows @ rows.T).diagonal()[:24])


def test_what_is_kept_is_not_decoded(ghn: GHN, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: set[str] = set()

    def predict_tiles(graph: Graph, names: Iterable[str]) -> dict[str, Tile]:
        decoded.update(names)
        return GHN.predict_tiles(ghn, graph, names)

    monkeypatch.setattr(ghn, "predict_tiles", predict_tiles)
    rows = plan(network(), ghn).rows
    zero = {"stem.bias"}
    assert decoded == {row.key for row in rows if row.action != "kept"} - zero
    assert decoded == {
        "stem.weight",
        "grow.weight",
        "grow.bias",
        "mix.weight",
        "fc.weight",
        "fc.bias",
        "norm.weight",
        "norm.bias",
    }


def test_ends_of_rows_that_are_all_one_number_are_those_of_the_tensor() -> None:
    tensors = [
        torch.tensor([[2.0, 2.0], [1.0, 5.0]]),
        torch.zeros(3, 2),
        torch.ones(4).double(),
        torch.tensor(3.0),
    ]
    assert [scale.constant for scale in scales_of(tensors)] == [None, 0.0, 1.0, 3.0]
    assert constants_of(tensors) == [None, 0.0, 1.0, 3.0]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_values_of_one_byte_have_a_scale(dtype: torch.dtype) -> None:
    values = torch.linspace(-3, 5, 64).view(4, 16).to(dtype)
    assert scales_of([values]) == scales_of([values.float()])
    assert constants_of([torch.ones(4, 2).to(dtype), values]) == [1.0, None]


def test_the_largest_eigenvalue_is_that_of_torch() -> None:
    torch.manual_seed(0)
    matrices = [torch.randn(n, m) for n, m in ((5, 9), (64, 70), (1, 4), (64, 64))] + [torch.zeros(3, 3)]
    grams = [matrix @ matrix.T for matrix in matrices]
    expected = [torch.linalg.eigvalsh(gram)[-1].item() for gram in grams]
    assert writing._largest_eigenvalues(grams) == pytest.approx(expected, rel=0.035, abs=1e-6)


# Frozen parameters


def test_frozen_parameters_are_kept_unless_forced(ghn: GHN) -> None:
    model = network()
    model.stem.requires_grad_(False)
    before = model.stem.weight.clone()
    assert kept(model, ghn, strict=True)["stem.weight"] == "frozen (frozen='keep')"
    predict(model, ghn)
    assert torch.equal(model.stem.weight, before)
    predict(model, ghn, frozen="predict")
    assert not torch.equal(model.stem.weight, before)
    assert not model.stem.weight.requires_grad


def test_a_frozen_backbone_with_a_new_head_is_told(ghn: GHN) -> None:
    model = network().requires_grad_(False)
    with pytest.raises(PredictError, match=r"nothing to write.*frozen"):
        predict(model, ghn)
    model.fc.requires_grad_(True)
    told = "all but the classifier is frozen"
    with pytest.warns(OutOfDistributionWarning, match=told):
        plan(model, ghn)
    model.grow.requires_grad_(True)
    assert told not in plan(model, ghn).unfamiliar
    assert told not in plan(network().requires_grad_(False), ghn, frozen="predict").unfamiliar


# Computed weights, ties, the meta device, the disk


def test_a_weight_under_weight_norm_keeps_its_scale(ghn: GHN) -> None:
    model = network()
    parametrizations.weight_norm(model.mix)
    random_state = torch.get_rng_state()
    predict(model, ghn, scale="own")
    assert torch.equal(torch.get_rng_state(), random_state)
    torch.testing.assert_close(
        model.mix.weight, predict(network(), ghn, scale="own").mix.weight, rtol=NEAR, atol=1e-5
    )


def test_what_a_spectral_norm_divides_keeps_its_scale(ghn: GHN) -> None:
    model = network()
    parametrizations.spectral_norm(model.mix)
    before = copy.deepcopy(model.state_dict())
    plan(model, ghn, scale="own")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    predict(model, ghn, scale="own")
    (name,) = (name for name in before if name.endswith("original"))
    plain = predict(network(), ghn, scale="own").mix.weight
    torch.testing.assert_close(model.state_dict()[name], plain, rtol=NEAR, atol=1e-5)


def test_a_tied_weight_keeps_its_scale(ghn: GHN) -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(12, 12), nn.Linear(12, 12)
    second.weight = first.weight
    model = nn.Sequential(first, nn.ReLU(), second, nn.Linear(12, 10))
    before = rms(first.weight)
    predict(model, ghn, example_input=(1, 12), scale="own")
    assert second.weight is first.weight
    assert rms(first.weight) == pytest.approx(before, rel=NEAR)


def test_a_meta_model_gets_the_scale_of_its_own_initialisation(ghn: GHN, tmp_path: Path) -> None:
    class Drawn(nn.Linear):
        """Initialises itself in a way whose scale nothing tells before it is done."""

        def reset_parameters(self) -> None:
            nn.init.trunc_normal_(self.weight, std=0.5, a=-1.0, b=1.0)
            nn.init.zeros_(self.bias)

    def build() -> nn.Sequential:
        layers = [nn.Conv2d(3, 70, 3), nn.BatchNorm2d(70), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        return nn.Sequential(*layers, Drawn(70, 90), nn.ReLU(), nn.Linear(90, 10))

    with torch.device("meta"):
        model, weight_norm = build(), build()
    torch.manual_seed(0)
    random_state = torch.get_rng_state()
    real = build()
    torch.set_rng_state(random_state)
    predict_to(model, tmp_path / "out", ghn, scale="own")
    predict(model, ghn, scale="own")
    assert torch.equal(torch.get_rng_state(), random_state)
    on_disk = load_file(tmp_path / "out" / "model.safetensors")
    for name, param in model.named_parameters():
        assert torch.equal(on_disk[name], param), name
        own = 0 if name == "0.bias" else rms(real.get_parameter(name))  # a batch norm follows
        assert rms(param) == pytest.approx(own, rel=0.6), name
    assert_parallel(model[0].weight, predict(real, ghn, scale="predicted")[0].weight)
    assert not model[4].bias.any()
    parametrizations.weight_norm(weight_norm[4])
    predict(weight_norm, ghn, scale="own")
    assert rms(weight_norm[4].weight) == pytest.approx(1 / math.sqrt(3 * 70), rel=NEAR)


def test_scales_of_a_meta_model_are_read_off_without_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    values = initial.Initialiser.values
    monkeypatch.setattr(
        initial.Initialiser, "values", lambda self, path: drawn.append(path) or values(self, path)
    )
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(50, 20), nn.Embedding(10, 4, padding_idx=0), nn.Conv2d(3, 4, 3))
    names = [name for name, _ in model.named_parameters()]
    found = initial.initial_scales(model, names, 0)
    assert drawn == []
    expected = {"0.weight": 1 / math.sqrt(150), "0.bias": 1 / math.sqrt(150), "1.weight": 1.0}
    expected |= {"2.weight": 1 / 9, "2.bias": 1 / 9}
    assert {name: scale.rms for name, scale in found.items()} == pytest.approx(expected, rel=NEAR)
    assert all(param.is_meta for param in model.parameters())


# Measuring


def test_scales_are_those_of_the_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "_CHUNK", 50)
    torch.manual_seed(0)
    tensors = [
        torch.randn(7, 5, 3), 0.01 * torch.randn(300),
        torch.randn(3, 4, 5, 5).to(memory_format=torch.channels_last),
        torch.randn(40, 6).T, torch.full((3, 3), -2.0), torch.zeros(4), torch.tensor(5.0), torch.ones(1, 7),
        torch.randn(20, 9).double(), 300 * torch.randn(50).half(),
    ]  # fmt: skip
    found = scales_of(tensors)
    assert [scale.rms for scale in found] == pytest.approx([rms(tensor) for tensor in tensors], rel=NEAR)
    assert [scale.constant for scale in found] == [None] * 4 + [-2.0, 0.0, 5.0, 1.0, None, None]
    first_row_alike = torch.cat([torch.zeros(1, 4), torch.ones(2, 4)])
    assert scales_of([first_row_alike])[0].constant is constants_of([first_row_alike])[0] is None
    assert not math.isfinite(scales_of([torch.tensor([1.0, float("inf"), float("nan")])])[0].rms)


def test_a_scale_ignores_the_order_of_its_sum() -> None:
    assert Magnitude.of_sum(1.0, 3, 0.0, 1.0) == Magnitude.of_sum(1.0 + 1e-9, 3, 0.0, 1.0)
    assert Magnitude.of_sum(1.0, 3, 0.0, 1.0) != Magnitude.of_sum(1.02, 3, 0.0, 1.0)


def test_a_tile_is_measured_as_often_as_it_repeats(ghn: GHN) -> None:
    """100 rows of a block of 64: the first 36 count twice."""
    model = network()
    row = next(row for row in plan(model, ghn, scale="own").rows if row.name == "mix.weight")
    assert row.tile is not None
    assert rms(row.tile.expand()) == pytest.approx(row.rms, rel=1e-5)
    assert rms(row.tile.values) != pytest.approx(row.rms, rel=1e-5)
