"""Finding the model that a command line names."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from torch import nn

from ghn_init import ModelSpecError
from ghn_init.cli._spec import ModelSpec, load_model, parse_settings, parse_spec

if TYPE_CHECKING:
    from collections.abc import Callable

HEADER = "import torch\nfrom torch import nn\n"
NET = """class Net(nn.Sequential):
    def __init__(self, width=4):
        super().__init__(nn.Linear(2, width))
"""
HIDDEN = NET.replace("Net", "_Net")


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModelSpec]:
    """Write a file into an empty current folder and return its spec."""
    monkeypatch.chdir(tmp_path)

    def write(body: str, name: str = "model.py", attribute: str | None = None) -> ModelSpec:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(HEADER + body, encoding="utf-8")
        return ModelSpec(name, attribute)

    return write


@pytest.mark.parametrize(
    ("text", "source", "attribute", "name"),
    [
        ("model.py", "model.py", None, "model"),
        ("nets/small.py:build_model", "nets/small.py", "build_model", "build_model"),
        ("torchvision.models:resnet50", "torchvision.models", "resnet50", "resnet50"),
        ("package.nets:Net.small", "package.nets", "Net.small", "small"),
        (r"C:\nets\model.py", r"C:\nets\model.py", None, "model"),
        (r"C:\nets\model.py:Net", r"C:\nets\model.py", "Net", "Net"),
    ],
)
def test_a_spec_is_a_source_and_perhaps_a_name_in_it(
    text: str, source: str, attribute: str | None, name: str
) -> None:
    spec = parse_spec(text)
    assert (spec.source, spec.attribute, str(spec)) == (source, attribute, text)
    if "\\" not in text or sys.platform == "win32":
        assert spec.name == name


@pytest.mark.parametrize(
    "text", ["", "model.py:", "model.py:2x", "a b", "model.py:build()", "-x", "package.nets"]
)
def test_texts_that_name_no_model_are_refused(text: str) -> None:
    with pytest.raises(ModelSpecError, match="write FILE"):
        parse_spec(text)


def test_settings_are_literals_else_strings() -> None:
    pairs = [
        "a=1",
        "b=1e-3",
        "c=None",
        "d=[1, 2]",
        "e=hello",
        "f='1'",
        "g=",
        "h=x=y",
        "i=True",
        "j=-2",
        "k={[1]:2}",
        "l=false",
        "m=null",
    ]
    assert parse_settings(pairs) == {
        "a": 1, "b": 1e-3, "c": None, "d": [1, 2], "e": "hello", "f": "1", "g": "",
        "h": "x=y", "i": True, "j": -2, "k": "{[1]:2}", "l": False, "m": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("pairs", "message"),
    [(["width"], "not KEY=VALUE"), (["a-b=1"], "not KEY=VALUE"), (["a=1", "a=2"], "given twice")],
)
def test_texts_that_are_no_settings_are_refused(pairs: list[str], message: str) -> None:
    with pytest.raises(ModelSpecError, match=message):
        parse_settings(pairs)


@pytest.mark.parametrize(
    ("body", "chosen"),
    [
        (NET, "Net"),
        (NET + "criterion = nn.CrossEntropyLoss()\n", "Net"),
        (NET + "def build_model():\n    raise SystemExit('called')\n", "Net"),
        (HIDDEN + "def anything() -> nn.Module:\n    return _Net()\n", "anything"),
        (NET + "def helper() -> 'Net or (': ...\n", "Net"),
        (NET + "def helper() -> '1 / 0': ...\n", "Net"),
        (HIDDEN + "def anything() -> '_Net':\n    return _Net()\n", "anything"),
        (NET + "def get_data():\n    raise SystemExit('called')\n", "Net"),
        (NET + "def main():\n    raise SystemExit('called')\n", "Net"),
        (NET + "def make_net(size):\n    return Net(size)\n", "Net"),
        (NET + "class Head(nn.Linear):\n    pass\n", "Net"),
        (NET + "class _Hidden(Net):\n    pass\n", "Net"),
        ("from torch.nn import Sequential, Linear\nnet = Sequential(Linear(2, 4))\n", "net"),
    ],
)
def test_a_file_with_one_thing_that_makes_a_model_needs_no_name(
    write: Callable[..., ModelSpec], body: str, chosen: str
) -> None:
    found = load_model(write(body))
    assert found.origin == ModelSpec("model.py", chosen)
    assert [tuple(param.shape) for param in found.model.parameters()] == [(4, 2), (4,)]


def test_settings_choose_what_accepts_them(write: Callable[..., ModelSpec]) -> None:
    found = load_model(write(NET + "net = Net()\n"), {"width": 6})
    assert found.origin.attribute == "Net"
    assert next(found.model.parameters()).shape == (6, 2)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (NET + "net = Net()\n", r"2 candidates.*model\.py:Net, model\.py:net"),
        (NET + "def f() -> Net:\n    return Net()\n", r"2 candidates.*model\.py:Net, model\.py:f"),
        (HIDDEN + "def build_model():\n    return _Net()\n", r"no function that is annotated"),
        (NET + "class Other(Net):\n    pass\n", r"2 candidates.*model\.py:Net, model\.py:Other"),
        (NET + "a = Net()\nb = Net()\n", r"3 candidates.*model\.py:Net, model\.py:a, model\.py:b"),
        (
            "class Net(nn.Module):\n    def __init__(self, width): ...\n",
            r"Net \(.*'width'\).*--set KEY=VALUE",
        ),
        ("x = 1\n", r"no nn\.Module instance with parameters, .*write model\.py:NAME"),
        ("loss = nn.MSELoss()\n", "no nn.Module instance with parameters"),
    ],
)
def test_none_or_several_candidates_are_an_error_that_lists_them(
    write: Callable[..., ModelSpec], body: str, message: str
) -> None:
    with pytest.raises(ModelSpecError, match=message):
        load_model(write(body))


@pytest.mark.parametrize("attribute", ["Net", "net", "make", "Net.narrow"])
def test_an_instance_class_factory_or_method_may_be_named(
    write: Callable[..., ModelSpec], attribute: str
) -> None:
    body = (
        NET
        + "    @classmethod\n    def narrow(cls):\n        return cls(1)\n"
        + "net = Net()\nmake = lambda: Net(3)\n"
    )
    found = load_model(write(body, attribute=attribute))
    width = {"make": 3, "Net.narrow": 1}.get(attribute, 4)
    assert next(found.model.parameters()).shape == (width, 2)


@pytest.mark.parametrize(
    ("attribute", "settings", "message"),
    [
        ("Nett", {}, r"model\.py has no 'Nett'; did you mean Net"),
        ("zzz", {}, r"model\.py has no 'zzz'$"),
        ("number", {}, r"model\.py:number is a int; expected an nn\.Module"),
        ("text", {}, r"model\.py:text returned a str; expected an nn\.Module"),
        ("Net", {"widht": 3}, r"model\.py:Net: got an unexpected keyword argument 'widht'; give arguments"),
        ("net", {"width": 3}, r"model\.py:net: is an instance and takes no --set$"),
        ("fails", {}, r"^model\.py:8: ValueError: no luck \(while calling model\.py:fails\(\)\)$"),
        ("deep", {}, r"^model\.py:10: ZeroDivisionError: .* by zero \(while"),
        ("mute", {}, r"^model\.py:15: Mute \(while calling model\.py:mute\(\)\)$"),
        ("leaves", {}, r"^model\.py:12: SystemExit: 3 \(while"),
    ],
)
def test_named_things_that_are_no_model(
    write: Callable[..., ModelSpec], attribute: str, settings: dict[str, object], message: str
) -> None:
    body = (
        NET + "number = 3; net = Net()\n"
        "text = lambda: 'text'\n"
        "def fails(): raise ValueError('no luck')\n"
        "def deep():\n    return Net(1 // 0)\n"
        "def leaves():\n    raise SystemExit(3)\n"
        "class Mute(Exception):\n    __str__ = leaves and (lambda self: 1 // 0)\ndef mute(): raise Mute\n"
    )
    with pytest.raises(ModelSpecError, match=message):
        load_model(write(body, attribute=attribute), settings)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def f(:\n", r"model\.py:3: SyntaxError: "),
        (
            "x = undefined\n",
            r"^model\.py:3: NameError: name 'undefined' is not defined \(while importing model\.py\)",
        ),
        ("import not_installed_anywhere\n", r"^model\.py:3: ModuleNotFoundError: No module named 'not_inst"),
        ("import sys\nsys.exit()\n", r"^model\.py:4: SystemExit \(while importing"),
        ("torch.zeros(2) @ torch.zeros(3)\n", r"^model\.py:3: RuntimeError: inconsistent tensor size"),
    ],
)
def test_errors_of_the_file_carry_its_line(write: Callable[..., ModelSpec], body: str, message: str) -> None:
    spec = write(body)
    with pytest.raises(ModelSpecError, match=message):
        load_model(spec)
    assert "_ghn_init_spec_model" not in sys.modules


def test_a_module_that_fails_to_look_a_name_up(write: Callable[..., ModelSpec]) -> None:
    body = (
        "def __getattr__(name):\n    if name.startswith('__'):\n        raise AttributeError(name)\n"
        "    raise ImportError(f'{name} requires the library foo')\n"
    )
    message = (
        r"^model\.py:6: ImportError: Net requires the library foo \(while looking up Net in model\.py\)$"
    )
    with pytest.raises(ModelSpecError, match=message):
        load_model(write(body, attribute="Net"))


def test_main_guard_is_not_run_and_prints_go_to_stderr(
    write: Callable[..., ModelSpec], capsys: pytest.CaptureFixture[str]
) -> None:
    load_model(write(NET + "print('hello')\nif __name__ == '__main__':\n    raise SystemExit(9)\n"))
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "hello\n")


def test_siblings_are_importable_and_the_path_is_put_back(
    write: Callable[..., ModelSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    write("width = 5\n", name="nets/spec_sibling_a.py")
    write("width = 2\n", name="spec_sibling_b.py")  # in the current folder
    body = "import spec_sibling_a as a, spec_sibling_b as b\nnet = nn.Linear(b.width, a.width)\n"
    spec = write(body, name="nets/model.py")
    for name in ("spec_sibling_a", "spec_sibling_b"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    before = list(sys.path)
    assert next(load_model(spec).model.parameters()).shape == (5, 2)
    assert sys.path == before


def test_a_file_in_a_package_may_import_relatively(write: Callable[..., ModelSpec]) -> None:
    write("", name="spec_package/__init__.py")
    write("", name="spec_package/nets/__init__.py")
    write("width = 3\n", name="spec_package/config.py")
    spec = write("from ..config import width\nnet = nn.Linear(2, width)\n", name="spec_package/nets/small.py")
    assert next(load_model(spec).model.parameters()).shape == (3, 2)


def test_dataclasses_and_future_annotations_work(write: Callable[..., ModelSpec]) -> None:
    write("")
    body = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom torch import nn\n"
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from nowhere import Something\n"
        "@dataclass\nclass Config:\n    width: int = 7\n"
        "def build_model(config: Something = None) -> nn.Module:\n    return nn.Linear(2, Config().width)\n"
    )
    Path("model.py").write_text(body, encoding="utf-8")
    assert next(load_model(ModelSpec("model.py")).model.parameters()).shape == (7, 2)


def test_sources_that_are_not_there_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelSpecError, match=r"missing\.py: no such file \(looked in "):
        load_model(ModelSpec("missing.py"))
    with pytest.raises(ModelSpecError, match="no module named 'no_such_module'; write MODULE:NAME"):
        load_model(ModelSpec("no_such_module", "x"))
    with pytest.raises(ModelSpecError, match=r"no module named 'torch\.nothing'"):
        load_model(ModelSpec("torch.nothing", "x"))
    (tmp_path / "model.txt").write_text("x = 1")
    with pytest.raises(ModelSpecError, match="not a Python file"):
        load_model(ModelSpec("./model.txt"))


def test_module_specs_build_with_settings() -> None:
    found = load_model(ModelSpec("torch.nn", "Linear"), {"in_features": 2, "out_features": 3})
    assert isinstance(found.model, nn.Linear)
    assert str(found.origin) == "torch.nn:Linear"


def test_errors_in_a_module_name_the_file() -> None:
    message = (
        r"resnet\.py:\d+: TypeError: .*'num_class'.*while calling torchvision\.models:resnet18\(num_class=3"
    )
    with pytest.raises(ModelSpecError, match=message):
        load_model(ModelSpec("torchvision.models", "resnet18"), {"num_class": 3})


def test_a_file_that_reads_the_command_line_does_not_see_ours(
    write: Callable[..., ModelSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = ["ghn-init", "model.py", "--json", "--width", "9"]
    monkeypatch.setattr(sys, "argv", ours)
    body = (
        "import argparse\nparser = argparse.ArgumentParser()\n"
        "parser.add_argument('--width', type=int, default=5)\nargs = parser.parse_args()\n"
        "def net() -> nn.Module:\n    return nn.Linear(parser.parse_args().width, args.width)\n"
    )
    assert next(load_model(write(body)).model.parameters()).shape == (5, 5)
    assert sys.argv is ours


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a" * 5000 + ".py", r"^a{200}\.\.\.: cannot be read: File name too long$"),
        ("folder.py", "expected a Python file, found a folder or a device"),
    ],
)
def test_names_that_no_file_can_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder.py").mkdir()
    with pytest.raises(ModelSpecError, match=message):
        load_model(ModelSpec(source))
