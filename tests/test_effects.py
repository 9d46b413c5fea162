"""Activation functions written by hand, tensors that lend a shape, weights that their layer rescales."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghn_init import OutOfDistributionWarning, load, plan, predict, trace

if TYPE_CHECKING:
    from collections.abc import Callable


class Swish(torch.autograd.Function):
    """As in ports of EfficientNet, to save memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        y = x.sigmoid()
        return grads[0] * (y + x * y * (1 - y))


class Elementwise(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def between(function: nn.Module) -> nn.Module:
    """A convolution, the function, and a second convolution."""
    return nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), function, nn.Conv2d(4, 4, 1, bias=False))


def by_hand(function: Callable[[Tensor], Tensor]) -> nn.Module:
    return between(Elementwise(function))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swish": lambda x: x * torch.sigmoid(x),
    "swish as a method": lambda x: x.sigmoid().mul(x),
    "swish in place": lambda x: x.mul_(x.sigmoid()),
    "swish as a function": Swish.apply,  # type: ignore[dict-item]
    "mish": lambda x: x * torch.tanh(F.softplus(x)),
    "quick gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu": lambda x: 0.5 * x * (1 + torch.tanh(0.79788 * (x + 0.044715 * x**3))),
    "exact gelu": lambda x: x * 0.5 * (1.0 + torch.erf(x / 2**0.5)),
    "hard swish": lambda x: x * F.hardtanh(x + 3, 0.0, 6.0) / 6,
    "clamp": lambda x: x.clamp(min=0),
    "clamp to six": lambda x: torch.clamp(x, 0, 6),
    "maximum": lambda x: torch.maximum(x, torch.tensor(0.0)),
    "where": lambda x: torch.where(x > 0, x, 0.2 * x),
    "masked": lambda x: x * (x > 0),
    "masked, as numbers": lambda x: x * (x > 0).type_as(x),
    "a mask and its other half": lambda x: x * (1 - (x < 0).float()),
    "a mask turned": lambda x: x * ~(x < 0).to(torch.bool),
    "filled": lambda x: x.masked_fill(x < 0, 0.0),
    "squared": lambda x: F.relu(x) ** 2,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_by_hand_are_what_they_do(name: str) -> None:
    assert trace(by_hand(ACTIVATIONS[name]), (2, 3, 8, 8)).rectified == {1}


def test_the_sum_of_two_branches_is_rectified_by_a_slope_that_is_learned() -> None:
    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(3, 4, 1, bias=False)
            self.activation = nn.PReLU(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.activation(self.left(x) + self.right(x))

    graph = trace(Summed(), (2, 3, 8, 8))
    assert [graph.nodes[index].type for index in graph.rectified] == ["sum"]


@pytest.mark.parametrize("make", [nn.RReLU, nn.PReLU, lambda: nn.Threshold(0.1, 0.0), nn.ReLU, nn.SiLU])
def test_activations_of_torch_are_known(make: Callable[[], nn.Module]) -> None:
    assert trace(between(make()), (2, 3, 8, 8)).rectified == {1}


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * torch.tanh(x),
        lambda x: x.clamp(-3, 3),
        lambda x: x * 2 + 3,
        lambda x: x * x.abs(),
        lambda x: torch.where(x > 0, x, 0.8 * x),
        lambda x: x * x.mean((2, 3), keepdim=True).sigmoid(),
        lambda x: x * torch.rand(4, 1, 1),
        lambda x: torch.max(x, 1, keepdim=True)[0] + x,
        lambda x: x * torch.softmax(x, 1),
        lambda x: x * (~x.long()),
        lambda x: x * torch.clamp(x, min=torch.rand(8)),
    ],
)
def test_other_functions_of_each_element_are_no_activations(function: Callable[[Tensor], Tensor]) -> None:
    assert not trace(by_hand(function), (2, 3, 8, 8)).rectified


def test_no_random_state_is_touched_to_find_out() -> None:
    model = by_hand(lambda x: F.dropout(x) * x.sigmoid())
    before = torch.get_rng_state()
    trace(model, (2, 3, 8, 8))
    assert torch.equal(torch.get_rng_state(), before)


