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
- A text has its pages until it is closed, or nobody holds it any more. Which pages are taken is asked of the
  texts and noted nowhere else, so that nothing that is broken off half-way, as by Ctrl-C, can lose a page.
- A page is known by its tokens *and* by the page before it: keys depend on all that stands before. Page
  numbers are used again, so pages are told apart by a number that is not.
- Guesses are stored behind the text and make no page known before they are taken. Texts may have different
  numbers of them: the tokens of all texts come in one row, one text behind the other, and layers work on no
  more than these. Attention alone sees a row for each text, as long as that of the longest.
- A kernel reads the pages where they are, for new tokens, for guesses and for pieces of a prompt of up to 32
  tokens, and gives a token the same bits in any company and however these pieces are cut. For longer pieces,
  and where there is no kernel, PyTorch's attention gets the keys of a call copied together, as long as its
  longest text. What fills up the shorter rows is their own: no number of another text, which may be none,
  gets near.
- The kernel adds up page after page, so other pages than of 16 tokens give other last bits.
"""

import itertools
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from weakref import WeakSet, ref

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from ..config import ModelConfig, require_positive_integer
from ..kernels import attention as kernel
from ..language.context import Context, causal_mask, dense_attention, lineage
from ..language.rotary import AngleTable

__all__ = ["PagePool", "PagedContext", "PagedText"]

_FEW = 32  # tokens of a piece of a prompt; for more, PyTorch's attention is the faster


class PagedText:
    """A text in a pool.

    Attributes:
        pages: where it stands, in order.
        tokens: what was read of it.
        shared: how many of them another text had read.
        angles: with which its keys are turned.
    """

    def __init__(self, pages: list[int], tokens: list[int], serials: list[int], angles: AngleTable) -> None:
        self.pages, self.tokens, self.shared = pages, tokens, len(tokens)
        self.serials = serials  # of what stands before its first page, and of its pages that are known
        self.angles = angles

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
        self._texts: WeakSet[PagedText] = WeakSet()  # that are open
        # by serial before and tokens: a page and its serial; what was not used for longest comes first
        self._known: OrderedDict[Hashable, tuple[int, int]] = OrderedDict()
        self._serials = itertools.count(1)
        self._root = 0  # stands before all texts that the present model reads
        self._layers: dict[int, tuple[Tensor, ...]] = {}  # each (slots, heads, width)
        self.angles = AngleTable(self.room)
        self._model: ref | None = None
        self.latent = False  # whether its attention is, whose keys are made anew of what is kept

    @property
    def unused(self) -> int:
        """Pages that no text has."""
        return self.pages - len(self._taken())

    def _taken(self) -> set[int]:
        return {page for text in self._texts for page in text.pages}

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

    def open(self, tokens: Sequence[int], most: int, share: bool = True) -> PagedText | None:
        """Pages for a text that begins so and will have ``most`` tokens at most; None if too few are unused.

        Of its beginning, what the pool still holds counts as read, if it may ``share`` pages.

        Raises:
            ValueError: as `require_room`.
        """
        self.require_room(most)
        shared, serials = [], [self._root]
        for start in range(0, len(tokens) - self.page_size if share else 0, self.page_size):
            known = self._known.get(self._key(serials[-1], tokens[start : start + self.page_size]))
            if known is None:
                break
            shared.append(known[0])
            serials.append(known[1])
        taken = self._taken().union(shared)
        wanted = self.needed(most) - len(shared)
        if wanted > self.pages - len(taken):
            return None
        own = self._unknown(wanted, taken)
        text = PagedText(shared + own, list(tokens[: len(shared) * self.page_size]), serials, self.angles)
        self._texts.add(text)
        return text

    def _unknown(self, wanted: int, taken: set[int]) -> list[int]:
        """Pages that no text has; those that are still known are forgotten, as many as it takes."""
        kept = {page: key for key, (page, _) in self._known.items() if page not in taken}
        free = [page for page in range(self.pages) if page not in taken and page not in kept]
        pages = [*free, *kept][:wanted]
        for page in pages[len(free) :]:
            del self._known[kept[page]]
        return pages

    def close(self, text: PagedText) -> None:
        """Its pages come back; of a text that is closed already there are none."""
        for place in range(len(text.serials) - 2, -1, -1):  # the end of a beginning goes before its start
            if text.pages and (key := self._key_of(text, place)) in self._known:
                self._known.move_to_end(key)
        self._texts.discard(text)
        text.pages = []

    def _key(self, before: int, tokens: Sequence[int]) -> Hashable:
        """By what a page is known: the serial of the page before it, and its tokens."""
        return before, tuple(tokens)

    def _key_of(self, text: PagedText, place: int) -> Hashable:
        start = place * self.page_size
        return self._key(text.serials[place], text.tokens[start : start + self.page_size])

    def forget(self) -> None:
        """The model has changed: what was read so far counts for no text that is opened from now on.

        Texts that are open go on with what the old one made, and with its angles.
        """
        self._root, self.angles = next(self._serials), AngleTable(self.room)

    def spare(self, text: PagedText) -> int:
        """How many tokens there is room for behind a text."""
        return len(text.pages) * self.page_size - len(text)

    def extend(self, text: PagedText, tokens: Sequence[int]) -> None:
        """These tokens were read, and are text; pages that they fill are known from now on."""
        text.tokens += tokens
        while len(text.serials) * self.page_size <= len(text):
            place = len(text.serials) - 1
            key = self._key_of(text, place)
            if key not in self._known:  # else another text has read the same; this one keeps its own page
                self._known[key] = text.pages[place], next(self._serials)
            text.serials.append(self._known[key][1])

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
            self._model, self.latent = ref(model), model.config.latent_attention is not None
        elif self._model() is not model:
            raise ValueError("The pages were filled by another model; use one pool for each model.")

    def layer(
        self, layer: int, new: Sequence[Shaped[Tensor, "rows _heads tokens _width"]] = ()
    ) -> tuple[Tensor, ...]:
        """The memory of a layer, as wide as what it makes; taken at its first use.

        Where the model has been moved or made another type, what it had made goes with it.
        """
        if layer not in self._layers:
            slots = self.pages * self.page_size
            with torch.inference_mode(False):  # so that it can be written in any mode
                self._layers[layer] = tuple(
                    each.new_zeros(slots, each.shape[1], each.shape[3]) for each in new
                )
        elif new and _kind(new[0]) != _kind(self._layers[layer][0]):
            self.move(layer, new[0])
        return self._layers[layer]

    def move(self, layer: int, like: Tensor) -> None:
        """What a layer made becomes of the type and the device of another tensor."""
        with torch.inference_mode(False):  # as in `layer`
            self._layers[layer] = tuple(whole.to(like.device, like.dtype) for whole in self._layers[layer])

    def context(
        self, texts: Sequence[PagedText], parents: Sequence[Sequence[int]] | None = None
    ) -> "PagedContext":
        """A call that brings the next tokens of some texts; see `PagedContext`."""
        return PagedContext(self, texts, parents)

    def arrange(self, text: PagedText, path: Sequence[int]) -> None:
        """Of the guesses behind a text, those of a path stand right behind it from now on, to become text."""
        if [*path] == [*range(len(path))]:  # they stand there already
            return
        length = len(text)
        slots = self.slots(text, length, length + path[-1] + 1)
        targets, sources = slots[: len(path)], [slots[place] for place in path]
        for kept in self._layers.values():
            for whole in kept:
                whole[targets] = whole[sources]


def _kind(tensor: Tensor) -> tuple[torch.dtype, torch.device]:
    return tensor.dtype, tensor.device


class PagedContext(Context):
    """A call brings the next tokens of some texts of a pool, a row of as many for each; they become text.

    With ``parents`` they are guesses, a tree for each text, and all in one row, those of one text behind
    those of the other; then `take` says which become text.

    Args:
        pool: holds the texts.
        texts: whose tokens come.
        parents: of each text, for each guess the place of the one before it, -1 for one that follows the
            text.
    """

    def __init__(
        self, pool: PagePool, texts: Sequence[PagedText], parents: Sequence[Sequence[int]] | None = None
    ) -> None:
        self.pool, self.texts, self.parents = pool, list(texts), parents
        self._ids: list[list[int]] = []
        self.among: Tensor | None = None  # which of its guesses each guess sees, (rows, tokens, tokens)

    def belong(self, model: nn.Module) -> None:
        """The model whose call begins, which must be that of the pool."""
        self.pool.belong(model)

    def read(self, ids: Int[Tensor, "rows tokens"]) -> None:
        """The tokens of the call."""
        self._ids = ids.tolist()

    def begin(self, x: Float[Tensor, "rows tokens d"]) -> Int[Tensor, "rows 1 tokens"]:
        """The positions of the tokens of the call.

        Raises:
            ValueError: other rows than texts, no room for them in a text's pages, or guesses of no tree.
        """
        counts, device = self._counts(*x.shape[:2]), x.device
        rows, new, pool = len(counts), max(counts), self.pool
        for text, count in zip(self.texts, counts, strict=True):
            if count > pool.spare(text):
                raise ValueError(
                    f"A text has {len(text.pages)} pages of {pool.page_size} tokens and would need room for "
                    f"{len(text) + count}."
                )
        self.lengths = torch.tensor([[len(text)] for text in self.texts], device=device)
        ends = self.lengths + torch.tensor(counts, device=device)[:, None]
        self.reach, self._longest = int(ends.max()), max(map(len, self.texts))
        self._tables, self._all = self._slots(ends, self._longest + new)
        steps = torch.arange(new, device=device)
        own = self.lengths + steps
        self._own = self._new = self._all.gather(1, own)
        if self.parents is None:
            positions = self.lengths + steps
            self.mask = self._sight(positions)
            self._sees = causal_mask(new, new, device).expand(rows, -1, -1)
        else:
            filled = [[*parents, *[-1] * (new - len(parents))] for parents in self.parents]
            depths, among = zip(*map(lineage, filled), strict=True)
            positions = self.lengths + torch.tensor(depths, device=device)
            columns = torch.arange(self._all.shape[1], device=device)
            text = columns < self.lengths[:, None]  # (rows, 1, columns)
            places = (self.lengths + steps)[:, None].expand(-1, new, -1)
            real = own < ends
            self._at = real.flatten().nonzero()[:, 0]
            self._new = self._own[real][None]
            self.among = torch.stack(among).to(device)
            self._sees = self.among & real[:, None]
            self.mask = text.expand(-1, new, -1).scatter(2, places, self.among)[:, None]
        self._positions = positions
        # guesses always, however many: PyTorch would add up those of other texts in another order, too
        self._in_place = (new <= _FEW or self.parents is not None) and not self.pool.latent
        return positions[:, None] if self.parents is None else positions[real][None, None]

    def _counts(self, rows: int, new: int) -> list[int]:
        """How many new tokens each text has, if the call brings so many rows of so many tokens."""
        texts = len(self.texts)
        if self.parents is None:
            if rows != texts:
                raise ValueError(f"{rows} rows came; expected one for each of {texts} texts.")
            return [new] * texts
        counts = [*map(len, self.parents)]
        if len(counts) != texts or not all(counts) or (rows, new) != (1, sum(counts)):
            raise ValueError(
                f"{rows} rows of {new} tokens came; expected one row, of {counts} guesses of {texts} texts."
            )
        return counts

    def _slots(
        self, ends: Int[Tensor, "rows 1"], columns: int
    ) -> tuple[Int[Tensor, "rows pages"], Int[Tensor, "rows columns"]]:
        """The pages of the texts, and where these stand with the new tokens; behind its end a row has its
        own first slot."""
        size, device = self.pool.page_size, self.lengths.device
        most = self.pool.needed(columns)
        tables = [(text.pages + text.pages[:1] * most)[:most] for text in self.texts]
        places = torch.arange(columns, device=device)
        table = torch.tensor(tables, device=device)  # of pages, (rows, most)
        slots = (table[..., None] * size + torch.arange(size, device=device)).flatten(1)[:, :columns]
        return table, torch.where(places < ends, slots, slots[:, :1])

    def _sight(self, positions: Int[Tensor, "rows tokens"]) -> Bool[Tensor, "*rows tokens keys"] | None:
        """Which keys tokens see that go on in their texts, or None for all up to themselves."""
        rows, new = positions.shape
        if rows == 1:  # no row is shorter than another
            return causal_mask(new, self.reach, positions.device) if 1 < new < self.reach else None
        return torch.arange(self.reach, device=positions.device) <= positions[:, None, :, None]

    def angles(self, config: ModelConfig, positions: Int[Tensor, "rows 1 tokens"]) -> tuple[Tensor, Tensor]:
        """Cosine and sine at the positions that `begin` gave, for each text with the angles of its keys."""
        for text in self.texts:
            if not len(text):  # it was opened before the model changed, and has no keys yet
                text.angles = self.pool.angles
        tables = [text.angles for text in self.texts]
        if len({*map(id, tables)}) == 1:
            return tables[0](config, positions)
        if self.parents is None:
            rows, along = positions.split(1), 0
        else:
            rows, along = positions.split([*map(len, self.parents)], dim=-1), -2
        found = [table(config, row) for table, row in zip(tables, rows, strict=True)]
        cos, sin = zip(*found, strict=True)
        return torch.cat(cos, along), torch.cat(sin, along)

    def keep(
        self, layer: int, *new: Shaped[Tensor, "rows _heads tokens _width"]
    ) -> tuple[Shaped[Tensor, "rows _heads keys _width"], ...]:
        """Store what a layer makes of the new tokens, and return it behind what it made of those before.

        Of few new tokens it is returned alone, since `attend` reads the texts where they stand.
        """
        self.store(layer, *new)
        return new if self._in_place else self.gather(layer)

    def store(self, layer: int, *new: Shaped[Tensor, "rows _heads tokens _width"]) -> None:
        """Store what a layer makes of the new tokens."""
        for whole, each in zip(self.pool.layer(layer, new), new, strict=True):
            whole[self._new] = each.transpose(1, 2)

    def gather(self, layer: int) -> tuple[Shaped[Tensor, "rows _heads keys _width"], ...]:
        """What a layer made of the texts, copied together."""
        slots = self._all.flatten()  # in one row, which are copied three times as fast as whole[self._all]
        return tuple(
            whole.index_select(0, slots).unflatten(0, self._all.shape).transpose(1, 2)
            for whole in self.pool.layer(layer)
        )

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """What each token takes from those of its own text that it sees."""
        if self.parents is None:
            return self._attend_rows(layer, query, key, value)
        (rows, new), heads = self._own.shape, query.shape[1]
        apart = query.new_zeros(rows * new, heads, query.shape[3])
        apart[self._at] = query[0].transpose(0, 1)
        found = self._attend_rows(layer, apart.unflatten(0, (rows, new)).transpose(1, 2), key, value)
        return found.transpose(1, 2).flatten(0, 1)[self._at].transpose(0, 1)[None]

    def _attend_rows(
        self, layer: int, query: Float[Tensor, "rows heads new width"], key: Tensor, value: Tensor
    ) -> Float[Tensor, "rows heads new width"]:
        """As `attend`, with a row for each text."""
        if self._in_place:
            kept = self.pool.layer(layer)
            if kernel.possible(query, *kept):
                return kernel.paged_attention(
                    query, *kept, self._tables, self.lengths[:, 0], self._positions, self._own, self._sees,
                    self.pool.page_size,
                )  # fmt: skip
            key, value = self.gather(layer)
        return dense_attention(query, key, value, self.mask)

    def end(self) -> None:
        """All layers have seen the tokens; they are text, unless they are guesses."""
        if self.parents is None:
            for text, ids in zip(self.texts, self._ids, strict=True):
                self.pool.extend(text, ids)

    def take(self, paths: Sequence[Sequence[int]]) -> None:
        """Of the guesses of each row these become text, each the child of the one before."""
        following = iter(*self._ids)
        for text, parents, path in zip(self.texts, self.parents, paths, strict=True):
            ids = [*itertools.islice(following, len(parents))]
            self.pool.arrange(text, path)
            self.pool.extend(text, [ids[place] for place in path])
