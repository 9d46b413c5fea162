"""Writing through parametrisations of torch.nn.utils."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from ghn_init import GHN, PredictError, load, plan, predict, predict_to, trace

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

EXAMPLE = (1, 3, 16, 16)

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")


@pytest.fixture(scope="module")
def ghn(ghn_dir: Path) -> GHN:
    return load(ghn_dir)


def network(wrap: Callable[[nn.Module], Any] | None = None, stride: int = 1) -> nn.Sequential:
    torch.manual_seed(3)
    inputs = 24 * 196 if stride == 1 else 24 * 49
    model = nn.Sequential(
        nn.Conv2d(3, 24, 3, stride), nn.ReLU(), nn.Flatten(), nn.Linear(inputs, 32), nn.Linear(32, 10)
    )
    if wrap is not None:
        wrap(model[3])
    return model.eval()


def stride_for(wrap: Any) -> int:
    """2 for orthogonal weights, which torch completes to square ones: half a minute for 4,704 inputs."""
    return 2 if wrap is parametrizations.orthogonal else 1


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * 2

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        return weight / 2


def doubled(module: nn.Module) -> nn.Module:
    return parametrize.register_parametrization(module, "weight", Doubled())


EXACT = [doubled, parametrizations.weight_norm]
SPECTRAL = [parametrizations.spectral_norm]
THROUGH = [*EXACT, *SPECTRAL, parametrizations.orthogonal]


@pytest.mark.parametrize("wrap", THROUGH)
def test_the_computed_weight_stands_for_itself_in_the_graph(wrap: Any) -> None:
    model = network(wrap, stride_for(wrap))
    before = state(model)
    hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]
    assert trace(model, EXAMPLE) == trace(network(stride=stride_for(wrap)), EXAMPLE)
    assert hooks == [
        len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()
    ]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("wrap", EXACT)
def test_the_weight_becomes_what_is_predicted(wrap: Any, ghn: GHN) -> None:
    model, plain = network(wrap), predict(network(), ghn, example_input=EXAMPLE)
    params = dict(model.named_parameters())
    planned = plan(model, ghn, example_input=EXAMPLE, strict=True)
    through = [row for row in planned.rows if row.through == "3.weight"]
    assert {row.node for row in through} == {"conv"}
    assert {row.action for row in through} == {"tiled"}
    assert "through 3.weight" in str(planned)
    assert planned.apply() is model
    assert all(param is params[name] for name, param in model.named_parameters())
    torch.testing.assert_close(model[3].weight, plain[3].weight, rtol=1e-5, atol=1e-7)
    x = torch.randn(2, *EXAMPLE[1:])
    torch.testing.assert_close(model(x), plain(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("wrap", SPECTRAL)
def test_the_vectors_of_a_spectral_norm_follow_the_new_weight(wrap: Any, ghn: GHN) -> None:
    model, plain = network(wrap), predict(network(), ghn, example_input=EXAMPLE)
    predict(model, ghn, example_input=EXAMPLE)
    expected = plain[3].weight / torch.linalg.matrix_norm(plain[3].weight, 2)
    torch.testing.assert_close(model[3].weight, expected, rtol=0.02, atol=1e-3)
    assert torch.linalg.matrix_norm(model[3].weight, 2).item() == pytest.approx(1, rel=0.02)


@pytest.mark.filterwarnings("ignore:.*spectral_norm:FutureWarning")
@pytest.mark.parametrize(
    ("wrap", "predicted", "kept"),
    [
        (nn.utils.weight_norm, "3.weight_v", ["3.weight_g"]),
        (nn.utils.spectral_norm, "3.weight_orig", []),
    ],
)
def test_behind_the_older_hooks_the_direction_is_predicted(
    wrap: Any, predicted: str, kept: list[str], ghn: GHN
) -> None:
    model, plain = network(wrap), predict(network(), ghn, example_input=EXAMPLE, scale="own")
    before = state(model)
    rows = plan(model, ghn, example_input=EXAMPLE, scale="own").rows
    assert [row.name for row in rows if row.action == "kept"] == kept
    predict(model, ghn, example_input=EXAMPLE, scale="own")
    model(torch.randn(EXAMPLE))  # the hook computes the weight
    found, expected = model.get_parameter(predicted), plain[3].weight  # one of them may have another length
    torch.testing.assert_close(found / found.norm(), expected / expected.norm())
    assert all(torch.equal(before[name], model.get_parameter(name)) for name in kept)
    assert model[3].weight.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_older_spectral_norm_may_be_of_any_default_dtype(dtype: torch.dtype, ghn: GHN) -> None:
    torch.set_default_dtype(dtype)
    try:
        model = nn.Sequential(nn.utils.spectral_norm(nn.Conv2d(3, 8, 3)), nn.Flatten(), nn.Linear(1568, 10))
        predict(model, ghn, example_input=EXAMPLE, scale="own")
    finally:
        torch.set_default_dtype(torch.float32)
    assert model[0].weight_u.dtype == dtype
    assert model[0].weight_u.float().norm() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("scale", ["own", "predicted"])
def test_the_vectors_of_the_older_spectral_norm_follow_the_new_weight(
    scale: Any, ghn: GHN, tmp_path: Path
) -> None:
    def wrapped() -> nn.Module:
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 24, 3), nn.ReLU(), nn.ConvTranspose2d(24, 16, 3), nn.ReLU(), nn.Flatten(1)]
        model = nn.Sequential(*layers, nn.Linear(16 * 256, 10))
        for index in (0, 2, 5):
            nn.utils.spectral_norm(model[index])
        return model

    model = wrapped()
    model(torch.randn(EXAMPLE))
    random_state = torch.get_rng_state()
    planned = plan(model, ghn, example_input=EXAMPLE, scale=scale)
    assert {row.name for row in planned.rows if row.tile is not None} >= {"0.weight_orig", "5.weight_orig"}
    planned.apply()
    assert torch.equal(torch.get_rng_state(), random_state)
    with torch.no_grad():
        model.eval()(torch.randn(EXAMPLE))
    for index, axis in ((0, 0), (2, 1), (5, 0)):
        weight: Any = model.get_submodule(str(index)).weight
        matrix = weight.detach().movedim(axis, 0).flatten(1)
        assert float(torch.linalg.matrix_norm(matrix, 2)) == pytest.approx(1, abs=0.1)
    meta = wrapped().to("meta")
    predict_to(meta, tmp_path / "out", ghn, example_input=EXAMPLE, scale="predicted")
    on_disk = load_file(tmp_path / "out" / "model.safetensors")
    weight, u, v = (on_disk[f"5.weight_{name}"] for name in ("orig", "u", "v"))
    assert float(u @ weight @ v) == pytest.approx(float(torch.linalg.matrix_norm(weight, 2)), rel=0.1)


@pytest.mark.parametrize(
    "wrap", [parametrizations.orthogonal, parametrizations.spectral_norm, nn.utils.spectral_norm]
)  # fmt: skip
def test_running_statistics_are_those_of_the_weight_that_is_used(wrap: Any) -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 16), (16, 32), (32, 64)):
        conv = wrap(nn.Conv2d(inputs, outputs, 3, 1 + (inputs > 3), padding=1))
        layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU()]
    model = predict(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)))
    x = torch.randn(16, 3, 32, 32)
    with torch.no_grad():
        ratio = model.eval()(x).std() / model.train()(x).std()
    assert 0.4 < ratio < 2.5


def test_an_orthogonal_weight_is_made_orthogonal(ghn: GHN) -> None:
    model, again = (network(parametrizations.orthogonal, stride=2) for _ in range(2))
    random_state = torch.get_rng_state()
    predict(model, ghn, example_input=EXAMPLE)
    assert torch.equal(torch.get_rng_state(), random_state)
    weight = model[3].weight.detach()
    torch.testing.assert_close(weight @ weight.T, torch.eye(32), rtol=0, atol=1e-4)
    predict(again, ghn, example_input=EXAMPLE)
    assert torch.equal(again[3].weight, weight)  # what is drawn to complete the basis is seeded


@pytest.mark.parametrize("wrap", THROUGH)
def test_tensors_and_a_checkpoint_are_what_apply_writes(wrap: Any, ghn: GHN, tmp_path: Path) -> None:
    model = network(wrap, stride_for(wrap))
    before = state(model)
    planned = plan(model, ghn, example_input=EXAMPLE)
    tensors = dict(planned.tensors())
    stored = load_file(planned.save(tmp_path / "out"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    after = state(planned.apply())
    assert set(tensors) > {name for name in after if name.startswith("3.") and "bias" not in name}
    assert all(torch.equal(value, after[name]) for name, value in tensors.items())
    assert all(torch.equal(value, after[name]) for name, value in stored.items())
    assert set(stored) == set(after)


@pytest.mark.parametrize("wrap", [*EXACT, *SPECTRAL])
def test_computed_weights_on_the_meta_device_are_predicted(wrap: Any, ghn: GHN, tmp_path: Path) -> None:
    with torch.device("meta"):
        model = network(wrap)
    stored = load_file(predict_to(model, tmp_path / "out", ghn, example_input=EXAMPLE))
    predict(model, ghn, example_input=EXAMPLE)
    assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())
    assert model(torch.randn(2, *EXAMPLE[1:])).isfinite().all()


def test_a_parametrisation_that_is_lost_on_the_meta_device_is_kept(ghn: GHN) -> None:
    class Masked(Doubled):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.ones(()))

    with torch.device("meta"):
        model = network(lambda m: parametrize.register_parametrization(m, "weight", Masked()))
    planned = plan(model, ghn, example_input=EXAMPLE)
    row = next(row for row in planned.rows if row.through)
    assert row.reason == "parametrised by Masked, which is on the meta device itself"
    with pytest.raises(PredictError, match=r"weight.original.* would have no value"):
        planned.apply()


def test_a_classifier_of_many_copies_is_predicted_through_its_parts(ghn: GHN) -> None:
    """It is taken to own scale by itself, and both of its parts with it."""
    norms = [nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    wide = [nn.Conv2d(16, 1536, 1, bias=False), nn.BatchNorm2d(1536), nn.ReLU()]
    model = nn.Sequential(*norms, *wide, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1536, 10))
    before = parametrizations.weight_norm(model[-1]).weight.detach().clone()
    predict(model, ghn, example_input=(1, 3, 32, 32))
    assert not torch.equal(model[-1].weight, before)


def test_patterns_take_the_weight_and_its_parts(ghn: GHN) -> None:
    model = network(parametrizations.weight_norm)
    for pattern in ("3.weight", "*original1"):
        rows = {row.name: row for row in plan(model, ghn, example_input=EXAMPLE, exclude=pattern).rows}
        for part in ("original0", "original1"):
            assert rows[f"3.parametrizations.weight.{part}"].reason == f"excluded by {pattern!r}"
    rows = plan(model, ghn, example_input=EXAMPLE, include="3.weight").rows
    assert {row.through for row in rows if row.action != "kept"} == {"3.weight"}


class Halved(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight / 2


class Refusing(Halved):
    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("no way back")


class Wrong(Halved):
    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        return weight[:1]


class Infinite(Halved):
    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        return weight / 0


@pytest.mark.parametrize(
    ("parametrisation", "reason"),
    [
        (Halved, "parametrised by Halved, which has no right_inverse"),
        (Refusing, "cannot be inverted: NotImplementedError: no way back"),
        (Wrong, r"cannot be inverted: ValueError: 3.parametrizations.weight.original has shape \(32, 4704\)"),
        (Infinite, "gives values that are not finite"),
    ],
)
def test_what_has_no_way_back_is_kept_with_the_reason(
    parametrisation: type[nn.Module], reason: str, ghn: GHN
) -> None:
    def wrap(module: nn.Module) -> None:
        parametrize.register_parametrization(module, "weight", parametrisation(), unsafe=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(parametrisation, "right_inverse", raising=False)  # torch calls it when it registers
        model = network(wrap)
    before = model[3].weight.detach().clone()
    planned = plan(model, ghn, example_input=EXAMPLE)
    row = next(row for row in planned.rows if row.name == "3.parametrizations.weight.original")
    assert row.action == "kept"
    with pytest.raises(PredictError, match=f"(?s)strict=True, and 1 of 6 .*{reason}"):
        plan(model, ghn, example_input=EXAMPLE, strict=True)
    planned.apply()
    assert torch.equal(model[3].weight, before)


def test_parameters_of_the_parametrisation_are_kept(ghn: GHN) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight * self.scale

        def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
            return weight / self.scale

    model = network(lambda m: parametrize.register_parametrization(m, "weight", Scaled()))
    plain = predict(network(), ghn, example_input=EXAMPLE)
    planned = plan(model, ghn, example_input=EXAMPLE)
    rows = {row.name: row for row in planned.rows}
    assert (
        rows["3.parametrizations.weight.0.scale"].reason
        == "belongs to the parametrisation Scaled of 3.weight"
    )
    planned.apply()
    torch.testing.assert_close(model[3].weight, plain[3].weight)
    assert model[3].parametrizations.weight[0].scale.item() == 2


def test_tied_parts_are_kept(ghn: GHN) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 10))
    doubled(model[0])
    doubled(model[1])
    model[1].parametrizations.weight.original = model[0].parametrizations.weight.original
    rows = {row.name: row for row in plan(model, ghn, example_input=(1, 8), scale="own").rows}
    assert rows["0.parametrizations.weight.original"].reason.endswith("is tied")
    assert rows["2.weight"].action != "kept"


def test_a_module_that_is_used_twice_is_written_once(ghn: GHN) -> None:
    shared, plain = nn.Linear(8, 8), nn.Linear(8, 8)
    doubled(shared)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(8, 10))
    rows = {row.name: row for row in plan(model, ghn, example_input=(1, 8), scale="own").rows}
    row = rows["0.parametrizations.weight.original"]
    assert (row.action, row.through) == ("predicted", "0.weight")
    assert row.also == ("2.parametrizations.weight.original",)
    predict(model, ghn, example_input=(1, 8), scale="predicted")
    usual = nn.Sequential(plain, nn.ReLU(), plain, nn.Linear(8, 10))
    expected = predict(usual, ghn, example_input=(1, 8), scale="predicted")
    torch.testing.assert_close(shared.weight, expected[0].weight)
