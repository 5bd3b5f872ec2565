"""Right answers in another style than the chapter's are accepted."""

from dataclasses import replace

import pytest
import torch

from minicpm_lite import load_config
from minicpm_lite.exercises.language import multipliers as check


def fold_in_double_precision(weights, config):
    """A copy that is changed in place afterwards."""
    folded = {name: weight.double() for name, weight in weights.items()}
    folded["lm_head.weight"] = folded["embed_tokens.weight"] * config.dim_model_base / config.hidden_size
    folded["embed_tokens.weight"] *= config.scale_emb
    for layer in range(config.num_hidden_layers):
        for name in (f"layers.{layer}.self_attn.o_proj.weight", f"layers.{layer}.mlp.down_proj.weight"):
            folded[name] *= config.scale_depth / config.num_hidden_layers**0.5
    return folded


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        (
            check.predict_rms,
            lambda start, added, layers, scale: torch.tensor(
                start**2 + 2 * added**2 * (layers if scale is None else scale**2)
            ).sqrt(),
        ),
        (check.forecast, torch.tensor(1.9)),
        (check.mended_fold, fold_in_double_precision),
        (check.design, replace(load_config("minicpm-1.2b"), num_key_value_heads=2, intermediate_size=4100)),
    ],
)
def test_other_styles(exercise, answer):
    verdict = exercise.judge(answer)
    assert verdict.state == "right", verdict.message