def test_long_chains_are_left_alone() -> None:
    def series(x: Tensor) -> Tensor:
        y = x
        for _ in range(2000):
            y = y * x.sigmoid()
        return y

    assert not trace(by_hand(series), (2, 3, 8, 8)).rectified - {1}


# -- what lends its shape ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["reshape_as", "view_as", "expand_as", "type_as", "to"])
def test_a_tensor_that_lends_its_shape_has_no_edge(name: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)
            self.last = nn.Conv2d(4, 4, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.last(getattr(self.norm(y), name)(y))

    assert trace(Net(), (2, 3, 8, 8)).edges == ((0, 1), (1, 2), (2, 3))


@pytest.mark.parametrize("move", [lambda t, x: t.to(x), lambda t, x: t.type_as(x)])
def test_constants_that_are_moved_keep_their_values(move: Callable[[Tensor, Tensor], Tensor]) -> None:
    def solved(x: Tensor) -> Tensor:
        times = move(torch.tensor([0.0, 0.5]), x)
        assert (times[1:] > times[:-1]).all()
        return x * float(times[1])

    assert len(trace(by_hand(solved), (2, 3, 8, 8)).nodes) == 3


# -- inputs -----------------------------------------------------------------------------------------


class Coordinates(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        n, _, height, width = x.shape
        places = torch.meshgrid(
            torch.linspace(-1, 1, height, device=x.device), torch.linspace(-1, 1, width), indexing="ij"
        )
        return torch.cat([x, torch.stack(places).to(x).expand(n, 2, height, width)], 1)


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(Coordinates(), nn.Conv2d(5, 4, 3)),
        nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, 4, 3)),
        nn.Sequential(nn.PixelUnshuffle(4), nn.Flatten(2), nn.Linear(8 * 8, 4)),
    ],
)
def test_layers_that_make_channels_of_an_images_are_found_an_input(model: nn.Module) -> None:
    assert trace(model).nodes[1].type == "conv"


# -- weights that are rescaled ----------------------------------------------------------------------


class Equalised(nn.Conv2d):
    """Of ProGAN and StyleGAN: the parameter has a deviation of 1 (Karras et al. 2018, arXiv 1710.10196)."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        scale = (self.in_channels * 9) ** -0.5
        return F.conv2d(x, self.weight * scale, None, self.stride, self.padding)


class Standardised(nn.Conv2d):
    """Qiao et al. 2019, arXiv 1903.10520, as timm has it."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True, momentum=0.0).reshape_as(self.weight)
        return F.conv2d(x, weight, None, self.stride, self.padding)


