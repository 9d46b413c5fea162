"""Which parameters of a network are predicted, and why the others are kept."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ghn_init._errors import PredictError, listing
from ghn_init._network.locations import parameters_of
from ghn_init._network.sharded import is_sharded
from ghn_init._network.sharded import refusal as sharding_refusal
from ghn_init._network.walk import modules_of, tensors_of
from ghn_init._writing.entry import PREDICT, Cause, Decision, Entry
from ghn_init._writing.options import matches

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ghn_init._graph.graph import Graph, UnmatchedParameter
    from ghn_init._network.parametrised import Computed
    from ghn_init._writing.options import Head, Options


_FROZEN: Final = Decision(Cause.FROZEN, "frozen")
_KEPT_HEAD: Final = Decision(Cause.HEAD, "classifier")


def check_model(model: object) -> None:
    """Refuse what is not a module with initialised parameters.

    Raises:
        PredictError: Not a `torch.nn.Module` instance, a module without parameters, a lazy or fake one, or
            one whose parameters are not there.
    """
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise PredictError(
            f"{model.__name__} is a class; expected an instance: predict({model.__name__}(...))"
        )
    if not isinstance(model, nn.Module):
        hint = " (`ghn-init SPEC` on the command line takes names)" if isinstance(model, str) else ""
        raise PredictError(f"expected a torch.nn.Module, found {type(model).__name__} {model!r:.80}{hint}")
    modules = modules_of(model)
    if any(map(is_lazy, tensors_of(modules))):
        tensors = (*model.named_parameters(), *model.named_buffers())
        lazy = [name for name, tensor in tensors if is_lazy(tensor)]
        raise PredictError(
            f"{type(model).__name__}: {listing(lazy)} have no shape yet (lazy module); "
            "call the model once on an example input, then predict"
        )
    if any(isinstance(tensor, FakeTensor) for tensor in tensors_of(modules)):
        raise PredictError(
            f"{type(model).__name__} was made under FakeTensorMode: its tensors have no values and take "
            "none; build it without that, or in ghn_init.large_on_meta() if it is to take no memory"
        )
    offloaded = [path for path, module in modules if _is_offloaded(module)]
    if offloaded:
        raise PredictError(
            f"{type(model).__name__}: the values of {listing(offloaded)} are elsewhere (offloaded by "
            "accelerate); predict before dispatch_model, cpu_offload or disk_offload"
        )
    bare = next(model.parameters(), None) is None
    if packed := [name for name, module in modules if _is_quantised(module, bare=bare)]:
        raise PredictError(
            f"{type(model).__name__} is quantised: {listing(packed, 3)} hold packed integers instead of "
            "parameters; predict the float model, then quantise it"
        )
    if bare:
        raise PredictError(f"{type(model).__name__} has no parameters: there is nothing to predict")


def _is_quantised(module: nn.Module, *, bare: bool) -> bool:
    """Whether a layer is; float models have layers of that package, too, such as `FloatFunctional`."""
    if ".quantized." not in type(module).__module__:
        return False
    return bare or any(hasattr(module, name) for name in ("_packed_params", "_all_weight_values"))


def _is_offloaded(module: nn.Module) -> bool:
    """On the meta device only until accelerate's hook fetches the values."""
    return "_hf_hook" in vars(module) and any(p.is_meta for p in module.parameters(recurse=False))


def select(
    network: nn.Module, graph: Graph, computed: Mapping[str, Computed], options: Options, num_classes: int
) -> list[Entry]:
    """Decide about every parameter of `network`, tied ones once, in the order of `named_parameters`.

    Args:
        network: The module that `graph` was traced from.
        graph: Its graph.
        computed: Its computed weights, by name.
        options: The caller's choices.
        num_classes: Width of the classifier that the GHN was trained for.

    Raises:
        PredictError: A pattern that matches no parameter.
    """
    types = {name: node.type for node in graph.nodes for name in (node.param, node.bias) if name is not None}
    parts = {part: weight for weight in computed.values() for part in weight.parts}
    entries = []
    for locations in parameters_of(network):
        shape, weight = tuple(locations[0].get().shape), parts.get(locations[0].name)
        entry = Entry(locations, shape, None, None, weight)
        key = next((name for name in entry.called if name in types), None)
        # `replace` takes several times as long, and there are thousands of parameters.
        entries.append(entry if key is None else Entry(locations, shape, types[key], key, weight))
    options.check_patterns([*(name for entry in entries for name in entry.names), *computed])
    facts = _Facts(
        unmatched={unmatched.name: unmatched for unmatched in graph.unmatched},
        head=_kept_classifiers(graph, options.head, num_classes),
        owned={name: weight for weight in computed.values() for name in weight.own},
        entries={name: entry for entry in entries for name in entry.names} if computed else {},
    )
    decided = zip(entries, [_decision(entry, facts, options) for entry in entries], strict=True)
    return [entry if what is PREDICT else replace(entry, decision=what) for entry, what in decided]


