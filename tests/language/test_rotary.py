"""Rotary positions: known by hand, by distance alone; with every scaling equal to transformers."""

import math
from dataclasses import replace

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import make_ids, make_model
from torch.testing import assert_close

from minicpm_lite import ModelConfig, load_config
from minicpm_lite.config import LatentAttentionConfig, RopeScaling, load_rope_scaling
from minicpm_lite.language import layers, rotary
from minicpm_lite.language.context import KVCache
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.language.long_context import extend_context
from minicpm_lite.language.rotary import (
    apply_rotary,
    ntk_theta,
    rotary_angles,
    rotary_frequencies,
    scaled_angles,
    scaled_frequencies,
)

ORIGINAL, FACTOR = 32, 4.0
PLAIN = ModelConfig(64, 160, 2, 2, 99, max_position_embeddings=ORIGINAL, init_std=0.1)
HALF = PLAIN.rotary_dim // 2
SHORT, LONG = (tuple(1 + i * step for i in range(HALF)) for step in (0.1, 0.3))
TYPES = {
    "linear": RopeScaling("linear", ORIGINAL, FACTOR),
    "dynamic": RopeScaling("dynamic", ORIGINAL, FACTOR),
    "yarn": RopeScaling("yarn", ORIGINAL, FACTOR),
    "yarn, other borders": RopeScaling("yarn", ORIGINAL, FACTOR, beta_fast=4.0, beta_slow=0.5),
    "yarn, other attention": RopeScaling("yarn", ORIGINAL, FACTOR, attention_factor=1.5),
    "llama3": RopeScaling("llama3", ORIGINAL, FACTOR),
    "longrope": RopeScaling("longrope", ORIGINAL, short_factor=SHORT, long_factor=LONG),
}


# Turning


def test_positions_of_rows_are_not_taken_for_positions_of_heads(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as it is for a reader
    x, positions = torch.randn(2, 2, 3, 4), torch.tensor([[0, 1, 2], [5, 6, 7]])
    frequencies = rotary_frequencies(4, 10_000.0)
    with pytest.raises(
        ValueError, match=r"cos has shape \(2, 3, 4\); .* for each row its own: positions\[:, None"
    ):
        apply_rotary(x, *rotary_angles(positions, frequencies))
    found = apply_rotary(x, *rotary_angles(positions[:, None], frequencies))
    for row in range(2):
        assert torch.equal(found[[row]], apply_rotary(x[[row]], *rotary_angles(positions[row], frequencies)))


@settings(max_examples=50, deadline=None)
@given(position=st.integers(0, 30_000), shift=st.integers(0, 2_000), distance=st.integers(0, 200))
def test_rotated_products_depend_on_distance_only(position, shift, distance):
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float32)

    def product(at):
        cos, sin = rotary_angles(torch.tensor([at, at + distance]), rotary_frequencies(16, 10_000.0))
        return (apply_rotary(k, cos[:1], sin[:1]) * apply_rotary(q, cos[1:], sin[1:])).sum()

    assert_close(product(position), product(position + shift), atol=2e-2, rtol=0)


def test_rotary_keeps_lengths_and_starts_at_the_identity():
    x = torch.randn(1, 2, 3, 8)
    turned = apply_rotary(x, *rotary_angles(torch.arange(3), rotary_frequencies(8, 10_000.0)))
    assert_close(turned[:, :, 0], x[:, :, 0])
    assert_close(turned.norm(dim=-1), x.norm(dim=-1))


def test_rotary_of_a_pair_known_by_hand():
    cos, sin = rotary_angles(
        torch.tensor([1]), rotary_frequencies(4, 100.0)
    )  # pair 0 turns by 1, pair 1 by 100^(-1/2) = 0.1
    turned = apply_rotary(torch.tensor([[[[1.0, 1.0, 0.0, 0.0]]]]), cos, sin)
    expected = torch.tensor([math.cos(1), math.cos(0.1), math.sin(1), math.sin(0.1)])
    assert_close(turned.flatten(), expected)


def test_rows_may_stand_at_positions_of_their_own():
    x, frequencies = torch.randn(2, 3, 4, 8), rotary_frequencies(8, 10_000.0)
    positions = torch.tensor([[0, 1, 2, 3], [5, 9, 2, 7]])
    together = apply_rotary(x, *rotary_angles(positions[:, None], frequencies))  # (batch, 1, tokens)
    for row, at in enumerate(positions):
        assert torch.equal(together[row], apply_rotary(x[row : row + 1], *rotary_angles(at, frequencies))[0])


