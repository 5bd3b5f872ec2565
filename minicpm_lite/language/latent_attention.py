"""Multi-head latent attention (MLA) of MiniCPM3: keys and values come from one small latent.

    q = W_qb norm(W_qa x)                      split per head into a part without and a part with rotation
    c, k_rot = W_kva x                         one latent, and one rotated key that all heads share
    k, v = W_kvb norm(c)                       per head
    out = W_o attention([q; rotate(q_rot)], [k; rotate(k_rot)], v)

Source: MiniCPM3 as released (``MiniCPM3ForCausalLM``); the idea is DeepSeek-V2's. The scale is
1/sqrt(qk_nope_head_dim + qk_rope_head_dim), and the two inner norms use their own epsilon of 1e-6 whatever
the config says.

Two forms compute the same. The naive form expands keys and values of every token. The absorbed form moves the
expansion into the query and behind the sum, so that attention reads the latents as they are:

    score = (W_k^T q) . c + q_rot . k_rot       instead of   q . (W_k c) + q_rot . k_rot
    out   = W_v (sum of weights * c)            instead of   sum of weights * (W_v c)

That is attention with one key-value head as wide as the latent. For many queries at once the naive form is
cheaper, since its heads are narrower; for few queries over a long cache the absorbed form is. `forward` takes
the cheaper one. Either way the cache holds the normed latent and the rotated key, kv_lora_rank +
qk_rope_head_dim values a token and layer.

Trap: the absorbed form reads the ``weight`` of what stands in the place of W_kvb. Of an adapter that must be
all by which it multiplies, not the weight that it adapts. With a bias, which no matrix holds, the form is the
naive one.

Both forms give attention keys and values of equal width (zeros behind the values, or the whole latent as
value) and drop what is too much of the result: fast attention kernels take no others, and without them
attention writes down every score: 86 GB for one layer of MiniCPM3 at 32K tokens in bfloat16.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..config import LatentAttentionConfig, ModelConfig
from .context import Context
from .layers import RMSNorm
from .rotary import apply_rotary

__all__ = ["LatentAttention", "absorbed_is_cheaper"]

_INNER_EPS = 1e-6


def absorbed_is_cheaper(sizes: LatentAttentionConfig, queries: int, keys: int) -> bool:
    """Whether the absorbed form needs fewer multiplications for the newest ``queries`` of ``keys`` tokens.

    For each head, the naive form expands ``keys`` latents and compares heads; the absorbed form takes
    ``queries`` through the same matrices and compares latents:

        naive     keys * rank * expanded + queries * keys * (nope + rope + v)
        absorbed  queries * rank * expanded + queries * keys * (rank + rope + rank)

    >>> released = LatentAttentionConfig(768, 256, 64, 32, 64)  # MiniCPM3-4B
    >>> [absorbed_is_cheaper(released, queries, keys=4096) for queries in (1, 83, 84, 4096)]
    [True, True, False, False]
    """
    rank, expanded = sizes.kv_lora_rank, sizes.qk_nope_head_dim + sizes.v_head_dim
    return (keys - queries) * rank * expanded > queries * keys * (2 * rank - expanded)


class LatentAttention(nn.Module):
    """Attention whose keys and values are expanded from a latent of ``kv_lora_rank`` features a token."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.heads, self.sizes = layer, config.num_attention_heads, config.latent_attention
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
        self, x: Float[Tensor, "batch tokens d"], rotary: tuple[Tensor, Tensor], context: Context
    ) -> Float[Tensor, "batch tokens d"]:
        sizes = self.sizes
        query, query_rotated = self._heads(self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))).split(
            [sizes.qk_nope_head_dim, sizes.qk_rope_head_dim], dim=-1
        )
        latent, key_rotated = self.kv_a_proj_with_mqa(x)[:, None].split(
            [sizes.kv_lora_rank, sizes.qk_rope_head_dim], dim=-1
        )
        latent = torch.cat([self.kv_a_layernorm(latent), apply_rotary(key_rotated, *rotary)], dim=-1)
        # (texts, 1, keys, kv_lora_rank + rope): a row each, or several whose new tokens are one row
        (latent,) = context.keep(self.layer, latent)
        cheaper = absorbed_is_cheaper(sizes, queries=x.shape[1], keys=latent.shape[2])
        biased = getattr(self.kv_b_proj, "bias", None) is not None  # which no matrix holds
        form = self.absorbed if cheaper and not biased else self.naive
        out = form(query, apply_rotary(query_rotated, *rotary), latent, context)
        return self.o_proj(out.transpose(1, 2).flatten(2))  # (batch, tokens, heads * v_head_dim)

    def naive(
        self,
        query: Float[Tensor, "batch heads queries nope"],
        query_rotated: Float[Tensor, "batch heads queries rope"],
        latent: Float[Tensor, "texts 1 keys latent_and_rope"],
        context: Context,
    ) -> Float[Tensor, "batch heads queries v_head_dim"]:
        """Attention over keys and values that are expanded from the latents, for every head."""
        sizes = self.sizes
        latent, key_rotated = latent.split([sizes.kv_lora_rank, sizes.qk_rope_head_dim], dim=-1)
        key, value = self._heads(self.kv_b_proj(latent[:, 0])).split(
            [sizes.qk_nope_head_dim, sizes.v_head_dim], dim=-1
        )
        key = torch.cat([key, key_rotated.expand(-1, self.heads, -1, -1)], dim=-1)
        value = F.pad(value, (0, max(0, key.shape[-1] - sizes.v_head_dim)))
        out = context.attend(self.layer, torch.cat([query, query_rotated], dim=-1), key, value)
        return out[..., : sizes.v_head_dim]

    def absorbed(
        self,
        query: Float[Tensor, "batch heads queries nope"],
        query_rotated: Float[Tensor, "batch heads queries rope"],
        latent: Float[Tensor, "texts 1 keys latent_and_rope"],
        context: Context,
    ) -> Float[Tensor, "batch heads queries v_head_dim"]:
        """Attention over the latents themselves; what expands them is applied to the query and the sum."""
        sizes = self.sizes
        weight = self.kv_b_proj.weight.to(query)  # packed ones are unpacked in float32
        expand_key, expand_value = weight.unflatten(0, (self.heads, -1)).split(
            [sizes.qk_nope_head_dim, sizes.v_head_dim], dim=1
        )  # (heads, nope, latent), (heads, v_head_dim, latent)
        joint = torch.cat([query @ expand_key, query_rotated], dim=-1)
        # Attention divides by the root of the width it sees; the scale of MLA is that of a naive head.
        joint = joint * (joint.shape[-1] / (sizes.qk_nope_head_dim + sizes.qk_rope_head_dim)) ** 0.5
        out = context.attend(self.layer, joint, latent, latent)[..., : sizes.kv_lora_rank]
        return out @ expand_value.mT  # (batch, heads, queries, latent) -> (..., v_head_dim)

    def _heads(self, features: Tensor) -> Tensor:
        """(batch, tokens, heads * width) -> (batch, heads, tokens, width)"""
        return features.reshape(*features.shape[:2], self.heads, -1).transpose(1, 2)
