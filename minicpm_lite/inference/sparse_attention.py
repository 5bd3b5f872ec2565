"""Sparse attention (InfLLM v2): each query attends to a few blocks of the text, and chooses them by itself.

    mean[j]    = mean of the keys 16 j .. 16 j + 31          a window; a query sees those that end before it
    share[h,j] = softmax over j (q_h . mean[j] / sqrt(head_dim))          for each query head h of a group
    score[b]   = max of sum_h share[h,j] over the windows j that overlap block b, 4 b - 1 .. 4 b + 3
    chosen     = the first blocks, the last 32 up to the query's own, and of the others those that score best
    out_h      = softmax attention of q_h to the tokens of the chosen blocks, up to its own

Sources: Zhao et al. 2025, "InfLLM-V2", arXiv 2509.24663; MiniCPM4 report, arXiv 2506.07900, section 2.1. The
sizes are those of the released ``sparse_config`` (`SparseConfig`): blocks of 64 tokens, 96 of them, so 6,144
tokens, which is less than 5 % of a text of 128K.

    SparseContext(config)          a call is a whole text: training, scoring
    SparseCache(room, config)      decoding; the means are kept beside the keys
    sparse_attention(q, k, v, config)           what both compute
    naive_sparse_attention(q, k, v, config)     the same as the definition reads, a query at a time

Nothing here has parameters: weights that were trained with dense attention run with it, and what was trained
with it runs dense. The heads of a group choose together, so that one reading of a block serves all of them.

Choices, and the traps behind them:

- Choosing takes no gradient. Keys and queries learn through the attention to what was chosen.
- The count of blocks is topk + window_size / block_size, the query's own among them. Other descriptions
  count the own block apart or leave the local ones to the attention kernel: one block more or less.
- A query attends to all if it sees fewer than ``dense_len`` tokens itself. The released code asks how long
  the text of the call is. The two differ for queries of a long prompt that see more than 6,144 tokens and
  fewer than ``dense_len``; asked of each query, a text gives the same whether it is read at once, in pieces,
  or a token at a time.
- Blocks and windows are counted from where a row's text begins, not from its padding, so that a row is what
  it would be alone.
- A mean belongs to a window, and a window to the text: those that a text which went back no longer has are
  dropped, and guesses of a tree make none before they are taken.
- Keys are rotated before they are averaged, as the released models have it (``use_nope`` false).
- With ``approximate_lse`` the shares do not sum to 1: a sum over a quarter of the windows is about a quarter
  as large. It is so for all heads alike, and the order of blocks hardly changes.
- ``coarse_topk`` is ours, not the paper's: coarse means (128 tokens, stride 64) choose where fine ones are
  read, since at 128K the fine means are two fifths of all that a step reads. Twice ``topk`` of them keep most
  of the choice; with as few as ``topk`` some blocks have no score, and the first of the text stand in.
"""

import math
from collections.abc import Iterable
from operator import index
from typing import SupportsIndex

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..config import SparseConfig
from ..kernels import attention as kernel
from ..language.context import Context, KVCache, dense_attention
from .block_choice import (
    WindowMeans,
    choose_blocks,
    levels,
    num_windows,
    window_means,
    window_scores,
    window_shares,
    with_guesses,
)

__all__ = [
    "SparseCache",
    "SparseConfig",
    "SparseContext",
    "attend_blocks",
    "naive_sparse_attention",
    "sparse_attention",
]

TILE = 64  # queries that are looked at together


def attend_blocks(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys head_dim"],
    chosen: Bool[Tensor, "batch kv_heads queries blocks"],
    at: Int[Tensor, "rows queries"],
    starts: Int[Tensor, " rows"],
    block_size: int,
    ancestors: Bool[Tensor, "_rows queries queries"] | None = None,
) -> Float[Tensor, "batch heads queries head_dim"]:
    """Softmax attention to the tokens of the chosen blocks, which are read once for all queries.

    Args:
        query, key, value: as of `dense_attention`.
        chosen: the blocks, for each key-value head and query.
        at: the place of each query in its text.
        starts: the column at which a row's text begins.
        block_size: tokens of a block.
        ancestors: where the queries are guesses, which of each other they see; the newest keys are theirs.
    """
    text = key.shape[2] - (0 if ancestors is None else query.shape[2])
    ends = torch.full_like(starts, text)
    column, seen = chosen_columns(chosen, at, starts, ends, block_size, ancestors)
    out = attend_columns(query, *(_columns(each, column).type_as(query) for each in (key, value)), seen)
    return out.masked_fill((at < 0)[:, None, :, None], 0) if ancestors is None else out


