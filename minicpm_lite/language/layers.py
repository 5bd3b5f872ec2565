"""The layers of a plain block: norm, grouped-query attention, feed-forward; and how to exchange linear ones.

    rms_norm(x)       x / sqrt(mean(x^2) + eps) * weight
    attention(x)      q, k, v = W x per head;  q and k turned by their positions;  W_o context.attend(q, k, v)
    feed_forward(x)   W_down (silu(W_gate x) * W_up x)

Sources: Zhang and Sennrich 2019 (RMSNorm); Ainslie et al. 2023 (grouped queries); Shazeer 2020 (SwiGLU).

Choices, and the traps behind them:

- Attention knows weights and positions, not who may look at whom: that is the context's, which each call
  brings. So there is one attention for training, cached decoding, sparse attention and trees of guesses.
- Module names are those of the released checkpoints.
- Only linear layers hold matrices. Low-rank adapters, 4-bit and ternary weights take the place of one.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..config import ModelConfig
from .context import Context
from .rotary import apply_rotary

__all__ = ["Attention", "FeedForward", "RMSNorm", "replace_linears", "side_by_side"]


class RMSNorm(nn.Module):
    """Divide each vector by its root mean square, then scale each feature. Statistics are in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.normalized_shape, self.eps = (size,), eps

    def forward(self, x: Float[Tensor, "*batch size"]) -> Float[Tensor, "*batch size"]:
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions and no biases.

    Args:
        config: its shape.
        layer: index of the block; the context keeps what this layer makes under it.
        input_size: width of what comes in; left out, ``hidden_size``.
    """

    def __init__(self, config: ModelConfig, layer: int, input_size: int | None = None) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        width = input_size or config.hidden_size
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(width, queries, bias=False)
        self.k_proj = nn.Linear(width, keys, bias=False)
        self.v_proj = nn.Linear(width, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)

    def forward(
        self, x: Float[Tensor, "batch tokens width"], rotary: tuple[Tensor, Tensor], context: Context
    ) -> Float[Tensor, "batch tokens d"]:
        by_head = (*x.shape[:2], -1, self.head_dim)
        query, key, value = side_by_side(x, self.q_proj, self.k_proj, self.v_proj)
        query = query.reshape(by_head).transpose(1, 2)  # (batch, heads, tokens, head_dim)
        key = key.reshape(by_head).transpose(1, 2)  # (batch, kv_heads, tokens, head_dim)
        value = value.reshape(by_head).transpose(1, 2)
        query, key = apply_rotary(query, *rotary), apply_rotary(key, *rotary)
        key, value = context.keep(self.layer, key, value)  # (batch, kv_heads, keys, head_dim)
        out = context.attend(self.layer, query, key, value)  # (batch, heads, tokens, head_dim)
        return self.o_proj(out.transpose(1, 2).flatten(2))  # (batch, tokens, heads * head_dim) -> (..., d)


class FeedForward(nn.Module):
    """SwiGLU: a gate, passed through SiLU, multiplies a second projection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        gate, up = side_by_side(x, self.gate_proj, self.up_proj)
        return self.down_proj(F.silu(gate) * up)


def side_by_side(
    x: Float[Tensor, "*batch d"], *linears: nn.Module
) -> tuple[Float[Tensor, "*batch _outputs"], ...]:
    """What each of several linear layers makes of one input.

    Where no gradient is asked for, layers of one class that has itself a static method of this name, from an
    input and layers to what they make of it, are given to that: with few rows one call is cheaper than
    several. Layers with hooks are called one by one, so that the hooks are.
    """
    kind = type(linears[0])
    if torch.is_grad_enabled() or "side_by_side" not in vars(kind):
        return tuple(linear(x) for linear in linears)
    if any(type(one) is not kind or one._forward_pre_hooks or one._forward_hooks for one in linears):
        return tuple(linear(x) for linear in linears)
    return kind.side_by_side(x, linears)


def replace_linears(model: nn.Module, change: Callable[[str, nn.Module], nn.Module]) -> list[str]:
    """Put something else in the place of linear layers, in the model itself.

    What takes the place has ``forward``, ``weight``, ``in_features`` and ``out_features``, and so can be
    replaced again: by an adapter around a quantised layer, for instance. Its ``weight`` is the matrix that
    multiplies, all of it, as latent attention reads it: of an adapter the sum.

    Every linear layer inside is offered: routers of experts (``mlp.gate``) and an output layer (``lm_head``)
    too, which most changes should give back as they are. A module that is a linear layer itself has none
    inside, so nothing is offered. They are replaced when all were offered: if ``change`` refuses one, the
    model stays as it is.

    Args:
        model: any module.
        change: from the name of a layer and the layer to what takes its place; to the layer itself where it
            stays.

    Returns:
        The names of the layers that were replaced.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> replace_linears(model, lambda name, linear: nn.Linear(3, 4) if name == "2" else linear)
    ['2']
    """
    replaced: list[tuple[nn.Module, str, str, nn.Module]] = []  # where, its name there, its path, what comes

    def visit(module: nn.Module, path: str) -> None:
        for name, child in module.named_children():
            if not hasattr(child, "in_features"):
                visit(child, f"{path}{name}.")
            elif (new := change(path + name, child)) is not child:
                replaced.append((module, name, path + name, new))

    visit(model, "")
    for module, name, _, new in replaced:
        setattr(module, name, new)
    return [path for _, _, path, _ in replaced]
