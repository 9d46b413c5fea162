"""Models whose large tensors are on the meta device and whose small ones have values."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from ghn_init import GHN, PredictError, large_on_meta, load, predict, predict_to

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def ghn(ghn_dir: Path) -> GHN:
    return load(ghn_dir)


class Scaled(nn.Module):
    """Values that nothing but the constructor knows."""

    image_size = 16
    table: Tensor
    rates: Tensor

    def __init__(self, scale: float = 0.25, width: int = 300) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)
        self.gain = nn.Parameter(scale * torch.ones(width))
        self.out = nn.Linear(width, 300)
        device = self.out.weight.device
        self.register_buffer("table", torch.arange(4.0, device=device).outer(torch.ones(2)).to(device))
        self.register_buffer("rates", torch.tensor([rate.item() for rate in torch.linspace(0, 1, 3)]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).mean((2, 3)) * self.gain
        return self.out(x * self.table.sum() * self.rates.sum())


def test_small_tensors_keep_their_values_and_large_ones_have_none(ghn: GHN, tmp_path: Path) -> None:
    with large_on_meta():
        model = Scaled()
    assert [name for name, tensor in model.state_dict().items() if tensor.is_meta] == ["out.weight"]
    predict_to(copy.deepcopy(model), tmp_path / "out", ghn, head="predict")
    predicted, expected = predict(model, ghn, head="predict"), predict(Scaled(), ghn, head="predict")
    for name, tensor in expected.state_dict().items():
        assert torch.equal(predicted.state_dict()[name], tensor), name
    assert predicted.gain.eq(0.25).all()


def test_large_kept_tensors_are_initialised_by_their_module(ghn: GHN) -> None:
    with large_on_meta():
        model = predict(Scaled(), ghn, exclude="out.*")
    assert 0 < model.out.weight.abs().max() <= 1 / 300**0.5


@pytest.mark.parametrize("factory", ["zeros", "new_zeros", "tensor"])
def test_the_limit_counts_elements(factory: str) -> None:
    def make(n: int) -> Tensor:
        if factory == "tensor":
            return torch.tensor([0.0] * n)
        return torch.zeros(n) if factory == "zeros" else torch.empty(1000).new_zeros(n)

    with large_on_meta(limit=10):
        devices = [make(n).device.type for n in (10, 11)]
    assert devices == (["cpu", "cpu"] if factory == "tensor" else ["cpu", "meta"])
    assert make(11).device.type == "cpu"


def test_what_is_made_of_both_kinds_is_on_meta() -> None:
    with large_on_meta(limit=10):
        small, large = torch.ones(4), torch.ones(4, 4)
        results = [small + large, torch.cat([large, small[None]]), large.add_(small), large @ small]
    assert [result.shape for result in results] == [(4, 4), (5, 4), (4, 4), (4,)]
    assert all(result.is_meta for result in results)
    assert small.eq(1).all()


@pytest.mark.parametrize("how", ["copy_", "add_", "__iadd__", "__setitem__"])
def test_values_that_are_not_there_are_never_written_into_small_tensors(how: str) -> None:
    with large_on_meta(limit=10):
        small, large = torch.ones(4), torch.ones(4, 4)
        value = (slice(None), large[0]) if how == "__setitem__" else (large[0],)
        with pytest.raises(PredictError, match=r"changes a small tensor \(4,\).*give a larger limit="):
            getattr(small, how)(*value)
    assert small.eq(1).all()


def test_other_devices_are_respected_and_meta_is_not() -> None:
    with large_on_meta(limit=10):
        on_cpu = torch.zeros(20, device="cpu")
        moved = torch.arange(4).to("meta", torch.float64)
        wide = torch.arange(20, device="meta")
    assert not on_cpu.is_meta
    assert moved.tolist() == [0, 1, 2, 3]
    assert moved.dtype == torch.float64
    assert wide.tolist() == list(range(20))


@pytest.mark.parametrize("limit", [-1, 2.5, True, "1MB"])
def test_limits_that_are_no_numbers_are_refused(limit: Any) -> None:
    with pytest.raises(PredictError, match=r"large_on_meta\(limit=.*\): expected a number of elements"):
        large_on_meta(limit)


SCALES = {
    "cait_xxs24_224": ["blocks.0.gamma_1"],
    "caformer_s18": ["stages.2.blocks.0.res_scale1.scale", "stages.0.blocks.0.token_mixer.act1.scale"],
    "convnext_atto": ["stages.0.blocks.0.gamma"],
    "efficientformer_l1": ["stages.3.blocks.4.token_mixer.attention_bias_idxs"],
    "swiftformer_xs": ["stages.0.blocks.0.layer_scale.gamma"],
    "xcit_nano_12_p8_224": ["blocks.0.gamma1", "blocks.0.attn.temperature"],
}
"""Networks of timm and tensors in them that only their constructors know."""


@pytest.mark.filterwarnings("ignore")  # far from what the GHN was trained on
@pytest.mark.parametrize("name", SCALES)
def test_networks_of_timm_have_the_values_of_their_constructors(name: str, ghn: GHN) -> None:
    timm = pytest.importorskip("timm")
    with large_on_meta():
        model = timm.create_model(name)
    assert any(tensor.is_meta for tensor in model.parameters())
    predict(model, ghn)
    real = timm.create_model(name)
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    for inner in SCALES[name]:
        assert torch.equal(model.state_dict()[inner], real.state_dict()[inner]), inner
