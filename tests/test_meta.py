"""Models on the meta device: values for what is not predicted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torchvision
from torch import nn

from ghn_init import GHN, PredictError, large_on_meta, load, plan, predict

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture(scope="module")
def ghn(ghn_dir: Path) -> GHN:
    return load(ghn_dir)


def on_meta(build: Callable[[], nn.Module]) -> Any:
    with torch.device("meta"):
        return build()


def small_vit() -> nn.Module:
    return torchvision.models.VisionTransformer(32, 8, 1, 2, 32, 64, num_classes=10)


def small_convnext() -> nn.Module:
    settings = [torchvision.models.convnext.CNBlockConfig(16, None, 2)]
    return torchvision.models.ConvNeXt(settings, num_classes=10)


def small_swin(block: Any = None) -> nn.Module:
    kind = torchvision.models.SwinTransformer
    options = (
        {}
        if block is None
        else {"block": block, "downsample_layer": torchvision.models.swin_transformer.PatchMergingV2}
    )
    return kind([4, 4], 16, [2], [2], [4, 4], num_classes=10, **options)


def small_maxvit() -> nn.Module:
    return torchvision.models.MaxVit((64, 64), 8, 2, [8], [1], 4, 0.0, num_classes=10)


def swin_v2() -> nn.Module:
    return small_swin(block=torchvision.models.swin_transformer.SwinTransformerBlockV2)


def resnet() -> nn.Module:
    return torchvision.models.resnet18(num_classes=10)


@pytest.mark.parametrize("build", [resnet, small_swin])
def test_models_whose_modules_initialise_themselves_get_every_value(
    build: Callable[[], nn.Module], ghn: GHN
) -> None:
    options: Any = {"exclude": "*.0.*", "scale": "predicted"}
    model, real = predict(on_meta(build), ghn, **options), predict(build(), ghn, **options)
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    for name, buffer in real.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer), name
    kept = {row.name for row in plan(real, ghn, **options).rows if row.action == "kept"}
    assert kept
    for name, param in model.named_parameters():
        expected = real.get_parameter(name)
        if name not in kept:
            assert torch.equal(param, expected)
        else:
            assert param.mean().item() == pytest.approx(expected.mean().item(), abs=0.05), name


@pytest.mark.parametrize(
    ("build", "lost"),
    [
        (small_vit, "class_token"),
        (small_convnext, r"features\.1\.0\.layer_scale"),
        (swin_v2, r"features\.1\.0\.attn\.logit_scale"),
        (small_maxvit, r"relative_position_bias_table"),
    ],
)
def test_values_that_only_a_constructor_knows_are_lost_on_the_meta_device_and_kept_by_large_on_meta(
    build: Callable[[], nn.Module], lost: str, ghn: GHN
) -> None:
    model = on_meta(build)
    with pytest.raises(PredictError, match=rf"{lost}.* would have no value.*large_on_meta"):
        predict(model, ghn)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    with large_on_meta(limit=500):
        model = build()
    assert any(tensor.is_meta for tensor in model.parameters())
    predict(model, ghn)
    assert not any(tensor.is_meta for tensor in model.state_dict().values())


class Bare(nn.Module):
    """Everything in parameters of its own, some without a module that could initialise them."""

    image_size = 16

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(8, 3, 3, 3))
        self.bias = nn.Parameter(torch.empty(8))
        self.gain, self.beta = nn.Parameter(torch.empty(8)), nn.Parameter(torch.empty(8))
        self.out = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.conv2d(x, self.weight, self.bias)
        x = nn.functional.group_norm(x, 2, self.gain, self.beta)
        return self.out(x.mean((2, 3)))


class Asked(Bare):
    """A model that initialises itself and the modules inside it, as timm's and others do."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(8))
        self.block = nn.ParameterList([torch.empty(2)])
        self.inner = nn.Module()
        self.inner.layer = nn.Linear(2, 2)
        self.inner.register_buffer("table", torch.empty(3), persistent=False)
        self.inner.reset_parameters = self.reset  # type: ignore[assignment]
        self.inner.init_non_persistent_buffers = self.fill  # type: ignore[assignment]

    def reset(self) -> None:
        self.inner.register_buffer("table", torch.empty(3, device=self.inner.layer.weight.device))

    def fill(self) -> None:
        self.inner.table = torch.arange(3.0, device=self.inner.layer.weight.device)

    def init_weights(self, mode: str = "") -> None:
        assert not mode
        nn.init.constant_(self.scale, 3)
        nn.init.constant_(self.out.weight, 5)
        nn.init.constant_(self.block[0], 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x * self.block[0].sum() * self.inner.table.sum()) * self.scale[:1]


