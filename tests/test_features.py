"""Features of wide networks: short enough for a classifier to learn from at usual rates."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch
import torchvision
from torch import Tensor, nn

import ghn_init
from ghn_init import GHN, load, plan, predict
from ghn_init._writing import features, statistics

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture(scope="module")
def bundled() -> GHN:
    """The bundled weights."""
    return load("ghn3-cifar10").requires_grad_(False)


def conv(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


def in_a_row(width: int = 1536, classes: int = 10) -> nn.Sequential:
    layers = [conv(3, 32), conv(32, 64, 3, 2), conv(64, 64, 3, 2), conv(64, width, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


class Residual(nn.Module):
    """Its last stage has a shortcut with a bias and no norm, and a block that reads the features."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 32), conv(32, 32))
        self.body = nn.Sequential(
            conv(32, 64, 3, 2), nn.Conv2d(64, 1024, 1, bias=False), nn.BatchNorm2d(1024)
        )
        self.shortcut = nn.Conv2d(32, 1024, 1, 2)
        self.block = nn.Sequential(
            conv(1024, 64, 1), nn.Conv2d(64, 1024, 1, bias=False), nn.BatchNorm2d(1024)
        )
        self.head = nn.Linear(1024, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = (self.body(x) + self.shortcut(x)).relu()
        x = (self.block(x) + x).relu()
        return self.head(x.mean((2, 3)))


def residual_with_biases() -> nn.Module:
    """What reads its features has a bias, so that the norm behind sees a mean that is not in proportion."""
    network = Residual()
    network.block[0] = nn.Sequential(nn.Conv2d(1024, 64, 1), nn.BatchNorm2d(64), nn.ReLU())
    return network


class Hidden(nn.Module):
    """Its classifier has a hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(3, 32), conv(32, 64, 3, 2), conv(64, 512, 1))
        self.hidden, self.head = nn.Linear(512, 256), nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(self.body(x).mean((2, 3))).relu())


class Gated(nn.Module):
    """A factor of its features is not one of its gate."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.gate = (
            in_a_row()[:4],
            nn.Sequential(nn.Conv2d(1536, 64, 1), nn.ReLU(), nn.Conv2d(64, 1536, 1)),
        )
        self.head = nn.Linear(1536, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return self.head((x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid()).mean((2, 3)))


class Shared(nn.Module):
    """Its features come from a convolution that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = conv(3, 64), conv(64, 64)
        self.shared, self.head = nn.Conv2d(64, 64, 1), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(self.stem(x)).relu()
        return self.head((self.body(x) + self.shared(x)).relu().mean((2, 3)))


class Twice(nn.Module):
    """Its last norm is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64)
        self.body, self.head = nn.Conv2d(64, 64, 3), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        return self.head(self.norm(self.body(x)).relu().mean((2, 3)))


class Unweighted(nn.Module):
    """One of the norms that its features come from has no weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left = conv(3, 64), conv(64, 64)
        self.right = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64, affine=False))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((self.left(x) + self.right(x)).relu().mean((2, 3)))


class AlsoFeatures(nn.Module):
    """Gives its features, too."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = in_a_row()[:4], nn.Linear(1536, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.body(x).mean((2, 3))
        return self.head(x), x


