"""Finding the model that a command line names.

A spec is `model.py`, `model.py:build_model` or `torchvision.models:resnet50`: a file or an importable
module, and optionally what in it makes the model: an `nn.Module` instance, an `nn.Module` class, or a
function that returns one.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import stat
import sys
import traceback
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, get_type_hints

from torch import nn

from ghn_init._errors import ModelSpecError, message_of
from ghn_init._files import LONGEST_SHOWN, reason
from ghn_init.cli._literals import literal

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager
    from types import ModuleType

FAILURES = (Exception, SystemExit)
"""What the user's code may raise while it is loaded: scripts without a main guard like to exit."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A parsed spec: `source` is a file's path or a module's dotted name."""

    source: str
    attribute: str | None = None

    def __str__(self) -> str:
        return self.source if self.attribute is None else f"{self.source}:{self.attribute}"

    @property
    def is_file(self) -> bool:
        """Whether `source` is a path rather than a module's name."""
        return self.source.endswith(".py") or "/" in self.source or "\\" in self.source

    @property
    def name(self) -> str:
        """What to call the model's files: the attribute, else the file or module itself."""
        if self.attribute is not None:
            return self.attribute.rpartition(".")[2]
        return Path(self.source).stem if self.is_file else self.source.rpartition(".")[2]


@dataclass(frozen=True, slots=True)
class FoundModel:
    """A model and the place it came from, e.g. `model.py:build_model`."""

    model: nn.Module
    origin: ModelSpec

    @property
    def name(self) -> str:
        """The model's class."""
        return type(self.model).__name__


def parse_spec(text: str) -> ModelSpec:
    """Split `SOURCE[:ATTRIBUTE]`.

    Raises:
        ModelSpecError: Neither a path nor a dotted name, or the attribute is no (dotted) identifier.
    """
    source, colon, attribute = text.rpartition(":")
    if not colon or "/" in attribute or "\\" in attribute:  # no colon, or only a drive letter's
        source, attribute = text, ""
    elif not _is_dotted(attribute):
        raise ModelSpecError(f"{text!r}: {attribute!r} after the colon is not a name; write FILE.py:NAME")
    spec = ModelSpec(source, attribute or None)
    if not spec.is_file and not (attribute and _is_dotted(source)):
        raise ModelSpecError(
            f"{text!r} names no model; write FILE.py, FILE.py:NAME or MODULE:NAME, "
            "e.g. torchvision.models:resnet50"
        )
    return spec


def parse_settings(pairs: Sequence[str]) -> dict[str, Any]:
    """Turn `key=value` strings into keyword arguments; values are as `literal` reads them.

    Raises:
        ModelSpecError: A pair without `=`, a key that is no identifier, or a key given twice.
    """
    settings: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise ModelSpecError(f"--set {pair!r} is not KEY=VALUE, e.g. --set num_classes=10")
        if key in settings:
            raise ModelSpecError(f"--set {key}=... is given twice")
        settings[key] = literal(value)
    return settings


def load_model(
    spec: ModelSpec,
    settings: Mapping[str, Any] | None = None,
    *,
    inside: AbstractContextManager[object] | None = None,
) -> FoundModel:
    """Import what `spec` names and make the model.

    The file is imported, not run: code under `if __name__ == "__main__"` stays untouched. Its folder
    and the current one are importable meanwhile. What it prints goes to stderr.

    Args:
        spec: From `parse_spec`.
        settings: Keyword arguments for the class or factory.
        inside: What the class or factory is called in, such as `large_on_meta()`; an instance is taken as
            it is.

    Raises:
        ModelSpecError: Not found, ambiguous, not a model, or its own code fails; then the message
            carries file and line.
    """
    settings = dict(settings or {})
    with _importable(spec), contextlib.redirect_stdout(sys.stderr):
        module = _import(spec)
        if spec.attribute is None:
            spec = ModelSpec(spec.source, _only_candidate(module, spec, settings))
        target = _resolve(module, spec)
        with inside or contextlib.nullcontext():
            return FoundModel(_build(target, spec, settings), spec)


def _is_dotted(text: str) -> bool:
    return all(part.isidentifier() for part in text.split("."))