def chosen_columns(
    chosen: Bool[Tensor, "batch kv_heads queries blocks"],
    at: Int[Tensor, "rows queries"],
    starts: Int[Tensor, " rows"],
    ends: Int[Tensor, " rows"],
    block_size: int,
    ancestors: Bool[Tensor, "_rows queries queries"] | None = None,
) -> tuple[
    Int[Tensor, "batch kv_heads tokens"],
    Bool[Tensor, "batch kv_heads queries tokens"],
]:
    """The tokens of all chosen blocks, and which of them each query sees.

    Args:
        chosen, at, starts, block_size, ancestors: as of `attend_blocks`.
        ends: the column behind a row's text, where its guesses stand.
    """
    batch, kv_heads, queries, _ = chosen.shape
    wanted = chosen.any(2)  # (batch, kv_heads, blocks)
    most = int(wanted.sum(-1).max())
    block = wanted.byte().sort(dim=-1, descending=True, stable=True).indices[..., :most]
    place = (block[..., None] * block_size + torch.arange(block_size, device=at.device)).flatten(2)
    seen = chosen.gather(3, block[:, :, None].expand(-1, -1, queries, -1)).repeat_interleave(block_size, -1)
    last = torch.minimum(at, (ends - 1 - starts)[:, None])  # of the text before it, (rows, queries)
    seen &= place[:, :, None] <= last[:, None, :, None]  # (batch, kv_heads, queries, tokens)
    column = torch.minimum(place + starts[:, None, None], (ends - 1).clamp(min=0)[:, None, None])
    if ancestors is not None:
        own = at[:, None, None].div(block_size, rounding_mode="floor").expand(batch, kv_heads, queries, -1)
        seen = torch.cat([seen, chosen.gather(3, own) & ancestors[:, None]], dim=-1)
        guesses = ends[:, None] + torch.arange(queries, device=at.device)  # (rows, queries)
        column = torch.cat([column, guesses[:, None].expand(batch, kv_heads, -1)], dim=-1)
    return column, seen


def attend_columns(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch_kv_heads tokens head_dim"],
    value: Float[Tensor, "batch_kv_heads tokens head_dim"],
    seen: Bool[Tensor, "batch kv_heads queries tokens"],
) -> Float[Tensor, "batch heads queries head_dim"]:
    """Softmax attention to tokens that were copied together, those of each key-value head its own."""
    batch, kv_heads, queries, tokens = seen.shape
    heads, head_dim = query.shape[1], query.shape[-1]
    group = heads // kv_heads
    out = dense_attention(  # a key-value head and its group as a row of the batch, the group as queries
        query.reshape(batch * kv_heads, 1, group * queries, head_dim),
        *(each[:, None] for each in (key, value)),
        seen.reshape(-1, 1, 1, queries, tokens).expand(-1, -1, group, -1, -1).flatten(2, 3),
    )
    return out.reshape(batch, heads, queries, -1)


def _columns(
    x: Shaped[Tensor, "batch kv_heads keys width"], column: Int[Tensor, "batch kv_heads tokens"]
) -> Shaped[Tensor, "rows tokens width"]:
    """Of each head of each row of the batch the named columns, copied a column at a time."""
    heads = [head for row in x.unbind() for head in row.unbind()]
    return torch.stack(
        [head.index_select(0, mine) for head, mine in zip(heads, column.flatten(0, 1), strict=True)]
    )


def attend_text(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys head_dim"],
    means: list[Float[Tensor, "batch kv_heads _windows head_dim"]],
    starts: Int[Tensor, " rows"],
    config: SparseConfig,
) -> Float[Tensor, "batch heads queries head_dim"]:
    """What each of the newest tokens of a text takes from the blocks that it chooses.

    Args:
        query, key, value: as of `dense_attention`.
        means: of the windows of each of the `levels`, counted from where a row's text begins.
        starts: the column at which a row's text begins.
        config: how blocks are chosen.
    """
    if not kernel.possible(query, key, value):
        return attend_tiles(query, key, value, means, starts, config)
    return kernel.sparse_attention(query, key, value, means, starts, kernel_sizes(config))


