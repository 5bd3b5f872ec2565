"""Drafts: what guesses the next tokens for `minicpm_lite.inference.speculative`.

    PromptLookup()                  what followed the same few tokens earlier in the text; needs no model
    DecoderDraft(model, Chain(4))   what a smaller decoder of the same vocabulary would write
    frequent_draft(model, ids, …)   the same with an output layer of the most frequent tokens alone: FR-Spec
    rank_by_frequency(tokens)       which those are, in a corpus

Sources: Saxena 2023, "Prompt lookup decoding"; Leviathan et al. 2023, arXiv 2211.17192 (a smaller model);
Zhao et al. 2025, arXiv 2502.14856 (FR-Spec).

Choices, and the traps behind them:

- What a draft does decides how fast a text is written, and never what is written.
- A draft model reads the accepted tokens anew, in the call that reads the newest token, and drops what it
  made of its guesses. It must make that call anyway, and rows of different luck cost nothing more.
- A draft that was not asked for long catches up in calls of many tokens, so that there are few, and not of
  too many, so that each takes about as long as any other.
- A text that outgrows a draft model is written on without guesses, and so are those beside it in a batch.
- FR-Spec is a smaller vocabulary of the *draft*. The target keeps all of its own, so what it writes stays the
  same; a token that is not among the frequent ones is never guessed. The embedding table stays whole.
- A lookup takes the latest occurrence, and where that runs into the end of the text goes on with its own
  guesses, so that whatever repeats itself is guessed on.
"""

import copy
import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..config import ModelConfig, require_positive_integer
from ..language.context import Context, KVCache, Tree
from ..language.decoder import Decoder
from ..language.sampling import Sampling
from ..language.scoring import evaluating
from .guess_trees import Shape
from .speculative import Drafting, Guesses

__all__ = ["DecoderDraft", "PromptLookup", "Reading", "frequent_draft", "rank_by_frequency",
           "require_ids"]  # fmt: skip

_PIECE = 64  # tokens that a draft model reads at once of what it has missed


@dataclass(frozen=True)
class PromptLookup:
    """Guesses what followed the last tokens of the text where they stood before.

    Attributes:
        guesses: how many.
        longest: tokens that must be the same, at most; the most are tried first.
        shortest: and at least.

    Raises:
        ValueError: one of them is not positive, or the shortest exceeds the longest.
    """

    guesses: int = 8
    longest: int = 3
    shortest: int = 1

    def __post_init__(self) -> None:
        for name in ("guesses", "longest", "shortest"):
            require_positive_integer(name, getattr(self, name))
        if self.shortest > self.longest:
            raise ValueError(f"shortest is {self.shortest} and longest is {self.longest}; swap them.")

    def begin(
        self, target: Decoder, room: int, sampling: Sampling, generator: torch.Generator | None
    ) -> Drafting:
        """Be ready for new texts; see `Draft`."""
        return _Lookup(self)


class _Lookup:
    """What `PromptLookup` knows of the rows: their texts, and where each run of tokens was last followed."""

    def __init__(self, settings: PromptLookup) -> None:
        self.settings = settings
        self.texts: list[list[int]] = []
        self.places: list[dict[tuple[int, ...], int]] = []  # of the token behind a run

    def propose(self, new: Sequence[Sequence[int]], most: int) -> Guesses:
        """Guesses for what follows; see `Drafting`."""
        if not self.texts:
            self.texts, self.places = [[] for _ in new], [{} for _ in new]
        for text, places, tokens in zip(self.texts, self.places, new, strict=True):
            known = len(text)
            text += tokens
            for end in range(max(known, 1), len(text)):  # runs that end before it are followed by a token
                for size in range(self.settings.shortest, min(self.settings.longest, end) + 1):
                    places[tuple(text[end - size : end])] = end
        found = [
            self._copy(*row, min(self.settings.guesses, most))
            for row in zip(self.texts, self.places, strict=True)
        ]
        longest = max(map(len, found))
        tokens = torch.tensor([row + [0] * (longest - len(row)) for row in found], dtype=torch.long)
        return Guesses(tokens, (*range(-1, longest - 1),))

    def _copy(self, text: list[int], places: dict[tuple[int, ...], int], guesses: int) -> list[int]:
        for size in range(min(self.settings.longest, len(text)), self.settings.shortest - 1, -1):
            if place := places.get(tuple(text[-size:])):
                period, copied = len(text) - place, text[place : place + guesses]
                while len(copied) < guesses:
                    copied.append(copied[-period])
                return copied
        return []

    def select(self, rows: Sequence[int]) -> None:
        """These rows go on; see `Drafting`."""
        if self.texts:
            self.texts, self.places = [self.texts[row] for row in rows], [self.places[row] for row in rows]


