"""plan, predict, diversify and calibrate_batchnorm."""

from __future__ import annotations

import copy
import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import ghn_init
from ghn_init import (
    GHN,
    CheckpointError,
    GHNConfig,
    PredictError,
    calibrate_batchnorm,
    load,
)
from ghn_init._weights import load as loading
from ghn_init._writing import diversify as diversifying
from ghn_init._writing import predictions
from ghn_init._writing.diversify import diversify, filter_correlation
from ghn_init._writing.shown import shown

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ghn_init._graph.graph import Graph
    from ghn_init._hypernetwork.tile import Tile


def fake() -> nn.Module:
    with FakeTensorMode():
        return nn.Linear(3, 4)


plan = partial(ghn_init.plan, scale="predicted", frozen="predict")
predict = partial(ghn_init.predict, scale="predicted", frozen="predict")
"""What is written here is compared with the predictions themselves; tests/test_scale.py has the default."""


class Net(nn.Module):
    """A stem, a residual pair, and a classifier; 80 channels do not divide by the decoder's 64."""

    def __init__(self, num_classes: int = 10, width: int = 80) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.grow = nn.Conv2d(16, width, 3, stride=2, padding=1)
        self.mix = nn.Conv2d(width, width, 1, bias=False)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.grow(self.norm(self.stem(x)).relu())
        x = x + self.depthwise(self.mix(x)).relu()
        return self.fc(x.mean((2, 3)))


@pytest.fixture(scope="module")
def ghn() -> GHN:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(1)
        return GHN(GHNConfig.ghn2()).requires_grad_(False)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(model.state_dict())


def assert_same_state(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


class Broken(GHN):
    """A GHN whose prediction of one parameter is spoiled, or that fails."""

    spoil: Callable[[Tile], Tile] | None = None
    spoiled = "fc.weight"

    def predict_tiles(self, graph: Graph, names: Any = None) -> dict[str, Tile]:
        tiles = super().predict_tiles(graph, names)
        if self.spoil is None:
            raise RuntimeError("out of luck")
        tiles[self.spoiled] = self.spoil(tiles[self.spoiled])
        return tiles


# Planning ---------------------------------------------------------------------------------------------


def test_plan_has_a_row_for_every_parameter_and_changes_nothing(ghn: GHN) -> None:
    model = Net()
    model.stem.eval()
    before, modes = state(model), [m.training for m in model.modules()]
    random_state = torch.get_rng_state()
    rows = {row.name: row for row in plan(model, ghn).rows}
    assert list(rows) == [name for name, _ in model.named_parameters()]
    assert rows["stem.weight"].action == "predicted"
    assert rows["stem.weight"].node == "conv"
    assert rows["depthwise.weight"].node == "sep_conv"
    assert rows["norm.bias"].node == "bn"
    assert rows["mix.weight"].action == "tiled"
    assert rows["fc.weight"].shape == (10, 80)
    assert_same_state(model, before)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)


def test_plan_reads_as_a_table_and_as_json(ghn: GHN) -> None:
    planned = plan(Net(num_classes=7), ghn)
    text = str(planned)
    assert re.search(r"^mix\.weight +80x80x1x1 +conv +tiled$", text, re.M)
    assert re.search(r"^kept +2 +567 +\d+\.\d%$", text, re.M)
    assert "classifier of width 7; the GHN was trained for 10" in text
    assert max(map(len, text.splitlines())) < 160
    values = json.loads(json.dumps(planned.to_dict()))
    assert values["model"] == "Net"
    assert values["summary"]["kept"] == {"parameters": 2, "elements": 567}
    assert [row["name"] for row in values["rows"]] == [row.name for row in planned.rows]
    assert repr(planned).startswith("<Plan of Net: predicted=")


def test_tensors_are_what_apply_writes(ghn: GHN) -> None:
    model = Net()
    planned = plan(model, ghn, diversify="noise")
    values = dict(planned.tensors())
    planned.apply()
    for name, param in model.named_parameters():
        assert torch.equal(values[name], param), name