def of(layer: type[nn.Conv2d], *, norm: bool) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 16), (16, 32), (32, 32)):
        layers += [layer(inputs, outputs, 3, padding=1, stride=2, bias=False)]
        layers += [nn.BatchNorm2d(outputs)] if norm else []
        layers += [nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


@pytest.mark.parametrize("layer", [Equalised, Standardised])
def test_weights_that_are_rescaled_keep_their_scale_and_norms_get_statistics(layer: type[nn.Conv2d]) -> None:
    model = of(layer, norm=True)
    assert len(trace(model).rescaled) == 3
    before = model[3].weight.detach().square().mean().sqrt()
    predict(model, load())
    rows = {row.name: row for row in plan(model, load()).rows}
    assert rows["3.weight"].rms is not None
    after = model[3].weight.detach().square().mean().sqrt()
    assert 0.2 < float(after / before) <= 1.001  # less, where the prediction is more coherent
    x = torch.randn(64, 3, 32, 32)
    with torch.no_grad():
        evaluating, training = model.eval()(x).std(), model.train()(x).std()
    assert 0.1 < float(evaluating / training) < 10


def through(function: Callable[[Tensor], Tensor]) -> type[nn.Conv2d]:
    """A convolution whose weight is a function of the parameter."""

    class Through(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, function(self.weight), None, self.stride, self.padding)

    return Through


FILTER: Any = {"dim": (1, 2, 3), "keepdim": True}


@pytest.mark.parametrize(
    ("function", "scale"),
    [
        (lambda w: (w - w.mean(**FILTER)) / (w.std(**FILTER) + 1e-5), 1.0),
        (lambda w: (w - w.mean(**FILTER)) * torch.rsqrt(w.var(**FILTER) + 1e-5), 1.0),
        (lambda w: w / w.var(**FILTER).add(1e-5).sqrt() * 0.5, 0.5),
        (lambda w: (w - torch.var_mean(w, **FILTER)[1]) / torch.var_mean(w, **FILTER)[0].sqrt(), 1.0),
        (lambda w: w / w.flatten(1).std(dim=1).view(-1, 1, 1, 1).expand_as(w), 1.0),
        (lambda w: w * (1 / (w.var(**FILTER).add(1e-5) ** 0.5)), 1.0),
        (lambda w: w * w.var(**FILTER).add(1e-5).pow(-0.5), 1.0),
        (torch.sign, 1.0),
        (lambda w: w / (w.std(**FILTER) + 1.0), None),
        (lambda w: w / w.square().sum((1, 2, 3), keepdim=True).sqrt(), None),
        (lambda w: w.sign() * w.abs().mean((1, 2, 3), keepdim=True), None),
        (lambda w: w.clamp(-1, 1), None),
    ],
)
def test_weights_that_are_standardised_by_hand_are_told(
    function: Callable[[Tensor], Tensor], scale: float | None
) -> None:
    model = of(through(function), norm=True)
    assert set(trace(model).rescaled.values()) == {scale}
    predict(model, load())
    x = F.interpolate(torch.randn(64, 3, 8, 8), (32, 32), mode="bilinear")
    with torch.no_grad():
        evaluating, training = model.eval()(x).std(), model.train()(x).std()
    assert 0.1 < float(evaluating / training) < 10


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    "function",
    [
        torch.exp,
        F.softplus,
        torch.abs,
        torch.sigmoid,
        torch.relu,
        lambda w: w.pow(2) + 1e-3,
        lambda w: 1 / w,
        lambda w: w.clone().abs_(),
        lambda w: torch.max(w.exp(), torch.zeros_like(w)),
    ],
)
def test_parameters_that_are_not_the_weight_itself_are_kept(
    function: Callable[[Tensor], Tensor], *, norm: bool
) -> None:
    model = of(through(function), norm=norm)
    before = {name: value.clone() for name, value in model.named_parameters() if value.ndim == 4}
    rows = {row.name: row for row in plan(model, load(), scale="predicted").rows}
    assert all("before a layer uses it" in rows[name].reason for name in before)
    predict(model, load(), scale="predicted")
    assert all(torch.equal(before[name], dict(model.named_parameters())[name]) for name in before)


def test_scales_that_go_through_a_function_do_not_keep_the_weight() -> None:
    class Scaled(nn.Conv2d):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.logarithm = nn.Parameter(torch.zeros(self.out_channels, 1, 1, 1))
            self.mask = nn.Parameter(torch.zeros(self.weight.shape))

        def forward(self, x: Tensor) -> Tensor:
            weight = self.mask.sigmoid() * self.weight * self.logarithm.exp() * (self.weight.abs() > 0)
            return F.conv2d(x, weight, None, self.stride, self.padding)

    assert [node.param for node in trace(of(Scaled, norm=True)).nodes if node.type == "conv"][:3] == [
        "0.weight", "3.weight", "6.weight",
    ]  # fmt: skip


def test_networks_without_norm_that_rescale_their_weights_stay_as_they_are() -> None:
    model = of(Equalised, norm=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.warns(OutOfDistributionWarning, match="nothing is predicted"):
        predict(model, load())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_weight_over_the_deviation_of_another_is_not_standardised() -> None:
    class Other(nn.Conv2d):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.other = nn.Parameter(torch.randn(self.out_channels, 7))

        def forward(self, x: Tensor) -> Tensor:
            weight = self.weight / self.other.std(1).view(-1, 1, 1, 1)
            return F.conv2d(x, weight, None, self.stride, self.padding)

    assert set(trace(of(Other, norm=True)).rescaled.values()) == {None}
