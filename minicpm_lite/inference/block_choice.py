"""Which blocks of a text a query attends to, by means of windows of its keys (InfLLM v2).

    window_means      keys            -> means of windows
    window_scores     queries, means  -> a product for each head and window
    window_shares     those           -> what a group of heads would give each window, together
    choose_blocks     those           -> the blocks whose windows get most, and those that every query gets

`sparse_attention` says what this is for, and has the formulas and their sources. `WindowMeans` keeps the
means of a text that grows.

Choices, and the traps behind them:

- Windows that reach into a block from the one before count for both: of those that overlap block b the first
  is 4 b - 1. Whoever maps windows to blocks by their start alone finds a word at a border in one block only.
- A query sees a window once its last token stands before it or is its own. So the softmax of a query early
  in the text runs over few windows, of one before the first window over none.
- One window may be the best of two blocks, which then score the same, and of that the choice must not depend
  on chance: of equal blocks the earlier is taken.
- Rows may begin at different columns. Windows and blocks are counted from there, so the means of a row are
  the same wherever its text is moved.
- The score of a mean is the mean of its keys' scores. So windows that reach into guesses, which are different
  for each branch of a tree, are scored without a mean for each (`with_guesses`).
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..config import SparseConfig

__all__ = ["WindowMeans", "choose_blocks", "levels", "num_windows", "window_means", "window_scores",
           "window_shares", "with_guesses"]  # fmt: skip

_COARSE = 4  # times as long and as far apart are coarse windows
_LARGEST_EXPONENT = 60.0  # of a share without its exact sum, so that the sum of a group stays finite


def window_means(
    key: Float[Tensor, "batch kv_heads keys head_dim"], size: int, stride: int
) -> Float[Tensor, "batch kv_heads windows head_dim"]:
    """Means of the keys in each whole window; ``stride`` divides ``size``.

    >>> window_means(torch.arange(7.0).reshape(1, 1, 7, 1), size=4, stride=2).flatten()
    tensor([1.5000, 3.5000])
    """
    windows = num_windows(key.shape[2], size, stride)
    if not windows:
        return key[:, :, :0]
    exact = torch.promote_types(key.dtype, torch.float32)
    used = key[:, :, : (windows - 1) * stride + size].unflatten(2, (-1, stride))
    sums = used.sum(3, dtype=exact)  # a window is size / stride of them
    return (sums.unfold(2, size // stride, 1).sum(-1) / size).type_as(key)


def num_windows(length: int, size: int, stride: int) -> int:
    """How many whole windows so many tokens have."""
    return max(0, (length - size) // stride + 1)


def levels(config: SparseConfig) -> list[tuple[int, int]]:
    """Size and stride of the windows whose means are kept: fine ones and, where they serve, coarse ones."""
    fine = (config.kernel_size, config.kernel_stride)
    coarse = (_COARSE * config.kernel_size, _COARSE * config.kernel_stride)
    return [fine, coarse] if config.approximate_lse or config.coarse_topk else [fine]


def window_scores(
    query: Float[Tensor, "batch heads queries head_dim"],
    means: Float[Tensor, "batch kv_heads windows head_dim"],
) -> Float[Tensor, "batch kv_heads group queries windows"]:
    """Scaled products of queries with the means, or with keys, of their own group."""
    batch, heads, queries, head_dim = query.shape
    kv_heads = means.shape[1]
    grouped = query.reshape(
        batch, kv_heads, -1, head_dim
    )  # (..., group * queries, head_dim): no copy of means
    exact = torch.promote_types(query.dtype, torch.float32)
    scores = (grouped @ means.type_as(query).mT).to(exact) / math.sqrt(head_dim)
    return scores.unflatten(2, (heads // kv_heads, queries))


def window_shares(
    scores: list[Float[Tensor, "batch kv_heads group queries _windows"]],
    at: Int[Tensor, "rows queries"],
    config: SparseConfig,
) -> Float[Tensor, "batch kv_heads queries windows"]:
    """What each fine window would get of the attention of a group's heads together.

    Args:
        scores: of the windows of each of the `levels`; those that a query does not see may hold anything.
        at: the place of each query in its text.
        config: how they are chosen.
    """
    visible = [
        stride * torch.arange(each.shape[-1], device=at.device) + size <= at[:, None, None, :, None] + 1
        for each, (size, stride) in zip(scores, levels(config), strict=True)
    ]  # (rows, 1, 1, queries, windows)
    scores = [each.masked_fill(~seen, -torch.inf) for each, seen in zip(scores, visible, strict=True)]
    if len(scores) == 1:
        return (
            scores[0].softmax(-1).where(visible[0], 0).sum(2)
        )  # where none is seen, softmax is not a number
    (fine, coarse), (seen, coarse_seen) = scores, visible
    begun = coarse_seen.any(-1, keepdim=True)  # until then the fine ones say it
    total = torch.where(begun, coarse.logsumexp(-1, keepdim=True), fine.logsumexp(-1, keepdim=True))
    if config.coarse_topk:
        coarse_shares = (coarse - total).exp().where(coarse_seen, 0).sum(2)
        seen = seen & _inside_best(coarse_shares, fine.shape[-1], coarse_seen[:, :, 0], config)[:, :, None]
    return (fine - total).clamp(max=_LARGEST_EXPONENT).exp().where(seen, 0).sum(2)


def _inside_best(
    shares: Float[Tensor, "batch kv_heads queries coarse"],
    windows: int,
    visible: Bool[Tensor, "rows 1 queries coarse"],
    config: SparseConfig,
) -> Bool[Tensor, "batch kv_heads queries windows"]:
    """Which fine windows lie inside one of the coarse windows that get most, or behind all whole ones."""
    best = shares.topk(min(config.coarse_topk, shares.shape[-1])).indices
    best = torch.zeros_like(shares, dtype=torch.bool).scatter(3, best, True)
    fine = torch.arange(windows, device=shares.device)
    reach = (_COARSE - 1) * config.kernel_size // config.kernel_stride  # the last one inside, from the first
    whole = visible.sum(-1, keepdim=True)  # (rows, 1, queries, 1)
    inside = (fine > _COARSE * (whole - 1) + reach) | (whole == 0)  # behind all of them
    best = F.pad(best, (0, windows // _COARSE + 1 - best.shape[-1]))
    for earlier in range(reach // _COARSE + 1):
        coarse = fine // _COARSE - earlier
        begins = (coarse >= 0) & (fine - _COARSE * coarse <= reach)
        inside = inside | (best[..., coarse.clamp(min=0)] & begins)
    return inside


def choose_blocks(
    shares: Float[Tensor, "batch kv_heads queries windows"],
    at: Int[Tensor, "rows queries"],
    blocks: int,
    config: SparseConfig,
) -> Bool[Tensor, "batch kv_heads queries blocks"]:
    """Which blocks the heads of each group attend to.

    Args:
        shares: what `window_shares` gives.
        at: the place of each query in its text; negative for one that is no text, which chooses nothing.
        blocks: how many to choose among.
        config: how they are chosen.
    """
    per_block = config.block_size // config.kernel_stride
    # windows from the block before
    overlap = config.kernel_size // config.kernel_stride - 1
    shares = shares[..., : blocks * per_block]
    missing = blocks * per_block - shares.shape[-1]
    padded = F.pad(shares.flatten(0, 2), (overlap, missing))
    best = F.max_pool1d(padded, per_block + overlap, per_block)
    score = best.unflatten(0, shares.shape[:3])

    block = torch.arange(blocks, device=at.device)
    at = at[:, None, :, None]
    own = at.div(config.block_size, rounding_mode="floor")
    first, last = block < config.init_blocks, block > own - config.local_blocks
    score = score.masked_fill(first | last, torch.inf)
    score = score.masked_fill(block > own, -torch.inf)

    most = min(config.num_blocks, blocks)
    least = score.topk(most).values[..., -1:]
    above, equal = score > least, score == least
    # of equal blocks the earlier
    room = most - above.sum(-1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(-1) <= room))
    return (chosen | (at < config.all_visible)) & (block <= own)


def with_guesses(
    scores: Float[Tensor, "batch kv_heads group queries _windows"],
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    at: Int[Tensor, "rows queries"],
    starts: Int[Tensor, " rows"],
    ancestors: Bool[Tensor, "rows queries queries"],
    size: int,
    stride: int,
) -> Float[Tensor, "batch kv_heads group queries _more_windows"]:
    """The scores with those of windows that reach into guesses, each along its own branch.

    Args:
        scores: of the windows of the text before the guesses.
        query: of the guesses; the newest keys are theirs.
        key: of the text and the guesses.
        at: the place of each guess in the text that it continues.
        starts: the column at which a row's text begins.
        ancestors: which guesses each guess sees.
        size, stride: of the windows.
    """
    text = key.shape[2] - query.shape[2]
    whole = ((text - starts - size).div(stride, rounding_mode="floor") + 1).clamp(
        min=0
    )  # windows of the text
    more = (
        int((at.amax(-1) + 1 - (text - starts)).max()) + stride - 1
    ) // stride  # that the deepest guess ends
    window = whole[:, None] + torch.arange(more, device=at.device)  # (rows, more)
    first = max(0, text - size + 1)  # column; those before are in no window with a guess
    place = torch.arange(first, text, device=at.device) - starts[:, None]
    seen = torch.cat([(place >= 0)[:, None].expand(-1, at.shape[1], -1), ancestors], dim=-1)
    place = torch.cat([place, at], dim=-1)  # (rows, tail)
    inside = place[:, :, None] - window[:, None] * stride  # (rows, tail, more): tokens from a window's start
    part = (
        seen[..., None] & ((inside >= 0) & (inside < size))[:, None]
    ) / size  # (rows, queries, tail, more)
    tail = window_scores(query, key[:, :, first:])  # (batch, kv_heads, group, queries, tail)
    along = torch.einsum("bkgqt,bqtm->bkgqm", tail, part.to(tail).expand(len(tail), -1, -1, -1))
    scores = F.pad(scores, (0, int(window.max()) + 1 - scores.shape[-1]))
    return scores.scatter(-1, window[:, None, None, None].expand_as(along), along)


class WindowMeans:
    """The means of the windows of a text that grows, each row's from where its text begins.

    Args:
        size, stride: of the windows.
    """

    def __init__(self, size: int, stride: int) -> None:
        self.size, self.stride = size, stride
        self._kept: Tensor | None = None  # (batch, kv_heads, room, head_dim)
        self._whole: list[int] = []  # windows of each row

    def extend(
        self, key: Float[Tensor, "batch kv_heads keys head_dim"], starts: list[int], room: int
    ) -> None:
        """Add the windows that the text now has; ``room`` is for how many tokens there ever will be."""
        batch, kv_heads, keys, head_dim = key.shape
        if self._kept is None:
            with torch.inference_mode(False):  # so that it can be written in any mode
                self._kept = key.new_empty(
                    batch, kv_heads, num_windows(room, self.size, self.stride), head_dim
                )
            self._whole = [0] * batch
        for row, (start, old) in enumerate(zip(starts, self._whole, strict=True)):
            new = num_windows(keys - start, self.size, self.stride)
            if new > old:
                since = key[row : row + 1, :, start + old * self.stride :]
                self._kept[row, :, old:new] = window_means(since, self.size, self.stride)[0]
                self._whole[row] = new

    def forget(self, lengths: list[int]) -> None:
        """Keep the windows of the first so many tokens of each row."""
        pairs = zip(self._whole, lengths, strict=True)
        self._whole = [min(whole, num_windows(length, self.size, self.stride)) for whole, length in pairs]

    def select(self, rows: list[int]) -> None:
        """Make the rows these."""
        with torch.inference_mode(False):
            self._kept = self._kept[rows]
        self._whole = [self._whole[row] for row in rows]

    @property
    def means(self) -> Float[Tensor, "batch kv_heads windows head_dim"]:
        """As many as the longest row has; what stands behind those of a shorter row means nothing."""
        return self._kept[:, :, : max(self._whole)]

    @property
    def nbytes(self) -> int:
        """Memory taken, in bytes."""
        return self._kept.nbytes
