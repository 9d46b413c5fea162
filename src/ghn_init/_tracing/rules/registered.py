"""Rules that users add for layers whose forward pass cannot run on meta tensors: kernels of their own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function

from ghn_init._errors import RegistrationError, TraceError
from ghn_init._graph.graph import NORM_TYPES, WEIGHT_TYPES, Node
from ghn_init._network.nested import tensors_in
from ghn_init._network.walk import modules_of
from ghn_init._tracing.carried import CONSTANT, Carried, Derived, Flow, merged
from ghn_init._tracing.rules.joins import with_positions
from ghn_init._tracing.rules.nodes import add_norm, add_vector, add_weight, main_parameter
from ghn_init._tracing.sketch import Operation, rule

Output = Callable[..., Any]
"""Called as (layer, *args, **kwargs) with the arguments on meta; gives tensors like those of the forward."""

_OF_PARAMETERS: Final = WEIGHT_TYPES | NORM_TYPES | {"bias"}
_WITHOUT: Final = frozenset({"msa", "cse", "glob_avg"})

_RULES: Final[dict[type[nn.Module], LayerRule]] = {}


def _like_the_first(layer: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """An output of the shape and dtype of the first tensor that comes in."""
    tensors = tensors_in((args, kwargs))
    if not tensors:
        raise TraceError(f"{type(layer).__name__} was called without a tensor: its rule needs output=")
    return torch.empty_like(tensors[0], device="meta")


@dataclass(frozen=True)
class LayerRule:
    """What a registered layer is in the graph: see `register`."""

    layer: type[nn.Module]
    nodes: Mapping[str, str]
    output: Output
    transposed: frozenset[str]

    def applies_to(self, module: nn.Module) -> bool:
        """Whether `module` runs the registered class' forward: a subclass may have one of its own."""
        return isinstance(module, self.layer) and type(module).forward is self.layer.forward


class Registration:
    """What `register` returns: `remove()` takes the rule away again, as does leaving a `with` block."""

    def __init__(self, rule: LayerRule, before: LayerRule | None) -> None:
        self._rule = rule
        self._before = before

    def remove(self) -> None:
        """Put back what held for the layer before; nothing happens if the rule is gone already."""
        if _RULES.get(self._rule.layer) is not self._rule:
            return
        del _RULES[self._rule.layer]
        if self._before is not None:
            _RULES[self._rule.layer] = self._before

    def __enter__(self) -> Registration:
        return self

    def __exit__(self, *_error: object) -> None:
        self.remove()


def register(
    layer: type[nn.Module],
    nodes: Mapping[str, str],
    output: Output | None = None,
    *,
    transposed: Collection[str] = (),
    replace: bool = False,
) -> Registration:
    """Say what a layer is in the graph, so that tracing does not run its forward pass.

    For layers that cannot run on meta tensors: kernels of one's own, calls into other libraries.

        def output(layer, x):
            return x.new_empty(*x.shape[:-1], layer.out_features)
        ghn_init.register(FastLinear, {"weight": "conv", "bias": "bias"}, output)

    Args:
        layer: The class; subclasses too, unless they have a forward of their own.
        nodes: The layer's nodes, in the order of computation: parameter, as a name below the layer
            ("weight", "proj.weight") -> node type. The first parameter with "bn" or "ln" is the weight of
            that node, a second right after it the bias. An entry of type "msa", "cse" or "glob_avg", which
            have no parameter, adds that node; its key only labels it. Parameters that are None are left out.
        output: Called as `output(layer, *args, **kwargs)` with the call's arguments on the meta device;
            returns meta tensors of the shapes that the forward pass gives. By default one like the first
            argument.
        transposed: Names of the weights that are stored as (in, out, ...) instead of (out, in, ...).
        replace: Whether a rule that the class has already may be replaced.

    Returns:
        A handle: `handle.remove()`, or using it in a `with` statement, undoes the registration.

    Raises:
        RegistrationError: Not a module class, an unknown node type, or a class that has a rule already.
    """
    rule = LayerRule(layer, dict(nodes), output or _like_the_first, frozenset(transposed))
    _check(rule)
    before = _RULES.get(layer)
    if before is not None and not replace:
        raise RegistrationError(
            f"{layer.__name__} is registered already, as {dict(before.nodes)}; "
            "remove() that registration first, or pass replace=True"
        )
    _RULES[layer] = rule
    return Registration(rule, before)


def _check(rule: LayerRule) -> None:
    if not (isinstance(rule.layer, type) and issubclass(rule.layer, nn.Module)):
        raise RegistrationError(f"expected a subclass of torch.nn.Module, found {rule.layer!r}")
    name = rule.layer.__name__
    if not callable(rule.output):
        raise RegistrationError(
            f"{name}: output must be a function (layer, *args) -> tensor, found {rule.output!r}"
        )
    wrong = [
        f"{key!r}: {node_type!r}"
        for key, node_type in rule.nodes.items()
        if node_type not in _OF_PARAMETERS | _WITHOUT
    ]
    if wrong or not rule.nodes:
        raise RegistrationError(
            f"{name}: {', '.join(wrong) or 'no nodes'}; expected parameter names with the types "
            f"{', '.join(sorted(_OF_PARAMETERS))}, or labels with {', '.join(sorted(_WITHOUT))}"
        )
    if unknown := rule.transposed - rule.nodes.keys():
        raise RegistrationError(f"{name}: transposed names {sorted(unknown)}, which are not in nodes")