@pytest.mark.parametrize("method", ["noise", "orthogonal"])
def test_a_prediction_of_zeros_stays_zero_when_it_is_diversified(method: Any, ghn: GHN) -> None:
    nothing = copy.deepcopy(ghn)
    for parameter in nothing.parameters():
        parameter.detach().zero_()
    model = ghn_init.predict(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten()), nothing, diversify=method)
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_a_parameter_is_named_by_its_own_name_whatever_it_contains(ghn: GHN) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleDict({"conv [1]": nn.Conv2d(3, 8, 3), "conv 1": nn.Conv2d(8, 8, 3)})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers["conv 1"](self.layers["conv [1]"](x))

    rows = plan(Named(), ghn, include="layers.conv [1].weight", example_input=(1, 3, 9, 9)).rows
    assert [row.name for row in rows if row.action != "kept"] == ["layers.conv [1].weight"]


# Writing ----------------------------------------------------------------------------------------------


def test_predict_writes_every_parameter_in_place(ghn: GHN) -> None:
    model = Net()
    before = state(model)
    objects = dict(model.named_parameters())
    pointers = {name: param.data_ptr() for name, param in objects.items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert predict(model, ghn) is model
    for name, param in model.named_parameters():
        assert param is objects[name]
        assert param.data_ptr() == pointers[name]
        assert param.requires_grad
        assert param.isfinite().all()
        assert not torch.equal(param, before[name]), name
    assert optimizer.param_groups[0]["params"][0] is model.stem.weight
    view = shown(plan(model, ghn).graph)
    assert view.neutral.keys() == {"stem.bias"}
    expected = {"stem.bias": torch.zeros(16)} | ghn(view.graph)[0]
    for name, param in model.named_parameters():
        torch.testing.assert_close(param.detach(), expected[name], rtol=1e-4, atol=1e-5)


def test_predicting_gives_the_same_bits_every_time(ghn: GHN) -> None:
    torch.manual_seed(0)
    first = predict(Net(), ghn)
    torch.manual_seed(1)
    second = Net()
    planned = plan(second, ghn)
    planned.apply()
    assert_same_state(second, state(first))
    planned.apply()
    assert_same_state(second, state(first))


@pytest.mark.parametrize("options", [{}, {"head": "predict"}])
def test_weights_give_the_same_bits_named_or_loaded(options: dict[str, Any]) -> None:
    models = []
    for weights in ("ghn3-cifar10", load("ghn3-cifar10"), load("ghn3-cifar10").requires_grad_(False)):
        torch.manual_seed(0)
        models.append(predict(torchvision.models.mobilenet_v3_small(num_classes=10), weights, **options))
    for model in models[1:]:
        assert_same_state(model, state(models[0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_get_the_rounded_values(ghn: GHN, dtype: torch.dtype) -> None:
    wide, other = predict(Net(), ghn), predict(Net().to(dtype), ghn)
    for (name, a), b in zip(wide.named_parameters(), other.parameters(), strict=True):
        assert b.dtype == dtype
        assert torch.equal(a.to(dtype), b), name


def test_channels_last_and_frozen_parameters_stay_so(ghn: GHN) -> None:
    plain = predict(Net(), ghn)
    model = Net().to(memory_format=torch.channels_last).requires_grad_(False)
    strides = model.grow.weight.stride()
    predict(model, ghn)
    assert model.grow.weight.stride() == strides
    assert not any(param.requires_grad for param in model.parameters())
    assert_same_state(model, state(plain))


def test_tied_parameters_are_written_once(ghn: GHN) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 16, 3)
            self.first, self.second = nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3)
            self.second.weight = self.first.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(self.stem(x)).relu()
            return x[..., 1:-1, 1:-1] + self.second(x)

    model = Tied()
    planned = plan(model, ghn)
    row = next(row for row in planned.rows if row.also)
    assert (row.name, row.also) == ("first.weight", ("second.weight",))
    assert "tied to second.weight" in str(planned)
    planned.apply()
    assert model.second.weight is model.first.weight
    kept = plan(model, ghn, exclude="second.weight")
    assert {row.name for row in kept.rows if row.action == "kept"} == {"first.weight"}


# The choices -------------------------------------------------------------------------------------------


def kept(model: nn.Module, ghn: GHN, **options: Any) -> dict[str, str]:
    return {row.name: row.reason for row in plan(model, ghn, **options).rows if row.action == "kept"}


def test_the_head_is_predicted_where_its_width_is_known_or_it_is_wanted(ghn: GHN) -> None:
    assert kept(Net(10), ghn) == {}
    assert set(kept(Net(7), ghn)) == {"fc.weight", "fc.bias"}
    assert kept(Net(10), ghn, head="keep")["fc.bias"] == "classifier (head='keep')"
    assert kept(Net(7), ghn, head="predict") == {}
    model = predict(Net(25), ghn, head="predict")
    assert model.fc.weight.isfinite().all()
    assert torch.equal(model.fc.weight[:5], model.fc.weight[10:15])


def test_include_and_exclude_choose_by_patterns(ghn: GHN) -> None:
    everything = {name for name, _ in Net().named_parameters()}
    assert set(kept(Net(), ghn, include=["stem.*", "norm.*"])) == {
        name for name in everything if not name.startswith(("stem", "norm"))
    }
    assert kept(Net(), ghn, exclude="*.bias")["norm.bias"] == "excluded by '*.bias'"
    model = Net()
    before = state(model)
    predict(model, ghn, include="stem.*", exclude="*.bias")
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"stem.weight"}


def test_included_values_are_those_of_the_whole_prediction(ghn: GHN) -> None:
    whole, part = (
        predict(Net(), ghn, diversify="noise"),
        predict(Net(), ghn, include="mix.*", diversify="noise"),
    )
    torch.testing.assert_close(whole.mix.weight, part.mix.weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"include": "stemm.weight"}, r"include: the pattern 'stemm.weight' matches none.*stem.weight"),
        ({"exclude": "fc"}, r"exclude: the pattern 'fc' matches none.*did you mean 'fc\.\*'\?"),
        ({"exclude": ["fc.*", 3]}, "expected name patterns, found 3"),
        ({"head": "both"}, "head='both': expected one of 'auto', 'predict', 'keep'"),
        ({"diversify": "qr"}, "diversify='qr': expected None, 'noise', 'orthogonal'"),
        ({"seed": 1.5}, "seed=1.5: expected an integer"),
        ({"seed": True}, "seed=True: expected an integer"),
        ({"include": 5}, r"include=5: expected a name pattern such as 'layer1\.\*', or several in a list"),
    ],
)
def test_bad_options_are_refused(ghn: GHN, options: dict[str, Any], message: str) -> None:
    with pytest.raises(PredictError, match=message):
        plan(Net(), ghn, **options)


