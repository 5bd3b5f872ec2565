"""The kernel for sparse attention: what PyTorch computes, whatever the shapes, the threads and the processor."""

import warnings
from dataclasses import replace
from functools import cache

import pytest
import torch
from compiling import OTHER_PROCESSORS, for_another, in_place_of_ours, mistaken
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_models import LEVELS, SMALL, configs, make_ids, make_model
from torch.testing import assert_close

from minicpm_lite.config import SparseConfig, load_sparse_config
from minicpm_lite.inference import sparse_attention
from minicpm_lite.inference.block_choice import WindowMeans, levels
from minicpm_lite.inference.sparse_attention import SparseCache, SparseContext, attend_text, attend_tiles
from minicpm_lite.kernels import attention, build

CLOSE = dict(atol=2e-5, rtol=2e-5)


@pytest.fixture(autouse=True, scope="module")
def kernel_is_built() -> None:
    assert build.built("attention")


def make_text(
    rows: int, heads: int, kv_heads: int, queries: int, keys: int, dim: int, starts: list[int], seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, and keys and values as a cache has them, with room behind; and where each row begins."""
    random = torch.Generator().manual_seed(seed)
    query = torch.randn(rows, heads, queries, dim, generator=random)
    key, value = (
        torch.randn(rows, kv_heads, keys + room, dim, generator=random)[:, :, :keys] for room in (3, 5)
    )
    return query, key, value, torch.tensor(starts)


def make_means(key: torch.Tensor, starts: torch.Tensor, config: SparseConfig) -> list[torch.Tensor]:
    """Of the windows of each row, from where it begins, with room behind and what means nothing."""
    kept = [WindowMeans(*level) for level in levels(config)]
    for each in kept:
        each.extend(key, starts.tolist() * (len(key) // len(starts)), key.shape[2] + 9)
        for row, whole in enumerate(each._whole):
            each._kept[row, :, whole:] = torch.nan
    return [each.means for each in kept]


def by_torch(query, key, value, means, starts, config) -> torch.Tensor:
    """The same in PyTorch and float64; queries that are no text as the kernel leaves them."""
    exact = attend_tiles(
        query.double(), key.double(), value.double(), [m.double() for m in means], starts, config
    )
    at = torch.arange(key.shape[2] - query.shape[2], key.shape[2]) - starts[:, None]
    return exact.masked_fill((at < 0)[:, None, :, None], 0)


def differs(kernel, query, key, value, starts, config) -> bool:
    """Whether a kernel gives something else than PyTorch, but for queries whose choice hangs on rounding."""
    means = make_means(key, starts, config)
    expected = by_torch(query, key, value, means, starts, config)
    nudged = by_torch(query * (1 + 1e-5), key, value, means, starts, config)
    firm = (nudged - expected).abs().amax((1, 3)) < 1e-3  # (rows, queries)
    found = kernel(query, key, value, means, starts, config)
    off = (found - expected).abs().amax((1, 3))
    assert firm.float().mean() > 0.8
    return not bool((off[firm] < 1e-4).all())


@st.composite
def texts(draw) -> tuple:
    queries, rows = draw(st.integers(1, 30)), draw(st.sampled_from([1, 2]))
    keys = queries + draw(st.integers(0, 40))
    kv_heads, group = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2, 3, 4, 5, 8, 12, 16, 17, 32]))
    starts = draw(st.lists(st.integers(0, keys - 1), min_size=rows, max_size=rows) | st.just([0]))
    dim = draw(st.sampled_from([2, 8, 16, 18, 33]))
    return make_text(rows, kv_heads * group, kv_heads, queries, keys, dim, starts, draw(st.integers(0, 9)))


@settings(max_examples=150, deadline=None)
@given(text=texts(), config=configs(), threads=st.sampled_from([1, 3]))
def test_it_is_what_pytorch_computes(text, config, threads):
    """Some threads for one token of one group share it out, and many tokens among them."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert not differs(attend_text, *text, config)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("name", LEVELS)
def test_a_token_at_the_released_sizes(name, threads):
    released = replace(load_sparse_config("minicpm4-8b"), approximate_lse=name == "approximate",
                       coarse_topk=100 if name == "two levels" else None)  # fmt: skip
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert not differs(attend_text, *make_text(1, 32, 2, 1, 20_000, 128, [0]), released)
    finally:
        torch.set_num_threads(before)


def test_all_blocks_are_dense():
    query, key, value, starts = make_text(2, 8, 2, 5, 300, 16, [0])
    found = attend_text(query, key, value, [key], starts, replace(SMALL, dense_len=301))
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, torch.ones(5, 300, dtype=torch.bool).tril(295), enable_gqa=True
    )
    assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_layouts_that_are_not_those_of_a_cache():
    query, key, value, starts = make_text(2, 8, 2, 5, 60, 16, [0])
    means = make_means(key, starts, SMALL)
    expected = attend_text(query, key, value, means, starts, SMALL)
    turned = (each.transpose(1, 2).contiguous().transpose(1, 2) for each in (query, key, value))
    means = [means[0].mT.contiguous().mT]
    assert torch.equal(attend_text(*turned, means, starts, SMALL), expected)


def test_scores_that_are_far_apart():
    query, key, value, starts = make_text(1, 8, 2, 20, 60, 16, [0])
    for config in LEVELS.values():
        for scale in (1e3, 1e-6, 0.0):
            means = make_means(key, starts, config)
            assert bool(attend_text(query * scale, key, value, means, starts, config).isfinite().all())


