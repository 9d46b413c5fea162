"""A network of your own: keep some parameters, make tiled channels differ, calibrate, train on.

Run: `python examples/own_network.py`, or, for the same network from the command line,
`ghn-init examples/own_network.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ghn_init


class Net(nn.Module):
    """A small convolutional network with a skip connection."""

    def __init__(self, num_classes: int = 10, width: int = 96) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images (n, 3, h, w)."""
        x = F.relu(self.norm(self.stem(x)))
        x = F.max_pool2d(x + self.body(x), 2)
        return self.head(x.mean((2, 3)))


def main() -> None:
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    plan = ghn_init.plan(model, exclude="norm.*", diversify="noise", seed=0)
    print(plan)
    plan.apply()

    images, labels = torch.randn(64, 3, 32, 32), torch.randint(10, (64,))
    ghn_init.calibrate_batchnorm(model, [images])

    for step in range(5):  # the optimizer was made before the prediction, and works all the same
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
