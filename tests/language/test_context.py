"""Contexts: attention equal to the obvious loop, cached equal to uncached, padded equal to alone."""

import copy
import math
import re
from dataclasses import replace

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import FAMILIES, GROUPED, PLAIN, UNTIED, granite, make_ids, make_model
from torch.testing import assert_close

from minicpm_lite.language import context
from minicpm_lite.language.context import Context, Int8Cache, KVCache, Tree, causal_mask, dense_attention
from minicpm_lite.language.decoder import Decoder


def run_cached(model: Decoder, ids: torch.Tensor, cuts: list[int], cache: KVCache) -> torch.Tensor:
    """Logits from feeding the ids in pieces, split at the cuts."""
    return torch.cat([model(piece, cache) for piece in ids.tensor_split(cuts, dim=1)], dim=1)


# Attention


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 7), (5, 5), (3, 8)])
def test_attention_equals_the_obvious_loop(queries, keys):
    heads, kv_heads, dim = 6, 2, 8
    q, k, v = (
        torch.randn(2, heads, queries, dim),
        torch.randn(2, kv_heads, keys, dim),
        torch.randn(2, kv_heads, keys, dim),
    )
    expected = torch.empty_like(q)
    for head in range(heads):
        for i in range(queries):
            seen = keys - queries + i + 1
            kv = head // (heads // kv_heads)
            scores = torch.einsum("bd,bsd->bs", q[:, head, i], k[:, kv, :seen]) / math.sqrt(dim)
            expected[:, head, i] = torch.einsum("bs,bsd->bd", scores.softmax(-1), v[:, kv, :seen])
    assert_close(dense_attention(q, k, v), expected, atol=1e-6, rtol=1e-5)
    mask = causal_mask(queries, keys, "cpu")
    assert_close(dense_attention(q, k, v, mask), expected, atol=1e-6, rtol=1e-5)
    assert_close(dense_attention(q, k, v, mask.expand(2, 1, -1, -1)), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("queries", [1, 3])
def test_a_masked_key_is_as_if_it_were_not_there(queries):
    q, k, v = torch.randn(1, 4, queries, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 5)
    seen = torch.tensor([0, 2, 3, 7])
    mask = torch.zeros(queries, 9, dtype=torch.bool).index_fill(1, seen, True)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k[:, :, seen], v[:, :, seen], enable_gqa=True
    )
    assert_close(dense_attention(q, k, v, mask), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("queries", [1, 3])
def test_each_head_may_see_other_keys(queries):
    q, k, v = torch.randn(2, 4, queries, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    mask = torch.rand(2, 4, queries, 7) < 0.5
    mask[..., 0] = True
    found = dense_attention(q, k, v, mask)
    for head in range(4):
        alone = dense_attention(
            q[:, head : head + 1], k[:, [head // 2]], v[:, [head // 2]], mask[:, head : head + 1]
        )
        assert_close(found[:, head : head + 1], alone, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("queries", [1, 2])
@pytest.mark.parametrize("rows", [2, 3, 4])
def test_a_mask_for_each_row_is_not_taken_for_one_for_each_head(rows, queries, monkeypatch):
    """With as many rows as heads nothing else would tell."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as it is for a reader
    q, k, v = torch.randn(rows, 4, queries, 8), torch.randn(rows, 2, 7, 8), torch.randn(rows, 2, 7, 8)
    mask = torch.rand(rows, queries, 7) < 0.5
    mask[..., 0] = True
    with pytest.raises(
        ValueError, match=r"mask has shape \(\d, \d, 7\); .* for each row its own: mask\[:, None"
    ):
        dense_attention(q, k, v, mask)
    found = dense_attention(q, k, v, mask[:, None])
    for row in range(rows):
        alone = dense_attention(q[[row]], k[[row]], v[[row]], mask[row])
        assert_close(found[[row]], alone, atol=1e-6, rtol=1e-5)


class Paged(KVCache):
    """Keeps what layers make in a memory of its own."""

    def __init__(self, room: int) -> None:
        super().__init__(room)
        self.pages: dict[int, list[tuple[torch.Tensor, ...]]] = {}

    def keep(self, layer, *new):
        self.pages[layer] = [*self.pages[layer], new] if self.length else [new]
        return tuple(torch.cat(each, dim=2) for each in zip(*self.pages[layer], strict=True))


@torch.no_grad()
def test_a_cache_may_keep_in_a_memory_of_its_own():
    model, ids = make_model(GROUPED), make_ids(GROUPED)
    assert_close(run_cached(model, ids, [3, 4, 9], Paged(ids.shape[1])), model(ids), atol=1e-4, rtol=1e-4)
    cache = Paged(9)
    model(ids[:, :4], cache)
    with pytest.raises(ValueError, match=f"The cache is for {len(ids)} rows, and 1 came"):
        model(ids[:1, 4:5], cache)


@torch.no_grad()
def test_two_layers_of_one_number_share_no_cache():
    """As a copy of a block is of its original's; without a cache nothing is filed, and all is right."""
    model, ids = make_model(GROUPED), make_ids(GROUPED)
    model.layers = torch.nn.ModuleList([*model.layers, copy.deepcopy(model.layers[0])])
    expected, cache = model(ids), KVCache(ids.shape[1])
    for _ in "ab":
        with pytest.raises(ValueError, match="Two layers have the number 0, as a copy of a block has"):
            model(ids, cache)
    model.layers[-1].self_attn.layer = len(model.layers) - 1
    assert_close(run_cached(model, ids, [3, 4], KVCache(ids.shape[1])), expected, atol=1e-4, rtol=1e-4)


@given(queries=st.integers(1, 9), earlier=st.integers(0, 9))
def test_the_causal_mask_lets_each_token_see_itself_and_those_before(queries, earlier):
    mask = causal_mask(queries, queries + earlier, "cpu")
    assert mask.tolist() == [
        [key <= earlier + query for key in range(queries + earlier)] for query in range(queries)
    ]


# A cache


@torch.no_grad()
def test_cached_steps_equal_granite_with_its_own_cache():
    from transformers import DynamicCache

    model = make_model(GROUPED)
    ids, reference = make_ids(model.config, tokens=8), granite(model)
    cache, theirs = KVCache(8), DynamicCache()
    for token in ids.split(1, dim=1):
        assert_close(
            model(token, cache), reference(token, past_key_values=theirs).logits, atol=1e-5, rtol=1e-5
        )


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(1, 16), max_size=4, unique=True).map(sorted), batch=st.integers(1, 3))
@torch.no_grad()
def test_cached_equals_uncached_however_the_ids_are_cut(cuts, batch):
    model = make_model(UNTIED)
    ids = make_ids(model.config, batch)
    assert_close(run_cached(model, ids, cuts, KVCache(64)), model(ids), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_attention_may_come_in_any_layout(monkeypatch):
    """On a GPU it comes with the queries before the heads in memory."""
    model, ids = make_model(GROUPED), make_ids(GROUPED)
    expected, attention = model(ids), torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *args, **kwargs: attention(*args, **kwargs).transpose(1, 2).contiguous().transpose(1, 2),
    )
    assert_close(run_cached(model, ids, [5, 6, 7], KVCache(64)), expected, atol=1e-5, rtol=1e-5)


class PositionsFromZero(KVCache):
    def begin(self, x):
        return super().begin(x) - self.length


class FirstQueryAtFirstKey(KVCache):
    def attend(self, layer, query, key, value):
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=True
        )


class NewTokensAlone(KVCache):
    def attend(self, layer, query, key, value):
        new = query.shape[2]
        return dense_attention(query, key[:, :, -new:], value[:, :, -new:])


class AllTokens(KVCache):
    def attend(self, layer, query, key, value):
        return dense_attention(query, key, value, torch.ones(query.shape[2], key.shape[2], dtype=torch.bool))


@pytest.mark.parametrize("wrong", [PositionsFromZero, FirstQueryAtFirstKey, NewTokensAlone, AllTokens])
@torch.no_grad()
def test_wrong_caches_are_told_apart(wrong):
    model, ids = make_model(GROUPED), make_ids(GROUPED)
    for cuts in ([9], [9, 10, 14]):
        right, mistaken = (run_cached(model, ids, cuts, cache) for cache in (KVCache(17), wrong(17)))
        assert_close(right, model(ids), atol=1e-5, rtol=1e-5)
        assert (mistaken - right).abs().max() > 1e-2


@torch.no_grad()
def test_a_cache_remembers_how_far_it_has_read():
    model, ids, cache = make_model(GROUPED), make_ids(GROUPED), KVCache(20)
    assert (cache.length, cache.reach) == (0, 0)
    for piece, length in zip(ids.split([3, 1, 13], dim=1), (3, 4, 17), strict=True):
        model(piece, cache)
        assert (cache.length, cache.reach) == (length, length)
    alone = Context()
    model(ids, alone)
    assert (alone.length, alone.reach, alone.mask) == (0, 17, None)
    assert_close(model(ids, alone), model(ids), atol=0, rtol=0)  # a call is a whole text, each time


@torch.no_grad()
def test_the_mask_is_made_once_a_call(monkeypatch):
    made = []
    monkeypatch.setattr(context, "causal_mask", lambda *args: made.append(args[:2]) or causal_mask(*args))
    model, ids = make_model(GROUPED), make_ids(GROUPED)
    run_cached(model, ids, [9, 10], KVCache(17, torch.tensor([0, 2])))
    assert made == [(9, 9), (1, 10), (7, 17)]
    made.clear()
    run_cached(model, ids, [9, 10], KVCache(17))
    assert made == [(7, 17)]  # without padding the kernels need no mask for a text at once or one token


@torch.no_grad()
def test_cache_takes_the_promised_bytes():
    cache = KVCache(32)
    Decoder(GROUPED)(make_ids(GROUPED, batch=1, tokens=3), cache)
    assert cache.length == 3
    assert (
        cache.nbytes
        == 32 * GROUPED.num_hidden_layers * 2 * GROUPED.num_key_value_heads * GROUPED.head_dim * 4
    )


# Padding


@pytest.mark.parametrize("name", ["grouped, tied", "multi-head, untied"])
@torch.no_grad()
def test_rows_padded_on_the_left_are_the_rows_alone(name):
    model = make_model(PLAIN[name])
    ids, padding = make_ids(model.config, batch=3, tokens=12), torch.tensor([0, 5, 11])
    padded = run_cached(model, ids, [11], KVCache(20, padding))
    one_by_one = run_cached(model, ids, [6, 7, 8], KVCache(20, padding))
    assert bool(padded.isfinite().all())
    for row, pad in enumerate(padding.tolist()):
        alone = model(ids[row : row + 1, pad:])
        assert_close(padded[row : row + 1, pad:], alone, atol=1e-5, rtol=1e-5)
        assert_close(one_by_one[row : row + 1, pad:], alone, atol=1e-5, rtol=1e-5)


class PaddingSeen(KVCache):
    def hide_padding(self, mask):
        return mask.expand(len(self.padding), 1, -1, -1)


class PaddingOfTheFirstRow(KVCache):
    def hide_padding(self, mask):
        return super().hide_padding(mask)[:1].expand(len(self.padding), -1, -1, -1)


@pytest.mark.parametrize("wrong", [PaddingSeen, PaddingOfTheFirstRow])
@torch.no_grad()
def test_wrong_padding_is_told_apart(wrong):
    model, ids, padding = make_model(GROUPED), make_ids(GROUPED, batch=2, tokens=12), torch.tensor([0, 5])
    assert (model(ids, wrong(12, padding))[1, 5:] - model(ids[1:, 5:])[0]).abs().max() > 1e-2


@torch.no_grad()
def test_positions_count_from_where_the_text_of_a_row_begins():
    """Rotary attention cannot tell, for a shift of all positions changes no product."""
    cache = KVCache(12, torch.tensor([0, 5]))
    positions = cache.begin(torch.zeros(2, 8, 4))
    assert positions[:, 0].tolist() == [[0, 1, 2, 3, 4, 5, 6, 7], [0, 0, 0, 0, 0, 0, 1, 2]]


# What cannot be


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda m: m(torch.zeros(1, 5, dtype=torch.long), KVCache(4)), "room for 4 tokens and would need 5"),
        (lambda m: KVCache(0), "room is 0"),
        (
            lambda m: KVCache(4, torch.tensor([0, 4])),
            "padding is .*expected whole numbers in a tensor, from 0 to 3",
        ),
        (
            lambda m: KVCache(4, torch.tensor([0, -1])),
            "padding is .*expected whole numbers in a tensor, from 0",
        ),
        (lambda m: KVCache(4, dtype=torch.int8), "dtype is torch.int8, which cuts numbers to whole ones"),
    ],
)
def test_impossible_lengths_get_a_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(Decoder(GROUPED))


