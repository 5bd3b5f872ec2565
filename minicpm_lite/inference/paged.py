"""A cache in pages: the texts of many requests in one memory, each with as much of it as it needs.

    pool = PagePool(pages=64, page_size=16)
    text = pool.open(prompt, most)               pages for a text of so many tokens; None while too few
    model(ids, PagedContext(pool, [text, …]))    the next tokens of some texts, of different length
    pool.close(text)                             the pages come back

A cache for a batch has one length for all rows: the longest decides, and a row that has stopped holds its
room to the end. Pages are lent one by one, and a table says for each text which of them are its own: token t
stands in page ``pages[t // page_size]``. Texts that begin alike share the pages of their beginning, which are
read once; they stay in the pool when their texts are gone, until their room is needed.

Sources: Kwon et al. 2023, "PagedAttention" (vLLM), arXiv 2309.06180; Zheng et al. 2023, "SGLang",
arXiv 2312.07104, for beginnings that stay.

Choices, and the traps behind them:

- A text gets all its pages when it is opened. So none that has begun ever stops for want of room, and nothing
  has to be thrown out and read again; the price is room that a text holds before it writes it.
- Only whole pages are shared, and never the last token of a prompt, which must be read to be answered. What
  is shared is read and never written, so no page is copied.
- A page is known by its tokens *and* by the page before it: keys depend on all that stands before. Page
  numbers are used again, so pages are told apart by a number that is not.
- Guesses are stored behind the text and make no page known before they are taken.
- Attention gets the keys of a call copied together, as long as its longest text. That is the cost of pages
  without a kernel that reads them where they are. What fills up the shorter rows is their own: no number of
  another text, which may be none, gets near.
"""

from collections import OrderedDict
from collections.abc import Sequence
from weakref import ref

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from ..config import ModelConfig, require_positive_integer
from ..language.context import Context, causal_mask, dense_attention
from ..language.rotary import scaled_angles

__all__ = ["PagePool", "PagedContext", "PagedText"]


class PagedText:
    """A text in a pool.

    Attributes:
        pages: where it stands, in order.
        tokens: what was read of it.
        shared: how many of them another text had read.
    """

    def __init__(self, pages: list[int], tokens: list[int]) -> None:
        self.pages, self.tokens, self.shared = pages, tokens, len(tokens)
        self.serials: list[int] = []  # of its pages that are known

    def __len__(self) -> int:
        return len(self.tokens)