@contextmanager
def registered_layers(model: nn.Module) -> Iterator[None]:
    """Inside, calling a registered layer is recorded by its rule instead of running its forward pass.

    A call of such a layer looks to the recorder like a call of a torch function, its tensors on meta, and is
    a `call_module` node of the fx graph.
    """
    replaced: list[nn.Module] = []
    for path, module in modules_of(model) if _RULES else ():
        rule = _rule_of(module)
        if rule is not None and "forward" not in vars(module):
            vars(module)["forward"] = functools.partial(_recorded_call, rule, module, path)
            replaced.append(module)
    try:
        yield
    finally:
        for module in replaced:
            vars(module).pop("forward", None)


def _rule_of(module: nn.Module) -> LayerRule | None:
    """The rule of the nearest class that has one."""
    for cls in type(module).__mro__:
        rule = _RULES.get(cls)
        if rule is not None:
            return rule if rule.applies_to(module) else None
    return None


@dataclass(frozen=True)
class RegisteredCall:
    """A call of a registered layer.

    Attributes:
        rule: What holds for it.
        module: The layer.
        path: Its qualified name.
        params: Its parameters by their names in the rule.
    """

    rule: LayerRule
    module: nn.Module
    path: str
    params: Mapping[str, Tensor]


def _recorded_call(rule: LayerRule, module: nn.Module, path: str, *args: Any, **kwargs: Any) -> Any:
    tensors = {
        name: _parameter(rule, module, path, name)
        for name, node_type in rule.nodes.items()
        if node_type not in _WITHOUT
    }
    params = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    layer, every = RegisteredCall(rule, module, path, params), tuple(module.parameters())
    return handle_torch_function(registered_layer, every, layer, args, kwargs)  # pyright: ignore[reportCallIssue]


def registered_layer(layer: RegisteredCall, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a registered layer looks like to the recorder: a torch function, written down as `call_module`."""
    return layer.rule.output(layer.module, *args, **kwargs)


def _parameter(rule: LayerRule, module: nn.Module, path: str, name: str) -> Tensor | None:
    """The layer's tensor called `name`; None where the layer has been built without it."""
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part, ...)
    if value is None or (
        isinstance(value, Tensor) and (value.ndim > 1 or rule.nodes[name] not in WEIGHT_TYPES)
    ):
        return value
    found = "no such attribute" if value is ... else type(value).__name__
    if isinstance(value, Tensor):
        found = f"a tensor of shape {tuple(value.shape)}"
    own = ", ".join(f"{key} {tuple(param.shape)}" for key, param in module.named_parameters())
    raise TraceError(
        f"{path or 'the model'} ({type(module).__name__}): its rule takes {name!r} for a parameter "
        f"of a {rule.nodes[name]} node, found {found}; the layer has {own or 'no parameters'}"
    )


@rule("call_module")
def of_registered_layer(op: Operation) -> Carried:
    """The nodes of a registered layer, one after the other.

    The recorder leaves the rule and the names of the layer's parameters with the node.
    """
    layer_rule: LayerRule = op.node.meta["layer"]
    names: Mapping[str, str] = op.node.meta["parameters"]
    value = merged(op.inputs())
    if not isinstance(value, Flow):
        return value
    carried = {key: Derived((name,)) for key, name in names.items()}
    entries = list(layer_rule.nodes.items())
    while entries:
        name, node_type = entries.pop(0)
        if node_type in NORM_TYPES:
            bias = entries.pop(0)[0] if entries and entries[0][1] == node_type else ""
            weights = (carried.get(name, CONSTANT), carried.get(bias, CONSTANT))
            value = Flow((add_norm(op, node_type, *weights, value.sources),))
        elif node_type in _WITHOUT:
            value = Flow((op.sketch.add_node(Node(node_type), value.sources),))
        elif name in carried:
            value = _with_parameter(op, node_type, carried[name], value, name in layer_rule.transposed)
    op.sketch.note_role(op.node.meta["others"], f"not in the rule of {layer_rule.layer.__name__}")
    return value


def _with_parameter(op: Operation, node_type: str, derived: Derived, flow: Flow, transposed: bool) -> Flow:
    if node_type == "bias":
        return Flow((add_vector(op, "bias", derived, flow.sources),))
    if node_type == "pos_enc":
        return with_positions(op, flow, main_parameter(op, derived))
    shape = op.sketch.shapes[derived.params[0]]
    return Flow((add_weight(op, shape, derived, flow.sources, node_type, transposed),))
