"""What the command line writes, where it refuses to, and what it leaves when it is stopped."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

from ghn_init import GHN, GHNConfig, load
from ghn_init._errors import CheckpointError, PredictError
from ghn_init._files import replacing, write_bytes
from ghn_init._weights.directory import save as save_hypernetwork
from ghn_init._writing.safetensors_writer import fresh_folder, size_in_bytes
from ghn_init.cli import app
from ghn_init.cli._output import save

if TYPE_CHECKING:
    from collections.abc import Callable

    from typer.testing import Result

MODEL = """
from torch import nn
net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
"""

posix = pytest.mark.skipif(os.name != "posix", reason="pipes, devices and signals of POSIX")


@pytest.fixture
def run(ghn_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run the command in a folder that has `m.py` and nothing else."""
    monkeypatch.chdir(tmp_path)
    Path("m.py").write_text(MODEL, encoding="utf-8")

    def run(*args: str) -> Result:
        return CliRunner().invoke(app, [*args, "--weights", str(ghn_dir)], env={"COLUMNS": "400"})

    return run


def refused(result: Result, reason: str) -> None:
    assert result.exit_code == 2, result.output
    assert reason in result.stderr
    assert not [path for path in Path().iterdir() if path.name.startswith(".")]


# Where to -----------------------------------------------------------------------------------------------


def test_the_model_is_not_overwritten_by_its_weights(run: Callable[..., Result]) -> None:
    refused(run("m.py", "-o", "m.py"), "m.py is the name of a Python file")
    Path("other.py").touch()
    refused(run("m.py", "-o", "other.py"), "Python file")
    Path("m.safetensors").hardlink_to("m.py")
    refused(run("m.py"), "m.safetensors is what the command reads")
    Path("link").symlink_to("m.py")
    refused(run("m.py", "-o", "link"), "link is what the command reads")
    assert Path("m.py").read_text(encoding="utf-8") == MODEL


def test_the_hypernetwork_is_not_overwritten_by_what_it_predicts(
    run: Callable[..., Result], ghn_dir: Path
) -> None:
    for option in (["-o"], ["-o", "m.safetensors", "--report"]):
        for name in ("model.safetensors", "config.json"):
            refused(run("m.py", *option, str(ghn_dir / name)), "is what the command reads")
    refused(run("inspect", "m.py", "--draw", str(ghn_dir / "config.json")), "is what the command reads")
    load(ghn_dir)


@pytest.mark.parametrize("name", ["m.pt", "m.pth", "pytorch_model.bin", "m.ckpt"])
def test_weights_are_not_given_the_name_of_a_file_of_torch(name: str, run: Callable[..., Result]) -> None:
    refused(run("m.py", "-o", name), "give a name that ends in .safetensors")
    assert not Path(name).exists()


@posix
def test_pipes_devices_and_sockets_stay_what_they_are(run: Callable[..., Result]) -> None:
    os.mkfifo("pipe")
    refused(run("m.py", "-o", "pipe"), "it is a named pipe")
    assert stat.S_ISFIFO(Path("pipe").lstat().st_mode)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        refused(run("m.py", "-o", "socket"), "it is a socket")
    Path("null").symlink_to(os.devnull)
    refused(run("m.py", "-o", "null"), "it is a device")
    assert Path("null").is_symlink()
    refused(run("inspect", "m.py", "--draw", "pipe"), "it is a named pipe")
    assert stat.S_ISCHR(Path(os.devnull).stat().st_mode)


@posix
def test_a_read_only_file_is_not_replaced_even_by_the_superuser(run: Callable[..., Result]) -> None:
    Path("m.safetensors").write_bytes(b"precious")
    Path("m.safetensors").chmod(0o444)
    refused(run("m.py"), "m.safetensors cannot be written: it is read-only")
    assert Path("m.safetensors").read_bytes() == b"precious"


@posix
def test_a_link_is_followed(run: Callable[..., Result]) -> None:
    Path("there").mkdir()
    Path("m.safetensors").symlink_to("there/weights")
    for _ in range(2):  # it leads to a file that does not exist yet, then to one that does
        assert run("m.py").exit_code == 0
        assert Path("m.safetensors").is_symlink()
        assert load_file("there/weights")["0.weight"].shape == (8, 3, 3, 3)
    Path("loop").symlink_to("loop")
    refused(run("m.py", "-o", "loop"), "it is a link to itself")


def test_a_dash_is_no_file(run: Callable[..., Result]) -> None:
    refused(run("m.py", "-o", "-"), "results for programs come with --json")
    refused(run("m.py", "-o", "-", "--max-shard-size", "1GB"), "- is no folder")
    refused(run("inspect", "m.py", "--draw", "-"), "would be a file of that name")
    assert sorted(path.name for path in Path().iterdir()) == ["m.py"]


def test_a_file_that_is_replaced_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    path.chmod(0o600)
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_name_of_the_greatest_length_is_written(tmp_path: Path) -> None:
    save(nn.Linear(2, 2), tmp_path / ("x" * 243 + ".safetensors"))
    assert [len(path.name) for path in tmp_path.iterdir()] == [255]


