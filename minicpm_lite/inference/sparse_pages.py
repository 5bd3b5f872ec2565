"""Sparse attention on pages: of a text, a call reads the means of windows, and the blocks that it chooses.

    pool = SparsePagePool(config, pages=64, page_size=64)      in the place of a `PagePool`

A kernel scores the means of windows, chooses blocks and reads them where they are. Without it, a call copies
the means, a sixteenth, and behind the choice the tokens of the chosen blocks alone.

What is chosen is what a `SparseCache` chooses, so a text is the same on pages as alone. See
`minicpm_lite.inference.sparse_attention` for the formulas and their sources.

Choices, and the traps behind them:

- A window is kept with the page in which it ends. Its mean depends on that page and the one before, which are
  those of every text that has the page; so texts that share a beginning share its means.
- Means are made before tokens become text, and with it known to others: of guesses when they are taken.
- Of a text that all queries still see whole, nothing is chosen; it is read as on other pages.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from ..config import SparseConfig
from ..kernels import attention as kernel
from .block_choice import (
    choose_blocks,
    levels,
    num_windows,
    window_means,
    window_scores,
    window_shares,
    with_guesses,
)
from .paged import PagedContext, PagedText, PagePool
from .sparse_attention import TILE, attend_columns, chosen_columns, kernel_sizes, refuse_latent_attention

__all__ = ["SparsePagePool", "SparsePagedContext"]


class SparsePagePool(PagePool):
    """Memory for texts whose queries choose what they attend to.

    Args:
        config: how they choose.
        pages, page_size, room: as of `PagePool`.

    Raises:
        ValueError: one of them is not positive, or pages are no multiple of the stride of windows.
    """

    def __init__(
        self, config: SparseConfig, pages: int, page_size: int = 64, room: int | None = None
    ) -> None:
        super().__init__(pages, page_size, room)
        stride = max(stride for _, stride in levels(config))
        if page_size % stride:
            raise ValueError(
                f"page_size is {page_size}; expected a multiple of {stride} tokens, from the start of one "
                "window to that of the next."
            )
        self.config = config
        self._means: dict[int, list[Tensor]] = {}  # of each layer and level, (slots / stride, heads, width)

    @property
    def nbytes(self) -> int:
        """Memory taken, in bytes: keys, values and means."""
        return super().nbytes + sum(level.nbytes for means in self._means.values() for level in means)

    def context(
        self, texts: Sequence[PagedText], parents: Sequence[Sequence[int]] | None = None
    ) -> "SparsePagedContext":
        """A call that brings the next tokens of some texts; see `PagedContext`."""
        return SparsePagedContext(self, texts, parents)

    def means(self, layer: int) -> list[Shaped[Tensor, "_slots kv_heads head_dim"]]:
        """Those of a layer's windows, for each of the `levels`; a window has the slot in which it ends."""
        if layer not in self._means:
            key = self._layers[layer][0]
            slots = self.pages * self.page_size
            with torch.inference_mode(False):  # so that they can be written in any mode
                self._means[layer] = [
                    key.new_zeros(slots // stride, *key.shape[1:]) for _, stride in levels(self.config)
                ]
        return self._means[layer]

    def move(self, layer: int, like: Tensor) -> None:
        """What a layer made, and its means, become of the type and the device of another tensor."""
        super().move(layer, like)
        with torch.inference_mode(False):
            self._means[layer] = [means.to(like.device, like.dtype) for means in self.means(layer)]

    def average(self, layer: int, text: PagedText, before: int, after: int) -> None:
        """Make the means that a text has with ``after`` tokens and had not with ``before``."""
        key = self._layers[layer][0]
        for (size, stride), means in zip(levels(self.config), self.means(layer), strict=True):
            first, last = (num_windows(length, size, stride) for length in (before, after))
            if first == last:
                continue
            end = (last - 1) * stride + size
            since = key[self.slots(text, first * stride, end)].transpose(0, 1)[None]
            ends = self.slots(text, first * stride + size - 1, end)[::stride]
            means[[slot // stride for slot in ends]] = window_means(since, size, stride)[0].transpose(0, 1)

    def arrange(self, text: PagedText, path: Sequence[int]) -> None:
        """Of the guesses behind a text, those of a path stand right behind it, and their means are made."""
        super().arrange(text, path)
        self.average_all(text, len(text), len(text) + len(path))

    def average_all(self, text: PagedText, before: int, after: int) -> None:
        """As `average`, in all layers."""
        for layer in self._layers:
            self.average(layer, text, before, after)


class SparsePagedContext(PagedContext):
    """A call brings the next tokens of some texts of a `SparsePagePool`; see `PagedContext`."""

    pool: SparsePagePool

    def belong(self, model: nn.Module) -> None:
        """The model whose call begins, which must be that of the pool.

        Raises:
            ValueError: it has latent attention, or another model has filled the pages.
        """
        refuse_latent_attention(model)
        super().belong(model)

    def begin(self, x: Float[Tensor, "rows tokens d"]) -> Int[Tensor, "rows 1 tokens"]:
        """The positions of the tokens of the call.

        Raises:
            ValueError: as a `PagedContext`.
        """
        positions = super().begin(x)
        sees_all = self._positions < self.pool.config.all_visible
        self._all_visible, self._some_see_all = bool(sees_all.all()), bool(sees_all.any())
        self._see_all = sees_all[:, None, :, None]  # as attention gives what they take
        guesses = self.parents is not None
        self._ends = self.lengths[:, 0] + (0 if guesses else x.shape[1])  # of what is text
        text = self._longest + (0 if guesses else x.shape[1])
        self._windows = [
            self._all[:, size - 1 : text : stride] // stride for size, stride in levels(self.pool.config)
        ]
        return positions

    def keep(
        self, layer: int, *new: Shaped[Tensor, "rows _heads tokens _width"]
    ) -> tuple[Shaped[Tensor, "rows _heads _keys _width"], ...]:
        """Store keys and values, and the means of the windows that they complete.

        All of the texts is returned where all is attended to; else `attend` reads what is chosen.
        """
        self.store(layer, *new)
        if self.parents is None:
            for text in self.texts:
                self.pool.average(layer, text, len(text), len(text) + new[0].shape[2])
        return new if self._in_place or not self._all_visible else self.gather(layer)

    def _attend_rows(
        self, layer: int, query: Float[Tensor, "rows heads new width"], key: Tensor, value: Tensor
    ) -> Float[Tensor, "rows heads new width"]:
        """What each token takes from the blocks of its own text that it chooses."""
        if self._all_visible:
            return super()._attend_rows(layer, query, key, value)
        kept, whole = self.pool.means(layer), self.pool.layer(layer)
        if kernel.possible(query, *whole):
            found = kernel.sparse_paged_attention(
                query, *whole, kept, self._tables, self._ends, self._positions, self._own, self._sees,
                self.pool.page_size, kernel_sizes(self.pool.config),
            )  # fmt: skip
            if self._in_place and self._some_see_all:  # they get the bits that they get where all see all
                return torch.where(self._see_all, super()._attend_rows(layer, query, key, value), found)
            return found
        means = [each[table].transpose(1, 2) for each, table in zip(kept, self._windows, strict=True)]
        tile = TILE if self.parents is None else query.shape[2]
        parts = zip(query.split(tile, dim=2), self._positions.split(tile, dim=1), strict=True)
        return torch.cat([self._attend_chosen(layer, *part, means) for part in parts], dim=2)

    def _attend_chosen(
        self,
        layer: int,
        query: Float[Tensor, "rows heads queries head_dim"],
        at: Int[Tensor, "rows queries"],
        means: list[Float[Tensor, "rows kv_heads _windows head_dim"]],
    ) -> Float[Tensor, "rows heads queries head_dim"]:
        config, (keys, values) = self.pool.config, self.pool.layer(layer)
        scores = [window_scores(query, each) for each in means]
        if self.parents is not None:
            tail, starts = self._tail(keys)
            scores = [
                with_guesses(each, query, tail, at, starts, self.among, *level)
                for each, level in zip(scores, levels(config), strict=True)
            ]
        blocks = int(at.max()) // config.block_size + 1
        chosen = choose_blocks(window_shares(scores, at, config), at, blocks, config)
        starts = torch.zeros_like(self._ends)
        column, seen = chosen_columns(chosen, at, starts, self._ends, config.block_size, self.among)
        return attend_columns(query, self._columns(keys, column), self._columns(values, column), seen)

    def _tail(
        self, keys: Float[Tensor, "slots kv_heads head_dim"]
    ) -> tuple[Float[Tensor, "rows kv_heads tail head_dim"], Int[Tensor, " rows"]]:
        """The keys of the guesses and of what shares windows with them, and at which column texts begin."""
        longest = max(size for size, _ in levels(self.pool.config)) - 1
        steps = torch.arange(-longest, self._positions.shape[1], device=keys.device)
        slots = self._all.gather(1, (self.lengths + steps).clamp(min=0))  # (rows, tail)
        return keys[slots].transpose(1, 2), longest - self.lengths[:, 0]

    def _columns(
        self, whole: Float[Tensor, "slots kv_heads head_dim"], column: Int[Tensor, "rows kv_heads tokens"]
    ) -> Float[Tensor, "rows_kv_heads tokens head_dim"]:
        """The named tokens of each text, those of each key-value head its own."""
        heads = torch.arange(whole.shape[1], device=whole.device)
        slots = self._all[:, None].expand(-1, len(heads), -1).gather(2, column)
        return F.embedding((slots * len(heads) + heads[:, None]).flatten(0, 1), whole.flatten(0, 1))