def test_a_seed_of_numpy_is_as_good_as_pythons(ghn: GHN) -> None:
    ours, numpys = (predict(Net(), ghn, diversify="noise", seed=seed) for seed in (3, np.int64(3)))
    assert torch.equal(ours.mix.weight, numpys.mix.weight)


def test_strict_lists_what_would_be_kept(ghn: GHN) -> None:
    class Scaled(Net):
        def __init__(self) -> None:
            super().__init__(num_classes=7)
            self.unused = nn.Parameter(torch.zeros(3))

    with pytest.raises(PredictError, match=r"3 of 12 parameters would be kept:\n  unused: .*\n  fc.weight: "):
        plan(Scaled(), ghn, strict=True)
    assert set(kept(Scaled(), ghn, strict=True, exclude=["unused", "fc.*"])) == {
        "unused",
        "fc.weight",
        "fc.bias",
    }
    assert kept(Net(), ghn, strict=True) == {}


def test_a_plan_with_nothing_to_write_is_an_error(ghn: GHN) -> None:
    planned = plan(Net(), ghn, exclude="*")
    with pytest.raises(
        PredictError, match=r"nothing to write, all 11 parameters are kept \(excluded by '\*'\)"
    ):
        planned.apply()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Net, r"Net is a class; expected an instance: predict\(Net\(...\)\)"),
        ("resnet50", "expected a torch.nn.Module, found str 'resnet50'"),
        (None, "expected a torch.nn.Module, found NoneType"),
        (nn.ReLU(), "ReLU has no parameters"),
        (
            fake(),
            r"Linear was made under FakeTensorMode: .*; build it without that, or in ghn_init\.large_on_m",
        ),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.LazyLinear(10)), "1.weight, 1.bias have no shape yet"),
    ],
)
def test_bad_models_are_refused(ghn: GHN, model: Any, message: str) -> None:
    with pytest.raises(PredictError, match=message):
        predict(model, ghn)


# Parameters that cannot be written ---------------------------------------------------------------------


