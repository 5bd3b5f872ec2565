"""Two-stage pre-training: coarse data while the rate is high, good data from the moment it decays.

MiniCPM trains the stable stage of WSD on coarse data alone. When the decay begins, instruction data of high
quality are mixed in; a separate fine-tuning (SFT) follows, at the rate the decay ended with. Source: Hu et
al. 2024, arXiv 2404.06395, section 5 and Table 1.

- `MixtureWindows`: which data come when, as one sequence of windows.
- `ConversationWindows`: questions with answers as windows; the answers alone are predicted.
- `score_answers`, `choice_accuracy`: what a model makes of held-out questions.

What gradients and curvature do while the rate falls is measured by `minicpm_lite.training.curvature`.

Choices and traps:

- Weights count windows. A window of conversations predicts fewer tokens than one of prose, so its part of the
  loss, a mean over predicted tokens, is smaller than its weight.
- Nothing separates the examples in a window: a question can attend to the example before it, as in prose.
- Rounding each source's count on its own does not do for three sources: counts then fall again, or the sum
  is off by one. The order of a period is therefore found by deadlines (`_fair_order`).
"""

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..config import require_positive_integer
from ..data.corpora import Windows
from ..data.instructions import EncodedExample
from ..language.decoder import Decoder

__all__ = [
    "AnswerScores",
    "ConversationWindows",
    "MixtureWindows",
    "choice_accuracy",
    "score_answers",
]

_LONGEST_PERIOD = 100_000
_PADDING = ~0  # context only, and at the end of a window, where nothing reads it


