"""Longer contexts: what a method promises of its frequencies, cached equal to uncached, and the search."""

import math
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import make_ids, make_model
from torch.testing import assert_close

from minicpm_lite import ModelConfig
from minicpm_lite.config import RopeScaling, load_rope_scaling, model_config
from minicpm_lite.language.context import KVCache
from minicpm_lite.language.long_context import extend_context, search_factors
from minicpm_lite.language.rotary import rotary_frequencies, scaled_frequencies

ORIGINAL, FACTOR = 32, 4.0
PLAIN = ModelConfig(64, 160, 2, 2, 99, max_position_embeddings=ORIGINAL, init_std=0.1)
HALF = PLAIN.rotary_dim // 2
SHORT, LONG = (tuple(1 + i * step for i in range(HALF)) for step in (0.1, 0.3))
METHODS = ("linear", "ntk", "dynamic", "yarn", "llama3", "longrope")


def extended(method: str, config: ModelConfig = PLAIN, factor: float = FACTOR) -> ModelConfig:
    return extend_context(config, method, factor, LONG if method == "longrope" else None)


@pytest.mark.parametrize("method", METHODS)
def test_factor_one_changes_nothing(method):
    config = extend_context(PLAIN, method, 1.0, (1.0,) * HALF if method == "longrope" else None)
    frequencies, magnitude = scaled_frequencies(config, ORIGINAL)
    assert_close(frequencies, rotary_frequencies(PLAIN.rotary_dim, PLAIN.rope_theta), atol=0, rtol=2e-7)
    assert magnitude == 1.0 and config.max_position_embeddings == ORIGINAL


@settings(max_examples=60, deadline=None)
@given(
    method=st.sampled_from(METHODS[:-1]),
    factor=st.floats(1.0, 64.0),
    half=st.integers(2, 64),
    original=st.integers(16, 65_536),
)
def test_no_pair_turns_faster_and_none_slower_than_interpolated(method, factor, half, original):
    config = replace(PLAIN, head_dim=2 * half, max_position_embeddings=original)
    longer = extend_context(config, method, factor)
    plain = rotary_frequencies(2 * half, config.rope_theta)
    ratio = plain / scaled_frequencies(longer, longer.max_position_embeddings)[0]
    most = max(factor, longer.max_position_embeddings / original)  # a whole number of tokens
    assert bool((ratio > 1 - 1e-5).all() and (ratio < most * (1 + 1e-5)).all())
    assert bool((ratio.diff() > -1e-4).all())  # slow pairs are slowed at least as much as fast ones


@pytest.mark.parametrize(("factor", "tokens"), [(2.3, 230), (1.15, 115), (2.0, 200)])
def test_the_new_length_is_the_factor_times_the_old_one(factor, tokens):
    """2.3 * 100 is 229.99… for a computer."""
    config = replace(PLAIN, max_position_embeddings=100)
    assert extend_context(config, "yarn", factor).max_position_embeddings == tokens


def test_dynamic_is_ntk_at_the_full_length_and_plain_at_the_old_one():
    dynamic, ntk = extended("dynamic"), extended("ntk")
    full = ntk.max_position_embeddings
    assert_close(scaled_frequencies(dynamic, full), scaled_frequencies(ntk, full))
    assert_close(scaled_frequencies(dynamic, ORIGINAL), scaled_frequencies(PLAIN, ORIGINAL), atol=0, rtol=0)


def test_ntk_stages_multiply():
    twice = extend_context(extend_context(PLAIN, "ntk", 8.0), "ntk", 4.0)
    assert twice.rope_theta == pytest.approx(extend_context(PLAIN, "ntk", 32.0).rope_theta)
    assert twice.max_position_embeddings == 32 * ORIGINAL


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_cached_equals_uncached(method):
    model, ids = make_model(extended(method)), make_ids(PLAIN, tokens=100)
    whole = model(ids)
    for cuts in ([20], [32, 33], [1, 50, 99]):
        cache = KVCache(100)  # room for the text: what decides the frequencies is its length
        pieces = [model(piece, cache) for piece in ids.tensor_split(cuts, dim=1)]
        assert_close(torch.cat(pieces, dim=1), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["dynamic", "longrope"])
@torch.no_grad()
def test_a_cache_with_more_room_means_the_frequencies_of_a_longer_text(method):
    model, ids = make_model(extended(method)), make_ids(PLAIN, tokens=20)
    assert not torch.allclose(model(ids, KVCache(100)), model(ids), atol=1e-4)
    assert_close(model(ids, KVCache(ORIGINAL)), model(ids), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_weights_stay_and_an_unscaled_model_refuses_what_an_extended_one_reads():
    model, ids = make_model(PLAIN), make_ids(PLAIN, tokens=2 * ORIGINAL)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"extend its context first"):
        model(ids)
    model.config = extend_context(model.config, "yarn", 2.0)
    assert bool(model(ids).isfinite().all())
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


def test_models_without_published_factors_say_so():
    with pytest.raises(ValueError, match="minicpm-2b-128k.yaml has no 'rope_scaling' block"):
        load_rope_scaling("minicpm-2b-128k")