def test_parameters_that_cannot_take_floats_are_kept(ghn: GHN) -> None:
    model = Net()
    model.table = nn.Parameter(torch.arange(3), requires_grad=False)
    model.spectrum = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    model.rare = nn.Parameter(torch.eye(3).to_sparse())
    model.none = nn.Parameter(torch.zeros(0, 3))
    model.mix.weight = nn.Parameter(torch.zeros(80, 1, 1, 1).expand(80, 80, 1, 1))
    with torch.inference_mode():
        model.grow.bias = nn.Parameter(torch.zeros(80))
    assert kept(model, ghn) == {
        "table": "int64 values",
        "spectrum": "complex64 values",
        "rare": "sparse_coo layout",
        "none": "no elements",
        "mix.weight": "its elements share memory (expanded tensor)",
        "grow.bias": "made under torch.inference_mode(), which forbids writing: build it outside",
    }
    predict(model, ghn)
    assert model.table.tolist() == [0, 1, 2]
    assert model.stem.weight.isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("how", [None, "noise", "orthogonal"])
def test_a_gpu_gets_the_same_bits(ghn: GHN, how: Any) -> None:
    expected = state(predict(Net(), ghn, diversify=how))
    model = predict(Net().cuda(), ghn, diversify=how)
    assert model.fc.weight.is_cuda
    assert_same_state(model.cpu(), expected)


# Failures ----------------------------------------------------------------------------------------------


def _with_nan(tile: Tile) -> Tile:
    block = tile.block.clone()
    block.view(-1)[3] = float("nan")
    return replace(tile, block=block)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (None, "Net: the GHN failed: RuntimeError: out of luck"),
        (_with_nan, "fc.weight: not finite"),
        (
            lambda tile: replace(tile, block=tile.block.fill_(1e5)),
            "fc.weight: not finite, or past the largest",
        ),
        (lambda tile: replace(tile, stored=(10, 81)), r"fc.weight: shape \(10, 81\), expected \(10, 80\)"),
    ],
)
def test_a_failing_ghn_leaves_the_model_as_it_was(spoil: Any, message: str) -> None:
    broken = Broken(GHNConfig.ghn2()).requires_grad_(False)
    broken.spoil = spoil
    model = Net().half()
    model.norm.eval()
    before, random_state = state(model), torch.get_rng_state()
    with pytest.raises(PredictError, match=message):
        predict(model, broken)
    assert_same_state(model, before)
    assert (model.norm.training, model.training) == (False, True)
    assert torch.equal(torch.get_rng_state(), random_state)


def with_another_width(model: Net) -> None:
    model.fc = nn.Linear(80, 11)


def with_another_layer_of_the_same_shape(model: Net) -> None:
    model.fc = nn.Linear(80, 10)


def with_a_tie(model: Net) -> None:
    model.mix.weight = nn.Parameter(model.mix.weight.detach().clone())
    model.fc.weight, model.fc.bias = nn.Parameter(torch.ones(10, 80)), nn.Parameter(torch.ones(10))
    model.tied = model.fc


def with_one_layer_more(model: Net) -> None:
    model.fc_after = nn.Linear(10, 10)


def with_one_layer_less(model: Net) -> None:
    model.fc = nn.Identity()


def without_a_running_mean(model: Net) -> None:
    model.norm.running_mean = None  # type: ignore[assignment]  # pyright: ignore[reportAttributeAccessIssue]


def with_other_statistics(model: Net) -> None:
    model.norm.running_var = torch.ones(3)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (with_another_width, r"fc\.weight, fc\.bias"),
        (with_another_layer_of_the_same_shape, r"fc\.weight, fc\.bias"),
        (with_a_tie, r"fc\.weight, tied\.weight, fc\.bias, tied\.bias"),
        (with_one_layer_more, r"fc_after\.weight, fc_after\.bias"),
        (with_one_layer_less, r"fc\.weight, fc\.bias"),
        (without_a_running_mean, r"norm\.running_mean"),
        (with_other_statistics, r"norm\.running_var"),
    ],
)
def test_a_model_that_changed_since_the_plan_is_refused(
    ghn: GHN, tmp_path: Path, change: Callable[[Net], None], names: str
) -> None:
    model = Net()
    planned = plan(model, ghn, scale="own")
    change(model)
    before = state(model)
    for use in (planned.apply, lambda: planned.save(tmp_path / "out"), lambda: dict(planned.tensors())):
        with pytest.raises(
            PredictError, match=rf"Net changed since it was planned: {names}; make a new plan"
        ):
            use()
    assert_same_state(model, before)
    assert not list(tmp_path.iterdir())


