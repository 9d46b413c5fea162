"""Outputs of networks without norm layers: small enough to begin training."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING

import pytest
import torch
import torchvision
from torch import Tensor, nn

import ghn_init
from ghn_init import GHN, load, plan, predict
from ghn_init._writing import calm

if TYPE_CHECKING:
    from collections.abc import Callable

    from ghn_init import Plan


@pytest.fixture(scope="module")
def bundled() -> GHN:
    """The bundled weights: with the priors' large whitening filters."""
    return load("ghn3-cifar10").requires_grad_(False)


def shallow() -> nn.Module:
    layers = [nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 48, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(192, 10))


def discriminator(classes: int = 10) -> nn.Sequential:
    """Its classifier reads all places of the last feature maps, 3,072 numbers (arXiv 1511.06434)."""
    strided = [nn.Conv2d(a, b, 4, 2, 1) for a, b in ((3, 48), (48, 96), (96, 192))]
    layers = [layer for conv in strided for layer in (conv, nn.LeakyReLU(0.2))]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(3072, classes))


class SideBySide(nn.Module):
    """Its second layer reads the image and what the first one made of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(35, 32, 3, padding=1)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(torch.cat([x, self.first(x).relu()], 1)).relu()
        return self.head(y.mean((2, 3)))


class TwoStems(nn.Module):
    """Two layers read the image."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(3, 32, 5, padding=2)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.left(x).relu() + self.right(x).relu()).mean((2, 3)))


class Reused(nn.Module):
    """Its first layer is its second one, too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.layer(x).relu()).relu().mean((2, 3)))


def images() -> Tensor:
    coarse = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return 1.2 * nn.functional.interpolate(coarse, size=32, mode="bilinear")


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def factors(planned: Plan[nn.Module]) -> dict[str, float]:
    return {row.name: row.factor for row in planned.rows}


@pytest.mark.parametrize("build", [shallow, TwoStems])
def test_outputs_without_norm_layers_become_a_fraction_of_the_whole_predictions(
    build: Callable[[], nn.Module], bundled: GHN
) -> None:
    model = build().eval()
    whole = copy.deepcopy(model)
    planned = plan(model, bundled, example_input=(1, 3, 32, 32))
    with torch.no_grad():
        predict(whole, bundled, scale="predicted", example_input=(1, 3, 32, 32))
        large = whole(images())
        small = planned.apply()(images())
    assert 0.02 < rms(small) < 2 * calm._OUTPUTS  # what is estimated is right within a factor of 2
    assert rms(small) < 0.7 * rms(large)
    # What each activation shares is one factor, so it is the same function but for that.
    torch.testing.assert_close(small / rms(small), large / rms(large), rtol=1e-3, atol=1e-3)


def test_layers_in_a_row_share_the_factor_and_biases_go_with_them(
    bundled: GHN, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calm, "_READ", 1e9)  # more than any classifier reads
    planned = plan(shallow(), bundled, example_input=(1, 3, 32, 32))
    found = factors(planned)
    each = found["0.weight"]
    assert 0 < each < 1
    assert found == {
        "0.weight": each, "0.bias": each, "2.weight": pytest.approx(each), "2.bias": pytest.approx(each**2),
        "6.weight": pytest.approx(each), "6.bias": pytest.approx(each**3),
    }  # fmt: skip
    assert f"{each:.2g} x predicted scale" in str(planned)
    assert {row["name"]: row["factor"] for row in planned.to_dict()["rows"]} == found


def curvature(model: nn.Module) -> float:
    """Of the loss in the classifier's weights, along its steepest direction: that of what it reads."""
    with torch.no_grad():
        return float(model[:-1](images()).square().sum(1).mean())


def test_a_classifier_makes_up_for_what_it_reads_where_that_is_much(
    bundled: GHN, monkeypatch: pytest.MonkeyPatch
) -> None:
    def predicted() -> tuple[dict[str, float], nn.Sequential]:
        model = discriminator()
        planned = plan(model, bundled, example_input=(1, 3, 32, 32))
        planned.apply()
        return factors(planned), model

    found, model = predicted()
    monkeypatch.setattr(calm, "_READ", 1e9)
    alike, larger = predicted()
    less = found["0.weight"] / alike["0.weight"]
    assert 0 < less < 1
    assert found["2.weight"] / alike["2.weight"] == pytest.approx(less)
    assert found["7.weight"] / alike["7.weight"] == pytest.approx(less**-3)
    assert found["7.bias"] == pytest.approx(alike["7.bias"])
    assert curvature(model) == pytest.approx(curvature(larger) * less**6, rel=1e-3)
    assert curvature(model) < 2 * 1.9 / 0.06 < curvature(larger)  # beyond it SGD diverges at its best rate
    with torch.no_grad():  # still the same function
        torch.testing.assert_close(model(images()), larger(images()), rtol=1e-3, atol=1e-4)