@dataclass(frozen=True, eq=False)
class MixtureWindows:
    """Several sequences of windows, drawn from in exact proportions that change from stage to stage.

    After any number of windows of a stage, the count of each source is less than 1 away from its weight times
    that number. Each source is read in its own order, without a gap or a repeat, also from one stage to the
    next. Any index is found by a look-up, so a resumed run replays nothing.

    Attributes:
        sources: a name for each sequence; all of one window length.
        stages: the index of a stage's first window, and the weights of its sources. The first stage begins
            at 0. Weights are relative; sources that are left out have weight 0. Decimal numbers are taken as
            they are written: 0.1 is a tenth.

    Raises:
        ValueError: no source, sources of different window length, no stage, stages out of order, a weight
            that is negative, not finite or of an unknown source, no positive weight, or weights so odd that
            they repeat only after more than 100,000 windows.

    >>> from minicpm_lite.data.corpora import TokenWindows
    >>> novels = TokenWindows(torch.zeros(100).long(), length=4, seed=0)
    >>> chats = TokenWindows(torch.ones(100).long(), length=4, seed=0)
    >>> data = MixtureWindows({"novels": novels, "chats": chats},
    ...                       [(0, {"novels": 1}), (6, {"novels": 0.75, "chats": 0.25})])
    >>> [int(data[index][0]) for index in range(14)]
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1]
    >>> data.counts(14)
    {'novels': 12, 'chats': 2}
    """

    sources: Mapping[str, Windows]
    stages: Sequence[tuple[int, Mapping[str, float]]]

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("The mixture has no source; give at least one sequence of windows with a name.")
        lengths = {name: source.length for name, source in self.sources.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(
                f"The sources have windows of different length ({lengths}); cut all of them to one length."
            )
        starts = [start for start, _ in self.stages]
        if not starts or starts[0] != 0 or any(a >= b for a, b in zip(starts, starts[1:], strict=False)):
            raise ValueError(
                f"The stages begin at the windows {starts}; expected 0 for the first and each later than the "
                "one before."
            )
        self._stages  # noqa: B018, refuse wrong weights now rather than at the first window

    @property
    def length(self) -> int:
        """Tokens that are predicted in each window."""
        return next(iter(self.sources.values())).length

    @cached_property
    def _stages(self) -> list["_Stage"]:
        stages: list[_Stage] = []
        for start, weights in self.stages:
            before = dict.fromkeys(self.sources, 0)
            if stages:
                before = stages[-1].counts(start)
            whole = _whole_weights(weights, self.sources)
            order = _fair_order(list(whole.values()))
            stages.append(_Stage(start, before, whole, [list(whole)[place] for place in order]))
        return stages

    def __getitem__(self, index: int) -> Int[Tensor, " window"]:
        """The window of an index, counted from 0."""
        name, place = self.locate(index)
        return self.sources[name][place]

    def locate(self, index: int) -> tuple[str, int]:
        """Name of the source that a window comes from, and the window's index there."""
        return self._stage_at(index).locate(index)

    def counts(self, windows: int) -> dict[str, int]:
        """How many of the first ``windows`` windows come from each source."""
        return self._stage_at(windows).counts(windows)

    def _stage_at(self, index: int) -> "_Stage":
        if index < 0:
            raise IndexError(f"The index of the window is {index}; windows are counted from 0.")
        return next(stage for stage in reversed(self._stages) if stage.start <= index)

    def id_range(self) -> tuple[int, int]:
        """Smallest and largest token id in all sources."""
        ranges = [source.id_range() for source in self.sources.values()]
        return min(low for low, _ in ranges), max(high for _, high in ranges)

    def identity(self) -> dict:
        """Sources, and the whole-number weights of each stage."""
        return {
            "sources": {name: source.identity() for name, source in self.sources.items()},
            "stages": [[stage.start, stage.weights] for stage in self._stages],
        }


@dataclass(frozen=True)
class _Stage:
    """One stage: the counts before it, and the order of sources that repeats in it."""

    start: int
    before: dict[str, int]
    weights: dict[str, int]  # windows of each source in a period
    order: list[str]  # one period

    @cached_property
    def _earlier(self) -> list[dict[str, int]]:
        """For each place of a period, and for its end, the windows of each source before it."""
        counts, table = dict.fromkeys(self.weights, 0), []
        for name in self.order:
            table.append(dict(counts))
            counts[name] += 1
        return [*table, counts]

    def locate(self, index: int) -> tuple[str, int]:
        name = self.order[(index - self.start) % len(self.order)]
        return name, self.counts(index)[name]

    def counts(self, windows: int) -> dict[str, int]:
        periods, rest = divmod(windows - self.start, len(self.order))
        return {
            name: self.before[name] + periods * weight + self._earlier[rest][name]
            for name, weight in self.weights.items()
        }


def _whole_weights(weights: Mapping[str, float], sources: Mapping[str, Windows]) -> dict[str, int]:
    """The smallest whole numbers in the given proportions, one for each source."""
    unknown = sorted(set(weights) - set(sources))
    if unknown:
        raise ValueError(f"There is no source {unknown[0]!r} to weigh; the sources are {sorted(sources)}.")
    for name, weight in weights.items():
        if not isinstance(weight, int | float | Fraction) or not 0 <= weight < math.inf:
            raise ValueError(f"The weight of {name!r} is {weight!r}; expected a finite number, 0 or more.")
    exact = {name: Fraction(str(weights.get(name, 0))) for name in sources}
    if not sum(exact.values()):
        raise ValueError(f"The weights are {dict(weights)}; at least one must be greater than 0.")
    scale = math.lcm(*(weight.denominator for weight in exact.values()))
    whole = {name: int(weight * scale) for name, weight in exact.items()}
    divisor = math.gcd(*whole.values())
    if sum(whole.values()) // divisor > _LONGEST_PERIOD:
        raise ValueError(
            f"The weights {dict(weights)} repeat only after {sum(whole.values()) // divisor:,} windows; "
            f"round them so that it is {_LONGEST_PERIOD:,} or fewer."
        )
    return {name: weight // divisor for name, weight in whole.items()}


def _fair_order(weights: Sequence[int]) -> list[int]:
    """An order of ``sum(weights)`` places that is within 1 of every share all along.

    Window number ``j`` of a source with share ``w`` may come once ``n w > j`` and must have come by
    ``n = ceil((j + 1) / w)``. Always taking the one that must come first keeps all of these bounds, and after
    a period every count is exact.

    Source: the chairman assignment problem, Tijdeman 1980; as fair scheduling on one processor, Baruah et al.
    1996.
    """
    period, taken, order = sum(weights), [0] * len(weights), []
    for place in range(period):
        ready = [s for s, weight in enumerate(weights) if (place + 1) * weight > taken[s] * period]
        chosen = min(ready, key=lambda s: -(-(taken[s] + 1) * period // weights[s]))
        taken[chosen] += 1
        order.append(chosen)
    return order


@dataclass(frozen=True, eq=False)
class ConversationWindows:
    """Examples packed into windows, each whole and exactly once an epoch; answers alone are predicted.

    The examples are shuffled once and put into windows one after another; what does not fit begins the next
    window, and the rest of the old one is padding. Each epoch visits the windows in another order. Both
    orders follow from the seed.

    Attributes:
        examples: as `encode_example` makes them.
        length: tokens of a window but one.
        seed: decides the orders.

    Raises:
        ValueError: no example, one without an answer, or one that is longer than a window.
    """

    examples: Sequence[EncodedExample]
    length: int
    seed: int

    def __post_init__(self) -> None:
        require_positive_integer("length", self.length)
        if not self.examples:
            raise ValueError("There is no example to put into windows.")
        for place, example in enumerate(self.examples):
            if not example.question or not example.answer:
                raise ValueError(
                    f"Example {place} lacks a question or an answer; both need a token at least."
                )
            if len(example.window) > self.length + 1:
                raise ValueError(
                    f"Example {place} has {len(example.window)} tokens; a window holds {self.length + 1}. "
                    "Leave the example out or take longer windows."
                )

    @cached_property
    def packed(self) -> Int[Tensor, "windows window"]:
        """All windows of an epoch, in the order in which they were filled."""
        generator = torch.Generator().manual_seed(self.seed)
        rows: list[list[int]] = [[]]
        for place in torch.randperm(len(self.examples), generator=generator).tolist():
            window = self.examples[place].window
            if len(rows[-1]) + len(window) > self.length + 1:
                rows.append([])
            rows[-1] += window
        return _padded(rows, self.length + 1)

    def __getitem__(self, index: int) -> Int[Tensor, " window"]:
        """The window of an index, counted from 0."""
        if index < 0:
            raise IndexError(f"The index of the window is {index}; windows are counted from 0.")
        epoch, place = divmod(index, len(self.packed))
        return self.packed[_order(len(self.packed), self.seed, epoch)[place]]

    @property
    def predicted_share(self) -> float:
        """Part of the tokens that is predicted: answers, without questions and padding."""
        return (self.packed[:, 1:] >= 0).double().mean().item()

    def id_range(self) -> tuple[int, int]:
        """Smallest and largest token id in questions and answers."""
        ids = torch.where(self.packed < 0, ~self.packed, self.packed)
        return int(ids.min()), int(ids.max())

    def identity(self) -> dict:
        """Number of windows and their checksum, window length and seed."""
        checksum = zlib.crc32(self.packed.contiguous().numpy().tobytes())
        return {"windows": len(self.packed), "checksum": checksum, "length": self.length, "seed": self.seed}


@lru_cache(maxsize=16)
def _order(windows: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch + 1)
    return torch.randperm(windows, generator=generator).tolist()


def _padded(rows: Sequence[Sequence[int]], length: int) -> Int[Tensor, "rows length"]:
    padded = torch.full((len(rows), length), _PADDING)
    for row, ids in zip(padded, rows, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    return padded


@dataclass(frozen=True)
class AnswerScores:
    """What a model makes of some examples, one entry each.

    Attributes:
        total_loss: cross entropy of the whole answer, in nats.
        tokens: of the answer.
        exact: the most likely token is right at every place of the answer. Greedy decoding then gives exactly
            this answer, and only then.
    """

    total_loss: Float[Tensor, " examples"]
    tokens: Int[Tensor, " examples"]
    exact: Bool[Tensor, " examples"]

    @property
    def loss(self) -> float:
        """Answer loss: mean over all answer tokens, in nats a token."""
        return (self.total_loss.sum() / self.tokens.sum()).item()

    @property
    def accuracy(self) -> float:
        """Part of the examples that are answered exactly."""
        return self.exact.double().mean().item()


@torch.no_grad()
def score_answers(model: Decoder, examples: Sequence[EncodedExample], batch_size: int = 64) -> AnswerScores:
    """Loss and exactness of the given answers. The model is left as it was, training or not.

    Raises:
        ValueError: there is no example.
    """
    if not examples:
        raise ValueError("There is no example to score.")
    training, device = model.training, model.embed_tokens.weight.device
    model.eval()
    parts = []
    for start in range(0, len(examples), batch_size):
        rows = [example.window for example in examples[start : start + batch_size]]
        window = _padded(rows, max(map(len, rows))).to(device)
        logits = model(torch.where(window < 0, ~window, window)[:, :-1])  # (batch, tokens, vocabulary)
        targets = window[:, 1:].clamp(min=-1)
        losses = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-1, reduction="none")
        predicted = targets >= 0
        exact = ((logits.argmax(-1) == targets) | ~predicted).all(1)
        parts.append((losses.double().sum(1).cpu(), predicted.sum(1).cpu(), exact.cpu()))
    model.train(training)
    return AnswerScores(*(torch.cat(part) for part in zip(*parts, strict=True)))


def choice_accuracy(model: Decoder, choices: Sequence[Sequence[EncodedExample]]) -> float:
    """How often the first of several answers has the lowest loss a token; a tie does not count.

    Args:
        model: any decoder.
        choices: for each question as many examples as there are answers to choose from, the right one first.

    Raises:
        ValueError: no question, or a different number of answers, or fewer than two.
    """
    sizes = {len(options) for options in choices}
    if len(sizes) != 1 or min(sizes) < 2:
        raise ValueError(
            f"The questions have {sorted(sizes)} answers; expected one number of answers for all, 2 or more."
        )
    scores = score_answers(model, [option for options in choices for option in options])
    per_token = (scores.total_loss / scores.tokens).view(len(choices), -1)  # (questions, answers)
    return (per_token[:, :1] < per_token[:, 1:]).all(1).double().mean().item()