def behind(function: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    """A network whose classifier reads a function of its features."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(conv(3, 32), conv(32, 64, 3, 2), *conv(64, 512, 1)[:2])
            self.head = nn.Linear(512, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(function(self.body(x)).mean((2, 3)))

    return Network


def with_divided_classifier() -> nn.Module:
    """Its classifier's weight is divided by its spectral norm, which takes a factor out."""
    network = in_a_row()
    nn.utils.parametrizations.spectral_norm(network[-1])
    return network


def images() -> Tensor:
    coarse = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return 1.2 * nn.functional.interpolate(coarse, size=32, mode="bilinear")


def read_by_classifier(network: nn.Module) -> float:
    """Squared length of what the last linear layer reads, the mean over images."""
    *_, last = (module for module in network.modules() if isinstance(module, nn.Linear))
    read: list[Tensor] = []
    hook = last.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    with torch.no_grad():
        network.train()(images())
    hook.remove()
    return float(read[0].square().sum(1).mean())


def both(
    build: Callable[[], nn.Module], ghn: GHN, monkeypatch: pytest.MonkeyPatch, **options: object
) -> tuple[nn.Module, nn.Module]:
    """The network with predictions as they are, and as if its features were four times too long."""
    networks = []
    for excess in (1.0, 4.0):
        with monkeypatch.context() as patch:
            patch.setattr(features, "_excess", lambda *_, value=excess: value)
            torch.manual_seed(0)
            networks.append(predict(build(), ghn, example_input=(1, 3, 32, 32), **options))  # type: ignore[arg-type]
    return networks[0], networks[1]


KNOWN = [
    in_a_row,
    Residual,
    residual_with_biases,
    Hidden,
    behind(nn.LeakyReLU(0.1)),
    behind(lambda x: 2 * x.relu() / 3),
]


@pytest.mark.parametrize("build", KNOWN)
@pytest.mark.parametrize("training", [True, False])
def test_the_same_function_of_shorter_features(
    build: Callable[[], nn.Module], bundled: GHN, monkeypatch: pytest.MonkeyPatch, *, training: bool
) -> None:
    whole, short = both(build, bundled, monkeypatch)
    with torch.no_grad():
        expected, found = whole.train(training)(images()), short.train(training)(images())
    torch.testing.assert_close(found, expected, rtol=0, atol=0.01 * float(expected.abs().max()))
    assert read_by_classifier(short) == pytest.approx(read_by_classifier(whole) / 4, rel=0.02)


def test_features_of_wide_networks_are_about_as_long_as_is_good(bundled: GHN) -> None:
    network = predict(torchvision.models.resnet18(num_classes=10), bundled, example_input=(1, 3, 32, 32))
    assert 250 < read_by_classifier(network) < 1000
    network = predict(
        torchvision.models.resnet18(num_classes=10), bundled, scale="predicted", example_input=(1, 3, 32, 32)
    )
    assert read_by_classifier(network) > 1500


@pytest.mark.parametrize(("build", "times"), [(in_a_row, 1), (Residual, 1), (residual_with_biases, 2)])
def test_activations_are_followed_again_only_where_they_have_to_be(
    build: Callable[[], nn.Module], times: int, bundled: GHN, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[object] = []
    monkeypatch.setattr(features, "_excess", lambda *_: 4.0)
    followed = statistics.followed
    monkeypatch.setattr(
        "ghn_init._writing.plan.followed", lambda *args: (calls.append(args), followed(*args))[1]
    )
    told = plan(build(), bundled, example_input=(1, 3, 32, 32)).statistics
    assert len(calls) == times
    network, graph, entries = calls[0]  # type: ignore[misc]
    if times == 1:  # the same as if they were
        shorter = features.shortened(graph, entries, followed(network, graph, entries))[0]
        for name, value in followed(network, graph, shorter).statistics.items():
            near = 1e-4 * float(value.abs().max())  # a mean may be next to nothing
            torch.testing.assert_close(told[name], value, rtol=1e-3, atol=near)


class Squashing(nn.Linear):
    """A hidden layer of the user's own that gives a function which passes no factor on."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(super().forward(x))


def test_features_that_a_registered_layer_reads_stay(bundled: GHN, monkeypatch: pytest.MonkeyPatch) -> None:
    def build() -> nn.Module:
        network = in_a_row(512)
        return nn.Sequential(*network[:-1], Squashing(512, 256), nn.Linear(256, 10))

    def shape(layer: Squashing, x: Tensor) -> Tensor:
        return x.new_empty(*x.shape[:-1], layer.out_features)

    with ghn_init.register(Squashing, {"weight": "conv", "bias": "bias"}, shape):
        whole, short = both(build, bundled, monkeypatch)
    for name, value in short.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name])


def test_short_features_stay(bundled: GHN) -> None:
    rows = plan(in_a_row(64), bundled, example_input=(1, 3, 32, 32)).rows
    assert all(row.factor == 1 for row in rows)


@pytest.mark.parametrize("build", KNOWN)
def test_predicting_again_changes_nothing(
    build: Callable[[], nn.Module], bundled: GHN, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "_excess", lambda *_: 4.0)
    network = predict(build(), bundled, example_input=(1, 3, 32, 32))
    once = copy.deepcopy(network.state_dict())
    predict(network, bundled, example_input=(1, 3, 32, 32))
    for name, value in network.state_dict().items():
        torch.testing.assert_close(value, once[name], rtol=1e-5, atol=1e-6)


def test_a_kept_classifier_reads_shorter_features(bundled: GHN, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, short = both(lambda: in_a_row(classes=7), bundled, monkeypatch)
    assert read_by_classifier(short) == pytest.approx(read_by_classifier(whole) / 4, rel=0.02)
    assert torch.equal(short[-1].weight, whole[-1].weight)  # type: ignore[index]


@pytest.mark.parametrize("outputs", [1, 4, 9, 16, 64, 512])
def test_what_is_no_classifier_reads_no_longer_features_than_its_own(outputs: int, bundled: GHN) -> None:
    torch.manual_seed(0)
    own = in_a_row(64, outputs)
    found = predict(copy.deepcopy(own), bundled, example_input=(1, 3, 32, 32))
    assert torch.equal(found[-1].weight, own[-1].weight)
    assert read_by_classifier(found) < 1.2 * read_by_classifier(own)


@pytest.mark.parametrize("outputs", [10, 12, 20, 100])
def test_kept_classifiers_of_many_classes_read_longer_features(outputs: int, bundled: GHN) -> None:
    rows = plan(in_a_row(64, outputs), bundled, example_input=(1, 3, 32, 32), head="keep").rows
    assert all(row.factor == 1 for row in rows)


def in_two_dimensions(branches: int) -> nn.Module:
    """What a small residual network gives of every image, after a hidden layer and so many sums."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = conv(3, 64)
            self.body = nn.ModuleList(conv(64, 64)[:2] for _ in range(branches))
            self.hidden, self.head = nn.Linear(64, 32), nn.Linear(32, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for branch in self.body:
                x = (x + branch(x)).relu()
            return self.head(self.hidden(x.mean((2, 3))).relu())

    return Network()


class Preactivated(nn.Module):
    """Branches of norm, ReLU and convolution, added to what they read, with or without a norm at the end."""

    def __init__(self, *, stem: bool, normalised: bool) -> None:
        super().__init__()
        self.stem = conv(3, 64) if stem else nn.Conv2d(3, 64, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(64) for _ in range(2))
        self.branches = nn.ModuleList(nn.Conv2d(64, 64, 3, padding=1) for _ in range(2))
        self.last = nn.BatchNorm2d(64) if normalised else nn.Identity()
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, branch in zip(self.norms, self.branches, strict=True):
            x = x + branch(norm(x).relu())
        return self.head(self.last(x).relu().mean((2, 3)))


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("stem", [False, True])
def test_features_without_a_norm_are_sums_of_weights_no_larger_than_usual(
    bundled: GHN, *, stem: bool, normalised: bool
) -> None:
    """As at the end of a pre-activated ResNet without a last norm: outputs would be far too large."""
    torch.manual_seed(0)
    network = Preactivated(stem=stem, normalised=normalised)
    usual = network.branches[1].weight.square().mean().sqrt().item()
    rows = {row.name: row for row in plan(network, bundled).rows}
    once = copy.deepcopy(predict(network, bundled).state_dict())
    for name in ("branches.0.weight", "branches.1.weight"):
        assert (rows[name].factor < 1) != normalised
        if not normalised:
            assert once[name].square().mean().sqrt().item() == pytest.approx(usual, rel=0.03)
    for name, value in predict(network, bundled).state_dict().items():
        assert torch.equal(value, once[name])


@pytest.mark.parametrize(("branches", "expected"), [(0, 1 / 12), (1, 1 / 8), (2, 7 / 48)])
def test_the_length_of_own_features_is_told_from_the_graph(branches: int, expected: float) -> None:
    """Half of 1 behind a ReLU; a sum adds 1, and is halved; a linear layer gives a third, halved again."""
    graph = ghn_init.trace(in_two_dimensions(branches))
    (weight, _), *_ = graph.heads
    (last,) = graph.predecessors[weight]
    square = 0.5
    for _ in range(branches):
        square = (square + 1) / 2
    assert expected == pytest.approx(square / 6)
    assert features._own_square(graph, last) == pytest.approx(expected)


def test_convolutions_without_a_norm_are_followed_to_a_norm() -> None:
    network = nn.Sequential(
        conv(3, 16), nn.Conv2d(16, 32, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    graph = ghn_init.trace(nn.Sequential(*network, nn.Linear(32, 4)))
    (weight, _), *_ = graph.heads
    (last,) = graph.predecessors[weight]
    assert features._own_square(graph, last) == pytest.approx(0.5 / 3 / 2)


def test_the_plan_says_so(bundled: GHN) -> None:
    resnet = torchvision.models.resnet18(num_classes=10)
    rows = {row.name: row for row in plan(resnet, bundled, example_input=(1, 3, 32, 32)).rows}
    factor = rows["layer4.1.bn2.weight"].factor
    assert 0.4 < factor < 0.7
    for name in ("layer4.1.bn2.bias", "layer4.0.bn2.weight", "layer4.0.downsample.1.bias"):
        assert rows[name].factor == factor
    assert rows["fc.weight"].factor == pytest.approx(1 / factor, rel=0.01)
    assert rows["layer4.1.bn1.weight"].factor == rows["layer3.1.bn2.weight"].factor == 1


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (in_a_row, {"exclude": "3.1.bias"}),
        (in_a_row, {"exclude": "3.1.*"}),
        (Gated, {}),
        (Shared, {}),
        (Twice, {}),
        (Unweighted, {}),
        (AlsoFeatures, {}),
        (with_divided_classifier, {}),
        (behind(torch.tanh), {}),
        (behind(torch.sigmoid), {}),
        (behind(nn.functional.silu), {}),
        (behind(nn.functional.relu6), {}),
        (behind(nn.functional.normalize), {}),
        (behind(lambda x: x + 1.0), {}),
        (behind(lambda x: x * x), {}),
        (Residual, {"exclude": "shortcut.bias"}),
        (in_a_row, {"scale": "own"}),
        (in_a_row, {"scale": "predicted"}),
        (in_a_row, {"diversify": "orthogonal"}),
        (lambda: torchvision.models.mobilenet_v3_small(num_classes=10), {}),  # the GHN does not know it
    ],
)
def test_features_stay(
    build: Callable[[], nn.Module], options: dict[str, str], bundled: GHN, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, short = both(build, bundled, monkeypatch, **options)
    for name, value in short.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name])


def test_a_wide_resnet_learns_at_a_rate_that_suits_itself(bundled: GHN) -> None:
    """At three times the best rate its own training is unsteady; from predictions it learns."""
    x, y = images(), torch.arange(32) % 10
    torch.manual_seed(0)
    network = ghn_init.predict(torchvision.models.resnet18(num_classes=10), bundled, example_input=x[:1])
    optimizer = torch.optim.SGD(network.parameters(), 0.0067, momentum=0.9)
    for _ in range(12):
        loss = nn.functional.cross_entropy(network(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 1.0
