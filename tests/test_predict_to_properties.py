"""Random networks on disk: a checkpoint holds what `predict` gives, whatever the size of its files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from ghn_init import plan
from test_predict_properties import EXAMPLE, GHN2, Recipe, choices, recipes


@given(recipe=recipes, options=choices, size=st.sampled_from((500, 20_000, "1MB")), on_meta=st.booleans())
def test_checkpoints_hold_what_predict_gives(
    recipe: Recipe, options: dict[str, Any], size: int | str, on_meta: bool
) -> None:
    if on_meta:  # a bare scale has no usual value
        recipe = replace(recipe, layers=tuple(layer for layer in recipe.layers if layer[0] != "scale"))
    with torch.device("meta" if on_meta else "cpu"):
        model = recipe.build()
    planned = plan(model, GHN2, example_input=EXAMPLE, **options)
    if all(row.action == "kept" for row in planned.rows):
        return
    with TemporaryDirectory() as folder:
        planned.save(folder, max_shard_size=size)
        stored = {k: v for path in Path(folder).glob("*.safetensors") for k, v in load_file(path).items()}
    expected = planned.apply().state_dict()
    also = {alias for row in planned.rows for alias in row.also}
    assert set(stored) == set(expected) - also
    assert all(torch.equal(value, expected[name]) for name, value in stored.items())