def test_search_finds_what_the_loss_asks_for():
    wanted = torch.linspace(1.0, 4.0, 8)
    asked = []

    def loss(factors):
        asked.append(factors)
        return (factors - wanted).square().sum().item()

    starts = [torch.full((8,), 4.0), torch.ones(8), torch.linspace(1.0, 4.0, 8).square() / 4 + 0.75]
    found = search_factors(loss, starts, 4.0, generations=30, children=8)
    assert len(asked) == 3 + 30 * 8
    assert all(bool((each.diff() >= 0).all() and each.min() >= 1 and each.max() <= 5) for each in asked[3:])
    assert loss(found) < 0.25 * min(map(loss, starts))
    assert torch.equal(found, search_factors(loss, starts, 4.0, generations=30, children=8))
    assert not torch.equal(found, search_factors(loss, starts, 4.0, generations=30, children=8, seed=1))


def test_search_keeps_a_start_that_nothing_beats():
    starts = [torch.ones(4), torch.full((4,), 2.0)]
    found = search_factors(lambda factors: factors.sum().item(), starts, 2.0, generations=2)
    assert torch.equal(found, starts[0])


@pytest.mark.parametrize("first", [0, 1])
def test_a_candidate_that_diverged_is_worse_than_any_other(first):
    """Whether it is tried first or last."""
    starts = [torch.full((4,), 1.5), torch.full((4,), 2.0)]
    bad = starts[first]

    def loss(factors):
        return math.nan if torch.equal(factors, bad) else (factors - 1.8).abs().sum().item()

    found = search_factors(loss, starts, 2.0, generations=2)
    assert loss(found) <= loss(starts[1 - first])
    with pytest.raises(FloatingPointError, match="The loss of none of the 18 candidates is a finite number"):
        search_factors(lambda factors: math.nan, starts, 2.0, generations=2)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: extend_context(PLAIN, "abf", 4.0), "method is 'abf'; expected one of ntk, linear"),
        (lambda: extend_context(PLAIN, "yarn", 0.5), "factor is 0.5; a context is made longer"),
        (lambda: extend_context(PLAIN, "yarn", math.inf), "factor is inf; expected a number"),
        (lambda: extend_context(PLAIN, "longrope", 4.0), 'Method "longrope" needs long_factor'),
        (lambda: extend_context(PLAIN, "ntk", 4.0, LONG), 'Only method "longrope" takes long_factor; this is "ntk"'),
        (lambda: extend_context(extended("yarn"), "yarn", 2.0), 'scaled already, by "yarn"; extend the config'),
        (lambda: extend_context(PLAIN, "longrope", 4.0, LONG[:-1]), "holds 15 factors; .* 32 wide and needs 16"),
        (lambda: extend_context(PLAIN, "longrope", 4.0, [0.0] * HALF), "each long_factor is 0.0; expected a number"),
        (lambda: RopeScaling("abf", 32), "rope_type is 'abf'; expected one of linear"),
        (lambda: RopeScaling("linear", 32), '"linear" needs a factor: how many times longer'),
        (lambda: RopeScaling("linear", 32, 0.5), "factor is 0.5; a context is made longer"),
        (lambda: RopeScaling("linear", 0, 2.0), "original_max_position_embeddings is 0"),
        (lambda: RopeScaling("yarn", 32, 2.0, attention_factor=-1.0), "attention_factor is -1.0"),
        (lambda: RopeScaling("yarn", 32, 2.0, beta_fast=1.0), "beta_slow is 1.0 and beta_fast is 1.0; slow pairs"),
        (lambda: RopeScaling("llama3", 32, 2.0, high_freq_factor=0.5), "low_freq_factor is 1.0 and high_freq_factor is 0.5"),
        (lambda: RopeScaling("longrope", 32, long_factor=LONG), '"longrope" needs short_factor: a list'),
        (lambda: RopeScaling("longrope", 32, short_factor=SHORT, long_factor=2.0), '"longrope" needs long_factor: a list'),
        (lambda: RopeScaling("longrope", 32, short_factor=SHORT, long_factor=[]), '"longrope" needs long_factor: a list'),
        (lambda: RopeScaling("yarn", 32, 2.0, long_factor=LONG), 'Only rope_type "longrope" reads long_factor'),
        (
            lambda: model_config(dict(
                hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=9,
                rope_scaling=dict(type="yarn"),
            )),
            "rope_scaling, has an unknown field 'type'. Did you mean 'rope_type'",
        ),
    ],
)  # fmt: skip
def test_bad_configs_get_a_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("head_dim", [2, 4, 8])
@pytest.mark.parametrize("theta", [0.5, 1.0, 1.01, 1e4])
@pytest.mark.parametrize("context", [1, 2, 64])
def test_a_config_is_refused_in_a_sentence_or_has_frequencies(method, head_dim, theta, context):
    short = ModelConfig(8, 8, 1, 1, 20, head_dim=head_dim, rope_theta=theta, max_position_embeddings=context)
    factors = [2.0] * (head_dim // 2) if method == "longrope" else None
    try:
        config = extend_context(short, method, 4.0, factors)
    except ValueError as error:
        refused = {
            "ntk": head_dim == 2,
            "dynamic": head_dim == 2,
            "yarn": theta <= 1,
            "longrope": context == 1,
        }
        assert refused.get(method) and re.search("wider heads|more than 1|at least 2", str(error))
        return
    for length in (1, 4 * context):
        frequencies, magnitude = scaled_frequencies(config, length)
        assert frequencies.isfinite().all() and (frequencies > 0).all() and math.isfinite(magnitude)


@pytest.mark.parametrize("factor", [0.25, 0.0, float("nan"), float("inf")])
def test_no_factors_are_searched_for_a_shorter_context(factor):
    with pytest.raises(ValueError, match="a context is made longer, so give a number from 1 on"):
        search_factors(lambda factors: 0.0, [torch.ones(4)], factor)
