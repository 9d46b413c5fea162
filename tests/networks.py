"""Networks that several test modules build."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING
from unittest import mock

import torch
import torchvision
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def without_initialisation() -> Iterator[None]:
    """Modules built here keep uninitialised memory, which costs no time and is never touched.

    Not `torch.device("meta")`: torchvision's RegNets compute their widths with tensors.
    """
    with contextlib.ExitStack() as stack:
        for name in dir(nn.init):
            if name.endswith("_") and not name.startswith("_"):
                stack.enter_context(mock.patch.object(nn.init, name, lambda tensor, *_, **__: tensor))
        yield


def resnet50_cifar(num_classes: int = 10) -> nn.Module:
    """ResNet-50 for 32 x 32 images: 3x3 stem of stride 1, no max pooling."""
    model = torchvision.models.resnet50(num_classes=num_classes)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()  # type: ignore[assignment]
    return model


def reference_network(name: str) -> nn.Module:
    """One of the ten networks of the reference graphs, on meta."""
    with torch.device("meta"):
        if name == "resnet50_cifar":
            return resnet50_cifar()
        return torchvision.models.get_model(name, num_classes=10)
