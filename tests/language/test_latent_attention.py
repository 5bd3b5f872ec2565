"""Latent attention: equal to transformers' MiniCPM3, cached equal to uncached."""

import pytest
import torch
from torch.testing import assert_close

from minicpm_lite.config import LatentAttentionConfig, ModelConfig
from minicpm_lite.language.decoder import Decoder, KVCache

CONFIG = ModelConfig(
    64, 160, 3, 4, 99, head_dim=24, max_position_embeddings=64, scale_emb=12, scale_depth=1.4, dim_model_base=32,
    init_std=0.1, latent_attention=LatentAttentionConfig(24, 16, 16, 8, 12),
)  # fmt: skip


def make_model() -> Decoder:
    torch.manual_seed(0)
    model = Decoder(CONFIG).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def minicpm3(model: Decoder) -> torch.nn.Module:
    from transformers import MiniCPM3Config, MiniCPM3ForCausalLM

    latent = CONFIG.latent_attention
    reference = MiniCPM3ForCausalLM(
        MiniCPM3Config(
            hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4,
            vocab_size=99, max_position_embeddings=64, rms_norm_eps=CONFIG.rms_norm_eps, scale_emb=12, scale_depth=1.4,
            dim_model_base=32, tie_word_embeddings=True, q_lora_rank=latent.q_lora_rank, kv_lora_rank=latent.kv_lora_rank,
            qk_nope_head_dim=latent.qk_nope_head_dim, qk_rope_head_dim=latent.qk_rope_head_dim,
            v_head_dim=latent.v_head_dim, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        )
    )  # fmt: skip
    weights = {f"model.{name}": w for name, w in model.state_dict().items() if name != "lm_head.weight"}
    reference.load_state_dict(weights | {"lm_head.weight": model.tables[-1]})
    return reference.eval()


@torch.no_grad()
def test_equal_to_minicpm3():
    model, ids = make_model(), torch.arange(34).view(2, 17)
    assert_close(model(ids), minicpm3(model)(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cuts", [[1], [5, 6, 9], list(range(1, 17))])
@torch.no_grad()
def test_cached_equals_uncached(cuts):
    model, ids, cache = make_model(), torch.arange(34).view(2, 17), KVCache(17)
    cached = torch.cat([model(piece, cache) for piece in ids.tensor_split(cuts, dim=1)], dim=1)
    assert_close(cached, model(ids), atol=1e-5, rtol=1e-5)
