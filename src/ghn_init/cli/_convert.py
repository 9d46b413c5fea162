"""`ghn-init convert`."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 (typer reads the annotations)
from typing import TYPE_CHECKING, Annotated

from ghn_init.cli._options import PLACES, argument
from ghn_init.cli._output import say

if TYPE_CHECKING:
    from ghn_init._hypernetwork.config import GHNConfig


def convert(
    source: Annotated[
        str, argument("IN", f"Read this hypernetwork, such as a published .pt file: {PLACES}.")
    ],
    target: Annotated[
        Path,
        argument(
            "OUT",
            "Write model.safetensors and config.json to this folder, which is made if need be; these two "
            "files are replaced.",
        ),
    ],
) -> None:
    """Write a hypernetwork, such as a published .pt file, as model.safetensors and config.json."""
    import ghn_init
    from ghn_init._weights.directory import save

    ghn = ghn_init.load(source)
    save(ghn, target)
    numel = sum(values.numel() for values in ghn.parameters())
    say(f"{source}: {_described(ghn.config)}, {numel:,} parameters; saved {target}")


def _described(config: GHNConfig) -> str:
    """Which hypernetwork this is, in words."""
    if config.transformer:
        name = "GHN-3"
    elif config.hypernet == "mlp":
        name = "MLP"
    else:
        name = "GHN-2" if config.ve and config.weight_norm and config.layernorm else "GHN-1"
    return f"{name} for {config.num_classes} classes, tensors up to {'x'.join(map(str, config.max_shape))}"