class PagePool:
    """Memory for the texts of many requests, in pages of so many tokens.

    Args:
        pages: how many there are.
        page_size: tokens of a page.
        room: the most tokens of one text, which decides some rotary frequencies; left out, all pages.

    Raises:
        ValueError: one of them is not positive.
    """

    def __init__(self, pages: int, page_size: int = 16, room: int | None = None) -> None:
        require_positive_integer("pages", pages)
        require_positive_integer("page_size", page_size)
        self.pages, self.page_size = pages, page_size
        self.room = pages * page_size if room is None else room
        require_positive_integer("room", self.room)
        self._free = list(range(pages))[::-1]
        self._users = [0] * pages
        self._known: dict[tuple[int, tuple[int, ...]], int] = {}  # by serial before and tokens: the page
        self._names: dict[int, tuple[tuple[int, tuple[int, ...]], int]] = {}  # of known pages: key and serial
        self._idle: OrderedDict[int, None] = OrderedDict()  # known, and no text's; the oldest first
        self._serial = 0
        self._layers: dict[int, tuple[Tensor, ...]] = {}  # each (slots, heads, width)
        self._angles: Tensor | None = None
        self._model: ref | None = None

    @property
    def unused(self) -> int:
        """Pages that no text has."""
        return len(self._free) + len(self._idle)

    @property
    def nbytes(self) -> int:
        """Memory taken, in bytes; none before the first call."""
        return sum(whole.nbytes for kept in self._layers.values() for whole in kept)

    def needed(self, most: int) -> int:
        """Pages of a text of so many tokens."""
        return -(-most // self.page_size)

    def require_room(self, most: int) -> None:
        """Refuse a text that could never have so many tokens.

        Raises:
            ValueError: there are too few pages in all, or a text has fewer.
        """
        if self.needed(most) > self.pages or most > self.room:
            raise ValueError(
                f"A text of {most} tokens does not fit: there are {self.pages} pages of {self.page_size} "
                f"tokens, and a text has {self.room} at most."
            )

    def open(self, tokens: Sequence[int], most: int) -> PagedText | None:
        """Pages for a text that begins so and will have ``most`` tokens at most; None if too few are unused.

        Of its beginning, what the pool still holds counts as read.

        Raises:
            ValueError: as `require_room`.
        """
        self.require_room(most)
        shared, serials, before = [], [], -1
        for start in range(0, len(tokens) - self.page_size, self.page_size):
            page = self._known.get((before, tuple(tokens[start : start + self.page_size])))
            if page is None:
                break
            before = self._names[page][1]
            shared.append(page)
            serials.append(before)
        wanted = self.needed(most) - len(shared)
        if wanted > self.unused - sum(page in self._idle for page in shared):
            return None
        for page in shared:
            self._idle.pop(page, None)
            self._users[page] += 1
        text = PagedText(
            shared + [self._take() for _ in range(wanted)], list(tokens[: len(shared) * self.page_size])
        )
        text.serials = serials
        return text

    def _take(self) -> int:
        """A page for one text; of those that are still known the one that was not used for longest."""
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._idle.popitem(last=False)
            del self._known[self._names.pop(page)[0]]
        self._users[page] = 1
        return page

    def close(self, text: PagedText) -> None:
        """Its pages come back; of a text that is closed already there are none."""
        for page in text.pages[::-1]:  # so that the end of a beginning goes before its start
            self._users[page] -= 1
            if not self._users[page]:
                if page in self._names:
                    self._idle[page] = None
                else:
                    self._free.append(page)
        text.pages = []

    def extend(self, text: PagedText, tokens: Sequence[int]) -> None:
        """These tokens were read, and are text; pages that they fill are known from now on."""
        text.tokens += tokens
        while (len(text.serials) + 1) * self.page_size <= len(text):
            place = len(text.serials)
            start = place * self.page_size
            key = (
                text.serials[-1] if place else -1,
                tuple(text.tokens[start : start + self.page_size]),
            )
            if key in self._known:  # another text has read the same meanwhile; this one keeps its own page
                text.serials.append(self._names[self._known[key]][1])
                continue
            self._known[key], self._names[text.pages[place]] = text.pages[place], (key, self._serial)
            text.serials.append(self._serial)
            self._serial += 1

    def slots(self, text: PagedText, first: int, last: int) -> list[int]:
        """Where its tokens of some places stand, or will stand."""
        size = self.page_size
        return [text.pages[place // size] * size + place % size for place in range(first, last)]

    def belong(self, model: nn.Module) -> None:
        """The model whose call begins.

        Raises:
            ValueError: another model has filled the pages.
        """
        if self._model is None:
            self._model = ref(model)
        elif self._model() is not model:
            raise ValueError("The pages were filled by another model; use one pool for each model.")

    def angles(self, config: ModelConfig, positions: Int[Tensor, "*rows tokens"]) -> tuple[Tensor, Tensor]:
        """Cosine and sine at some positions, from a table that is computed once."""
        if self._angles is None:
            everywhere = torch.arange(self.room, device=positions.device)
            self._angles = torch.cat(scaled_angles(config, everywhere, self.room), dim=-1)
        cos, sin = F.embedding(positions, self._angles).chunk(2, dim=-1)
        return cos, sin

    def layer(
        self, layer: int, new: Sequence[Shaped[Tensor, "rows _heads tokens _width"]]
    ) -> tuple[Tensor, ...]:
        """The memory of a layer, as wide as what it makes; taken at its first use."""
        if layer not in self._layers:
            slots = self.pages * self.page_size
            self._layers[layer] = tuple(each.new_zeros(slots, each.shape[1], each.shape[3]) for each in new)
        return self._layers[layer]

    def move(self, sources: list[int], targets: list[int]) -> None:
        """What stands in some slots stands in others from now on."""
        for kept in self._layers.values():
            for whole in kept:
                whole[targets] = whole[sources]


class PagedContext(Context):
    """A call brings the next tokens of some texts of a pool, as many of each; they become text.

    With ``parents`` they are guesses, a tree of one shape for all; then `take` says which become text.

    Args:
        pool: holds the texts.
        texts: whose tokens come, one of a row each.
        parents: for each guess the place of the one before it, -1 for one that follows the text.
    """

    def __init__(
        self, pool: PagePool, texts: Sequence[PagedText], parents: Sequence[int] | None = None
    ) -> None:
        self.pool, self.texts, self.parents = pool, list(texts), parents
        self._ids: list[list[int]] = []

    def belong(self, model: nn.Module) -> None:
        """The model whose call begins, which must be that of the pool."""
        self.pool.belong(model)

    def read(self, ids: Int[Tensor, "rows tokens"]) -> None:
        """The tokens of the call."""
        self._ids = ids.tolist()

    def begin(self, x: Float[Tensor, "rows tokens d"]) -> Int[Tensor, "rows 1 tokens"]:
        """The positions of the tokens of the call.

        Raises:
            ValueError: other rows than texts, or no room for them in a text's pages.
        """
        rows, new = x.shape[:2]
        if rows != len(self.texts) or self.parents is not None and len(self.parents) != new:
            raise ValueError(
                f"{rows} rows of {new} tokens came; expected {len(self.texts)} texts"
                + ("." if self.parents is None else f" with {len(self.parents)} guesses each.")
            )
        lengths, size = [len(text) for text in self.texts], self.pool.page_size
        for text, length in zip(self.texts, lengths, strict=True):
            if length + new > len(text.pages) * size:
                raise ValueError(
                    f"A text has {len(text.pages)} pages of {size} tokens and would need room for "
                    f"{length + new}."
                )
        self.reach = max(lengths) + new
        ends = [length + new for length in lengths]
        slots = [self.pool.slots(text, 0, end) for text, end in zip(self.texts, ends, strict=True)]
        own = [row[length:] for row, length in zip(slots, lengths, strict=True)]
        self._own = torch.tensor(own, device=x.device).flatten()
        self._all = torch.tensor([row + row[:1] * (self.reach - len(row)) for row in slots], device=x.device)
        depths: list[int] = []
        for parent in self._parents(new):
            depths.append(depths[parent] + 1 if parent >= 0 else 0)
        self.mask = self._sight(lengths, new, x.device)
        return torch.tensor([[[length + depth for depth in depths]] for length in lengths], device=x.device)

    def _parents(self, new: int) -> Sequence[int]:
        """Of each token of the call; text is a chain."""
        return range(-1, new - 1) if self.parents is None else self.parents

    def _sight(
        self, lengths: list[int], new: int, device: torch.device
    ) -> Bool[Tensor, "*rows tokens keys"] | None:
        if len(lengths) == 1 and self.parents is None:  # no row is shorter than another
            return causal_mask(new, self.reach, device) if 1 < new < self.reach else None
        among = torch.eye(new, dtype=torch.bool)
        for place, parent in enumerate(self._parents(new)):
            if parent >= 0:
                among[place] |= among[parent]
        mask = torch.zeros(len(lengths), 1, new, self.reach, dtype=torch.bool)
        for row, length in enumerate(lengths):
            mask[row, :, :, :length] = True
            mask[row, 0, :, length : length + new] = among
        return mask.to(device)

    def angles(self, config: ModelConfig, positions: Int[Tensor, "rows 1 tokens"]) -> tuple[Tensor, Tensor]:
        """Cosine and sine at the positions that `begin` gave."""
        return self.pool.angles(config, positions)

    def keep(
        self, layer: int, *new: Shaped[Tensor, "rows _heads tokens _width"]
    ) -> tuple[Shaped[Tensor, "rows _heads keys _width"], ...]:
        """Store what a layer makes of the new tokens, and return it behind what it made of those before."""
        found = []
        for whole, each in zip(self.pool.layer(layer, new), new, strict=True):
            whole[self._own] = each.transpose(1, 2).flatten(0, 1)
            found.append(whole[self._all].transpose(1, 2))
        return tuple(found)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """What each token takes from those of its own text that it sees."""
        return dense_attention(query, key, value, self.mask)

    def end(self) -> None:
        """All layers have seen the tokens; they are text, unless they are guesses."""
        if self.parents is None:
            for text, ids in zip(self.texts, self._ids, strict=True):
                self.pool.extend(text, ids)

    def take(self, paths: Sequence[Sequence[int]]) -> None:
        """Of the guesses of each row these become text, each the child of the one before."""
        for text, ids, path in zip(self.texts, self._ids, paths, strict=True):
            length = len(text)
            slots = self.pool.slots(text, length, length + len(ids))
            self.pool.move([slots[place] for place in path], slots[: len(path)])
            self.pool.extend(text, [ids[place] for place in path])