@dataclass(frozen=True, slots=True)
class _Facts:
    """What decisions need to know of the rest of the network.

    Attributes:
        unmatched: Parameters without a node, by name.
        head: What becomes of classifiers' parameters that are not predicted, by name in the graph.
        owned: Computed weights by the names of tensors that belong to the computation alone.
        entries: All entries by all their names, if there are computed weights.
    """

    unmatched: Mapping[str, UnmatchedParameter]
    head: Mapping[str, Decision]
    owned: Mapping[str, Computed]
    entries: Mapping[str, Entry]


def _decision(entry: Entry, facts: _Facts, options: Options) -> Decision:
    """What is to be done with a parameter: the first reason to keep it counts."""
    if owner := facts.owned.get(entry.name):
        return Decision(Cause.UNWRITABLE, f"belongs to the {owner.how} of {owner.name}")
    if asked := _by_pattern(entry.called, options):
        return asked
    weight = entry.computed
    if options.frozen == "keep" and not _trainable(entry, facts.entries):
        return _FROZEN
    if obstacle := unwritable(entry.param) if weight is None else _unsolvable(weight, facts.entries):
        return obstacle
    if entry.key is None:
        left = next((facts.unmatched[name] for name in entry.called if name in facts.unmatched), None)
        role = "no operation uses it" if left is None else left.role
        used = left is not None and left.used
        return Decision(Cause.UNFIT if used else Cause.UNUSED, f"no node type fits: {role}")
    return facts.head.get(entry.key, PREDICT)


def _trainable(entry: Entry, entries: Mapping[str, Entry]) -> bool:
    """Whether the parameter, or all those that its weight is computed from, have gradients."""
    parts = [entry] if entry.computed is None else [entries[name] for name in entry.computed.parts]
    return all(part.param.requires_grad for part in parts)


def _by_pattern(names: Sequence[str], options: Options) -> Decision | None:
    """What `include` and `exclude` say. A tied parameter counts as named when any of its names is."""
    for pattern in options.exclude:
        if any(matches(name, pattern) for name in names):
            return Decision(Cause.PATTERN, f"excluded by {pattern!r}")
    included = (matches(name, pattern) for name in names for pattern in options.include)
    return Decision(Cause.PATTERN, "not included") if options.include and not any(included) else None


def _unsolvable(weight: Computed, entries: Mapping[str, Entry]) -> Decision | None:
    """Why nothing can be written through a computed weight, if so."""
    parts = [(name, entries[name]) for name in weight.parts]
    reason = (
        weight.obstacle
        or next((f"{weight.how}, {name} is tied" for name, entry in parts if _owners(entry) > 1), "")
        or next((f"{weight.how}, sharded" for _, entry in parts if is_sharded(entry.param)), "")
    )
    if reason:
        return Decision(Cause.UNWRITABLE, reason)
    return next((obstacle for _, entry in parts if (obstacle := unwritable(entry.param))), None)


def _owners(entry: Entry) -> int:
    """In how many modules a parameter is registered; a module that is used twice counts once."""
    return len({id(location.module) for location in entry.locations})


def unwritable(param: nn.Parameter) -> Decision | None:
    """Why `param` cannot take predicted values, if so."""
    if reason := _not_to_be_copied_into(param):
        return Decision(Cause.UNWRITABLE, reason)
    if param.is_inference():
        remedy = "made under torch.inference_mode(), which forbids writing: build it outside"
        return Decision(Cause.INFERENCE, remedy)
    return None


def _not_to_be_copied_into(param: nn.Parameter) -> str:
    """What in the kind of tensor or memory hinders, or ""."""
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
    if 0 in (strides := param.stride()) and any(
        stride == 0 and size > 1 for stride, size in zip(strides, param.shape, strict=True)
    ):
        return "its elements share memory (expanded tensor)"
    return ""


def _kept_classifiers(graph: Graph, head: Head, num_classes: int) -> dict[str, Decision]:
    """Parameters of classifiers (auxiliary ones too) that are kept, by name in the graph."""
    kept: dict[str, Decision] = {}
    for indices in graph.heads:
        shape = graph.nodes[indices[0]].shape
        decision = _classifier(head, shape[0] if shape else 0, num_classes)
        names = (graph.nodes[index].param for index in indices if index is not None)
        kept |= {name: decision for name in names if name is not None and not decision.predict}
    return kept


def _classifier(head: Head, width: int, num_classes: int) -> Decision:
    """What is to be done with a classifier of this width."""
    if head == "keep":
        return _KEPT_HEAD
    if head == "predict" or width == num_classes:
        return PREDICT
    trained = f"the GHN was trained for {num_classes} (head='predict' forces it)"
    return Decision(Cause.WIDTH, f"classifier of width {width}; {trained}")


def forbid_kept(model: str, entries: Sequence[Entry]) -> None:
    """What `strict` means.

    Raises:
        PredictError: A parameter would be kept that the caller did not mean to keep.
    """
    kept = [entry for entry in entries if not entry.decision.predict and not entry.decision.meant]
    if kept:
        lines = "\n".join(f"  {entry.name}: {entry.reason}" for entry in kept)
        raise PredictError(
            f"{model}: strict=True, and {len(kept)} of {len(entries)} parameters would be kept:\n{lines}\n"
            "exclude them, or leave strict out"
        )