def test_what_a_classifier_of_the_networks_own_reads_is_made_less_all_the_same(
    bundled: GHN, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, larger = discriminator(classes=7), discriminator(classes=7)
    before = model[-1].weight.clone()
    predict(model, bundled, example_input=(1, 3, 32, 32))
    assert torch.equal(model[-1].weight, before)
    monkeypatch.setattr(calm, "_READ", 1e9)
    predict(larger, bundled, example_input=(1, 3, 32, 32))
    assert curvature(model) < curvature(larger) / 3


class Around(nn.Module):
    """A residual block, a branch of one and of two layers, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
        self.short = nn.Conv2d(32, 48, 1)
        self.long = nn.Sequential(nn.Conv2d(32, 48, 1), nn.ReLU(), nn.Conv2d(48, 48, 3, padding=1))
        self.head = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = x + self.inner(x).relu()
        return self.head((self.short(x) + self.long(x)).relu().mean((2, 3)))


def test_what_is_added_has_one_factor(bundled: GHN, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calm, "_OUTPUTS", 1e-3)  # less than any network's
    planned = plan(Around(), bundled, example_input=(1, 3, 32, 32))
    found = factors(planned)
    each = found["stem.weight"]  # four layers in a row, of which the two of one branch are one of the other
    expected = {
        "stem": (1, 1),
        "inner": (0, 1),
        "long.0": (1, 2),
        "long.2": (1, 3),
        "short": (2, 3),
        "head": (1, 4),
    }
    assert found == pytest.approx(
        {
            f"{layer}.{name}": each**power
            for layer, powers in expected.items()
            for name, power in zip(("weight", "bias"), powers, strict=True)
        }
    )
    whole = predict(Around(), bundled, scale="predicted", example_input=(1, 3, 32, 32))
    with torch.no_grad():
        torch.testing.assert_close(planned.apply()(images()), whole(images()) * each**4, rtol=1e-3, atol=1e-6)


def test_layers_that_read_the_image_side_by_side_share_it(bundled: GHN) -> None:
    found = factors(plan(TwoStems(), bundled, example_input=(1, 3, 32, 32)))
    assert found["left.weight"] == found["right.weight"] < 1


@pytest.mark.parametrize(
    ("build", "exclude", "expected"),
    [
        (SideBySide, None, {"second.weight", "second.bias", "head.weight", "head.bias"}),
        (TwoStems, "left.weight", {"head.weight", "head.bias"}),
        (Reused, None, set()),  # nothing of it is predicted
    ],
)
def test_layers_whose_factor_others_would_not_share_have_none(
    build: Callable[[], nn.Module],
    exclude: str | None,
    expected: set[str],
    bundled: GHN,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(calm, "_OUTPUTS", 1e-3)  # less than any network's
    found = factors(plan(build(), bundled, example_input=(1, 3, 32, 32), exclude=exclude))
    assert {name for name, factor in found.items() if factor != 1} == expected


def test_other_networks_and_scales_have_no_such_factor(bundled: GHN) -> None:
    normed = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(32, 10),
    )  # fmt: skip
    assert set(factors(plan(normed, bundled)).values()) == {1.0}
    for scale in ("own", "predicted"):
        assert set(factors(plan(shallow(), bundled, scale=scale)).values()) == {1.0}


def test_one_layer_gets_the_whole_factor(bundled: GHN) -> None:
    model = nn.Sequential(nn.Conv2d(3, 10, 9), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    found = factors(plan(model, bundled, example_input=(1, 3, 32, 32)))
    assert found["0.weight"] == found["0.bias"] <= 1


@pytest.mark.parametrize("name", ["resnet18", "vgg11", "shufflenet_v2_x0_5"])
def test_a_second_prediction_changes_nothing(name: str) -> None:
    torch.manual_seed(0)
    network = torchvision.models.get_model(name, num_classes=10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ghn_init.OutOfDistributionWarning)
        ghn_init.predict(network)
        before = {key: value.clone() for key, value in network.state_dict().items()}
        ghn_init.predict(network)
    for key, value in network.state_dict().items():
        assert torch.allclose(value, before[key], rtol=2**-8), key  # the digits that a scale has


@pytest.mark.parametrize("read", [0.1, 7.0, 1e9])
@pytest.mark.parametrize("outputs", [1e-3, 0.15, 10.0])
def test_nor_does_it_whatever_was_made_smaller(
    outputs: float, read: float, bundled: GHN, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The classifier's own scale is then what the first prediction made of it."""
    monkeypatch.setattr(calm, "_OUTPUTS", outputs)
    monkeypatch.setattr(calm, "_READ", read)
    torch.manual_seed(0)
    model = discriminator()
    found = []
    for _ in range(3):
        predict(model, bundled, example_input=(1, 3, 32, 32))
        found.append(
            {name: float(values.square().mean().sqrt()) for name, values in model.state_dict().items()}
        )
    for again in found[1:]:
        assert again == pytest.approx(found[0], rel=2**-8)
