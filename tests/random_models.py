"""Random networks for the property tests: any layer after any other, as far as shapes allow.

A network is made from a list of numbers: each picks, among the steps that fit the number of dimensions that
the activation has by then, the next one. So hypothesis can shrink a failure to few steps.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Step = Callable[[Tensor], Tensor]

INPUTS = {
    "image": (2, 3, 8, 8), "signal": (2, 4, 16), "tokens": (2, 6), "vector": (2, 12),
    "volume": (2, 2, 4, 4, 4),
}  # fmt: skip


class RandomModel(nn.Module):
    """The network that `numbers` describe, for inputs of `kind`."""

    def __init__(self, kind: str, numbers: Sequence[int]) -> None:
        super().__init__()
        self.kind = kind
        self.built = False
        self.calls = 0
        self.last: Tensor | None = None
        self.steps: list[str] = []
        self.parts = nn.ModuleList()
        self.register_buffer("seen", torch.zeros(3))
        self._run: list[Step] = []
        x = torch.zeros(INPUTS[kind])
        if kind == "tokens":
            table = self.part(nn.Embedding(20, 8))
            self._run.append(table)
            x = table(x.long())
        for number in numbers:
            fitting = STEPS.get(x.dim(), []) + ANYWHERE
            make = fitting[number % len(fitting)]
            self.steps.append(make.__name__)
            step = make(self, x, number)
            self._run.append(step)
            with torch.no_grad():
                x = step(x)
        self.built = True

    def part(self, module: nn.Module) -> nn.Module:
        self.parts.append(module)
        return module

    def example(self) -> Tensor:
        shape = INPUTS[self.kind]
        return torch.zeros(shape, dtype=torch.long if self.kind == "tokens" else torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        for step in self._run:
            x = step(x)
        self.last = x
        return x

    def __repr__(self) -> str:
        return f"RandomModel({self.kind}: {', '.join(self.steps)})"


# Steps: each takes the model, the activation as it is by then, and a number to vary by; it returns the step.


def conv2d(model: RandomModel, x: Tensor, n: int) -> Step:
    k = (1, 3, 5)[n % 3]
    groups = x.shape[1] if n % 5 == 0 else 1
    out = x.shape[1] if groups > 1 else (1, 7, 24, 80)[n % 4]
    return model.part(nn.Conv2d(x.shape[1], out, k, 1 + n % 2, k // 2, groups=groups, bias=n % 7 > 0))


def transposed2d(model: RandomModel, x: Tensor, n: int) -> Step:
    if x.shape[-1] > 16:
        return conv2d(model, x, n)
    return model.part(nn.ConvTranspose2d(x.shape[1], (3, 16)[n % 2], 2, 2))


def norm2d(model: RandomModel, x: Tensor, n: int) -> Step:
    c = x.shape[1]
    layers = (
        nn.BatchNorm2d(c),
        nn.GroupNorm(1, c),
        nn.BatchNorm2d(c, affine=False),
        nn.LayerNorm(x.shape[1:]),
    )
    return model.part(layers[n % 4])


def shared2d(model: RandomModel, x: Tensor, n: int) -> Step:
    """One layer, called several times; its weight tied to that of another."""
    one, two = (model.part(nn.Conv2d(x.shape[1], x.shape[1], 3, padding=1)) for _ in range(2))
    two.weight = one.weight

    def step(x: Tensor) -> Tensor:
        for _ in range(1 + n % 3):
            x = x + one(x).relu()
        return two(x)

    return step


def branches(model: RandomModel, x: Tensor, n: int) -> Step:
    several = [model.part(nn.Conv2d(x.shape[1], 1 + n % 9, 1)) for _ in range(1 + n % 3)]
    return lambda x: torch.cat([x[:, :8], *(branch(x) for branch in several)], 1)


def gate(model: RandomModel, x: Tensor, n: int) -> Step:
    squeeze = model.part(nn.Conv2d(x.shape[1], x.shape[1], 1))
    return lambda x: x * squeeze(x.mean((2, 3), keepdim=True)).sigmoid()


def shuffle(model: RandomModel, x: Tensor, n: int) -> Step:
    return lambda x: torch.cat(x.chunk(2, 1)[::-1], 1)


def pool2d(model: RandomModel, x: Tensor, n: int) -> Step:
    layers = (nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1), nn.AdaptiveAvgPool2d(2), nn.Upsample(size=4))
    return model.part(layers[n % 4])


def to_tokens(model: RandomModel, x: Tensor, n: int) -> Step:
    return lambda x: x.flatten(2).transpose(1, 2)


def to_vector(model: RandomModel, x: Tensor, n: int) -> Step:
    return lambda x: x.flatten(2).mean(2) if n % 2 else x.flatten(1)[:, :64]


def linear(model: RandomModel, x: Tensor, n: int) -> Step:
    return model.part(nn.Linear(x.shape[-1], (1, 8, 30, 100)[n % 4], bias=n % 3 > 0))


def norm_of_tokens(model: RandomModel, x: Tensor, n: int) -> Step:
    return model.part((nn.LayerNorm(x.shape[-1]), nn.RMSNorm(x.shape[-1]))[n % 2])


def attention(model: RandomModel, x: Tensor, n: int) -> Step:
    layer = model.part(nn.MultiheadAttention(x.shape[-1], 1, batch_first=True))
    return lambda x: x + layer(x, x, x, need_weights=bool(n % 2))[0]


def attention_by_hand(model: RandomModel, x: Tensor, n: int) -> Step:
    layer = model.part(nn.Linear(x.shape[-1], 3 * x.shape[-1]))

    def step(x: Tensor) -> Tensor:
        q, k, v = layer(x).chunk(3, -1)
        if n % 2:
            return F.scaled_dot_product_attention(q, k, v)
        return (q @ k.transpose(-2, -1)).softmax(-1) @ v

    return step


def encoder(model: RandomModel, x: Tensor, n: int) -> Step:
    return model.part(nn.TransformerEncoderLayer(x.shape[-1], 1, 16, batch_first=True))


def recurrent(model: RandomModel, x: Tensor, n: int) -> Step:
    layer = model.part((nn.LSTM, nn.GRU)[n % 2](x.shape[-1], 9, batch_first=True))
    return lambda x: layer(x)[0]


def position(model: RandomModel, x: Tensor, n: int) -> Step:
    table = nn.Parameter(torch.zeros(1, x.shape[1], x.shape[2]))
    model.parts.append(nn.ParameterList([table]))
    return lambda x: x + table


def class_token(model: RandomModel, x: Tensor, n: int) -> Step:
    token = nn.Parameter(torch.zeros(1, 1, x.shape[2]))
    model.parts.append(nn.ParameterList([token]))
    return lambda x: torch.cat([token.expand(len(x), -1, -1), x], 1)


def conv1d(model: RandomModel, x: Tensor, n: int) -> Step:
    return model.part(nn.Conv1d(x.shape[1], (4, 20)[n % 2], 3, padding=1))


def to_image(model: RandomModel, x: Tensor, n: int) -> Step:
    return lambda x: x.unsqueeze(1)


def norm1d(model: RandomModel, x: Tensor, n: int) -> Step:
    return model.part(nn.BatchNorm1d(x.shape[1]))


def bare_weight(model: RandomModel, x: Tensor, n: int) -> Step:
    weight = nn.Parameter(torch.ones(x.shape[1], 11) if n % 2 else torch.ones(11, x.shape[1]))
    model.parts.append(nn.ParameterList([weight]))
    return (lambda x: x @ weight) if n % 2 else (lambda x: F.linear(x, weight))


def normalised_weight(model: RandomModel, x: Tensor, n: int) -> Step:
    how = (parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal)[n % 3]
    return model.part(how(nn.Linear(x.shape[1], 6)))


def bilinear(model: RandomModel, x: Tensor, n: int) -> Step:
    layer = model.part(nn.Bilinear(x.shape[1], x.shape[1], 5))
    return lambda x: layer(x, x)


def volume(model: RandomModel, x: Tensor, n: int) -> Step:
    return model.part(nn.Sequential(nn.Conv3d(x.shape[1], 4, 3, padding=1), nn.BatchNorm3d(4)))


def activation(model: RandomModel, x: Tensor, n: int) -> Step:
    return model.part((nn.ReLU(inplace=True), nn.GELU(), nn.PReLU(), nn.Dropout(0.5), nn.Identity())[n % 5])


def by_shape(model: RandomModel, x: Tensor, n: int) -> Step:
    """Control flow on shapes, and Python loops."""

    def step(x: Tensor) -> Tensor:
        for _ in range(x.shape[1] % 3):
            x = x.tanh()
        return x * 2 if x.shape[-1] > 4 and len(x) == 2 else x - 1

    return step


def masked(model: RandomModel, x: Tensor, n: int) -> Step:
    """A mask that is used before and after it is turned round, and changes in place."""

    def step(x: Tensor) -> Tensor:
        small = x.abs() < 0.5
        large = ~small
        x = x.masked_fill(small, 0.25) if n % 2 else torch.where(small, x, x.tanh())
        x = x.multiply(large.add(1))
        return x.clone().mul_(2).subtract_(x) if n % 3 else x

    return step


def by_axis(model: RandomModel, x: Tensor, n: int) -> Step:
    """The keywords of numpy."""

    def step(x: Tensor) -> Tensor:
        mean = x.mean(axis=1, keepdims=True)
        return (x - mean) / (x.var(axis=1, keepdims=True, correction=0) + 1).sqrt()

    return step


def by_own_values(model: RandomModel, x: Tensor, n: int) -> Step:
    """Control flow on a buffer and on a parameter: these have values while tracing."""
    factor = nn.Parameter(torch.ones(()))
    model.parts.append(nn.ParameterList([factor]))
    return lambda x: x * factor if model.seen.sum() == 0 and factor.item() != 0 else x.exp()


def stateful(model: RandomModel, x: Tensor, n: int) -> Step:
    """Changes a buffer, an attribute and the random states."""

    def step(x: Tensor) -> Tensor:
        model.seen += 1
        model.calls += 1
        model.seen = model.seen * 1
        return x + torch.rand_like(x) * random.random()

    return step


def unused(model: RandomModel, x: Tensor, n: int) -> Step:
    model.part(nn.Linear(4, 4))
    dead = model.part(nn.Linear(x.shape[-1], 3))

    def step(x: Tensor) -> Tensor:
        dead(x)
        return x

    return step


def refusal(model: RandomModel, x: Tensor, n: int) -> Step:
    """Runs while the network is built; what it does later cannot be traced, or cannot be run at all."""

    def step(x: Tensor) -> Tensor:
        if not model.built:
            return x
        if n % 4 == 0:
            return x if x.sum() > 0 else -x  # reads the values of activations
        if n % 4 == 1:
            return x[x > 0]  # a shape that depends on values
        if n % 4 == 2:
            return x.view(-1, 9, 9, 9)
        raise (ValueError, RuntimeError, KeyError, ZeroDivisionError, RecursionError)[n % 5]("no")

    return step


ANYWHERE = [
    activation, by_shape, by_own_values, stateful, unused, activation, by_shape, refusal, masked, by_axis,
]  # fmt: skip
STEPS: dict[int, list[Callable[[RandomModel, Tensor, int], Step]]] = {
    5: [volume, to_vector],
    4: [
        conv2d, conv2d, norm2d, shared2d, branches, gate, shuffle, pool2d, transposed2d, to_tokens, to_vector,
    ],
    3: [
        linear, norm_of_tokens, attention, attention_by_hand, encoder, recurrent, position, class_token,
        conv1d, to_image, to_vector,
    ],
    2: [linear, norm1d, bare_weight, normalised_weight, bilinear],
}  # fmt: skip
