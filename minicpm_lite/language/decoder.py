"""The MiniCPM decoder: a Llama block with three multipliers.

    x = embedding(ids) * scale_emb
    for each of the L blocks:
        x = x + scale_depth / sqrt(L) * attention(norm(x))
        x = x + scale_depth / sqrt(L) * feed_forward(norm(x))
    logits = output(norm(x) / (hidden_size / dim_model_base))

Source: Hu et al. 2024, "MiniCPM", arXiv 2404.06395, section 6.1 and appendix A.1; released modelling code.

Choices, and the traps behind them:

- With all multipliers 1 this is Llama, so one class runs the book's small models, Llama-type checkpoints
  and every released MiniCPM. Module names are those of the released checkpoints.
- ``L`` in the residual scale is the number of blocks, not twice that; attention and feed-forward share it.
- The attention scale is 1/sqrt(head_dim). The 1/head_dim of µP theory is not used by any release.
- Rotary embedding turns pair (i, i + head_dim/2), the "half-split" layout, with angles in float32.
  GGUF files of this architecture use the interleaved layout: convert, do not mix.
- The hidden state is divided before the output layer, which equals dividing the logits up to rounding.
- Attention is a function that is passed in; feed-forward variants and latent attention are modules chosen
  by the config. None of them is known to this file beyond its name.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..config import ModelConfig

__all__ = ["Attention", "AttentionFunction", "Block", "Decoder", "FeedForward", "KVCache", "RMSNorm",
           "apply_rotary", "dense_attention", "fold_to_llama", "rotary_angles",
           "rotary_frequencies"]  # fmt: skip

AttentionFunction = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""From queries (batch, heads, queries, head_dim), keys and values (batch, kv_heads, keys, head_dim) and the
padding (batch,), or None, to outputs shaped like the queries. The last query stands at the last key; a query
sees no later key, and none of the first ``padding`` keys of its row, which are no text."""


