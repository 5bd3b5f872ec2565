"""Speculative decoding: a draft guesses the next tokens, and the model checks all guesses in one call.

    guesses = draft's proposal                       a chain, or a tree: several for one place
    p = the model's law of the next token            behind the text and behind each guess, in one call
    from the text on, for each guess x of this place, which was drawn from q:
        accept it with probability min(1, p(x) / q(x)), and go on behind it
        else p <- max(0, p - q) / its sum            the residual: what q has not yet offered
    where no guess is left: draw the next token from p

    speculative_generate    prompts and what the model wrote after them, and how the guesses fared
    speculative_stream      the same step after step; for `stream_text`, `generate_text` and `Chat`:
                            ``stream=partial(speculative_stream, draft=PromptLookup())``
    verify                  the rule above, for one row

A step of decoding reads all weights to write one token; checking eight guesses reads them once, too. So what
is accepted comes nearly for nothing, and what comes is what the model would have written: with temperature 0
the same tokens, else the same law.

Sources: Leviathan et al. 2023, arXiv 2211.17192, and Chen et al. 2023, arXiv 2302.01318, for a chain;
Miao et al. 2023, arXiv 2305.09781 (SpecInfer), for several guesses of one place. A guess that was chosen, not
drawn, has q = 1 for itself; then the rule is that of EAGLE (Li et al. 2024, arXiv 2401.15077): accept with
probability p(x), else take x out of p. With temperature 0, p is 1 for the best token, and nothing is drawn.

Choices, and the traps behind them:

- p is what plain generation draws from: behind penalty, temperature, top-k and top-p, and a penalty counts
  the guesses that were accepted on the way.
- q is a whole distribution, not the draft's probability of the guess alone: without it there is no residual.
- Each guess that is asked draws once, also where p is at least q: a ratio that is 1 but for rounding would
  else draw or not, and all that comes after would have other luck.
- The residual is divided by its sum, and a later guess of the same place meets the residual, not p.
- The token behind the last accepted guess is drawn from the law at *that* guess. Behind a refused one it
  comes from the residual. Either way a call writes one token at least.
- The newest token is chosen and not read. It is the root of the tree: a call reads it with the guesses.
- Rows accept different numbers; the cache moves them (`KVCache.take`). A row that has stopped leaves the
  batch. So of several rows a cache that was handed in holds, in the end, those alone that were written last.
- A cache of the room that plain generation needs is enough, and is taken: the room decides some rotary
  frequencies. Near the end of it drafts are asked for fewer guesses, and for the last token for none.
- The same seed gives other tokens than plain generation, since other things are drawn; only the law is one.
- Rounding differs between a call of one token and one of several. Where two tokens are equal but for that,
  greedy decoding may take the other one; with float32 that takes a tie to six digits. Packed weights round
  their inputs to 8 bits, so that a last bit becomes much more, and greedy texts can differ without a tie; in
  an `Engine`, whose attention adds up in one order, they do not.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..language.context import KVCache, Tree
from ..language.decoder import Decoder
from ..language.generation import begin, generate
from ..language.sampling import Sampling, choose, next_token_probabilities

__all__ = [
    "Draft",
    "Drafting",
    "Guesses",
    "SharingDrafting",
    "Stats",
    "SteppedDrafting",
    "StreamDrafting",
    "speculative_generate",
    "speculative_stream",
    "verify",
]


@dataclass(frozen=True, eq=False)
class Guesses:
    """What may come next: for each row a tree of tokens, of one shape for all rows.

    Attributes:
        tokens: the guesses, a parent before its children. Which of them a row could do without makes no
            difference to what is written: any token is a guess.
        parents: for each guess the place of the one before it, -1 for one that follows the text.
        drawn_from: the law that each guess was drawn from, by itself; None where all were chosen.

    >>> Guesses(torch.tensor([[5, 7]]), (-1, 0))  # 5, and 7 behind it
    Guesses(tokens=tensor([[5, 7]]), parents=(-1, 0), drawn_from=None)
    """

    tokens: Int[Tensor, "rows guesses"]
    parents: tuple[int, ...]
    drawn_from: Float[Tensor, "rows guesses vocab"] | None = None

    @staticmethod
    def none(rows: int) -> "Guesses":
        """No guess for any row."""
        return Guesses(torch.zeros(rows, 0, dtype=torch.long), ())


@runtime_checkable
class Drafting(Protocol):
    """A draft at work on the rows of one call of `speculative_stream`."""

    def propose(self, new: Sequence[Sequence[int]], most: int) -> Guesses:
        """Guesses for what follows.

        Args:
            new: for each row the tokens that joined its text since the last call; the whole text at first.
                So a draft learns what was accepted of its guesses: all but the last token of each row.
            most: how many guesses there is room for.
        """
        ...

    def select(self, rows: Sequence[int]) -> None:
        """These rows of the present ones go on; the others have stopped."""
        ...


@runtime_checkable
class StreamDrafting(Drafting, Protocol):
    """A drafting that is shown what the target makes of the texts, as EAGLE's is."""

    @property
    def after(self) -> tuple[int, ...]:
        """After how many of the target's blocks; none if it wants to see nothing."""
        ...

    def see(self, streams: Sequence[Float[Tensor, "_read features"]]) -> None:
        """The target's residual stream there, one behind the other, at each token that it has read.

        It is shown after each call of the target, before the next proposal: at first the prompt, of which a
        cache that was handed in may have read the beginning before, then the tokens that became text.
        """
        ...


