"""Multi-head latent attention (MLA) of MiniCPM3: keys and values come from one small latent.

    q = W_qb norm(W_qa x)                      split per head into a part without and a part with rotation
    c, k_rot = W_kva x                         one latent, and one rotated key that all heads share
    k, v = W_kvb norm(c)                       per head
    out = W_o attention([q; rotate(q_rot)], [k; rotate(k_rot)], v)

Source: MiniCPM3 as released (``MiniCPM3ForCausalLM``); the idea is DeepSeek-V2's. The scale is
1/sqrt(qk_nope_head_dim + qk_rope_head_dim), and the two inner norms use their own epsilon of 1e-6 whatever
the config says. This is the naive form, which caches the expanded keys and values.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..config import ModelConfig
from .decoder import AttentionFunction, KVCache, RMSNorm, apply_rotary

__all__ = ["LatentAttention"]

_INNER_EPS = 1e-6


class LatentAttention(nn.Module):
    """Attention whose keys and values are expanded from a latent of ``kv_lora_rank`` features a token."""

    def __init__(self, config: ModelConfig, layer: int, attention: AttentionFunction) -> None:
        super().__init__()
        self.layer, self.heads, self.sizes = layer, config.num_attention_heads, config.latent_attention
        self.attention = attention
        sizes, head_dim = self.sizes, self.sizes.qk_nope_head_dim + self.sizes.qk_rope_head_dim
        self.q_a_proj = nn.Linear(config.hidden_size, sizes.q_lora_rank, bias=False)
        self.q_a_layernorm = RMSNorm(sizes.q_lora_rank, _INNER_EPS)
        self.q_b_proj = nn.Linear(sizes.q_lora_rank, self.heads * head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(
            config.hidden_size, sizes.kv_lora_rank + sizes.qk_rope_head_dim, bias=False
        )
        self.kv_a_layernorm = RMSNorm(sizes.kv_lora_rank, _INNER_EPS)
        self.kv_b_proj = nn.Linear(
            sizes.kv_lora_rank, self.heads * (sizes.qk_nope_head_dim + sizes.v_head_dim), bias=False
        )
        self.o_proj = nn.Linear(self.heads * sizes.v_head_dim, config.hidden_size, bias=False)

    def forward(
        self, x: Float[Tensor, "batch tokens d"], rotary: tuple[Tensor, Tensor], cache: KVCache | None
    ) -> Float[Tensor, "batch tokens d"]:
        sizes = self.sizes

        def heads(features: Tensor) -> Tensor:  # (batch, tokens, heads * dim) -> (batch, heads, tokens, dim)
            return features.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        query = heads(self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))))
        query, query_rotated = query.split([sizes.qk_nope_head_dim, sizes.qk_rope_head_dim], dim=-1)
        latent, key_rotated = self.kv_a_proj_with_mqa(x).split(
            [sizes.kv_lora_rank, sizes.qk_rope_head_dim], dim=-1
        )
        key, value = heads(self.kv_b_proj(self.kv_a_layernorm(latent))).split(
            [sizes.qk_nope_head_dim, sizes.v_head_dim], dim=-1
        )
        query_rotated = apply_rotary(query_rotated, *rotary)
        key_rotated = apply_rotary(key_rotated[:, None], *rotary).expand(-1, self.heads, -1, -1)
        query, key = torch.cat([query, query_rotated], dim=-1), torch.cat([key, key_rotated], dim=-1)
        if cache is not None:
            key, value = cache.append(self.layer, key, value)
        out = self.attention(query, key, value)
        return self.o_proj(out.transpose(1, 2).flatten(2))  # (batch, tokens, heads * v_head_dim)
