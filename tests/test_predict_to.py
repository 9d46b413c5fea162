"""Checkpoints that are written tensor by tensor."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import huggingface_hub
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from ghn_init import GHN, PredictError, load, predict, predict_to
from ghn_init._writing import safetensors_writer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def ghn(ghn_dir: Path) -> GHN:
    return load(ghn_dir)


class Net(nn.Module):
    """Kept, tied, transposed and small tensors, several dtypes, a buffer outside the state dict."""

    def __init__(self, num_classes: int = 7) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.up = nn.ConvTranspose2d(16, 80, 3)
        self.wide = nn.Linear(80, 80).to(torch.bfloat16)
        self.again = nn.Linear(80, 80, bias=False).to(torch.bfloat16)
        self.again.weight = self.wide.weight
        self.head = nn.Linear(80, num_classes)
        self.register_buffer("cache", torch.ones(3), persistent=False)
        self.register_buffer("empty", torch.ones(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up(self.norm(self.stem(x)).relu()).mean((2, 3))
        return self.head(self.again(self.wide(x.to(torch.bfloat16))).float())

    def init_non_persistent_buffers(self) -> None:
        self.cache = torch.ones(3)


def on_meta(build: Callable[[], nn.Module]) -> Any:
    with torch.device("meta"):
        return build()


def assert_same(found: dict[str, torch.Tensor], model: nn.Module) -> None:
    expected = model.state_dict()
    assert set(found) == set(expected) - {"again.weight"}
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("options", [{}, {"diversify": "noise", "seed": 3}, {"exclude": ["up.*", "norm.*"]}])
def test_one_file_holds_what_predict_gives(options: dict[str, Any], ghn: GHN, tmp_path: Path) -> None:
    model = on_meta(Net)
    before, random_state = dict(model.named_parameters()), torch.get_rng_state()
    saved = predict_to(model, tmp_path / "new" / "out", ghn, **options)
    assert saved == tmp_path / "new" / "out" / "model.safetensors"
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]
    assert [path.name for path in saved.parent.parent.iterdir()] == ["out"]
    assert all(param is before[name] and param.is_meta for name, param in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert_same(load_file(saved), predict(on_meta(Net), ghn, **options))
    with safe_open(saved, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_model_in_memory_keeps_what_is_not_predicted(ghn: GHN, tmp_path: Path) -> None:
    model = Net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    saved = predict_to(model, tmp_path / "out", ghn)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert_same(load_file(saved), predict(model, ghn))


def test_shards_and_index_load_back(ghn: GHN, tmp_path: Path) -> None:
    model = on_meta(Net)
    saved = predict_to(model, tmp_path, ghn, max_shard_size="10KB")  # an empty folder will do
    assert saved == tmp_path / INDEX
    index = json.loads(saved.read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert files == sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    tensors = {name: value for file in files for name, value in load_file(tmp_path / file).items()}
    assert set(index["weight_map"]) == set(tensors)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors.values())
    expected = predict(on_meta(Net), ghn)
    assert_same(tensors, expected)
    loaded = Net()
    result = huggingface_hub.load_torch_model(loaded, tmp_path, strict=False)
    assert result.missing_keys == ["again.weight"]
    assert_same({k: v for k, v in loaded.state_dict().items() if k != "again.weight"}, expected)


def test_every_tensor_is_aligned(ghn: GHN, tmp_path: Path) -> None:
    saved = predict_to(on_meta(Net), tmp_path / "out", ghn)
    data = saved.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    sizes = {"F32": 4, "BF16": 2, "I64": 8}
    assert length % 8 == 0
    entries = [entry for name, entry in header.items() if name != "__metadata__"]
    assert all(entry["data_offsets"][0] % sizes[entry["dtype"]] == 0 for entry in entries)


def test_predicting_gives_the_same_bits_every_time(ghn: GHN, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        predict_to(on_meta(Net), tmp_path / folder, ghn, max_shard_size="20KB")
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


# Failures ----------------------------------------------------------------------------------------------


def test_nothing_is_left_behind_after_a_failure(
    ghn: GHN, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    real = safetensors_writer._write_values

    def failing(file: Any, name: str, *rest: Any) -> None:
        if len(written) == 5:
            raise OSError(28, "No space left on device")
        written.append(name)
        real(file, name, *rest)

    monkeypatch.setattr(safetensors_writer, real.__name__, failing)
    model = on_meta(Net)
    before = dict(model.named_parameters())
    with pytest.raises(PredictError, match=r"cannot be written: .*No space left on device"):
        predict_to(model, tmp_path / "new" / "out", ghn, max_shard_size="20KB")
    assert len(written) == 5
    assert list(tmp_path.iterdir()) == []
    assert all(param is before[name] for name, param in model.named_parameters())


def test_a_full_folder_is_refused(ghn: GHN, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(
        PredictError, match="exists and is not an empty folder; remove it, or write elsewhere"
    ):
        predict_to(on_meta(Net), tmp_path, ghn)
    with pytest.raises(PredictError, match="exists and is not an empty folder"):
        predict_to(on_meta(Net), tmp_path / "notes.txt", ghn)
    with pytest.raises(PredictError, match=r"cannot be written: .*Not a directory"):
        predict_to(on_meta(Net), tmp_path / "notes.txt" / "out", ghn)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_the_folder_that_one_is_in_is_refused(
    ghn: GHN, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (".", str(tmp_path), "../" + tmp_path.name):
        with pytest.raises(PredictError, match="is the folder that this process is in; expected another"):
            predict_to(on_meta(Net), name, ghn)
    assert list(tmp_path.iterdir()) == []


def test_links_are_followed_to_the_folder(ghn: GHN, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name, target in (("link", "empty"), ("dangling", "new"), ("loop", "loop")):
        (tmp_path / name).symlink_to(tmp_path / target)
    for name, target in (("link", "empty"), ("dangling", "new")):
        predict_to(on_meta(Net), tmp_path / name, ghn)
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / target / "model.safetensors").is_file()
    with pytest.raises(PredictError, match="loop"):
        predict_to(on_meta(Net), tmp_path / "loop", ghn)


@pytest.mark.parametrize("size", ["5 elephants", "GB", 0, -1, None, 1.5, True])
def test_what_is_no_size_of_a_shard_is_refused(size: Any, ghn: GHN, tmp_path: Path) -> None:
    with pytest.raises(PredictError, match=f"max_shard_size={size!r}: "):
        predict_to(on_meta(Net), tmp_path / "out", ghn, max_shard_size=size)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("folder", [None, "", "o\0", 3])
def test_what_names_no_folder_is_refused(folder: Any, ghn: GHN, tmp_path: Path) -> None:
    with pytest.raises(PredictError, match=f"^{re.escape(repr(folder))} names no folder; expected a path"):
        predict_to(on_meta(Net), folder, ghn)


def test_what_does_not_fit_into_safetensors(ghn: GHN, tmp_path: Path) -> None:
    class Extra(Net):
        def get_extra_state(self) -> dict[str, int]:
            return {"steps": 3}

    with pytest.raises(PredictError, match="holds _extra_state, which are no tensors"):
        predict_to(Extra(), tmp_path / "out", ghn)
    model = Net()
    hook = model.register_state_dict_post_hook(
        lambda _m, state, *_: state.update(twice=state["stem.bias"] * 2)
    )
    with pytest.raises(PredictError, match="twice in the state dict are neither parameters nor buffers"):
        predict_to(model, tmp_path / "out", ghn)
    hook.remove()
    model.register_buffer("phase", torch.ones(2, dtype=torch.complex128))
    with pytest.raises(PredictError, match=r"safetensors cannot hold torch.complex128"):
        predict_to(model, tmp_path / "out", ghn)
    assert list(tmp_path.iterdir()) == []


def test_a_value_that_is_lost_is_an_error_only_if_it_is_stored(ghn: GHN, tmp_path: Path) -> None:
    model = on_meta(Net)
    model.register_buffer("mask", torch.ones(3, device="meta"), persistent=False)
    assert predict_to(model, tmp_path / "out", ghn).exists()
    with pytest.raises(PredictError, match=r"mask would have no value"):
        predict(model, ghn)
    model.register_buffer("table", torch.ones(3, device="meta"))
    with pytest.raises(PredictError, match=r"table would have no value"):
        predict_to(model, tmp_path / "other", ghn)
    assert not (tmp_path / "other").exists()


# Memory ------------------------------------------------------------------------------------------------

MEASURE = """
import resource, sys, torch
from torch import nn
import ghn_init
ghn_init.predict_to(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 10)), sys.argv[1] + "/warm",
    sys.argv[2], example_input=(1, 3, 3, 3))
with torch.device("meta"):
    layers = [nn.Linear(2048, 2048, bias=False, dtype=torch.bfloat16) for _ in range(40)]
    model = nn.Sequential(nn.Linear(3, 2048, bias=False, dtype=torch.bfloat16), *layers)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ghn_init.predict_to(model, sys.argv[1] + "/out", sys.argv[2], exclude="2?.weight", example_input=(1, 3))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux")
def test_memory_is_that_of_the_largest_tensor(ghn_dir: Path, tmp_path: Path) -> None:
    """A checkpoint of 336 MB, of which 84 MB are not predicted; the largest tensor has 8 MB."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), str(ghn_dir)],
        capture_output=True,
        text=True,
        check=True,
    )
    size = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert size > 330e6
    assert int(done.stdout) < 108e3
