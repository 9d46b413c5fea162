"""The priors of predicted weights: which layer gets which, by hand; filters; gradients; tiles and files."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from ghn_init import GHN, ConfigError, GHNConfig, Graph, Node, load, predict, trace
from ghn_init._graph.graph import graph_from_edges
from ghn_init._hypernetwork.priors import priors_of, stem_filters, whitening_filters
from ghn_init._hypernetwork.tile import Tile

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

SMALL = {"hid": 8, "max_shape": (8, 8, 3, 3)}
BOTH = GHNConfig(identity=True, whitening=3.0)


def chain(*nodes: Node) -> Graph:
    """The input, these nodes one after another, and a classifier."""
    all_nodes = [Node("input"), *nodes, Node("conv", "head", (10, 32))]
    return graph_from_edges(all_nodes, list(pairwise(range(len(all_nodes)))))


def added(graph: Graph, **changes: Any) -> dict[str, Tensor]:
    """What the priors add to every parameter, in its own shape."""
    settings = {**SMALL, **changes}
    config = GHNConfig(**{"identity": True, **settings})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ghn = GHN(config)
        ghn.whiten(torch.randn(8, 3, 6, 6))
        plain = GHN(GHNConfig(**{**settings, "whitening": 0.0}))
    plain.load_state_dict({k: v for k, v in ghn.state_dict().items() if k != "whitening"})
    (theirs,), (ours,) = plain(graph), ghn(graph)
    return {name: ours[name] - theirs[name] for name in ours}


def close(found: Tensor, expected: Tensor | list[Any]) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), atol=1e-5, rtol=0)


def half_mirrored(size: int) -> Tensor:
    """1 on the diagonal, -1/2 beside it within pairs of channels."""
    return torch.block_diag(*[torch.tensor([[1.0, -0.5], [-0.5, 1.0]])] * (size // 2))


def test_nothing_is_added_by_default() -> None:
    assert not GHNConfig().identity
    assert GHNConfig().whitening == 0
    graph = chain(Node("conv", "a", (32, 32, 3, 3)))
    assert priors_of(graph, GHNConfig()) == {}
    assert "whitening" not in GHN().state_dict()
    assert all(group.key.prior == ("", 0) for group in GHN().batch(graph).groups)


def test_the_identity_averages_copies_and_takes_off_half_of_the_neighbour() -> None:
    extra = added(chain(Node("conv", "stem", (16, 3, 3, 3)), Node("conv", "a", (12, 20, 3, 5))))["a"]
    assert extra.shape == (12, 20, 3, 5)
    close(extra[:, :, 1, 2].abs().sum(), extra.abs().sum())  # all in the centre
    block = extra[:, :, 1, 2]
    # Inputs 0, 8 and 16 share column 0 of the block of 8, so each has a third; 4 and 12 are two.
    close(block[0], [1 / 3, -1 / 6, 0, 0, 0, 0, 0, 0] * 2 + [1 / 3, -1 / 6, 0, 0])
    close(block[4], [0, 0, 0, 0, 1 / 2, -1 / 4, 0, 0] * 2 + [0, 0, 0, 0])
    close(block[8:], block[:4])  # outputs repeat as the block does
    x = torch.randn(8).repeat(3)[:20]
    close(block[:8] @ x, half_mirrored(8) @ x[:8])


@pytest.mark.parametrize("shape", [(8, 16), (8, 16, 4), (8, 16, 2, 2), (8, 16, 3, 5, 5)])
def test_the_identity_exists_in_every_number_of_dimensions(shape: tuple[int, ...]) -> None:
    extra = added(chain(Node("bn", "n", (16,)), Node("conv", "a", shape), Node("bn", "b", (8,))))["a"]
    summed = extra.flatten(2).sum(2) if extra.ndim > 2 else extra
    close(summed, half_mirrored(8).repeat(1, 2) / 2)
    if len(shape) == 5:  # frames share it
        close(extra[:, :, :, 2, 2], (summed / 3).unsqueeze(2).expand(-1, -1, 3))
    elif len(shape) > 2:
        centre = tuple((side - 1) // 2 for side in shape[2:])
        close(extra[(slice(None), slice(None), *centre)], summed)


def test_a_transposed_convolution_and_a_parameter_that_is_stored_otherwise() -> None:
    stored = Node("conv", "s", (8, 16, 3, 3), stored=(8, 16, 9))
    extra = added(chain(Node("bn", "n", (16,)), Node("conv", "t", (8, 16, 3, 3), transposed=True), stored))
    assert extra["t"].shape == (16, 8, 3, 3)
    close(extra["t"][:, :, 1, 1], half_mirrored(8).repeat(1, 2).T / 2)
    close(extra["s"][:, :, 4], half_mirrored(8).repeat(1, 2) / 2)


def test_depthwise_and_grouped_convolutions_carry_their_own_channels() -> None:
    extra = added(chain(
        Node("bn", "n", (24,)),
        Node("sep_conv", "depthwise", (24, 1, 3, 3)),
        Node("dil_conv", "dilated", (24, 1, 3, 3)),
        Node("sep_conv", "groups", (24, 4, 3, 3)),
        Node("sep_conv", "odd", (24, 6, 1, 1)),  # 6 does not divide the block of 8
        Node("sep_conv", "back", (6, 24, 1, 1), transposed=True),
    ))  # fmt: skip
    centre = torch.zeros(3, 3)
    centre[1, 1] = 1
    close(extra["depthwise"], centre.expand(24, 1, 3, 3))
    close(extra["dilated"], centre.expand(24, 1, 3, 3))
    close(extra["groups"][:, :, 1, 1], half_mirrored(4).repeat(6, 1))
    close(extra["odd"][:, :, 0, 0], half_mirrored(6).repeat(4, 1))
    close(extra["back"][:, :, 0, 0], half_mirrored(6).repeat(4, 1))  # as stored: (in, out / groups)


def test_a_kernel_larger_than_the_decoded_one_has_one_centre() -> None:
    extra = added(chain(Node("bn", "n", (16,)), Node("conv", "a", (8, 16, 7, 7))))["a"]
    close(extra[:, :, 3, 3], half_mirrored(8).repeat(1, 2) / 2)
    close(extra.abs().sum(), extra[:, :, 3, 3].abs().sum())


def test_layers_that_have_no_features_to_carry_are_left_alone() -> None:
    nodes = [
        Node("input"),
        Node("conv", "pixels", (16, 48)),  # 1: reads the input
        Node("pos_enc", "positions", (1, 16, 16, 16)),
        Node("sum"),
        Node("conv", "thin", (16, 15, 1, 1)),  # 4
        Node("conv", "squeeze", (16, 16)),  # 5: from 4, to the gate
        Node("bias", "squeeze.bias", (16,)),
        Node("conv", "excite", (16, 16)),
        Node("cse"),  # 8: 4 times the gate
        Node("conv", "carries", (16, 16, 1, 1)),
        Node("glob_avg"),
        Node("conv", "hidden", (32, 16)),
        Node("bias", "hidden.bias", (32,)),
        Node("conv", "head", (10, 32)),
        Node("bias", "head.bias", (10,)),
    ]
    edges = [(0, 1), (1, 3), (2, 3), (3, 4), (4, 5), (5, 6), (6, 7), (4, 8), (7, 8), *pairwise(range(8, 15))]
    graph = graph_from_edges(nodes, edges)
    assert priors_of(graph, BOTH) == {9: ("identity", 0)}
    extra = added(graph, whitening=3.0)
    assert [name for name, values in extra.items() if values.abs().max() > 1e-6] == ["carries"]


def test_gates_are_told_by_where_they_lead() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3)
            self.down, self.up = nn.Conv2d(32, 16, 1), nn.Conv2d(16, 32, 1)
            self.b, self.head = nn.Conv2d(32, 32, 1), nn.Linear(32, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(self.stem(x))
            gate = self.up(self.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
            return self.head(self.b(x * gate).mean((2, 3)))

    graph = trace(Gated(), (1, 3, 16, 16))
    found = {graph.nodes[index].param: prior for index, prior in priors_of(graph, BOTH).items()}
    assert found == {"stem.weight": ("stem", 0), "a.weight": ("identity", 0), "b.weight": ("identity", 0)}


def test_the_odd_half_of_a_factorised_reduction_carries_the_upper_channels() -> None:
    nodes = [
        Node("input"), Node("conv", "stem", (16, 3, 3, 3)), Node("conv", "even", (4, 16, 1, 1)),
        Node("conv", "odd", (4, 16, 1, 1)), Node("concat"), Node("conv", "head", (10, 8)),
    ]  # fmt: skip
    graph = graph_from_edges(nodes, [(0, 1), (1, 2), (1, 3), (2, 4), (3, 4), (4, 5)])
    extra = added(graph)
    both = torch.cat([extra["even"], extra["odd"]])[:, :, 0, 0]
    close(both, half_mirrored(8).repeat(1, 2) / 2)


def test_halves_wider_than_what_they_read_begin_again() -> None:
    nodes = [
        Node("input"), Node("bn", "n", (16,)), Node("conv", "even", (16, 16, 1, 1)),
        Node("conv", "odd", (16, 16, 1, 1)), Node("concat"), Node("conv", "head", (10, 32)),
    ]  # fmt: skip
    graph = graph_from_edges(nodes, [(0, 1), (1, 2), (1, 3), (2, 4), (3, 4), (4, 5)])
    extra = added(graph, max_shape=(64, 64, 3, 3))
    close(extra["odd"], extra["even"])


def test_whitened_patches_are_uncorrelated() -> None:
    torch.manual_seed(0)
    images = nn.functional.avg_pool2d(torch.randn(64, 3, 18, 18), 3, 1) * 3
    filters = whitening_filters(images)
    answers = nn.functional.conv2d(images, filters).transpose(0, 1).flatten(1)
    covariance = torch.cov(answers, correction=0)
    variances = covariance.diagonal()
    close(covariance - torch.diag(variances), torch.zeros(27, 27))
    powers = filters.flatten(1).square().sum(1)  # 1 / (eigenvalue + 0.01)
    close(variances, (1 / powers - 0.01) * powers)
    assert (variances.diff() <= 1e-6).all()  # largest first


def test_constant_images_have_filters() -> None:
    filters = whitening_filters(torch.zeros(2, 3, 4, 4))
    close(filters.flatten(1).norm(dim=1), torch.full((27,), 10.0))  # nothing but 0.01 to divide by


def test_stems_get_every_filter_and_its_negative_in_the_middle() -> None:
    nodes = [Node("input"), Node("conv", "head", (10, 32))]
    sides = {"seven": 7, "patch": 16, "three": 3, "two": 2, "one": 1}
    nodes[1:1] = [Node("conv", name, (70, 3, side, side)) for name, side in sides.items()]
    nodes.insert(-1, Node("sum"))
    last = len(nodes) - 1
    edges = [(0, i) for i in range(1, last - 1)] + [(i, last - 1) for i in range(1, last - 1)]
    graph = graph_from_edges(nodes, [*edges, (last - 1, last)])
    extra = added(graph, whitening=3.0, max_shape=(64, 64, 11, 11))
    torch.manual_seed(0)
    ghn = GHN(GHNConfig(**{**SMALL, "max_shape": (64, 64, 11, 11)}, identity=True, whitening=3.0))
    ghn.whiten(torch.randn(8, 3, 6, 6))
    filters = 3 * torch.stack([ghn.get_buffer("whitening"), -ghn.get_buffer("whitening")], 1).flatten(0, 1)
    expected = torch.cat([filters, filters])[:64]
    for name, start in (("seven", 2), ("patch", 6), ("three", 0)):
        kernel = extra[name].detach()
        close(kernel[:64, :, start : start + 3, start : start + 3], expected)
        close(kernel[64:], kernel[:6])
        kernel[:, :, start : start + 3, start : start + 3] = 0
        close(kernel, torch.zeros_like(kernel))
    close(extra["two"][:64], expected[:, :, 1:, 1:])
    close(extra["one"][:64], expected[:, :, 1:2, 1:2])


def test_only_a_convolution_of_three_channels_that_reads_the_input_is_a_stem() -> None:
    graph = chain(Node("conv", "grey", (16, 1, 3, 3)), Node("conv", "later", (16, 3, 3, 3)))
    assert priors_of(graph, BOTH) == {}
    graph = chain(Node("conv", "frames", (16, 3, 5, 3, 3)))
    assert priors_of(graph, BOTH) == {1: ("stem", 0)}
    extra = added(graph, whitening=1.0)["frames"]
    close(extra, extra[:, :, :1].expand(-1, -1, 5, -1, -1))
    assert extra.abs().max() > 0


def test_gradients_pass_the_priors_unchanged() -> None:
    graph = chain(
        Node("conv", "stem", (16, 3, 7, 7)),
        Node("conv", "a", (24, 16, 5, 5)),
        Node("sep_conv", "odd", (24, 6, 1, 1)),
        Node("conv", "b", (8, 24)),
    )
    torch.manual_seed(0)
    ghn = GHN(GHNConfig(**SMALL, identity=True, whitening=3.0)).double()
    ghn.whiten(torch.randn(8, 3, 6, 6))
    weights = {name: torch.randn_like(values) for name, values in ghn(graph)[0].items()}

    def loss() -> Tensor:
        return sum((ghn(graph)[0][name] * weight).pow(2).sum() for name, weight in weights.items())  # type: ignore[return-value]

    loss().backward()
    for name in ("decoder.conv.2.weight", "decoder.fc.0.bias", "embed.weight"):
        values = ghn.get_parameter(name)
        assert values.grad is not None
        direction, step = torch.randn_like(values), 1e-6
        with torch.no_grad():
            values += step * direction
            above = loss()
            values -= 2 * step * direction
            below = loss()
            values += step * direction
        assert (above - below).item() / (2 * step) == pytest.approx(
            (values.grad * direction).sum().item(), rel=1e-4
        )


def test_filters_travel_with_the_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ghn = GHN(GHNConfig(**SMALL, identity=True, whitening=3.0)).eval()
    ghn.whiten(torch.randn(8, 3, 6, 6))
    ghn.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.config == ghn.config
    assert torch.equal(again.get_buffer("whitening"), ghn.get_buffer("whitening"))
    graph = chain(Node("conv", "stem", (16, 3, 3, 3)), Node("conv", "a", (16, 16, 1, 1)))
    for name, values in ghn(graph)[0].items():
        assert torch.equal(values, again(graph)[0][name])


def test_tiles_are_small_blocks_and_give_the_full_tensors() -> None:
    graph = chain(
        Node("conv", "stem", (16, 3, 7, 7)),
        Node("conv", "wide", (200, 136, 3, 3)),
        Node("sep_conv", "groups", (32, 4, 3, 3)),
        Node("sep_conv", "odd", (24, 6, 3, 3)),
        Node("conv", "large", (32, 32, 5, 5)),
        Node("conv", "turned", (32, 24, 2, 2), transposed=True),
    )
    torch.manual_seed(0)
    ghn = GHN(GHNConfig(**SMALL, identity=True, whitening=3.0))
    ghn.whiten(torch.randn(8, 3, 6, 6))
    (full,), tiles = ghn(graph), ghn.predict_tiles(graph)
    for name, values in full.items():
        assert torch.equal(tiles[name].expand(), values.detach())
        written = torch.empty_like(values)
        tiles[name].copy_into(written)
        assert torch.equal(written, values.detach())
    blocks = {name: tuple(tile.values.shape) for name, tile in tiles.items()}
    assert isinstance(tiles["wide"], Tile)
    assert blocks["wide"] == (8, 8, 3, 3)
    assert blocks["groups"] == (8, 4, 3, 3)
    assert blocks["odd"] == (24, 6, 3, 3)  # 6 does not divide 8
    assert blocks["large"] == (8, 8, 5, 5)
    assert blocks["stem"] == (8, 3, 7, 7)


def test_a_prior_that_is_larger_than_the_block_takes_no_memory_for_every_layer() -> None:
    """RegNet-Y-128GF has groups of 264: blocks as long as the layer would take 6.7 MB for each of 17."""
    layers = [Node("sep_conv", f"layer {i}", (2904, 264, 3, 3)) for i in range(5)]
    ghn = GHN(GHNConfig(hid=8, identity=True)).requires_grad_(False)
    tiles = ghn.predict_tiles(chain(Node("bn", "n", (2904,)), *layers))
    stored = {}
    for tile in tiles.values():
        parts = [tile.block] if tile.prior is None else [tile.block, tile.prior.values]
        stored |= {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in parts}
    blocks, identity = 5 * 64 * 64 * 9 * 4, 2904 * 64 * 4
    assert sum(stored.values()) < blocks + identity + 200_000
    assert tiles["layer 0"].sizes == (2904, 64, 3, 3) == tiles["layer 0"].values.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [None, 0.3])
def test_what_stands_apart_in_a_tile_is_added_before_it_is_rounded(
    dtype: torch.dtype, factor: float | None
) -> None:
    graph = chain(Node("bn", "n", (24,)), Node("sep_conv", "odd", (24, 6, 3, 3)))
    torch.manual_seed(0)
    ghn = GHN(GHNConfig(**SMALL, identity=True)).requires_grad_(False)
    (full,), tile = ghn(graph), ghn.predict_tiles(graph)["odd"]
    assert tile.block.shape == (8, 6, 3, 3)
    assert torch.equal(tile.first(9), full["odd"][:9])
    assert tile.block.shape == (8, 6, 3, 3)
    if factor is not None:
        tile = tile.scaled(factor).scaled(2 * factor)
    written = torch.empty_like(full["odd"], dtype=dtype)
    tile.copy_into(written)
    expected = full["odd"] * (1 if factor is None else 2 * factor**2)
    torch.testing.assert_close(written, expected.to(dtype), atol=1e-7, rtol=1e-6 if dtype.itemsize > 2 else 0)


def test_predicted_networks_begin_with_the_same_features() -> None:
    """A narrow and a wide network carry the stem's features to their ends."""
    config = GHNConfig(identity=True, whitening=3.0, hid=8)
    torch.manual_seed(0)
    ghn = GHN(config)
    ghn.whiten(torch.randn(32, 3, 8, 8))
    for layer in (ghn.decoder.conv[2], ghn.decoder.class_layer_predictor[1]):
        nn.init.zeros_(layer.weight)  # type: ignore[arg-type]
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    x, outputs = torch.randn(2, 3, 16, 16), []
    for width in (64, 128):
        network = nn.Sequential(
            nn.Conv2d(3, width, 3, bias=False), nn.Conv2d(width, 2 * width, 3, bias=False),
            nn.Conv2d(2 * width, width, 1, bias=False), nn.Flatten(1), nn.Linear(width * 144, 10, bias=False),
        )  # fmt: skip
        outputs.append(predict(network, ghn, scale="predicted")[:3](x))
    close(outputs[1][:, :64], outputs[0].detach())
    mixing = torch.linalg.matrix_power(half_mirrored(64), 2)
    stem = 3 * stem_filters(ghn.get_buffer("whitening"), 64, (3, 3))
    features = nn.functional.conv2d(x, stem)[:, :, 1:-1, 1:-1]
    torch.testing.assert_close(
        outputs[0], torch.einsum("oi,nihw->nohw", mixing, features), atol=1e-3, rtol=1e-4
    )


@pytest.mark.parametrize("value", [-1, 1e4, math.nan, "3", True])
def test_impossible_factors_are_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"whitening=.*expected a number from 0 to 1,000"):
        GHNConfig(whitening=value)


def test_whitening_without_the_option_does_nothing() -> None:
    ghn = GHN(GHNConfig(**SMALL))
    ghn.whiten(torch.randn(2, 3, 6, 6))
    assert "whitening" not in dict(ghn.named_buffers())
