"""What the tokens of one call may look at: the text before them, each other, or a tree of guesses.

A decoder is weights alone; each call brings how its tokens meet. The decoder asks four things of a context:

    positions = context.begin(x)                    where the new tokens stand
    all_so_far = context.keep(layer, *new)          what a layer made of them, behind what it made before
    out = context.attend(layer, query, key, value)  what each of them takes from those it may see
    context.end()                                   they belong to the text now

- `Context` keeps nothing: a call is a whole text. Training and scoring.
- `KVCache` keeps what the layers made: the next token costs one token. It goes back (`truncate`), splits
  (`select`), and takes in a branch of guesses (`take`). `Int8Cache` does so with 8 bits a number.
- `Tree` feeds guesses that branch through a cache: each sees the text and its own ancestors. It may grow
  (`Tree.grow`): then each call brings the newest guesses alone.

What else may come is a subclass with one or two of the four methods of its own: sparse attention overrides
``keep`` and ``attend``, pages of memory shared by requests override ``keep``, and ``select`` and ``take`` if
rows are to move.

Choices, and the traps behind them:

- The mask is made once a call, in ``begin``, and not once a layer.
- Rows of different lengths are padded on the left, so that the newest token of all rows stands in one
  column. Positions count from where a row's text begins, and no row sees its padding.
- The last query stands at the last key. `F.scaled_dot_product_attention` with ``is_causal`` puts the first
  query at the first key, which is another thing whenever there are more keys than queries.
- Rotary frequencies may depend on the length of the text. A cache decides by its room, once.
- What one model made of a text means nothing to another, and nothing in the numbers tells. So a cache knows
  its model, and which tokens it has read. It does not know the model's weights: asking all of them would cost
  each step more than the cache's own work, and not all that changes a model changes what one could ask.
"""

from collections.abc import Iterable, Sequence
from itertools import chain, pairwise
from operator import index
from typing import SupportsIndex
from weakref import ref

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from ..config import ModelConfig, require_positive_integer
from .rotary import AngleTable, scaled_angles

__all__ = ["Context", "Int8Cache", "KVCache", "Tree", "causal_mask", "dense_attention", "appearance",
           "lineage"]  # fmt: skip

_INT8_MAX = 127
_SMALLEST_SCALE = 1e-30  # of a vector of zeros