def test_parameters_that_are_new_objects_are_no_change(ghn: GHN) -> None:
    model = Net()
    planned = plan(model, ghn)
    expected = state(planned.apply())
    for name, param in list(model.named_parameters()):
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, nn.Parameter(torch.zeros_like(param)))
    assert_same_state(planned.apply(), expected)


def test_bundled_weights_are_read_once_and_files_every_time(
    ghn_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Any] = []
    monkeypatch.setattr(predictions, "load", lambda weights: read.append(weights) or load(weights))
    monkeypatch.setattr(loading, "_bundled_folder", lambda: ghn_dir.parent)
    for cache in (predictions._names, predictions._bundled):
        cache.cache_clear()
    try:
        with torch.device("meta"):
            model = predict(Net(), ghn_dir.name)
        assert_same_state(predict(Net(), ghn_dir.name), state(model))
        assert read == [ghn_dir.name]
        assert_same_state(predict(Net(), ghn_dir), state(model))
        assert_same_state(predict(Net(), str(ghn_dir)), state(model))
        assert read == [ghn_dir.name, ghn_dir, str(ghn_dir)]
        assert plan(Net(), ghn_dir.name).weights == ghn_dir.name
    finally:
        for cache in (predictions._names, predictions._bundled):
            cache.cache_clear()


@pytest.mark.parametrize("weights", ["ghn9-nowhere", None, 3])
def test_bad_weights_are_refused(weights: Any) -> None:
    model = Net()
    before = state(model)
    with pytest.raises(CheckpointError, match=r"ghn9-nowhere|weights of type"):
        predict(model, weights)
    assert_same_state(model, before)


def test_threads_get_the_serial_results(ghn: GHN) -> None:
    expected = state(predict(Net(), ghn))
    models = [Net() for _ in range(8)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda model: predict(model, ghn), models))
    for model in models:
        assert_same_state(model, expected)


# What the caller has set -------------------------------------------------------------------------------


def test_the_callers_contexts_do_not_change_the_values(ghn: GHN) -> None:
    expected = state(predict(Net(), ghn))
    model = Net()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode(), torch.device("meta"):
        predict(model, ghn)
    assert_same_state(model, expected)
    model(torch.zeros(1, 3, 8, 8)).sum().backward()
    assert model.fc.weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "options", [{}, {"scale": "predicted"}, {"head": "predict", "diversify": "orthogonal"}]
)
def test_the_default_dtype_does_not_change_the_values(
    dtype: torch.dtype, options: dict[str, Any], ghn: GHN
) -> None:
    expected = state(predict(Net(), ghn, **options))
    model = Net()
    torch.set_default_dtype(dtype)
    try:
        predict(model, ghn, **options)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same_state(model, expected)


# Meta models -------------------------------------------------------------------------------------------


def on_meta(build: Callable[[], nn.Module]) -> Any:
    with torch.device("meta"):
        return build()


def test_meta_models_are_materialised(ghn: GHN) -> None:
    model = on_meta(Net)
    model.grow.weight.requires_grad_(False)
    model.fc.weight.no_decay = True
    predict(model, ghn)
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    assert_same_state(model, state(predict(Net(), ghn)))  # running statistics included
    assert not model.grow.weight.requires_grad
    assert model.fc.weight.no_decay
    assert isinstance(model.fc.weight, nn.Parameter)


def test_kept_parameters_of_a_meta_model_come_from_reset_parameters(ghn: GHN) -> None:
    random_state = torch.get_rng_state()
    model, again = predict(on_meta(lambda: Net(7)), ghn), predict(on_meta(lambda: Net(7)), ghn)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert_same_state(model, state(again))
    assert 0 < model.fc.weight.abs().max() <= 80**-0.5 + 1e-6
    other = predict(on_meta(lambda: Net(7)), ghn, seed=1)
    assert not torch.equal(other.fc.weight, model.fc.weight)
    assert torch.equal(other.mix.weight, model.mix.weight)


