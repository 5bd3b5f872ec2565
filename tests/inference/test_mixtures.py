"""Mixtures: llama.cpp's rules for every released shape, and what a model weighs by exact count."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from small_models import FAMILIES, WIDE

from minicpm_lite import list_configs, load_config
from minicpm_lite.inference.mixtures import Size, mixture, packed_size
from minicpm_lite.language.decoder import Decoder

SMOLLM2 = replace(
    load_config("lite-1m"), hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, head_dim=64, vocab_size=49_152, dim_model_base=None,
)  # fmt: skip


def more_bits(layer: int, layers: int) -> bool:
    """llama.cpp's use_more_bits, as it stands there, in whole numbers."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


@pytest.mark.parametrize("name", list_configs())
def test_q4_k_m_of_every_config_follows_the_rule(name):
    config = load_config(name)
    types, layers = mixture("Q4_K_M", config), config.num_hidden_layers
    fits = {"Q4_K": "Q5_0", "Q6_K": "Q8_0", "Q5_K": "Q5_1", "Q8_0": "Q8_0"}
    with torch.device("meta"):
        shapes = {at: p.shape for at, p in Decoder(config).named_parameters()}
    for at, shape in shapes.items():
        if len(shape) == 1 or at.endswith("mlp.gate.weight"):
            assert at not in types
            continue
        eight = config.mixture is not None and config.mixture.num_experts == 8
        wanted = "Q4_K"
        if at == "lm_head.weight" or (at == "embed_tokens.weight" and config.tie_word_embeddings):
            wanted = "Q6_K"
        elif at.startswith("layers."):
            layer, inner = int(at.split(".")[1]), at.split(".", 2)[2].removesuffix(".weight")
            values = inner in ("self_attn.v_proj", "self_attn.kv_b_proj")
            if (values or inner.endswith("down_proj")) and more_bits(layer, layers):
                wanted = "Q6_K"
            if eight and (values or inner == "self_attn.k_proj"):
                wanted = "Q8_0"
            if eight and inner == "self_attn.o_proj":
                wanted = "Q5_K"
        assert types[at] == (wanted if shape[1] % 256 == 0 else fits[wanted]), at


def test_rows_of_576_get_blocks_of_32():
    """SmolLM2-135M: its hidden size is no multiple of 256, its intermediate size is."""
    types = mixture("Q4_K_M", SMOLLM2)
    assert types["embed_tokens.weight"] == "Q8_0"
    assert types["layers.4.self_attn.q_proj.weight"] == types["layers.4.mlp.up_proj.weight"] == "Q5_0"
    assert types["layers.0.self_attn.v_proj.weight"] == "Q8_0"
    assert (
        types["layers.0.mlp.down_proj.weight"] == "Q6_K" and types["layers.3.mlp.down_proj.weight"] == "Q4_K"
    )
    assert Counter(mixture("TQ2_0", SMOLLM2).values()) == {"Q8_0": 1, "Q4_0": 30 * 6, "TQ2_0": 30}
    assert Counter(mixture("Q4_0", SMOLLM2).values()) == {"Q8_0": 1, "Q4_0": 30 * 7}


def test_the_layers_that_get_more_bits_by_hand():
    """Of 32: the first four, the last four, and between them each third, from the seventh on."""
    types = mixture("Q4_K_M", load_config("minicpm4-8b"))
    six = [at for at in range(32) if types[f"layers.{at}.mlp.down_proj.weight"] == "Q6_K"]
    assert six == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "TQ1_0", "TQ2_0"])
def test_output_layers_and_tables(name):
    tied, untied = mixture(name, WIDE["grouped"]), mixture(name, WIDE["untied"])
    plain = {"TQ1_0": "Q4_K", "TQ2_0": "Q4_K"}.get(name, name)
    assert tied["embed_tokens.weight"] == untied["lm_head.weight"] == ("Q8_0" if name == "Q8_0" else "Q6_K")
    assert untied["embed_tokens.weight"] == plain


def test_minicpm_s_int4_leaves_tables_and_norms():
    config = load_config("minicpm-2.4b")
    types = mixture("INT4_G128", config)
    assert set(types.values()) == {"INT4_G128"} and all(at.startswith("layers.") for at in types)
    assert len(types) == 7 * config.num_hidden_layers
    size = packed_size(config, types, torch.bfloat16)
    assert 1.8 < size.megabytes / 1000 < 2.0, "the paper says about 2 GB"


def test_size_by_hand():
    config = WIDE["grouped"]
    d, layers, vocabulary = 256, 2, config.vocab_size
    matrices = layers * (2 * d * d + 2 * d * 128 + 3 * d * d)
    norms = (2 * layers + 1) * d
    size = packed_size(config, mixture("Q8_0", config))
    assert size.weights == matrices + norms + vocabulary * d
    assert size.nbytes == (matrices + vocabulary * d) * 34 // 32 + 4 * norms
    assert packed_size(config, {}) == Size(size.weights, 4 * size.weights)
    assert packed_size(config, {}).bits_per_weight == 32


@pytest.mark.parametrize("name", list_configs())
def test_released_shapes_at_ternary_are_well_above_log2_of_3(name):
    config = load_config(name)
    for kind, least in (("TQ1_0", 1.6875), ("TQ2_0", 2.0625)):
        assert least < packed_size(config, mixture(kind, config)).bits_per_weight < 6


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_that_no_block_divides_stay_as_they_are(name):
    """llama.cpp writes them as F16."""
    config = FAMILIES[name]
    types = mixture("Q4_0", config)
    with torch.device("meta"):
        shapes = {at: p.shape for at, p in Decoder(config).named_parameters()}
    fitting = {
        at
        for at, s in shapes.items()
        if len(s) == 2 and s[1] % 32 == 0 and not at.endswith("mlp.gate.weight")
    }
    assert types.keys() == fitting


def test_what_is_unknown_or_does_not_fit_is_refused():
    config = WIDE["grouped"]
    for name in ("layers.9.mlp.up_proj.weight", "layers.0.mlp.up_proj", "norm.weight", "lm_head.weight"):
        with pytest.raises(ValueError, match=f"has no matrix '{name}'"):
            packed_size(config, {name: "Q8_0"})
    assert packed_size(WIDE["untied"], {"lm_head.weight": "Q8_0"}) != packed_size(WIDE["untied"], {})
    with pytest.raises(ValueError, match="There is no mixture 'Q4_K'"):
        mixture("Q4_K", SMOLLM2)
    with pytest.raises(ValueError, match="Rows of 576 weights do not divide into blocks of 128"):
        mixture("INT4_G128", SMOLLM2)
