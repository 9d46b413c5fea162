"""Predict the weights of a torchvision network: the plan first, then the write.

Run: `python examples/predict_resnet.py`
"""

from __future__ import annotations

import time

import torch
from torchvision.models import resnet18

import ghn_init


def main() -> None:
    model = resnet18(num_classes=10)
    before = model.conv1.weight  # an optimizer would hold this very object

    plan = ghn_init.plan(model)
    for action, (parameters, elements) in plan.counts().items():
        print(f"{action:9} {parameters:3} parameters, {elements:11,} elements")

    started = time.perf_counter()
    ghn_init.predict(model)  # the same as plan.apply(); scale="predicted" to use it untrained
    print(f"predicted in {1000 * (time.perf_counter() - started):.0f} ms")

    assert model.conv1.weight is before
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    logits = model(torch.randn(4, 3, 32, 32))
    print("logits:", tuple(logits.shape), f"std {logits.std():.2f}")


if __name__ == "__main__":
    main()
