"""Which parameters of a model are predicted, and why the others are kept."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Final, Literal, get_args

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ghn_init._errors import PredictError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ghn_init._graph import Graph

Head = Literal["auto", "predict", "keep"]
Diversify = Literal["noise", "orthogonal"]
Wanted = Literal["predicted", "kept", "spared"]

PREDICT: Final = "predicted"
KEEP: Final = "kept"
"""Kept because the parameter cannot be predicted: `strict` forbids it."""
SPARE: Final = "spared"
"""Kept because the caller asked for it: `strict` does not mind."""


@dataclass(frozen=True, slots=True)
class Options:
    """What the caller of `plan` and `predict` chose.

    Raises:
        PredictError: A value that is not one of the choices.
    """

    head: Head = "auto"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    diversify: Diversify | None = None
    seed: int = 0
    strict: bool = False

    def __post_init__(self) -> None:
        if self.head not in get_args(Head):
            raise PredictError(f"head={self.head!r}: expected one of {', '.join(map(repr, get_args(Head)))}")
        if self.diversify is not None and self.diversify not in get_args(Diversify):
            choices = ", ".join(map(repr, get_args(Diversify)))
            raise PredictError(f"diversify={self.diversify!r}: expected None, {choices}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise PredictError(f"seed={self.seed!r}: expected an integer")


def as_patterns(option: str, patterns: str | Iterable[str] | None) -> tuple[str, ...]:
    """Normalise `include` or `exclude`: None, one pattern, or several."""
    if patterns is None:
        return ()
    listed = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    for pattern in listed:
        if not isinstance(pattern, str):
            raise PredictError(f"{option}={patterns!r}: expected name patterns, found {pattern!r}")
    return listed


@dataclass(frozen=True, slots=True)
class Entry:
    """A parameter of the model.

    Attributes:
        name: The first of its qualified names.
        param: The parameter itself.
        also: Its other qualified names, if it is tied.
        node: Type of the node that stands for it, or None.
        key: Its name in the graph, one of `name` and `also`, or None where there is no node.
        wanted: What is to be done with it.
        reason: Why it is kept, or "".
    """

    name: str
    param: nn.Parameter
    also: tuple[str, ...]
    node: str | None
    key: str | None
    wanted: Wanted
    reason: str


def check_model(model: object) -> None:
    """Refuse what is not a module with initialised parameters.

    Raises:
        PredictError: Not a `torch.nn.Module` instance, a module without parameters, or a lazy one.
    """
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise PredictError(
            f"{model.__name__} is a class; expected an instance: predict({model.__name__}(...))"
        )
    if not isinstance(model, nn.Module):
        hint = " (`ghn-init SPEC` on the command line takes names)" if isinstance(model, str) else ""
        raise PredictError(f"expected a torch.nn.Module, found {type(model).__name__} {model!r:.80}{hint}")
    lazy = [name for name, param in model.named_parameters() if is_lazy(param)]
    if lazy:
        raise PredictError(
            f"{type(model).__name__}: {listing(lazy)} have no shape yet (lazy module); "
            "call the model once on an example input, then predict"
        )
    if next(model.parameters(), None) is None:
        raise PredictError(f"{type(model).__name__} has no parameters: there is nothing to predict")


def select(model: nn.Module, graph: Graph, options: Options, num_classes: int) -> list[Entry]:
    """Decide about every parameter of `model`, tied ones once, in the order of `named_parameters`.

    Args:
        model: The module that `graph` was traced from.
        graph: Its graph.
        options: The caller's choices.
        num_classes: Width of the classifier that the GHN was trained for.

    Raises:
        PredictError: A pattern that matches no parameter, or `strict` and a parameter that would be kept.
    """
    names = _names(model)
    every = [name for _, aliases in names for name in aliases]
    _check_patterns("include", options.include, every)
    _check_patterns("exclude", options.exclude, every)
    types = {name: node.type for node in graph.nodes for name in (node.param, node.bias) if name is not None}
    refusals = _Refusals(
        _parametrised_prefixes(model),
        {unmatched.name: unmatched.role for unmatched in graph.unmatched},
        _head_reasons(graph, options.head, num_classes),
    )
    entries = []
    for param, aliases in names:
        key = next((alias for alias in aliases if alias in types), None)
        wanted, reason = _by_pattern(aliases, options) or refusals.of(param, aliases, key) or (PREDICT, "")
        node = types[key] if key is not None else None
        entries.append(Entry(aliases[0], param, aliases[1:], node, key, wanted, reason))
    if options.strict:
        _forbid_kept(type(model).__name__, entries)
    return entries


@dataclass(frozen=True, slots=True)
class _Refusals:
    """Why parameters cannot be predicted: by prefix, by role without a node, by being the classifier."""

    parametrised: dict[str, str]
    roles: dict[str, str]
    head: dict[str, tuple[Wanted, str]]

    def of(self, param: nn.Parameter, aliases: Sequence[str], key: str | None) -> tuple[Wanted, str] | None:
        """What keeps this parameter from being predicted, or None."""
        if cause := _unwritable(param) or self._parametrised(aliases[0]):
            return KEEP, cause
        if key is None:
            role = next(
                (self.roles[alias] for alias in aliases if alias in self.roles), "no operation uses it"
            )
            return KEEP, f"no node type fits: {role}"
        return self.head.get(key)

    def _parametrised(self, name: str) -> str:
        return next((reason for prefix, reason in self.parametrised.items() if name.startswith(prefix)), "")


def listing(names: Sequence[str], limit: int = 8) -> str:
    """Join names for a message, cut after `limit`."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def _names(model: nn.Module) -> list[tuple[nn.Parameter, tuple[str, ...]]]:
    """Every parameter object once, with all its qualified names."""
    found: dict[int, tuple[nn.Parameter, tuple[str, ...]]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        _, aliases = found.get(id(param), (param, ()))
        found[id(param)] = (param, (*aliases, name))
    return list(found.values())


def _check_patterns(option: str, patterns: Sequence[str], names: Sequence[str]) -> None:
    """Raise for the first pattern without a match, naming what comes close."""
    for pattern in patterns:
        if any(fnmatchcase(name, pattern) for name in names):
            continue
        inside = f"{pattern.rstrip('.')}.*"
        if any(fnmatchcase(name, inside) for name in names):
            hint = f"did you mean {inside!r}?"
        else:
            close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4) or list(names[:3])
            hint = f"close names: {', '.join(close)}"
        raise PredictError(
            f"{option}: the pattern {pattern!r} matches none of {len(names)} parameters; {hint}"
        )