def kernel_sizes(config: SparseConfig) -> kernel.Sizes:
    """What the kernels ask of a config."""
    return kernel.Sizes(*(getattr(config, name) for name in kernel.Sizes._fields))


def attend_tiles(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Shaped[Tensor, "batch kv_heads keys head_dim"],
    value: Shaped[Tensor, "batch kv_heads keys head_dim"],
    means: list[Shaped[Tensor, "batch kv_heads _windows head_dim"]],
    starts: Int[Tensor, " rows"],
    config: SparseConfig,
) -> Float[Tensor, "batch heads queries head_dim"]:
    """`attend_text` in PyTorch: queries that attend to all at once, the others some at a time.

    Memory is what a tile of queries needs: their scores, and a copy of the blocks that any of them chose.
    """
    queries, keys = query.shape[2], key.shape[2]
    at = torch.arange(keys - queries, keys, device=query.device) - starts[:, None]  # (rows, queries)
    dense = int((at < config.all_visible).all(0).sum())  # queries that attend to all, in every row
    out = []
    if dense:
        end = keys - queries + dense
        mask = _from_starts(at[:, :dense], starts, end) if starts.any() else None
        seen = (each[:, :, :end].type_as(query) for each in (key, value))
        out.append(dense_attention(query[:, :, :dense], *seen, mask))
    training = torch.is_grad_enabled() and any(each.requires_grad for each in (query, key, value))
    for first in range(dense, queries, TILE):
        tile = slice(first, min(first + TILE, queries))
        end, places = keys - queries + tile.stop, at[:, tile]
        with torch.no_grad():
            last = int(places.max())
            counts = [num_windows(last + 1, *level) for level in levels(config)]
            scores = [
                window_scores(query[:, :, tile], each[:, :, :count])
                for each, count in zip(means, counts, strict=True)
            ]
            blocks = last // config.block_size + 1
            chosen = choose_blocks(window_shares(scores, places, config), places, blocks, config)
        arguments = (query[:, :, tile], key[:, :, :end], value[:, :, :end], chosen, places, starts,
                     config.block_size)  # fmt: skip
        # the copies of keys and values would be kept for each tile until the backward pass
        out.append(
            checkpoint(attend_blocks, *arguments, use_reentrant=False)
            if training
            else attend_blocks(*arguments)
        )
    return out[0] if len(out) == 1 else torch.cat(out, dim=2)


def _from_starts(
    at: Int[Tensor, "rows queries"], starts: Int[Tensor, " rows"], keys: int
) -> Bool[Tensor, "rows 1 queries keys"]:
    """Which keys each of the newest queries sees: those of its row's text; what is no text sees itself."""
    column = torch.arange(keys, device=at.device)
    place = column - starts[:, None]  # (rows, keys)
    itself = column == column[keys - at.shape[1] :, None]
    return (((place >= 0)[:, None] & (place[:, None] <= at[..., None])) | itself)[:, None]


def sparse_attention(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys head_dim"],
    config: SparseConfig,
) -> Float[Tensor, "batch heads queries head_dim"]:
    """Causal attention of the newest ``queries`` of ``keys`` tokens to the blocks that each chooses.

    With as many blocks as there are, or fewer tokens than ``config.dense_len``, this is `dense_attention`.
    """
    means = [window_means(key.detach(), *level) for level in levels(config)]
    starts = torch.zeros(1, dtype=torch.long, device=key.device)
    return attend_text(query, key, value, means, starts, config)


def naive_sparse_attention(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys head_dim"],
    config: SparseConfig,
) -> Float[Tensor, "batch heads queries head_dim"]:
    """The same as `sparse_attention`, as the definition reads: for each query and group of heads alone."""
    batch, heads, queries, head_dim = query.shape
    kv_heads, keys = key.shape[1:3]
    group, out = heads // kv_heads, torch.zeros_like(query)
    for row in range(batch):
        for kv_head in range(kv_heads):
            mine = slice(kv_head * group, (kv_head + 1) * group)
            for i in range(queries):
                seen = keys - queries + i + 1  # tokens, the query's own among them
                q, k, v = query[row, mine, i], key[row, kv_head, :seen], value[row, kv_head, :seen]
                tokens = [
                    token
                    for block in sorted(_naive_blocks(q.detach(), k.detach(), config))
                    for token in range(block * config.block_size, min((block + 1) * config.block_size, seen))
                ]
                weights = (q @ k[tokens].T / math.sqrt(head_dim)).softmax(-1)  # (group, tokens)
                out[row, mine, i] = weights @ v[tokens]
    return out