def test_angles_stay_in_float32_and_the_result_has_the_type_of_the_weights():
    """At position 30,000 bfloat16 knows no angle, for its neighbours are 128 apart."""
    x = torch.randn(1, 1, 2, 8, dtype=torch.bfloat16)
    angles = rotary_angles(torch.tensor([29_999, 30_000]), rotary_frequencies(8, 10_000.0))
    assert {each.dtype for each in angles} == {torch.float32}
    turned = apply_rotary(x, *angles)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, apply_rotary(x.float(), *angles).bfloat16())


# Scaled frequencies


def scaled(name: str, config: ModelConfig = PLAIN) -> ModelConfig:
    return replace(config, rope_scaling=TYPES[name], max_position_embeddings=int(FACTOR * ORIGINAL))


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


@pytest.mark.parametrize("name", TYPES)
def test_scaled_angles_are_those_of_the_frequencies_times_the_magnitude(name):
    config, positions = scaled(name), torch.tensor([0, 3, 99])
    frequencies, magnitude = scaled_frequencies(config, 100)
    cos, sin = scaled_angles(config, positions, 100)
    assert_close(cos[:, HALF:], (positions[:, None] * frequencies).cos() * magnitude)
    assert_close(sin[:, HALF:], (positions[:, None] * frequencies).sin() * magnitude)


@pytest.mark.parametrize("tokens", [ORIGINAL, 2 * ORIGINAL + 3])
@pytest.mark.parametrize("name", TYPES)
@torch.no_grad()
def test_models_equal_llama(name, tokens):
    model, ids = make_model(scaled(name)), make_ids(PLAIN, tokens=tokens)
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
    model, ids = make_model(config), make_ids(config, tokens=tokens)
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
    right = rotary.rotary_angles
    patch.setattr(
        rotary, "rotary_angles", lambda p, f: (right(p, f)[0], right(p, plain)[1])
    )  # the sine is forgotten


def factors_on_theta(model, patch):
    def wrong(config, length):
        scaling = config.rope_scaling
        factors = torch.tensor(scaling.long_factor if length > ORIGINAL else scaling.short_factor)
        right = scaled_frequencies(config, length)
        exponents = torch.arange(0, config.rotary_dim, 2) / config.rotary_dim
        return 1 / (config.rope_theta * factors) ** exponents, right[1]

    patch.setattr(rotary, "scaled_frequencies", wrong)


def ramp_reversed(model, patch):
    right = rotary._yarn_kept
    patch.setattr(rotary, "_yarn_kept", lambda *args: 1 - right(*args))


def no_attention_factor(model, patch):
    right = scaled_frequencies
    patch.setattr(rotary, "scaled_frequencies", lambda config, length: (right(config, length)[0], 1.0))


def attention_factor_on_one_side(model, patch):
    right = layers.apply_rotary
    magnitude = scaled_frequencies(model.config, 100)[1]
    patch.setattr(layers, "apply_rotary", lambda x, cos, sin: right(x, cos, sin) / magnitude**0.5)


def short_and_long_exchanged(model, patch):
    scaling = model.config.rope_scaling
    other = replace(scaling, short_factor=scaling.long_factor, long_factor=scaling.short_factor)
    model.config = replace(model.config, rope_scaling=other)


def exponent_without_the_two(model, patch):
    patch.setattr(rotary, "ntk_theta", lambda theta, factor, dim: theta * factor)


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
    model, ids = make_model(scaled(kind)), make_ids(PLAIN, tokens=100)
    expected = llama(model)(ids).logits
    make_wrong(model, monkeypatch)
    assert (model(ids) - expected).abs().max() > 1e-4
    assert (model(ids, KVCache(100)) - expected).abs().max() > 1e-4


# What each method does to the pairs


@pytest.mark.parametrize("name", TYPES)
def test_frequencies_are_in_float32_whatever_torch_makes_tensors_of(name):
    config = scaled(name)
    expected, magnitude = scaled_frequencies(config, 100)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = scaled_frequencies(config, 100)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found[0].dtype == torch.float32 and torch.equal(found[0], expected) and found[1] == magnitude


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