# Importing


@contextlib.contextmanager
def _importable(spec: ModelSpec) -> Iterator[None]:
    """Put the file's folder (its package's parent, in a package) and the current one on `sys.path`.

    Code that reads `sys.argv` finds the file's name alone: our arguments are not its own.
    """
    before, arguments = list(sys.path), sys.argv
    folders = [str(Path.cwd())]
    if spec.is_file:
        folders.insert(0, str(_package_path(Path(spec.source))[0]))
    sys.path[:0] = folders
    sys.argv = [spec.source]
    try:
        yield
    finally:
        sys.path[:], sys.argv = before, arguments


def _package_path(file: Path) -> tuple[Path, list[str]]:
    """The folder to import `file` from and its dotted name there, so that relative imports work."""
    file = file.resolve()
    folder, names = file.parent, [file.stem]
    while (folder / "__init__.py").is_file():
        folder, names = folder.parent, [folder.name, *names]
    return folder, names


def _import(spec: ModelSpec) -> ModuleType:
    """Import the spec's source; failures of its code become one-line errors with file and line."""
    if spec.is_file:
        check_file(spec.source)
    try:
        return _import_file(Path(spec.source)) if spec.is_file else importlib.import_module(spec.source)
    except ModuleNotFoundError as error:
        if not spec.is_file and error.name and f"{spec.source}.".startswith(f"{error.name}."):
            raise ModelSpecError(
                f"there is no module named {error.name!r}; write MODULE:NAME, e.g. "
                "torchvision.models:resnet50, or a file: path/to/model.py"
            ) from error
        raise _user_error(spec, f"importing {spec.source}", error) from error
    except FAILURES as error:
        raise _user_error(spec, f"importing {spec.source}", error) from error


def check_file(source: str) -> None:
    """See that there is a file to import.

    Raises:
        ModelSpecError: There is none, or it cannot be read.
    """
    try:
        mode = Path(source).stat().st_mode
    except FileNotFoundError:
        raise ModelSpecError(f"{source}: no such file (looked in {Path.cwd()})") from None
    except OSError as error:  # no permission, a name too long
        shown = f"{source[:LONGEST_SHOWN]}..." if len(source) > LONGEST_SHOWN else source
        raise ModelSpecError(f"{shown}: cannot be read: {reason(error)}") from error
    if not stat.S_ISREG(mode):
        raise ModelSpecError(f"{source}: expected a Python file, found a folder or a device")


def _import_file(file: Path) -> ModuleType:
    """Import a file as part of its package if it is in one, else under a name that shadows nothing."""
    _, names = _package_path(file)
    if len(names) > 1:
        return importlib.import_module(".".join(names))
    name = f"_ghn_init_spec_{file.stem}"
    loader_spec = importlib.util.spec_from_file_location(name, file.resolve())
    if loader_spec is None or loader_spec.loader is None:
        raise ModelSpecError(f"{file}: not a Python file; write FILE.py")
    module = importlib.util.module_from_spec(loader_spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up
    try:
        loader_spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _user_error(spec: ModelSpec, doing: str, error: BaseException) -> ModelSpecError:
    """One line for an exception of the user's code: where, what kind, what it says.

    The place is the innermost line in the spec's own file, or the innermost line of all.
    """
    if isinstance(error, SyntaxError):
        return ModelSpecError(f"{error.filename}:{error.lineno}: SyntaxError: {error.msg}")
    message = message_of(error)
    what = f"{type(error).__name__}: {message}" if message else type(error).__name__
    return ModelSpecError(f"{_place(spec, error)}{what} (while {doing})")


def _place(spec: ModelSpec, error: BaseException) -> str:
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename != __file__ and not frame.filename.startswith("<frozen")
    ]
    if not frames:
        return ""
    source = str(Path(spec.source).resolve()) if spec.is_file else None
    frame = next((frame for frame in reversed(frames) if frame.filename == source), frames[-1])
    return f"{spec.source if frame.filename == source else frame.filename}:{frame.lineno}: "


# Choosing


