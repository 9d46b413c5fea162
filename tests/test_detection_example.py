"""`examples/detection.py`: reading boxes, measuring, and both starts on a small set that is drawn."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import ghn_init

if TYPE_CHECKING:
    from types import ModuleType

pytestmark = pytest.mark.source


@pytest.fixture(scope="module")
def detection() -> ModuleType:
    file = Path(__file__).resolve().parent.parent / "examples" / "detection.py"
    spec = importlib.util.spec_from_file_location("detection_example", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_both_starts_are_trained_on_a_folder_of_boxes(
    detection: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    detection.draw_set(tmp_path, count=6, size=48)
    found = detection.main([str(tmp_path), "--steps", "2", "--size", "64"])
    assert set(found) == {"default", "predicted"}
    assert all(0 <= value <= 100 for value in found.values())
    assert "4 images to train on, 2 held out, 2 classes" in capsys.readouterr().out


def test_the_first_third_of_the_backbone_is_predicted_but_for_gates(detection: ModuleType) -> None:
    backbone = detection.build("fasterrcnn_mobilenet_v3_large_320_fpn", 3, 64).backbone
    convolutions = [name for name, layer in backbone.named_modules() if isinstance(layer, nn.Conv2d)]
    gates = {f"body.{i}.block.2.{fc}" for i in (4, 5, 6, 11, 12, 13, 14, 15) for fc in ("fc1", "fc2")}
    rows = ghn_init.plan(backbone).rows
    predicted = [row.key.removesuffix(".weight") for row in rows if row.decision.predict]
    assert gates <= set(convolutions)
    assert predicted == [name for name in convolutions[: len(predicted) + 4] if name not in gates]
    assert len(convolutions) / 4 < len(predicted) < len(convolutions) / 3
    assert {"body.0.0", "body.4.block.0.0"} <= set(predicted)


def test_boxes_come_from_a_list_or_from_masks(detection: ModuleType, tmp_path: Path) -> None:
    listed = tmp_path / "listed"
    listed.mkdir()
    Image.new("RGB", (20, 10), (255, 0, 0)).save(listed / "a.png")
    Image.new("L", (8, 8)).save(listed / "b.png")
    (listed / "boxes.json").write_text(json.dumps({"b.png": [], "a.png": [[1, 2, 5, 6], [0, 0, 9, 9, 3]]}))
    (image, target), (grey, empty) = detection.read_set(listed)
    assert image.shape == (3, 10, 20)
    assert image[:, 0, 0].tolist() == [1, 0, 0]
    assert target["boxes"].tolist() == [[1, 2, 5, 6], [0, 0, 9, 9]]
    assert target["labels"].tolist() == [1, 3]
    assert (grey.shape, empty["boxes"].shape) == ((3, 8, 8), (0, 4))

    masked = tmp_path / "masked"
    for name in ("PNGImages", "PedMasks"):
        (masked / name).mkdir(parents=True)
    Image.new("RGB", (12, 10)).save(masked / "PNGImages" / "FudanPed00001.png")
    mask = np.zeros((10, 12), np.uint8)
    mask[2:5, 3:7], mask[9, 0] = 1, 2
    Image.fromarray(mask).save(masked / "PedMasks" / "FudanPed00001_mask.png")
    ((_, target),) = detection.read_set(masked)
    assert target["boxes"].tolist() == [[3, 2, 7, 5], [0, 9, 1, 10]]
    with pytest.raises(SystemExit, match=r"expected boxes\.json, or PNGImages"):
        detection.read_set(tmp_path)


class Fixed(nn.Module):
    """A detector that finds the same boxes everywhere."""

    def __init__(self, boxes: list[list[float]], scores: list[float], labels: list[int]) -> None:
        super().__init__()
        self.found = {
            "boxes": torch.tensor(boxes),
            "scores": torch.tensor(scores),
            "labels": torch.tensor(labels),
        }

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        return [self.found for _ in images]


def test_the_average_precision_of_known_detections_is_right(detection: ModuleType) -> None:
    target = {"boxes": torch.tensor([[0.0, 0, 4, 4], [8, 8, 12, 12]]), "labels": torch.tensor([1, 2])}
    examples = [(torch.zeros(3, 16, 16), target)]
    right = Fixed([[8.0, 8, 12, 12], [0, 0, 4, 4]], [0.6, 0.9], [2, 1])
    assert detection.average_precision(right, examples) == 100
    other_class = Fixed([[8.0, 8, 12, 12], [0, 0, 4, 4]], [0.6, 0.9], [1, 1])
    assert detection.average_precision(other_class, examples) == 50
    # a second find of the same box is a mistake, which halves the precision of whatever scores less
    twice = Fixed([[0.0, 0, 4, 4], [0, 0, 4, 4], [8, 8, 12, 12]], [0.9, 0.8, 0.7], [1, 1, 2])
    assert detection.average_precision(twice, examples) == pytest.approx(100 * (1 + 2 / 3) / 2)
    assert detection.average_precision(Fixed([[20.0, 20, 30, 30]], [0.9], [1]), examples) == 0