@runtime_checkable
class SteppedDrafting(Drafting, Protocol):
    """A drafting that says what it would do, as that of a draft model."""

    def steps(self, new: Sequence[Sequence[int]], most: int) -> int:
        """How many calls of its model `propose` would make, at most."""
        ...


@runtime_checkable
class SharingDrafting(Drafting, Protocol):
    """A drafting that reckons with how many texts share a call, as that of `Adaptive`."""

    def reckon_with(self, texts: int) -> None:
        """What is proposed next is checked in a call for so many texts, its own among them."""
        ...


@runtime_checkable
class Draft(Protocol):
    """A way to guess. It holds settings; what it knows of a text is in the `Drafting` that it begins."""

    def begin(
        self, target: Decoder, room: int, sampling: Sampling, generator: torch.Generator | None
    ) -> Drafting:
        """Be ready for new texts.

        Args:
            target: the model that checks the guesses.
            room: tokens that a text may come to have.
            sampling: how the target chooses.
            generator: source of chance.

        Raises:
            ValueError: the draft does not fit the target.
        """
        ...


@dataclass
class Stats:
    """How guesses fared. Counts go on where one is handed in several times.

    Attributes:
        calls: of the model to check guesses; the reading of the prompt is none.
        proposed: guesses that were checked, of all rows.
        accepted: guesses that were written.
        lengths: for each row of each call, how many tokens it wrote: what was accepted and one more. At the
            end of a text it may be fewer.
        draft_seconds: time that the draft took.
        target_seconds: time that the calls with the checks took.
    """

    calls: int = 0
    proposed: int = 0
    accepted: int = 0
    lengths: list[int] = field(default_factory=list)
    draft_seconds: float = 0.0
    target_seconds: float = 0.0

    @property
    def acceptance_length(self) -> float:
        """Tokens that a call writes to a row, on average; 1 is plain decoding."""
        return sum(self.lengths) / max(len(self.lengths), 1)


def verify(
    logits: Float[Tensor, "places vocab"],
    tokens: Int[Tensor, " guesses"],
    parents: Sequence[int],
    drawn_from: Float[Tensor, "guesses vocab"] | None = None,
    sampling: Sampling = Sampling(),
    seen: Int[Tensor, " text"] | None = None,
    generator: torch.Generator | None = None,
) -> tuple[list[int], int]:
    """Which guesses of one row are accepted, and the token that follows them.

    Args:
        logits: the model's scores behind the text, and then behind each guess.
        tokens, parents, drawn_from: of the `Guesses`, those of the row.
        sampling: how the model chooses.
        seen: the text so far; needed for a repetition penalty.
        generator: source of chance; left out, PyTorch's global one.

    Returns:
        The places of the accepted guesses, each the parent of the next, and the next token.

    >>> logits = torch.eye(3)[[1, 2, 0]]  # the best token is 1; behind a 1 it is 2; behind a 2 it is 0
    >>> verify(logits, torch.tensor([1, 2]), (-1, 0))
    ([0, 1], 0)
    >>> verify(logits, torch.tensor([1, 1]), (-1, 0))
    ([0], 2)
    """
    path: list[int] = []
    while True:
        place = path[-1] if path else -1
        before = None if seen is None else torch.cat([seen, tokens[path]])[None]
        law = next_token_probabilities(logits[None, place + 1], sampling, before)[0]
        for guess in (guess for guess, parent in enumerate(parents) if parent == place):
            drawn = None if drawn_from is None else drawn_from[guess]
            if _accepts(law, int(tokens[guess]), drawn, sampling, generator):
                path.append(guess)
                break
            law = _residual(law, int(tokens[guess]), drawn)
        else:
            return path, _draw(law, sampling, generator)