@dataclass(frozen=True)
class DecoderDraft:
    """Guesses what a smaller decoder would write.

    Attributes:
        model: the decoder; it has the target's vocabulary.
        shape: what its guesses look like.
        vocabulary: where its output layer holds some tokens alone, their ids; see `frequent_draft`.
    """

    model: Decoder
    shape: Shape
    vocabulary: Int[Tensor, " kept"] | None = None

    def begin(
        self, target: Decoder, room: int, sampling: Sampling, generator: torch.Generator | None
    ) -> Drafting:
        """Be ready for new texts; see `Draft`.

        Raises:
            ValueError: the target has another vocabulary.
        """
        mine, its = self.model.config.vocab_size, target.config.vocab_size
        if mine != its:
            raise ValueError(
                f"The draft has {mine} token ids and the target has {its}; what a draft guesses are tokens "
                "of the target. Give a draft of the same vocabulary."
            )
        return _DecoderReading(self, room, sampling, generator)


class Reading:
    """A draft model at work: it has read the rows' texts into a cache, and reads its guesses behind them.

    What kind of model it is says a subclass: what it reads (`inputs_of_texts`, `inputs_of_guesses`), what it
    makes of that (`states`), and what this says of the next token (`scores`).

    Args:
        model: the draft model.
        config: its shape.
        shape: what its guesses look like.
        vocabulary: where its output layer holds some tokens alone, their ids.
        room, sampling, generator: see `Draft`.
    """

    def __init__(
        self,
        model: nn.Module,
        config: ModelConfig,
        shape: Shape,
        vocabulary: Int[Tensor, " kept"] | None,
        room: int,
        sampling: Sampling,
        generator: torch.Generator | None,
    ) -> None:
        self.model, self.config, self.shape, self.vocabulary = model, config, shape, vocabulary
        self.sampling, self.generator = sampling, generator
        self.device = next(model.parameters()).device
        self._training = any(part.training for part in model.modules())
        self.spare = self.shape.reads + 2  # columns for guesses, or for new tokens of rows that are behind
        self.room = min(room + self.spare, config.max_position_embeddings)
        self.lengths: list[int] = []  # of what was read
        self.outgrown = False  # a text has left no room; what comes then is not read
        self.context: KVCache | None = None

    def inputs_of_texts(self, new: Sequence[Sequence[int]]) -> list[Float[Tensor, "_new width"]]:
        """What is to be read of each row, now that these tokens have joined it."""
        raise NotImplementedError

    def inputs_of_guesses(
        self, tokens: Int[Tensor, "rows guesses"], before: Float[Tensor, "rows guesses d"]
    ) -> Float[Tensor, "rows guesses width"]:
        """What is to be read of guesses, each with the state of what stands before it."""
        raise NotImplementedError

    def states(
        self, inputs: Float[Tensor, "rows tokens width"], context: Context
    ) -> Float[Tensor, "rows tokens d"]:
        """What the model makes of what it reads."""
        raise NotImplementedError

    def scores(self, states: Float[Tensor, "rows tokens d"]) -> Float[Tensor, "rows tokens kept"]:
        """What it says of the next token."""
        raise NotImplementedError

    def steps(self, new: Sequence[Sequence[int]], most: int) -> int:
        """How many calls of the model `propose` would make, at most; see `SteppedDrafting`."""
        longest = max(map(len, new))
        read = 1 if self.context is None else -(-longest // self._piece(longest))
        return read - 1 + self.shape.levels(most)

    def _piece(self, longest: int) -> int:
        """How many new tokens are read at once; rows of different luck may leave no room for many."""
        roomy = self.context.length + longest <= self.context.room
        return max(_PIECE, self.spare) if roomy else self.spare

    def propose(self, new: Sequence[Sequence[int]], most: int) -> Guesses:
        """Guesses for what follows; see `Drafting`.

        Raises:
            FloatingPointError: scores that are no finite numbers.
        """
        with torch.no_grad(), evaluating(self.model) if self._training else nullcontext():
            inputs = self.inputs_of_texts(new)
            lengths = self.lengths or [0] * len(new)
            # columns that were of rows which have left
            empty = 0 if self.context is None else self.context.length - max(lengths)
            self.lengths = [length + len(row) for length, row in zip(lengths, inputs, strict=True)]
            self.outgrown |= max(self.lengths) + empty + self.spare > self.room
            if self.outgrown:
                return Guesses.none(len(new))
            guesses = self._grow(self._catch_up(inputs) if self.context else self._prefill(inputs), most)
        if self.vocabulary is None:
            return guesses
        law = guesses.drawn_from
        if law is not None:
            whole = law.new_zeros(*law.shape[:2], self.config.vocab_size)
            law = whole.index_copy(2, self.vocabulary, law)
        return replace(guesses, tokens=self._ids(guesses.tokens), drawn_from=law)

    def _grow(self, known: Float[Tensor, "rows 1 d"], most: int) -> Guesses:
        """Guess, from the states at the ends of the texts; guesses are called as the output layer does."""
        tree = None

        def read(tokens: Int[Tensor, "rows new"], parents: Sequence[int]) -> Float[Tensor, "rows new kept"]:
            nonlocal tree, known
            if tree is None:
                tree = Tree(self.context, parents)
            else:
                tree.grow(parents)
            before = known[:, [parent + 1 for parent in parents]]
            states = self.states(self.inputs_of_guesses(self._ids(tokens), before), tree)
            known = torch.cat([known, states], dim=1)
            return self._finite_scores(states)

        return self.shape.grow(self._finite_scores(known)[:, 0], read, most, self.sampling, self.generator)

    def _finite_scores(self, states: Float[Tensor, "rows tokens d"]) -> Float[Tensor, "rows tokens kept"]:
        scores = self.scores(states)
        if not math.isfinite(scores.sum()):  # a sum of all is finite only if each is
            raise FloatingPointError(
                f"Not all scores of the draft ({type(self.model).__name__}) behind a text of "
                f"{max(self.lengths)} tokens are finite numbers. Are its weights whole? Give another draft."
            )
        return scores

    def _ids(self, tokens: Int[Tensor, "rows new"]) -> Int[Tensor, "rows new"]:
        """The ids of what the output layer calls so."""
        return tokens if self.vocabulary is None else self.vocabulary[tokens]

    def _prefill(self, inputs: list[Float[Tensor, "_new width"]]) -> Float[Tensor, "rows 1 d"]:
        """Read the texts, and give the states at their ends."""
        longest = max(map(len, inputs))
        padding = torch.tensor([longest - len(row) for row in inputs], device=self.device)
        self.context = KVCache(self.room, padding if padding.any() else None)
        padded = torch.stack([F.pad(row, (0, 0, longest - len(row), 0)) for row in inputs])
        return self.states(padded, self.context)[:, -1:]

    def _catch_up(self, inputs: list[Float[Tensor, "_new width"]]) -> Float[Tensor, "rows 1 d"]:
        """Read what joined the texts, and give the states at their ends."""
        last, longest_new = {}, max(map(len, inputs))
        piece = self._piece(longest_new)
        for start in range(0, longest_new, piece):
            parts = [row[start : start + piece] for row in inputs]
            longest = max(map(len, parts))
            padded = torch.stack([F.pad(part, (0, 0, 0, longest - len(part))) for part in parts])
            states = self.states(padded, Tree(self.context, range(-1, longest - 1)))
            self.context.take([[*range(len(part))] for part in parts])
            last |= {row: states[row, len(part) - 1] for row, part in enumerate(parts) if len(part)}
        return torch.stack([last[row] for row in range(len(inputs))])[:, None]

    def select(self, rows: Sequence[int]) -> None:
        """These rows go on; see `Drafting`."""
        self.lengths = [self.lengths[row] for row in rows] if self.lengths else []
        if self.context is not None:
            self.context.select(rows)
            self.context.take([])  # which drops columns that are padding of all rows that stay


class _DecoderReading(Reading):
    """A decoder reads embeddings, and what it makes of one guess does not enter with the next."""

    def __init__(
        self, draft: DecoderDraft, room: int, sampling: Sampling, generator: torch.Generator | None
    ) -> None:
        super().__init__(
            draft.model, draft.model.config, draft.shape, draft.vocabulary, room, sampling, generator
        )

    def inputs_of_texts(self, new: Sequence[Sequence[int]]) -> list[Float[Tensor, "_new d"]]:
        return [self.model.embed(torch.tensor([row], device=self.device))[0] for row in new]

    def inputs_of_guesses(
        self, tokens: Int[Tensor, "rows guesses"], before: Float[Tensor, "rows guesses d"]
    ) -> Float[Tensor, "rows guesses d"]:
        return self.model.embed(tokens)

    def states(
        self, inputs: Float[Tensor, "rows tokens d"], context: Context
    ) -> Float[Tensor, "rows tokens d"]:
        return self.model.states(inputs, context)[-1]

    def scores(self, states: Float[Tensor, "rows tokens d"]) -> Float[Tensor, "rows tokens kept"]:
        return self.model.logits(states)


def frequent_draft(model: Decoder, vocabulary: Int[Tensor, " kept"], shape: Shape) -> DecoderDraft:
    """A draft whose output layer holds some tokens alone, which are all that it guesses: FR-Spec.

    With a large vocabulary and a small model the output layer is most of what a draft reads; a quarter of the
    tokens are 95 % of a text (Zhao et al. 2025). The model stays as it is, and shares its other weights.

    Args:
        model: a decoder.
        vocabulary: the ids that are kept, as the first of `rank_by_frequency`.
        shape: what its guesses look like.

    Raises:
        ValueError: no id, one that the model lacks, or one that comes twice.
    """
    require_ids(vocabulary, model.config.vocab_size)
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    cut = copy.deepcopy(model, shared)
    vocabulary = vocabulary.long().to(next(model.parameters()).device)
    cut.lm_head = nn.Linear(model.config.hidden_size, len(vocabulary), bias=False, device="meta")
    cut.lm_head.weight = nn.Parameter(model.tables[-1].detach()[vocabulary], requires_grad=False)
    return DecoderDraft(cut, shape, vocabulary)


def require_ids(vocabulary: Int[Tensor, " kept"], vocab_size: int) -> None:
    """Refuse what is no part of a model's vocabulary.

    Raises:
        ValueError: no id, one that the model lacks, or one that comes twice.
    """
    ids, whole = vocabulary.tolist(), not vocabulary.is_floating_point()
    known = whole and all(0 <= each < vocab_size for each in ids)
    if not ids or not known or len(set(ids)) < len(ids):
        raise ValueError(
            f"vocabulary holds {len(ids)} ids; expected some of those that the model has, 0 to "
            f"{vocab_size - 1}, as whole numbers and none of them twice."
        )


def rank_by_frequency(
    tokens: Int[Tensor, "*tokens"], vocab_size: int, first: Iterable[int] = ()
) -> Int[Tensor, " vocab"]:
    """All ids of a vocabulary, those that a corpus has most often first; of equal ones the lower.

    Args:
        tokens: the corpus.
        vocab_size: how many ids there are.
        first: ids that stand before all others, as those that end texts, which corpora have seldom.

    Raises:
        ValueError: ids that the vocabulary lacks.

    >>> rank_by_frequency(torch.tensor([3, 1, 3, 1, 1, 2]), vocab_size=5, first=[4])
    tensor([4, 1, 3, 2, 0])
    """
    first = list(first)
    for name, ids in (("tokens", tokens), ("first", torch.tensor(first, dtype=torch.long))):
        whole = not ids.is_floating_point()
        if ids.numel() and not (whole and 0 <= int(ids.min()) <= int(ids.max()) < vocab_size):
            raise ValueError(
                f"{name} holds ids from {ids.min()} to {ids.max()}, and the vocabulary has whole numbers "
                f"from 0 to {vocab_size - 1}. Was the corpus cut into tokens with another one?"
            )
    counts = torch.bincount(tokens.flatten().long(), minlength=vocab_size)
    counts[first] = tokens.numel() + 1
    return counts.sort(descending=True, stable=True).indices
