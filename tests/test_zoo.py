"""A sample of the zoos: networks of every kind are traced, and every parameter is accounted for."""

from __future__ import annotations

import sys
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import ghn_init

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from zoo_checks import faults
from zoo_models import Network, networks

pytestmark = pytest.mark.source

TORCHVISION = (
    "alexnet", "densenet121", "efficientnet_b0", "googlenet", "mnasnet0_5", "mobilenet_v3_small",
    "regnet_y_400mf", "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "vit_b_32",
    "lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large",
    "fasterrcnn_mobilenet_v3_large_320_fpn", "maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn",
    "retinanet_resnet50_fpn", "fcos_resnet50_fpn", "ssdlite320_mobilenet_v3_large",
    "r3d_18", "s3d", "mvit_v2_s", "swin3d_t", "raft_small",
)  # fmt: skip

TIMM = (
    "resnet10t", "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "beit_base_patch16_224",
    "eva02_tiny_patch14_224", "cait_xxs24_224", "convnext_atto", "convit_tiny", "crossvit_9_240",
    "xcit_nano_12_p8_224", "levit_128s", "mixer_s32_224", "gmlp_ti16_224", "maxvit_rmlp_pico_rw_256",
    "mobilevit_xxs", "poolformer_s12", "pvt_v2_b0", "regnetz_005", "repvgg_a0", "swinv2_tiny_window8_256",
    "tf_efficientnetv2_b0", "visformer_tiny", "volo_d1_224", "nf_regnet_b0", "naflexvit_base_patch16_gap",
    "hrnet_w18_small",
)  # fmt: skip

LESS_PREDICTED = {
    "swin3d_t": "relative position tables of three dimensions, 1.2 %",
    "maxvit_rmlp_pico_rw_256": "relative positions made from coordinates by an MLP, 1.0 %",
}
"""Networks of which less than 99 % of the elements are predicted, and why."""


@lru_cache
def _zoo(name: str) -> dict[str, Network]:
    return {network.name: network for network in networks(name)}


def _findings(network: Network, ghn_dir: Path) -> list[str]:
    """What is wrong with graph and plan; less than 99 % predicted, but for the exceptions, is, too."""
    model = network.on_meta()
    plan = ghn_init.plan(model, ghn_dir, head="predict")
    _, kept = plan.counts()["kept"]
    share = 1 - kept / sum(elements for _, elements in plan.counts().values())
    expected = (share < 0.99) == (network.name in LESS_PREDICTED)
    return faults(model, plan) + ([] if expected else [f"{share:.2%} of the elements are predicted"])


@pytest.mark.filterwarnings("ignore")  # far from what the GHN was trained on
@pytest.mark.parametrize("name", TORCHVISION)
def test_networks_of_torchvision_are_predicted(name: str, ghn_dir: Path) -> None:
    assert _findings(_zoo("torchvision")[name], ghn_dir) == []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TIMM)
def test_networks_of_timm_are_predicted(name: str, ghn_dir: Path) -> None:
    pytest.importorskip("timm")
    assert _findings(_zoo("timm")[name], ghn_dir) == []


def test_quantised_networks_are_refused_with_the_remedy() -> None:
    model = nn.Sequential(nn.ReLU(), torch.ao.nn.quantized.Quantize(1.0, 0, torch.quint8))
    with pytest.raises(ghn_init.PredictError, match=r"1 hold packed integers.*predict the float model"):
        ghn_init.predict(model)


@pytest.mark.parametrize("layer", [nn.Linear(8, 8), nn.LSTM(8, 8)])
@pytest.mark.filterwarnings("ignore")  # torch's own: this kind of quantisation is deprecated
def test_networks_of_which_some_layers_are_quantised_are_refused(layer: nn.Module) -> None:
    model = nn.Sequential(nn.Conv1d(3, 8, 1), layer)
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear, nn.LSTM})
    with pytest.raises(
        ghn_init.PredictError, match=r"1(\.\S+)? .*hold packed integers.*predict the float model"
    ):
        ghn_init.predict(quantised)


class Doubtful(nn.Module):
    """Chooses positions by value, writes into a view, and reads a number at the end."""

    def __init__(self, *, late: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4)
        self.late = late

    def forward(self, x: Tensor) -> list[float]:
        buffer = torch.zeros(len(x), 8)
        buffer[:, :8].copy_(x)
        if not self.late:
            x.sum().item()
        x = self.first(buffer)
        x = x[x[:, 0] > 0]
        x = x[torch.where(x[:, 0] > 0)[0]]
        y = self.second(x[torch.nonzero(x[:, 0]).flatten()])
        return [y.sum().item()]


def test_choices_and_writes_into_views_keep_the_path() -> None:
    graph = ghn_init.trace(Doubtful(late=True), (3, 8))
    assert [node.param or node.type for node in graph.nodes] == [
        "input", "first.weight", "first.bias", "second.weight", "second.bias",
    ]  # fmt: skip
    assert graph.edges == ((0, 1), (1, 2), (2, 3), (3, 4))


def test_a_value_read_before_the_last_layer_is_an_error() -> None:
    with pytest.raises(ghn_init.TraceError, match=r"Tensor\.item needs the values of activations"):
        ghn_init.trace(Doubtful(late=False), (3, 8))


def test_a_detector_in_training_mode_is_traced_evaluating_and_stays_in_training_mode() -> None:
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 4, 1)

        def forward(self, images: list[Tensor], targets: object = None) -> Tensor:
            if self.training and targets is None:
                raise ValueError("targets should not be none")
            return self.layer(torch.stack(images))

    model = Detector()
    assert len(ghn_init.trace(model)) == 3
    assert model.training
    assert model.layer.training


@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "squeezenet1_1", "mobilenet_v3_small"])
def test_parameters_on_nodes_are_those_that_autograd_reaches(name: str) -> None:
    """Which parameters the output depends on, told by two independent means."""
    model = _zoo("torchvision")[name].build().eval()
    model.add_module("extra", nn.Linear(3, 3))  # never called
    graph = ghn_init.trace(model, (1, 3, 64, 64))
    model(torch.randn(1, 3, 64, 64)).sum().backward()
    reached = {name for name, param in model.named_parameters() if param.grad is not None}
    assert {n for node in graph.nodes for n in (node.param, node.bias) if n is not None} == reached
    assert {unmatched.name for unmatched in graph.unmatched} == {"extra.weight", "extra.bias"}