def _accepts(
    law: Float[Tensor, " vocab"],
    token: int,
    drawn_from: Float[Tensor, " vocab"] | None,
    sampling: Sampling,
    generator: torch.Generator | None,
) -> bool:
    ratio = law[token] if drawn_from is None else law[token] / drawn_from[token]
    if sampling.temperature == 0:  # it is the best token, or not
        return bool(ratio > 0)
    ratio = ratio.clamp(max=1)  # where nothing is left to chance, too, something is drawn
    return bool(torch.multinomial(torch.stack([1 - ratio, ratio]), 1, generator=generator))


def _residual(
    law: Float[Tensor, " vocab"], token: int, drawn_from: Float[Tensor, " vocab"] | None
) -> Float[Tensor, " vocab"]:
    """The law of the next token, given that a guess was refused."""
    rest = law.clone()
    if drawn_from is None:
        rest[token] = 0
    else:
        rest = (rest - drawn_from).clamp(min=0)
    total = rest.sum()
    return rest / total if total > 0 else law  # nothing is left by rounding alone, where p is q


def _draw(law: Float[Tensor, " vocab"], sampling: Sampling, generator: torch.Generator | None) -> int:
    if sampling.temperature == 0:
        return int(law.argmax())
    return int(torch.multinomial(law, 1, generator=generator))


def speculative_stream(
    model: Decoder,
    ids: Int[Tensor, "batch tokens"],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    stop_ids: Iterable[int] | None = None,
    padding: Int[Tensor, " batch"] | None = None,
    generator: torch.Generator | None = None,
    context: KVCache | None = None,
    samples: int = 1,
    *,
    draft: Draft,
    stats: Stats | None = None,
) -> Iterator[Int[Tensor, " rows"]]:
    """As `stream` yields them, the next token of every row, one step after another; guessed and checked.

    A row that is ahead waits for the others.

    Args:
        model, ids, max_new_tokens, sampling, stop_ids, padding, generator, context, samples: see `stream`.
            Of several rows, a cache that is handed in is of no use afterwards.
        draft: what guesses.
        stats: where it is counted how the guesses fared.

    Raises:
        ValueError, RuntimeError: as `stream`; or the draft does not fit the model, or
            proposes more guesses than there is room for.
        FloatingPointError: scores of the model or of the draft that are no finite numbers.
    """
    stats = Stats() if stats is None else stats
    reader = begin(model, ids, max_new_tokens, sampling, stop_ids, padding, context, samples)
    context, stops = reader.context, reader.stop_ids
    room = min(context.room, model.config.max_position_embeddings)
    drafting = draft.begin(model, room, sampling, generator)
    after = drafting.after if isinstance(drafting, StreamDrafting) else ()
    known = context.length
    with reader.reading():
        *streams, x = model.read(ids[:, known:], context, after)
        logits = model.logits(x[:, -1:]).squeeze(1)
    reader.require_finite(logits)
    copies = torch.arange(len(ids), device=ids.device).repeat_interleave(samples)
    if samples > 1:
        context.select(copies.tolist())
        reader.settle()
    first = choose(logits[copies], sampling, ids.long()[copies], context.padding, generator)
    starts = [0] * len(copies) if context.padding is None else context.padding.tolist()
    rows = [
        _Row(ids[row, start:].tolist(), max_new_tokens, stops)
        for row, start in zip(copies.tolist(), starts, strict=True)
    ]
    for row, token in zip(rows, first.tolist(), strict=True):
        row.write([token])
    if after:
        seen = torch.cat(streams, dim=-1)
        drafting.see(
            [seen[row, max(start - known, 0) :] for row, start in zip(copies.tolist(), starts, strict=True)]
        )

    active, given = rows, 0  # the rows that the cache holds; the steps that were yielded
    while True:
        lengths = [len(row.written) for row in rows if not row.done]
        ready = min(lengths) if lengths else max(len(row.written) for row in rows)
        for step in range(given, ready):
            yield torch.tensor([row.at(step) for row in rows], device=ids.device)
        given = ready
        going = [place for place, row in enumerate(active) if not row.done]
        if not going:
            return
        if len(going) < len(active):
            active = [active[place] for place in going]
            context.select(going)
            reader.settle()
            drafting.select(going)

        began = time.perf_counter()
        most = room - context.length - 1  # beside the newest token
        guesses = Guesses.none(len(active))
        if most > 0 and any(row.left > 1 for row in active):  # the last token needs none
            guesses = drafting.propose([row.hear() for row in active], most)
        drafted = time.perf_counter()
        newest = torch.tensor([[row.written[-1]] for row in active])
        tokens = torch.cat([newest, guesses.tokens.cpu()], dim=1).to(ids.device)
        with reader.reading():
            tree = Tree(context, [-1, *(parent + 1 for parent in guesses.parents)])
            *streams, x = model.read(tokens, tree, after)
            logits = model.logits(x)
        reader.require_finite(logits)
        paths = []
        for place, row in enumerate(active):
            seen = None
            if sampling.repetition_penalty != 1:
                seen = torch.tensor(row.prompt + row.written, device=ids.device)
            drawn_from = None if guesses.drawn_from is None else guesses.drawn_from[place].to(logits)
            path, token = verify(
                logits[place], tokens[place, 1:], guesses.parents, drawn_from, sampling, seen, generator
            )
            new = row.write([*tokens[place, 1:][path].tolist(), token])
            paths.append([0, *(guess + 1 for guess in path[: new - 1])])  # its newest token is not read
            stats.accepted += min(len(path), new)
            stats.lengths.append(new)
        if after:
            made = torch.cat(streams, dim=-1)
            drafting.see([made[place, path] for place, path in enumerate(paths)])
        if not all(row.done for row in active):  # what has stopped would only take room
            paths = [[] if row.done else path for row, path in zip(active, paths, strict=True)]
        context.take(paths)
        reader.settle()
        stats.calls += 1
        stats.proposed += guesses.tokens.numel()
        stats.draft_seconds += drafted - began
        stats.target_seconds += time.perf_counter() - drafted


