"""The command `ghn-init`: what it prints, writes and returns."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

import huggingface_hub
import pytest
import torch
from rich.progress import Progress
from safetensors.torch import load_file, load_model
from torch import nn
from torchvision.models import resnet18
from typer.main import get_command
from typer.testing import CliRunner

import ghn_init
from ghn_init.cli import _output, app
from ghn_init.cli._output import Steps, save

if TYPE_CHECKING:
    from collections.abc import Callable

    from typer.testing import Result

MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes=10, width=64):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.conv = nn.Conv2d(width, 2 * width, 3, stride=2)
        self.fc = nn.Linear(2 * width, num_classes)

    def forward(self, x):
        return self.fc(self.conv(self.norm(self.stem(x)).relu()).mean((2, 3)))
"""


@pytest.fixture
def run(ghn_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run the command in an empty folder with `model.py`, with random GHN weights."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.py").write_text(MODEL, encoding="utf-8")

    def run(*args: str, weights: bool = True) -> Result:
        return CliRunner().invoke(app, [*args, *(["--weights", str(ghn_dir)] if weights else [])])

    return run


def files() -> list[str]:
    return sorted(path.name for path in Path().iterdir() if path.is_file())


def build(name: str = "Net", **settings: object) -> nn.Module:
    from ghn_init.cli._spec import ModelSpec, load_model

    return load_model(ModelSpec("model.py", name), settings).model


def test_predict_writes_what_the_library_predicts(run: Callable[..., Result], ghn_dir: Path) -> None:
    result = run("model.py")
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    assert files() == ["model.py", "model.safetensors"]
    torch.manual_seed(0)
    expected = ghn_init.predict(build(), ghn_dir).state_dict()
    written = load_file("model.safetensors")
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    build().load_state_dict(written)
    assert load_model(build(), "model.safetensors") == (set(), [])


def test_summary_says_what_was_done(run: Callable[..., Result], ghn_dir: Path) -> None:
    assert re.search(r"predicted +\d+ parameters +[\d,]+ elements", run("model.py").stderr)
    text = run("model.py", "--set", "num_classes=7", "--set", "width=200").stderr
    assert f"Net from model.py:Net, weights {ghn_dir}" in text
    assert re.search(r"tiled +\d+ parameters +[\d,]+ elements", text)
    assert re.search(r"kept +2 parameters .*\n    fc\.weight, fc\.bias: .*7", text)
    size = Path("model.safetensors").stat().st_size
    assert re.search(rf"\d+ ms to predict and write; saved model\.safetensors, {size / 1e6:.1f} MB", text)
    own = run("model.py", "--set", "num_classes=7", "--scale", "own").stderr
    assert re.search(r"kept +4 parameters .*\n    norm.*: norm layer.*\n    fc\.weight, fc\.bias: .*7", own)


def test_default_command_has_a_name_too(run: Callable[..., Result]) -> None:
    assert run("--debug", "model.py:Net").exit_code == 0
    first = Path("Net.safetensors").read_bytes()
    assert run("predict", "model.py:Net").exit_code == 0
    assert Path("Net.safetensors").read_bytes() == first
    assert run("--seed", "0", "model.py:Net", "-o", "x.safetensors").exit_code == 0
    assert Path("x.safetensors").read_bytes() == first


def test_seed_makes_what_is_kept_repeatable(run: Callable[..., Result]) -> None:
    arguments = ("model.py", "--set", "num_classes=7", "--head", "keep", "--scale", "predicted")
    states = []
    for seed in ("3", "3", "4"):
        assert run(*arguments, "--seed", seed).exit_code == 0
        states.append(load_file("model.safetensors"))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["fc.weight"], states[2]["fc.weight"])
    assert torch.equal(states[0]["stem.weight"], states[2]["stem.weight"])


def test_options_reach_the_plan(run: Callable[..., Result], ghn_dir: Path) -> None:
    result = run(
        "model.py", "--head", "keep", "--exclude", "norm.*", "--diversify", "noise", "--seed", "5",
        "--input-shape", "1,3,20,20", "--json", "--scale", "own", "--frozen", "predict",
    )  # fmt: skip
    report = json.loads(result.stdout)
    torch.manual_seed(5)
    plan = ghn_init.plan(
        build(),
        ghn_dir,
        head="keep",
        exclude=["norm.*"],
        diversify="noise",
        seed=5,
        example_input=(1, 3, 20, 20),
        scale="own",
        frozen="predict",
    )
    expected = {**plan.to_dict(), "weights": str(ghn_dir)}
    assert {key: report[key] for key in expected} == expected
    actions = {row["name"]: row["action"] for row in report["rows"]}
    assert actions["fc.weight"] == actions["norm.bias"] == "kept"


