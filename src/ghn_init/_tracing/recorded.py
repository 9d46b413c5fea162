"""One recorded forward pass: the recorder around the model's call, and what is told where it fails."""

from __future__ import annotations

import inspect
import os
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map_only

from ghn_init._errors import GHNInitError, TraceError, first_line
from ghn_init._network.parametrised import watched
from ghn_init._network.walk import modules_of, params_of
from ghn_init._tracing.recorder import Recorder
from ghn_init._tracing.transforms import followed
from ghn_init._tracing.values import UnknownValueError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from types import TracebackType

    from ghn_init._network.parametrised import Computed
    from ghn_init._tracing.inputs import ExampleInput
    from ghn_init._tracing.recorder import Recording


def recorders(model: nn.Module, computed: Mapping[str, Computed], *, whole: bool) -> Callable[[], Recorder]:
    """What makes recorders for a model, one for each attempt.

    Args:
        model: The model.
        computed: Its weights that are computed from parameters.
        whole: For a graph that users see, in which buffers have names and nodes their modules.
    """
    modules = modules_of(model)
    params = params_of(modules)
    parts: dict[str, Tensor] = {}
    if computed:
        solved = {part for weight in computed.values() for part in weight.parts}
        every = list(model.named_parameters(remove_duplicate=False))
        parts = {name: param for name, param in every if name in solved}
        first = {id(param): (name, param) for name, param in reversed(every) if name not in solved}
        params = dict(reversed(first.values()))
    names = parts | (dict(model.named_buffers()) if whole else _statistics_of_bare_norms(modules))
    paths = {id(module): name for name, module in model.named_modules()} if whole else None
    return partial(Recorder, params, names, paths)


def _statistics_of_bare_norms(modules: Iterable[tuple[str, nn.Module]]) -> dict[str, Tensor]:
    """Running means of batch norms without parameters: their names say which norm a node is."""
    return {
        f"{path}.running_mean" if path else "running_mean": norm.running_mean
        for path, norm in modules
        if isinstance(norm, _BatchNorm) and norm.weight is None and norm.running_mean is not None
    }


def recorded(
    recorder: Recorder, model: nn.Module, computed: Mapping[str, Computed], example: ExampleInput, mode: str
) -> tuple[Recording, TraceError | None]:
    """Run the model's forward pass under a recorder.

    It may end where it reads a value: what would follow may only sort out and format results, as detectors
    do.

    Returns:
        The recording; and an error if it is one of the beginning of the forward pass, to be raised unless
        every parameter was used by then.

    Raises:
        TraceError: The forward pass failed; from the original error.
    """
    args, kwargs = tree_map_only(Tensor, _fresh, (example.args, dict(example.kwargs)))
    recorder.add_inputs(_named(model, args, kwargs))
    if mode == "evaluating":
        _evaluating(model)
    with watched(computed, recorder.add_parameter):
        try:
            with recorder, followed(recorder.flows if recorder.draws else None, recorder.home):
                output = called(model, args, kwargs)
        except GHNInitError:
            raise
        # The user's forward may raise anything; it is raised again with the place and the remedy.
        except Exception as error:
            place = _failing_module(model, error.__traceback__)
            begin = f"{type(model).__name__}: the forward pass failed{place}"
            if not isinstance(error, UnknownValueError):
                raise TraceError(
                    f"{begin} on an input of shape {example.described}: {type(error).__name__}: "
                    f"{first_line(error)}{_remedy(error)}"
                ) from error
            told = UnfollowableError(f"{begin}{_line(error.__traceback__)}: {first_line(error)}")
            told.__cause__ = error
            return recorder.recording(), told
    return recorder.finish(output), None


class UnfollowableError(TraceError):
    """A forward pass that cannot be recorded, whatever it gets."""


def called(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What the model gives; a graph of the user's is gone through node by node."""
    if not isinstance(model, fx.GraphModule):
        return model(*args, **kwargs)
    for node in model.graph.find_nodes(op="placeholder", sort=True)[len(args) :]:
        if node.target in kwargs:
            args = (*args, kwargs[node.target])
    return _Interpreter(model).run(*args)


class _Interpreter(fx.Interpreter):
    """Goes through a graph, but not into modules called for an effect, such as the checks of an export."""

    def run_node(self, n: fx.Node) -> Any:
        return None if n.op == "call_module" and not n.users else super().run_node(n)

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments in lists and dicts, not in fx's own immutable ones."""
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return _plain(tuple(args)), _plain(dict(kwargs))


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if type(value) is tuple:
        return tuple(_plain(item) for item in value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _fresh(tensor: Tensor) -> Tensor:
    """A tensor like this one: no two in a call are one, and those of the example are not changed."""
    return torch.empty_like(tensor) if tensor.is_meta else tensor.clone()


def _named(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[str, Any]]:
    """The arguments by the names that the forward pass has for them, `*args` and `**kwargs` with stars."""
    try:
        signature = inspect.signature(model.forward)
        given = signature.bind_partial(*args, **kwargs).arguments
    except (TypeError, ValueError):  # a call that fails by itself, or a forward that Python cannot look into
        return [(f"input_{index}", value) for index, value in enumerate(args)] + list(kwargs.items())
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    kinds = signature.parameters
    return [(stars.get(kinds[name].kind, "") + name, value) for name, value in given.items()]


def _evaluating(model: nn.Module) -> None:
    """Like `model.eval()`, which a model may override; the modes are put back with everything else."""
    for module in model.modules():
        module.training = False


_NEEDS_MEMORY: Final = re.compile(r"(?i)\bmeta\b|memory|storage|data_ptr|numpy|not implemented")
"""What kernels say that cannot run on tensors without values."""


def _remedy(error: Exception) -> str:
    """What to do about a layer that cannot run on meta tensors; '' if nothing points to one."""
    if not (isinstance(error, NotImplementedError) or _NEEDS_MEMORY.search(str(error))):
        return ""
    return " (for a layer that cannot run on meta tensors, add a rule with ghn_init.register)"


def _line(traceback: TracebackType | None) -> str:
    """' at file:line', the innermost that is neither torch's nor of this package."""
    place = ""
    while traceback is not None:
        file = traceback.tb_frame.f_code.co_filename
        if not file.startswith(_NOT_THE_USERS):
            place = f" at {Path(file).name}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    return place


_NOT_THE_USERS: Final = (
    str(Path(__file__).parents[1]) + os.sep,
    str(Path(torch.__file__).parent) + os.sep,
    "<",
)
"""How names of files begin that are not the user's."""


def _failing_module(model: nn.Module, traceback: TracebackType | None) -> str:
    """'' or ' in path (Class)': the innermost module of the model on the traceback."""
    names = {id(module): name for name, module in model.named_modules()}
    place = ""
    while traceback is not None:
        module = traceback.tb_frame.f_locals.get("self")
        name = names.get(id(module))
        if name:
            place = f" in {name} ({type(module).__name__})"
        traceback = traceback.tb_next
    return place
