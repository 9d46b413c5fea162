"""The benchmarks are commands that run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"

pytestmark = pytest.mark.source


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", str(BENCHMARKS / "predict.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_predict_measures_a_model(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    chosen = ("--models", "squeezenet1_1", "--weights", "random", "--repeats", "1", "--threads", "1")
    done = run(*chosen, "--json", str(report))
    assert done.returncode == 0, done.stderr
    assert "geometric mean" in done.stdout
    (result,) = json.loads(report.read_text())["results"]
    assert result["model"] == "squeezenet1_1"
    assert result["parameters"] == 1_235_496
    assert all(result[key] > 0 for key in ("trace_ms", "ghn_ms", "write_ms", "total_ms", "kaiming_ms"))


def test_predict_refuses_unknown_models() -> None:
    done = run("--models", "resnet9000")
    assert done.returncode == 1
    assert "no torchvision classification model matches resnet9000" in done.stderr


def test_stream_measures_and_cleans_up(tmp_path: Path) -> None:
    size = ("--layers", "1", "--width", "128", "--hidden", "256", "--max-shard-size", "10MB")
    command = [
        sys.executable,
        "-W",
        "ignore",
        str(BENCHMARKS / "stream.py"),
        "--folder",
        str(tmp_path / "out"),
    ]
    done = subprocess.run([*command, *size], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["parameters"] == 2 * 32_000 * 128 + 4 * 128 * 128 + 3 * 128 * 256 + 3 * 128
    assert report["files"] == 2
    assert 0 <= report["extra_mb"] < 300  # a network so small may need no more than was there
    assert list(tmp_path.iterdir()) == []


def test_familiarity_measures_networks_of_every_kind(tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (64, 8, 8, 3), generator=rng, dtype=torch.uint8).numpy()
    labels = (torch.arange(64) % 10).numpy()
    data = tmp_path / "data.npz"
    np.savez(data, train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    command = [sys.executable, "-W", "ignore", str(BENCHMARKS / "familiarity.py"), str(data)]
    sizes = ("--images", "64", "--sample", "1", "--max-params", "0")
    done = subprocess.run([*command, *sizes], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines()[2:]]
    groups = [row[0].removeprefix("| DeepNets-1M ") for row in rows]
    assert groups == [
        "test, batch norm",
        "deep, batch norm",
        "bnfree, no norm",
        "resnet50, batch norm",
        "vit, batch norm",
    ]
    assert all(row[1] == "1" and 0 <= float(row[2]) <= 100 for row in rows)
