"""Shapes that meta kernels give, known without running them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ghn_init
from ghn_init._tracing.kernels import Memo, like
from ghn_init._tracing.outputs import OUTPUTS
from ghn_init._tracing.outputs.call import Call

if TYPE_CHECKING:
    from collections.abc import Callable

Layout = tuple[torch.Size, tuple[int, ...], torch.dtype]


def layout(tensor: Tensor) -> Layout:
    return tensor.shape, tensor.stride(), tensor.dtype


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


class Counted:
    """A function that counts its calls."""

    def __init__(self, func: Callable[..., Any]) -> None:
        self.func, self.calls = func, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.func(*args, **kwargs)


CASES: dict[str, tuple[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = {
    "scalar": ("mul", torch.mul, (meta(2, 3), 2.0), {}),
    "broadcast": ("sub", torch.sub, (meta(2, 1, 3), meta(4, 1)), {}),
    "permuted": ("add", torch.add, (meta(2, 3, 4).permute(2, 0, 1), 1), {}),
    "promoted": ("div", torch.div, (meta(3, dtype=torch.int64), 2), {}),
    "comparison": ("gt", torch.gt, (meta(2, 3), 0.5), {}),
    "reduction": ("mean", torch.mean, (meta(2, 3, 4),), {"dim": (1, 2), "keepdim": True}),
    "choice": ("where", torch.where, (meta(2, 3, dtype=torch.bool), meta(3), meta(2, 1)), {}),
    "bicubic": ("interpolate", F.interpolate, (meta(1, 3, 8, 8),), {"scale_factor": 0.5, "mode": "bicubic"}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_second_time_a_kernel_is_not_run(case: str) -> None:
    name, func, args, kwargs = CASES[case]
    memo, counted = Memo(), Counted(func)
    first, second = (memo.run(counted, name, args, kwargs) for _ in range(2))
    assert counted.calls == 1
    assert second is not first
    assert layout(second) == layout(first) == layout(func(*args, **kwargs))


def test_equal_numbers_of_different_types_are_different() -> None:
    memo, x = Memo(), meta(3, dtype=torch.int64)
    given = [memo.run(torch.mul, "mul", (x, factor), {}).dtype for factor in (1, 1.0, 1j, True)]
    assert given == [torch.int64, torch.float32, torch.complex64, torch.int64]


@pytest.mark.parametrize(
    ("name", "func", "args"),
    [
        ("view", torch.Tensor.view, (meta(4, 3), 12)),  # a view
        ("add_", torch.Tensor.add_, (meta(3), 1)),  # in place
        ("mul", torch.mul, (torch.ones(3), torch.ones(3))),  # has values
        ("mul", torch.mul, (meta(3), torch.tensor(2.0))),
        ("where", torch.where, (torch.ones(2, dtype=torch.bool),)),
    ],
)
def test_what_is_no_new_meta_tensor_is_run_every_time(
    name: str, func: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    memo, counted = Memo(), Counted(func)
    for _ in range(2):
        memo.run(counted, name, args, {})
    assert counted.calls == 2


@pytest.mark.parametrize(
    "x", [meta(2, 3, 1, 1), meta(2, 3).T, meta(3).expand(4, 3), torch.ones(2)], ids=lambda x: str(x.stride())
)
def test_like_is_empty_like(x: Tensor) -> None:
    found, expected = like(x), torch.empty_like(x)
    assert (found.shape, found.dtype, found.device) == (expected.shape, expected.dtype, expected.device)
    assert [s for s, n in zip(found.stride(), x.shape, strict=True) if n > 1] == [
        s for s, n in zip(expected.stride(), x.shape, strict=True) if n > 1
    ]


class Resampled(nn.Module):
    """A convolution, whatever `resample` makes of its output, and a layer that only fits the right shape."""

    def __init__(self, resample: Callable[[Tensor], Tensor], shape: tuple[int, ...], axes: int) -> None:
        super().__init__()
        convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
        self.conv = convolution(3, shape[1], 1)
        self.resample, self.shape = resample, shape

    def forward(self, x: Tensor) -> Tensor:
        output = self.resample(self.conv(x))
        assert output.shape == self.shape
        return output.view(self.shape[0], -1)


RESAMPLED: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...], tuple[int, ...]]] = {
    "grid": (
        lambda x: F.grid_sample(x, x.new_zeros(2, 5, 7, 2), align_corners=True),
        (2, 3, 8, 8),
        (2, 4, 5, 7),
    ),
    "grid in 3-d": (
        lambda x: F.grid_sample(x, x.new_zeros(1, 2, 5, 7, 3), align_corners=False),
        (1, 3, 4, 8, 8),
        (1, 4, 2, 5, 7),
    ),
    "size": (lambda x: F.interpolate(x, (5, 7), mode="bilinear"), (2, 3, 8, 8), (2, 4, 5, 7)),
    "one size": (lambda x: F.interpolate(x, 5), (2, 3, 8, 8), (2, 4, 5, 5)),
    "scale": (lambda x: F.interpolate(x, scale_factor=1.7, mode="bicubic"), (2, 3, 8, 8), (2, 4, 13, 13)),
    "length": (lambda x: F.interpolate(x, 20, mode="linear"), (2, 3, 8), (2, 4, 20)),
    "area": (lambda x: F.interpolate(x, (4, 2), mode="area"), (2, 3, 8, 8), (2, 4, 4, 2)),
}


@pytest.mark.parametrize("case", RESAMPLED)
def test_feature_maps_at_other_places_have_the_shapes_that_torch_gives(case: str) -> None:
    resample, shape, expected = RESAMPLED[case]
    model = Resampled(resample, expected, len(shape) - 2)
    model(torch.zeros(shape))
    graph = ghn_init.trace(model, shape)
    assert [node.type for node in graph.nodes] == ["input", "conv", "bias"]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: F.interpolate(x, 8, mode="linear"),
        lambda x: F.interpolate(x, (8, 8, 8)),
        lambda x: F.interpolate(x, 8, scale_factor=2),
        lambda x: F.grid_sample(x, x.new_zeros(1, 5, 7, 2), align_corners=True),
        lambda x: F.grid_sample(x, x.new_zeros(2, 5, 7, 3), align_corners=True),
    ],
    ids=["mode", "axes", "size and scale", "examples", "coordinates"],
)
def test_what_torch_refuses_is_refused(wrong: Callable[[Tensor], Tensor]) -> None:
    model = Resampled(wrong, (2, 4, 8, 8), 2)
    with pytest.raises(ghn_init.TraceError, match="the forward pass failed"):
        ghn_init.trace(model, (2, 3, 8, 8))


@pytest.mark.parametrize("shape", [(6, 4), (2, 3, 4)])
def test_products_with_experts_have_a_shape_in_every_dtype(shape: tuple[int, ...]) -> None:
    def refuses(*_: object, **__: object) -> Tensor:
        raise RuntimeError("Expected mat_a to be BFloat16 or supported Float16 matrix, got torch.float32.")

    x, weight = torch.empty(shape, device="meta"), torch.empty(2, 4, 5, device="meta")

    def product_of(*operands: Tensor) -> Tensor:
        offsets = {"offs": torch.empty(2, device="meta")}
        return OUTPUTS["_grouped_mm"](Call(refuses, "_grouped_mm", operands, offsets, Memo(), True))

    product = product_of(x, weight)
    assert (product.shape, product.dtype, product.is_meta) == ((*shape[:-1], 5), torch.float32, True)
    with pytest.raises(RuntimeError, match="Expected mat_a"):
        product_of(x, weight.mT)  # of shapes that do not fit
