"""Families: each spelling of a config gives the right shape, and what would compute otherwise is refused."""

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sides import both_sides
from transformers import AutoConfig

from minicpm_lite import ModelConfig, list_configs, load_config
from minicpm_lite.config import LatentAttentionConfig, MixtureConfig
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.pretrained.families import config_from_json, config_to_json, own_family, stored_name

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
    "minicpm, ids that end": ModelConfig(**SHAPE, **MULTIPLIERS, eos_token_id=(2, 73)),
    "minicpm3, no multipliers": ModelConfig(
        **SHAPE | {"num_key_value_heads": 4}, head_dim=24, latent_attention=LATENT
    ),
}


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


def test_names_of_experts():
    own = "layers.2.mlp.experts.5."
    for family, mlp in (("minicpm", "mlp"), ("mixtral", "block_sparse_moe")):
        theirs = f"model.layers.2.{mlp}.experts.5."
        assert stored_name(own + "gate_proj.weight", family) == theirs + "w1.weight"
        assert stored_name(own + "up_proj.weight", family) == theirs + "w3.weight"
        assert stored_name(own + "down_proj.weight", family) == theirs + "w2.weight"
        assert stored_name("layers.2.mlp.gate.weight", family) == f"model.layers.2.{mlp}.gate.weight"


def test_all_other_names_are_those_of_the_released_checkpoints():
    for name in ("minicpm", "minicpm3"):
        with torch.device("meta"):
            own = [parameter for parameter, _ in Decoder(MODELS[name]).named_parameters()]
        assert [stored_name(parameter, name) for parameter in own] == [f"model.{each}" for each in own]
    assert stored_name("lm_head.weight", "granite") == "lm_head.weight"


@pytest.mark.parametrize(
    ("given", "ends"), [({}, ()), (None, ()), (7, (7,)), ([7], (7,)), ([2, 73, 2], (2, 73)), ([], ())]
)
def test_ids_that_end_a_text_are_a_number_a_list_or_null(given, ends):
    for base in (LLAMA, MINICPM, GRANITE):
        assert config_from_json(base | ({} if given == {} else {"eos_token_id": given})).eos_token_id == ends


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
        (LLAMA | {"is_causal": False}, "is_causal is false: tokens see what follows them"),
        (LLAMA | {"quantization_config": {"quant_method": "gptq"}}, "quantization_config is .*gptq"),
        (LLAMA | {"hidden_act": "gelu"}, "hidden_act is 'gelu'; the decoder's feed-forward uses silu"),
        (LLAMA | {"sliding_window": 32}, "sliding_window is 32, and the decoder sees all 64 tokens"),
        (SHAPE | {"model_type": "mistral", "max_position_embeddings": 32768}, "sliding_window is 4096 by default"),
        (LLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        (LLAMA | {"eos_token_id": 99}, "eos_token_id is 99; expected ids of the vocabulary"),
        (LLAMA | {"num_experts": 4, "num_experts_per_tok": 2}, "num_experts is 4; llama has no mixture"),
        (MINICPM | {"num_experts": 4}, "the field num_experts_per_tok is missing"),
        (SHAPE | {"model_type": "granite"}, r"attention_multiplier is 1.0; .* 1/sqrt\(head_dim\), 0.25"),
        (GRANITE | {"logits_scaling": 0}, "logits_scaling is 0; expected a number greater than 0"),
        (GRANITE | {"residual_multiplier": "a"}, "residual_multiplier is 'a'"),
        (SHAPE | {"model_type": "minicpm3", "q_lora_rank": None}, "q_lora_rank is null"),
        (SHAPE | {"model_type": "minicpm3", "num_attention_heads": 0}, "num_attention_heads is 0; expected a whole number"),
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
        ("minicpm3, experts", "minicpm3", "latent attention and a mixture of experts, which no family has"),
        ("minicpm3, experts", "minicpm", "latent attention and a mixture of experts, which no family has"),
        ("minicpm3", "minicpm", 'has latent attention. Write it as "minicpm3"'),
        (
            "minicpm3, shared heads",
            "minicpm3",
            "4 heads and num_key_value_heads is 2; latent attention shares",
        ),
        ("llama, wide heads", "minicpm", "its heads are 24 wide"),
        ("llama", "mistral", "model_type is 'mistral'; models are written as one of llama, minicpm,"),
        ("llama", "gpt2", "model_type is 'gpt2'"),
    ],
)
def test_a_family_that_computes_otherwise_is_not_written(name, family, sentence):
    latent = MODELS["minicpm3"]
    unwritten = {
        "minicpm3, experts": replace(latent, mixture=MixtureConfig(4, 2)),
        "minicpm3, shared heads": replace(latent, num_key_value_heads=2),
    }
    with pytest.raises(ValueError, match=sentence):
        config_to_json((MODELS | unwritten)[name], family)


# Every field that transformers reads.


def others(value: object) -> list[object]:
    """Other values of the same kind."""
    match value:
        case bool():
            return [not value]
        case int():
            return [value + 1, value // 2]
        case float():
            return [1.5 * value + 0.25]
        case str():
            return ["gelu"]
        case None:
            return [8, 0.5, True]
    return []


APPLIED = {  # fields that change the logits on both sides, beside rms_norm_eps
    "llama": set(),
    "mistral": set(),
    "granite": {"embedding_multiplier", "residual_multiplier", "logits_scaling"},
    "mixtral": {"num_experts_per_tok"},
    "minicpm3": {"scale_emb", "scale_depth", "dim_model_base"},
}


@pytest.mark.slow  # every field of every family, beside transformers
@pytest.mark.parametrize("family", APPLIED)
def test_each_field_is_applied_as_transformers_applies_it_or_refused(family):
    plain, config = both_sides(family), AutoConfig.for_model(family)
    assert plain.agree() and isinstance(plain.ours, torch.Tensor)
    names = {field.name for field in fields(config) if not field.name.startswith("_")}
    names -= {"rope_parameters"}  # they have tests of their own
    names |= {
        "attention_bias",
        "head_dim",
        "mlp_bias",
        "partial_rotary_factor",
        "rope_theta",
        "sliding_window",
    }
    for name in sorted(names):
        for value in others(getattr(config, name, None)):
            sides = both_sides(family, **{name: value})
            assert sides.agree(), (name, value)
            if name in APPLIED[family] | {"rms_norm_eps"}:
                assert isinstance(sides.ours, torch.Tensor), (name, value, sides.ours)
                assert not torch.equal(sides.ours, plain.ours), (name, value)