def _naive_blocks(
    q: Float[Tensor, "group head_dim"], k: Float[Tensor, "seen head_dim"], config: SparseConfig
) -> set[int]:
    """The blocks that one query attends to in the text up to itself."""
    seen, head_dim = k.shape
    own = (seen - 1) // config.block_size
    blocks = range(own + 1)
    if seen < config.dense_len or len(blocks) <= config.num_blocks:
        return set(blocks)

    def scores(size: int, stride: int) -> Tensor:
        means = [k[start : start + size].mean(0) for start in range(0, seen - size + 1, stride)]
        return q @ torch.stack(means).T / math.sqrt(head_dim) if means else q.new_empty(len(q), 0)

    size, stride = config.kernel_size, config.kernel_stride
    fine, coarse = scores(size, stride), scores(4 * size, 4 * stride)
    exact = not (config.approximate_lse or config.coarse_topk) or not coarse.numel()
    total = (fine if exact else coarse).logsumexp(-1, keepdim=True)
    shares = (fine - total).exp().sum(0)  # of each window, by all heads of the group together
    windows = {window: range(window * stride, window * stride + size) for window in range(len(shares))}
    if config.coarse_topk and coarse.numel():
        votes = (coarse - total).exp().sum(0)
        best = votes.topk(min(config.coarse_topk, len(votes))).indices.tolist()
        under = [range(c * 4 * stride, c * 4 * stride + 4 * size) for c in best]
        behind = (len(votes) - 1) * 4 * stride + 4 * size  # no coarse window is whole from there on
        windows = {
            window: tokens
            for window, tokens in windows.items()
            if tokens[-1] >= behind or any(tokens[0] in c and tokens[-1] in c for c in under)
        }

    def score(block: int) -> float:
        if block < config.init_blocks or block > own - config.local_blocks:
            return math.inf
        mine = range(block * config.block_size, (block + 1) * config.block_size)
        overlapping = [
            w for w, tokens in windows.items() if tokens[0] < mine.stop and tokens[-1] >= mine.start
        ]
        return max((shares[window].item() for window in overlapping), default=0.0)

    return set(sorted(blocks, key=score, reverse=True)[: config.num_blocks])


class SparseContext(Context):
    """A call is a whole text, and its queries attend to the blocks that they choose. Nothing is kept.

    Args:
        config: how they choose.
    """

    def __init__(self, config: SparseConfig) -> None:
        self.config = config

    def belong(self, model: nn.Module) -> None:
        """The model whose call begins.

        Raises:
            ValueError: it has latent attention.
        """
        refuse_latent_attention(model)

    def attend(
        self,
        layer: int,
        query: Float[Tensor, "batch heads queries head_dim"],
        key: Float[Tensor, "batch kv_heads keys head_dim"],
        value: Float[Tensor, "batch kv_heads keys head_dim"],
    ) -> Float[Tensor, "batch heads queries head_dim"]:
        """What each token takes from the blocks that it chooses."""
        return sparse_attention(query, key, value, self.config)