def test_json_is_one_object_even_if_the_file_prints(run: Callable[..., Result]) -> None:
    with Path("model.py").open("a", encoding="utf-8") as file:
        file.write("print('noise on import')\n")
    result = run("model.py", "--json", "-o", "out.safetensors")
    report = json.loads(result.stdout)
    assert report["model"] == "Net"
    assert report["spec"] == "model.py:Net"
    assert report["file"] == "out.safetensors"
    assert report["bytes"] == Path("out.safetensors").stat().st_size
    steps = ["starting", "loading", "building", "predicting", "writing", "saving"]
    assert list(report["milliseconds"]) == steps
    assert sum(entry["parameters"] for entry in report["summary"].values()) == len(report["rows"]) == 8
    assert "noise on import" in result.stderr


def test_inspect_shows_graph_and_plan_and_writes_nothing(run: Callable[..., Result]) -> None:
    result = run("inspect", "model.py")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("Net: ")
    assert re.search(r"\d+ nodes \(.*\d conv.*\), \d+ edges, \d+ virtual edges, depth \d+", result.stdout)
    assert "stem.weight" in result.stdout
    assert "predicted" in result.stdout
    assert files() == ["model.py"]


def test_inspect_gives_json_and_draws(run: Callable[..., Result]) -> None:
    result = run("inspect", "model.py", "--json", "--draw", "graph.dot")
    report = json.loads(result.stdout)
    graph = ghn_init.trace(build())
    assert report["graph"]["edges"] == [list(edge) for edge in graph.edges]
    assert [node["type"] for node in report["graph"]["nodes"]] == [node.type for node in graph.nodes]
    assert files() == ["graph.dot", "model.py"]
    assert Path("graph.dot").read_text(encoding="utf-8").startswith('digraph "Net"')


def test_a_network_of_torchvision_is_predicted(run: Callable[..., Result]) -> None:
    result = run("torchvision.models:resnet18", "--set", "num_classes=10", "--strict")
    assert result.exit_code == 0, result.output
    resnet18(num_classes=10).load_state_dict(load_file("resnet18.safetensors"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.py"], r"nothing\.py: no such file"),
        (["model.py:Nett"], r"model\.py has no 'Nett'; did you mean Net\?"),
        (["model.py", "--set", "depth=3"], r"unexpected keyword argument 'depth'"),
        (["model.py", "--include", "sten.*"], r"sten\.\*"),
        (["model.py", "--input-shape", "1,1,8,8"], r"Net"),
        (["model.py", "--set", "num_classes=7", "--strict", "--head", "auto"], r"fc\.weight.*fc\.bias"),
        (["inspect", "model.py", "--draw", "graph.gif"], r"graph\.gif: cannot draw"),
        (["inspect", "torchvision.models:resnet5"], r"torchvision\.models has no 'resnet5'; did you mean"),
    ],
)
def test_our_errors_are_one_line_and_exit_1(
    run: Callable[..., Result], arguments: list[str], message: str
) -> None:
    result = run(*arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert re.fullmatch(rf"ghn-init: error: [^\n]*{message}[^\n]*\n", result.stderr)
    assert files() == ["model.py"]


def test_missing_weights_are_an_error_of_ours(run: Callable[..., Result]) -> None:
    result = run("model.py", "--weights", "no-such-weights", weights=False)
    assert result.exit_code == 1
    assert re.fullmatch(r"ghn-init: error: [^\n]*no-such-weights[^\n]*\n", result.stderr)


def test_debug_shows_the_traceback(run: Callable[..., Result]) -> None:
    for arguments in (
        ["--debug", "model.py:x"],
        ["model.py:x", "--debug"],
        ["inspect", "model.py:x", "--debug"],
    ):
        result = run(*arguments)
        assert result.exit_code == 1
        assert isinstance(result.exception, ghn_init.ModelSpecError)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.py", "--no-such-option"], "--no-such-option"),
        (["model.py", "extra"], "extra"),
        (["embed", "model.py"], "'embed' is no command, and names no model"),
        (["model.py:"], "FILE.py:NAME"),
        (["model.py", "--set", "width"], "KEY=VALUE"),
        (["model.py", "--head", "maybe"], "maybe"),
        (["model.py", "--scale", "half"], "half"),
        (["model.py", "--input-shape", "1,3,x"], "1,3,224,224"),
        (["model.py", "--input-shape", "0,3"], "1,3,224,224"),
        (["model.py", "-o", "missing/x.safetensors"], "missing does not"),
        (["inspect"], "SPEC"),
        (["--json"], "SPEC"),
    ],
)
def test_wrong_usage_exits_2(run: Callable[..., Result], arguments: list[str], message: str) -> None:
    result = run(*arguments, weights=False)
    assert result.exit_code == 2
    assert message in " ".join(re.sub("[│╭╰─╮╯]", " ", result.stderr).split())
    assert files() == ["model.py"]


