"""Aligned channels: stretches by hand and against a channel-by-channel account; tiles, shares, gradients."""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ghn_init import GHN, ConfigError, GHNConfig, Graph, Node, predict, trace
from ghn_init._graph import structure
from ghn_init._graph.graph import graph_from_edges
from ghn_init._hypernetwork.channels import of_parameter, per_place, shares, side_by_side, stretches_read
from ghn_init._hypernetwork.priors import handed_out
from ghn_init._hypernetwork.tile import Prior, Tile, full_size, sum_repeats, tile_to
from ghn_init._writing import calm, scale

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 8
SMALL = {"hid": 8, "max_shape": (BLOCK, BLOCK, 3, 3)}

parts_of_channels = st.lists(
    st.lists(st.integers(1, 3 * BLOCK), min_size=1, max_size=3), min_size=1, max_size=5
)


def ghn_of(**changes: Any) -> GHN:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GHN(GHNConfig(**{**SMALL, "aligned": True, **changes})).requires_grad_(False)


def read_by(graph: Graph) -> dict[str | None, tuple[int, ...]]:
    """The stretches that each parameter's node reads, by the parameter's name."""
    found = stretches_read(graph, BLOCK, handed_out(graph))
    return {node.param: found[index] for index, node in enumerate(graph.nodes)}


def places(stretches: tuple[int, ...]) -> list[int]:
    """The place of every channel."""
    return [channel % BLOCK for length in stretches for channel in range(length)]


# Stretches


def test_parts_share_a_block_where_they_fit_and_begin_one_where_they_do_not() -> None:
    assert side_by_side([(12,), (12,)], BLOCK) == (12, 12)
    assert side_by_side([(16,), (16,)], BLOCK) == (32,)  # whole blocks go on
    assert side_by_side([(4,), (4,), (4,)], BLOCK) == (12,)
    assert side_by_side([(3,), (3,), (3,)], BLOCK) == (6, 3)
    assert side_by_side([(8,), (12, 12), (4,)], BLOCK) == (20, 16)
    assert side_by_side([(6,), (12, 12)], BLOCK) == (6, 12, 12)
    assert side_by_side([(6,), ()], BLOCK) == ()
    assert side_by_side([(5,)], BLOCK) == (5,)


@given(parts_of_channels)
def test_a_concatenation_keeps_the_places_of_parts_that_do_not_share_a_block(parts: list[list[int]]) -> None:
    whole: tuple[int, ...] = ()
    for part in [side_by_side([(n,) for n in lengths], BLOCK) for lengths in parts]:
        before, whole = whole, side_by_side([s for s in (whole, part) if s], BLOCK)
        known, added = places(whole)[: sum(before)], places(whole)[sum(before) :]
        assert known == places(before)
        used = before[-1] % BLOCK if before else 0
        shares_a_block = used + sum(part) <= BLOCK
        assert added == [place + used * shares_a_block for place in places(part)]
    assert sum(whole) == sum(map(sum, parts))


def test_stretches_are_followed_through_a_graph() -> None:
    nodes = [
        Node("input"),
        Node("conv", "stem", (12, 3, 3, 3)),  # 1
        Node("bn", "n", (12,), bias="n.bias"),
        Node("conv", "a", (12, 12, 1, 1)),  # 3
        Node("conv", "b", (12, 12, 1, 1)),  # 4
        Node("sum"),  # 5: 3 and 4
        Node("concat"),  # 6: 5 and 2
        Node("avg_pool", None, (1, 1, 2, 2)),
        Node("bn", "wide", (24,), bias="wide.bias"),  # 8
        Node("sep_conv", "depthwise", (24, 1, 3, 3)),  # 9
        Node("bias", "bias", (24,)),
        Node("conv", "half 1", (6, 24, 1, 1)),  # 11
        Node("conv", "half 2", (6, 24, 1, 1)),  # 12
        Node("concat"),
        Node("conv", "after", (8, 12, 1, 1)),  # 14
        Node("sep_conv", "groups", (8, 4, 1, 1)),
        Node("glob_avg"),
        Node("conv", "head", (10, 8)),
    ]
    edges = [
        (0, 1), (1, 2), (2, 3), (2, 4), (3, 5), (4, 5), (5, 6), (2, 6), *pairwise(range(6, 12)), (10, 12),
        (11, 13), (12, 13), *pairwise(range(13, 18)),
    ]  # fmt: skip
    read = read_by(graph_from_edges(nodes, edges))
    assert read["stem"] == ()
    assert read["n"] == read["a"] == (12,)
    assert read["wide"] == read["depthwise"] == read["bias"] == read["half 1"] == (12, 12)
    assert read["after"] == (12,)  # the halves are one output in pieces
    assert of_parameter((6, 24, 1, 1), (12, 12)) == (12, 12) == of_parameter((24,), (12, 12))
    assert of_parameter((6, 12, 1, 1), (12,)) == ()
    assert of_parameter((6, 48), (12, 12)) == ()  # of flattened maps, say


