"""Threads and processes: the same bits whoever predicts, beside whom, and after which fork."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Barrier

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils import parametrizations

import ghn_init
from networks import without_initialisation

predict = partial(ghn_init.predict, scale="predicted")
"""What is written then depends on nothing that was there before."""

MODELS = (
    "resnet18", "mobilenet_v2", "squeezenet1_1", "shufflenet_v2_x0_5", "mnasnet0_5",
    "regnet_y_400mf", "densenet121", "mobilenet_v3_small", "efficientnet_b0", "resnet34",
)  # fmt: skip


def build(name: str) -> nn.Module:
    with without_initialisation():
        return torchvision.models.get_model(name, num_classes=10)


def digest(model: nn.Module) -> str:
    """Of the bits of all parameters; computed without torch, whose threads a forked process lacks."""
    found = hashlib.sha256()
    for param in model.parameters():
        found.update(param.detach().numpy().tobytes())
    return found.hexdigest()


def test_ten_threads_give_what_one_after_another_gives() -> None:
    expected = [digest(predict(build(name), head="predict")) for name in MODELS]
    models = [build(name) for name in MODELS]  # while no thread predicts: the helper patches torch.nn.init
    together = Barrier(len(MODELS))

    def predicted(model: nn.Module) -> str:
        together.wait()
        return digest(predict(model, head="predict"))

    with ThreadPoolExecutor(len(MODELS)) as threads:
        assert list(threads.map(predicted, models)) == expected


def test_threads_leave_the_random_state_where_it_was() -> None:
    models = [build("resnet18") for _ in range(4)]
    before = torch.get_rng_state()
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(ghn_init.predict, models))
    assert torch.equal(torch.get_rng_state(), before)


def test_threads_solve_parametrised_and_meta_models_alike() -> None:
    def make(index: int) -> nn.Module:
        if index % 2:
            with torch.device("meta"):
                return nn.Sequential(nn.Conv2d(3, 8 + index, 3), nn.BatchNorm2d(8 + index), nn.PReLU())
        layer = nn.Conv2d(3, 8 + index, 3)
        return nn.Sequential(parametrizations.spectral_norm(layer), nn.BatchNorm2d(8 + index))

    expected = [digest(predict(make(index))) for index in range(10)]
    models = [make(index) for index in range(10)]
    for _ in range(3):
        with ThreadPoolExecutor(10) as threads:
            assert [digest(model) for model in threads.map(predict, models)] == expected
        models = [make(index) for index in range(10)]


AFTER = """
import sys
import torch
torch.set_num_threads(2)
import ghn_init
from test_processes import build, digest, predict, predict_in
if __name__ == "__main__":
    torch.randn(1000, 1000).exp_().sum()  # starts the threads that a fork loses
    expected = digest(predict(build("resnet18")))
    found, threads = predict_in(sys.argv[1], build("resnet18"))
    assert found == expected, "other bits"
    assert threads == torch.get_num_threads() == 2, "the number of threads changed"
    print("same")
"""


def _child(model: nn.Module, answers: multiprocessing.SimpleQueue[tuple[str, int]]) -> None:
    answers.put((digest(predict(model)), torch.get_num_threads()))


def predict_in(how: str, model: nn.Module) -> tuple[str, int]:
    """Digest of the prediction in a child process, and its number of threads."""
    context = multiprocessing.get_context(how)
    answers = context.SimpleQueue()
    torch.multiprocessing.set_sharing_strategy("file_system")
    process = context.Process(
        target=_child if how == "fork" else _spawned, args=(model, answers), daemon=True
    )
    process.start()
    process.join(300)
    assert process.exitcode == 0, "the child failed, or waits for threads that it does not have"
    return answers.get()


def _spawned(model: nn.Module, answers: multiprocessing.SimpleQueue[tuple[str, int]]) -> None:
    torch.set_num_threads(2)
    _child(model, answers)


@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_a_child_process_gives_the_same_bits(how: str, tmp_path: Path) -> None:
    if how not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system has no {how}")
    (tmp_path / "script.py").write_text(AFTER)
    here = str(Path(__file__).parent)
    variables = {**os.environ, "PYTHONPATH": here, "OMP_NUM_THREADS": "2", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py", how],
        capture_output=True, text=True, env=variables, timeout=600, check=False,
    )  # fmt: skip
    assert done.stdout == "same\n", done.stderr


class Predicting(torch.utils.data.Dataset[str]):
    """Item i is the digest of a predicted network: what a data loader's worker would prepare."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> str:
        return digest(predict(nn.Sequential(nn.Conv2d(3, 8 + index, 3), nn.BatchNorm2d(8 + index))))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
def test_workers_of_a_data_loader_give_the_same_bits() -> None:
    dataset = Predicting()
    expected = [[dataset[index]] for index in range(len(dataset))]
    loader = torch.utils.data.DataLoader(dataset, batch_size=1, num_workers=2)
    assert list(loader) == expected
