"""Which blocks are chosen: windows and blocks where they should be, one choice for a group, nothing to come."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_models import CLOSE, LEVELS, SMALL, configs, make_qkv
from torch.testing import assert_close

from minicpm_lite.config import SparseConfig, load_sparse_config
from minicpm_lite.inference.block_choice import (
    WindowMeans,
    choose_blocks,
    levels,
    num_windows,
    window_means,
    window_scores,
    window_shares,
)


def choose(query: torch.Tensor, key: torch.Tensor, config: SparseConfig) -> torch.Tensor:
    """The choice of the newest queries in a text, (batch, kv_heads, queries, blocks)."""
    keys = key.shape[2]
    at = torch.arange(keys - query.shape[2], keys)[None]
    scores = [window_scores(query, window_means(key, *level)) for level in levels(config)]
    return choose_blocks(window_shares(scores, at, config), at, -(-keys // config.block_size), config)


# Windows


@settings(deadline=None)
@given(length=st.integers(0, 40), stride=st.integers(1, 5), times=st.integers(1, 4))
def test_means_are_those_of_every_whole_window(length, stride, times):
    key, size = make_qkv(keys=length)[1], stride * times
    starts = [start for start in range(0, length, stride) if start + size <= length]
    found = window_means(key, size, stride)
    assert found.shape[2] == num_windows(length, size, stride) == len(starts)
    for mean, start in zip(found.unbind(2), starts, strict=True):
        assert_close(mean, key[:, :, start : start + size].mean(2), **CLOSE)


def test_means_of_bfloat16_are_rounded_once():
    key = make_qkv(keys=64)[1].bfloat16()
    assert torch.equal(window_means(key, 32, 16), window_means(key.double(), 32, 16).bfloat16())


@settings(max_examples=60, deadline=None)
@given(
    pieces=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    starts=st.lists(st.integers(0, 12), min_size=2, max_size=2),
    back=st.integers(0, 30),
    rows=st.permutations(range(2)),
)
def test_kept_means_are_those_of_each_rows_text(pieces, starts, back, rows):
    """However it grows, after it went back and went on otherwise, and after its rows were moved."""
    key, other = make_qkv(keys=60)[1], make_qkv(keys=60, seed=1)[1]
    means, length = WindowMeans(4, 2), 0

    def holds() -> None:
        for row, start in enumerate(starts):
            alone = window_means(key[row : row + 1, :, start:length], 4, 2)
            assert_close(means.means[row : row + 1, :, : alone.shape[2]], alone, **CLOSE)

    for piece in pieces:
        length += piece
        means.extend(key[:, :, :length], starts, 60)
        holds()
    back = min(back, length)
    means.forget([back - start for start in starts])
    key[:, :, back:] = other[:, :, back:]
    means.extend(key[:, :, :length], starts, 60)
    holds()
    means.select(rows)
    key, starts = key[rows], [starts[row] for row in rows]
    holds()
    assert means.nbytes == 2 * 2 * num_windows(60, 4, 2) * 8 * 8


def test_scores_are_scaled_products_with_the_groups_own_means():
    query, key, _ = make_qkv(queries=3, keys=9)
    scores = window_scores(query, key)
    for head in range(6):
        expected = query[:, head] @ key[:, head // 3].mT / math.sqrt(8)
        assert_close(scores[:, head // 3, head % 3], expected, **CLOSE)


# Blocks


@settings(max_examples=60, deadline=None)
@given(config=configs(), length=st.integers(1, 70))
def test_every_query_chooses_as_many_blocks_as_it_should_and_none_to_come(config, length):
    query, key, _ = make_qkv(batch=1, queries=length, keys=length)
    chosen = choose(query, key, config)[0]
    for place, blocks in enumerate(chosen.unbind(1)):
        own = place // config.block_size
        assert not blocks[:, own + 1 :].any(), "a block that is still to come"
        expected = own + 1 if place < config.all_visible else config.num_blocks
        assert bool((blocks.sum(-1) == expected).all())
        assert bool(blocks[:, max(0, own - config.local_blocks + 1) : own + 1].all()), "the window"
        assert bool(blocks[:, : min(config.init_blocks, own + 1)].all()), "the beginning"
        visible = (blocks.sum(-1) - 1) * config.block_size + place % config.block_size + 1
        assert bool((visible == config.num_visible(place + 1)).all())


@pytest.mark.parametrize("config", LEVELS.values(), ids=LEVELS)
def test_what_is_to_come_changes_no_choice(config):
    """Every later key is exchanged, of each query in turn; a window that ends with the query's own counts."""
    query, key, _ = make_qkv(batch=1)
    chosen, other = choose(query, key, config), make_qkv(batch=1, seed=1)[1] * 9
    for place in range(50):
        changed = torch.cat([key[:, :, : place + 1], other[:, :, place + 1 :]], dim=2)
        assert torch.equal(choose(query, changed, config)[:, :, place], chosen[:, :, place])