@torch.no_grad()
def test_a_cache_serves_one_batch_and_one_model():
    model, cache = Decoder(GROUPED), KVCache(8)
    model(torch.zeros(2, 1, dtype=torch.long), cache)
    with pytest.raises(ValueError, match="is for 2 rows, and 1 came; use one cache for each batch"):
        model(torch.zeros(1, 1, dtype=torch.long), cache)
    for other in (Decoder(GROUPED), Decoder(UNTIED)):
        with pytest.raises(ValueError, match="filled by another model; use one cache for each model"):
            other(torch.zeros(2, 1, dtype=torch.long), cache)
        with pytest.raises(ValueError, match="filled by another model"):
            other(torch.zeros(2, 1, dtype=torch.long), Tree(cache, [-1]))
    model(torch.zeros(2, 1, dtype=torch.long), cache)
    cache.truncate(0)
    other(torch.zeros(2, 1, dtype=torch.long), cache)


@torch.no_grad()
@pytest.mark.parametrize("padding", [None, torch.tensor([1, 0])])
def test_tokens_of_a_refused_call_do_not_belong_to_the_text(padding):
    """Neither of another model, nor of another batch, nor of a text that is too long; features follow."""
    model, cache = Decoder(GROUPED), KVCache(6, padding)
    first, wrong, features = (torch.full((2, 2), token) for token in (1, 2, 3))
    refused = [(Decoder(GROUPED), wrong), (model, wrong[:1]), (model, wrong.repeat(1, 3))]
    if padding is not None:
        with pytest.raises(ValueError, match="is for 2 rows"):
            model(wrong[:1], cache)
    model.states(model.embed(first), cache)
    model(first, cache)
    for other, ids in refused:
        with pytest.raises(ValueError, match="The cache"):
            other(ids, cache)
        model.states(model.embed(features), cache)
        assert cache.has_read(torch.cat([wrong, first, wrong], dim=1)), "features may be any text"
        assert cache.has_read(torch.cat([first, first, features], dim=1))
        cache.truncate(4)