# Whole or not at all ------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, OSError, ValueError])
def test_whatever_ends_writing_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, error: type[BaseException]
) -> None:
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(error), replacing(tmp_path / "a") as partial:  # noqa: PT012
        partial.write_bytes(b"ha")
        raise error
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_what_a_killed_process_left_is_removed_after_a_day_and_nothing_else(tmp_path: Path) -> None:
    name, day = ".0123456789abcdef.partial", 24 * 3600
    (tmp_path / name).write_bytes(b"half")
    folder = tmp_path / ".fedcba9876543210.partial"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"half")
    others = [
        tmp_path / other for other in (".mine.partial", "0123456789abcdef.partial", "old", ".checkpoint-1")
    ]
    for path in (*others, folder / "model.safetensors"):
        path.write_bytes(b"half")
    write_bytes(tmp_path / "a", b"new")
    assert folder.is_dir()  # somebody may be writing
    assert (tmp_path / name).is_file()
    for path in (*tmp_path.iterdir(), folder / "model.safetensors"):
        os.utime(path, (time.time() - 2 * day,) * 2)
    with fresh_folder(tmp_path / "b") as partial:
        assert sorted(tmp_path.iterdir()) == sorted([*others, tmp_path / "a", partial])


def full_disk(_file: int) -> None:
    raise OSError(28, "No space left on device")


def test_a_full_disk_leaves_neither_half_a_hypernetwork_nor_half_a_drawing(
    run: Callable[..., Result], ghn_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", full_disk)
    done = CliRunner().invoke(app, ["convert", str(ghn_dir), "out"])
    assert (done.exit_code, done.stderr) == (
        1,
        "ghn-init: error: out cannot be written: No space left on device\n",
    )
    done = run("inspect", "m.py", "--draw", "g.dot")
    assert (done.exit_code, done.stderr) == (
        1,
        "ghn-init: error: g.dot cannot be written: No space left on device\n",
    )
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["m.py", "out"]


STOPPED = """
import signal
import sys
import time
import safetensors.torch
from pathlib import Path
from threading import Event
from ghn_init.cli import main

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore

def save_model(model, file, metadata):
    Path(file).write_bytes(b"half")
    print("half", flush=True)
    Event().wait()

safetensors.torch.save_model = save_model
sys.argv = ["ghn-init", *sys.argv[1:]]
main()
"""


@posix
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_command_leaves_no_part_of_a_file(
    ghn_dir: Path, tmp_path: Path, number: int, status: int
) -> None:
    (tmp_path / "m.py").write_text(MODEL, encoding="utf-8")
    (tmp_path / "m.safetensors").write_bytes(b"old")
    command = [sys.executable, "-c", STOPPED, "m.py", "--weights", str(ghn_dir)]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"half\n"
        assert len(list(tmp_path.iterdir())) == 3
        process.send_signal(number)
        assert process.wait(300) == status
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.py", "m.safetensors"]
    assert (tmp_path / "m.safetensors").read_bytes() == b"old"


@posix
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_command_is_stopped_while_it_imports_the_users_file(
    tmp_path: Path, number: int, status: int
) -> None:
    slow = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
print("half", file=sys.stderr, flush=True)
time.sleep(300)
"""
    (tmp_path / "m.py").write_text(slow, encoding="utf-8")
    command = [sys.executable, "-m", "ghn_init", "m.py"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == b"half\n"
        process.send_signal(number)
        assert process.wait(300) == status


# Streams and sizes --------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("arguments", [["inspect", "m.py"], ["m.py", "--json"], ["--help"], ["--version"]])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_stdout_that_takes_nothing_is_one_line(
    ghn_dir: Path, tmp_path: Path, arguments: list[str], unbuffered: str
) -> None:
    (tmp_path / "m.py").write_text(MODEL, encoding="utf-8")
    weights = [] if arguments[0].startswith("--") else ["--weights", str(ghn_dir)]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "ghn_init", *arguments, *weights],
            cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True, check=False,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "ghn-init: error: stdout: No space left on device"
    assert "Traceback" not in done.stderr
    assert "ignored" not in done.stderr


@pytest.mark.parametrize("size", ["-5GB", "0GB", "nanGB", "infMB", "1e3GB", "5", "GB", "", "5 miles"])
def test_sizes_that_no_shard_has_are_refused(size: str, run: Callable[..., Result]) -> None:
    with pytest.raises(PredictError, match="expected a number of bytes above 0"):
        size_in_bytes(size)
    refused(run("m.py", f"--max-shard-size={size}"), f"{size!r} is no size; write --max-shard-size 5GB")


def test_sizes_are_read_as_bytes() -> None:
    sizes = [7, "1KB", "1.5 mb", " 5GB ", "2TB"]
    assert [size_in_bytes(size) for size in sizes] == [7, 1000, 1_500_000, 5 * 10**9, 2 * 10**12]
    with pytest.raises(PredictError, match="max_shard_size=-1: expected"):
        size_in_bytes(-1)


def test_a_hypernetwork_that_cannot_be_saved_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"file/ghn cannot be written: Not a directory"):
        save_hypernetwork(GHN(GHNConfig.ghn2()), tmp_path / "file" / "ghn")
