"""Models of transformers, told without importing it, and the mark that spares their parameters."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch import Tensor, nn


def is_pretrained(module: nn.Module) -> bool:
    """Whether `module` is a `PreTrainedModel` of transformers."""
    return "transformers" in sys.modules and any(
        cls.__name__ == "PreTrainedModel" and cls.__module__.startswith("transformers.")
        for cls in type(module).__mro__
    )


def mark_initialised(model: nn.Module, written: Collection[Tensor]) -> None:
    """Mark the `written` parameters for transformers, whose `init_weights` overwrites what has no mark.

    A module all of whose parameters were written is marked, too. Does nothing without a model of theirs.
    """
    if "transformers" not in sys.modules or not any(is_pretrained(module) for module in model.modules()):
        return
    ids = set(map(id, written))
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        for param in own:
            if id(param) in ids:
                param._is_hf_initialized = True  # noqa: SLF001 # pyright: ignore[reportAttributeAccessIssue]
        if own and all(id(param) in ids for param in own):
            module._is_hf_initialized = True  # noqa: SLF001 # pyright: ignore[reportArgumentType]
