"""What guessing costs and what it brings: how many guesses to make on a machine, and when to make none.

    tokens(k)  = 1 + a + a^2 + ... + a^k          that a call writes, of k guesses each accepted with chance a
    seconds(k) = call(1 + k) + k * draft          the call that checks them, and the draft's steps
    speed      = tokens(k) / tokens(0) * seconds(0) / seconds(k)

Source: Leviathan et al. 2023, arXiv 2211.17192, section 3, whose call costs the same for any k; here it is
measured. A tree writes one token and, of each guess, the chance that all up to it are accepted.

    Costs              seconds of a call of 1, 2, ... tokens and of a draft's step, measured on the machine
    best_chain         how many guesses are fastest
    best_tree          which tree is
    Adaptive(draft)    as many guesses as are fastest with what was accepted so far, or none

`Adaptive` keeps accounts in the seconds of `Costs`: what was spent, and what plain decoding would have
taken for the tokens that were written. It guesses only if all guesses could fail and the accounts would
still be less than an allowance behind. So whatever is accepted, the time is never more than

    plain * (1 + share) + credit * call(1)            of the dearest call of one token for each text

which is a theorem about the accounts, not a hope about the draft. The rule is as true as the costs are: a
call of a draft model counts as one step, also the first, which reads the prompt and takes longer.

Choices, and the traps behind them:

- What a call of 8 tokens costs beside one decides everything, and differs by machine, kernel and batch:
  measure it with the model, the rows and the length of text that are meant.
- Chances of later guesses are lower than those of the first, and texts differ. The estimate is a running mean
  over the last calls, so that a change of the text is noticed.
- A tree that follows the draft's law reads all its levels for any number of guesses, and a draft that was not
  asked has a text to catch up with. So what a question takes is asked of the draft itself, before it is
  put (`SteppedDrafting`); one that does not say takes a step for each guess.
- Rows of a batch wait for each other, so the time is that of the row that gets on least.
- In an engine the rows of a call come and go. Where a call of eight tokens takes longer than one of one, a
  guess that pays for a text alone is a loss for eight of them, whose guesses are all in the call. So a text
  is told how many there are (`SharingDrafting`) and reckons as if all guessed as much as it does.
- Where no guess pays, one is tried from time to time, as the allowance grows; else a draft that has become
  good would never be asked again.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

import torch
from jaxtyping import Float
from torch import Tensor

from ..config import require_positive_integer, require_positive_number, require_probability
from ..language.decoder import Decoder
from ..language.sampling import Sampling
from .guess_trees import StaticTree
from .speculative import Draft, Drafting, Guesses, SteppedDrafting, StreamDrafting

__all__ = ["Adaptive", "Costs", "best_chain", "best_tree", "expected_length"]

_MEMORY = 0.9  # of what the calls before showed, with each call


@dataclass(frozen=True)
class Costs:
    """What steps take on a machine, in seconds, or in any other unit of time.

    Attributes:
        calls: of the target with 1, 2, 3, ... tokens; beyond the last the difference of the last two goes on.
        draft: of one step of the draft: a call of a draft model, for each guess of a chain, or each level of
            a tree; and where it was not asked for long, a few more that catch up with the text.

    Raises:
        ValueError: no call of one or of two tokens, or a time that is none.
    """

    calls: tuple[float, ...]
    draft: float

    def __post_init__(self) -> None:
        if len(self.calls) < 2:
            raise ValueError(f"calls is {self.calls}; expected times of calls with 1, 2 and more tokens.")
        for seconds in self.calls:
            require_positive_number("calls", seconds)
        if self.draft != 0:
            require_positive_number("draft", self.draft)

    def call(self, tokens: int) -> float:
        """Of one call of the target with so many tokens."""
        beyond = max(tokens - len(self.calls), 0)
        return self.calls[min(tokens, len(self.calls)) - 1] + beyond * max(self.calls[-1] - self.calls[-2], 0)

    def shared(self, texts: int) -> "Costs":
        """Of calls that so many texts share, each with as many tokens, and a draft's step for each of them.

        Raises:
            ValueError: the number of texts is not positive.

        >>> Costs(calls=(1.0, 1.5, 2.5), draft=0.5).shared(2)
        Costs(calls=(1.5, 3.5, 5.5), draft=1.0)
        """
        require_positive_integer("texts", texts)
        return Costs(
            tuple(self.call(texts * tokens) for tokens in range(1, len(self.calls) + 1)), texts * self.draft
        )

    def step(self, guesses: int, levels: int) -> float:
        """Of guessing so much, in so many steps of the draft, and checking it."""
        return self.call(1 + guesses) + levels * self.draft

    def speed(self, length: float, guesses: int, levels: int) -> float:
        """How many times as fast as plain decoding, where a call writes ``length`` tokens.

        >>> round(Costs(calls=(1.0, 1.1, 1.2), draft=0.1).speed(1.8, guesses=1, levels=1), 2)
        1.5
        """
        return length * self.call(1) / self.step(guesses, levels)


def expected_length(acceptance: float, guesses: int) -> float:
    """Tokens that a call writes, of a chain whose guesses are each accepted with this chance.

    Raises:
        ValueError: the acceptance is no probability.

    >>> expected_length(0.5, guesses=2)
    1.75
    """
    require_probability("acceptance", acceptance)
    return sum(acceptance**place for place in range(guesses + 1))


def best_chain(costs: Costs, acceptance: float, most: int) -> int:
    """How many guesses, up to ``most``, are fastest: 0 where none pays.

    Raises:
        ValueError: the acceptance is no probability, or ``most`` is below 0.
    """
    if most != 0:
        require_positive_integer("most", most)
    return max(
        range(most + 1),
        key=lambda guesses: costs.speed(expected_length(acceptance, guesses), guesses, guesses),
    )


def best_tree(costs: Costs, chances: Iterable[float], most: int) -> StaticTree | None:
    """Which tree of up to ``most`` guesses is fastest, or None where none pays.

    Args:
        costs: of the machine.
        chances: that the draft's best token is the target's, that its second best is, and so on; taken to be
            the same wherever in the tree.
        most: guesses.

    The likeliest guesses of a depth make the best tree of that depth for any number of them, so all numbers
    and depths are tried. Source of the idea: Chen et al. 2024, arXiv 2402.12374 (Sequoia).

    Raises:
        ValueError: a chance that is none, or their sum is above 1.
    """
    require_positive_integer("most", most)
    chances = tuple(chances)
    for chance in chances:
        require_probability("chances", chance)
    if not chances or sum(chances) > 1 + 1e-6:
        raise ValueError(
            f"chances is {list(chances)}; expected those of single tokens, whose sum is at most 1."
        )
    fastest, best = 1.0, None
    for depth in range(1, most + 1):
        for size, length, tree in _likeliest(chances, most, depth):
            if (speed := costs.speed(length, size, depth)) > fastest:
                fastest, best = speed, tree
    return None if best is None else StaticTree(*best)


def _likeliest(
    chances: Sequence[float], most: int, depth: int
) -> list[tuple[int, float, tuple[tuple[int, ...], tuple[int, ...]]]]:
    """The likeliest trees of 1, 2, ... guesses: their size, the tokens a call writes, parents and ranks."""
    trees, parents, ranks, length = [], [], [], 1.0
    waiting: list[tuple[float, int, int, int]] = []  # chance, negative; parent, rank, level
    for rank, chance in enumerate(chances):
        heappush(waiting, (-chance, -1, rank, 1))
    while waiting and len(parents) < most:
        chance, parent, rank, level = heappop(waiting)
        parents.append(parent)
        ranks.append(rank)
        length -= chance
        trees.append((len(parents), length, (tuple(parents), tuple(ranks))))
        if level < depth:
            for next_rank, each in enumerate(chances):
                heappush(waiting, (chance * each, len(parents) - 1, next_rank, level + 1))
    return trees


@dataclass(frozen=True)
class Adaptive:
    """A draft that is asked for as many guesses as are fastest, and for none where none pays.

    Attributes:
        draft: is asked.
        costs: of the machine, with this draft.
        most: guesses at most.
        share: of the time of plain decoding, that may be lost.
        credit: plain steps that may be lost beside it, so that guessing can begin.
    """

    draft: Draft
    costs: Costs
    most: int = 8
    share: float = 0.02
    credit: float = 2.0

    def __post_init__(self) -> None:
        require_positive_integer("most", self.most)
        require_probability("share", self.share)
        if self.credit != 0:
            require_positive_number("credit", self.credit)

    def begin(
        self, target: Decoder, room: int, sampling: Sampling, generator: torch.Generator | None
    ) -> Drafting:
        """Be ready for new texts; see `Draft`."""
        return _Adapting(self, self.draft.begin(target, room, sampling, generator))


class _Adapting:
    """The accounts of `Adaptive`, and its estimate of what is accepted.

    Attributes:
        plain: what plain decoding would have taken so far; of several rows, for that which has least.
        spent: what was taken.
        costs: of the next step, which texts may share.
    """

    def __init__(self, settings: Adaptive, drafting: Drafting) -> None:
        self.settings, self.drafting = settings, drafting
        self.unheard: list[list[int]] = []  # by the draft, of each row
        self._texts, self.costs, self.spent = 1, settings.costs, 0.0
        self._plain: list[float] = []  # of each row
        self._accepted = self._refused = 1.0  # so that at first a guess is as likely right as wrong
        self._last: tuple[Costs, int, int, int] | None = None  # guesses, those asked for, steps of the draft
        self._says = isinstance(drafting, SteppedDrafting)

    @property
    def plain(self) -> float:
        return min(self._plain)

    def reckon_with(self, texts: int) -> None:
        """The next step is one for so many texts; see `SharingDrafting`."""
        if texts != self._texts:
            self._texts, self.costs = texts, self.settings.costs.shared(texts)

    @property
    def acceptance(self) -> float:
        """The chance of a guess to be accepted, as it seems."""
        return self._accepted / (self._accepted + self._refused)

    def propose(self, new: Sequence[Sequence[int]], most: int) -> Guesses:
        """Guesses for what follows; see `Drafting`."""
        if self._last is not None:
            self._learn([len(tokens) for tokens in new])
        else:
            self._plain = [0.0] * len(new)
        self.unheard = [
            [*old, *tokens] for old, tokens in zip(self.unheard or [[]] * len(new), new, strict=True)
        ]
        asked, guesses = self._how_many(most), Guesses.none(len(new))
        steps = self._steps(asked) if asked else 0
        if asked:
            guesses = self.drafting.propose(self.unheard, asked)
            self.unheard = []
        self._last = self.costs, guesses.tokens.shape[1], asked, steps
        return guesses

    def _how_many(self, most: int) -> int:
        costs, settings = self.costs, self.settings
        most = min(most, settings.most)
        wanted = best_chain(costs, self.acceptance, most) or min(
            most, 1
        )  # one, to see whether it pays by now
        behind = self.spent - self.plain
        allowed = settings.share * self.plain + settings.credit * costs.call(1)
        while wanted and behind + costs.step(wanted, self._steps(wanted)) - costs.call(1) > allowed:
            wanted -= 1
        return wanted

    def _steps(self, guesses: int) -> int:
        """Of the draft, where it is asked for so many guesses."""
        return self.drafting.steps(self.unheard, guesses) if self._says else guesses

    def _learn(self, written: Sequence[int]) -> None:
        """Keep the accounts of the last step, which wrote so many tokens to each row."""
        costs, guesses, asked, steps = self._last
        self._plain = [
            plain + tokens * costs.call(1) for plain, tokens in zip(self._plain, written, strict=True)
        ]
        self.spent += costs.step(guesses, steps)
        if guesses:
            accepted = [each - 1 for each in written]
            refused = sum(each < min(guesses, asked) for each in accepted)
            self._accepted = _MEMORY * self._accepted + sum(accepted) / len(written)
            self._refused = _MEMORY * self._refused + refused / len(written)

    @property
    def after(self) -> tuple[int, ...]:
        """What the draft that is asked wants to see; see `StreamDrafting`."""
        return self.drafting.after if isinstance(self.drafting, StreamDrafting) else ()

    def see(self, streams: Sequence[Float[Tensor, "_read features"]]) -> None:
        """What the target makes of the texts; see `StreamDrafting`."""
        self.drafting.see(streams)

    def select(self, rows: Sequence[int]) -> None:
        """These rows go on; see `Drafting`."""
        self.unheard = [self.unheard[row] for row in rows] if self.unheard else []
        self._plain = [self._plain[row] for row in rows] if self._plain else []
        self.drafting.select(rows)
