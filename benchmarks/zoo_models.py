"""The networks of the zoos: how each is called, what kind it is, and how it is built."""

from __future__ import annotations

import contextlib
import importlib.util
import warnings
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final
from unittest import mock

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ZOOS: Final = ("torchvision", "timm", "transformers")

REFUSED: Final = {"quantization": "is quantised"}
"""Kind of network -> what ghn-init says when it refuses it: quantised layers hold packed integers."""


@dataclass(frozen=True)
class Network:
    """One network of a zoo.

    Attributes:
        zoo: One of `ZOOS`.
        kind: Part of the zoo: "detection", "vision_transformer".
        name: The zoo's own name for it.
        build: Makes it, with random weights.
    """

    zoo: str
    kind: str
    name: str
    build: Callable[[], nn.Module]

    @property
    def refusal(self) -> str | None:
        """What the error has to say if this network cannot have predicted weights."""
        return REFUSED.get(self.kind) if self.zoo == "torchvision" else None

    def on_meta(self) -> nn.Module:
        """The network without storage; one that cannot be built so is built without initialising it."""
        if self.refusal is not None:
            return self.build()
        try:
            with torch.device("meta"):
                return self.build()
        except (NotImplementedError, RuntimeError):  # its constructor reads values
            with uninitialised():
                return self.build()


def networks(zoo: str) -> list[Network]:
    """Every network of a zoo, sorted; none if the package is missing."""
    if importlib.util.find_spec(zoo) is None:
        return []
    return {"torchvision": _torchvision, "timm": _timm, "transformers": _transformers}[zoo]()


def _torchvision() -> list[Network]:
    from torchvision import models

    return [
        Network("torchvision", _kind(models.get_model_builder(name)), name, partial(_build_torchvision, name))
        for name in models.list_models()
    ]


def _kind(builder: Callable[..., nn.Module]) -> str:
    """torchvision.models.detection.retinanet -> detection; torchvision.models.resnet -> classification."""
    parts = builder.__module__.split(".")
    return parts[2] if len(parts) > 3 else "classification"


def _build_torchvision(name: str) -> nn.Module:
    from torchvision import models

    options: dict[str, Any] = {"weights": None}
    if name.startswith("quantized_"):
        options |= {"quantize": True}
    elif _kind(models.get_model_builder(name)) in ("detection", "segmentation"):
        options |= {"weights_backbone": None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the quantised ones, and of changed defaults
        return models.get_model(name, **options)


def _timm() -> list[Network]:
    import timm

    kinds = {name: module for module in timm.list_modules() for name in timm.list_models(module=module)}
    return [Network("timm", kinds[name], name, partial(_build_timm, name)) for name in timm.list_models()]


def _build_timm(name: str) -> nn.Module:
    import timm

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return timm.create_model(name, pretrained=False)


def _transformers() -> list[Network]:
    from zoo_transformers import configurations

    return [Network("transformers", kind, name, build) for name, kind, build in configurations()]


@contextlib.contextmanager
def uninitialised() -> Iterator[None]:
    """Building a network here does not initialise it, which would take longer than all measurements."""
    with contextlib.ExitStack() as stack:
        for name in dir(nn.init):
            if name.endswith("_") and not name.startswith("_"):
                stack.enter_context(mock.patch.object(nn.init, name, lambda tensor, *_, **__: tensor))
        yield