def test_ties_and_mixed_devices_survive_materialisation(ghn: GHN) -> None:
    class Mixed(Net):
        def __init__(self) -> None:
            super().__init__()
            self.again = nn.Conv2d(80, 80, 1, bias=False)
            self.again.weight = self.mix.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.grow(self.norm(self.stem(x)).relu())
            return self.fc(self.again(self.mix(x)).mean((2, 3)))

    model = on_meta(Mixed)
    model.depthwise.to_empty(device="cpu")
    nn.init.ones_(model.depthwise.weight)
    predict(model, ghn, exclude="depthwise.*")
    assert model.again.weight is model.mix.weight
    assert model.depthwise.weight.eq(1).all()
    assert not model.fc.weight.is_meta


def test_a_meta_tensor_that_nobody_fills_is_an_error(ghn: GHN) -> None:
    class Lost(Net):
        def __init__(self) -> None:
            super().__init__(7)
            self.token = nn.Parameter(torch.zeros(3))
            self.register_buffer("table", torch.arange(4))

    model = on_meta(Lost)
    before = dict(model.named_parameters())
    planned = plan(model, ghn)
    with pytest.raises(PredictError, match="token, table would have no value"):
        planned.apply()
    assert all(param is before[name] for name, param in model.named_parameters())
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    model.token = nn.Parameter(torch.full((3,), 5.0))
    model.table = torch.arange(4)
    planned.apply()
    assert model.token.tolist() == [5.0] * 3
    assert model.table.tolist() == [0, 1, 2, 3]


def test_initialisers_see_only_what_they_must_fill(ghn: GHN) -> None:
    class Resetting(Net):
        def __init__(self) -> None:
            super().__init__(7)
            self.register_buffer("ones", torch.ones(2))

        def reset_parameters(self) -> None:
            self.ones.data.fill_(1)
            for module in self.children():
                module.reset_parameters()

    model = on_meta(Resetting)
    model.stem = nn.Conv2d(3, 16, 3, padding=1)
    before = model.stem.weight.detach().clone()
    predict(model, ghn, exclude="stem.*")
    assert torch.equal(model.stem.weight, before)
    assert model.ones.tolist() == [1, 1]
    assert model.norm.running_var.eq(1).all()


def test_an_initialiser_that_fails_puts_the_meta_model_back(ghn: GHN) -> None:
    class Failing(nn.Linear):
        def reset_parameters(self) -> None:
            if not self.weight.is_meta:
                raise ValueError("no")

    model = on_meta(lambda: Net(7))
    model.fc = on_meta(lambda: Failing(80, 7))
    with pytest.raises(
        PredictError, match=r"Net .* fc.weight, fc.bias would .* fc.reset_parameters\(\) failed: no"
    ):
        predict(model, ghn)
    assert all(tensor.is_meta for tensor in model.state_dict().values())


# Diversity ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["noise", "orthogonal"])
def test_diversify_separates_copies_and_is_seeded(ghn: GHN, how: Any) -> None:
    plain = predict(Net(), ghn)
    assert torch.equal(plain.mix.weight[:16], plain.mix.weight[64:])
    model, again, other = Net(), Net(), Net()
    random_state = torch.get_rng_state()
    for each in (model, again):
        predict(each, ghn, diversify=how)
    predict(other, ghn, diversify=how, seed=1)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert_same_state(model, state(again))
    assert not torch.equal(model.mix.weight[:16], model.mix.weight[64:])
    assert not torch.equal(model.mix.weight, other.mix.weight)
    assert torch.equal(model.norm.weight, plain.norm.weight)
    assert torch.equal(model.fc.bias, plain.fc.bias)
    assert_same_state(plain, state(predict(Net(), ghn)))  # the tiles themselves are not changed


def test_noise_follows_the_spread_of_correlations() -> None:
    alike = torch.randn(1, 20).expand(50, 20).contiguous()
    apart = torch.randn(50, 20)
    assert filter_correlation(alike, 50) == pytest.approx(1)
    assert filter_correlation(apart, 50) == pytest.approx(20**-0.5, rel=0.1)
    assert filter_correlation(apart[:20], 50) == pytest.approx(
        filter_correlation(torch.cat([apart[:20], apart[:20], apart[:10]]), 50)
    )
    assert filter_correlation(torch.zeros(4, 3), 4) == 0
    noisy = alike.clone()
    diversify(noisy, alike, "noise", name="w", seed=0)
    relative = (noisy - alike).square().mean().sqrt() / alike.square().mean().sqrt()
    assert relative == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize("shape", [(8, 40), (40, 8), (128, 16, 3, 3), (1, 5, 4, 4)])
