"""Right answers in another style than the chapter's are accepted."""

import math
from dataclasses import replace

import pytest
import torch

from minicpm_lite import load_config
from minicpm_lite.exercises.language import multipliers as check
from minicpm_lite.language.decoder import Decoder


def fold_in_double_precision(weights, config):
    """A copy that is changed in place afterwards."""
    folded = {name: weight.double() for name, weight in weights.items()}
    folded["lm_head.weight"] = folded["embed_tokens.weight"] * config.dim_model_base / config.hidden_size
    folded["embed_tokens.weight"] *= config.scale_emb
    for layer in range(config.num_hidden_layers):
        for name in (f"layers.{layer}.self_attn.o_proj.weight", f"layers.{layer}.mlp.down_proj.weight"):
            folded[name] *= config.scale_depth / config.num_hidden_layers**0.5
    return folded


def buried_in_closed_form(start, attention, feed_forward, layers, scale):
    added = (attention**2 + feed_forward**2) * (1 if scale is None else scale**2 / layers)
    blocks = math.floor(start**2 / added) + 1
    return torch.tensor(blocks) if blocks <= layers else None


def rates_as_tensors(names, config, lr, weight_decay):
    """Lists of tensors, from a table of factors."""
    factors = {
        "embed_tokens": config.scale_emb,
        "lm_head": config.dim_model_base / config.hidden_size,
        "o_proj": config.scale_depth / config.num_hidden_layers**0.5,
        "down_proj": config.scale_depth / config.num_hidden_layers**0.5,
    }
    rates = {}
    for name in names:
        module = name.split(".")[-2]
        factor = factors.get(module, 1.0)
        decayed = module.endswith("_proj")
        rates[name] = list(torch.tensor([lr * factor, weight_decay / factor * decayed], dtype=torch.float64))
    return rates


def equal_by_search_outwards(config, layers):
    """Candidates of growing width, until they are larger than what was asked for."""

    def shaped(heads):
        width = heads * config.head_dim
        return replace(
            config,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            hidden_size=width,
            intermediate_size=int(width * config.intermediate_size / config.hidden_size + 0.5),
        )

    def size(shape):
        with torch.device("meta"):
            return Decoder(shape).num_parameters(embeddings=True)

    heads, wanted = 1, size(config)
    while size(shaped(heads)) < wanted:
        heads += 1
    return min((shaped(max(heads - 1, 1)), shaped(heads)), key=lambda each: abs(size(each) - wanted))


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        (check.buried_after, buried_in_closed_form),
        (check.folded_rates, rates_as_tensors),
        (check.forecast, torch.tensor(1.9)),
        (check.mended_fold, fold_in_double_precision),
        (
            check.design,
            replace(
                load_config("minicpm-1.2b"),
                num_key_value_heads=2,
                intermediate_size=4100,
                max_position_embeddings=65_536,
            ),
        ),
        (check.equal_in_all, equal_by_search_outwards),
    ],
)
def test_other_styles(exercise, answer):
    verdict = exercise.judge(answer)
    assert verdict.state == "right", verdict.message