class _Row:
    """The text of one row, as far as it is written.

    Attributes:
        prompt, written: its tokens.
        done: it has stopped.
    """

    def __init__(self, prompt: list[int], max_new_tokens: int, stops: Sequence[int]) -> None:
        self.prompt, self.written, self.done = prompt, [], False
        self._most, self._stops = max_new_tokens, stops
        self._unheard = list(prompt)  # tokens that the draft does not know yet

    @property
    def left(self) -> int:
        """How many tokens it may yet get."""
        return self._most - len(self.written)

    def write(self, tokens: Sequence[int]) -> int:
        """Take tokens up to the end of the row, and say how many there were."""
        ends = (place for place, token in enumerate(tokens, start=1) if token in self._stops)
        end = min(next(ends, len(tokens)), self.left)
        self.written += tokens[:end]
        self._unheard += tokens[:end]
        self.done = self.left == 0 or self.written[-1] in self._stops
        return end

    def hear(self) -> list[int]:
        """What joined the text since the last question."""
        unheard, self._unheard = self._unheard, []
        return unheard

    def at(self, step: int) -> int:
        """The token of a step; of a row that has stopped before, the first that ends rows."""
        return self.written[step] if step < len(self.written) else self._stops[0]


def speculative_generate(
    target: Decoder,
    draft: Draft,
    ids: Int[Tensor, "batch tokens"],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop_ids: Iterable[int] | None = None,
    padding: Int[Tensor, " batch"] | None = None,
    generator: torch.Generator | None = None,
    context: KVCache | None = None,
    samples: int = 1,
) -> tuple[Int[Tensor, "rows more_tokens"], Stats]:
    """Prompts and what the target wrote after them, as `generate` gives them, and how the guesses fared.

    Raises:
        ValueError: as `generate`, or the draft does not fit the target.
    """
    stats = Stats()
    tokens = generate(
        target, ids, max_new_tokens, temperature, top_k, top_p, repetition_penalty, stop_ids, padding,
        generator, context, samples, stream=partial(speculative_stream, draft=draft, stats=stats),
    )  # fmt: skip
    return tokens, stats
