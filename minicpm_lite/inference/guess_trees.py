"""The shapes that guesses can have: a chain, a tree that is known before, one that follows the draft's law.

    Chain(4)                                four guesses, each drawn as the target draws
    StaticTree(parents, ranks)              guess i is the ranks[i]-th best token behind guess parents[i]
    DynamicTree(depth, top_k, guesses)      EAGLE-2: the paths that the draft holds most probable

A draft model brings two things, its scores behind the text and a way to read guesses:

    shape.grow(logits, read, most, sampling, generator) -> Guesses
    read(tokens, parents) -> logits behind them         a level more each call; parents were read before

EAGLE-2 (Li et al. 2024, arXiv 2406.16858) takes the draft's probability of a path for that of its
acceptance:

    expand    of the newest level the top_k most probable paths are read, and each gets its top_k best tokens
    rerank    of all guesses of all levels the most probable are kept

Choices, and the traps behind them:

- Trees are of chosen tokens, which need no law to be accepted by; only a chain is drawn.
- A path is no more probable than its beginning, so a guess is kept with all before it. Where the draft is
  certain the two are equal, and the one that came first must win.
- Rows of a batch have one shape, and a law each. What counts of a path is the mean of the rows'
  probabilities, which is the number of guesses that a row can hope for. One row alone gets EAGLE-2's tree.
- A draft does not count repetitions: where the target has a penalty for them, guesses fare worse.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..config import require_positive_integer
from ..language.context import lineage
from ..language.sampling import Sampling, next_token_probabilities
from .speculative import Guesses

__all__ = ["Chain", "DynamicTree", "Read", "Shape", "StaticTree"]


@runtime_checkable
class Read(Protocol):
    """How guesses are read by the draft model."""

    def __call__(
        self, tokens: Int[Tensor, "rows new"], parents: Sequence[int]
    ) -> Float[Tensor, "rows new vocab"]:
        """The scores behind guesses, each of which follows one that was read before or, -1, the text."""
        ...


@runtime_checkable
class Shape(Protocol):
    """What a draft model's guesses look like."""

    @property
    def reads(self) -> int:
        """How many guesses are read at most."""
        ...

    def levels(self, most: int) -> int:
        """How many times the draft is asked for scores, behind the text and then behind guesses."""
        ...

    def grow(
        self,
        logits: Float[Tensor, "rows vocab"],
        read: Read,
        most: int,
        sampling: Sampling,
        generator: torch.Generator | None,
    ) -> Guesses:
        """Guess, from the draft's scores behind the text.

        Args:
            logits: these scores.
            read: reads guesses and gives the scores behind them.
            most: guesses that there is room for, one at least.
            sampling: how the target chooses.
            generator: source of chance.
        """
        ...


@dataclass(frozen=True)
class Chain:
    """One guess behind the other, each drawn as the target draws.

    Attributes:
        guesses: how many.
    """

    guesses: int

    def __post_init__(self) -> None:
        require_positive_integer("guesses", self.guesses)

    @property
    def reads(self) -> int:
        """All but the last."""
        return self.guesses - 1

    def levels(self, most: int) -> int:
        """Once for each guess."""
        return min(self.guesses, most)

    def grow(
        self,
        logits: Float[Tensor, "rows vocab"],
        read: Read,
        most: int,
        sampling: Sampling,
        generator: torch.Generator | None,
    ) -> Guesses:
        """Guess, from the draft's scores behind the text; see `Shape`."""
        sampling = replace(sampling, repetition_penalty=1.0)
        tokens, laws = [], []
        for step in range(min(self.guesses, most)):
            if step:
                logits = read(tokens[-1], [step - 2])[:, 0]
            law = next_token_probabilities(logits, sampling)
            laws.append(law)
            drawn = sampling.temperature != 0
            best = torch.multinomial(law, 1, generator=generator) if drawn else law.argmax(-1, keepdim=True)
            tokens.append(best)  # (rows, 1)
        drawn_from = torch.stack(laws, dim=1) if sampling.temperature else None
        return Guesses(torch.cat(tokens, dim=1), (*range(-1, len(tokens) - 1),), drawn_from)