def dense_attention(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    mask: Bool[Tensor, "queries keys"] | Bool[Tensor, "batch _heads queries keys"] | None = None,
) -> Float[Tensor, "batch heads queries value_dim"]:
    """Softmax attention in which each key-value head serves a group of query heads; scale 1/sqrt(head_dim).

    Without a mask it is causal, and the last query stands at the last key: with a cache the queries are the
    newest of the keys. A mask says which keys a query sees; each must see one.

    Raises:
        ValueError: a mask of three dimensions, of which the first could be rows or heads.
    """
    if mask is not None and mask.ndim == 3:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}; expected (queries, keys), or (batch, 1, queries, keys) for "
            "each row its own: mask[:, None]."
        )
    batch, heads, queries, head_dim = query.shape
    kv_heads, keys = key.shape[1:3]
    if mask is None and 1 < queries < keys:
        mask = causal_mask(queries, keys, query.device)
    per_head = mask is not None and mask.ndim == 4 and mask.shape[1] > 1
    if queries == 1 and not per_head:  # the group becomes the query axis, so that no key is copied for it
        grouped = query.reshape(batch, kv_heads, heads // kv_heads, head_dim)
        return F.scaled_dot_product_attention(grouped, key, value, mask).reshape(batch, heads, 1, -1)
    if mask is not None and heads != kv_heads and query.is_cuda and query.dtype == torch.float32:
        # no fused kernel takes groups there, and the scores of all heads would be written out
        key, value = (each.repeat_interleave(heads // kv_heads, dim=1) for each in (key, value))
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=heads != key.shape[1]
    )


def causal_mask(queries: int, keys: int, device: torch.device | str) -> Bool[Tensor, "queries keys"]:
    """Which keys the newest ``queries`` of ``keys`` tokens see: themselves and all before them.

    >>> causal_mask(2, 4, "cpu").int()
    tensor([[1, 1, 1, 0],
            [1, 1, 1, 1]], dtype=torch.int32)
    """
    at = torch.arange(keys, device=device)
    return at <= at[keys - queries :, None]


class Context:
    """A call is a whole text: its tokens see themselves and those before them, and nothing is kept.

    Attributes:
        length: tokens of the text before this call; here always 0.
        reach: tokens of the text with those of this call; set by `begin`.
        mask: which keys each token of this call sees, or None for all up to itself; set by `begin`.
    """

    length: int = 0
    reach: int = 0
    mask: Bool[Tensor, "*rows queries keys"] | None = None

    def belong(self, model: nn.Module) -> None:
        """The model whose call begins."""

    def read(self, ids: Int[Tensor, "batch tokens"]) -> None:
        """The tokens of the call, where it brings tokens and not other features in their place."""

    def begin(self, x: Float[Tensor, "batch tokens d"]) -> Int[Tensor, "*rows tokens"]:
        """The positions of the tokens of a call, of which ``x`` are the embeddings."""
        self.reach = x.shape[1]
        return torch.arange(self.reach, device=x.device)

    def angles(
        self, config: ModelConfig, positions: Int[Tensor, "*rows tokens"]
    ) -> tuple[Float[Tensor, "*rows tokens head_dim"], Float[Tensor, "*rows tokens head_dim"]]:
        """Cosine and sine for `apply_rotary` at the positions that `begin` gave."""
        return scaled_angles(config, positions, self.reach)

    def keep(
        self, layer: int, *new: Shaped[Tensor, "batch _heads tokens _width"]
    ) -> tuple[Shaped[Tensor, "batch _heads keys _width"], ...]:
        """Take what a layer makes of the new tokens, and return it behind what it made of those before."""
        return new

    def attend(
        self,
        layer: int,
        query: Float[Tensor, "batch heads queries head_dim"],
        key: Float[Tensor, "batch kv_heads keys head_dim"],
        value: Float[Tensor, "batch kv_heads keys value_dim"],
    ) -> Float[Tensor, "batch heads queries value_dim"]:
        """What each token of the call takes from the keys and values that it may see."""
        return dense_attention(query, key, value, self.mask)

    def end(self) -> None:
        """All layers have seen the tokens: from now on they belong to the text."""


class KVCache(Context):
    """What the layers made of the text so far is kept, so that the next token costs one token.

    Room for the whole text is taken at the first use of each layer, and tokens are written in place.

    What it holds was made by the weights and the rotary frequencies of then. Whoever changes them, by
    training, ``load_state_dict``, an adapter or `minicpm_lite.language.long_context`, goes back to the
    beginning (``truncate(0)``) or takes a new cache; else the new model goes on from what the old one made.

    Args:
        room: tokens there is room for.
        padding: for each row of the batch, how many tokens at its start are no text; None: 0.
        dtype: what is kept is rounded to it, e.g. ``torch.bfloat16``; None: it is kept as it comes.

    Attributes:
        length: tokens of the text so far.
        guesses: parents of the guesses that a `Tree` has stored behind the text, for `take` to choose from.
        changes: how often `truncate`, `select` or `take` was called, by which whoever goes on reading tells
            that the text is no longer the one that was left.
    """

    def __init__(
        self, room: int, padding: Int[Tensor, " batch"] | None = None, dtype: torch.dtype | None = None
    ) -> None:
        require_positive_integer("room", room)
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise ValueError(f"dtype is {dtype!r}; expected a type of tensors, such as torch.bfloat16.")
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype is {dtype}, which cuts numbers to whole ones; Int8Cache keeps 8 bits.")
        if padding is not None and not (
            isinstance(padding, Tensor)
            and not (padding.is_floating_point() or padding.is_complex() or padding.dtype == torch.bool)
            and bool(((padding >= 0) & (padding < room)).all())
        ):
            raise ValueError(
                f"padding is {padding!r}; expected whole numbers in a tensor, from 0 to {room - 1}, one for "
                "each row."
            )
        self.room, self.padding, self.dtype = room, padding, dtype
        self._given = padding  # without what `take` adds to it
        self.length, self.guesses, self.changes = 0, (), 0
        self._behind = 0  # guesses between the text and the tokens of the call
        self._rows = 0  # of the batch; none before the first call
        self._model: ref | None = None  # that filled it, and is not kept alive by it
        self._text: Tensor | None = None  # ids, (batch, room); -1 where other features were read
        self._told = False  # whether the call that begins has brought its ids
        self._layers: dict[int, tuple[Tensor, ...]] = {}
        self._angles = AngleTable(room)

    def belong(self, model: nn.Module) -> None:
        """The model whose call begins.

        Raises:
            ValueError: another model has filled the cache.
        """
        if self.length == 0 or self._model is None:
            self._model = ref(model)
        elif self._model() is not model:
            self._told = False  # of a call that will not be
            raise ValueError("The cache was filled by another model; use one cache for each model.")

    def read(self, ids: Int[Tensor, "batch tokens"], behind: int = 0) -> None:
        """The tokens of the call, where it brings tokens and not other features in their place.

        ``behind``: as in `prepare`.
        """
        rows, start = ids.shape[0], self.length + behind
        end = start + ids.shape[1]
        if start == 0 or self._text is None:
            with torch.inference_mode(False):  # as in `_space`
                self._text = ids.new_full((rows, self.room), -1)
        if self._text.shape[0] == rows and end <= self.room:  # else it is refused soon
            self._text[:, start:end] = ids
            self._told = True

    def has_read(self, ids: Int[Tensor, "batch tokens"]) -> bool:
        """Whether what the cache has read may be the beginning of these texts."""
        if self._text is None or len(self._text) != len(ids):  # of another batch, it is refused elsewhere
            return True
        read = self._text[:, : self.length]
        same = (read == ids[:, : self.length]) | (read < 0)
        if self.padding is not None:
            same |= torch.arange(self.length, device=ids.device) < self.padding[:, None]
        return bool(same.all())

    def begin(self, x: Float[Tensor, "batch tokens d"]) -> Int[Tensor, "*rows tokens"]:
        """The positions of the tokens of a call.

        Raises:
            ValueError: there is no room for them, they are of another batch, or they take gradients.
        """
        self.prepare(x)
        self.mask = self.sight(x.shape[1], x.device)
        positions = torch.arange(self.length, self.reach, device=x.device)
        if self.padding is None:
            return positions
        return (positions - self.padding[:, None, None]).clamp(min=0)  # (batch, 1, tokens)

    def sight(self, queries: int, device: torch.device) -> Bool[Tensor, "*rows queries keys"] | None:
        """Which keys the tokens of a call see that continue the text, or None for all up to themselves."""
        if self.padding is not None:
            return self.hide_padding(causal_mask(queries, self.reach, device))
        return causal_mask(queries, self.reach, device) if 1 < queries < self.reach else None

    def prepare(self, x: Float[Tensor, "batch tokens d"], behind: int = 0) -> None:
        """Make ready for the tokens of a call, whoever says where they stand and what they see.

        Args:
            x: their embeddings.
            behind: guesses between the text and them, which were fed before and stay.
        """
        told, self._told = self._told, False
        self._behind, start = behind, self.length + behind
        self.reach, self.guesses = start + x.shape[1], ()
        if self.reach > self.room:
            raise ValueError(
                f"The cache has room for {self.room} tokens and would need {self.reach}; make a larger one."
            )
        came = x.shape[0]
        rows = self._rows if start else came if self.padding is None else len(self.padding)
        if came != rows:
            raise ValueError(f"The cache is for {rows} rows, and {came} came; use one cache for each batch.")
        self._refuse_gradients(x)  # before a subclass turns what layers make of them into what it keeps
        if start == 0:  # what a failed call or another model may have left is dropped
            self._layers.clear()
            self._angles.clear()
            self._text = self._text if told else None
            self._rows = rows
        if self._text is not None and not told:
            self._text[:, start : self.reach] = -1

    def hide_padding(self, mask: Bool[Tensor, "queries keys"]) -> Bool[Tensor, "batch 1 queries keys"]:
        """The mask for each row: what is no text is seen by none but itself."""
        queries, keys = mask.shape
        at = torch.arange(keys, device=mask.device)
        text = (at >= self.padding[:, None])[:, None, None]  # (batch, 1, 1, keys)
        # a token that is no text sees itself, for a softmax over nothing is not a number
        return mask & (text | (at == at[keys - queries :, None]))

    def angles(
        self, config: ModelConfig, positions: Int[Tensor, "*rows tokens"]
    ) -> tuple[Float[Tensor, "*rows tokens head_dim"], Float[Tensor, "*rows tokens head_dim"]]:
        """Cosine and sine at some positions, from a table that is computed once."""
        return self._angles(config, positions)

    def keep(
        self, layer: int, *new: Shaped[Tensor, "batch _heads tokens _width"]
    ) -> tuple[Shaped[Tensor, "batch _heads keys _width"], ...]:
        """Store what a layer makes of the new tokens, and return it with all that it made before.

        Raises:
            ValueError: gradients are on, or two layers have one number.
        """
        # no copy unless the cache has a type of its own
        return tuple(text.type_as(each) for text, each in zip(self.store(layer, *new), new, strict=True))

    def store(
        self, layer: int, *new: Shaped[Tensor, "batch _heads tokens _width"]
    ) -> tuple[Shaped[Tensor, "batch _heads keys _width"], ...]:
        """As `keep`, which calls it, but what it returns is of the type in which it is kept."""
        self._refuse_gradients(*new)  # those that begin behind the embeddings: of an adapter, say
        start = self.length + self._behind
        if layer not in self._layers:
            self._layers[layer] = tuple(self._space(each) for each in new)
        elif start == 0:  # where a text begins, nothing is kept of the layer before
            raise ValueError(
                f"Two layers have the number {layer}, as a copy of a block has that of its original, and a "
                "cache keeps under it what a layer makes. Give each its own: block.self_attn.layer."
            )
        text, end = [], start + new[0].shape[2]
        for whole, each in zip(self._layers[layer], new, strict=True):
            whole[:, :, start:end] = each
            text.append(whole[:, :, :end])
        return tuple(text)

    @staticmethod
    def _refuse_gradients(*new: Tensor) -> None:
        if torch.is_grad_enabled() and any(each.requires_grad for each in new):
            raise ValueError(
                "A cache is written in place, so nothing can be trained through it: use torch.no_grad()."
            )

    def _space(self, new: Tensor) -> Tensor:
        with torch.inference_mode(False):  # so that it can be written in any mode
            shape = (*new.shape[:2], self.room, new.shape[3])
            return torch.empty(shape, dtype=self.dtype or new.dtype, device=new.device)

    def end(self) -> None:
        """The tokens of the call belong to the text now."""
        self.length = self.reach

    def truncate(self, length: int) -> None:
        """Go back to the first ``length`` tokens; those behind are forgotten, and their room is free.

        Raises:
            ValueError: the text is shorter than that.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"The cache cannot go back to {length} tokens; it holds {self.length}.")
        self.length, self.guesses, self.changes = length, (), self.changes + 1
        if length == 0:  # another text may follow
            self.padding = self._given
        elif self.padding is not self._given:  # a row that is gone up to its beginning begins anew
            given = torch.zeros_like(self.padding) if self._given is None else self._given
            self.padding = torch.minimum(self.padding, given.clamp(min=length))

    def select(self, rows: Iterable[SupportsIndex]) -> None:
        """Make the batch consist of these rows; a row may come several times, or not at all.

        So samples of one prompt share its prefill (``select([0] * 8)``), and beams go on from the best.

        Raises:
            ValueError: there is no such row, or none is named.
        """
        rows, batch = [index(row) for row in rows], self._batch  # a tensor would choose along two dimensions
        if not rows or not all(0 <= row < batch for row in rows):
            raise ValueError(
                f"rows is {rows}; expected some of 0 to {batch - 1}, the rows that the cache holds."
            )
        with torch.inference_mode(False):  # as in `_space`
            for layer, kept in self._layers.items():
                self._layers[layer] = tuple(whole[rows] for whole in kept)
            if self._text is not None:
                self._text = self._text[rows]
        self._rows, self.changes = len(rows), self.changes + 1
        moved = self.padding is not self._given
        if self._given is not None:
            self._given = self._given[rows]
        self.padding = self.padding[rows] if moved else self._given

    @property
    def _batch(self) -> int:
        """How many rows it holds.

        Raises:
            ValueError: it has read nothing.
        """
        if not self._rows:
            raise ValueError("The cache has read nothing yet; feed it a text first.")
        return self._rows

    def take(self, path: Iterable[SupportsIndex] | Iterable[Sequence[SupportsIndex]]) -> None:
        """Of the guesses that were fed through a `Tree`, these become text; the others are forgotten.

        Args:
            path: places in the tree, each the parent of the next; one branch for all rows, or one for each
                row. Rows with fewer are moved to the right, so that all end in one column, and get padding on
                the left; columns that have become padding of all rows are dropped.

        Raises:
            ValueError: no tree was fed last, or it has no such branch.
        """
        batch = self._batch
        path = [each.tolist() if hasattr(each, "tolist") else each for each in path]  # of numpy or torch
        paths = [path] * batch if all(isinstance(place, int) for place in path) else path
        if len(paths) != batch or not all(self._is_branch(one) for one in paths):
            raise ValueError(
                f"path is {path!r}; expected a branch of the tree that was fed last, each place the parent "
                f"of the next, as one list or as one for each of the {batch} rows. Its parents are "
                f"{list(self.guesses)}."
            )
        taken, stored = max(map(len, paths)), [whole for kept in self._layers.values() for whole in kept]
        if self._text is not None:
            stored.append(self._text[:, None, :, None])
        shifts = [taken - len(one) for one in paths]
        padding = torch.tensor(shifts, device=stored[0].device) + (
            0 if self.padding is None else self.padding
        )
        least = 0 if self._given is None else int(self._given.min())
        free = max(int(padding.min()) - least, 0)  # columns that are padding of all rows by now
        shifts, end = [shift - free for shift in shifts], self.length + taken - free
        for row, (one, shift) in enumerate(zip(paths, shifts, strict=True)):
            if not shift and one == [*range(len(one))]:
                continue  # all of it stands where it belongs
            first = max(0, -shift) if shift else self.length
            places = [*range(first, self.length), *(self.length + place for place in one)]
            places = torch.tensor(places, dtype=torch.long, device=stored[0].device)
            for whole in stored:
                whole[row, :, first + shift : end] = whole[row].index_select(1, places)
        if any(shifts):
            self.padding = padding - free
        self.length, self.guesses, self.changes = end, (), self.changes + 1

    def _is_branch(self, path: Sequence[SupportsIndex]) -> bool:
        return all(
            0 <= place < len(self.guesses) and self.guesses[place] == parent
            for parent, place in pairwise([-1, *path])
        )

    @property
    def nbytes(self) -> int:
        """Memory taken, in bytes, at full length."""
        return sum(whole.nbytes for kept in self._layers.values() for whole in kept)


class Int8Cache(KVCache):
    """A cache in 8 bits: each vector is kept as whole numbers from -127 to 127 and a scale of its own.

    An entry is off by at most half a step, which is 1/254 of the largest entry of its vector. Of a vector of
    ``width`` numbers ``width + 4`` bytes are kept: with a float32 model about a quarter, with bfloat16 half.
    """

    def __init__(self, room: int, padding: Int[Tensor, " batch"] | None = None) -> None:
        super().__init__(room, padding)

    def keep(
        self, layer: int, *new: Shaped[Tensor, "batch _heads tokens _width"]
    ) -> tuple[Shaped[Tensor, "batch _heads keys _width"], ...]:
        """Store what a layer makes of the new tokens in 8 bits, and return all of it as numbers again."""
        packed = []
        for each in new:
            exact = each.float()  # a quotient that is rounded to bfloat16 may exceed 127
            scale = exact.abs().amax(dim=-1, keepdim=True).clamp(min=_SMALLEST_SCALE) / _INT8_MAX
            packed += [(exact / scale).round().clamp(-_INT8_MAX, _INT8_MAX).to(torch.int8), scale]
        kept = super().keep(layer, *packed)
        return tuple(
            (codes * scale).to(each.dtype)
            for codes, scale, each in zip(kept[::2], kept[1::2], new, strict=True)
        )


def appearance(model: nn.Module) -> tuple[ModelConfig, list[tuple]]:
    """The config, and of each weight a few numbers, where it is and how often it was written in place.

    By these whoever keeps what a model made sees its changes. All numbers would take as long as a token.
    Unseen stays what writes past PyTorch, as through ``weight.data`` or NumPy, behind the first numbers.
    """
    weights = chain(model.parameters(), model.buffers())
    # of a weight that is cut over processes, the part that is here
    here = [getattr(weight, "to_local", weight.detach)() for weight in weights]
    return model.config, [
        (weight.data_ptr(), 0 if weight.is_inference() else weight._version, weight.flatten()[:8].tolist())
        for weight in here
    ]


def lineage(parents: Sequence[int]) -> tuple[list[int], Bool[Tensor, "guesses guesses"]]:
    """Of guesses that branch: how many ancestors each has, and which of them it sees: these and itself.

    Args:
        parents: for each guess the place of an earlier one, -1 for one that follows the text.

    Raises:
        ValueError: a parent that does not come before its guess.

    >>> lineage([-1, 0, 0])[0]  # two guesses for what follows the first one
    [0, 1, 1]
    """
    depths: list[int] = []
    sees: list[list[bool]] = []
    for place, parent in enumerate(parents):
        if not -1 <= parent < place:
            raise ValueError(
                f"The parent of guess {place} is {parent}; expected the place of an earlier guess, or -1 "
                "for one that follows the text."
            )
        depths.append(0 if parent < 0 else depths[parent] + 1)
        sees.append([False] * len(parents) if parent < 0 else sees[parent].copy())
        sees[place][place] = True
    return depths, torch.tensor(sees)


class Tree(Context):
    """Guesses that branch, fed through a cache at once: each sees the text, its ancestors and itself.

    The cache stays as it is until its ``take`` makes one branch part of the text.

    Args:
        cache: holds the text.
        parents: for each guess the place of the one before it in this list, -1 for one that follows the text.
            A guess comes behind its parent.

    Attributes:
        ancestors: which guesses each guess sees: its ancestors and itself.
        depths: how many ancestors each has.
        fed: guesses of the calls before; a call brings those behind them.

    Raises:
        ValueError: no guess, or a parent that does not come before its guess.

    >>> Tree(KVCache(8), [-1, 0, 0]).ancestors.int()  # two guesses for what follows the first one
    tensor([[1, 0, 0],
            [1, 1, 0],
            [1, 0, 1]], dtype=torch.int32)
    """

    def __init__(self, cache: KVCache, parents: Iterable[SupportsIndex]) -> None:
        self.cache, self.parents = cache, ()
        self.grow(parents)

    def grow(self, parents: Iterable[SupportsIndex]) -> None:
        """Further guesses, behind those that were fed: the next call brings them alone.

        Args:
            parents: of each of them; places count from the first guess of the tree.

        Raises:
            ValueError: as where a tree is made.
        """
        parents = tuple(index(parent) for parent in parents)
        if not parents:
            raise ValueError("parents is empty; a tree has one guess at least.")
        whole = self.parents + parents
        depths, self.ancestors = lineage(whole)
        self.fed, self.parents = len(self.parents), whole
        self.depths, self.deepest = torch.tensor(depths), max(depths)

    def belong(self, model: nn.Module) -> None:
        """The model whose call begins, which must be that of the cache."""
        self.cache.belong(model)

    def read(self, ids: Int[Tensor, "batch tokens"]) -> None:
        """The guesses of the call."""
        self.cache.read(ids, self.fed)

    def begin(self, x: Float[Tensor, "batch tokens d"]) -> Int[Tensor, "*rows tokens"]:
        """The positions of the guesses: as far behind the text as they have ancestors.

        Raises:
            ValueError: as many tokens as the tree has new guesses were expected, the cache has no room, or
                it no longer holds the guesses before them.
        """
        cache, new = self.cache, len(self.parents) - self.fed
        if x.shape[1] != new:
            which = "new guesses" if self.fed else "guesses"
            raise ValueError(f"The tree has {new} {which}, and {x.shape[1]} tokens came.")
        if self.fed and (
            cache.guesses[: self.fed] != self.parents[: self.fed] or cache.length != self.length
        ):
            raise ValueError(
                "The cache no longer holds the guesses that this tree grew from; make another tree."
            )
        cache.prepare(x, self.fed)
        self.length = cache.length
        self.reach = self.length + self.deepest + 1
        ancestors = self.ancestors[self.fed :].to(x.device)
        mask = torch.cat([ancestors.new_ones(new, self.length), ancestors], dim=1)
        positions = self.length + self.depths[self.fed :].to(x.device)
        if cache.padding is not None:
            mask = cache.hide_padding(mask)
            positions = (positions - cache.padding[:, None, None]).clamp(min=0)  # (batch, 1, guesses)
        self.mask = cache.mask = mask
        return positions

    def angles(
        self, config: ModelConfig, positions: Int[Tensor, "*rows tokens"]
    ) -> tuple[Float[Tensor, "*rows tokens head_dim"], Float[Tensor, "*rows tokens head_dim"]]:
        """Those of the cache."""
        return self.cache.angles(config, positions)

    def keep(
        self, layer: int, *new: Shaped[Tensor, "batch _heads tokens _width"]
    ) -> tuple[Shaped[Tensor, "batch _heads keys _width"], ...]:
        """Store the guesses behind the text, in the order of the tree."""
        return self.cache.keep(layer, *new)

    def attend(
        self,
        layer: int,
        query: Float[Tensor, "batch heads queries head_dim"],
        key: Float[Tensor, "batch kv_heads keys head_dim"],
        value: Float[Tensor, "batch kv_heads keys value_dim"],
    ) -> Float[Tensor, "batch heads queries value_dim"]:
        """As the cache attends, with the mask of the tree."""
        return self.cache.attend(layer, query, key, value)

    def end(self) -> None:
        """The guesses stand behind the text, and the cache may take a branch of them."""
        self.cache.guesses = self.parents