class RMSNorm(nn.Module):
    """Divide each vector by its root mean square, then scale each feature. Statistics are in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*batch size"]) -> Float[Tensor, "*batch size"]:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rotary_frequencies(head_dim: int, theta: float) -> Float[Tensor, " half"]:
    """By how many radians a position turns each pair of features: ``theta ** (-2 i / head_dim)``.

    Source: Su et al. 2021, RoPE.
    """
    return 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


def rotary_angles(
    positions: Int[Tensor, "*batch tokens"], frequencies: Float[Tensor, " half"]
) -> tuple[Float[Tensor, "*batch tokens head_dim"], Float[Tensor, "*batch tokens head_dim"]]:
    """Cosine and signed sine of each position's angle for each feature, in float32.

    The two features of a pair share a cosine; the sine of the first is negative, as `apply_rotary` needs it.
    """
    angles = positions.float()[..., None] * frequencies
    return torch.cat([angles.cos(), angles.cos()], -1), torch.cat([-angles.sin(), angles.sin()], -1)


def apply_rotary(
    x: Float[Tensor, "batch heads tokens head_dim"],
    cos: Float[Tensor, "*rows tokens head_dim"],
    sin: Float[Tensor, "*rows tokens head_dim"],
) -> Float[Tensor, "batch heads tokens head_dim"]:
    """Turn feature ``i`` with feature ``i + head_dim/2`` by the angle of the token's position."""
    x32 = x.float()
    partner = x32.roll(x.shape[-1] // 2, dims=-1)
    return torch.addcmul(x32 * cos, partner, sin).to(x.dtype)


def dense_attention(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    padding: Int[Tensor, " batch"] | None = None,
) -> Float[Tensor, "batch heads queries value_dim"]:
    """Causal softmax attention in which each key-value head serves a group of query heads.

    The last query stands at the last key, so with a cache the queries are the newest of the keys. The first
    ``padding`` keys of a row are seen by none but themselves.
    """
    batch, heads, queries, head_dim = query.shape
    kv_heads, keys = key.shape[1:3]
    mask = None
    if padding is not None or 1 < queries < keys:
        at = torch.arange(keys, device=query.device)
        mask = at <= at[keys - queries :, None]  # (queries, keys)
        if padding is not None:
            # a key that is no text sees itself, for a softmax over nothing is not a number
            text = (at >= padding[:, None])[:, None, None]  # (batch, 1, 1, keys)
            mask = mask & (text | (at == at[keys - queries :, None]))
    if queries == 1:  # the group becomes the query axis, so that no key is copied for it
        grouped = query.view(batch, kv_heads, heads // kv_heads, head_dim)
        return F.scaled_dot_product_attention(grouped, key, value, mask).view(batch, heads, 1, -1)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=heads != kv_heads
    )


class KVCache:
    """What the layers keep of the tokens so far, so that the next token costs one token.

    Room for ``max_length`` tokens is taken once, at the first use of each layer; tokens are written in place.

    Attributes:
        max_length: tokens there is room for.
        padding: for each row of the batch, how many tokens at its start are no text (left padding); None: 0.
        length: tokens stored so far.
        rotary: cosine and sine of every position there is room for, kept here by the decoder.
    """

    def __init__(self, max_length: int, padding: Int[Tensor, " batch"] | None = None) -> None:
        if max_length < 1:
            raise ValueError(f"max_length is {max_length}; a cache needs room for at least 1 token.")
        self.max_length, self.padding = max_length, padding
        self.length = 0
        self.rotary: tuple[Tensor, Tensor] | None = None
        self._layers: list[tuple[Tensor, ...]] = []

    def append(self, layer: int, *new: Tensor) -> tuple[Tensor, ...]:
        """Store the newest tokens of one layer and return all of its tokens.

        Args:
            layer: index of the block; blocks append in order.
            new: each (batch, heads, tokens, width); ordinary attention stores a key and a value.

        Raises:
            ValueError: gradients are on, or the cache belongs to another batch size or model.
        """
        if torch.is_grad_enabled() and new[0].requires_grad:
            raise ValueError(
                "A cache is written in place, so nothing can be trained through it: use torch.no_grad()."
            )
        tokens = new[0].shape[2]
        if self.length == 0:  # the first tokens; what a failed call may have left is dropped
            del self._layers[layer:]
            self._layers.append(tuple(self._room(each) for each in new))
        for kept, each in zip(self._layers[layer], new, strict=True):
            if kept.shape[:2] != each.shape[:2] or kept.shape[3] != each.shape[3]:
                raise ValueError(
                    f"The cache holds (batch, heads, width) of {(*kept.shape[:2], kept.shape[3])} and now "
                    f"gets {(*each.shape[:2], each.shape[3])}; use one cache for each batch and model."
                )
            kept.narrow(2, self.length, tokens).copy_(each)
        return tuple(kept.narrow(2, 0, self.length + tokens) for kept in self._layers[layer])

    def _room(self, new: Tensor) -> Tensor:
        with torch.inference_mode(False):  # so that it can be written in any mode
            shape = (*new.shape[:2], self.max_length, new.shape[3])
            return torch.empty(shape, dtype=new.dtype, device=new.device)

    @property
    def nbytes(self) -> int:
        """Memory taken, in bytes, at full length."""
        return sum(part.numel() * part.element_size() for layer in self._layers for part in layer)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions and no biases."""

    def __init__(self, config: ModelConfig, layer: int, attention: AttentionFunction) -> None:
        super().__init__()
        self.layer, self.head_dim, self.attention = layer, config.head_dim, attention
        queries, keys = (
            heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads)
        )
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)

    def forward(
        self, x: Float[Tensor, "batch tokens d"], rotary: tuple[Tensor, Tensor], cache: KVCache | None
    ) -> Float[Tensor, "batch tokens d"]:
        def heads(
            features: Tensor,
        ) -> Tensor:  # (batch, tokens, heads * head_dim) -> (batch, heads, tokens, head_dim)
            return features.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        query = apply_rotary(heads(self.q_proj(x)), *rotary)
        key = apply_rotary(heads(self.k_proj(x)), *rotary)
        value = heads(self.v_proj(x))
        padding = None
        if cache is not None:
            key, value = cache.append(self.layer, key, value)
            padding = cache.padding
        out = self.attention(query, key, value, padding)
        return self.o_proj(out.transpose(1, 2).flatten(2))  # (batch, tokens, heads * head_dim)


class FeedForward(nn.Module):
    """SwiGLU: a gate, passed through SiLU, multiplies a second projection. Source: Shazeer 2020."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One layer: attention, then feed-forward, each normed before and scaled after."""

    def __init__(self, config: ModelConfig, layer: int, attention: AttentionFunction) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = _attention_module(config)(config, layer, attention)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = _feed_forward_module(config)(config)
        self.residual_scale = config.residual_scale

    def forward(
        self, x: Float[Tensor, "batch tokens d"], rotary: tuple[Tensor, Tensor], cache: KVCache | None
    ) -> Float[Tensor, "batch tokens d"]:
        # add(alpha=...) scales and adds in one pass over memory
        x = x.add(self.self_attn(self.input_layernorm(x), rotary, cache), alpha=self.residual_scale)
        return x.add(self.mlp(self.post_attention_layernorm(x)), alpha=self.residual_scale)


def _attention_module(config: ModelConfig) -> type[nn.Module]:
    if config.latent_attention is None:
        return Attention
    from .latent_attention import LatentAttention  # here, because that file builds on this one

    return LatentAttention


def _feed_forward_module(config: ModelConfig) -> type[nn.Module]:
    if config.mixture is None:
        return FeedForward
    from .moe import MixtureOfExperts  # here, because that file builds on this one

    return MixtureOfExperts


class Decoder(nn.Module):
    """The whole model: token ids in, logits out.

    Args:
        config: its shape.
        attention: how queries meet keys and values; dense and causal unless another function is given.

    Weights start as the MiniCPM paper's Table 7 says: normal with standard deviation ``init_std`` for the
    embeddings and ``init_std / sqrt(width_ratio)`` for the matrices; norms start at 1. On the meta device
    (``with torch.device("meta")``) the model has shapes and no memory. ``config`` may be replaced by one with
    other rotary frequencies; what else it says was built in, and needs a new model.
    """

    def __init__(self, config: ModelConfig, attention: AttentionFunction = dense_attention) -> None:
        super().__init__()
        self.config, self.attention = config, attention
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Block(config, layer, attention) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = None  # tied: the embedding table is the output layer
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=config.init_std / config.width_ratio**0.5)
        for table in self.tables:
            nn.init.normal_(table, std=config.init_std)

    def forward(
        self, ids: Int[Tensor, "batch tokens"], cache: KVCache | None = None, last_only: bool = False
    ) -> Float[Tensor, "batch logits vocab"]:
        """Logits of the next token at each position, in float32.

        With a cache, ``ids`` are the newest tokens only, and the cache keeps their keys and values. Rows of
        different lengths are padded on the left, and the cache knows by how much (``KVCache.padding``).
        With ``last_only`` the logits are those of the last position alone: of a long prompt nothing else is
        needed, and the logits of all of it can take more memory than the model.

        Raises:
            ValueError: no token, or more tokens than the cache has room for or the model was made for.
        """
        self._refuse_impossible_length(ids, cache)
        rotary = self._rotary(ids, cache)
        x = self.embed_tokens(ids) * self.config.scale_emb
        for layer in self.layers:
            x = layer(x, rotary, cache)
        if cache is not None:
            cache.length += ids.shape[1]
        x = self.norm(x[:, -1:] if last_only else x) / self.config.width_ratio
        logits = F.linear(x, self.embed_tokens.weight) if self.lm_head is None else self.lm_head(x)
        return logits.float()

    @property
    def tables(self) -> list[nn.Parameter]:
        """The embedding table and, unless it is tied, the table of the output layer."""
        return [self.embed_tokens.weight] + ([] if self.lm_head is None else [self.lm_head.weight])

    def num_parameters(self, embeddings: bool = False) -> int:
        """Number of parameters; without ``embeddings``, neither the table nor the output layer counts."""
        tables = {id(table) for table in self.tables}
        return sum(p.numel() for p in self.parameters() if embeddings or id(p) not in tables)

    def _rotary(self, ids: Tensor, cache: KVCache | None) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the positions of ``ids``; with a cache they are computed once for all of it."""
        if cache is None:
            return self._rotary_angles(torch.arange(ids.shape[1], device=ids.device))
        if cache.padding is not None and len(cache.padding) != len(ids):
            raise ValueError(
                f"The cache has the padding of {len(cache.padding)} rows, and ids has {len(ids)}; use one "
                "cache for each batch."
            )
        if cache.length == 0:  # also when a cache is used again: another model has other frequencies
            positions = torch.arange(cache.max_length, device=ids.device)
            if cache.padding is not None:  # a row begins where its text begins
                positions = (positions - cache.padding[:, None, None]).clamp(min=0)  # (batch, 1, tokens)
            cache.rotary = self._rotary_angles(positions)
        return tuple(angles.narrow(-2, cache.length, ids.shape[1]) for angles in cache.rotary)

    def _rotary_angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        config, magnitude = self.config, 1.0
        if config.rope_scaling is None:
            frequencies = rotary_frequencies(config.rotary_dim, config.rope_theta)
        else:
            from .long_context import scaled_frequencies  # here, because that file builds on this one

            frequencies, magnitude = scaled_frequencies(config, length=positions.shape[-1])
        cos, sin = rotary_angles(positions, frequencies.to(positions.device))
        return cos * magnitude, sin * magnitude

    def _refuse_impossible_length(self, ids: Tensor, cache: KVCache | None) -> None:
        end = ids.shape[-1] + (0 if cache is None else cache.length)
        if ids.ndim != 2:
            raise ValueError(
                f"ids has shape {tuple(ids.shape)}; expected (batch, tokens). For one text: ids[None]."
            )
        if ids.shape[1] == 0:
            raise ValueError("ids holds no token; give at least one, for instance the start token.")
        if end > self.config.max_position_embeddings:
            raise ValueError(
                f"{end} tokens were given, but the model was made for {self.config.max_position_embeddings} "
                "(max_position_embeddings). Give fewer, or extend its context first."
            )
        if cache is not None and end > cache.max_length:
            raise ValueError(
                f"The cache has room for {cache.max_length} tokens and would need {end}; make a larger one."
            )


@torch.no_grad()
def fold_to_llama(model: Decoder) -> Decoder:
    """A Llama with the same logits: each multiplier is folded into the weights beside it.

    Embeddings take ``scale_emb``, the matrices that end a branch take ``scale_depth / sqrt(L)``, and the
    output layer takes ``dim_model_base / hidden_size``; the tables can therefore no longer be tied.
    """
    config = model.config
    if config.latent_attention or config.mixture:
        raise ValueError(
            "Only a decoder with ordinary attention and one feed-forward network folds to a Llama; this has "
            + ("latent attention." if config.latent_attention else "a mixture of experts.")
        )
    llama = Decoder(
        replace(config, scale_emb=1.0, scale_depth=None, dim_model_base=None, tie_word_embeddings=False),
        model.attention,
    ).to(model.embed_tokens.weight)
    llama.load_state_dict({"lm_head.weight": model.embed_tokens.weight} | model.state_dict())
    llama.embed_tokens.weight *= config.scale_emb
    llama.lm_head.weight /= config.width_ratio
    for layer in llama.layers:
        layer.self_attn.o_proj.weight *= config.residual_scale
        layer.mlp.down_proj.weight *= config.residual_scale
    return llama.train(model.training)
