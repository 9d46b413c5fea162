"""The package as a whole: names, imports, metadata."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import ghn_init

HEAVY = [
    "torchvision", "typer", "rich", "huggingface_hub", "safetensors", "matplotlib", "graphviz", "accelerate",
    "ghn_init.training", "ghn_init.deepnets", "ghn_init.cli",
]  # fmt: skip
PACKAGE = Path(ghn_init.__file__).parent

LAYERS = [
    ("_errors", "_draw", "_graph"),
    ("_ops", "_inputs", "_record", "_trace", "_config", "_batch", "_gated", "_decoder", "_tile", "_model"),
    ("_checkpoint",),
    ("_select", "_diversify", "_batchnorm", "_plan", "_predict"),
]


def modules_after(statement: str) -> set[str]:
    """The modules that a fresh interpreter has loaded after `statement`."""
    code = f"{statement}\nimport json, sys; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_import_loads_nothing_heavy() -> None:
    extra = modules_after("import torch, ghn_init") - modules_after("import torch")
    assert "ghn_init" in extra
    assert not extra & set(HEAVY)
    assert {name.partition(".")[0] for name in extra} <= {"ghn_init"}


def test_help_does_not_load_torch_or_training() -> None:
    loaded = modules_after(
        "import sys; sys.argv = ['ghn-init', '--help']\n"
        "from ghn_init.cli import main\n"
        "try: main()\nexcept SystemExit as done: assert done.code == 0"
    )
    assert "typer" in loaded
    assert not loaded & {"torch", "torchvision", "ghn_init.training"}


@pytest.mark.parametrize("name", ghn_init.__all__)
def test_public_names_resolve_and_are_documented(name: str) -> None:
    value = getattr(ghn_init, name)
    assert name in dir(ghn_init)
    assert value.__doc__
    assert value.__name__ == name


def test_unknown_name_raises_as_usual() -> None:
    with pytest.raises(AttributeError, match="module 'ghn_init' has no attribute 'initialise'"):
        _ = ghn_init.initialise  # pyright: ignore[reportAttributeAccessIssue]


def test_errors_have_one_base_class() -> None:
    errors = [getattr(ghn_init, name) for name in ghn_init.__all__ if name.endswith("Error")]
    assert len(errors) >= 9
    assert all(issubclass(error, ghn_init.GHNInitError) for error in errors)


def test_type_checkers_see_the_lazy_names() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    imported = {
        alias.name: f"{node.module}"
        for node in guarded.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    lazy = {name: f"ghn_init.{module}" for name, module in ghn_init._MODULE_OF.items()}
    assert imported == lazy


def test_metadata_version_and_typing_marker() -> None:
    assert metadata.version("ghn-init") == ghn_init.__version__
    assert (PACKAGE / "py.typed").is_file()
    scripts = metadata.entry_points(group="console_scripts", name="ghn-init")
    assert [script.value for script in scripts] == ["ghn_init.cli:main"]


def test_the_core_imports_in_one_direction_only() -> None:
    """deepnets, training and the command line use the core; the core knows none of them."""
    for path in PACKAGE.glob("_*.py"):
        if path.stem in {"__init__", "__main__"}:
            continue
        found = imports_of(path)
        outer = {name for name in found if name.split(".")[0] in {"cli", "training", "deepnets"}}
        assert not outer, f"{path.name} imports {outer}"
    rank = {module: level for level, modules in enumerate(LAYERS) for module in modules}
    for module, level in rank.items():
        path = PACKAGE / f"{module}.py"
        assert path.is_file(), f"{module} is gone: update LAYERS and docs/design.md"
        above = {name for name in imports_of(path) if rank.get(name, -1) > level}
        assert not above, f"{module} (layer {level}) imports {above}"


def imports_of(path: Path) -> set[str]:
    """The modules of this package that a file imports anywhere, without the `ghn_init.` in front."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ghn_init."):
            found.add(str(node.module).removeprefix("ghn_init."))
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("ghn_init.") for a in node.names if a.name.startswith("ghn_init.")}
    return found
