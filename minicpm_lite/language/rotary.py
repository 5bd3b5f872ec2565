"""Rotary positions: each pair of a head's features is turned by an angle that grows with the position.

    angle(position, i) = position * frequency(i),     frequency(i) = theta ** (-2 i / head_dim)
    (a, b) -> (a cos - b sin, b cos + a sin)          a = feature i, b = feature i + head_dim / 2

So the product of a query and a key depends on how far apart they stand, not on where. Source: Su et al. 2021,
RoPE. A config may change the frequencies for longer texts; `long_context` says why and makes such configs:

    linear     every frequency / factor                          position interpolation, Chen et al. 2023
    ntk        a larger theta: slow pairs / factor, fast stay    NTK-aware scaling, bloc97 2023; ABF
    dynamic    the same, and theta grows with the text           dynamic NTK, 2023
    yarn       fast pairs stay, slow ones / factor, a ramp       YaRN, Peng et al. 2023
    llama3     the same with a ramp in frequency, not in index   Llama 3.1
    longrope   every frequency / a factor of its own, searched   LongRoPE, Ding et al. 2024; MiniCPM3 and 4

Choices, and the traps behind them:

- Pairs are half a head apart, the "half-split" layout, with angles in float32 whatever the weights are.
  GGUF files turn neighbours: convert, do not mix.
- With "dynamic" and "longrope" the frequencies depend on the length of the text, and keys that were rotated
  before stay as they were. So a cache decides once, by its room, and all its keys agree.
- YaRN and LongRoPE also multiply cosine and sine, so the scores by the square of that: attention is sharper.
- At position 131,071 a frequency that is off by its last bit turns by 0.01 radians more. Scale the frequency
  or the position, but as the model was trained; the released code multiplies the position first.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ..config import ModelConfig, RopeScaling

__all__ = ["AngleTable", "apply_rotary", "ntk_theta", "rotary_angles", "rotary_frequencies",
           "same_frequencies", "scaled_angles", "scaled_frequencies"]  # fmt: skip


def rotary_frequencies(head_dim: int, theta: float) -> Float[Tensor, " half"]:
    """By how many radians a position turns each pair of features: ``theta ** (-2 i / head_dim)``."""
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
    cos: Float[Tensor, "tokens head_dim"] | Float[Tensor, "batch _heads tokens head_dim"],
    sin: Float[Tensor, "tokens head_dim"] | Float[Tensor, "batch _heads tokens head_dim"],
) -> Float[Tensor, "batch heads tokens head_dim"]:
    """Turn feature ``i`` with feature ``i + head_dim/2`` by the angle of the token's position.

    Raises:
        ValueError: angles of three dimensions, of which the first could be rows or heads.
    """
    if cos.ndim == 3:
        raise ValueError(
            f"cos has shape {tuple(cos.shape)}; expected (tokens, head_dim), or (batch, 1, tokens, head_dim) "
            "for each row its own: positions[:, None]."
        )
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    partner = exact.roll(x.shape[-1] // 2, dims=-1)
    return torch.addcmul(exact * cos, partner, sin).type_as(x)


def scaled_angles(
    config: ModelConfig, positions: Int[Tensor, "*batch tokens"], length: int
) -> tuple[Float[Tensor, "*batch tokens head_dim"], Float[Tensor, "*batch tokens head_dim"]]:
    """`rotary_angles` with the model's own frequencies for a text of ``length`` tokens, and its magnitude."""
    frequencies, magnitude = scaled_frequencies(config, length)
    cos, sin = rotary_angles(positions, frequencies.to(positions.device))
    return cos * magnitude, sin * magnitude


class AngleTable:
    """`scaled_angles` of every position of a text, computed at the first question.

    Args:
        length: tokens of the text, which decides some frequencies.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self._table: Tensor | None = None

    def clear(self) -> None:
        """Forget them: another model is asked for next."""
        self._table = None

    def __call__(
        self, config: ModelConfig, positions: Int[Tensor, "*batch tokens"]
    ) -> tuple[Float[Tensor, "*batch tokens head_dim"], Float[Tensor, "*batch tokens head_dim"]]:
        """Cosine and sine for `apply_rotary` at some positions."""
        if self._table is None:
            everywhere = torch.arange(self.length, device=positions.device)
            self._table = torch.cat(scaled_angles(config, everywhere, self.length), dim=-1)
        cos, sin = F.embedding(positions, self._table).chunk(2, dim=-1)  # one look-up for both
        return cos, sin


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
            frequencies = plain / torch.tensor(factors, dtype=torch.float32)
            ratio = factor or config.max_position_embeddings / original
            magnitude = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
    return frequencies, magnitude if scaling.attention_factor is None else scaling.attention_factor


def same_frequencies(config: ModelConfig, lengths: Sequence[int]) -> list[list[int]]:
    """The places of texts that may share a batch: of each list, all have the same frequencies by themselves.

    >>> same_frequencies(ModelConfig(8, 8, 1, 1, 9), [5, 3, 900])  # which no length changes
    [[0, 1, 2]]
    """
    frequencies = {length: tuple(scaled_frequencies(config, length)[0].tolist()) for length in {*lengths}}
    alike: dict[tuple[float, ...], list[int]] = {}
    for place, length in enumerate(lengths):
        alike.setdefault(frequencies[length], []).append(place)
    return [*alike.values()]


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
    pairs = torch.arange(dim // 2, dtype=torch.float32)
    return 1 - ((pairs - low) / (high - low)).clamp(0, 1)