def test_orthogonal_keeps_the_norm(shape: tuple[int, ...]) -> None:
    weight = torch.randn(4, *shape[1:]).repeat(shape[0] // 4 or 1, *[1] * (len(shape) - 1))[: shape[0]]
    weight = weight.contiguous()
    before = weight.norm()
    diversify(weight, weight.clone(), "orthogonal", name="w", seed=0)
    matrix = weight.flatten(1) if weight[0].numel() >= len(weight) else weight.flatten(1).T
    gram = matrix @ matrix.T
    torch.testing.assert_close(weight.norm(), before, rtol=0.02, atol=0)
    torch.testing.assert_close(gram, torch.eye(len(gram)) * gram.diagonal().mean(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", [(8, 40), (40, 8), (43, 8), (8, 8), (1, 5), (5, 1), (9, 2, 2, 2)])
def test_the_orthogonal_factor_is_that_of_torch(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diversifying, "NOISE_STRENGTH", 0.0)
    weight = torch.randn(shape)
    matrix = weight.clone().flatten(1)
    q, r = torch.linalg.qr(matrix.T if shape[0] < matrix.shape[1] else matrix)
    q = q * torch.where(r.diagonal() < 0, -1.0, 1.0) * (matrix.norm() / min(matrix.shape) ** 0.5)
    diversify(weight, weight.clone(), "orthogonal", name="w", seed=0)
    expected = q.T if shape[0] < matrix.shape[1] else q
    torch.testing.assert_close(weight.flatten(1), expected, rtol=1e-6, atol=1e-6)


# Running statistics ------------------------------------------------------------------------------------


def test_calibration_takes_the_statistics_of_the_data(ghn: GHN) -> None:
    model = predict(Net(), ghn)
    model.eval()
    model.fc.train()
    modes = [m.training for m in model.modules()]
    data = [(torch.randn(4, 3, 8, 8), torch.zeros(4)) for _ in range(3)]
    assert calibrate_batchnorm(model, data) is model
    features = model.stem(torch.cat([images for images, _ in data]))
    torch.testing.assert_close(model.norm.running_mean, features.mean((0, 2, 3)), rtol=1e-3, atol=1e-5)
    assert model.norm.num_batches_tracked == 3
    assert model.norm.momentum == 0.1
    assert [m.training for m in model.modules()] == modes


def test_failed_calibration_puts_everything_back(ghn: GHN) -> None:
    model = Net().eval()
    model.norm.running_mean.fill_(3)
    before = state(model)
    with pytest.raises(PredictError, match="the loader gave no batch"):
        calibrate_batchnorm(model, [])
    with pytest.raises(RuntimeError, match="expected input"):
        calibrate_batchnorm(model, [torch.zeros(2, 3, 8, 8), torch.zeros(2, 4, 8, 8)])
    assert_same_state(model, before)
    assert (model.training, model.norm.training, model.norm.momentum) == (False, False, 0.1)
    with pytest.raises(PredictError, match="Linear has no batch norm"):
        calibrate_batchnorm(nn.Linear(2, 2), [torch.zeros(1, 2)])
    with pytest.raises(PredictError, match="loader: expected batches to go over, found int; give a DataL"):
        calibrate_batchnorm(model, 5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("squeezenet1_0", {"classifier.1.weight", "classifier.1.bias"}),
        (
            "googlenet",
            {f"{layer}.{part}" for layer in ("fc", "aux1.fc2", "aux2.fc2") for part in ("weight", "bias")},
        ),
    ],
)
def test_classifiers_that_are_pooled_or_auxiliary_are_heads_too(name: str, kept: set[str], ghn: GHN) -> None:
    settings = {"init_weights": False} if name == "googlenet" else {}
    with torch.device("meta"):
        model = torchvision.models.get_model(name, num_classes=7, **settings)
    rows = plan(model, ghn).rows
    assert {row.name for row in rows if row.action == "kept"} == kept
    assert {row.action for row in plan(model, ghn, head="predict").rows} <= {"predicted", "tiled"}