def _only_candidate(module: ModuleType, spec: ModelSpec, settings: Mapping[str, Any]) -> str:
    """The name of the one thing in a file that the settings make a model of; nothing is guessed."""
    found = {name: value for name, value in vars(module).items() if _makes_a_model(name, value, module)}
    refusals = {name: _refusal(value, settings) for name, value in found.items()}
    ready = [name for name, refusal in refusals.items() if refusal is None]
    if len(ready) == 1:
        return ready[0]
    if ready:
        listed = ", ".join(f"{spec.source}:{name}" for name in ready)
        raise ModelSpecError(f"{spec.source} has {len(ready)} candidates, name one of them: {listed}")
    if refusals:
        raise ModelSpecError(
            f"{spec.source} has nothing that can be called with {_call_text('', settings)}: "
            f"{'; '.join(f'{name} ({refusal})' for name, refusal in refusals.items())}; "
            "give arguments with --set KEY=VALUE"
        )
    raise ModelSpecError(
        f"{spec.source} has no nn.Module instance with parameters, no nn.Module class and no function that "
        f"is annotated to return one; write {spec.source}:NAME"
    )


def _makes_a_model(name: str, value: object, module: ModuleType) -> bool:
    """Whether this is a public instance with parameters, or a class or annotated function of the file."""
    if name.startswith("_"):
        return False
    try:
        if isinstance(value, nn.Module):
            return any(True for _ in value.parameters())  # a loss or an activation that stands about is none
        if getattr(value, "__module__", None) != module.__name__:
            return False
        made = _annotated_return(value, module) if inspect.isfunction(value) else value
        return inspect.isclass(made) and issubclass(made, nn.Module)
    except FAILURES:  # looking at it runs the user's code: annotations are evaluated, a proxy asks its owner
        return False


def _annotated_return(function: Any, module: ModuleType) -> object:
    """What a function says that it returns; other annotations may name what is imported for checking only."""
    returns = SimpleNamespace(__annotations__={"return": function.__annotations__.get("return")})
    return get_type_hints(returns, vars(module))["return"]


def _refusal(target: object, settings: Mapping[str, Any]) -> str | None:
    """Why `target(**settings)` cannot be called, or None if it can."""
    if isinstance(target, nn.Module):
        return "is an instance and takes no --set" if settings else None
    try:
        inspect.signature(target).bind(**settings)  # pyright: ignore[reportArgumentType]
    except TypeError as error:
        return str(error)
    except ValueError:  # no signature to look at, as for functions written in C: the call will tell
        return None
    return None


# Building


def _resolve(module: ModuleType, spec: ModelSpec) -> Any:
    value: Any = module
    for part in (spec.attribute or "").split("."):
        value = _part(value, part, spec)
    return value


def _part(value: object, name: str, spec: ModelSpec) -> Any:
    """The attribute of this name; a module's `__getattr__` may import something to find it."""
    try:
        return getattr(value, name)
    except AttributeError:
        near = get_close_matches(name, [known for known in dir(value) if not known.startswith("_")])
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise ModelSpecError(f"{spec.source} has no {name!r}{hint}") from None
    except FAILURES as error:
        raise _user_error(spec, f"looking up {name} in {spec.source}", error) from error


def _build(target: Any, spec: ModelSpec, settings: Mapping[str, Any]) -> nn.Module:
    """Call a class or factory; take an instance as it is."""
    if not isinstance(target, nn.Module) and not callable(target):
        raise ModelSpecError(
            f"{spec} is a {type(target).__name__}; expected an nn.Module or something that makes one"
        )
    refusal = _refusal(target, settings)
    if refusal is not None:
        remedy = "" if isinstance(target, nn.Module) else "; give arguments with --set KEY=VALUE"
        raise ModelSpecError(f"{spec}: {refusal}{remedy}")
    if isinstance(target, nn.Module):
        return target
    try:
        model = target(**settings)
    except FAILURES as error:
        raise _user_error(spec, f"calling {_call_text(str(spec), settings)}", error) from error
    if not isinstance(model, nn.Module):
        raise ModelSpecError(f"{spec} returned a {type(model).__name__}; expected an nn.Module")
    return model


def _call_text(name: str, settings: Mapping[str, Any]) -> str:
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in settings.items())})"
