"""timm's and transformers' models on the meta device, on disk and loaded back; skipped without them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from ghn_init import GHN, load, plan, predict, predict_to

if TYPE_CHECKING:
    from pathlib import Path

TOKENS = {"input_ids": torch.zeros(1, 8, dtype=torch.long)}
DECODER = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48,
}  # fmt: skip
TRANSFORMERS = {
    "ViTForImageClassification": {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3,
                                  "intermediate_size": 48, "image_size": 32, "patch_size": 8},
    "ConvNextForImageClassification": {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
    "SwinForImageClassification": {"embed_dim": 12, "depths": [1, 1], "num_heads": [2, 4], "image_size": 64,
                                   "window_size": 4},
    "LlamaForCausalLM": {**DECODER, "tie_word_embeddings": True},
    "BertForMaskedLM": DECODER,
}  # fmt: skip


@pytest.fixture(scope="module")
def ghn(ghn_dir: Path) -> GHN:
    return load(ghn_dir)


def on_meta(name: str) -> Any:
    transformers = pytest.importorskip("transformers")
    kind = getattr(transformers, name)
    with torch.device("meta"):
        return kind(kind.config_class(**TRANSFORMERS[name]))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_load_what_is_written(name: str, ghn: GHN, tmp_path: Path) -> None:
    example = TOKENS if name in ("LlamaForCausalLM", "BertForMaskedLM") else None
    model = on_meta(name)
    predict_to(model, tmp_path / "out", ghn, max_shard_size="20KB", example_input=example)
    loaded, told = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(told.values())
    predict(model, ghn, example_input=example)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())
    assert all(torch.equal(value, dict(model.named_buffers())[key]) for key, value in loaded.named_buffers())


@pytest.mark.filterwarnings("ignore")
def test_transformers_do_not_overwrite_predicted_weights(ghn: GHN) -> None:
    model = on_meta("ViTForImageClassification")
    planned = plan(model, ghn)
    planned.apply()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for module in model.modules():  # as if nothing had been initialised yet
        if any(row.action == "kept" for row in planned.rows if row.name in dict(module.named_parameters())):
            module._is_hf_initialized = False
    model.initialize_weights()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    kept = {row.name for row in planned.rows if row.action == "kept"}
    assert changed
    assert changed <= kept


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "levit_128s"])
def test_timm_models_get_every_value(name: str, ghn: GHN) -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=10)
    planned = plan(model, ghn)
    planned.apply()
    real = timm.create_model(name, num_classes=10)
    for key, buffer in real.named_buffers():
        assert torch.equal(model.get_buffer(key), planned.statistics.get(key, buffer)), key
    assert all(param.isfinite().all() for param in model.parameters())


@pytest.mark.parametrize("version", ["ModelEmaV2", "ModelEmaV3"])
def test_timm_averages_are_unwrapped(version: str, ghn: GHN) -> None:
    pytest.importorskip("timm")
    from timm import utils

    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 16), torch.nn.Linear(16, 10))
    average = getattr(utils, version)(net)
    rows = plan(average, ghn, example_input=(1, 3, 4, 4)).rows
    assert [row.name for row in rows] == list(dict(net.named_parameters()))
