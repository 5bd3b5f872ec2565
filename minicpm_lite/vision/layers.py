"""The layers of an encoder for pictures and short texts, and attention from some vectors to others.

    block(x)                      x + attention(norm(x)), then x + W_2 gelu(W_1 norm(x))
    cross_attention(q, k, v)      W_o softmax((W_q q)(W_k k)^T / sqrt(head size)) W_v v       by heads

Unlike a decoder's, these layers have biases, norms that subtract the mean, and every token looks at every
other one: a picture has no order in which it is read.

Source: SigLIP as released (big_vision; ``SiglipVisionModel``). Cross attention has the weights of PyTorch's
``nn.MultiheadAttention``, under the same names, as SigLIP's pooling and MiniCPM-V's resampler store them.

Trap: the gelu is its tanh approximation, as in the releases; the exact one differs by up to 5e-4.
"""

from collections.abc import Sequence
from dataclasses import asdict

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ..config import require_positive_integer, require_positive_number

__all__ = ["CrossAttention", "EncoderBlock", "MLP", "SelfAttention", "real_places", "require_encoder_shape"]


def require_encoder_shape(config: object) -> None:
    """Refuse the shape of an encoder: a dataclass of sizes, and of what norms add to the variance.

    Raises:
        ValueError: a size that cannot be, or heads that do not divide the features.
    """
    sizes = asdict(config)
    require_positive_number("layer_norm_eps", sizes.pop("layer_norm_eps"))
    for name, size in sizes.items():
        require_positive_integer(name, size)
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"hidden_size is {config.hidden_size} and num_attention_heads {config.num_attention_heads}; each "
            "head takes an equal share, so the heads must divide the size."
        )


def real_places(counts: Sequence[int], device: torch.device) -> Bool[Tensor, "rows places"] | None:
    """Which places of rows that were filled up to the longest are no filling; None if all are.

    >>> real_places([2, 1], torch.device("cpu")).tolist()
    [[True, True], [True, False]]
    """
    if min(counts) == max(counts):
        return None
    return torch.arange(max(counts), device=device) < torch.tensor(counts, device=device)[:, None]


class SelfAttention(nn.Module):
    """Every token looks at every token that is one."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(
        self, x: Float[Tensor, "batch tokens width"], real: Bool[Tensor, "batch tokens"] | None
    ) -> Float[Tensor, "batch tokens width"]:
        """``real`` says which tokens are no filling; None, that all are."""
        return self.out_proj(_attention(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads, real))


class CrossAttention(nn.Module):
    """Queries look at keys and take values; ``nn.MultiheadAttention`` in fewer words."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(
        self,
        query: Float[Tensor, "batch queries width"],
        key: Float[Tensor, "batch keys width"],
        value: Float[Tensor, "batch keys width"],
        real: Bool[Tensor, "batch keys"] | None = None,
    ) -> Float[Tensor, "batch queries width"]:
        """``real`` says which keys are no filling; None, that all are."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        parts = [F.linear(*each) for each in zip((query, key, value), weights, biases, strict=True)]
        return self.out_proj(_attention(*parts, self.heads, real))


class MLP(nn.Module):
    """Two linear layers with a gelu between them."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class EncoderBlock(nn.Module):
    """Attention, then two layers; each reads a normed copy and adds what it makes."""

    def __init__(self, width: int, inner: int, heads: int, eps: float) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(width, eps)
        self.self_attn = SelfAttention(width, heads)
        self.layer_norm2 = nn.LayerNorm(width, eps)
        self.mlp = MLP(width, inner)

    def forward(
        self, x: Float[Tensor, "batch tokens width"], real: Bool[Tensor, "batch tokens"] | None
    ) -> Float[Tensor, "batch tokens width"]:
        x = x + self.self_attn(self.layer_norm1(x), real)
        return x + self.mlp(self.layer_norm2(x))


def _attention(
    query: Float[Tensor, "batch queries width"],
    key: Float[Tensor, "batch keys width"],
    value: Float[Tensor, "batch keys width"],
    heads: int,
    real: Bool[Tensor, "batch keys"] | None,
) -> Float[Tensor, "batch queries width"]:
    # (batch, tokens, width) -> (batch, heads, tokens, head size)
    by_head = [each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in (query, key, value)]
    mask = None if real is None else real[:, None, None]
    return F.scaled_dot_product_attention(*by_head, attn_mask=mask).transpose(1, 2).flatten(2)
