"""The decoder computes what that of the first edition computed, so that recorded runs stay valid.

``first_edition.safetensors`` was written by the first edition (commit 1a23aa6), from the settings below. When
the decoder was rebuilt, all of its logits, gradients and start weights were equal bit for bit; here they may
differ by what another processor rounds.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from minicpm_lite.config import LatentAttentionConfig, MixtureConfig, ModelConfig, RopeScaling
from minicpm_lite.language.context import KVCache
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.language.long_context import extend_context
from minicpm_lite.language.upcycling import balance_loss

GROUPED = ModelConfig(
    32, 48, 2, 4, 50, num_key_value_heads=2, max_position_embeddings=24,
    scale_emb=12.0, scale_depth=1.4, dim_model_base=16, init_std=0.1,
)  # fmt: skip
LATENT = replace(
    GROUPED, num_key_value_heads=None, head_dim=12, latent_attention=LatentAttentionConfig(16, 12, 8, 4, 6)
)
SHORT, SHORT_LATENT = (replace(config, max_position_embeddings=8) for config in (GROUPED, LATENT))
FACTORS = dict(short_factor=(1.0, 1.1, 1.2, 1.3), long_factor=(1.0, 1.5, 2.0, 3.0))
CONFIGS = {
    "grouped": GROUPED,
    "one key-value head": replace(GROUPED, num_key_value_heads=1),
    "multi-head": replace(GROUPED, num_key_value_heads=4),
    "untied": replace(GROUPED, tie_word_embeddings=False),
    "llama": replace(GROUPED, scale_emb=1.0, scale_depth=None, dim_model_base=None),
    "latent": LATENT,
    "experts": replace(GROUPED, mixture=MixtureConfig(4, 2)),
    "latent, experts": replace(LATENT, mixture=MixtureConfig(4, 1)),
    **{
        method: extend_context(SHORT, method, 3.0)
        for method in ("ntk", "linear", "dynamic", "yarn", "llama3")
    },
    "longrope": extend_context(SHORT, "longrope", 3.0, FACTORS["long_factor"]),
    "longrope, short": replace(
        GROUPED, rope_scaling=RopeScaling("longrope", 24, factor=2.0, **FACTORS), max_position_embeddings=48
    ),
    "latent, yarn": extend_context(SHORT_LATENT, "yarn", 3.0),
    "latent, longrope": extend_context(SHORT_LATENT, "longrope", 3.0, [1.5, 3.0]),
}
PADDING = torch.tensor([0, 4])
STORED = load_file(Path(__file__).with_name("first_edition.safetensors"))


def measured(name: str) -> dict[str, torch.Tensor]:
    """Start weights, logits in four ways of feeding, and gradients of one decoder."""
    torch.manual_seed(0)
    model = Decoder(CONFIGS[name]).train()
    out = {"start": torch.stack([parameter.sum() for parameter in model.parameters()]).detach()}
    for key, parameter in model.named_parameters():
        if "norm" in key:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    ids = torch.randint(50, (2, 14), generator=torch.Generator().manual_seed(1))
    logits = model(ids)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    (loss + 0.01 * balance_loss(model) if model.config.mixture else loss).backward()
    out |= {
        "logits": logits.detach(),
        "gradient of the table": model.embed_tokens.weight.grad,
        "gradient norms": torch.stack([parameter.grad.norm() for parameter in model.parameters()]),
    }
    with torch.no_grad():
        for way, pieces, padding in (
            ("chunks", [5, 6, 1, 1, 1], None),
            ("padded", [7, 3, 1, 1, 1, 1], PADDING),
            ("steps", [1] * 14, None),
        ):
            cache = KVCache(20, padding)
            out[way] = torch.cat([model.eval()(part, cache) for part in ids.split(pieces, 1)], 1)[:, -5:]
    return {f"{name}/{key}": value for key, value in out.items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_numbers_are_those_of_the_first_edition(name):
    found = measured(name)
    assert found.keys() == {key for key in STORED if key.startswith(f"{name}/")}
    for key, value in found.items():
        assert_close(value, STORED[key], atol=2e-6, rtol=2e-5, msg=key)
