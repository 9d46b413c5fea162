"""Are outputs in evaluation mode, right after `predict`, as large as those of training mode?

    python benchmarks/evaluation_mode.py DATA [--networks dpn68 dla34] [--side 96]

For networks of timm, with the bundled weights and the default: the standard deviation of the outputs for 32
test images, enlarged to `--side`, in both modes. Where they differ much, the running statistics that
`predict` found from the weights are wrong, and `calibrate_batchnorm` is needed.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import timm
import torch
import torch.nn.functional as F

import ghn_init
from ghn_init.training import Normalisation, load_images

NETWORKS = (
    "fastvit_t8", "dpn68", "dpn48b", "cspresnet50", "cspdarknet53", "vovnet39a", "ese_vovnet19b_dw", "dla34",
    "hrnet_w18_small", "res2net50_26w_4s", "selecsls42b", "ghostnet_100", "inception_v3", "xception41",
    "mobilenetv2_100", "mnasnet_100", "mobilenetv3_large_100", "mobilenetv3_small_100", "efficientnet_b0",
    "tf_efficientnetv2_s", "regnety_004", "rexnet_100", "lcnet_100", "mobilenetv4_conv_small",
    "hgnetv2_b0", "mobileone_s1", "regnetz_005", "mixnet_s", "repvgg_a0",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="CIFAR-10 in a form that `ghn-init train` takes")
    parser.add_argument("--networks", nargs="+", default=NETWORKS, metavar="NAME")
    parser.add_argument("--side", type=int, default=96, help="of the images, in pixels; 160 for inception_v3")
    parser.add_argument("--images", type=int, default=32)
    given = parser.parse_args()
    images = load_images(given.data, "test")
    pixels = Normalisation.of(images)(images.take(torch.arange(given.images)).pixels)
    print("| network | evaluation mode | training mode | ratio |\n|---|---|---|---|")
    for name in given.networks:
        side = max(given.side, 160) if name == "inception_v3" else given.side
        evaluating, training = outputs(name, F.interpolate(pixels, size=(side, side), mode="bilinear"))
        print(f"| {name} | {evaluating:.3g} | {training:.3g} | {evaluating / training:.3g} |", flush=True)


@torch.no_grad()
def outputs(name: str, x: torch.Tensor) -> tuple[float, float]:
    """Standard deviation of the outputs in evaluation and in training mode."""
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ghn_init.OutOfDistributionWarning)
        ghn_init.predict(network, example_input=(1, *x.shape[1:]))
    return network.eval()(x).std().item(), network.train()(x).std().item()


if __name__ == "__main__":
    main()