class Rounded(KVCache):
    """Keeps whole numbers, through which no gradient goes."""

    def keep(self, layer, *new):
        return super().keep(layer, *(each.detach().round() for each in new))


@pytest.mark.parametrize("make_cache", [
    KVCache, Int8Cache, Rounded, lambda room: KVCache(room, dtype=torch.bfloat16),
    lambda room: Tree(KVCache(room), [-1, 0]), lambda room: Tree(Int8Cache(room), [-1, 0]),
])  # fmt: skip
@pytest.mark.parametrize("name", FAMILIES)
def test_a_cache_is_not_trained_through(name, make_cache):
    model, ids, cache = Decoder(FAMILIES[name]), torch.zeros(1, 2, dtype=torch.long), make_cache(8)
    with pytest.raises(ValueError, match="use torch.no_grad"):
        model(ids, cache)
    with torch.no_grad():
        model(ids, cache)
    model.requires_grad_(False)(ids, make_cache(8))


@pytest.mark.parametrize("trained", ["k_proj", "v_proj", "input_layernorm"])
@pytest.mark.parametrize("make_cache", [KVCache, Int8Cache, lambda room: KVCache(room, dtype=torch.bfloat16)])
def test_a_cache_is_not_trained_through_where_the_table_is_frozen(make_cache, trained):
    """Whatever of a block takes gradients, as an adapter does: keys, values, or both."""
    model = Decoder(GROUPED).requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    with pytest.raises(ValueError, match="use torch.no_grad"):
        model(torch.zeros(1, 1, dtype=torch.long), make_cache(8))