def _by_pattern(aliases: Sequence[str], options: Options) -> tuple[Wanted, str] | None:
    """What `include` and `exclude` say. A tied parameter counts as named when any of its names is."""
    for pattern in options.exclude:
        if any(fnmatchcase(alias, pattern) for alias in aliases):
            return SPARE, f"excluded by {pattern!r}"
    included = (fnmatchcase(alias, pattern) for alias in aliases for pattern in options.include)
    return (SPARE, "not included") if options.include and not any(included) else None


def _unwritable(param: nn.Parameter) -> str:
    """Why `param` cannot take predicted values, or ""."""
    if is_traceable_wrapper_subclass(param):
        return f"tensor subclass {type(param.data).__name__}"
    if param.layout != torch.strided:
        return f"{str(param.layout).removeprefix('torch.')} layout"
    if param.is_quantized:
        return f"quantised ({str(param.dtype).removeprefix('torch.')})"
    if not param.is_floating_point():
        return f"{str(param.dtype).removeprefix('torch.')} values"
    if param.numel() == 0:
        return "no elements"
    if param.is_inference():
        return "made under torch.inference_mode()"
    if 0 in (strides := param.stride()) and any(
        stride == 0 and size > 1 for stride, size in zip(strides, param.shape, strict=True)
    ):
        return "its elements share memory (expanded tensor)"
    return ""


def _head_reasons(graph: Graph, head: Head, num_classes: int) -> dict[str, tuple[Wanted, str]]:
    """Parameters of classifiers (auxiliary ones too) that are kept, with the reason."""
    if head == "predict":
        return {}
    reasons: dict[str, tuple[Wanted, str]] = {}
    for indices in graph.heads:
        shape = graph.nodes[indices[0]].shape
        decision = _head_decision(head, shape[0] if shape else 0, num_classes)
        names = (graph.nodes[i].param for i in indices if i is not None)
        if decision is not None:
            reasons |= {name: decision for name in names if name is not None}
    return reasons


def _head_decision(head: Head, width: int, num_classes: int) -> tuple[Wanted, str] | None:
    """Why a classifier of this width is kept; None if it is predicted."""
    if head == "keep":
        return SPARE, "classifier (head='keep')"
    if width == num_classes:
        return None
    trained = f"the GHN was trained for {num_classes} (head='predict' forces it)"
    return KEEP, f"classifier of width {width}; {trained}"


def _parametrised_prefixes(model: nn.Module) -> dict[str, str]:
    """Prefixes of parameter names that stand behind a computed tensor, with how it is computed."""
    prefixes: dict[str, str] = {}
    for path, module in model.named_modules():
        dot = f"{path}." if path else ""
        if hasattr(module, "parametrizations"):
            prefixes[f"{dot}parametrizations."] = "parametrised (torch.nn.utils.parametrize)"
        for hook in module._forward_pre_hooks.values():  # noqa: SLF001 no public way to list hooks
            kind, name = type(hook).__name__, getattr(hook, "name", None)
            if kind in ("WeightNorm", "SpectralNorm") and isinstance(name, str):
                for suffix in ("_g", "_v", "_orig"):
                    prefixes[f"{dot}{name}{suffix}"] = f"parametrised ({kind} hook)"
    return prefixes


def _forbid_kept(model: str, entries: Sequence[Entry]) -> None:
    kept = [f"  {entry.name}: {entry.reason}" for entry in entries if entry.wanted == KEEP]
    if kept:
        lines = "\n".join(kept)
        raise PredictError(
            f"{model}: strict=True, and {len(kept)} of {len(entries)} parameters would be kept:\n{lines}\n"
            "exclude them, or leave strict out"
        )
