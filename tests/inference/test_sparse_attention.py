"""Sparse attention: equal to its definition, dense where all is chosen, the same however a text is read."""

import copy
from dataclasses import replace

import pytest
import torch
from histories import History
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sparse_models import CLOSE, LEVELS, MODEL, SMALL, configs, make_ids, make_model, make_qkv
from torch.testing import assert_close

from minicpm_lite.config import LatentAttentionConfig, SparseConfig, load_sparse_config
from minicpm_lite.inference import block_choice, sparse_attention
from minicpm_lite.inference.sparse_attention import (
    SparseCache,
    SparseContext,
    naive_sparse_attention,
)
from minicpm_lite.language.context import KVCache, Tree, dense_attention
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.language.generation import generate, pad_left

attend = sparse_attention.sparse_attention
EACH_LEVEL = pytest.mark.parametrize("config", LEVELS.values(), ids=LEVELS)


def run_cached(model: Decoder, ids: torch.Tensor, cuts: list[int], cache: KVCache) -> torch.Tensor:
    """Logits from feeding the ids in pieces, split at the cuts."""
    return torch.cat([model(piece, cache) for piece in ids.tensor_split(cuts, dim=1)], dim=1)


# The function


@settings(max_examples=50, deadline=None)
@given(
    config=configs(), queries=st.integers(1, 40), earlier=st.integers(0, 30), shape=st.sampled_from([(1, 1), (2, 1), (6, 2)]),
)  # fmt: skip
def test_it_is_what_the_definition_says(config, queries, earlier, shape):
    q, k, v = make_qkv(1, *shape, queries=queries, keys=queries + earlier)
    assert_close(attend(q, k, v, config), naive_sparse_attention(q, k, v, config), **CLOSE)


@pytest.mark.parametrize("length", [63, 64, 65, 127, 128, 129, 150])
@EACH_LEVEL
def test_more_queries_than_are_looked_at_together(length, config):
    q, k, v = make_qkv(1, queries=length, keys=length)
    assert_close(attend(q, k, v, config), naive_sparse_attention(q, k, v, config), **CLOSE)


@EACH_LEVEL
def test_at_the_released_sizes(config):
    """With the blocks of the releases, of which this text has one more than a query attends to."""
    released = replace(
        load_sparse_config("minicpm4-8b"),
        dense_len=0,
        approximate_lse=config.approximate_lse,
        coarse_topk=config.coarse_topk and 64,
    )
    keys = 64 * 97 + 5
    q, k, v = make_qkv(1, 4, 2, queries=2, keys=keys, dim=16)
    found = attend(q, k, v, released)
    assert_close(found, naive_sparse_attention(q, k, v, released), **CLOSE)
    assert (found - dense_attention(q, k, v)).abs().max() > 1e-6


@settings(max_examples=40, deadline=None)
@given(config=configs(), length=st.integers(1, 60))
def test_with_all_blocks_it_is_dense(config, length):
    """As many as there are, or a text that is short enough; rounded as float32 is."""
    q, k, v = (each.float() for each in make_qkv(1, queries=length, keys=length))
    blocks = -(-length // config.block_size)
    for whole in (
        replace(config, topk=blocks + config.topk, coarse_topk=None),
        replace(config, dense_len=length + 1),
    ):
        assert_close(attend(q, k, v, whole), dense_attention(q, k, v), atol=1e-6, rtol=1e-5)


def test_all_blocks_by_way_of_the_choice_are_dense(monkeypatch):
    """Not because dense attention was called."""
    monkeypatch.setattr(SparseConfig, "all_visible", 0)
    q, k, v = make_qkv(1)
    assert_close(attend(q, k, v, replace(SMALL, topk=13)), dense_attention(q, k, v), **CLOSE)


@EACH_LEVEL
def test_gradients_are_those_of_the_definition(config):
    """None goes through the choice; over several tiles, which are computed again in the backward pass."""
    grads = []
    for function in (attend, naive_sparse_attention):
        inputs = [each.requires_grad_() for each in make_qkv(1, queries=70, keys=70)]
        out = function(*inputs, config)
        (out * torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)).sum().backward()
        grads.append([each.grad for each in inputs])
    for mine, theirs in zip(*grads, strict=True):
        assert_close(mine, theirs, **CLOSE)
        assert mine.abs().max() > 0