def aligned(key_at: list[int], keys: int, query_at: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys of zeros but for some, which the query at a place looks for."""
    key, query = torch.zeros(1, 1, keys, 8, dtype=torch.float64), torch.zeros(1, 1, 1, 8, dtype=torch.float64)
    key[:, :, key_at, 3], query[..., 3] = 9.0, 9.0
    return query, key[:, :, : query_at + 1]


@pytest.mark.parametrize("config", LEVELS.values(), ids=LEVELS)
@pytest.mark.parametrize("needle", range(4, 60))
def test_the_block_of_a_needle_is_chosen(needle, config):
    """Wherever it stands in its block; near a border, where a window reaches over, so is the neighbour."""
    config = replace(config, topk=3, coarse_topk=config.coarse_topk and 3)
    query, key = aligned([needle], 64, 63)
    chosen = choose(query, key, config)[0, 0, 0].nonzero().flatten().tolist()
    assert needle // 4 in chosen
    neighbour = needle // 4 + (-1 if needle % 4 < 2 else 1)
    assert len({0, needle // 4, neighbour, 15}) < 4 or neighbour in chosen


@pytest.mark.parametrize("block", range(1, 14))
def test_windows_that_reach_over_a_border_count_for_both_blocks(block):
    """Of windows of four tokens, two apart, the one in the middle between two blocks makes them tie."""
    config = replace(SMALL, topk=3)
    query, key = aligned([4 * block + 3, 4 * block + 4], 64, 63)
    chosen = choose(query, key, config)[0, 0, 0].nonzero().flatten().tolist()
    assert chosen == sorted({0, block, block + 1, 15} | ({1} if block == 14 else set()))


@pytest.mark.parametrize("block", range(1, 14))
def test_of_two_blocks_that_tie_the_earlier_is_chosen(block):
    query, key = aligned([4 * block + 3, 4 * block + 4], 64, 63)
    assert choose(query, key, SMALL)[0, 0, 0].nonzero().flatten().tolist() == [0, block, 15]


def test_the_heads_of_a_group_choose_by_their_sum():
    """Two heads look a little for one block and one head much for another; with other weights it turns."""
    query, key = torch.zeros(1, 3, 1, 8, dtype=torch.float64), torch.zeros(1, 1, 64, 8, dtype=torch.float64)
    key[:, :, 20:24, 0], key[:, :, 40:44, 1] = 1.0, 1.0
    query[:, :2, :, 0], query[:, 2, :, 1] = 12.0, 14.0
    assert choose(query, key, SMALL)[0, 0, 0].nonzero().flatten().tolist() == [0, 5, 15]
    query[:, :2, :, 0] = 4.0
    assert choose(query, key, SMALL)[0, 0, 0].nonzero().flatten().tolist() == [0, 10, 15]


def test_dense_below_a_length():
    query, key, _ = make_qkv(batch=1)
    chosen = choose(query, key, replace(SMALL, dense_len=30))
    counts = chosen[0, 0].sum(-1).tolist()
    assert counts[:29] == [place // 4 + 1 for place in range(29)]  # a query at place 28 sees 29 tokens
    assert counts[29:] == [3] * 21


@pytest.mark.parametrize(
    ("length", "visible"),
    [(4096, 4096), (8191, 8191), (8192, 6144), (8193, 6081), (32_768, 6144), (131_072, 6144)],
)
def test_tokens_that_a_query_attends_to(length, visible):
    """Of 128K 4.7 %: published is less than 5 %; of 32K 19 %: published is a sparsity of 81 %."""
    config, place = load_sparse_config("minicpm4-8b"), length - 1
    query, key, _ = make_qkv(1, 2, 1, queries=1, keys=length)
    blocks = choose(query, key, config)[0, 0, 0].nonzero().flatten()
    assert sum(min(64, length - 64 * block) for block in blocks.tolist()) == visible
    assert config.num_visible(length) == visible and blocks[-1] == place // 64


# Coarse means


def test_a_coarse_mean_is_the_mean_of_four_fine_ones():
    key, config = make_qkv()[1], replace(SMALL, approximate_lse=True)
    fine, coarse = (window_means(key, *level) for level in levels(config))
    assert levels(config) == [(4, 2), (16, 8)] and levels(SMALL) == [(4, 2)]
    for c in range(coarse.shape[2]):
        assert_close(coarse[:, :, c], fine[:, :, 4 * c : 4 * c + 7 : 2].mean(2), **CLOSE)


def overlap(one: torch.Tensor, other: torch.Tensor, config: SparseConfig) -> float:
    """Of the blocks that are free to choose, the share that both choose."""
    free = config.num_blocks - config.local_blocks - config.init_blocks
    forced = config.num_blocks - free
    return (((one & other).sum(-1) - forced).float() / free).mean().item()


def test_approximate_sums_choose_almost_the_same_blocks():
    """At the released sizes, of queries that look for something: keys of the text, and noise."""
    exact = replace(load_sparse_config("minicpm4-8b"), topk=16, window_size=256, dense_len=0)
    random = torch.Generator().manual_seed(0)
    key = torch.randn(1, 2, 8192, 64, generator=random)
    key = key.cumsum(2) / torch.arange(1, 8193)[:, None].sqrt() + key  # neighbours are alike
    sought = torch.randint(7000, (1, 2, 16, 8), generator=random)
    query = key.gather(2, sought.flatten(2)[..., None].expand(-1, -1, -1, 64)).reshape(1, 32, 8, 64)
    mine = choose(query, key, exact)
    approximate = choose(query, key, replace(exact, approximate_lse=True))
    shuffled = torch.rand(mine.shape, generator=random) < 0.15
    assert overlap(mine, approximate, exact) > 0.95 > overlap(mine, shuffled, exact)
    recalls = [
        overlap(mine, choose(query, key, replace(exact, coarse_topk=c)), exact) for c in (16, 32, 64, 128)
    ]
    assert recalls == sorted(recalls) and recalls[0] < 0.9 and recalls[-1] > 0.95, recalls
