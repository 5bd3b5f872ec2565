"""Families: each spelling of a config gives the right shape, and what would compute otherwise is refused."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicpm_lite import ModelConfig, list_configs, load_config
from minicpm_lite.config import LatentAttentionConfig, MixtureConfig, RopeScaling
from minicpm_lite.pretrained.families import config_from_json, config_to_json, own_family, stored_names

SHAPE = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=99,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
)
MULTIPLIERS = dict(scale_emb=12, scale_depth=1.4, dim_model_base=32)
MINICPM = SHAPE | MULTIPLIERS | {"model_type": "minicpm"}
LLAMA = SHAPE | {"model_type": "llama"}
GRANITE = SHAPE | {"model_type": "granite", "attention_multiplier": 0.25}
LATENT = LatentAttentionConfig(24, 16, 16, 8, 12)
ROPES = {
    "linear": RopeScaling("linear", 64, factor=2.0),
    "dynamic": RopeScaling("dynamic", 64, factor=2.0),
    "yarn": RopeScaling("yarn", 16, factor=4.0, beta_fast=16.0),
    "yarn, attention_factor": RopeScaling("yarn", 16, factor=4.0, attention_factor=1.1),
    "llama3": RopeScaling("llama3", 16, factor=4.0, high_freq_factor=3.0),
    "longrope": RopeScaling("longrope", 16, short_factor=(1.0,) * 8, long_factor=(2.0,) * 8),
}
MODELS = {
    "llama": ModelConfig(**SHAPE, tie_word_embeddings=False),
    "llama, wide heads": ModelConfig(**SHAPE, head_dim=24),
    "minicpm": ModelConfig(**SHAPE, **MULTIPLIERS, init_std=0.1),
    "minicpm, some multipliers": ModelConfig(**SHAPE, scale_emb=3.0),
    "minicpm, experts": ModelConfig(**SHAPE, **MULTIPLIERS, mixture=MixtureConfig(8, 2)),
    "mixtral": ModelConfig(**SHAPE, mixture=MixtureConfig(3, 2)),
    "minicpm3": ModelConfig(
        **SHAPE | {"num_key_value_heads": 4}, head_dim=24, latent_attention=LATENT, **MULTIPLIERS
    ),
    "minicpm3, no multipliers": ModelConfig(
        **SHAPE | {"num_key_value_heads": 4}, head_dim=24, latent_attention=LATENT
    ),
} | {f"rope {name}": ModelConfig(**SHAPE, rope_scaling=rope) for name, rope in ROPES.items()}


@pytest.mark.parametrize("name", MODELS)
def test_what_is_written_is_read_again(name):
    config = MODELS[name]
    assert config_from_json(config_to_json(config, own_family(config))) == config


@pytest.mark.parametrize("name", list_configs())
def test_every_released_shape_is_written_and_read_again(name):
    config = load_config(name)
    assert config_from_json(config_to_json(config, own_family(config))) == config


def test_a_minicpm_is_a_granite_under_other_names():
    values = config_to_json(MODELS["minicpm"], "granite")
    assert (values["embedding_multiplier"], values["residual_multiplier"]) == (12, 1.4 / 4**0.5)
    assert (values["attention_multiplier"], values["logits_scaling"]) == (16**-0.5, 64 / 32)
    assert config_from_json(values) == MODELS["minicpm"]


@settings(max_examples=50, deadline=None)
@given(
    layers=st.integers(1, 80),
    depth=st.integers(1, 400).map(lambda hundredths: hundredths / 100),
    base=st.integers(8, 512),
)
def test_multipliers_survive_granite(layers, depth, base):
    config = ModelConfig(
        **SHAPE | {"num_hidden_layers": layers}, scale_emb=12, scale_depth=depth, dim_model_base=base
    )
    back = config_from_json(config_to_json(config, "granite"))
    assert back.residual_scale == pytest.approx(config.residual_scale, rel=1e-12)
    assert back.width_ratio == pytest.approx(config.width_ratio, rel=1e-12)


def test_the_balance_loss_survives():
    config = ModelConfig(**SHAPE, mixture=MixtureConfig(4, 2, 0.5))
    for family in ("mixtral", "minicpm"):
        assert config_from_json(config_to_json(config, family)).mixture == config.mixture


def test_a_factor_that_no_type_reads_is_refused():
    with pytest.raises(ValueError, match="hold factor and no rope_type that reads"):
        config_from_json(LLAMA | {"rope_scaling": {"factor": 4.0}})


def test_the_same_default_differs_by_family():
    assert config_from_json(MINICPM).tie_word_embeddings
    assert not config_from_json(LLAMA).tie_word_embeddings
    assert config_from_json(LLAMA).rope_theta == 10_000
    mixtral = SHAPE | {"model_type": "mixtral"}
    assert config_from_json(mixtral).rope_theta == 1_000_000
    assert config_from_json(mixtral).mixture == MixtureConfig(8, 2, 0.001)
    minicpm3 = config_from_json(SHAPE | {"model_type": "minicpm3"})
    assert minicpm3.latent_attention == LatentAttentionConfig(768, 256, 64, 32, 16)
    assert (minicpm3.scale_emb, minicpm3.scale_depth, minicpm3.dim_model_base) == (12, 1.4, 256)


def test_defaults_are_those_of_transformers():
    from transformers import AutoConfig

    for family in ("llama", "granite", "mixtral", "minicpm3"):
        theirs = AutoConfig.for_model(family, **SHAPE)
        given = SHAPE | {"model_type": family, "attention_multiplier": 0.25}
        ours = config_from_json(given)
        assert ours.tie_word_embeddings == theirs.tie_word_embeddings
        assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
        if family == "minicpm3":
            assert (ours.scale_emb, ours.scale_depth, ours.dim_model_base) == (
                theirs.scale_emb, theirs.scale_depth, theirs.dim_model_base,
            )  # fmt: skip


def test_the_class_stands_in_for_a_missing_model_type():
    values = MINICPM | {"architectures": ["MiniCPMForCausalLM"]}
    del values["model_type"]
    assert config_from_json(values) == config_from_json(MINICPM)


def test_null_multipliers_of_minicpm3_do_nothing():
    values = SHAPE | {"model_type": "minicpm3", "scale_depth": None, "dim_model_base": None}
    config = config_from_json(values)
    assert (config.residual_scale, config.width_ratio) == (1, 1)


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_theta": 500.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}},
        {
            "rope_theta": 500.0,
            "rope_scaling": None,
            "rope_parameters": {"rope_type": "linear", "factor": 2.0},
        },
    ],
)
def test_both_spellings_of_the_rotary_parameters(spelling):
    config = config_from_json(LLAMA | spelling)
    assert config.rope_theta == 500
    assert config.rope_scaling == RopeScaling("linear", 64, factor=2.0)


def test_the_original_context_may_stand_outside():
    inside = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    assert config_from_json(LLAMA | {"rope_scaling": inside}).rope_scaling == ROPES["yarn"].__class__(
        "yarn", 16, factor=4.0
    )
    outside = {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 16}
    assert config_from_json(LLAMA | outside).rope_scaling.original_max_position_embeddings == 16


def test_yarn_by_two_magnitudes():
    import math

    rope = {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.5}
    factor = config_from_json(LLAMA | {"rope_scaling": rope}).rope_scaling.attention_factor
    assert factor == pytest.approx((0.1 * math.log(4) + 1) / (0.05 * math.log(4) + 1))


def test_names_of_experts():
    config = MODELS["minicpm, experts"]
    own = "layers.2.mlp.experts.5."
    for family, mlp in (("minicpm", "mlp"), ("mixtral", "block_sparse_moe")):
        names = stored_names(config, family)
        theirs = f"model.layers.2.{mlp}.experts.5."
        assert names[own + "gate_proj.weight"] == theirs + "w1.weight"
        assert names[own + "up_proj.weight"] == theirs + "w3.weight"
        assert names[own + "down_proj.weight"] == theirs + "w2.weight"
        assert names["layers.2.mlp.gate.weight"] == f"model.layers.2.{mlp}.gate.weight"


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({}, "model_type is None; known are llama, mistral, minicpm, minicpm3, granite, mixtral"),
        (SHAPE | {"model_type": "gemma"}, "model_type is 'gemma'"),
        (SHAPE | {"architectures": ["GPT2LMHeadModel"]}, "model_type is None"),
        ({k: v for k, v in LLAMA.items() if k != "hidden_size"}, "the field hidden_size is missing, and llama"),
        ({k: v for k, v in LLAMA.items() if k != "rms_norm_eps"}, "the field rms_norm_eps is missing"),
        (SHAPE | {"model_type": "minicpm"}, "the field scale_depth is missing, and minicpm"),
        ({k: v for k, v in (SHAPE | {"model_type": "mixtral"}).items() if k != "num_key_value_heads"}, "num_key_value_heads is missing"),
        (LLAMA | {"hidden_size": "64"}, "hidden_size is '64'; expected a whole number"),
        (LLAMA | {"num_attention_heads": 3}, "num_attention_heads is 3"),
        (LLAMA | {"attention_bias": True}, "attention_bias is True, and the decoder has none"),
        (LLAMA | {"mlp_bias": True}, "mlp_bias is True"),
        (LLAMA | {"rope_interleaved": True}, "rope_interleaved is True"),
        (LLAMA | {"quantization_config": {"quant_method": "gptq"}}, "quantization_config is .*gptq"),
        (LLAMA | {"hidden_act": "gelu"}, "hidden_act is 'gelu'; the decoder's feed-forward uses silu"),
        (LLAMA | {"sliding_window": 32}, "sliding_window is 32, and the decoder sees all 64 tokens"),
        (SHAPE | {"model_type": "mistral", "max_position_embeddings": 32768}, "sliding_window is 4096 by default"),
        (LLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        (LLAMA | {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is not 1"),
        (LLAMA | {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "expected one set for all layers"),
        (LLAMA | {"rope_scaling": {"type": "su", "factor": 2.0}}, "rope_type is 'su'; expected one of"),
        (LLAMA | {"rope_scaling": {"type": "linear"}}, '"linear" needs a factor'),
        (LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0, "bend": 1}}, "of type 'linear' hold bend, unknown here"),
        (LLAMA | {"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": False}}, 'truncate of "yarn" is false'),
        (LLAMA | {"num_experts": 4, "num_experts_per_tok": 2}, "num_experts is 4; llama has no mixture"),
        (MINICPM | {"num_experts": 4}, "the field num_experts_per_tok is missing"),
        (SHAPE | {"model_type": "granite"}, r"attention_multiplier is 1.0; .* 1/sqrt\(head_dim\), 0.25"),
        (GRANITE | {"logits_scaling": 0}, "logits_scaling is 0; expected a number greater than 0"),
        (GRANITE | {"residual_multiplier": "a"}, "residual_multiplier is 'a'"),
        (SHAPE | {"model_type": "minicpm3", "q_lora_rank": None}, "q_lora_rank is null"),
        (MINICPM | {"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'"),
    ],
)  # fmt: skip
def test_what_would_compute_otherwise_is_refused(values, sentence):
    with pytest.raises(ValueError, match=f"^here/config.json: .*{sentence}"):
        config_from_json(values, "here/config.json")


@pytest.mark.parametrize(
    ("name", "family", "sentence"),
    [
        ("minicpm", "llama", 'has multipliers. Write it as "granite".*fold_to_llama'),
        ("minicpm", "mixtral", "has no mixture"),
        ("minicpm", "minicpm3", "has no latent attention"),
        ("minicpm, experts", "mixtral", 'has multipliers. Write it as "minicpm"'),
        ("minicpm, experts", "granite", "has a mixture of experts"),
        ("mixtral", "llama", "has a mixture of experts"),
        ("minicpm3", "minicpm", 'has latent attention. Write it as "minicpm3"'),
        ("llama, wide heads", "minicpm", "its heads are 24 wide"),
        ("llama", "mistral", "model_type is 'mistral'; models are written as one of llama, minicpm,"),
        ("llama", "gpt2", "model_type is 'gpt2'"),
    ],
)
def test_a_family_that_computes_otherwise_is_not_written(name, family, sentence):
    with pytest.raises(ValueError, match=sentence):
        config_to_json(MODELS[name], family)


def test_a_dynamic_scaling_that_others_would_start_elsewhere_is_not_written():
    config = ModelConfig(**SHAPE, rope_scaling=RopeScaling("dynamic", 16, factor=4.0))
    with pytest.raises(ValueError, match='"dynamic" rope scaling starts at 16 tokens.*64'):
        config_to_json(config, "llama")