def test_bfloat16_is_off_by_what_rounding_explains():
    q, k, v = (each.bfloat16() for each in make_qkv(1, queries=70, keys=70))
    wide = replace(SMALL, topk=16)
    exact = attend(*(each.double() for each in (q, k, v)), wide)
    found = attend(q, k, v, wide)
    assert found.dtype == torch.bfloat16
    assert ((found.double() - exact).norm() / exact.norm()).item() < 0.01
    assert bool(attend(q, k, v, SMALL).isfinite().all())


def test_scores_that_are_far_apart_stay_finite():
    """Where a coarse mean says little of a fine one, a share may be larger than any number."""
    q, k, v = make_qkv(1)
    for config in LEVELS.values():
        assert bool(attend((1000 * q).float(), k.float(), v.float(), config).isfinite().all())


# A cache


@settings(max_examples=15, deadline=None)
@given(
    cuts=st.lists(st.integers(1, 89), max_size=5, unique=True).map(sorted),
    name=st.sampled_from([*LEVELS]),
    dense_len=st.sampled_from([0, 30]),
)
@torch.no_grad()
def test_a_text_gives_the_same_however_it_is_cut(cuts, name, dense_len):
    model, ids, config = make_model(), make_ids(2, 90), replace(LEVELS[name], dense_len=dense_len)
    assert_close(
        run_cached(model, ids, cuts, SparseCache(90, config)), model(ids, SparseContext(config)), **CLOSE
    )


@EACH_LEVEL
@torch.no_grad()
def test_a_step_is_the_row_of_the_prefill(config):
    model, ids = make_model(), make_ids(2, 80)
    one_by_one = run_cached(model, ids, [*range(1, 80)], SparseCache(80, config))
    assert_close(one_by_one, model(ids, SparseContext(config)), **CLOSE)
    assert (one_by_one - model(ids)).abs().max() > 1e-2, "this text would be the same with dense attention"


@EACH_LEVEL
@torch.no_grad()
def test_rows_padded_on_the_left_are_the_rows_alone(config):
    """Windows and blocks begin where their text begins; for some rows in the middle of the prefill."""
    model, ids, padding = make_model(), make_ids(4, 90), torch.tensor([0, 3, 21, 70])
    for cuts in ([], [60], [10, 11, 12, 13, 80, 81, 82, 83]):
        padded = run_cached(model, ids, cuts, SparseCache(90, config, padding))
        assert bool(padded.isfinite().all())
        for row, pad in enumerate(padding.tolist()):
            alone = model(ids[row : row + 1, pad:], SparseContext(config))
            assert_close(padded[row : row + 1, pad:], alone, **CLOSE)


@torch.no_grad()
def test_padding_and_a_length_that_is_dense():
    config = replace(SMALL, dense_len=40)
    model, ids, padding = make_model(), make_ids(3, 90), torch.tensor([0, 33, 64])
    padded = run_cached(model, ids, [50, 85, 86], SparseCache(90, config, padding))
    for row, pad in enumerate(padding.tolist()):
        alone = model(ids[row : row + 1, pad:], SparseContext(config))
        assert_close(padded[row : row + 1, pad:], alone, **CLOSE)


@st.composite
def trees(draw) -> list[int]:
    return [draw(st.integers(max(-1, place - 4), place - 1)) for place in range(draw(st.integers(1, 12)))]


def branch(parents: list[int], place: int) -> list[int]:
    """The places from the text to a guess."""
    return ([] if parents[place] < 0 else branch(parents, parents[place])) + [place]


@pytest.mark.parametrize("padding", [None, torch.tensor([0, 19])])
@EACH_LEVEL
@settings(max_examples=8, deadline=None)
@given(parents=trees(), text=st.integers(20, 40))
@torch.no_grad()
def test_a_tree_equals_its_branches_fed_one_by_one(config, padding, parents, text):
    """Windows of a branch reach from the text into its guesses, and from guess to guess."""
    model, ids, guesses = make_model(), make_ids(2, text), make_ids(2, len(parents), seed=2)
    cache = SparseCache(60, config, padding)
    model(ids, cache)
    together = model(guesses, Tree(cache, parents))
    for row, pad in enumerate([0, 0] if padding is None else padding.tolist()):
        for place in range(len(parents)):
            path = branch(parents, place)
            whole = torch.cat([ids[row, pad:], guesses[row, path]])[None]
            assert_close(together[row, place], model(whole, SparseContext(config))[0, -1], **CLOSE)


