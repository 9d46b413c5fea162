"""What the tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of specifications and reference values: `GHN_INIT_SHARED`, else beside the repository.

    Without it the test is skipped, but not in CI, where nothing may be skipped unseen.
    """
    folder = Path(os.environ.get("GHN_INIT_SHARED", REPOSITORY.parent / "shared"))
    if folder.is_dir():
        return folder
    reason = f"no reference values: {folder} does not exist; set GHN_INIT_SHARED"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def ghn_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a GHN-2 of random weights, for tests that do not care what is predicted."""
    from ghn_init import GHN, GHNConfig

    folder = tmp_path_factory.mktemp("ghn") / "random-ghn2"
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(1)
        GHN(GHNConfig.ghn2()).save_pretrained(folder)
    return folder