def test_what_is_added_up_keeps_its_places_if_all_agree() -> None:
    def graph(*second: Node) -> Graph:
        nodes = [
            Node("input"), Node("conv", "a", (12, 3, 1, 1)), Node("conv", "b", (12, 3, 1, 1)),
            Node("bn", "n", (12,)), Node("concat"), *second, Node("sum"), Node("conv", "c", (4, 24, 1, 1)),
        ]  # fmt: skip
        last = len(nodes) - 2
        return graph_from_edges(nodes, [(0, 1), (0, 2), (2, 3), (1, 4), (3, 4), (4, last), (4, 5),
                                        *([(5, last)] if second else []), (last, last + 1)])  # fmt: skip

    assert read_by(graph(Node("max_pool", None, (1, 1, 3, 3))))["c"] == (12, 12)
    assert read_by(graph(Node("conv", "other", (24, 24, 1, 1))))["c"] == (24,)


# Shares


@given(st.lists(st.integers(1, 3 * BLOCK), min_size=1, max_size=4), st.integers(1, BLOCK))
def test_all_places_have_the_same_share(lengths: list[int], size: int) -> None:
    stretches, size = tuple(lengths), min(size, max(lengths))
    counts = per_place(stretches, size)
    assert sum(counts) == sum(stretches)
    factors = shares(stretches, size)
    if factors is None:
        assert len(set(counts)) == 1
        return
    weighed = torch.tensor(counts) * factors
    torch.testing.assert_close(weighed, torch.full((size,), sum(counts) / size))


