"""The package as a whole: names, imports, metadata."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib import metadata
from pathlib import Path

import pytest

import ghn_init

HEAVY = [
    "torchvision", "typer", "rich", "huggingface_hub", "safetensors", "matplotlib", "graphviz", "accelerate",
    "ghn_init.training", "ghn_init.deepnets", "ghn_init.search", "ghn_init.cli", "sklearn",
]  # fmt: skip
PACKAGE = Path(ghn_init.__file__).parent

ROOMS = [
    "_errors", "_files", "_threads",
    "_graph", "_network", "_tracing", "_hypernetwork", "_weights", "_meta", "_writing",
]  # fmt: skip
"""The rooms of the core, from the bottom up: a module imports from its own room and those below."""


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


def test_the_metadata_is_that_of_the_package() -> None:
    assert metadata.version("ghn-init") == ghn_init.__version__
    assert (PACKAGE / "py.typed").is_file()
    scripts = metadata.entry_points(group="console_scripts", name="ghn-init")
    assert [script.value for script in scripts] == ["ghn_init.cli:main"]


def test_the_core_imports_in_one_direction_only() -> None:
    """deepnets, training, search and the command line use the core; the core knows none of them."""
    level_of = {room: level for level, room in enumerate(ROOMS)}
    assert set(core_rooms()) == set(ROOMS), "a room came or went: update ROOMS and docs/design.md"
    for room, paths in core_rooms().items():
        imported = {name.split(".")[0] for path in paths for name in imports_of(path)}
        assert not imported & {"cli", "search", "training", "deepnets"}, room
        above = {name for name in imported if level_of.get(name, 0) > level_of[room]}
        assert not above, f"{room} imports {above}, which stand above it"


def test_no_two_modules_need_each_other() -> None:
    """Neither at the top nor in functions; imports for type hints alone do not count."""
    paths = {module_name(path): path for path in PACKAGE.rglob("*.py")}
    needs = {name: needed_by(path) & paths.keys() - {name, "ghn_init"} for name, path in paths.items()}
    order = TopologicalSorter({name: needed for name, needed in needs.items() if name != "ghn_init"})
    order.prepare()  # raises a CycleError that names the modules


@pytest.mark.source
def test_the_design_page_names_every_room_and_every_room_says_what_it_is_for() -> None:
    page = (PACKAGE.parents[1] / "docs" / "design.md").read_text(encoding="utf-8")
    table = page[page.index("## Rooms") : page.index("## Import direction")]
    assert set(re.findall(r"^\| `(_\w+)/?`", table, re.MULTILINE)) == set(ROOMS)
    rooms = [path.parent for path in PACKAGE.glob("*/README.md")]
    assert {room.name for room in rooms} == {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    for room in rooms:
        said = set(re.findall(r"`(\w+\.py)`", (room / "README.md").read_text(encoding="utf-8")))
        assert said == {path.name for path in room.glob("*.py")} - {"__init__.py"}, room.name


@pytest.mark.source
def test_the_command_line_page_names_every_option() -> None:
    from typer.main import get_command

    from ghn_init.cli import app

    page = (PACKAGE.parents[1] / "docs" / "cli.md").read_text(encoding="utf-8")
    group = get_command(app)
    options = {
        option
        for name in ("predict", "inspect")
        for param in group.commands[name].params  # pyright: ignore[reportAttributeAccessIssue]
        for option in param.opts
        if option.startswith("--") and option not in {"--output", "--help"}
    }
    assert "--diversify" in options
    assert not {option for option in options if f"`{option}" not in page}


@pytest.mark.source
def test_the_readme_has_the_two_commands_on_one_line_each() -> None:
    readme = (PACKAGE.parents[1] / "README.md").read_text(encoding="utf-8")
    for name, end in (("predict", "--set num_classes=10"), ("test", "pytest")):
        found = re.search(rf"<!-- command: {name} -->\n```sh\n([^\n]+)\n```\n", readme)
        assert found, f"README.md: no one-line command marked {name!r}"
        assert found[1].startswith("python3 -m venv .venv && ")
        assert found[1].endswith(end)


def core_rooms() -> dict[str, list[Path]]:
    """The core's rooms (packages, and the two modules at the door), and the files of each."""
    files = {path.stem: [path] for path in PACKAGE.glob("_*.py") if not path.stem.startswith("__")}
    packages = {
        path.parent.name: sorted(path.parent.rglob("*.py")) for path in PACKAGE.glob("_*/__init__.py")
    }
    return files | packages


def imports_of(path: Path) -> set[str]:
    """The modules of this package that a file imports anywhere, without the `ghn_init.` in front."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ghn_init."):
            found.add(str(node.module).removeprefix("ghn_init."))
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("ghn_init.") for a in node.names if a.name.startswith("ghn_init.")}
    return found


def module_name(path: Path) -> str:
    """The dotted name of a file of the package."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def needed_by(path: Path) -> set[str]:
    """The modules that a file imports when it runs, wherever in it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    guards = (node for node in ast.walk(tree) if isinstance(node, ast.If) and is_type_checking(node.test))
    hints = {id(inner) for guard in guards for node in guard.body for inner in ast.walk(node)}
    needed: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and id(node) not in hints:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {
                name
                for name in inside
                if (PACKAGE.parent / name.replace(".", "/")).with_suffix(".py").exists()
            }
            needed |= modules or {node.module}
        elif isinstance(node, ast.Import) and id(node) not in hints:
            needed |= {alias.name for alias in node.names}
    return needed


def is_type_checking(test: ast.expr) -> bool:
    return isinstance(test, ast.Name) and test.id == "TYPE_CHECKING"