def test_modules_around_are_asked_and_touch_nothing_else(ghn: GHN) -> None:
    model = on_meta(Asked)
    model.gain = nn.Parameter(torch.full((8,), 7.0))
    predict(model, ghn, exclude="gain")
    assert model.scale.eq(3).all()
    assert model.block[0].eq(4).all()
    assert model.inner.table.tolist() == [0, 1, 2]
    assert model.gain.eq(7).all()
    assert not model.out.weight.eq(5).any()


def test_module_by_module_initialisation_of_a_model_is_used(ghn: GHN) -> None:
    class Applied(Bare):
        def __init__(self) -> None:
            super().__init__()
            self.extra = nn.Module()
            self.extra.scale = nn.Parameter(torch.empty(8, 1, 1))

        def _init_weights(self, module: nn.Module) -> None:
            if hasattr(module, "scale"):
                nn.init.constant_(module.scale, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * self.extra.scale.sum()

    assert predict(on_meta(Applied), ghn).extra.scale.eq(6).all()


def test_any_integer_is_a_seed(ghn: GHN) -> None:
    def build() -> nn.Module:
        layer = nn.Linear(4, 4)
        nn.init.orthogonal_(layer.weight)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), layer)

    for seed in (2**80, -(2**80)):
        model = predict(on_meta(build), ghn, scale="own", seed=seed)
        assert all(value.isfinite().all() for value in model.state_dict().values())


def test_what_nobody_knows_is_an_error(ghn: GHN) -> None:
    class Scaled(Bare):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.full((8, 1, 1), 20.0))
            self.register_buffer("mask", torch.ones(8, dtype=torch.bool))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * self.factor.mean() * self.mask.sum()

    model = on_meta(Scaled)
    with pytest.raises(
        PredictError,
        match=r"Scaled is on the meta device, and factor, mask would have no value.*large_on_meta",
    ):
        predict(model, ghn)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    model.factor, model.mask = nn.Parameter(torch.full((8, 1, 1), 20.0)), torch.ones(8, dtype=torch.bool)
    predict(model, ghn)
    assert model.factor.eq(20).all()
    assert model.mask.all()


class OfRandomScale(nn.Conv2d):
    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.weight.normal_().mul_(float(torch.rand((), device="cpu")))


def test_planning_leaves_the_random_state_alone(ghn: GHN) -> None:
    model = on_meta(lambda: nn.Sequential(OfRandomScale(3, 8, 3, bias=False), nn.BatchNorm2d(8)))
    random_state = torch.get_rng_state()
    plan(model, ghn, example_input=(1, 3, 8, 8), scale="own")
    assert torch.equal(torch.get_rng_state(), random_state)


def test_values_depend_on_seed_and_place_alone(ghn: GHN) -> None:
    random_state = torch.get_rng_state()
    first, second = (
        predict(on_meta(resnet), ghn, exclude="fc.*"),
        predict(on_meta(resnet), ghn, include="conv1.*"),
    )
    other = predict(on_meta(resnet), ghn, exclude="fc.*", seed=1)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(first.fc.weight, second.fc.weight)
    assert not torch.equal(first.fc.weight, other.fc.weight)
