"""The warning for networks that are far from what a GHN is trained on."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

import ghn_init
from ghn_init import OutOfDistributionWarning, PredictError, plan, predict
from ghn_init.cli import app
from ghn_init.deepnets import DeepNets1M

NO_IMAGE = "no 2-d convolution reads its input, so it is no image network"
GHN = ghn_init.load()


def net(*layers: nn.Module, classes: int = 10) -> nn.Module:
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(nn.Conv2d(3, 8, 3), *layers, pool, nn.Linear(8, classes))


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(1000, 32)
        self.mix = nn.Linear(32, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.mix(self.embed(tokens)).relu().mean(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(8, 32, batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class WithUnused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.unused = net(nn.BatchNorm2d(8)), nn.Linear(1000, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


CASES = {
    "like training": (net(nn.BatchNorm2d(8)), ()),
    "norm before the first convolution": (nn.Sequential(nn.BatchNorm2d(3), net()), ()),
    "unused parameters do not matter": (WithUnused(), ()),
    "no norm": (net(), ("no batch norm",)),
    "layer norms only": (net(nn.GroupNorm(8, 8)), ("no batch norm",)),
    "group norms": (net(nn.GroupNorm(2, 8)), ("no batch norm",)),
    "vectors": (nn.Sequential(nn.Linear(20, 8), nn.BatchNorm1d(8), nn.Linear(8, 10)), (NO_IMAGE,)),
    "signals": (nn.Sequential(nn.Conv1d(1, 8, 9), nn.BatchNorm1d(8), nn.Flatten()), (NO_IMAGE,)),
    "volumes": (nn.Sequential(nn.Conv3d(1, 8, 3), nn.BatchNorm3d(8)), (NO_IMAGE,)),
    "text": (Text(), (NO_IMAGE, "no batch norm", "96% of its parameters fit no node type")),
    "recurrent": (Recurrent(), (NO_IMAGE, "no batch norm", "94% of its parameters fit no node type")),
    "very deep": (
        net(*(nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)) for _ in range(500))),
        ("1,006 nodes",),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_unfamiliar_networks_are_told_with_their_reasons(name: str) -> None:
    model, reasons = CASES[name]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        planned = plan(model, GHN, scale="predicted")
    assert planned.unfamiliar == reasons
    assert planned.to_dict()["unfamiliar"] == list(reasons)
    assert [w.category for w in caught] == [OutOfDistributionWarning] * bool(reasons)
    for reason in reasons:
        assert reason in str(caught[0].message)
        assert str(planned).splitlines()[-1].endswith(", ".join(reasons))


KEPT_WHOLE = {"layer norms only", "vectors", "signals", "text", "recurrent"}


@pytest.mark.parametrize("name", CASES)
def test_by_default_it_is_only_told_that_nothing_is_predicted(name: str) -> None:
    model, reasons = CASES[name]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        planned = plan(model, GHN)
    told = tuple(remark.text for remark in planned.remarks if remark.nothing)
    assert len(told) == (name in KEPT_WHOLE)
    assert (planned.unfamiliar, planned.warned) == ((*reasons, *told), told)
    assert [told[0] in str(w.message) for w in caught] == [True] * len(told)
    assert planned.counts()["kept"][0] < len(planned.rows) or told


def test_what_the_caller_keeps_whole_is_an_error_not_a_warning() -> None:
    model = nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 10))
    for planned in (plan(model, GHN, exclude="*"), plan(model.requires_grad_(False), GHN)):
        assert planned.warned == ()
        with pytest.raises(PredictError, match="nothing to write"):
            planned.apply()


def test_the_advice_is_one_that_helps() -> None:
    with pytest.warns(
        OutOfDistributionWarning, match=r"nothing is predicted \(no node type fits: used by lstm\); see"
    ):
        plan(nn.LSTM(8, 8), GHN)
    with pytest.warns(
        OutOfDistributionWarning, match=r"its network reads no images.*scale='own' predicts all"
    ):
        plan(nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 10)), GHN)
    with torch.inference_mode():
        unwritable = net(nn.BatchNorm2d(8))
    with pytest.raises(PredictError, match=r"nothing to write.*inference_mode.*build it outside"):
        predict(unwritable, GHN)


def test_a_classifier_of_unknown_width_matters_where_it_is_predicted() -> None:
    model = net(nn.BatchNorm2d(8), classes=7)
    assert plan(model, GHN).unfamiliar == ()
    reason = "a predicted classifier of width 7 where the GHN knows 10"
    assert plan(model, GHN, head="predict").unfamiliar == (reason,)


def test_the_warning_points_at_the_callers_line_and_is_shown_once() -> None:
    model = net()
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        warnings.simplefilter("default")
        for _ in range(3):
            predict(model, GHN, scale="predicted")
    assert [warning.filename for warning in caught] == [__file__]
    beside = f"{Path(ghn_init.__file__).parent}_experiments.py"
    call = compile("predict(model, ghn, scale='predicted')", beside, "exec")
    with pytest.warns(OutOfDistributionWarning) as caught:
        exec(call, {"predict": predict, "model": net(), "ghn": GHN})
    assert [warning.filename for warning in caught] == [beside]
    assert "unlike the networks that the GHN was trained on, expect little: no batch norm" in str(
        caught[0].message
    )


def test_an_error_made_of_the_warning_leaves_the_model_as_it_was() -> None:
    model = net()
    before = {name: values.clone() for name, values in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(OutOfDistributionWarning, match="no batch norm"):
            predict(model, GHN, scale="predicted")
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())


@pytest.mark.parametrize(
    "name", ["resnet18", "resnet50", "mobilenet_v3_small", "densenet121", "efficientnet_b0"]
)
def test_usual_networks_are_not_warned_about(name: str) -> None:
    with torch.device("meta"):
        model = torchvision.models.get_model(name)
    assert plan(model, GHN).unfamiliar == ()


def test_networks_of_the_training_distribution_are_not_warned_about() -> None:
    """Up to those that were sampled without any batch norm: 7 of 300 test networks."""
    split = DeepNets1M("test")
    reasons = []
    for index in range(20):
        with torch.device("meta"):
            model = split[index].build(10, 32)
        reasons += plan(model, GHN, example_input=(1, 3, 32, 32)).unfamiliar
    assert set(reasons) <= {"no batch norm"}
    assert len(reasons) <= 2


@pytest.mark.parametrize("command", ["predict", "inspect"])
def test_the_command_says_it_once_on_stderr(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "model", raising=False)
    (tmp_path / "model.py").write_text(
        "from torch import nn\n"
        "plain = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)]\n"
        "network = nn.Sequential(*plain)\n"
    )
    trained = CliRunner().invoke(app, [command, "model.py", "--json"])
    assert "warning: " not in trained.stderr
    done = CliRunner().invoke(app, [command, "model.py", "--json", "--scale", "predicted"])
    assert done.exit_code == 0, done.stderr
    assert done.stderr.count("warning: ") == 1
    assert "expect little: no batch norm\n" in done.stderr
    assert json.loads(done.stdout)["unfamiliar"] == ["no batch norm"]


@pytest.mark.parametrize("command", ["predict", "inspect"])
def test_the_command_says_that_nothing_is_predicted_and_writes_the_networks_own_values(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "model", raising=False)
    (tmp_path / "model.py").write_text("from torch import nn\nnetwork = nn.Linear(8, 4)\n")
    done = CliRunner().invoke(app, [command, "model.py", "--json", "--input-shape", "2,8"])
    assert done.exit_code == 0, done.stderr
    assert done.stderr.count("nothing is predicted") == 1
    report = json.loads(done.stdout)
    assert any("nothing is predicted" in text for text in report["unfamiliar"])
    if command == "predict":
        assert set(load_file(report["file"])) == {"weight", "bias"}
