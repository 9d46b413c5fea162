"""Inputs of networks that follow transformers' conventions; none of these tests needs transformers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from ghn_init import trace
from ghn_init._tracing.conventions import arguments

if TYPE_CHECKING:
    from collections.abc import Callable

FORWARDS: dict[str, Callable[..., Tensor]] = {
    "pixel_values": lambda pixel_values: pixel_values,
    "input_values": lambda input_values: input_values,
    "input_features": lambda input_features: input_features,
    "input_ids": lambda input_ids: input_ids,
    "visual_feats": lambda visual_feats: visual_feats,
}


class Follower(nn.Module):
    """A network with a config, a main input, and arguments with well-known names."""

    def __init__(self, forward: Callable[..., Tensor], main: str, **config: Any) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.config = SimpleNamespace(model_type="test", **config)
        self.main_input_name = main
        self.forward = forward


def shapes(model: nn.Module) -> list[dict[str, tuple[int, ...]]]:
    return [{name: tuple(value.shape) for name, value in named.items()} for named in arguments(model)]


def test_the_fullest_arguments_come_first() -> None:
    def forward(input_ids: Tensor, attention_mask: Any = None, pixel_values: Any = None) -> Tensor:
        return input_ids

    inner = SimpleNamespace(model_type="inside", image_size=48, num_channels=1)
    found = shapes(Follower(forward, "input_ids", vision_config=inner))
    assert found == [{"input_ids": (1, 16), "pixel_values": (1, 1, 48, 48)}, {"input_ids": (1, 16)}]
    assert next(arguments(Follower(forward, "input_ids")))["input_ids"].dtype == torch.long


@pytest.mark.parametrize(
    ("name", "config", "expected"),
    [
        ("pixel_values", {}, [(1, 3, 224, 224)]),
        ("pixel_values", {"image_size": (32, 64)}, [(1, 3, 32, 64)]),
        ("pixel_values", {"image_size": {"height": 8, "width": 9}}, [(1, 3, 8, 9)]),
        ("pixel_values", {"image_size": 8, "num_frames": 4}, [(1, 4, 3, 8, 8), (1, 3, 8, 8)]),
        ("input_values", {}, [(1, 16_000)]),
        ("input_values", {"audio_channels": 2}, [(1, 2, 16_000)]),
        ("input_values", {"num_mel_bins": 16, "max_length": 64}, [(1, 64, 16)]),
        ("input_features", {"num_mel_bins": 16}, [(1, 64, 16), (1, 1, 64, 16)]),
        ("input_features", {}, []),
        ("input_ids", {"image_token_id": 9, "image_size": 32, "patch_size": 8}, [(1, 16), (1, 17)]),
        ("input_ids", {"image_token_id": 9, "num_query_tokens": 5}, [(1, 5)]),
        ("visual_feats", {"visual_feat_dim": 7}, [(1, 16, 7)]),
    ],
)
def test_shapes_of_arguments_follow_the_configuration(
    name: str, config: dict[str, Any], expected: list[tuple[int, ...]]
) -> None:
    assert shapes(Follower(FORWARDS[name], name, **config)) == [{name: shape} for shape in expected]


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("pixel_values", {"image_size": -1}),
        ("pixel_values", {"image_size": 10**10}),
        ("pixel_values", {"image_size": (None, None)}),
        ("pixel_values", {"image_size": {}}),
        ("pixel_values", {"image_size": True}),
        ("pixel_values", {"num_channels": [3, 64]}),
        ("input_ids", {"image_token_id": 9, "patch_size": 0}),
        ("input_features", {"num_mel_bins": "80"}),
        ("visual_feats", {"visual_feat_dim": 0}),
    ],
)
def test_sizes_that_no_input_has_are_passed_over(name: str, config: dict[str, Any]) -> None:
    assert shapes(Follower(FORWARDS[name], name, **config)) == []


def test_configurations_may_fail_and_have_slots() -> None:
    class Unready:
        __slots__ = ()
        model_type = "test"

        @property
        def image_size(self) -> int:
            raise RuntimeError("not attached")

    model = Follower(FORWARDS["pixel_values"], "pixel_values")
    model.config = Unready()  # type: ignore[assignment]
    assert shapes(model) == [{"pixel_values": (1, 3, 224, 224)}]


def test_other_networks_have_no_such_arguments() -> None:
    assert shapes(nn.Linear(2, 2)) == []


def test_text_that_is_searched_for_padding_is_traced() -> None:
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config, self.main_input_name = SimpleNamespace(model_type="test"), "input_ids"
            self.table, self.head = nn.Embedding(9, 4), nn.Linear(4, 2)

        def forward(self, input_ids: Tensor) -> Tensor:
            if 0 in input_ids[:, [0, -1]]:
                raise ValueError("padding without a mask")
            return self.head(self.table(input_ids))

    assert [node.type for node in trace(Text()).nodes] == ["input", "conv", "bias"]
