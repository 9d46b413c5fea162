"""Networks inside wrappers."""

from __future__ import annotations

import copy
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ghn_init import GHN, PredictError, load, plan, predict, predict_to, trace

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture(scope="module")
def ghn(ghn_dir: Path) -> GHN:
    return load(ghn_dir)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 7),
    )


def never(_graph: object, _inputs: object) -> Any:
    raise AssertionError("the network was compiled")


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend=never)


class ModelEmaV3(nn.Module):
    """The shape of timm's: a copy of the model in `module`, and a forward of its own."""

    __module__ = "timm.utils.model_ema"

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = copy.deepcopy(model)

    def forward(self, *args: Any) -> Any:
        return self.module(*args)


WRAPPERS = [
    nn.DataParallel,
    AveragedModel,
    ModelEmaV3,
    compiled,
    lambda model: compiled(nn.DataParallel(model)),
    lambda model: AveragedModel(compiled(model)),
]


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_names_and_values_are_those_of_the_network_inside(
    wrap: Callable[[nn.Module], nn.Module], ghn: GHN, tmp_path: Path
) -> None:
    model, plain = wrap(network()), network()
    params = list(model.parameters())
    assert trace(model) == trace(plain)
    planned, expected = plan(model, ghn, exclude="0.bias"), plan(plain, ghn, exclude="0.bias")
    assert planned.rows == expected.rows
    assert planned.apply() is model
    expected.apply()
    assert all(param is old for param, old in zip(model.parameters(), params, strict=True))
    for param, wanted in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(param, wanted)
    saved = predict_to(model, tmp_path / "out", ghn, exclude="0.bias")
    assert set(load_file(saved)) == set(plain.state_dict())


def test_a_compiled_function_is_not_compiled_while_tracing() -> None:
    swish = torch.compile(lambda x: x * torch.sigmoid(x), backend=never)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        @torch.compile(backend=never)
        def forward(self, x: Tensor) -> Tensor:
            return swish(self.conv(x))

    assert trace(Net(), (1, 3, 8, 8)).rectified == {2}


def test_a_compiled_module_inside_is_not_compiled_while_tracing(ghn: GHN) -> None:
    inside, in_place = network(), network()
    inside[0] = compiled(inside[0])
    in_place.compile(backend=never)
    expected = predict(network(), ghn)
    for model in (inside, in_place):
        predict(model, ghn)
        assert torch.equal(next(model.parameters()), expected[0].weight)
    rows = plan(inside, ghn).rows
    assert rows[0].name == "0._orig_mod.weight"  # a wrapper inside the network is part of its names


def test_other_classes_of_these_names_are_no_wrappers(ghn: GHN) -> None:
    class DataParallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = network()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.module(x)

    assert plan(DataParallel(), ghn).rows[0].name == "module.0.weight"


def test_lazy_modules_are_refused_with_the_remedy(ghn: GHN) -> None:
    model = nn.DataParallel(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.LazyLinear(10)))
    with pytest.raises(PredictError, match=r"2\.weight, .*2\.bias have no shape yet .* call the model once"):
        predict(model, ghn)
    model(torch.zeros(1, 3, 8, 8))
    assert predict(model, ghn, example_input=(1, 3, 8, 8)) is model
    with pytest.raises(PredictError, match=r"running_mean, .* have no shape yet"):
        predict(nn.Sequential(nn.Conv2d(3, 8, 3), nn.LazyBatchNorm2d(affine=False)), ghn)


def test_offloaded_models_are_refused_with_the_remedy(ghn: GHN) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(network(), "cpu")
    assert model[0].weight.is_meta
    with pytest.raises(PredictError, match=r"values of 0, .*5 are elsewhere .* predict before"):
        predict(model, ghn)
    assert model(torch.zeros(1, 3, 8, 8)).isfinite().all()


class PreTrainedModel(nn.Module):
    """As much of transformers' class as is looked at."""

    __module__ = "transformers.modeling_utils"


def test_predicted_parameters_of_transformers_models_are_marked(
    ghn: GHN, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Model(PreTrainedModel):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

    monkeypatch.setitem(sys.modules, "transformers", object())
    model = predict(Model(), ghn, scale="predicted")
    marked = {name for name, param in model.named_parameters() if getattr(param, "_is_hf_initialized", False)}
    assert marked == {"net.0.weight", "net.0.bias", "net.1.weight", "net.1.bias"}
    modules = {name for name, m in model.named_modules() if getattr(m, "_is_hf_initialized", False)}
    assert modules == {"net.0", "net.1"}
    assert not any(hasattr(param, "_is_hf_initialized") for param in predict(network(), ghn).parameters())
