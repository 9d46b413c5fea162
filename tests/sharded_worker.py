"""What each of two ranks does in tests/test_sharded.py: its own checks, in a process of its own."""

from __future__ import annotations

import copy
import os
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from ghn_init import GHN, TraceError, load, plan, predict, trace

if TYPE_CHECKING:
    from pathlib import Path

IMAGES = (2, 3, 8, 8)
RANKS = 2


class Net(nn.Module):
    """Uneven shapes: 5 rows over two ranks, and a bias of one element, of which the second rank has none."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3, padding=1)
        self.norm = nn.BatchNorm2d(5)
        self.up = nn.Linear(5, 40)
        self.down = nn.Linear(40, 1)
        self.head = nn.Linear(1, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x)).relu().mean((2, 3))
        return self.head(self.down(self.up(x).relu()))


def network() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def run(rank: int, folder: Path, ghn_dir: Path) -> None:
    """Everything that one rank checks."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    ghn = load(ghn_dir)
    reference = predict(network(), ghn)
    for check in CHECKS:
        check(reference, ghn)
        if rank == 0:
            (folder / check.__name__).touch()
    dist.barrier()
    # Without taking down the groups: torch's threads for gloo now and then abort a process that does,
    # "terminate called without an active exception", when all checks are over.
    os._exit(0)


def assert_full(model: nn.Module, reference: nn.Module) -> None:
    """Put together again, the parameters and buffers of `model` are those of `reference`."""
    expected = reference.state_dict()
    for name, tensor in model.state_dict().items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        assert torch.equal(full, expected[name]), name


def sharded(model: nn.Module, **options: Any) -> Any:
    mesh = options.pop("mesh", None) or init_device_mesh("cpu", (RANKS,))
    fully_shard(model.get_submodule("up"), mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def replicas(reference: nn.Module, ghn: GHN) -> None:
    model = nn.parallel.DistributedDataParallel(network())
    assert predict(model, ghn) is model
    assert_full(model.module, reference)
    assert model(torch.ones(IMAGES)).shape == (2, 7)


def fsdp(reference: nn.Module, ghn: GHN) -> None:
    model = sharded(network())
    params = dict(model.named_parameters())
    assert all(isinstance(param, DTensor) for param in params.values())
    assert replace(trace(model), name="Net") == trace(network())
    planned = plan(model, ghn)
    assert [row.name for row in planned.rows] == list(params)
    kept = {row.name: row.reason for row in planned.rows if row.action == "kept"}
    assert kept.keys() == {"down.bias", "head.weight", "head.bias"}
    own = {row.name: row.reason for row in plan(model, ghn, scale="own").rows}
    assert own["norm.bias"] == "norm layer (kept unless scale='predicted')"
    assert kept["down.bias"].startswith("all its values are ")
    planned.apply()
    assert all(param is params[name] for name, param in model.named_parameters())
    assert_full(model, reference)
    x = torch.randn(IMAGES)
    dist.broadcast(x, 0)
    torch.testing.assert_close(model(x), reference(x))
    again = predict(sharded(network()), ghn, diversify="noise")
    assert_full(again, predict(network(), ghn, diversify="noise"))


def fsdp_after_a_forward_pass(reference: nn.Module, ghn: GHN) -> None:
    model = sharded(network(), reshard_after_forward=False)
    model(torch.ones(IMAGES))
    assert not isinstance(model.stem.weight, DTensor)
    predict(model, ghn)
    assert_full(model, reference)
    torch.testing.assert_close(model(torch.ones(IMAGES)), reference(torch.ones(IMAGES)))


def fsdp_on_meta(_: nn.Module, ghn: GHN) -> None:
    with torch.device("meta"):
        plain, model = Net().eval(), Net().eval()
    predict(plain, ghn)
    sharded(model)
    predict(model, ghn)
    assert all(isinstance(param, DTensor) for param in model.parameters())
    assert_full(model, plain)
    torch.testing.assert_close(model(torch.ones(IMAGES)), plain(torch.ones(IMAGES)))


def tensor_parallel(reference: nn.Module, ghn: GHN) -> None:
    mesh = init_device_mesh("cpu", (RANKS,))
    model = parallelize_module(network(), mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    assert isinstance(model.up.weight, DTensor)
    predict(model, ghn)
    assert_full(model, reference)
    torch.testing.assert_close(model(torch.ones(IMAGES)), reference(torch.ones(IMAGES)))


def both(reference: nn.Module, ghn: GHN) -> None:
    for sizes in ((RANKS, 1), (1, RANKS)):
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("data", "tensor"))
        model = parallelize_module(
            network(), mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()}
        )
        sharded(model, mesh=mesh["data"])
        predict(model, ghn)
        assert_full(model, reference)


def first_fsdp(_: nn.Module, ghn: GHN) -> None:
    model = FullyShardedDataParallel(network(), device_id=torch.device("cpu"))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TraceError, match=r"before wrapping, or wrap with torch.distributed.fsdp.fully_shard"):
        predict(model, ghn)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


CHECKS = (replicas, fsdp, fsdp_after_a_forward_pass, fsdp_on_meta, tensor_parallel, both, first_fsdp)
