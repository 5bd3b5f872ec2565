"""Longer contexts: frequencies and whole models equal to transformers, cached equal to uncached."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from minicpm_lite import ModelConfig, load_config
from minicpm_lite.config import LatentAttentionConfig, RopeScaling, load_rope_scaling, model_config
from minicpm_lite.language import decoder, long_context
from minicpm_lite.language.decoder import Decoder, KVCache, rotary_frequencies
from minicpm_lite.language.long_context import (
    extend_context,
    ntk_theta,
    scaled_frequencies,
    search_factors,
)

ORIGINAL, FACTOR = 32, 4.0
PLAIN = ModelConfig(64, 160, 2, 2, 99, max_position_embeddings=ORIGINAL, init_std=0.1)
HALF = PLAIN.rotary_dim // 2
SHORT, LONG = (tuple(1 + i * step for i in range(HALF)) for step in (0.1, 0.3))
METHODS = ("linear", "ntk", "dynamic", "yarn", "llama3", "longrope")
TYPES = {
    "linear": RopeScaling("linear", ORIGINAL, FACTOR),
    "dynamic": RopeScaling("dynamic", ORIGINAL, FACTOR),
    "yarn": RopeScaling("yarn", ORIGINAL, FACTOR),
    "yarn, other borders": RopeScaling("yarn", ORIGINAL, FACTOR, beta_fast=4.0, beta_slow=0.5),
    "yarn, other attention": RopeScaling("yarn", ORIGINAL, FACTOR, attention_factor=1.5),
    "llama3": RopeScaling("llama3", ORIGINAL, FACTOR),
    "longrope": RopeScaling("longrope", ORIGINAL, short_factor=SHORT, long_factor=LONG),
}


def scaled(name: str, config: ModelConfig = PLAIN) -> ModelConfig:
    return replace(config, rope_scaling=TYPES[name], max_position_embeddings=int(FACTOR * ORIGINAL))


def extended(method: str, config: ModelConfig = PLAIN, factor: float = FACTOR) -> ModelConfig:
    return extend_context(config, method, factor, LONG if method == "longrope" else None)


def rope_parameters(config: ModelConfig) -> dict:
    """The same scaling as transformers spells it."""
    scaling = config.rope_scaling
    values = dict(rope_type=scaling.rope_type, rope_theta=config.rope_theta)
    values["original_max_position_embeddings"] = scaling.original_max_position_embeddings
    names = ["factor", "attention_factor"]
    names += {"yarn": ["beta_fast", "beta_slow"], "llama3": ["low_freq_factor", "high_freq_factor"]}.get(
        scaling.rope_type, []
    )
    values |= {name: getattr(scaling, name) for name in names if getattr(scaling, name) is not None}
    if scaling.rope_type == "longrope":
        values |= dict(short_factor=list(scaling.short_factor), long_factor=list(scaling.long_factor))
    return values


def transformers_shape(config: ModelConfig) -> dict:
    dynamic = config.rope_scaling.rope_type == "dynamic"  # there, the original context
    return dict(
        hidden_size=config.hidden_size, intermediate_size=config.intermediate_size, vocab_size=config.vocab_size,
        num_hidden_layers=config.num_hidden_layers, num_attention_heads=config.num_attention_heads,
        max_position_embeddings=ORIGINAL if dynamic else config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps, tie_word_embeddings=True, rope_parameters=rope_parameters(config),
    )  # fmt: skip


def with_weights(reference: torch.nn.Module, model: Decoder) -> torch.nn.Module:
    weights = {f"model.{name}": w for name, w in model.state_dict().items()}
    reference.load_state_dict(weights | {"lm_head.weight": model.tables[-1]})
    return reference.eval()


def llama(model: Decoder) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return with_weights(LlamaForCausalLM(LlamaConfig(**transformers_shape(model.config))), model)


def make_model(config: ModelConfig) -> Decoder:
    torch.manual_seed(0)
    return Decoder(config).eval()


def make_ids(tokens: int) -> torch.Tensor:
    return torch.randint(99, (2, tokens), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("length", [1, ORIGINAL, ORIGINAL + 1, 100, 128])
@pytest.mark.parametrize("name", TYPES)
def test_frequencies_equal_transformers(name, length):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = scaled(name)
    function = ROPE_INIT_FUNCTIONS[config.rope_scaling.rope_type]
    expected, magnitude = function(LlamaConfig(**transformers_shape(config)), "cpu", seq_len=length)
    frequencies, ours = scaled_frequencies(config, length)
    assert_close(frequencies, expected, atol=0, rtol=2e-7)
    assert ours == pytest.approx(magnitude, rel=1e-12)


@pytest.mark.parametrize("tokens", [ORIGINAL, 2 * ORIGINAL + 3])
@pytest.mark.parametrize("name", TYPES)
@torch.no_grad()
def test_models_equal_llama(name, tokens):
    model, ids = make_model(scaled(name)), make_ids(tokens)
    assert_close(model(ids), llama(model)(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tokens", [ORIGINAL, 2 * ORIGINAL + 3])
@torch.no_grad()
def test_latent_attention_with_longrope_equals_minicpm3(tokens):
    from transformers import MiniCPM3Config, MiniCPM3ForCausalLM

    latent = LatentAttentionConfig(24, 16, 16, 8, 12)
    config = replace(
        PLAIN, num_attention_heads=4, num_key_value_heads=None, head_dim=24, latent_attention=latent,
        scale_emb=12, scale_depth=1.4, dim_model_base=32, max_position_embeddings=4 * ORIGINAL,
        rope_scaling=RopeScaling("longrope", ORIGINAL, short_factor=SHORT[:4], long_factor=LONG[:4]),
    )  # fmt: skip
    model, ids = make_model(config), make_ids(tokens)
    sizes = {name: getattr(latent, name) for name in latent.__dataclass_fields__}
    reference = MiniCPM3ForCausalLM(
        MiniCPM3Config(
            **transformers_shape(config), **sizes, num_key_value_heads=4, scale_emb=12, scale_depth=1.4, dim_model_base=32,
        )
    )  # fmt: skip
    assert_close(model(ids), with_weights(reference, model)(ids).logits, atol=1e-5, rtol=1e-5)


# Wrong versions that people really write. Each must differ from the reference by far more than rounding.


def only_cosine(model, patch):
    plain = rotary_frequencies(PLAIN.rotary_dim, PLAIN.rope_theta)
    right = decoder.rotary_angles
    patch.setattr(
        decoder, "rotary_angles", lambda p, f: (right(p, f)[0], right(p, plain)[1])
    )  # the sine is forgotten


def factors_on_theta(model, patch):
    def wrong(config, length):
        scaling = config.rope_scaling
        factors = torch.tensor(scaling.long_factor if length > ORIGINAL else scaling.short_factor)
        right = scaled_frequencies(config, length)
        exponents = torch.arange(0, config.rotary_dim, 2) / config.rotary_dim
        return 1 / (config.rope_theta * factors) ** exponents, right[1]

    patch.setattr(long_context, "scaled_frequencies", wrong)


def ramp_reversed(model, patch):
    right = long_context._yarn_kept
    patch.setattr(long_context, "_yarn_kept", lambda *args: 1 - right(*args))


def no_attention_factor(model, patch):
    right = scaled_frequencies
    patch.setattr(long_context, "scaled_frequencies", lambda config, length: (right(config, length)[0], 1.0))


def attention_factor_on_one_side(model, patch):
    right = decoder.apply_rotary
    magnitude = scaled_frequencies(model.config, 100)[1]
    patch.setattr(decoder, "apply_rotary", lambda x, cos, sin: right(x, cos, sin) / magnitude**0.5)


def short_and_long_exchanged(model, patch):
    scaling = model.config.rope_scaling
    other = replace(scaling, short_factor=scaling.long_factor, long_factor=scaling.short_factor)
    model.config = replace(model.config, rope_scaling=other)


def exponent_without_the_two(model, patch):
    patch.setattr(long_context, "ntk_theta", lambda theta, factor, dim: theta * factor)


WRONG = {
    "only the cosine interpolated": ("linear", only_cosine),
    "factors applied to theta": ("longrope", factors_on_theta),
    "short and long exchanged": ("longrope", short_and_long_exchanged),
    "ramp reversed": ("yarn", ramp_reversed),
    "no attention factor, yarn": ("yarn", no_attention_factor),
    "no attention factor, longrope": ("longrope", no_attention_factor),
    "attention factor on one side": ("yarn", attention_factor_on_one_side),
    "theta times factor": ("dynamic", exponent_without_the_two),
}


@pytest.mark.parametrize("name", WRONG)
@torch.no_grad()
def test_wrong_versions_are_told_apart(name, monkeypatch):
    kind, make_wrong = WRONG[name]
    model, ids = make_model(scaled(kind)), make_ids(100)
    expected = llama(model)(ids).logits
    make_wrong(model, monkeypatch)
    assert (model(ids) - expected).abs().max() > 1e-4


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
    assert bool((ratio > 1 - 1e-5).all() and (ratio < factor * (1 + 1e-5)).all())
    assert bool((ratio.diff() > -1e-4).all())  # slow pairs are slowed at least as much as fast ones


def test_yarn_keeps_the_fastest_and_divides_the_slowest_exactly():
    config = extend_context(load_config("minicpm4-0.5b"), "yarn", 4.0)
    plain = rotary_frequencies(64, 10_000.0)
    frequencies, magnitude = scaled_frequencies(config, 131_072)
    turns = 32_768 * plain / (2 * math.pi)
    kept, divided = turns >= 32, turns < 1
    assert (kept.sum(), divided.sum()) == (18, 2)
    assert_close(frequencies[kept], plain[kept], atol=0, rtol=0)
    assert_close(frequencies[divided], plain[divided] / 4, atol=0, rtol=0)
    assert magnitude == 0.1 * math.log(4) + 1


@given(st.floats(1.0, 100.0), st.integers(2, 64))
def test_ntk_divides_the_slowest_pair_by_the_factor_and_keeps_the_fastest(factor, half):
    before, after = (rotary_frequencies(2 * half, t) for t in (1e4, ntk_theta(1e4, factor, 2 * half)))
    assert after[0] == before[0] == 1
    assert (before[-1] / after[-1]).item() == pytest.approx(factor, rel=1e-4)


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
    model, ids = make_model(extended(method)), make_ids(100)
    whole = model(ids)
    for cuts in ([20], [32, 33], [1, 50, 99]):
        cache = KVCache(100)  # room for the text: what decides the frequencies is its length
        pieces = [model(piece, cache) for piece in ids.tensor_split(cuts, dim=1)]
        assert_close(torch.cat(pieces, dim=1), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["dynamic", "longrope"])
@torch.no_grad()
def test_a_cache_with_more_room_means_the_frequencies_of_a_longer_text(method):
    model, ids = make_model(extended(method)), make_ids(20)
    assert not torch.allclose(model(ids, KVCache(100)), model(ids), atol=1e-4)
    assert_close(model(ids, KVCache(ORIGINAL)), model(ids), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_weights_stay_and_an_unscaled_model_refuses_what_an_extended_one_reads():
    model, ids = make_model(PLAIN), make_ids(2 * ORIGINAL)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"extend its context first"):
        model(ids)
    model.config = extend_context(model.config, "yarn", 2.0)
    assert bool(model(ids).isfinite().all())
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "original", "first", "last"),
    [
        ("minicpm4-8b", 32_768, 0.9977997200264581, 124.09569231686116),
        ("minicpm4.1-8b", 65_536, 0.9982316082870437, 126.01712561287873),
    ],
)
def test_released_factors(name, original, first, last):
    scaling, config = load_rope_scaling(name), load_config(name)
    assert scaling.original_max_position_embeddings == config.max_position_embeddings == original
    assert scaling.long_factor == scaling.short_factor
    assert len(scaling.long_factor) == config.rotary_dim // 2 == 64
    assert (scaling.long_factor[0], scaling.long_factor[-1]) == (first, last)
    assert list(scaling.long_factor) == sorted(scaling.long_factor)
    longer = replace(config, max_position_embeddings=131_072, rope_scaling=scaling)
    frequencies, magnitude = scaled_frequencies(longer, 131_072)
    assert magnitude == 1.0
    assert_close(frequencies, rotary_frequencies(128, 10_000.0) / torch.tensor(scaling.long_factor))


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
