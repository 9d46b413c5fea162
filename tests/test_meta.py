"""Models on the meta device: values for what is not predicted."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torchvision
from torch import nn

from ghn_init import GHN, PredictError, load, plan, predict
from ghn_init._meta.usual import TOKEN_STD

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


@pytest.mark.parametrize("build", [small_vit, small_convnext, small_swin, swin_v2, small_maxvit])
def test_torchvision_models_get_every_value(build: Callable[[], nn.Module], ghn: GHN) -> None:
    model, real = predict(on_meta(build), ghn), predict(build(), ghn)
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    for name, buffer in real.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer), name
    kept = {row.name for row in plan(real, ghn).rows if row.action == "kept"}
    layers = [name for name, module in real.named_modules() if isinstance(module, nn.Linear)]
    linear = {f"{name}.{kind}" for name in layers for kind in ("weight", "bias")}
    assert kept - linear
    for name, param in model.named_parameters():
        expected = real.get_parameter(name)
        if name not in kept:
            assert torch.equal(param, expected)
        elif name not in linear and name != "class_token":
            assert param.mean().item() == pytest.approx(expected.mean().item(), abs=0.01), name
            assert param.std().item() == pytest.approx(expected.std().item(), rel=0.5, abs=1e-6), name


def test_usual_values() -> None:
    vit, swin = predict(on_meta(small_vit)), predict(on_meta(swin_v2))
    assert 0 < vit.get_parameter("class_token").abs().max() <= 2 * TOKEN_STD
    assert predict(on_meta(small_convnext)).get_parameter("features.1.0.layer_scale").eq(1e-6).all()
    scale = swin.get_parameter("features.1.0.attn.logit_scale")
    torch.testing.assert_close(scale, torch.full_like(scale, math.log(10)))


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


def test_bare_parameters_get_the_value_of_their_kind(ghn: GHN) -> None:
    model = predict(on_meta(Bare), ghn, include="out.*")
    assert model.gain.eq(1).all()
    assert model.beta.eq(0).all()
    assert model.bias.eq(0).all()
    bound = 1 / math.sqrt(27)
    assert 0.8 * bound < model.weight.abs().max() <= bound


class GlobalResponseNorm(nn.Module):
    """As timm's: nothing in it initialises it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.addcmul(self.weight.view(1, -1, 1, 1), x)


class Named(Bare):
    """Parameters whose value their paper gives."""

    def __init__(self) -> None:
        super().__init__()
        self.skipinit_gain = nn.Parameter(torch.empty(()))
        self.gating_param = nn.Parameter(torch.empty(8))
        self.temperature = nn.Parameter(torch.empty(2, 1, 1))
        self.norm = GlobalResponseNorm()
        del self.gain, self.beta

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(torch.conv2d(x, self.weight, self.bias)) * self.gating_param.view(1, -1, 1, 1)
        heads = x.reshape(len(x), 2, 4, -1)
        attention = (heads @ heads.transpose(-2, -1) * self.temperature).softmax(-1)
        return self.out((attention @ heads).reshape(x.shape).mean((2, 3)) * self.skipinit_gain)


def test_values_that_papers_give(ghn: GHN) -> None:
    model = predict(on_meta(Named), ghn)
    assert model.skipinit_gain.eq(0)
    assert model.gating_param.eq(1).all()
    assert model.temperature.eq(1).all()
    assert model.norm.weight.eq(0).all()


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


def test_values_depend_on_seed_and_place_alone(ghn: GHN) -> None:
    random_state = torch.get_rng_state()
    first, second = predict(on_meta(small_vit), ghn), predict(on_meta(small_vit), ghn, include="heads.*")
    other = predict(on_meta(small_vit), ghn, seed=1)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(first.class_token, second.class_token)
    assert not torch.equal(first.class_token, other.class_token)
