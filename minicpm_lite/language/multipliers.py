"""MiniCPM's three multipliers: what they do to the residual stream, and how a Llama takes them in.

Blocks add ``2 L`` parts to the stream. At the start of training these point anywhere, so mean squares add up:
``end² = start² + 2 L (r part)²``. With ``r = scale_depth / sqrt(L)`` the depth cancels.

Source: Hu et al. (2024), https://arxiv.org/abs/2404.06395, appendix A.1; for depth Yang et al. (2023),
https://arxiv.org/abs/2310.02244.
"""

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .decoder import Decoder, require_plain

__all__ = ["fold_to_llama", "stream_sizes"]


@torch.no_grad()
def stream_sizes(
    model: Decoder,
    ids: Int[Tensor, "batch tokens"],
) -> Float[Tensor, " places"]:
    """RMS of the stream as it enters each block and, last, leaves them all."""
    blocks = range(len(model.layers))
    states = model.states(model.embed(ids), after=blocks)
    return torch.stack([x.square().mean().sqrt() for x in states])


@torch.no_grad()
def fold_to_llama(model: Decoder) -> Decoder:
    """A Llama with the same logits: each multiplier is folded into the weights beside it.

    Embeddings take ``scale_emb``, the matrices that end a branch take ``scale_depth / sqrt(L)``, and the
    output layer takes ``dim_model_base / hidden_size``; the tables can therefore no longer be tied.

    Raises:
        ValueError: the model has latent attention or experts, or was changed inside.
    """
    config = model.config
    if config.latent_attention or config.mixture:
        raise ValueError(
            "Only a decoder with ordinary attention and one feed-forward network folds to a Llama; this has "
            + ("latent attention." if config.latent_attention else "a mixture of experts.")
        )
    require_plain(model)
    llama = Decoder(
        replace(config, scale_emb=1.0, scale_depth=None, dim_model_base=None, tie_word_embeddings=False)
    ).to(model.embed_tokens.weight)
    llama.load_state_dict({"lm_head.weight": model.embed_tokens.weight} | model.state_dict())
    llama.embed_tokens.weight *= config.scale_emb
    llama.lm_head.weight /= config.width_ratio
    for layer in llama.layers:
        layer.self_attn.o_proj.weight *= config.residual_scale
        layer.mlp.down_proj.weight *= config.residual_scale
    return llama.train(model.training)
