"""The weights that come with the package."""

from __future__ import annotations

import json
from importlib import resources
from typing import TYPE_CHECKING

import pytest
import torch
import torchvision

from ghn_init import GHNConfig, calibrate_batchnorm, load, plan, predict
from ghn_init._weights import DEFAULT_WEIGHTS
from ghn_init._weights.load import bundled_names

if TYPE_CHECKING:
    from pathlib import Path

FOLDER = resources.files("ghn_init") / "weights" / DEFAULT_WEIGHTS


def test_the_default_weights_are_bundled_with_configuration_and_card() -> None:
    assert DEFAULT_WEIGHTS in bundled_names()
    assert GHNConfig.from_dict(json.loads((FOLDER / "config.json").read_text())) == load().config
    assert len((FOLDER / "model.safetensors").read_bytes()) < 20e6


def test_the_card_says_what_a_reader_asks() -> None:
    card = (FOLDER / "README.md").read_text()
    for part in ("Accuracy", "Data", "Recipe and compute", "seed", "Limits", "license: mit"):
        assert part in card


def test_a_network_with_predicted_weights_runs() -> None:
    model = predict(torchvision.models.resnet18(num_classes=10), scale="predicted")
    calibrate_batchnorm(model, [torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))])
    logits = model.eval()(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)))
    assert logits.isfinite().all()
    assert not plan(model, scale="predicted").counts()["kept"][0]


def test_an_untrained_network_classifies_better_than_chance(shared: Path) -> None:
    pytest.importorskip("PIL")
    from ghn_init.training import evaluate, load_images
    from ghn_init.training.data import CIFAR10

    score = evaluate(load(), "test", load_images(shared / "data", "test"), n=1, images=512, normalise=CIFAR10)
    assert score.mean > 50  # chance is 10 %; the standard error of 512 images is 2
