"""Models that are spread over several processes, on the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import torch.multiprocessing as mp

import sharded_worker

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
def test_every_rank_writes_its_part(tmp_path: Path, ghn_dir: Path) -> None:
    mp.spawn(sharded_worker.run, (tmp_path, ghn_dir), nprocs=sharded_worker.RANKS)  # raises if a rank does
    done = {path.name for path in tmp_path.iterdir()} - {"rendezvous"}
    assert done == {check.__name__ for check in sharded_worker.CHECKS}
