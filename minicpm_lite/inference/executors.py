"""What runs a model for the engine: it reads prompts, writes, checks guesses, and keeps texts in memory.

    Executor                            what an engine asks for
    PagedExecutor(model, pages=256)     a decoder of this library, on pages
    CompiledExecutor(model, pages=256)  the same as code that torch.compile makes of it

    text = executor.open(prompt, most)                            room for it; None while there is too little
    scores, streams = executor.prefill(text, tokens)              read on in its prompt
    scores, streams = executor.decode(texts, newest)              read the newest token of some texts
    scores, streams = executor.verify(texts, tokens, parents)     and guesses behind it; ``accept`` comes next
    executor.close(text)

What the model is decides the rest: a `Decoder` as it is; `fast_decoding` of it, whose kernels read weights
once for all rows; one with packed weights (`quantize_model`). ``sparse`` lets queries choose what they attend
to. An engine, and all that it promises, is the same above each of them.

Choices, and the traps behind them:

- llama.cpp is no executor here. Its package xllamacpp runs whole requests, and lets nobody read a token or
  check a guess; see `minicpm_lite.inference.llama_cpp`, which is compared with an engine, not put into one.
- What pages hold was made by a model as it was then. Where it has another config or other weights when a text
  is opened, none of them counts as read for that text; texts that are at work go on with what the old one
  made, and with its angles, as with any cache. A change that `appearance` misses asks for a new executor.
- So the model is looked at where a text is opened, where a piece of a prompt is read, and where what is
  written fills a page that others may share. A look takes a millisecond with SmolLM2-135M, too much for every
  step: weights that are exchanged and put back while one page is written are not noticed.
- Streams are what drafts such as EAGLE's read, and are made only where somebody asks for them.
- Code is made for shapes. It is made once for any number of rows, tokens and keys above one, and anew where
  one of the first two is one; each time takes as long as some hundred steps. What a list of pages says must
  not enter it, or it would be made in every step: so the books are kept before and behind the code.
- Sparse attention is not compiled. Which blocks are chosen decides how much is read, and code that waits for
  that in each layer is no faster.
"""

from collections.abc import Sequence, Sized
from contextlib import nullcontext
from itertools import chain
from reprlib import repr as shown
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..config import ModelConfig, SparseConfig, require_positive_integer
from ..language.context import Context, appearance, causal_mask
from ..language.decoder import Decoder
from ..language.scoring import evaluating
from ..runtime import calm_threads
from .paged import PagedContext, PagedText, PagePool
from .sparse_pages import SparsePagePool

__all__ = ["CompiledExecutor", "Executor", "PagedExecutor"]


@runtime_checkable
class Executor(Protocol):
    """What an engine asks for."""

    @property
    def model(self) -> Decoder:
        """Whose texts are written; drafts are made for it."""
        ...

    @property
    def device(self) -> torch.device:
        """Where scores are."""
        ...

    @property
    def room(self) -> int:
        """The most tokens of one text."""
        ...

    @property
    def nbytes(self) -> int:
        """Memory that the texts take, in bytes."""
        ...

    def require(self, prompt: Sequence[int], most: int) -> None:
        """Refuse a text that can never be run.

        Raises:
            ValueError: there will never be room for ``most`` tokens, or the model lacks some of the prompt.
        """
        ...

    def open(self, prompt: Sequence[int], most: int, share: bool = True) -> Sized | None:
        """Room for a text that begins so and has ``most`` tokens at most; None while there is too little.

        Its length is how many tokens were read; of its beginning, some may have been read for others, if it
        may ``share`` them.
        """
        ...

    def close(self, text: Sized) -> None:
        """The room comes back; nothing happens to a text that is closed already."""
        ...

    def prefill(
        self, text: Sized, tokens: Sequence[int], after: Sequence[int] = ()
    ) -> tuple[Float[Tensor, " vocab"], Float[Tensor, "tokens features"] | None]:
        """Read on in a prompt.

        Returns:
            The scores behind it, and for each token the residual stream after some blocks, one behind the
            other; None where none are named.
        """
        ...

    def decode(
        self, texts: Sequence[Sized], tokens: Sequence[int], after: Sequence[int] = ()
    ) -> tuple[Float[Tensor, "rows vocab"], Float[Tensor, "rows 1 features"] | None]:
        """Read the newest token of each text; scores and streams as of `prefill`."""
        ...

    def verify(
        self,
        texts: Sequence[Sized],
        tokens: Sequence[Sequence[int]],
        parents: Sequence[Sequence[int]],
        after: Sequence[int] = (),
    ) -> tuple[Float[Tensor, "rows places vocab"], Float[Tensor, "rows places features"] | None]:
        """Read the newest token of each text and guesses behind it, a tree for each; `accept` comes next.

        Trees may be of different size; of a smaller one, the places behind it say nothing.
        """
        ...

    def accept(self, paths: Sequence[Sequence[int]]) -> None:
        """Of each row that was verified last, these places became text, each the child of the one before."""
        ...


