"""Texts of a cache's rows through any moves, each kept as the list of its columns: None is no text."""

from collections.abc import Sequence

import torch
from torch import Tensor

from minicpm_lite.language.context import KVCache, Tree
from minicpm_lite.language.decoder import Decoder


class History:
    """Three rows, moved as their cache is.

    Attributes:
        rows: the columns of each.
        begins: where the text of each begins.
    """

    def __init__(self, model: Decoder, cache: KVCache, padding: Tensor | None) -> None:
        self.model, self.cache, self.random = model, cache, torch.Generator().manual_seed(0)
        self.given = [0] * 3 if padding is None else padding.tolist()
        self.rows: list[list] = [[], [], []]
        self.begins = self.given

    def feed(self, tokens: int) -> Tensor:
        """The scores of so many new tokens."""
        ids = torch.randint(50, (3, tokens), generator=self.random)
        for row, begin, new in zip(self.rows, self.begins, ids.tolist(), strict=True):
            row += [None if len(row) + place < begin else each for place, each in enumerate(new)]
        return self.model(ids, self.cache)

    def take(self, how: Sequence[int]) -> None:
        """Of three guesses one behind the other, so many of each row; none where a row has no text yet."""
        if self.cache.length <= max(self.begins):
            return
        guesses = torch.randint(50, (3, 3), generator=self.random)
        self.model(guesses, Tree(self.cache, [-1, 0, 1]))
        self.cache.take([[*range(taken)] for taken in how])
        shifts = [max(how) - taken for taken in how]
        begins = [shift + begin for shift, begin in zip(shifts, self.begins, strict=True)]
        free = max(min(begins) - min(self.given), 0)  # no column is padding of all
        self.begins = [begin - free for begin in begins]
        self.rows = [
            ([None] * shift + row + new[:taken])[free:]
            for shift, row, new, taken in zip(shifts, self.rows, guesses.tolist(), how, strict=True)
        ]
        assert self.cache.length == len(self.rows[0])

    def back(self, left: int) -> None:
        """To so many columns."""
        self.cache.truncate(left)
        self.rows = [row[:left] for row in self.rows]
        # A row of which nothing is left begins with what comes next, or where it was said to at first.
        self.begins = [
            min(now, max(first, left)) if left else first
            for now, first in zip(self.begins, self.given, strict=True)
        ]

    def select(self, how: Sequence[int]) -> None:
        """These rows."""
        self.cache.select(how)
        self.rows, self.given, self.begins = (
            [of[place] for place in how] for of in (self.rows, self.given, self.begins)
        )

    @property
    def texts(self) -> list[list[int]]:
        """What each row has read, without its padding."""
        return [[each for each in row if each is not None] for row in self.rows]
