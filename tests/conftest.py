"""What the tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# Tests run in one process per core, with one thread each, as do the processes that they start. Results
# depend on the number of threads, so fixtures of any scope need the same one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
torch.manual_seed(0)  # modules that are built while the tests are collected have the same weights each time

REPOSITORY = Path(__file__).resolve().parent.parent

_EXAMPLES = {"ci": 200, "nightly": 2_000}
for _profile, _count in _EXAMPLES.items():
    settings.register_profile(
        _profile,
        max_examples=_count,
        deadline=None,
        database=None,
        derandomize=_profile == "ci",  # a commit is tested with the same examples every time, a night is not
        print_blob=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
settings.load_profile("ci")  # `pytest --hypothesis-profile=nightly` for the long run


def pytest_xdist_auto_num_workers() -> int:
    """Cores that may be used, but no more than 4: a process takes about 1 GB."""
    return min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


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