@torch.no_grad()
def test_a_tree_over_a_text_that_is_dense():
    config = replace(SMALL, dense_len=40)
    model, ids, guesses, parents = make_model(), make_ids(1, 36), make_ids(1, 9, seed=2), [*range(-1, 8)]
    for text in (20, 36):  # all dense; and from the fourth guess on sparse
        cache = SparseCache(60, config)
        model(ids[:, :text], cache)
        whole = torch.cat([ids[:, :text], guesses], dim=1)
        assert_close(
            model(guesses, Tree(cache, parents)), model(whole, SparseContext(config))[:, text:], **CLOSE
        )


MOVES = st.lists(
    st.tuples(st.just("feed"), st.integers(1, 9))
    | st.tuples(st.just("take"), st.lists(st.integers(0, 3), min_size=3, max_size=3))
    | st.tuples(st.just("back"), st.integers(0, 9))
    | st.tuples(st.just("select"), st.permutations(range(3))),
    max_size=9,
)


def goes_on_as_its_own_text(config, padding, moves) -> None:
    """Rows of a cache against texts alone."""
    model, cache = make_model(), SparseCache(150, config, padding)
    history = History(model, cache, padding)
    history.feed(30)
    for kind, how in moves:
        if kind == "back":
            history.back(max(0, cache.length - 3 * how))
        else:
            getattr(history, kind)(how)
    logits = history.feed(4)
    for text, mine in zip(history.texts, logits, strict=True):
        if not text:  # it is padding to its end
            continue
        new = min(4, len(text))
        assert_close(mine[-new:], model(torch.tensor([text]), SparseContext(config))[0, -new:], **CLOSE)


@pytest.mark.slow  # sixty histories; the test of mistakes below goes through one
@pytest.mark.parametrize("padding", [None, torch.tensor([0, 2, 11])])
@settings(max_examples=30, deadline=None)
@given(moves=MOVES, name=st.sampled_from([*LEVELS]))
@example(moves=[("feed", 2), ("take", [0, 0, 1]), ("back", 8)], name=next(iter(LEVELS)))
@torch.no_grad()
def test_after_any_moves_each_row_goes_on_as_its_own_text(padding, moves, name):
    goes_on_as_its_own_text(LEVELS[name], padding, moves)


@torch.no_grad()
def test_means_of_a_call_that_failed_are_none_of_the_text():
    model, cache, ids = make_model(), SparseCache(90, SMALL), make_ids(1, 60)
    model(ids[:, :30], cache)
    failing, model.layers[1].mlp.forward = model.layers[1].mlp.forward, lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        model(make_ids(1, 20, seed=5), cache)
    model.layers[1].mlp.forward = failing
    assert_close(model(ids[:, 30:], cache), model(ids, SparseContext(SMALL))[:, 30:], **CLOSE)


