"""Attention of a few queries to a long text, whole or to chosen blocks, in one pass over what is read.

    possible(query, key, value)                       whether the kernel computes these
    sparse_attention(query, key, value, means, ...)   as `inference.sparse_attention.attend_text`
    paged_attention(query, key, value, tables, ...)   as `inference.paged.PagedContext.attend`
    sparse_paged_attention(query, key, value, ...)    as `inference.sparse_pages.SparsePagedContext.attend`

The kernel is C++ (``attention.cpp``, which says how), compiled at first use. It scores the means of windows,
chooses blocks and attends to them where they lie; PyTorch copies the chosen blocks together first. What it
gives is what PyTorch gives up to rounding. Of two blocks that score the same but for that, either may come
out ahead.

Of texts in pages the pages are read where they lie. There a token gets the same bits in any company, beside
other texts, among guesses or alone, with any number of threads. For what is added up in which order depends
on its own place in its own text, and on nothing else.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .build import built

__all__ = ["Sizes", "paged_attention", "possible", "sparse_attention", "sparse_paged_attention"]

_MOST_HEADS = 32  # of a group, as many as one vector of the kernel has room for


class Sizes(NamedTuple):
    """Of windows and blocks, as a `config.SparseConfig` has them and says what they are."""

    kernel_size: int
    kernel_stride: int
    block_size: int
    init_blocks: int
    local_blocks: int
    num_blocks: int
    all_visible: int
    coarse_topk: int | None


def possible(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the kernel computes these: float32 on a CPU, groups of up to 32 heads, and no gradient.

    Warns:
        UserWarning: the kernel cannot be built; the sentence says why.
    """
    tensors = (query, key, value)
    return (
        all(each.dtype == torch.float32 and each.device.type == "cpu" for each in tensors)
        and not (torch.is_grad_enabled() and any(each.requires_grad for each in tensors))
        and key.shape == value.shape
        and query.shape[1] <= _MOST_HEADS * key.shape[1]
        and built("attention")
    )


def sparse_attention(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys head_dim"],
    means: list[Float[Tensor, "batch kv_heads _windows head_dim"]],
    starts: Int[Tensor, " rows"],
    sizes: Sizes,
) -> Float[Tensor, "batch heads queries head_dim"]:
    """What each of the newest tokens of a text takes from the blocks that it chooses.

    Args:
        query, key, value: such that it is `possible`.
        means: of fine windows and, where they are used, of coarse ones.
        starts: the column at which each row's text begins, or one for all.
        sizes: of windows and blocks.
    """
    return torch.ops.minicpm_lite.sparse_attention(
        query, key, value, means[0], means[-1], starts, *sizes[:-1], len(means) > 1, sizes.coarse_topk or 0
    )


def paged_attention(
    query: Float[Tensor, "rows heads new head_dim"],
    key: Float[Tensor, "slots kv_heads head_dim"],
    value: Float[Tensor, "slots kv_heads head_dim"],
    tables: Int[Tensor, "rows _pages"],
    lengths: Int[Tensor, " rows"],
    positions: Int[Tensor, "rows new"],
    slots: Int[Tensor, "rows new"],
    among: Bool[Tensor, "rows new new"],
    page_size: int,
) -> Float[Tensor, "rows heads new head_dim"]:
    """What the newest tokens of some texts, or guesses behind them, take from their texts and each other.

    Args:
        query, key, value: such that it is `possible`.
        tables: the pages in which the text of each row stands.
        lengths: how long the texts are, without the new tokens.
        positions: of the new tokens, at or behind the end of their text.
        slots: where the keys and values of the new tokens stand.
        among: which of the new tokens of its row each one sees; itself, too. What does not, fills up a row
            behind its tokens; what comes out there says nothing.
        page_size: slots of a page.
    """
    return torch.ops.minicpm_lite.paged_attention(
        query, key, value, tables, lengths, positions, slots, among, page_size
    )


def sparse_paged_attention(
    query: Float[Tensor, "rows heads new head_dim"],
    key: Float[Tensor, "slots kv_heads head_dim"],
    value: Float[Tensor, "slots kv_heads head_dim"],
    means: list[Float[Tensor, "_windows kv_heads head_dim"]],
    tables: Int[Tensor, "rows _pages"],
    lengths: Int[Tensor, " rows"],
    positions: Int[Tensor, "rows new"],
    slots: Int[Tensor, "rows new"],
    among: Bool[Tensor, "rows new new"],
    page_size: int,
    sizes: Sizes,
) -> Float[Tensor, "rows heads new head_dim"]:
    """What each of these tokens takes from the blocks of its text that it chooses.

    Args:
        query, key, value, tables, lengths, positions, slots, among, page_size: as of `paged_attention`. What
            stands within the lengths is seen up to a token's own position.
        means: of fine windows and, where they are used, of coarse ones; each at the slot in which it ends,
            divided by the stride.
        sizes: of windows and blocks.
    """
    return torch.ops.minicpm_lite.sparse_paged_attention(
        query, key, value, means[0], means[-1], tables, lengths, positions, slots, among, page_size,
        *sizes[:-1], len(means) > 1, sizes.coarse_topk or 0,
    )  # fmt: skip