@pytest.mark.parametrize(
    "command",
    [
        [], ["predict"], ["inspect"], ["convert"], ["train"], ["curve"], ["teach"], ["evaluate"],
        ["transfer"], ["measure"], ["properties"], ["search"],
    ],
)  # fmt: skip
def test_every_command_has_a_help_page(command: list[str]) -> None:
    result = CliRunner().invoke(app, [*command, "--help"])
    assert result.exit_code == 0
    assert re.search(rf"Usage: (ghn-init|root){''.join(f' {word}' for word in command)} ", result.stdout)


def help_texts() -> list[tuple[str, str]]:
    """(name, text) of every command, argument and option."""
    commands = get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
    found = []
    for name, command in commands.items():
        found.append((name, command.help))
        found += [(f"{name} {param.name}", param.help) for param in command.params if param.name != "help"]
    return found


@pytest.mark.parametrize(("name", "text"), help_texts())
def test_help_is_in_whole_sentences(name: str, text: str) -> None:
    """They end like sentences and begin with a verb: no "Of ...", no "Between ...", no "The file: ..."."""
    assert text.endswith(".")
    for sentence in text.split(". "):
        first = sentence.split()[0]
        assert first[0].isupper()
        assert first not in {"Of", "Between", "Only", "Also", "Length", "Where", "For", "Held-out", "The"}, (
            name
        )


def test_flags_do_not_look_as_if_they_took_a_value() -> None:
    for command in ([], ["predict"], ["inspect"], ["train"], ["evaluate"], ["transfer"], ["measure"]):
        page = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "160"}).stdout
        assert "--help" in page
        assert "<bool>" not in page


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("ghn-init con", ["convert"]),
        ("ghn-init model.py --strict --dive", ["--diversify"]),
        ("ghn-init inspect model.py --head ", ["auto", "predict", "keep"]),
    ],
)
def test_shells_complete_commands_options_and_choices(words: str, offered: list[str]) -> None:
    variables = {
        "COMP_WORDS": words,
        "COMP_CWORD": str(words.count(" ")),
        "_GHN_INIT_COMPLETE": "complete_bash",
    }
    assert CliRunner().invoke(app, [], prog_name="ghn-init", env=variables).stdout.split() == offered


def test_the_version_is_printed_and_no_arguments_give_the_help() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"ghn-init {ghn_init.__version__}\n")
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 2
    assert "SPEC | COMMAND" in result.output


