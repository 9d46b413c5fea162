"""Soft labels: the teacher, its file, and training on them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ghn_init._errors import TrainingError
from ghn_init.training import Images, Normalisation
from ghn_init.training._engine import Engine
from ghn_init.training.teacher import accuracy, save_soft_labels, soft_labels, train_teacher, with_soft_labels
from training_runs import random_images, tiny_config, tiny_trainer

if TYPE_CHECKING:
    from pathlib import Path


def plain_images(count: int = 128) -> Images:
    """Two classes that differ in brightness."""
    labels = torch.arange(count) % 2
    noise = torch.randint(0, 60, (count, 3, 16, 16), dtype=torch.uint8)
    return Images(noise + (labels * 150).to(torch.uint8).view(-1, 1, 1, 1), labels, ("dark", "bright"))


def test_a_teacher_learns_and_its_labels_survive_the_file(tmp_path: Path) -> None:
    images, losses = plain_images(), []
    teacher = train_teacher(images, epochs=20, width=4, on_step=lambda _, loss: losses.append(loss))
    labels = soft_labels(teacher, images, Normalisation.of(images))
    torch.testing.assert_close(labels.sum(1), torch.ones(len(images)))
    assert losses[-1] < losses[0]
    assert accuracy(labels, images) > 90
    save_soft_labels(tmp_path / "soft.npz", labels, images)
    found = with_soft_labels(images, tmp_path / "soft.npz")
    assert found.soft is not None
    torch.testing.assert_close(found.soft, labels, atol=1e-3, rtol=0)
    assert found.take(slice(3, 5)).soft is not None
    torch.testing.assert_close(found.take(slice(3, 5)).soft, found.soft[3:5])


def test_targets_mix_labels_and_soft_labels() -> None:
    images = Images(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1]), ("a", "b"))
    soft = torch.tensor([[0.5, 0.5], [0.5, 0.5]])
    mixed = Images(images.pixels, images.labels, images.classes, soft).targets(0.5)
    torch.testing.assert_close(mixed, torch.tensor([[0.75, 0.25], [0.25, 0.75]]))
    torch.testing.assert_close(images.targets(0.5), torch.eye(2))


def test_the_loss_is_that_of_the_targets_and_the_hits_those_of_the_labels() -> None:
    weight = torch.randn(10, 3, requires_grad=True)
    logits = torch.randn(4, 3) @ weight.T
    labels, targets = logits.argmax(1).detach(), torch.rand(4, 10).softmax(1)
    result = Engine(torch.float32).backward(logits, {"weight": weight}, labels, targets)
    assert result.loss == pytest.approx(F.cross_entropy(logits, targets).item())
    assert result.correct == 4


def test_soft_labels_of_other_images_are_refused(tmp_path: Path) -> None:
    images = random_images()
    save_soft_labels(tmp_path / "soft.npz", torch.full((48, 10), 0.1), random_images(seed=1))
    with pytest.raises(TrainingError, match=r"soft labels \(48, 10\) of other images; .*ghn-init teach"):
        with_soft_labels(images, tmp_path / "soft.npz")
    (tmp_path / "bad.npz").write_bytes(b"no labels")
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "empty.npz").touch()
    for name in ("bad.npz", "array.npy", "empty.npz"):
        with pytest.raises(TrainingError, match=rf"{name}: cannot be read as soft labels"):
            with_soft_labels(images, tmp_path / name)


def test_a_run_with_soft_labels_needs_them(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"soft_labels=0\.5 and images without any"):
        tiny_trainer(tmp_path, tiny_config(soft_labels=0.5))


def test_a_teacher_needs_images() -> None:
    with pytest.raises(TrainingError, match="48 images of 16 pixels for a teacher; expected at least 128"):
        train_teacher(random_images(), epochs=1)