@pytest.mark.parametrize("width", [8, 12, 14, 20])
def test_layers_of_every_width_do_the_same_to_the_places(width: int) -> None:
    """With equal channels at a place a layer gives what one of a block's width does, but for the scale."""
    graph = graph_from_edges(
        [Node("input"), Node("conv", "a", (width, 3, 1, 1)), Node("conv", "b", (width, 3, 1, 1)),
         Node("bn", "n", (width,)), Node("concat"), Node("conv", "c", (width, 2 * width, 1, 1)),
         Node("conv", "head", (10, width))],
        [(0, 1), (0, 2), (2, 3), (1, 4), (3, 4), (4, 5), (5, 6)],
    )  # fmt: skip
    ghn = ghn_of(identity=True)
    tile = ghn.predict_tiles(graph)["c"]
    assert tile.block.shape == (BLOCK, BLOCK, 1, 1)
    weight = tile.expand()[:, :, 0, 0]
    batch = ghn.batch(graph)
    names = [group.members[0][1] for group in batch.groups]
    raw = ghn.blocks(batch, raw=True)[names.index("c")]
    x = torch.randn(BLOCK)
    at = torch.tensor(places((width,)))
    identity = torch.block_diag(*[torch.tensor([[1.0, -0.5], [-0.5, 1.0]])] * (BLOCK // 2))
    decoded = raw[0, :, :, 0, 0] * math.sqrt(2 / (2 * width)) * (2 * width / BLOCK)
    torch.testing.assert_close(weight @ x[at].repeat(2), (decoded @ x + identity @ x)[at])


# Tiles

CASES = [
    ((5, 14, 3, 3), (4, 6, 3, 3), (9, 5), False),
    ((7, 12, 1, 1), (4, 4, 1, 1), (6, 6), True),
    ((3, 20), (3, 8), (2, 10, 8), False),
    ((10, 1, 3, 3), (6, 1, 3, 3), (6, 4), False),
    ((11,), (4,), (9, 2), False),
]


@pytest.mark.parametrize(("shape", "sizes", "stretches", "transposed"), CASES)
def test_a_block_begins_anew_in_every_stretch(
    shape: tuple[int, ...], sizes: tuple[int, ...], stretches: tuple[int, ...], transposed: bool
) -> None:
    blocks = torch.randn(2, *sizes, dtype=torch.float64, requires_grad=True)
    stored = (shape[1], shape[0], *shape[2:]) if transposed else shape
    axis = 0 if len(shape) == 1 or shape[1] == 1 else 1
    index = [torch.arange(n) % size for n, size in zip(shape, sizes, strict=True)]
    index[axis] = torch.tensor([c % sizes[axis] for length in stretches for c in range(length)])
    expected = blocks.detach()[(slice(None), *torch.meshgrid(*index, indexing="ij"))]
    expected = expected.transpose(1, 2) if transposed else expected
    full = full_size(blocks, shape, stored, transposed=transposed, stretches=stretches)
    assert torch.equal(torch.stack(full), expected)
    assert torch.autograd.gradcheck(
        lambda x: full_size(x, shape, stored, transposed=transposed, stretches=stretches), (blocks,)
    )
    tile = Tile(blocks.detach()[0], shape, stored, transposed, None, stretches)
    written = torch.zeros(stored, dtype=torch.float64)
    tile.copy_into(written)
    assert torch.equal(written, expected[0])
    assert torch.equal(tile.expand(), expected[0])
    rms = expected[0].square().mean().sqrt()
    assert float(scale._rms(tile)) == pytest.approx(float(rms))
    if len(shape) > 1:
        rows = (expected[0].transpose(0, 1) if transposed else expected[0]).flatten(1)
        gram = scale._filters(tile)
        torch.testing.assert_close((gram @ gram.T).double(), rows @ rows.T, atol=1e-4, rtol=1e-5)


def test_repeating_and_summing_are_adjoint() -> None:
    for shape, sizes, stretches, _ in CASES:
        block, full = torch.randn(1, *sizes).double(), torch.randn(1, *shape).double()
        there = (tile_to(block, shape, stretches) * full).sum()
        back = (block * sum_repeats(full, sizes, stretches)).sum()
        torch.testing.assert_close(there, back)


def test_what_a_prior_changes_begins_anew_too() -> None:
    block, values = torch.randn(4, 6, 3, 3), torch.randn(4, 6)
    tile = Tile(block, (8, 14, 5, 5), (8, 14, 5, 5), False, Prior((4, 6, 5, 5), (2, 2), values), (9, 5))
    written = torch.zeros(8, 14, 5, 5)
    tile.copy_into(written)
    torch.testing.assert_close(written, tile.expand())
    assert tile.tiled
    assert float(scale._rms(tile)) == pytest.approx(float(written.double().square().mean().sqrt()))


# Whole networks


class Wide(nn.Module):
    """Two states of a width that is no multiple of a block's, put side by side."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width))
        self.left, self.right = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 3, padding=1)
        self.norm, self.depthwise = (
            nn.BatchNorm2d(2 * width),
            nn.Conv2d(2 * width, 2 * width, 3, groups=2 * width),
        )
        self.up, self.head = nn.ConvTranspose2d(2 * width, width, 3), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = torch.cat([self.left(x).relu(), self.right(x).relu()], 1)
        return self.head(self.up(self.depthwise(self.norm(x)).relu()).relu().mean((2, 3)))


def test_predict_writes_what_the_hypernetwork_gives() -> None:
    net, ghn = Wide(), ghn_of(identity=True, whitening=3.0)
    graph = trace(net, (1, 3, 16, 16))
    (expected,) = ghn(graph)
    tiles = ghn.predict_tiles(graph)
    assert {name for name, tile in tiles.items() if tile.stretches} == {
        "norm.weight", "norm.bias", "depthwise.weight", "depthwise.bias", "up.weight"
    }  # fmt: skip
    for name, tile in tiles.items():
        torch.testing.assert_close(tile.expand(), expected[name])
        assert expected[name].shape == net.get_parameter(name).shape
    halves = expected["norm.weight"].split(12)
    assert torch.equal(*halves)  # both states are read at the same places
    assert not torch.equal(*ghn_of(aligned=False)([graph])[0]["norm.weight"].split(12))


class Flattened(nn.Module):
    """A hidden layer that reads all pixels of two states side by side, with a batch norm before or not."""

    def __init__(self, normed: bool = True, width: int = 12) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width) if normed else nn.Identity()
        self.left, self.right = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        self.hidden = nn.Linear(2 * width * 16, 24)
        self.back, self.head = nn.Conv2d(24, 24, 1), nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = torch.cat([self.left(x).relu(), self.right(x).relu()], 1)
        x = self.hidden(F.max_pool2d(x, 2).flatten(1)).relu()
        return self.head(self.back(x[:, :, None, None]).relu().flatten(1))


@pytest.mark.parametrize("identity", [False, True])
def test_a_layer_that_reads_all_pixels_is_predicted_for_their_means(identity: bool) -> None:
    graph, ghn = trace(Flattened(), (1, 3, 8, 8)), ghn_of(identity=identity)
    (expected,) = ghn(graph)
    weight = expected["hidden.weight"].unflatten(1, (24, 16))
    assert torch.equal(weight, weight[:, :, :1].expand_as(weight))
    assert torch.equal(weight[:, :12], weight[:, 12:])  # both states are read at the same places
    assert not torch.equal(weight[:, 0], weight[:, 1])
    tile = ghn.predict_tiles(graph)["hidden.weight"]
    written = torch.zeros(24, 2 * 12 * 16)
    tile.copy_into(written)
    for values in (tile.expand(), written):
        torch.testing.assert_close(values, expected["hidden.weight"])


class HalfSilent(nn.Module):
    """A classifier of features of which half are zeros, as where a state of a cell has no operations."""

    def __init__(self, grid: int = 1) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12)
        self.pool, self.head = nn.AdaptiveAvgPool2d(grid), nn.Linear(24 * grid**2, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        return self.head(self.pool(torch.cat([x, torch.zeros_like(x)], 1)).flatten(1))


class Grid(HalfSilent):
    """All features there, pooled to a grid."""

    def __init__(self) -> None:
        super().__init__(2)
        self.head = nn.Linear(12 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.norm(self.stem(x)).relu()).flatten(1))


def test_features_that_are_all_zeros_are_no_pixels() -> None:
    graph, grid = trace(HalfSilent(), (1, 3, 8, 8)), trace(Grid(), (1, 3, 8, 8))
    assert not any(structure.reads_places(graph))
    assert any(structure.reads_places(grid))
    assert pixels_of(graph)["head.weight"] == 1
    assert pixels_of(grid)["head.weight"] == 4
    # The features are the first 12 inputs, and so read with the first 12 columns of the block, over and over.
    columns = ghn_of()(graph)[0]["head.weight"].T
    assert torch.equal(columns[:BLOCK], columns[BLOCK : 2 * BLOCK])
    assert not torch.equal(columns[0], columns[1])


def pixels_of(graph: Graph) -> dict[str, int]:
    return {name: group.key.pixels for group in ghn_of().batch(graph).groups for _, name in group.members}


def test_what_is_predicted_for_means_has_the_scale_of_a_layer_that_reads_them() -> None:
    ghn = ghn_of()
    batch = ghn.batch(trace(Flattened(), (1, 3, 8, 8)))
    place = [group.members[0][1] for group in batch.groups].index("hidden.weight")
    (raw,) = ghn.blocks(batch, raw=True)[place]
    assert raw.shape == (BLOCK, BLOCK)
    # Each of its 8 places has 4 or 2 of the 24 channels, and the same share.
    columns = torch.tensor([4.0] * 4 + [2.0] * 4)
    of_means = raw * math.sqrt(2 / 24) * (24 / BLOCK / columns)
    expected = of_means.repeat(3, 1)[:, [*range(8), *range(4)] * 2]
    (predicted,) = ghn(trace(Flattened(), (1, 3, 8, 8)))
    torch.testing.assert_close(predicted["hidden.weight"].unflatten(1, (24, 16)).sum(2), expected)


def test_the_identity_carries_the_mean_of_a_channel() -> None:
    graph = trace(Flattened(), (1, 3, 8, 8))
    ghns = [ghn_of(identity=identity) for identity in (False, True)]
    ghns[1].load_state_dict(ghns[0].state_dict())
    plain, carrying = (ghn(graph)[0]["hidden.weight"].unflatten(1, (24, 16)).sum(2) for ghn in ghns)
    identity = torch.block_diag(*[torch.tensor([[1.0, -0.5], [-0.5, 1.0]])] * (BLOCK // 2))
    averaged = identity / torch.tensor([4.0] * 4 + [2.0] * 4)  # over the channels at a place
    torch.testing.assert_close(carrying - plain, averaged.repeat(3, 1)[:, [*range(8), *range(4)] * 2])


def test_gradients_reach_what_is_predicted_for_means() -> None:
    ghn = ghn_of().requires_grad_()
    graph = trace(Flattened(), (1, 3, 8, 8))

    def total() -> Tensor:
        return ghn(graph)[0]["hidden.weight"].unflatten(1, (24, 16)).cumsum(2).sum()

    total().backward()
    decoder = ghn.decoder.conv[2]
    assert decoder.bias.grad is not None
    with torch.no_grad():
        before = total()
        decoder.bias += 1e-2 * (step := decoder.bias.grad)
        torch.testing.assert_close(total() - before, 1e-2 * step.square().sum(), rtol=1e-2, atol=1e-4)


def test_without_batch_norms_and_without_the_option_pixels_are_counted_on() -> None:
    graphs = {normed: trace(Flattened(normed), (1, 3, 8, 8)) for normed in (False, True)}
    for normed, aligned in ((False, True), (True, False), (False, False)):
        groups = ghn_of(aligned=aligned).batch(graphs[normed]).groups
        assert all(group.key.pixels == 1 for group in groups)
    pixels = {group.members[0][1]: group.key.pixels for group in ghn_of().batch(graphs[True]).groups}
    assert pixels.pop("hidden.weight") == 16
    assert set(pixels.values()) == {1}


def test_predict_at_the_own_scale_is_the_same_the_second_time() -> None:
    torch.manual_seed(1)
    net, ghn = Wide(), ghn_of(identity=True, whitening=3.0)
    predict(net, ghn, example_input=(1, 3, 16, 16))
    first = copy.deepcopy(net.state_dict())
    predict(net, ghn, example_input=(1, 3, 16, 16))
    for name, values in net.state_dict().items():
        torch.testing.assert_close(values, first[name], msg=lambda text, name=name: f"{name}: {text}")


def test_a_prediction_that_is_there_is_known_again() -> None:
    class Row:
        def __init__(self, tile: Tile, param: Tensor) -> None:
            self.tile, self.param, self.computed = tile, param, None

    block = torch.randn(8, 8, 1, 1)
    for stretches in ((2, 16), (12, 6)):
        tile = Tile(block, (8, 18, 1, 1), (8, 18, 1, 1), False, None, stretches)
        assert calm.is_there(Row(tile, tile.expand()))  # pyright: ignore[reportArgumentType]
        assert not calm.is_there(Row(tile, torch.randn(8, 18, 1, 1)))  # pyright: ignore[reportArgumentType]


def test_without_the_option_everything_is_as_published() -> None:
    assert not GHNConfig().aligned
    graph = trace(Wide(), (1, 3, 16, 16))
    assert all(group.key.stretches == () for group in ghn_of(aligned=False).batch(graph).groups)
    with pytest.raises(ConfigError, match="aligned=1; expected true or false"):
        GHNConfig(aligned=1)  # pyright: ignore[reportArgumentType]