class PagedExecutor:
    """Runs a decoder on a pool of pages.

    Args:
        model: the decoder.
        pages, page_size: of the pool.
        room: the most tokens of one text; left out, what the model was made for or the pool holds.
        sparse: how queries choose blocks to attend to; left out, they attend to all.

    Raises:
        ValueError: more room than the model was made for, or as of the pool.
    """

    def __init__(
        self,
        model: Decoder,
        pages: int,
        page_size: int = 16,
        room: int | None = None,
        sparse: SparseConfig | None = None,
    ) -> None:
        self.model, self.device = model, next(model.parameters()).device
        most = model.config.max_position_embeddings
        if room is not None:
            require_positive_integer("room", room)
            if room > most:
                raise ValueError(
                    f"room is {room}, and the model was made to read {most} tokens "
                    "(max_position_embeddings). Give no more than that, or leave room out."
                )
        self.room = min(most, pages * page_size) if room is None else room
        if sparse is None:
            self.pool = PagePool(pages, page_size, self.room)
        else:
            self.pool = SparsePagePool(sparse, pages, page_size, self.room)
        self._context: PagedContext | None = None  # of guesses, which `accept` takes from
        self._read_by: tuple | None = None  # the model, as it read what the pages hold
        calm_threads()

    def require(self, prompt: Sequence[int], most: int) -> None:
        """Refuse a text that can never be run; see `Executor`."""
        size = self.model.config.vocab_size
        if not prompt:
            raise ValueError("The prompt holds no tokens; expected one at least.")
        for each in prompt:
            if not isinstance(each, int) or not 0 <= each < size:
                raise ValueError(
                    f"The prompt holds {shown(each)}, of type {type(each).__name__}; expected whole numbers "
                    f"from 0 to {size - 1}, the ids of this model."
                )
        self.pool.require_room(most)

    def open(self, prompt: Sequence[int], most: int, share: bool = True) -> PagedText | None:
        """Room for a text; see `Executor`."""
        text = self.pool.open(prompt, most, share)
        if text is not None and self._has_changed():
            self.pool.close(text)  # its beginning may be what the model read before it was changed
            text = self.pool.open(prompt, most, share)
        return text

    def _has_changed(self) -> bool:
        """Whether the model is another since the last look; then nothing read so far, or now, is shared."""
        if (reads_now := appearance(self.model)) == self._read_by:
            return False
        self.pool.forget()
        self._read_by = reads_now
        return True

    def close(self, text: PagedText) -> None:
        """The room comes back."""
        self.pool.close(text)

    def prefill(
        self, text: PagedText, tokens: Sequence[int], after: Sequence[int] = ()
    ) -> tuple[Float[Tensor, " vocab"], Float[Tensor, "tokens features"] | None]:
        """Read on in a prompt; see `Executor`."""
        self._has_changed()
        scores, streams = self._read([text], [tokens], None, after, last_only=True)
        return scores[0, -1], None if streams is None else streams[0]

    def decode(
        self, texts: Sequence[PagedText], tokens: Sequence[int], after: Sequence[int] = ()
    ) -> tuple[Float[Tensor, "rows vocab"], Float[Tensor, "rows 1 features"] | None]:
        """Read the newest token of each text; see `Executor`."""
        self._look(texts, [1] * len(texts))
        scores, streams = self._read(texts, [[each] for each in tokens], None, after)
        return scores[:, -1], streams

    def verify(
        self,
        texts: Sequence[PagedText],
        tokens: Sequence[Sequence[int]],
        parents: Sequence[Sequence[int]],
        after: Sequence[int] = (),
    ) -> tuple[Float[Tensor, "rows places vocab"], Float[Tensor, "rows places features"] | None]:
        """Read the newest token of each text and guesses behind it; see `Executor`."""
        scores, streams = self._read(texts, [[*chain.from_iterable(tokens)]], parents, after)
        counts = [*map(len, tokens)]
        return _apart(scores, counts), None if streams is None else _apart(streams, counts)

    def accept(self, paths: Sequence[Sequence[int]]) -> None:
        """Of each row that was verified last, these places became text."""
        context, self._context = self._context, None  # which holds the texts
        self._look(context.texts, [*map(len, paths)])
        context.take(paths)

    def _look(self, texts: Sequence[PagedText], new: Sequence[int]) -> None:
        """Where so many new tokens fill a page, it is shared only if the model is still the same."""
        size = self.pool.page_size
        if any(len(text) % size + count >= size for text, count in zip(texts, new, strict=True)):
            self._has_changed()

    @property
    def nbytes(self) -> int:
        """Memory that the texts take, in bytes."""
        return self.pool.nbytes

    @torch.no_grad()
    def _read(
        self,
        texts: Sequence[PagedText],
        tokens: Sequence[Sequence[int]],
        parents: Sequence[Sequence[int]] | None,
        after: Sequence[int],
        last_only: bool = False,
    ) -> tuple[Float[Tensor, "rows scored vocab"], Float[Tensor, "rows places features"] | None]:
        ids = torch.tensor([*map(list, tokens)], device=self.device)
        context = self.pool.context(texts, parents)
        context.read(ids)
        with evaluating(self.model) if self.model.training else nullcontext():
            *streams, x = self._states(self.model.embed(ids), context, tuple(after))
            scores = self.model.logits(x[:, -1:] if last_only else x)
        self._context = None if parents is None else context
        return scores, torch.cat(streams, dim=-1) if streams else None

    def _states(
        self, x: Float[Tensor, "rows places d"], context: PagedContext, after: tuple[int, ...]
    ) -> list[Float[Tensor, "rows places d"]]:
        return self.model.states(x, context, after)