class SparseCache(KVCache):
    """A cache whose queries attend to the blocks that they choose; the means of windows are kept, too.

    It goes back, splits, takes in branches of guesses and holds rows of different length as a `KVCache`
    does, and what a text gives does not depend on the pieces in which it is read.

    Args:
        room: tokens there is room for.
        config: how blocks are chosen.
        padding: for each row of the batch, how many tokens at its start are no text; None: 0.
        dtype: what is kept is rounded to it; None: it is kept as it comes. The kernel takes float32 alone, so
            a cache of 16 bits is smaller and slower.
    """

    def __init__(
        self,
        room: int,
        config: SparseConfig,
        padding: Int[Tensor, " batch"] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(room, padding, dtype)
        self.config = config
        self._means: dict[int, list[WindowMeans]] = {}  # of each layer, one for each level
        self._starts = torch.zeros(1, dtype=torch.long)  # the column at which each row's text begins
        self._first = [0]  # the same, a number for each row

    def belong(self, model: nn.Module) -> None:
        """The model whose call begins.

        Raises:
            ValueError: it has latent attention, or another model has filled the cache.
        """
        refuse_latent_attention(model)
        super().belong(model)

    def prepare(self, x: Float[Tensor, "batch tokens d"], behind: int = 0) -> None:
        """Make ready for the tokens of a call; means of what is no longer text are dropped.

        Raises:
            ValueError: as a `KVCache`; or a tree grows.
        """
        if behind:
            raise ValueError("A sparse cache reads all guesses of a tree in one call; give it a tree whole.")
        super().prepare(x)
        if self.length == 0:
            self._means.clear()
        self._starts = x.new_zeros(1, dtype=torch.long) if self.padding is None else self.padding
        self._first = [*self._starts.tolist()] * (x.shape[0] // len(self._starts))
        lengths = [self.length - start for start in self._first]
        for means in self._means.values():
            for level in means:
                level.forget(lengths)

    def sight(self, queries: int, device: torch.device) -> None:
        """No mask, which would be as large as the text is long times the queries; `attend` knows the rows."""
        return None

    def keep(
        self, layer: int, *new: Shaped[Tensor, "batch _heads tokens _width"]
    ) -> tuple[Shaped[Tensor, "batch _heads keys _width"], ...]:
        """Store keys and values, and the means of the windows that they complete."""
        key, value = self.store(layer, *new)
        if layer not in self._means:
            self._means[layer] = [WindowMeans(*level) for level in levels(self.config)]
        text = key if self.mask is None else key[:, :, : self.length]  # guesses are no text yet
        for level in self._means[layer]:
            level.extend(text, self._first, self.room)
        return key, value

    def attend(
        self,
        layer: int,
        query: Float[Tensor, "batch heads queries head_dim"],
        key: Shaped[Tensor, "batch kv_heads keys head_dim"],
        value: Shaped[Tensor, "batch kv_heads keys head_dim"],
    ) -> Float[Tensor, "batch heads queries head_dim"]:
        """What each token of the call takes from the blocks that it chooses."""
        means = [level.means for level in self._means[layer]]
        if self.mask is None:
            return attend_text(query, key, value, means, self._starts, self.config)
        return self._attend_guesses(query, key, value, means)

    def _attend_guesses(self, query: Tensor, key: Tensor, value: Tensor, means: list[Tensor]) -> Tensor:
        """The same for guesses of a tree, each of which goes on from the text along its own branch."""
        config, starts, mask = self.config, self._starts, self.mask.reshape(-1, *self.mask.shape[-2:])
        at = mask.sum(-1) - 1  # of all that a guess sees it is the last; (rows, guesses)
        if bool((at < config.all_visible).all()):
            return dense_attention(query, key.type_as(query), value.type_as(query), self.mask)
        ancestors = mask[..., self.length :]
        scores = [
            with_guesses(window_scores(query, each), query, key, at, starts, ancestors, *level)
            for each, level in zip(means, levels(config), strict=True)
        ]
        blocks = int(at.max()) // config.block_size + 1
        chosen = choose_blocks(window_shares(scores, at, config), at, blocks, config)
        return attend_blocks(query, key, value, chosen, at, starts, config.block_size, ancestors)

    def select(self, rows: Iterable[SupportsIndex]) -> None:
        """Make the batch consist of these rows; a row may come several times, or not at all.

        Raises:
            ValueError: there is no such row, or none is named.
        """
        rows = [index(row) for row in rows]
        super().select(rows)
        for means in self._means.values():
            for level in means:
                level.select(rows)

    @property
    def nbytes(self) -> int:
        """Memory taken, in bytes, at full length: keys, values and means."""
        return super().nbytes + sum(level.nbytes for means in self._means.values() for level in means)


def refuse_latent_attention(model: nn.Module) -> None:
    if model.config.latent_attention:
        raise ValueError(
            "The model has latent attention, whose heads share no keys to choose blocks by; sparse attention "
            "is for grouped queries. Use KVCache, or call it without a context."
        )
