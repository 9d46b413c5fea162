"""Fine-tune a Faster R-CNN of torchvision's whose backbone has predicted weights, beside one without.

Run: `python examples/detection.py`, which draws a small set of its own, or
`python examples/detection.py FOLDER --steps 300 --size 320` with one of these folders:

- images and a `boxes.json`, {"a.png": [[left, top, right, bottom], ...], ...} in pixels, a fifth number being
  the class from 1 on (1 if left out);
- Penn-Fudan's `PNGImages` and `PedMasks` (pixels of the k-th pedestrian have the value k).

A fifth of the images are held out; on them the average precision at an overlap of 0.5 is measured.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torchvision.ops import box_iou

import ghn_init

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

Example = tuple[Tensor, dict[str, Tensor]]
"""An image (3, h, w) from 0 to 1, and its `boxes` (n, 4) in pixels and `labels` (n,)."""


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Train both and print what they reach; returns the average precision by start, in percent."""
    options = _parser().parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        if options.folder is None:
            draw_set(Path(scratch), seed=options.seed)
        examples = read_set(options.folder or Path(scratch))
    held = examples[::5]
    training = [example for index, example in enumerate(examples) if index % 5]
    classes = 1 + max(int(target["labels"].max()) for _, target in examples if len(target["labels"]))
    print(f"{len(training)} images to train on, {len(held)} held out, {classes - 1} classes")
    found = {}
    for start in options.starts:
        torch.manual_seed(options.seed)
        detector = build(options.builder, classes, options.size)
        if start == "predicted":
            plan = ghn_init.plan(detector.backbone)  # pyright: ignore[reportArgumentType]
            plan.apply()
            for action, (parameters, elements) in plan.counts().items():
                print(f"  {action:9} {parameters:3} parameters, {elements:11,} elements")
        started = time.perf_counter()
        losses = fine_tune(detector, training, steps=options.steps, rate=options.rate, seed=options.seed)
        found[start] = average_precision(detector, held)
        seconds, tenth = time.perf_counter() - started, max(1, len(losses) // 10)
        fall = f"loss {np.mean(losses[:tenth]):.3f} to {np.mean(losses[-tenth:]):.3f}"
        print(f"{start}: {fall}, average precision {found[start]:.1f} %, {seconds:.0f} s")
    return found


def build(builder: str, classes: int, size: int) -> nn.Module:
    """A detector of torchvision's without pretrained weights, whose images are enlarged to `size` pixels.

    Without them its batch norms and all layers of its backbone are trained.
    """
    return torchvision.models.get_model(
        builder, weights=None, weights_backbone=None, num_classes=classes, min_size=size, max_size=2 * size
    )


def fine_tune(
    detector: nn.Module, examples: Sequence[Example], *, steps: int, rate: float, seed: int, batch: int = 4
) -> list[float]:
    """Train with SGD and a rate that rises over the first tenth and falls to zero; the loss of every step."""
    optimizer = torch.optim.SGD(detector.parameters(), rate, momentum=0.9, weight_decay=5e-4)
    warmup = max(1, steps // 10)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    detector.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / warmup, 1 - step / steps)
        chosen = [examples[int(i)] for i in torch.randint(len(examples), (batch,), generator=generator)]
        parts = detector([image for image, _ in chosen], [target for _, target in chosen])
        loss = torch.stack(list(parts.values())).sum()
        if not loss.isfinite():
            raise SystemExit(f"the loss is {loss.item()} in step {step}; take a lower --rate than {rate:g}")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), 5.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def average_precision(detector: nn.Module, examples: Sequence[Example], overlap: float = 0.5) -> float:
    """Area under precision over recall, in percent, all classes together.

    A detection is right if it overlaps a box of its class that no better one has taken.
    """
    detector.eval()
    scores: list[float] = []
    right: list[bool] = []
    for image, target in examples:
        (output,) = detector([image])
        free = torch.ones(len(target["boxes"]), dtype=torch.bool)
        overlaps = box_iou(output["boxes"], target["boxes"])
        for index in output["scores"].argsort(descending=True).tolist():
            fits = overlaps[index] * free * (target["labels"] == output["labels"][index])
            best = int(fits.argmax()) if len(fits) else 0
            hit = len(fits) > 0 and float(fits[best]) >= overlap
            if hit:
                free[best] = False
            scores.append(float(output["scores"][index]))
            right.append(hit)
    boxes = sum(len(target["boxes"]) for _, target in examples)
    return 100 * precision_recall_area(scores, right, boxes)


def precision_recall_area(scores: Sequence[float], right: Sequence[bool], boxes: int) -> float:
    """Mean over the boxes of the best precision at which so many are found; 0 for those never found."""
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    hits = np.cumsum([right[index] for index in order])
    precision = hits / np.arange(1, len(order) + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    return float(sum(best[position] for position, index in enumerate(order) if right[index])) / max(boxes, 1)


def read_set(folder: Path) -> list[Example]:
    """The images of a folder with their boxes, sorted by name; see the top of this file."""
    listed = folder / "boxes.json"
    if listed.is_file():
        boxes: dict[str, list[list[float]]] = json.loads(listed.read_text())
        return [_example(folder / name, boxes[name]) for name in sorted(boxes)]
    images = sorted((folder / "PNGImages").glob("*.png"))
    if not images:
        raise SystemExit(f"{folder}: expected boxes.json, or PNGImages and PedMasks as in Penn-Fudan")
    return [_example(file, _boxes_of(folder / "PedMasks" / f"{file.stem}_mask.png")) for file in images]


def _example(file: Path, boxes: Sequence[Sequence[float]]) -> Example:
    with Image.open(file) as image:
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255
    corners = torch.tensor([box[:4] for box in boxes], dtype=torch.float32).reshape(-1, 4)
    labels = torch.tensor([int(box[4]) if len(box) > 4 else 1 for box in boxes], dtype=torch.int64)
    return pixels, {"boxes": corners, "labels": labels}


def _boxes_of(mask: Path) -> list[list[float]]:
    """The smallest box around each object of a mask."""
    with Image.open(mask) as image:
        values = np.array(image)
    boxes = []
    for value in np.unique(values[values > 0]):
        rows, columns = np.nonzero(values == value)
        boxes.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    return [[float(corner) for corner in box] for box in boxes]


def draw_set(folder: Path, *, count: int = 20, size: int = 96, seed: int = 0) -> None:
    """Write images of noise with one to three bright rectangles (1) and discs (2), and their `boxes.json`."""
    rng = np.random.default_rng(seed)
    boxes: dict[str, list[list[int]]] = {}
    for number in range(count):
        pixels = rng.integers(0, 80, (size, size, 3))
        name = f"{number:03d}.png"
        boxes[name] = []
        for _ in range(rng.integers(1, 4)):
            side, kind = int(rng.integers(size // 5, size // 3)), int(rng.integers(1, 3))
            left, top = (int(corner) for corner in rng.integers(0, size - side, 2))
            far = (np.mgrid[:side, :side] - (side - 1) / 2) / (side / 2)
            inside = np.ones((side, side), bool) if kind == 1 else (far**2).sum(0) <= 1
            pixels[top : top + side, left : left + side][inside] = rng.integers(130, 256, 3)
            boxes[name].append([left, top, left + side, top + side, kind])
        Image.fromarray(pixels.astype(np.uint8)).save(folder / name)
    (folder / "boxes.json").write_text(json.dumps(boxes))


def _parser() -> argparse.ArgumentParser:
    detection: Any = torchvision.models.detection
    builders = torchvision.models.list_models(module=detection, include="fasterrcnn*")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "folder", type=Path, nargs="?", help="images with boxes; default: a set that is drawn"
    )
    parser.add_argument("--builder", choices=builders, default="fasterrcnn_mobilenet_v3_large_320_fpn")
    parser.add_argument(
        "--starts", nargs="+", choices=("default", "predicted"), default=["default", "predicted"]
    )
    parser.add_argument("--steps", type=int, default=4, help="of four images")
    parser.add_argument("--rate", type=float, default=0.01, help="highest learning rate")
    parser.add_argument("--size", type=int, default=96, help="of the shorter side that the detector sees")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and the set that is drawn")
    return parser


if __name__ == "__main__":
    main()