def _apart(
    one_row: Float[Tensor, "1 tokens features"], counts: Sequence[int]
) -> Float[Tensor, "rows places features"]:
    """A row for each text, filled up with zeros."""
    return pad_sequence(one_row[0].split(counts), batch_first=True)


class CompiledExecutor(PagedExecutor):
    """A `PagedExecutor` whose decoder is compiled, in the first calls of each kind.

    Calls that check guesses are not: each number of texts and guesses would need code of its own.

    Args:
        model: the decoder.
        pages, page_size, room: as of `PagedExecutor`.
        backend: of ``torch.compile``.

    Raises:
        ValueError: as of `PagedExecutor`, or the model has a mixture of experts.
    """

    def __init__(
        self,
        model: Decoder,
        pages: int,
        page_size: int = 16,
        room: int | None = None,
        backend: str = "inductor",
    ) -> None:
        if model.config.mixture is not None:
            raise ValueError(
                "The model has a mixture of experts; which of them reads a token is known only when it is "
                "read, so its states are no one graph. Give it to a PagedExecutor."
            )
        super().__init__(model, pages, page_size, room)
        self._ready = False

        def everywhere(
            x: Tensor, context: Context
        ) -> list[Tensor]:  # so that code is made once for any `after`
            return model.states(x, context, range(model.config.num_hidden_layers))

        self._compiled = torch.compile(  # counted by itself: of one function only some codes are made
            everywhere,
            fullgraph=True,
            dynamic=True,
            backend=backend,
            isolate_recompiles=True,
        )

    def _states(
        self, x: Float[Tensor, "rows places d"], context: PagedContext, after: tuple[int, ...]
    ) -> list[Float[Tensor, "rows places d"]]:
        if context.parents is not None:
            return super()._states(x, context, after)
        if not self._ready:  # the first call takes the memory
            found = super()._states(x, context, after)
            for layer in range(self.model.config.num_hidden_layers):
                for whole in self.pool.layer(layer):
                    torch._dynamo.mark_static(whole)  # its heads are no number that changes
            self._ready = True
            return found
        context.belong(self.model)
        found = self._compiled(x, _Prepared(context, self.model.config, x))
        context.end()
        return [*(found[blocks] for blocks in after), found[-1]]


class _Prepared(Context):
    """A call of a paged context whose books are kept outside: of all it knows, code sees tensors alone."""

    def __init__(self, context: PagedContext, config: ModelConfig, x: Float[Tensor, "rows tokens d"]) -> None:
        self.context, self.positions = context, context.begin(x)
        self.rotary = context.angles(config, self.positions)
        if x.shape[1] > 1 and (context.mask is None or context.mask.ndim == 2):  # one shape for all texts
            context.mask = causal_mask(x.shape[1], context.reach, x.device)[None, None]

    def begin(self, x: Float[Tensor, "rows tokens d"]) -> Int[Tensor, "rows 1 tokens"]:
        return self.positions

    def angles(self, config: ModelConfig, positions: Int[Tensor, "rows 1 tokens"]) -> tuple[Tensor, Tensor]:
        return self.rotary

    def keep(
        self, layer: int, *new: Shaped[Tensor, "rows _heads tokens _width"]
    ) -> tuple[Shaped[Tensor, "rows _heads _keys _width"], ...]:
        return self.context.keep(layer, *new)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.context.attend(layer, query, key, value)
