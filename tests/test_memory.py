"""Memory: beyond the model, predicting needs less than its largest tensor, or twice that, and 100 MB."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).with_name("memory_worker.py")

TENSORS = {
    "plain": 1,
    "half precision": 1,
    "diversified with noise": 1,
    "made orthogonal": 1,
    "made orthogonal, more outputs than inputs": 2,  # LAPACK wants its transpose
    "weight norm": 1,
    "running statistics, by default": 1,
}
"""How many tensors as large as the largest, in float32, predicting may need."""


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    """What a fresh process measured."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("Linux tells how much memory was used, other systems do not")
    done = subprocess.run([sys.executable, str(WORKER)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", TENSORS)
def test_beyond_the_model_there_is_room_for_its_largest_tensor(name: str, measured: dict[str, Any]) -> None:
    found = measured["predicting"][name]
    assert found["extra"] < TENSORS[name] * found["largest"] + 100e6
    assert found["finite"]


def test_every_way_of_predicting_that_is_measured_has_a_bound(measured: dict[str, Any]) -> None:
    assert measured["predicting"].keys() == TENSORS.keys()


@pytest.mark.parametrize("case", ["xl 1000", "t 4000"])
def test_attention_over_thousands_of_nodes_needs_200_megabytes_at_most(
    case: str, measured: dict[str, Any]
) -> None:
    assert 20e6 < measured["attention"][case] < 200e6
