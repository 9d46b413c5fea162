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
from ghn_init._network.parametrised import computed_weights
from ghn_init._network.sharded import is_sharded
from ghn_init._network.sharded import refusal as sharding_refusal

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ghn_init._graph.graph import Graph
    from ghn_init._network.parametrised import Computed

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
        key: Its name in the graph, or None where there is no node: one of `name` and `also`, or the name of
            the weight that is computed from it.
        wanted: What is to be done with it.
        reason: Why it is kept, or "".
        through: The weight that is computed from it, which is what is predicted; or None.
    """

    name: str
    param: nn.Parameter
    also: tuple[str, ...]
    node: str | None
    key: str | None
    wanted: Wanted
    reason: str
    through: Computed | None = None

    @property
    def source(self) -> str:
        """The name of what is predicted: the parameter's own, or that of the weight computed from it."""
        return self.name if self.through is None else self.through.name


def check_model(model: object) -> None:
    """Refuse what is not a module with initialised parameters.

    Raises:
        PredictError: Not a `torch.nn.Module` instance, a module without parameters, a lazy one, or one
            whose parameters are not there.
    """
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise PredictError(
            f"{model.__name__} is a class; expected an instance: predict({model.__name__}(...))"
        )
    if not isinstance(model, nn.Module):
        hint = " (`ghn-init SPEC` on the command line takes names)" if isinstance(model, str) else ""
        raise PredictError(f"expected a torch.nn.Module, found {type(model).__name__} {model!r:.80}{hint}")
    tensors = (*model.named_parameters(), *model.named_buffers())
    lazy = [name for name, tensor in tensors if is_lazy(tensor)]
    if lazy:
        raise PredictError(
            f"{type(model).__name__}: {listing(lazy)} have no shape yet (lazy module); "
            "call the model once on an example input, then predict"
        )
    offloaded = [path for path, module in model.named_modules() if _is_offloaded(module)]
    if offloaded:
        raise PredictError(
            f"{type(model).__name__}: the values of {listing(offloaded)} are elsewhere (offloaded by "
            "accelerate); predict before dispatch_model, cpu_offload or disk_offload"
        )
    if next(model.parameters(), None) is None:
        packed = [name for name, module in model.named_modules() if ".quantized." in type(module).__module__]
        if packed:
            raise PredictError(
                f"{type(model).__name__} is quantised: {listing(packed, 3)} hold packed integers instead of "
                "parameters; predict the float model, then quantise it"
            )
        raise PredictError(f"{type(model).__name__} has no parameters: there is nothing to predict")


def _is_offloaded(module: nn.Module) -> bool:
    """On the meta device only until accelerate's hook fetches the values."""
    return "_hf_hook" in vars(module) and any(p.is_meta for p in module.parameters(recurse=False))


def select(model: nn.Module, graph: Graph, options: Options, num_classes: int) -> list[Entry]:
    """Decide about every parameter of `model`, tied ones once, in the order of `named_parameters`.

    Args:
        model: The module that `graph` was traced from.
        graph: Its graph.
        options: The caller's choices.
        num_classes: Width of the classifier that the GHN was trained for.

    Raises:
        PredictError: A pattern that matches no parameter.
    """
    names = _names(model)
    computed = computed_weights(model)
    every = [*(name for _, aliases in names for name in aliases), *computed]
    _check_patterns("include", options.include, every)
    _check_patterns("exclude", options.exclude, every)
    types = {name: node.type for node in graph.nodes for name in (node.param, node.bias) if name is not None}
    refusals = _Refusals(
        {unmatched.name: unmatched.role for unmatched in graph.unmatched},
        _head_reasons(graph, options.head, num_classes),
    )
    parts = {part: weight for weight in computed.values() for part in weight.parts}
    own = {name: weight for weight in computed.values() for name in weight.own}
    blocked = _blocked(model, computed.values(), names)
    entries = []
    for param, aliases in names:
        through = parts.get(aliases[0])
        called = aliases if through is None else (*through.parts, through.name)
        key = next((name for name in called if name in types), None)
        if aliases[0] in own:
            decision = KEEP, f"belongs to the {own[aliases[0]].how} of {own[aliases[0]].name}"
        else:
            barrier = blocked.get(through.name) if through is not None else unwritable(param)
            decision = _by_pattern(called, options) or refusals.of(barrier, called, key) or (PREDICT, "")
        node = types[key] if key is not None else None
        entries.append(Entry(aliases[0], param, aliases[1:], node, key, *decision, through))
    return entries


def _blocked(
    model: nn.Module, computed: Iterable[Computed], names: Sequence[tuple[nn.Parameter, tuple[str, ...]]]
) -> dict[str, str]:
    """Why computed weights cannot be written, by name; "" where nothing is in the way."""
    of_name = {name: (param, aliases) for param, aliases in names for name in aliases}
    blocked = {}
    for weight in computed:
        params = [of_name[part] for part in weight.parts]
        shared = zip(weight.parts, params, strict=True)
        tied = [part for part, (_, aliases) in shared if _owners(model, aliases) > 1]
        blocked[weight.name] = (
            weight.obstacle
            or next((f"{weight.how}, {part} is tied" for part in tied), "")
            or next((f"{weight.how}, sharded" for param, _ in params if is_sharded(param)), "")
            or next((cause for param, _ in params if (cause := unwritable(param))), "")
        )
    return blocked


def _owners(model: nn.Module, aliases: Sequence[str]) -> int:
    """In how many modules a parameter is registered; a module that is used twice counts once."""
    return len({id(model.get_submodule(alias.rpartition(".")[0])) for alias in aliases})


@dataclass(frozen=True, slots=True)
class _Refusals:
    """Why parameters cannot be predicted: by role without a node, by being the classifier."""

    roles: dict[str, str]
    head: dict[str, tuple[Wanted, str]]

    def of(self, barrier: str | None, aliases: Sequence[str], key: str | None) -> tuple[Wanted, str] | None:
        """What keeps this parameter from being predicted, or None; `barrier` is why it cannot be written."""
        if barrier:
            return KEEP, barrier
        if key is None:
            role = next(
                (self.roles[alias] for alias in aliases if alias in self.roles), "no operation uses it"
            )
            return KEEP, f"no node type fits: {role}"
        return self.head.get(key)


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


def unwritable(param: nn.Parameter) -> str:
    """Why `param` cannot take predicted values, or ""."""
    if is_sharded(param):
        return sharding_refusal(param)
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


def forbid_kept(model: str, entries: Sequence[Entry]) -> None:
    """What `strict` means.

    Raises:
        PredictError: A parameter would be kept that the caller has not asked to keep.
    """
    kept = [f"  {entry.name}: {entry.reason}" for entry in entries if entry.wanted == KEEP]
    if kept:
        lines = "\n".join(kept)
        raise PredictError(
            f"{model}: strict=True, and {len(kept)} of {len(entries)} parameters would be kept:\n{lines}\n"
            "exclude them, or leave strict out"
        )
