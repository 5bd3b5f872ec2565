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
    folded["norm.weight"] *= config.dim_model_base / config.hidden_size
    for layer in range(config.num_hidden_layers):
        for name in (f"layers.{layer}.self_attn.o_proj.weight", f"layers.{layer}.mlp.down_proj.weight"):
            folded[name] *= config.scale_depth / config.num_hidden_layers**0.5 / config.scale_emb
    return folded, torch.tensor(config.rms_norm_eps / config.scale_emb**2)


def fold_with_two_tables(weights, config, divided="lm_head.weight"):
    """The stream as large as it was: the input table takes its factor, and the output table is another."""
    folded = {name: weight.clone() for name, weight in weights.items()}
    folded["lm_head.weight"] = folded["embed_tokens.weight"].clone()
    folded["embed_tokens.weight"] *= config.scale_emb
    folded[divided] /= config.width_ratio
    for name in folded:
        if "o_proj" in name or "down_proj" in name:
            folded[name] *= config.residual_scale
    return folded, config.rms_norm_eps


def fold_dividing_the_last_norm(weights, config):
    return fold_with_two_tables(weights, config, divided="norm.weight")


def another_name_of_a_stream(config, scale_emb):
    """By way of the ratio."""
    ratio = config.residual_scale / config.scale_emb
    return replace(
        config,
        scale_emb=scale_emb,
        scale_depth=ratio * scale_emb * math.sqrt(config.num_hidden_layers),
        rms_norm_eps=config.rms_norm_eps / config.scale_emb**2 * scale_emb**2,
    )


def buried_in_closed_form(start, attention, feed_forward, layers, scale):
    added = (attention**2 + feed_forward**2) * (1 if scale is None else scale**2 / layers)
    blocks = math.floor(start**2 / added) + 1
    return torch.tensor(blocks) if blocks <= layers else None


def rates_as_tensors(names, config, lr, weight_decay):
    """Lists of tensors, from a table of factors."""
    factors = {
        "norm": config.dim_model_base / config.hidden_size,
        "o_proj": config.scale_depth / config.num_hidden_layers**0.5 / config.scale_emb,
        "down_proj": config.scale_depth / config.num_hidden_layers**0.5 / config.scale_emb,
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
        (check.mended_fold, fold_with_two_tables),
        (check.mended_fold, fold_dividing_the_last_norm),
        (check.other_name, another_name_of_a_stream),
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