@dataclass(frozen=True)
class StaticTree:
    """A tree of a shape that is known before, as Medusa has it (Cai et al. 2024, arXiv 2401.10774).

    Attributes:
        parents: for each guess the place of the one before it, -1 for one that follows the text.
        ranks: how many tokens the draft holds better there.

    >>> StaticTree(parents=(-1, -1, 0), ranks=(0, 1, 0)).reads  # the first two are for one place
    1

    Raises:
        ValueError: they are no tree, or two guesses are the same; or, when it grows, the draft has
            fewer tokens than a rank wants.
    """

    parents: tuple[int, ...]
    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        places = [*zip(self.parents, self.ranks, strict=False)]
        if (
            not places
            or len(self.parents) != len(self.ranks)
            or not all(-1 <= parent < place for place, parent in enumerate(self.parents))
            or min(self.ranks) < 0
            or len(set(places)) < len(places)
        ):
            raise ValueError(
                f"parents is {self.parents} and ranks is {self.ranks}; expected for each guess the place of "
                "an earlier one, or -1, and a rank from 0, no two of them the same."
            )

    @property
    def reads(self) -> int:
        """Those that others follow."""
        return len(set(self.parents) - {-1})

    def levels(self, most: int) -> int:
        """As deep as the tree is that there is room for."""
        return 1 + max(lineage(self.parents[:most])[0])

    def grow(
        self,
        logits: Float[Tensor, "rows vocab"],
        read: Read,
        most: int,
        sampling: Sampling,
        generator: torch.Generator | None,
    ) -> Guesses:
        """Guess, from the draft's scores behind the text; see `Shape`."""
        if max(self.ranks) >= logits.shape[-1]:
            raise ValueError(
                f"ranks is {self.ranks}, and the draft guesses {logits.shape[-1]} tokens, so there is no "
                f"rank {max(self.ranks)}. Give a tree of lower ranks, or a draft of more tokens."
            )
        parents, ranks = self.parents[:most], self.ranks[:most]
        tokens = torch.zeros(len(logits), len(parents), dtype=torch.long, device=logits.device)
        known, places = {-1: logits}, {-1: -1}  # scores behind a guess; its place among those that were read
        while known:
            for guess, (parent, rank) in enumerate(zip(parents, ranks, strict=True)):
                if parent in known:
                    tokens[:, guess] = known[parent].topk(rank + 1).indices[:, -1]
            level = [guess for guess, parent in enumerate(parents) if parent in known and guess in parents]
            behind = read(tokens[:, level], [places[parents[guess]] for guess in level]) if level else None
            places |= {guess: len(places) - 1 + at for at, guess in enumerate(level)}
            known = {guess: behind[:, at] for at, guess in enumerate(level)}
        return Guesses(tokens, parents)


@dataclass(frozen=True)
class DynamicTree:
    """A tree of the paths that the draft holds most probable: EAGLE-2, whose settings are the defaults.

    Its released code counts 60 tokens, of which the newest token of the text is one.

    Attributes:
        depth: how many tokens a path has at most.
        top_k: paths of a level that go on, and tokens that each goes on with.
        guesses: how many are kept.
    """

    depth: int = 7
    top_k: int = 10
    guesses: int = 59

    def __post_init__(self) -> None:
        for name in ("depth", "top_k", "guesses"):
            require_positive_integer(name, getattr(self, name))

    @property
    def reads(self) -> int:
        """``top_k`` of each level but the last."""
        return (self.depth - 1) * self.top_k

    def levels(self, most: int) -> int:
        """All of them, of which the most probable guesses are kept, however few."""
        return self.depth

    def grow(
        self,
        logits: Float[Tensor, "rows vocab"],
        read: Read,
        most: int,
        sampling: Sampling,
        generator: torch.Generator | None,
    ) -> Guesses:
        """Guess, from the draft's scores behind the text; see `Shape`."""
        rows, width = len(logits), min(self.top_k, logits.shape[-1])
        chance, behind = logits.new_ones(rows, 1), logits[:, None]  # of the paths that go on; (rows, paths)
        level, read_at = [-1], [-1]  # these paths among the guesses, and among those that were read
        tokens, chances, parents = [], [], []
        for depth in range(self.depth):
            best = behind.softmax(-1).clamp(max=1).topk(width)  # (rows, paths, width)
            tokens.append(best.indices.flatten(1))
            chances.append((best.values * chance[..., None]).flatten(1))
            first = len(parents)
            parents += [parent for parent in level for _ in range(width)]
            if depth == self.depth - 1:
                break
            kept = chances[-1].mean(0).topk(width).indices.sort().values.tolist()
            chance = chances[-1][:, kept]
            behind = read(tokens[-1][:, kept], [read_at[at // width] for at in kept])
            level, read_at = [first + at for at in kept], [depth * width + at for at in range(width)]
        order = torch.cat(chances, dim=1).mean(0).sort(descending=True, stable=True).indices
        kept = order[: min(self.guesses, most)].sort().values.tolist()  # a level behind the other
        places = {-1: -1} | {guess: place for place, guess in enumerate(kept)}
        return Guesses(torch.cat(tokens, dim=1)[:, kept], tuple(places[parents[guess]] for guess in kept))