def test_what_is_no_number_stays_none():
    """In a query, or in a key that it attends to; and others do not get it."""
    query, key, value, starts = make_text(1, 4, 1, 8, 60, 16, [0])
    query[0, 2, 5, 3] = torch.nan
    for config in LEVELS.values():
        found = attend_text(query, key, value, make_means(key, starts, config), starts, config)
        assert bool(found[0, 2, 5].isnan().all()) and not bool(
            found[0, :, [0, 1, 2, 3, 4, 6, 7]].isnan().any()
        )
    query[0, 2, 5, 3], key[0, 0, 57, 0] = 0.0, torch.nan
    for config in LEVELS.values():
        found = attend_text(query, key, value, make_means(key, starts, config), starts, config)
        assert bool(found[0, :, 5].isnan().all()) and not bool(found[0, :, :5].isnan().any())


def test_what_it_takes_and_what_it_leaves_to_pytorch(monkeypatch):
    query, key, value, _ = make_text(1, 32, 1, 2, 9, 4, [0])
    assert attention.possible(query, key, value)
    assert not attention.possible(query.double(), key, value)
    assert not attention.possible(query, key.bfloat16(), value.bfloat16())
    assert not attention.possible(torch.cat([query, query], dim=1), key, value)
    assert not attention.possible(query, key, value[..., :2])
    assert not attention.possible(query, key.clone().requires_grad_(), value)
    with torch.no_grad():
        assert attention.possible(query, key.clone().requires_grad_(), value)
    monkeypatch.setattr(attention, "built", lambda source: False)
    assert not attention.possible(query, key, value)


@pytest.mark.parametrize("name", LEVELS)
@torch.no_grad()
def test_a_model_reads_and_writes_with_it(name, monkeypatch):
    """Padded, in pieces and token by token, as with PyTorch alone."""
    model, ids, padding, config = (
        make_model().float(),
        make_ids(3, 90),
        torch.tensor([0, 7, 31]),
        LEVELS[name],
    )
    cache = SparseCache(90, config, padding)
    pieces = torch.cat([model(piece, cache) for piece in ids.tensor_split([50, 51, 52, 80], dim=1)], dim=1)
    monkeypatch.setattr(attention, "built", lambda source: False)
    for row, pad in enumerate(padding.tolist()):
        alone = model(ids[row : row + 1, pad:], SparseContext(config))
        assert_close(pieces[row : row + 1, pad:], alone, atol=1e-3, rtol=1e-3)


def test_the_operator_tells_its_shape():
    query, key, value, starts = make_text(1, 8, 2, 5, 60, 16, [0])
    means = make_means(key, starts, SMALL)
    arguments = (query, key, value, means[0], means[0], starts, 4, 2, 4, 1, 1, 3, 12, False, 0)
    torch.library.opcheck(torch.ops.minicpm_lite.sparse_attention, arguments)


def test_without_a_compiler_pytorch_computes_the_same(monkeypatch, tmp_path):
    query, key, value, starts = make_text(1, 8, 2, 5, 60, 16, [0])
    expected = sparse_attention.sparse_attention(query, key, value, SMALL)
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    monkeypatch.setattr(build, "_load", cache(build._load.__wrapped__))
    with pytest.warns(UserWarning, match=r"attention.cpp could not be built.*cannot be run"):
        assert_close(sparse_attention.sparse_attention(query, key, value, SMALL), expected, **CLOSE)
    with warnings.catch_warnings(action="error"):  # said once
        sparse_attention.sparse_attention(query, key, value, SMALL)


# Other processors, and mistakes


CASES = [
    (make_text(2, 6, 2, 40, 70, 8, [0]), SMALL),
    (make_text(1, 16, 1, 1, 200, 16, [3]), LEVELS["approximate"]),
    (make_text(2, 34, 2, 9, 90, 16, [0, 11]), LEVELS["two levels"]),
    (make_text(1, 3, 1, 70, 70, 8, [0]), SparseConfig(6, 2, 1, 6, 6, 3, dense_len=20)),
]


def tells_apart(operators) -> bool:
    """Whether operators give something else than PyTorch."""
    with in_place_of_ours(operators):
        return any(differs(attend_text, *text, config) for text, config in CASES)


@pytest.mark.slow  # compiles for seconds
@OTHER_PROCESSORS
def test_other_processors_compute_the_same(flags):
    """With vectors of 16 and of 32 bytes, and as the text stands."""
    assert not tells_apart(for_another(flags))


MISTAKES = {
    "a window early": ("tokens < size ? 0 : (tokens - size)", "tokens < size ? 0 : (tokens + 1 - size)"),
    "blocks by starts": ("int64_t before = sizes.kernel_size / sizes.kernel_stride - 1;", "int64_t before = 0;"),
    "the first head alone": ("Floats product = weights[window] * times;", "Floats product = {weights[window][0] * times[0]};"),
    "the next token": ("std::min(at + 1, (blocks[i] + 1)", "std::min(at + 2, (blocks[i] + 1)"),
    "one block less": ("sizes.num_blocks - sizes.init_blocks - sizes.local_blocks)", "sizes.num_blocks - sizes.init_blocks - sizes.local_blocks - 1)"),
    "the later of two": ("one < other);", "one > other);"),
    "no correction": ("sum *= less;", ""),
    "padding is text": ("- first;", ";"),
    "coarse windows read at their start": ("Sizes::coarse * c + reach + 1)});", "Sizes::coarse * c + 1)});"),
}  # fmt: skip


@pytest.mark.slow  # compiles for seconds
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_in_the_kernel_are_told_apart(name):
    assert tells_apart(mistaken(MISTAKES[name]))