@torch.no_grad()
def test_a_text_is_written_as_one_reads_it_at_once():
    """Rows of different length, several samples: each is the best continuation that its own text has."""
    model, config = make_model(), replace(SMALL, dense_len=10)
    prompts = [make_ids(1, tokens, seed=tokens)[0].tolist() for tokens in (40, 13, 27)]
    ids, padding = pad_left(prompts)
    written = generate(model, ids, 20, context=SparseCache(100, config, padding), samples=2)
    for row, text in enumerate(written.tolist()):
        text = text[padding[row // 2] :]
        best = model(torch.tensor([text[:-1]]), SparseContext(config)).argmax(-1)[0]
        assert best[-20:].tolist() == text[-20:]


@torch.no_grad()
def test_what_is_kept_in_bfloat16_is_rounded_and_no_more():
    model, ids = make_model().float(), make_ids(1, 60)
    cache, whole = SparseCache(64, SMALL, dtype=torch.bfloat16), SparseCache(64, SMALL)
    exact = model(ids, SparseCache(64, replace(SMALL, topk=20)))
    rounded = run_cached(model, ids, [50, 51], SparseCache(64, replace(SMALL, topk=20), dtype=torch.bfloat16))
    assert 1e-6 < ((rounded - exact).norm() / exact.norm()).item() < 0.02
    for each in (cache, whole):
        assert bool(run_cached(model, ids, [50, 51], each).isfinite().all())
    means, keys = 31 * 8 * 2, 64 * 8 * 2  # of a layer, in numbers
    assert whole.nbytes == MODEL.num_hidden_layers * (2 * keys + means) * 4 == 2 * cache.nbytes


def test_a_cache_moves_in_inference_mode_and_goes_on_outside():
    model, ids, cache = make_model(), make_ids(1, 30), SparseCache(60, SMALL)
    with torch.inference_mode():
        model(ids, cache)
        cache.select([0, 0])
        model(make_ids(2, 3, seed=2), Tree(cache, [-1, 0, 0]))
        cache.take([0, 2])
    rest = make_ids(2, 9, seed=3)
    with torch.no_grad():
        whole = torch.cat([ids.expand(2, -1), make_ids(2, 3, seed=2)[:, [0, 2]], rest], dim=1)
        assert_close(model(rest, cache), model(whole, SparseContext(SMALL))[:, -9:], **CLOSE)


@torch.no_grad()
def test_a_copied_cache_goes_its_own_way():
    model, cache = make_model(), SparseCache(60, SMALL)
    model(make_ids(1, 30), cache)
    fork = copy.deepcopy(cache)
    first = model(make_ids(1, 9, seed=2), cache)
    model(make_ids(1, 12, seed=3), fork)
    cache.truncate(30)
    assert torch.equal(model(make_ids(1, 9, seed=2), cache), first)


def test_a_model_is_trained_through_it():
    """The first step of the fast one is that of the slow one, weight by weight."""
    ids, grads = make_ids(2, 70), []

    class Naive(SparseContext):
        def attend(self, layer, query, key, value):
            return naive_sparse_attention(query, key, value, self.config)

    for context in (SparseContext(SMALL), Naive(SMALL)):
        model = make_model().train()
        model(ids, context).square().mean().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for mine, theirs in zip(*grads, strict=True):
        assert_close(mine, theirs, **CLOSE)


# What cannot be


@pytest.mark.parametrize("make", [SparseContext, lambda config: SparseCache(8, config)])
@torch.no_grad()
def test_latent_attention_is_refused(make):
    model = Decoder(replace(MODEL, latent_attention=LatentAttentionConfig(24, 16, 8, 8, 8)))
    with pytest.raises(ValueError, match="has latent attention, whose heads share no keys"):
        model(make_ids(1, 3), make(SMALL))


def test_a_cache_is_not_trained_through():
    with pytest.raises(ValueError, match="use torch.no_grad"):
        make_model()(make_ids(1, 3), SparseCache(8, SMALL))


# Mistakes


def sees_a_window_early(scores, at, config):
    return block_choice.window_shares(scores, at + 1, config)


def windows_one_later(key, size, stride):
    return block_choice.window_means(key.roll(-1, dims=2), size, stride)


def blocks_by_the_start_of_windows_alone(shares, at, blocks, config):
    starts = replace(config, kernel_size=config.kernel_stride)
    return block_choice.choose_blocks(shares, at, blocks, starts)


def windows_of_the_block_before(shares, at, blocks, config):
    return block_choice.choose_blocks(shares.roll(1, dims=-1), at, blocks, config)


def first_head_alone(query, means):
    scores = block_choice.window_scores(query, means)
    return scores[:, :, :1].expand_as(scores)


def scores_before_softmax(scores, at, config):
    return scores[0].sum(2).exp()


def own_block_not_forced(shares, at, blocks, config):
    return block_choice.choose_blocks(
        shares, at, blocks, replace(config, window_size=0 * config.window_size + 4)
    ).roll(1, -1)


def one_block_less(shares, at, blocks, config):
    return block_choice.choose_blocks(
        shares, at, blocks, replace(config, topk=config.topk - 1, init_blocks=0)
    )


def sees_the_next_token(query, key, value, chosen, at, *rest):
    return REAL_ATTEND(query, key, value, chosen, at + 1, *rest)


def every_head_its_own_group(query, key, value, chosen, at, *rest):
    return REAL_ATTEND(query, key, value, chosen.roll(1, dims=1), at, *rest)


REAL_ATTEND = sparse_attention.attend_blocks
MISTAKES = [
    ("window_shares", sees_a_window_early),
    ("window_means", windows_one_later),
    ("choose_blocks", blocks_by_the_start_of_windows_alone),
    ("choose_blocks", windows_of_the_block_before),
    ("window_scores", first_head_alone),
    ("window_shares", scores_before_softmax),
    ("choose_blocks", own_block_not_forced),
    ("choose_blocks", one_block_less),
    ("attend_blocks", sees_the_next_token),
    ("attend_blocks", every_head_its_own_group),
]


@pytest.mark.parametrize(("name", "mistake"), MISTAKES, ids=[mistake.__name__ for _, mistake in MISTAKES])
def test_mistakes_are_told_from_the_definition(name, mistake, monkeypatch):
    """Those that change which blocks are chosen, or what is seen of them."""
    q, k, v = make_qkv(1)
    expected = naive_sparse_attention(q, k, v, SMALL)
    assert_close(attend(q, k, v, SMALL), expected, **CLOSE)
    monkeypatch.setattr(sparse_attention, name, mistake)
    assert (attend(q, k, v, SMALL) - expected).abs().max() > 1e-2


REAL_EXTEND = block_choice.WindowMeans.extend
HISTORY = [("back", 3), ("feed", 7), ("take", [1, 3, 0]), ("feed", 5), ("select", [2, 0, 1]), ("feed", 3)]


def nothing_is_forgotten(self, lengths):
    pass


def rows_stay(self, rows):
    pass


def padding_is_text(self, key, starts, room):
    REAL_EXTEND(self, key, [0] * len(starts), room)


def made_once(self, key, starts, room):
    if self._kept is None:
        REAL_EXTEND(self, key, starts, room)


def one_token_late(self, key, starts, room):
    REAL_EXTEND(self, key[:, :, :-1], starts, room)


@pytest.mark.parametrize("mistake", [
    ("forget", nothing_is_forgotten), ("select", rows_stay), ("extend", padding_is_text), ("extend", made_once),
    ("extend", one_token_late),
], ids=lambda mistake: mistake[1].__name__)  # fmt: skip
@torch.no_grad()
def test_mistakes_in_what_is_kept_are_told_from_texts_read_at_once(mistake, monkeypatch):
    padding = torch.tensor([0, 2, 11])
    goes_on_as_its_own_text(SMALL, padding, HISTORY)
    monkeypatch.setattr(block_choice.WindowMeans, *mistake)
    with pytest.raises((AssertionError, IndexError, RuntimeError)):
        goes_on_as_its_own_text(SMALL, padding, HISTORY)


class GuessesAreText(SparseCache):
    """Makes means of guesses as they come, one after another."""

    def keep(self, layer, *new):
        mask, self.mask = self.mask, None
        kept = super().keep(layer, *new)
        self.mask = mask
        return kept


class GuessesMakeNoWindow(SparseCache):
    """Guesses choose by the windows of the text before them alone."""

    def _attend_guesses(self, query, key, value, means):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sparse_attention, "with_guesses", lambda scores, *rest: scores)
            return super()._attend_guesses(query, key, value, means)


@pytest.mark.parametrize("wrong", [GuessesAreText, GuessesMakeNoWindow])
@torch.no_grad()
def test_mistakes_in_trees_are_told_from_branches(wrong):
    """In what the guesses are given, or in how the text goes on with a branch of them."""
    model, ids, guesses, rest = make_model(), make_ids(1, 31), make_ids(1, 14, seed=2), make_ids(1, 9, seed=3)
    parents = [-1, -1, 1, 0, 3, 2, 4, 5, 6, 7, 8, 9, 10, 11]  # two branches, in turn

    def fed(cache: SparseCache) -> torch.Tensor:
        model(ids, cache)
        logits = model(guesses, Tree(cache, parents))
        cache.take(branch(parents, 12))
        return torch.cat([logits, model(rest, cache)], dim=1)[0]

    wholes = [torch.cat([ids, guesses[:, branch(parents, place)]], dim=1) for place in range(14)]
    expected = [model(whole, SparseContext(SMALL))[0, -1:] for whole in wholes]
    expected.append(model(torch.cat([wholes[12], rest], dim=1), SparseContext(SMALL))[0, -9:])
    assert_close(fed(SparseCache(60, SMALL)), torch.cat(expected), **CLOSE)
    assert (fed(wrong(60, SMALL)) - torch.cat(expected)).abs().max() > 1e-2
