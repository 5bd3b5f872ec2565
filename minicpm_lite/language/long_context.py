"""Texts longer than a model was trained on: configs with other rotary frequencies, and a search for them.

A position turns pair ``i`` of a head's features by ``theta ** (-2 i / head_dim)`` radians. Beyond the trained
length the slow pairs reach angles that training never showed. Each method gives other frequencies, so that
the angles stay where training was. `rotary` lists the methods and computes the frequencies.

Choices, and the traps behind them:

- A method changes the config and no weight: ``model.config = extend_context(model.config, "yarn", 4.0)``.
- One factor for each pair, ``rotary_dim / 2`` in all, and with latent attention only the rotated part counts.
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
from ..runtime import require_seed
from .rotary import ntk_theta

__all__ = ["extend_context", "search_factors"]


def extend_context(
    config: ModelConfig, method: str, factor: float, long_factor: Sequence[float] | None = None
) -> ModelConfig:
    """The same model for a context ``factor`` times as long. Only the config changes; the weights fit both.

    Args:
        config: of the model as it was trained, without rope_scaling.
        method: "ntk" or one of the types of `RopeScaling`.
        factor: how many times longer.
        long_factor: "longrope": what each frequency is divided by beyond the original context. Up to it
            the frequencies stay as they are, but cosine and sine grow with the context, at every length, as
            they do in released models (see `RopeScaling`). See `search_factors`, or `load_rope_scaling` for
            released ones.

    Raises:
        ValueError: an unknown method, a factor below 1, factors that are missing or not wanted, a config that
            was extended before, or one that the method cannot change.

    >>> from minicpm_lite import load_config
    >>> extend_context(load_config("minicpm-2.4b"), "ntk", 8.0).max_position_embeddings
    32768
    """
    if config.rope_scaling is not None:
        raise ValueError(
            f'This config is scaled already, by "{config.rope_scaling.rope_type}"; extend the config '
            "that the model was trained with, with the whole factor. To allow longer texts with the "
            "scaling it has: dataclasses.replace(config, max_position_embeddings=...), and of longrope an "
            "attention_factor, which else follows from that."
        )
    if long_factor is not None and method != "longrope":
        raise ValueError(f'Only method "longrope" takes long_factor; this is "{method}".')
    if method not in ("ntk", *ROPE_TYPES):
        raise ValueError(f"method is {method!r}; expected one of ntk, {', '.join(ROPE_TYPES)}.")
    require_positive_number("factor", factor)
    if factor < 1:
        raise ValueError(f"factor is {factor}; a context is made longer, so give at least 1.")
    original = config.max_position_embeddings
    longer = replace(config, max_position_embeddings=round(factor * original))
    match method:
        case "ntk":
            if config.rotary_dim == 2:
                raise ValueError(
                    'Method "ntk" raises rope_theta, on which the one pair of a rotated part of 2 does not '
                    "depend; use another method, or wider heads."
                )
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

    Raises:
        ValueError: no first candidate, candidates of different lengths, or a factor below 1.
        FloatingPointError: no candidate has a finite loss.
    """

    def judged(candidate: Float[Tensor, " half"]) -> tuple[float, Float[Tensor, " half"]]:
        value = loss(candidate)
        return (math.inf if math.isnan(value) else value), candidate  # what diverged is worse than any other

    if not len(starts) or any(start.shape != starts[0].shape for start in starts):
        raise ValueError("starts must hold at least one candidate, and all of one length.")
    if not 1 <= factor < math.inf:
        raise ValueError(f"factor is {factor!r}; a context is made longer, so give a number from 1 on.")
    require_positive_integer("parents", parents)
    require_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    tried = [judged(start) for start in starts]
    for _ in range(generations):
        best = sorted(tried, key=lambda each: each[0])[:parents]
        for _ in range(children):
            first, second = torch.randint(len(best), (2,), generator=generator).tolist()
            from_first = torch.rand(len(starts[0]), generator=generator) < 0.5
            child = torch.where(from_first, best[first][1], best[second][1])
            child = child * (1 + 0.1 * torch.randn(len(child), generator=generator))
            child = child.clamp(1.0, 1.25 * factor).cummax(0).values
            tried.append(judged(child))
    least, best = min(tried, key=lambda each: each[0])
    if least == math.inf:
        raise FloatingPointError(f"The loss of none of the {len(tried)} candidates is a finite number.")
    return best
