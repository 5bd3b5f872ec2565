"""Rotary frequencies for texts longer than a model was trained on.

A position turns pair ``i`` of a head's features by ``theta ** (-2 i / head_dim)`` radians. Beyond the trained
length the slow pairs reach angles that training never showed. Each method gives other frequencies:

    linear     every frequency / factor                          position interpolation, Chen et al. 2023
    dynamic    theta grows with the length of the text           NTK-aware scaling, bloc97 2023
    yarn       fast pairs stay, slow ones / factor, a ramp       YaRN, Peng et al. 2023
    llama3     the same with other borders                       Llama 3.1
    longrope   every frequency / a factor of its own             LongRoPE, Ding et al. 2024; MiniCPM3 and 4

Traps:

- With "dynamic" and "longrope" the frequencies depend on the length of the text, and keys that were rotated
  before stay as they were. So the decoder decides by the room of its cache, once, and all keys agree.
- YaRN and LongRoPE also multiply cosine and sine, which makes attention sharper; without it they lose.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from ..config import ModelConfig, RopeScaling
from .decoder import rotary_frequencies

__all__ = ["ntk_theta", "scaled_frequencies"]


def scaled_frequencies(config: ModelConfig, length: int) -> tuple[Float[Tensor, " half"], float]:
    """The frequencies for a text of ``length`` tokens, and what cosine and sine are multiplied by."""
    scaling, dim = config.rope_scaling, config.rotary_dim
    original, factor = scaling.original_max_position_embeddings, scaling.factor
    plain, magnitude = rotary_frequencies(dim, config.rope_theta), 1.0
    match scaling.rope_type:
        case "linear":
            frequencies = plain / factor
        case "dynamic":
            growth = max(1.0, factor * length / original - (factor - 1))
            frequencies = rotary_frequencies(dim, ntk_theta(config.rope_theta, growth, dim))
        case "yarn":
            kept = _yarn_kept(scaling, dim, config.rope_theta)
            frequencies = plain * kept + plain / factor * (1 - kept)
            magnitude = 0.1 * math.log(factor) + 1.0
        case "llama3":
            turns = original * plain / (2 * math.pi)  # of each pair, over the original context
            span = scaling.high_freq_factor - scaling.low_freq_factor
            kept = ((turns - scaling.low_freq_factor) / span).clamp(0, 1)
            frequencies = plain * kept + plain / factor * (1 - kept)
        case "longrope":
            factors = scaling.long_factor if length > original else scaling.short_factor
            frequencies = plain / torch.tensor(factors)
            ratio = factor or config.max_position_embeddings / original
            magnitude = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
    return frequencies, magnitude if scaling.attention_factor is None else scaling.attention_factor


def ntk_theta(theta: float, factor: float, dim: int) -> float:
    """The base with which the slowest pair turns ``factor`` times slower, and the fastest as before.

    NTK-aware scaling, and the same thing as adjusting the base frequency (ABF) to that value.

    >>> round(ntk_theta(10_000.0, 8.0, 64))
    85553
    """
    return theta * factor ** (dim / (dim - 2))


def _yarn_kept(scaling: RopeScaling, dim: int, theta: float) -> Float[Tensor, " half"]:
    """How much of each pair's frequency is kept: 1 for fast pairs, 0 for slow ones, a ramp between."""

    def pair_that_turns(times: float) -> float:  # in the original context; a fraction of an index
        context = scaling.original_max_position_embeddings
        return dim * math.log(context / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(scaling.beta_slow)), dim - 1)
    high = high + 0.001 if high == low else high  # a step, not a division by zero
    return 1 - ((torch.arange(dim // 2) - low) / (high - low)).clamp(0, 1)
