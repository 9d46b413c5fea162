"""`record`: any `nn.Module` -> `torch.fx.GraphModule`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.fx.passes.shape_prop import _extract_tensor_metadata

from ghn_init._network.nested import tensors_in
from ghn_init._network.wrappers import unwrapped
from ghn_init._tracing.trace import traced

if TYPE_CHECKING:
    from ghn_init._tracing.recorder import Recording


def record(model: nn.Module, example_input: object = None) -> fx.GraphModule:
    """The functions that `model` computes with, as a `torch.fx.GraphModule`.

    The forward pass is followed once on meta tensors, so control flow on shapes, `len()` and Python loops
    are no obstacle, nothing is computed, and the model is left as it is. The graph has

    - one node for every torch function that gets an activation or a parameter and gives a tensor or changes
      one, and for those that make constants out of nothing, such as `torch.arange`; a function of torch is
      one node, whatever it calls (`F.multi_head_attention_forward`). A layer with a rule of its own
      (`register`) is one `call_module` node.
    - `get_attr` nodes for parameters and buffers, whose targets are their qualified names in the model. The
      tensors are the model's own: what is written to one is written to the other.
    - a placeholder for every argument that the forward pass was given, by its name.
    - `node.meta["tensor_meta"]`, the `TensorMetadata` that `torch.fx.passes.shape_prop.ShapeProp` writes, and
      `node.meta["nn_module_stack"]`, the modules whose calls led to a call, as `torch.export` writes them.

    It runs again, and gives what the model gives, for inputs of the recorded shapes in the recorded mode,
    because sizes, the train or eval mode and everything that Python computed are fixed in it. It cannot
    where the forward pass depends on values of the input: a branch on one is an error while recording;
    choices by values, such as `x[x > 0]`, experts and boxes, are recorded as if every element was chosen;
    and what a detector does after its last parameter was used, to format its results, is left out, so the
    graph ends with the tensors that nothing follows. Objects that the forward pass returns are dicts of
    their fields in it.

    Args:
        model: The network, as for `trace`.
        example_input: What it is called with, as for `trace`.

    Returns:
        The module, of a class that is called as the model's. Parameters that no function uses are not in it.

    Raises:
        TraceError: As `trace`.
    """
    found = traced(model, example_input, whole=True)
    assert found.recording is not None  # it was asked for
    return _module(found.recording, unwrapped(model))


def _module(recording: Recording, model: nn.Module) -> fx.GraphModule:
    """The recording with the tensors that it needs, its metadata as fx has it."""
    graph = recording.graph
    if not graph.find_nodes(op="output"):
        ends = [node for node in graph.nodes if not node.users and tensors_in(node.meta.get("val"))]
        graph.output(tuple(ends))
    for node in reversed(list(graph.nodes)):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    for node in graph.nodes:
        _describe(node)
    targets = {str(node.target) for node in graph.nodes if node.op in ("get_attr", "call_module")}
    objects = {name: value for name, value in recording.objects.items() if name in targets}
    module = fx.GraphModule(objects, graph, class_name=type(model).__name__)
    module.train(model.training)
    return module


def _describe(node: fx.Node) -> None:
    """Replace the tensors that a node gave while recording by what ShapeProp writes."""
    value = node.meta.pop("val", None)
    if tensors_in(value):
        node.meta["tensor_meta"] = map_aggregate(value, _metadata)
        node.meta["type"] = type(value)


def _metadata(value: Any) -> Any:
    return _extract_tensor_metadata(value) if isinstance(value, Tensor) else value
