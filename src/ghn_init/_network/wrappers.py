"""Wrappers around a network: what is inside them, and how to call it without them.

The names in a plan are those of the network inside its outermost wrappers: a checkpoint, a pattern or a plan
does not depend on whether the network was wrapped first.
"""

from __future__ import annotations

import functools
import sys
from collections import OrderedDict
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Final

from ghn_init._errors import TraceError
from ghn_init._network.walk import modules_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

_INSIDE: Final = {
    ("torch", "DataParallel"): "module",
    ("torch", "DistributedDataParallel"): "module",
    ("torch", "OptimizedModule"): "_orig_mod",  # torch.compile
    ("torch", "AveragedModel"): "module",
    ("timm", "ModelEmaV2"): "module",
    ("timm", "ModelEmaV3"): "module",
    ("lightning_fabric", "_FabricModule"): "_original_module",
    ("lightning", "_FabricModule"): "_original_module",
}
"""Package and class of a wrapper -> the attribute that holds the network. None of them is imported here."""

_HOOKS: Final = ("_forward_pre_hooks", "_forward_hooks")


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside `model`'s outermost wrappers; `model` itself if it is none.

    Raises:
        TraceError: The wrapper has changed the parameters themselves (FSDP of the first kind).
    """
    while (attribute := _attribute_of(model)) is not None:
        model = getattr(model, attribute)
    return model


def _attribute_of(model: object) -> str | None:
    for cls in type(model).__mro__:
        key = cls.__module__.partition(".")[0], cls.__name__
        if key in _INSIDE:
            return _INSIDE[key]
        if key == ("torch", "FullyShardedDataParallel"):
            raise TraceError(
                "FullyShardedDataParallel has flattened the parameters, so that they cannot be told apart; "
                "predict on every rank before wrapping, or wrap with torch.distributed.fsdp.fully_shard"
            )
    return None


@contextmanager
def bare(model: nn.Module) -> Iterator[None]:
    """Inside, calling `model` runs its modules' own code: not compiled, not distributed.

    FSDP2 gathers parameters and tensor parallelism distributes activations in hooks; without them the same
    network is there. Compiled modules run as they were written.
    """
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # else nothing can have been compiled, module or function
            import torch.compiler

            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for _, module in modules_of(model):
            for attribute in _HOOKS:
                hooks = vars(module)[attribute]
                if not hooks:
                    continue
                own = OrderedDict((key, hook) for key, hook in hooks.items() if not _is_distributed(hook))
                if len(own) < len(hooks):
                    vars(module)[attribute] = own
                    stack.callback(vars(module).__setitem__, attribute, hooks)
        yield


def _is_distributed(hook: Any) -> bool:
    """A hook that torch.distributed has put there."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    return (getattr(hook, "__module__", None) or "").startswith("torch.distributed.")
