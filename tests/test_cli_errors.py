"""Errors on the command line: one line each, in its own words, whatever the user hands it."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

import ghn_init
from ghn_init import CheckpointError
from ghn_init.cli import app

if TYPE_CHECKING:
    from collections.abc import Callable

    from typer.testing import Result

MODEL = """
import torch
from torch import nn
net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(7, 3)
    def forward(self, x):
        assert x.shape == (2, 5, 7), f"not for {tuple(x.shape)}"
        return self.fc(x)
phased = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
phased.register_buffer("phase", torch.zeros(3, dtype=torch.complex128))
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run the command in a folder that has `m.py`."""
    monkeypatch.chdir(tmp_path)
    Path("m.py").write_text(MODEL, encoding="utf-8")
    return lambda *arguments: CliRunner().invoke(app, arguments)


def assert_error(result: Result, message: str) -> None:
    """One line on stderr that matches, exit status 1, nothing on stdout and nothing written."""
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert re.fullmatch(rf"ghn-init: error: [^\n]*{message}[^\n]*\n", result.stderr), result.stderr
    assert not Path("net.safetensors").exists()


def test_weights_that_may_not_be_read(
    run: Callable[..., Result], ghn_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = Path.open

    def guarded(self: Path, *args: Any, **kwargs: Any) -> Any:  # the superuser may read everything
        if self.name == "model.safetensors":
            raise PermissionError(13, "Permission denied", str(self))
        return usual(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", guarded)
    assert_error(run("m.py:net", "--weights", str(ghn_dir)), "random-ghn2: cannot be read: Permission denied")


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="no /proc")
def test_weights_that_are_no_file_at_heart(run: Callable[..., Result]) -> None:
    assert_error(run("m.py:net", "--weights", "/proc/self/mem"), "/proc/self/mem: cannot be read: ")


@pytest.mark.parametrize("arguments", [["inspect", "m.py:net", "--weights"], ["convert"]])
def test_a_name_that_no_file_can_have(run: Callable[..., Result], arguments: list[str]) -> None:
    last = ["out"] if arguments == ["convert"] else []
    assert_error(run(*arguments, "a" * 5000, *last), "a{200}: cannot be read: File name too long")
    with pytest.raises(CheckpointError, match="cannot be read: File name too long"):
        ghn_init.load("a" * 5000)
    with pytest.raises(CheckpointError, match="cannot be read: File name too long"):
        ghn_init.GHN.from_pretrained("a" * 5000)


def test_a_model_or_a_target_that_no_file_can_have(run: Callable[..., Result], ghn_dir: Path) -> None:
    assert_error(run("a" * 5000 + ".py"), r"a{200}\.\.\.: cannot be read: File name too long")
    assert_error(run("convert", str(ghn_dir), "a" * 5000), "cannot be written: File name too long")
    for arguments in (["m.py:net", "-o"], ["inspect", "m.py:net", "--draw"]):
        result = run(*arguments, "a" * 5000 + ".dot")
        assert result.exit_code == 2
        assert "File name too long" in " ".join(re.sub("[│╭╰─╮╯]", " ", result.stderr).split())


def test_a_header_whose_metadata_are_null_has_no_checksum(ghn_dir: Path, tmp_path: Path) -> None:
    content = (ghn_dir / "model.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size]) | {"__metadata__": None}
    text = json.dumps(header).encode()
    values = content[8 + size :]
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + values)
    (tmp_path / "config.json").write_bytes((ghn_dir / "config.json").read_bytes())
    read, expected = ghn_init.load(tmp_path).state_dict(), load_file(ghn_dir / "model.safetensors")
    assert all(read[name].equal(values) for name, values in expected.items())


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("1,3,999999999,999999999", r"no input of shape \(1, 3, 999999999, 999999999\): Storage size"),
        ("1,3,99999999999999999999,9", r"no input of shape \(1, 3, 99999999999999999999, 9\): .*Overflow"),
    ],
)
def test_an_input_larger_than_memory_is_refused(run: Callable[..., Result], shape: str, message: str) -> None:
    assert_error(run("m.py:net", "--input-shape", shape), message)


def test_a_missing_input_is_asked_for_in_the_words_of_the_command_line(run: Callable[..., Result]) -> None:
    result = run("m.py:Odd")
    assert_error(result, "--input-shape, such as 1,3,224,224")
    assert "example_input" not in result.stderr
    assert "(--head predict forces it)" in run("m.py:Odd", "--input-shape", "2,5,7").stderr
    assert run("m.py:Odd", "--input-shape", "2,5,7", "--head", "predict").exit_code == 0


def test_a_tensor_that_safetensors_cannot_hold(run: Callable[..., Result]) -> None:
    for arguments in ([], ["--max-shard-size", "1GB"]):
        result = run("m.py:phased", "-o", "net.safetensors", *arguments)
        assert_error(result, "safetensors cannot hold torch.complex128")


@pytest.mark.parametrize("seed", [str(1 << 64), str(-(1 << 63) - 1)])
def test_a_seed_of_more_than_64_bits(run: Callable[..., Result], seed: str) -> None:
    result = run("m.py:net", "--seed", seed)
    assert result.exit_code == 2
    assert "is no seed; expected one of 64 bits" in " ".join(re.sub("[│╭╰─╮╯]", " ", result.stderr).split())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_weights_in_a_pipe_are_not_waited_for(run: Callable[..., Result]) -> None:
    os.mkfifo("pipe")
    assert_error(run("m.py:net", "--weights", "pipe"), "'pipe': no such weights")


@pytest.mark.parametrize("option", ["--duration", "--time-limit", "--save-every", "--validate-every"])
@pytest.mark.parametrize("value", ["nan", "inf", "-1s"])
def test_a_length_of_time_that_is_none(run: Callable[..., Result], option: str, value: str) -> None:
    length = [] if option == "--duration" else ["--steps", "1"]
    result = run("train", "images", *length, f"{option}={value}")
    assert result.exit_code == 2
    assert "is no length of time" in " ".join(result.stderr.replace("│", " ").split())
