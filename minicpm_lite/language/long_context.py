"""Rotary frequencies for texts longer than a model was trained on.

A position turns pair ``i`` of a head's features by ``theta ** (-2 i / head_dim)`` radians. Beyond the trained
length the slow pairs reach angles that training never showed. Each method gives other frequencies:

    linear     every frequency / factor                          position interpolation, Chen et al. 2023
    ntk        a larger theta: slow pairs / factor, fast stay    NTK-aware scaling, bloc97 2023; ABF
    dynamic    the same, and theta grows with the text           dynamic NTK, 2023
    yarn       fast pairs stay, slow ones / factor, a ramp       YaRN, Peng et al. 2023
    llama3     the same with a ramp in frequency, not in index   Llama 3.1
    longrope   every frequency / a factor of its own, searched   LongRoPE, Ding et al. 2024; MiniCPM3 and 4

Choices, and the traps behind them:

- A method changes the config and no weight: ``model.config = extend_context(model.config, "yarn", 4.0)``.
- With "dynamic" and "longrope" the frequencies depend on the length of the text, and keys that were rotated
  before stay as they were. So the decoder decides by the room of its cache, once, and all keys agree.
- YaRN and LongRoPE also multiply cosine and sine, so the scores by the square of that: attention is sharper.
- One factor for each pair, ``rotary_dim / 2`` in all, and with latent attention only the rotated part counts.
- At position 131,071 a frequency that is off by its last bit turns by 0.01 radians more. Scale the frequency
  or the position, but as the model was trained; the released code multiplies the position first.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from ..config import (
    ROPE_TYPES,
    ModelConfig,
    RopeScaling,
    require_positive_integer,
    require_positive_number,
)
from .decoder import rotary_frequencies

__all__ = ["extend_context", "ntk_theta", "scaled_frequencies", "search_factors"]


def extend_context(
    config: ModelConfig, method: str, factor: float, long_factor: Sequence[float] | None = None
) -> ModelConfig:
    """The same model for a context ``factor`` times as long. Only the config changes; the weights fit both.

    Args:
        config: of the model as it was trained, without rope_scaling.
        method: "ntk" or one of the types of `RopeScaling`.
        factor: how many times longer.
        long_factor: "longrope": what each frequency is divided by beyond the original context; up to it
            nothing changes. See `search_factors`, or `load_rope_scaling` for released ones.

    Raises:
        ValueError: an unknown method, a factor below 1, factors that are missing or not wanted, or a config
            that was extended before.

    >>> from minicpm_lite import load_config
    >>> extend_context(load_config("minicpm-2.4b"), "ntk", 8.0).max_position_embeddings
    32768
    """
    if config.rope_scaling is not None:
        raise ValueError(
            f'This config is scaled already, by "{config.rope_scaling.rope_type}"; extend the config '
            "that the model was trained with, with the whole factor. To allow longer texts with the "
            "scaling it has: dataclasses.replace(config, max_position_embeddings=...)."
        )
    if long_factor is not None and method != "longrope":
        raise ValueError(f'Only method "longrope" takes long_factor; this is "{method}".')
    if method not in ("ntk", *ROPE_TYPES):
        raise ValueError(f"method is {method!r}; expected one of ntk, {', '.join(ROPE_TYPES)}.")
    require_positive_number("factor", factor)
    if factor < 1:
        raise ValueError(f"factor is {factor}; a context is made longer, so give at least 1.")
    original = config.max_position_embeddings
    longer = replace(config, max_position_embeddings=int(factor * original))
    match method:
        case "ntk":
            return replace(longer, rope_theta=ntk_theta(config.rope_theta, factor, config.rotary_dim))
        case "dynamic":  # theta follows the text, so that at the full length this is "ntk"
            scaling = RopeScaling("dynamic", original, factor=1.0)
        case "longrope":
            if long_factor is None:
                raise ValueError('Method "longrope" needs long_factor: one number for each frequency.')
            unchanged = (1.0,) * (config.rotary_dim // 2)
            scaling = RopeScaling(
                "longrope", original, short_factor=unchanged, long_factor=tuple(map(float, long_factor))
            )
        case _:
            scaling = RopeScaling(method, original, factor=factor)
    return replace(longer, rope_scaling=scaling)


def scaled_frequencies(config: ModelConfig, length: int) -> tuple[Float[Tensor, " half"], float]:
    """The frequencies for a text of ``length`` tokens, and what cosine and sine are multiplied by."""
    scaling, dim = config.rope_scaling, config.rotary_dim
    plain, magnitude = rotary_frequencies(dim, config.rope_theta), 1.0
    if scaling is None:
        return plain, magnitude
    original, factor = scaling.original_max_position_embeddings, scaling.factor
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
    85550
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


def search_factors(
    loss: Callable[[Tensor], float],
    starts: Sequence[Float[Tensor, " half"]],
    factor: float,
    generations: int = 4,
    children: int = 8,
    parents: int = 4,
    seed: int = 0,
) -> Float[Tensor, " half"]:
    """LongRoPE's idea in small: factors found by trying, which do not fall from fast pairs to slow ones.

    The best ``parents`` so far are kept. Each child takes every pair's factor from one of two of them, times
    noise of a tenth. The original is larger and also tries to leave the first tokens of a text unscaled.
    Source: Ding et al. 2024, LongRoPE.

    Args:
        loss: what is to become small, given a candidate; on text the result is not judged by.
        starts: the first candidates, such as the factors of other methods; tried as they are.
        factor: a child's largest value is 1.25 times this, its smallest 1.
        generations: rounds of children.
        children: new candidates in a round; ``len(starts) + generations * children`` are tried in all.
        parents: the best candidates so far, from which children are made.
        seed: decides the children.
    """
    if not len(starts) or any(start.shape != starts[0].shape for start in starts):
        raise ValueError("starts must hold at least one candidate, and all of one length.")
    require_positive_integer("parents", parents)
    generator = torch.Generator().manual_seed(seed)
    tried = [(loss(start), start) for start in starts]
    for _ in range(generations):
        best = sorted(tried, key=lambda each: each[0])[:parents]
        for _ in range(children):
            first, second = torch.randint(len(best), (2,), generator=generator).tolist()
            from_first = torch.rand(len(starts[0]), generator=generator) < 0.5
            child = torch.where(from_first, best[first][1], best[second][1])
            child = child * (1 + 0.1 * torch.randn(len(child), generator=generator))
            child = child.clamp(1.0, 1.25 * factor).cummax(0).values
            tried.append((loss(child), child))
    return min(tried, key=lambda each: each[0])[1]
