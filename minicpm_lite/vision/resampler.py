"""The resampler: a fixed number of vectors for a picture of any size, and for several frames of a video.

    x_f  = norm_kv(W_kv features_f)                       patches of frame f, as wide as the language model
    keys = x_f + place(row, column) + time(t_f)           frame after frame; a still image has no time
    out  = norm_post(attention(norm_q(queries), keys, values = x)) W_out

    place   4 D features: sin and cos of column w_k, then of row w_k        w_k = 10000^(-k / D), k < D
    time    2 D features: sin and cos of t w_k, all the width               t in tenths of a second

There is one layer of attention, no residual and no feed-forward network. The queries are learned: each is a
question that is put to every picture, and the answers are all that the language model sees of it.

Source: MiniCPM-V 2.0 to 4.5 as released; the paper of 4.5 is arXiv 2509.18154.

Choices, and the traps behind them:

- Several frames are attended to at once, as one long row of keys. So one query can compare two frames, and
  a group of up to six frames costs the language model what one picture costs. The weights are those of the
  two-dimensional resampler: a model of pictures becomes one of videos without a new weight.
- Positions stand on the keys and not on the values. The paper of 4.5 puts them on the queries; the released
  code does not. Only 1.0 and 2.0 add places to the queries, those of a grid of 8 by 8.
- The column comes first among the features, as in the code of MAE that they go back to.
- Whoever takes the positions to be features of the values, or leaves the mask of filling out, gets answers
  that look right and depend on which pictures share the call.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..config import require_positive_integer
from .layers import CrossAttention, real_places

__all__ = ["Resampler", "ResamplerConfig", "place_waves", "time_waves"]

TICKS_PER_SECOND = 10
_EPS = 1e-6


@dataclass(frozen=True)
class ResamplerConfig:
    """The shape of a resampler.

    Attributes:
        hidden_size: features of its vectors: the language model's, a multiple of 4.
        queries: vectors for each picture, or group of frames.
        vision_size: features of a patch.
        head_dim: features of a head.
        places_on_queries: add the places of a square grid to the queries, as 1.0 and 2.0 do.

    Raises:
        ValueError: a size that cannot be, or sizes that do not fit.
    """

    hidden_size: int = 4096
    queries: int = 64
    vision_size: int = 1152
    head_dim: int = 128
    places_on_queries: bool = False

    def __post_init__(self) -> None:
        for field in fields(self)[:-1]:
            require_positive_integer(field.name, getattr(self, field.name))
        for name, divisor in (("head_dim", self.head_dim), ("4", 4)):
            if self.hidden_size % divisor:
                raise ValueError(
                    f"hidden_size is {self.hidden_size}; expected a multiple of {name}"
                    + (f", which is {divisor}." if name == "head_dim" else ", for sine and cosine each way.")
                )
        if self.places_on_queries and math.isqrt(self.queries) ** 2 != self.queries:
            raise ValueError(
                f"queries is {self.queries}; places on queries need a square number, such as 64."
            )


def place_waves(rows: int, columns: int, width: int) -> Float[Tensor, "patches width"]:
    """Where each patch of a grid lies, row by row: half of the features for its column, half for its row.

    >>> place_waves(1, 2, width=4).tolist()[0]
    [0.0, 1.0, 0.0, 1.0]
    """
    across = _waves(torch.arange(columns), width // 2).expand(rows, -1, -1)
    down = _waves(torch.arange(rows), width // 2)[:, None].expand(-1, columns, -1)
    return torch.cat([across, down], dim=-1).flatten(0, 1)


def time_waves(ticks: Sequence[int], width: int) -> Float[Tensor, "frames width"]:
    """When each frame was taken, in tenths of a second; zeros for a still image, whose tick is -1."""
    at = torch.tensor(ticks)
    return _waves(at.clamp(min=0), width) * (at >= 0)[:, None]


class Resampler(nn.Module):
    """Queries that look at all patches of a picture, or of a group of frames.

    >>> with torch.device("meta"):
    ...     resampler = Resampler(ResamplerConfig())
    >>> f"{sum(parameter.numel() for parameter in resampler.parameters()):,}"  # as in MiniCPM-V 4.5
    '88,907,776'
    """

    def __init__(self, config: ResamplerConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.query = nn.Parameter(torch.empty(config.queries, width))
        self.kv_proj = (
            nn.Identity() if config.vision_size == width else nn.Linear(config.vision_size, width, bias=False)
        )
        self.ln_q = nn.LayerNorm(width, _EPS)
        self.ln_kv = nn.LayerNorm(width, _EPS)
        self.attn = CrossAttention(width, width // config.head_dim)
        self.ln_post = nn.LayerNorm(width, _EPS)
        self.proj = nn.Parameter(torch.empty(width, width))
        if self.query.device.type != "meta":
            self._initialise()

    def forward(
        self,
        features: Float[Tensor, "pictures patches vision_size"],
        grids: Sequence[tuple[int, int]],
        ticks: Sequence[Sequence[int]] | None = None,
    ) -> Float[Tensor, "groups queries width"]:
        """As many vectors for each picture, or for each group of frames.

        Args:
            features: of each picture's patches, row by row, filled up to the picture with most.
            grids: rows and columns of patches of each picture.
            ticks: groups of frames, in the order of the pictures: for each group when its frames were taken,
                in tenths of a second, or -1 for a still image, which is a group by itself. Left out: all
                pictures are still images.

        Raises:
            ValueError: grids that do not fit the features; ticks that are no whole numbers, or not one for
                each picture; a still image in a group with others.
        """
        groups = [[-1]] * len(grids) if ticks is None else [list(group) for group in ticks]
        self._require_fit(features, grids, groups)
        device, dtype, width = features.device, features.dtype, self.config.hidden_size
        when = time_waves([tick for group in groups for tick in group], width).to(device, dtype)
        where = {grid: place_waves(*grid, width).to(device, dtype) for grid in {*map(tuple, grids)}}
        x = self.ln_kv(self.kv_proj(features))
        values = [row[: math.prod(grid)] for row, grid in zip(x, grids, strict=True)]
        keys = [value + where[tuple(grid)] + at for value, grid, at in zip(values, grids, when, strict=True)]
        keys, values = (self._by_group(each, groups) for each in (keys, values))
        real = real_places([*map(len, keys)], device)
        key, value = (nn.utils.rnn.pad_sequence(each, batch_first=True) for each in (keys, values))
        query = self._queries().expand(len(groups), -1, -1)
        return self.ln_post(self.attn(query, key, value, real)) @ self.proj

    @staticmethod
    def _by_group(frames: list[Tensor], groups: Sequence[Sequence[int]]) -> list[Tensor]:
        """The patches of all frames of a group in one row, frame after frame."""
        left = iter(frames)
        return [torch.cat([*islice(left, len(group))]) for group in groups]

    def _queries(self) -> Float[Tensor, "queries width"]:
        query = self.ln_q(self.query)
        if not self.config.places_on_queries:
            return query
        side = math.isqrt(self.config.queries)
        return query + place_waves(side, side, self.config.hidden_size).to(query.device, query.dtype)

    def _require_fit(
        self, features: Tensor, grids: Sequence[tuple[int, int]], groups: Sequence[Sequence[int]]
    ) -> None:
        if features.ndim != 3 or features.shape[-1] != self.config.vision_size:
            raise ValueError(
                f"The features are of shape {tuple(features.shape)}; expected pictures, patches and "
                f"{self.config.vision_size} features of each."
            )
        if len(grids) != len(features) or max(math.prod(grid) for grid in grids) > features.shape[1]:
            raise ValueError(
                f"There are features of {len(features)} pictures with at most {features.shape[1]} patches; "
                f"the grids are {list(grids)}."
            )
        if sum(map(len, groups)) != len(grids) or not all(groups):
            raise ValueError(
                f"The ticks are {groups}: groups of {[len(group) for group in groups]} frames, but there are "
                f"{len(grids)} pictures. Give one tick for each, and no empty group."
            )
        if not all(isinstance(tick, int) and tick >= -1 for group in groups for tick in group):
            raise ValueError(f"The ticks are {groups}; expected whole tenths of a second, or -1 for a still.")
        if any(len(group) > 1 and min(group) < 0 for group in groups):
            raise ValueError(f"The ticks are {groups}; a still image (-1) is a group by itself.")

    def _initialise(self) -> None:
        nn.init.trunc_normal_(self.query, std=0.02)
        for weight in (self.attn.in_proj_weight, self.attn.out_proj.weight):
            nn.init.trunc_normal_(weight, std=0.02)
        if isinstance(self.kv_proj, nn.Linear):
            nn.init.trunc_normal_(self.kv_proj.weight, std=0.02)
        nn.init.zeros_(self.attn.out_proj.bias)
        nn.init.normal_(self.proj, std=self.config.hidden_size**-0.5)


def _waves(at: Tensor, width: int) -> Float[Tensor, "*at width"]:
    """Sines, then cosines, of a number at ``width / 2`` frequencies."""
    half = width // 2
    angles = at[..., None].double() * 10000.0 ** (-torch.arange(half).double() / half)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).float()