def test_a_cache_may_change_between_inference_mode_and_no_grad():
    model, cache, ids = make_model(GROUPED), KVCache(8), torch.arange(6)[None]
    with torch.inference_mode():
        first = model(ids[:, :4], cache)
    with torch.no_grad():
        assert_close(torch.cat([first, model(ids[:, 4:], cache)], dim=1), model(ids), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_cache_survives_a_call_that_failed():
    model, cache = make_model(GROUPED), KVCache(8)
    failing, calls = model.layers[2].mlp.forward, []
    model.layers[2].mlp.forward = lambda x: calls.append(x) or 1 / 0
    with pytest.raises(ZeroDivisionError):
        model(torch.zeros(3, 2, dtype=torch.long), cache)
    model.layers[2].mlp.forward = failing
    ids = make_ids(model.config, batch=1, tokens=4)
    assert_close(model(ids, cache), model(ids), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_cache_used_again_takes_the_frequencies_of_its_new_model():
    model, ids, cache = make_model(GROUPED), make_ids(GROUPED), KVCache(17)
    model(ids, cache)
    model.config, cache.length = replace(model.config, rope_theta=77.0), 0
    assert_close(model(ids, cache), model(ids), atol=1e-5, rtol=1e-5)


def test_padding_of_another_batch_is_refused():
    with pytest.raises(ValueError, match="is for 2 rows, and 3 came"), torch.no_grad():
        make_model(GROUPED)(make_ids(GROUPED, batch=3), KVCache(17, torch.tensor([0, 1])))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (dict(room=2.0), "room is 2.0; expected a whole number of at least 1."),
        (dict(dtype="bfloat16"), "dtype is 'bfloat16'; expected a type of tensors, such as torch.bfloat16."),
        (dict(padding=torch.tensor([0.0, 1.0])), "expected whole numbers in a tensor, from 0 to 7"),
        (dict(padding=torch.tensor([True])), "expected whole numbers in a tensor, from 0 to 7"),
    ],
)
def test_a_cache_of_what_cannot_be_is_refused(given, sentence, unchecked):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        KVCache(**{"room": 8, **given})


def test_whatever_changes_a_weight_is_seen():
    model = make_model(PLAIN["grouped, tied"])
    seen = context.appearance(model)
    assert context.appearance(model) == seen
    with torch.no_grad():
        model.layers[0].mlp.up_proj.weight[-1, -1] += 1
    assert context.appearance(model) != seen
    seen = context.appearance(model)
    weight = model.layers[1].mlp.up_proj.weight
    model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(weight.detach().clone())
    assert context.appearance(model) != seen
    with torch.inference_mode():
        made_there = make_model(PLAIN["grouped, tied"])
    assert context.appearance(made_there) == context.appearance(made_there)
