"""The optimizers of a run, and the penalty on predicted parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from ghn_init import GHN, GHNConfig, trace
from ghn_init.training import TrainConfig
from ghn_init.training._optimizer import Muon, _shares, make_optimizer, orthogonalise
from training_runs import TINY_GHN, figures, tiny_config, tiny_trainer

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("shape", [(6, 40), (40, 6), (12, 12), (513, 300), (300, 513)])
def test_orthogonalising_keeps_the_directions_and_evens_out_the_lengths(shape: tuple[int, int]) -> None:
    left, values, right = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    found = orthogonalise(left @ torch.diag(values.clamp(min=0.1)) @ right)
    lengths = torch.einsum("ij,ik,kj->j", left, found, right.mT)
    torch.testing.assert_close(left @ torch.diag(lengths) @ right, found, atol=1e-3, rtol=0)
    assert lengths.min() > 0.5
    assert lengths.max() < 1.3


def test_every_parameter_gets_the_update_of_its_kind() -> None:
    ghn = GHN(GHNConfig.from_dict({**TINY_GHN, "depth_buckets": 8}))
    optimizer = make_optimizer(ghn, TrainConfig(steps=1, optimizer="muon"))
    names = {id(p): name for name, p in ghn.named_parameters()}
    matrices, others = ([names[id(p)] for p in group["params"]] for group in optimizer.param_groups)
    assert {"decoder.conv.2.weight", "gnn.gru.weight_hh", "decoder_1d.fc.0.weight"} <= set(matrices)
    assert {"embed.weight", "place_enc.embed_depth.weight", "decoder.conv.2.bias"} <= set(others)
    assert len(names) == len(matrices) + len(others)


def test_processes_share_the_matrices_by_what_they_cost() -> None:
    shapes = [(8, 8), (64, 512), (512, 64), (4, 4), (300, 300), (16, 16)]
    shares = _shares(shapes, 2)
    assert sorted(index for share in shares for index in share) == list(range(len(shapes)))
    assert [4] in shares  # the largest one takes as long as all others
    assert _shares(shapes, 1) == [[4, 1, 2, 5, 0, 3]]
    assert sorted(map(len, _shares(shapes, 9))) == [0, 0, 0, 1, 1, 1, 1, 1, 1]


def test_muon_halves_are_its_parts() -> None:
    model = nn.Linear(8, 4)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    matrix, vector = (p.detach().clone() for p in model.parameters())
    adam = nn.Parameter(vector.clone())
    adam.grad = model.bias.grad
    reference = torch.optim.AdamW([adam], lr=0.1, weight_decay=0.5)
    optimizer = Muon(model.named_parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(3):
        reference.step()
        optimizer.step()
    torch.testing.assert_close(model.bias, adam)
    moved = model.weight.detach() - matrix * 0.95**3
    assert moved.square().mean().sqrt() == pytest.approx(3 * 0.1 * 0.2, rel=0.25)  # the step of an Adam


def test_muon_goes_on_where_it_stopped(tmp_path: Path) -> None:
    config = tiny_config(optimizer="muon", steps=3)
    whole: list[object] = []
    assert tiny_trainer(tmp_path / "whole", config).run(lambda record: whole.append(figures(record)))
    parts: list[object] = []
    while not tiny_trainer(tmp_path / "parts", config, time_limit=0.0).run(
        lambda r: parts.append(figures(r))
    ):
        pass
    assert parts == whole


def test_the_penalty_on_predicted_parameters_makes_them_smaller(tmp_path: Path) -> None:
    def size(decay: float) -> float:
        trainer = tiny_trainer(tmp_path / str(decay), tiny_config(param_decay=decay, steps=4, lr=0.01))
        trainer.run()
        return sum(p.square().sum().item() for p in trainer.ghn.decoder.conv.parameters())

    assert size(10.0) < size(0.0)


def test_the_skip_adds_the_first_features() -> None:
    ghn = GHN(GHNConfig.from_dict({**TINY_GHN, "skip": True}))
    plain = GHN(GHNConfig.from_dict(TINY_GHN))
    plain.load_state_dict(ghn.state_dict())
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    graph = trace(network)
    batch, other = ghn.batch(graph), plain.batch(graph)
    torch.testing.assert_close(ghn.encode(batch), plain.encode(other) + plain.node_features(other))
