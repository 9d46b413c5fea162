"""Models that are spread over several processes, on the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import torch.multiprocessing as mp

import sharded_worker
from ghn_init._network.sharded import part_of

if TYPE_CHECKING:
    from pathlib import Path

# Both without `Stream.record_event` on the CPU and without `distribute_tensor(src_data_rank=...)`.
pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not hasattr(torch.cpu.Stream, "record_event"),
    reason="torch without torch.distributed, or 2.6, which cannot run FSDP2 models on the CPU",
)


def test_every_rank_writes_its_part(tmp_path: Path, ghn_dir: Path) -> None:
    mp.spawn(sharded_worker.run, (tmp_path, ghn_dir), nprocs=sharded_worker.RANKS)  # raises if a rank does
    done = {path.name for path in tmp_path.iterdir()} - {"rendezvous"}
    assert done == {check.__name__ for check in sharded_worker.CHECKS}


@pytest.mark.parametrize("rank", [0, 3, 5])
def test_parts_are_those_that_torch_cuts(rank: int) -> None:
    """Every placement on a mesh of 2 x 4 ranks that do not exist, even and uneven sizes."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.placement_types import _StridedShard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    fsdp_on_tensor_parallel = (_StridedShard(0, split_factor=4), Shard(0))
    torch.distributed.init_process_group("fake", rank=rank, world_size=8, store=FakeStore())
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (2, 4))
        for placements in (
            (Replicate(), Shard(0)), (Shard(0), Shard(0)), (Shard(1), Shard(-2)), fsdp_on_tensor_parallel
        ):  # fmt: skip
            for rows in (16, 13, 3):
                full = torch.arange(rows * 6.0).reshape(rows, 6)
                expected = distribute_tensor(full, mesh, placements, src_data_rank=None)
                assert torch.equal(part_of(full, expected), expected.to_local())
    finally:
        torch.distributed.destroy_process_group()
