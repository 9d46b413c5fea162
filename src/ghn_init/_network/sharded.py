"""Parameters that are spread over several processes: DTensor, as FSDP2 and tensor parallelism make them.

Every rank predicts the whole network, which gives the same bits everywhere, and writes the part that it
holds. Weights are not communicated; but unless `scale="predicted"` the ranks add up a few numbers for every
parameter that is cut, its scale (`_network/scale.py`), so that all of them have to predict.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from ghn_init._errors import PredictError

if TYPE_CHECKING:
    from typing import TypeGuard

    from torch.distributed.tensor import DTensor

_KNOWN: Final = ("Shard", "_StridedShard", "Replicate")


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """A DTensor."""
    # Only a program that uses them has loaded the module, and loading it takes half a second.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def refusal(tensor: DTensor) -> str:
    """Why the parts of a DTensor cannot be written, or ""."""
    odd = [str(placement) for placement in tensor.placements if type(placement).__name__ not in _KNOWN]
    return f"DTensor with placement {odd[0]}" if odd else ""


def part_of(full: Tensor, like: DTensor) -> Tensor:
    """This rank's part of `full`, a view, if it is spread as `like` is.

    Along every dimension of the mesh a `Shard` cuts the tensor with the semantics of `torch.chunk`. FSDP2 on
    top of tensor parallelism says `_StridedShard` where it cuts what the dimensions after it have cut.

    Raises:
        PredictError: The part that the mesh describes is not as large as the one that is there.
    """
    part, mesh = full, like.device_mesh
    names = [type(placement).__name__ for placement in like.placements]
    plain = [dimension for dimension, name in enumerate(names) if name == "Shard"]
    strided = [dimension for dimension, name in enumerate(names) if name == "_StridedShard"]
    for dimension in (*plain, *reversed(strided)):
        placement: Any = like.placements[dimension]
        axis = placement.dim % full.ndim
        chunks = part.chunk(mesh.size(dimension), axis)
        rank = mesh.get_local_rank(dimension)
        part = chunks[rank] if rank < len(chunks) else part.narrow(axis, 0, 0)
    if part.shape != like.to_local().shape:
        raise PredictError(
            f"a DTensor of shape {tuple(like.shape)} with placements {like.placements} on {mesh}: expected a "
            f"local part of shape {tuple(part.shape)}, found {tuple(like.to_local().shape)}"
        )
    return part


def like_sharded(old: DTensor, full: Tensor | None) -> DTensor:
    """A DTensor spread as `old` is, on its mesh's devices: this rank's part of `full`, or empty."""
    from torch.distributed.tensor import DTensor

    local = torch.empty_like(old.to_local(), device=old.device_mesh.device_type, requires_grad=False)
    if full is not None:
        local.copy_(part_of(full, old))
    return DTensor.from_local(
        local, old.device_mesh, old.placements, run_check=False, shape=old.shape, stride=old.stride()
    )


def home_of(tensors: list[Tensor]) -> str:
    """The device type on which a meta model is made: that of its mesh, else "cpu"."""
    return next((tensor.device_mesh.device_type for tensor in tensors if is_sharded(tensor)), "cpu")


def reshard(model: nn.Module) -> None:
    """Let every FSDP2 module hold its shards again, not the whole parameters of its last forward pass."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or not hasattr(fsdp, "FSDPModule"):
        return
    for module in model.modules():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()  # pyright: ignore[reportCallIssue]