def test_an_existing_file_is_replaced_whole_or_not_at_all(
    run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("model.safetensors").write_text("old")
    assert run("model.py").exit_code == 0
    good = Path("model.safetensors").read_bytes()
    assert good != b"old"

    def full_disk(_model: nn.Module, file: str, _metadata: object) -> None:
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_model", full_disk)
    result = run("model.py")
    assert result.exit_code == 1
    assert "model.safetensors cannot be written: No space left" in result.stderr
    assert Path("model.safetensors").read_bytes() == good
    assert files() == ["model.py", "model.safetensors"]


def test_tied_parameters_are_stored_once_and_load_again(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.b = nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight
            self.register_buffer("slanted", torch.arange(12.0).view(3, 4).t())

    model, other = Tied(), Tied()
    size = save(model, tmp_path / "tied.safetensors")
    assert size == (tmp_path / "tied.safetensors").stat().st_size
    assert len(load_file(tmp_path / "tied.safetensors")) == 3
    load_model(other, tmp_path / "tied.safetensors")
    assert other.b.weight is other.a.weight
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


def test_the_file_is_as_readable_as_any_other(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    save(nn.Linear(2, 2), tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_state_that_is_no_tensor_is_named(tmp_path: Path) -> None:
    class Odd(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"a": 1}

    with pytest.raises(ghn_init.PredictError, match="Odd: the state dict holds _extra_state, which"):
        save(Odd(2, 2), tmp_path / "odd.safetensors")
    assert not any(tmp_path.iterdir())


class Terminal:
    """A stderr that says it is a terminal, remembers what was drawn, and tells when a text was."""

    def __init__(self, awaited: str) -> None:
        self.text, self.awaited, self.seen = "", awaited, Event()

    def write(self, text: str) -> int:
        self.text += text
        if self.awaited in self.text:
            self.seen.set()
        return len(text)

    def flush(self) -> None:
        """Nothing is buffered."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("patience", "appears"), [(600.0, False), (0.01, True)])
def test_progress_appears_only_after_a_while(
    monkeypatch: pytest.MonkeyPatch, patience: float, appears: bool
) -> None:
    terminal = Terminal("thinking hard")
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(_output, "PATIENCE", patience)
    with Steps(total=1) as steps, steps("thinking hard"):
        assert terminal.seen.wait(300) if appears else True
    assert terminal.seen.is_set() is appears
    assert list(steps.milliseconds) == ["thinking"]


def test_progress_is_silent_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started = Event()
    monkeypatch.setattr(_output, "PATIENCE", 0.0)
    monkeypatch.setattr(Progress, "start", lambda _: started.set())
    with Steps(total=1) as steps, steps("thinking"):
        assert not started.wait(0.05)
    assert capsys.readouterr().err == ""


def test_the_command_runs_in_a_process_of_its_own(ghn_dir: Path, tmp_path: Path) -> None:
    """From the shell: python -m, exit status, and the two streams."""
    (tmp_path / "model.py").write_text(MODEL + "x = undefined\n", encoding="utf-8")
    command = [sys.executable, "-m", "ghn_init", "model.py", "--weights", str(ghn_dir)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    line = MODEL.count("\n") + 1
    assert done.stderr == (
        f"ghn-init: error: model.py:{line}: NameError: name 'undefined' is not defined "
        "(while importing model.py)\n"
    )


# Shards ------------------------------------------------------------------------------------------------


def test_a_folder_of_shards_is_written_from_the_meta_device(run: Callable[..., Result]) -> None:
    with Path("model.py").open("a", encoding="utf-8") as file:
        file.write("\ndef build_net(num_classes=10):\n    assert torch.empty(2**17).is_meta\n")
        file.write("    return Net(num_classes)\n")
    whole = ("--scale", "predicted")  # their own scales are random
    result = run("model.py:build_net", "-o", "out", "--max-shard-size", "200KB", "--json", *whole)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["file"] == str(Path("out") / "model.safetensors.index.json")
    names = sorted(path.name for path in Path("out").iterdir())
    assert names[-1] == "model.safetensors.index.json"
    assert len(names) == 3
    assert report["bytes"] == sum(path.stat().st_size for path in Path("out").iterdir())
    assert result.stderr.endswith(f"saved {report['file']}, {report['bytes'] / 1e6:.1f} MB\n")
    loaded = build()
    huggingface_hub.load_torch_model(loaded, "out")
    assert run("model.py:Net", "-o", "one.safetensors", *whole).exit_code == 0
    expected = load_file("one.safetensors")
    assert all(
        torch.equal(loaded.get_parameter(name), expected[name]) for name in ("stem.weight", "conv.weight")
    )


def test_a_folder_is_named_after_the_model_and_must_be_empty(run: Callable[..., Result]) -> None:
    assert run("model.py:Net", "--max-shard-size", "1GB").exit_code == 0
    assert [path.name for path in Path("Net").iterdir()] == ["model.safetensors"]
    again = run("model.py:Net", "--max-shard-size", "1GB")
    assert again.exit_code == 1
    assert "Net exists and is not an empty folder" in again.stderr
    wrong = run("model.py:Net", "--max-shard-size", "1 mile", "-o", "other")
    assert wrong.exit_code == 2
    assert "'1 mile' is no size" in wrong.stderr
    assert not Path("other").exists()
    folder = run("model.py:Net", "-o", "Net")
    assert folder.exit_code == 2
    assert "Net is a folder" in folder.stderr


def test_what_cannot_be_built_on_the_meta_device_is_built_in_memory(run: Callable[..., Result]) -> None:
    with Path("model.py").open("a", encoding="utf-8") as file:
        file.write("\nclass Counted(Net):\n    def __init__(self):\n")
        file.write("        super().__init__(width=int(torch.full((2**17,), 16).max()))\n")
    result = run("model.py:Counted", "--max-shard-size", "1GB")
    assert result.exit_code == 0, result.output
    assert "model.py:Counted is built in memory, because on the meta device: " in result.stderr
    assert load_file("Counted/model.safetensors")["fc.weight"].shape == (10, 32)
