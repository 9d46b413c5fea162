"""A sample of the networks of transformers: text, images, sound and several at once."""

from __future__ import annotations

import sys
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

import ghn_init
from ghn_init import trace

pytest.importorskip("transformers", reason="transformers is not installed: its networks cannot be built")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from zoo_transformers import configurations

if TYPE_CHECKING:
    from collections.abc import Callable

    from ghn_init import Graph

pytestmark = [
    pytest.mark.source,
    pytest.mark.filterwarnings("ignore"),
]  # transformers warns of its own options

SAMPLE = {
    "BertForMaskedLM": (2, set()),
    "GPT2LMHeadModel": (2, set()),
    "LlamaForCausalLM": (2, {"embedding table"}),
    "Gemma2ForCausalLM": (2, {"a norm's weight, stored as its distance from a number"}),
    "T5ForConditionalGeneration": (6, {"relative position table"}),
    "SwitchTransformersForConditionalGeneration": (26, {"relative position table"}),
    "ViTForImageClassification": (2, {"class token"}),
    "ConvNextForImageClassification": (0, {"layer scale"}),
    "ResNetForImageClassification": (0, set()),
    "SwinForImageClassification": (2, {"relative position table"}),
    "Wav2Vec2ForCTC": (2, {"unused"}),
    "WhisperForConditionalGeneration": (6, set()),
    "CLIPModel": (4, {"embedding table", "class token", "scale of the attention"}),
}
"""Network -> how many attentions it has, and what its parameters without a node are."""


@lru_cache
def _builders() -> dict[str, Callable[[], nn.Module]]:
    return {name: build for name, _, build in configurations()}


@lru_cache
def _traced(name: str) -> tuple[nn.Module, Graph]:
    model = _builders()[name]().eval()
    return model, trace(model)


@pytest.mark.parametrize("name", SAMPLE)
def test_every_parameter_is_accounted_for(name: str) -> None:
    model, graph = _traced(name)
    attentions, kept = SAMPLE[name]
    on_nodes = {param for node in graph.nodes for param in (node.param, node.bias) if param is not None}
    unmatched = {param.name: param.role for param in graph.unmatched}
    parameters = {param for param, _ in model.named_parameters() if ".parametrizations." not in param}
    assert parameters <= on_nodes | unmatched.keys()
    assert not on_nodes & unmatched.keys()
    assert Counter(node.type for node in graph.nodes)["msa"] == attentions
    assert set(unmatched.values()) == kept


@pytest.mark.parametrize("name", SAMPLE)
def test_every_norm_is_a_node_of_its_own(name: str) -> None:
    """Those that are written by hand too, such as Llama's and T5's; Gemma's have no weight to predict."""
    model, graph = _traced(name)
    norms = [
        path
        for path, module in model.named_modules()
        if "Norm" in type(module).__name__ and module._parameters
    ]
    found = [node for node in graph.nodes if node.type in ("bn", "ln")]
    assert len(found) == len(norms)
    if name != "Gemma2ForCausalLM":
        assert {str(node.param).rpartition(".")[0] for node in found} == set(norms)


def test_a_language_model_runs_with_predicted_weights(ghn_dir: Path) -> None:
    model = _builders()["LlamaForCausalLM"]().eval()
    before = {name: param.clone() for name, param in model.named_parameters()}
    norm = "model.layers.1.post_attention_layernorm.weight"
    for scale, norms in (("own", False), ("predicted", True)):
        ghn_init.predict(model, ghn_dir, scale=scale)
        changed = [name for name, param in model.named_parameters() if not torch.equal(param, before[name])]
        assert "model.layers.0.self_attn.q_proj.weight" in changed
        assert (norm in changed) == norms
        assert "model.embed_tokens.weight" not in changed
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_the_list_is_long_and_of_every_kind() -> None:
    listed = configurations()
    assert len(listed) >= 60
    assert len({name for name, _, _ in listed}) == len(listed)
    assert {kind for _, kind, _ in listed} >= {"text", "vision", "audio"}
    assert SAMPLE.keys() <= _builders().keys()
