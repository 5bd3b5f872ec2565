"""Mixtures: several sequences of windows as one, in exact proportions that change from stage to stage.

    share(s) = weight(s) / sum of weights
    | windows of s among the first n  -  n share(s) |  <  1        for every n

`MixtureWindows` is such a sequence; `going_on` makes the one of a run that starts where another one stopped,
such as a decay, in which each source is read on where the other run left it.

Source: the chairman assignment problem, Tijdeman 1980; as fair scheduling on one processor, Baruah et al.
1996.

Choices and traps:

- Weights count windows. A window of conversations predicts fewer tokens than one of prose, so its part of the
  loss, a mean over predicted tokens, is smaller than its weight.
- Rounding each source's count on its own does not do for three sources: counts then fall again, or the sum
  is off by one. The order of a period is therefore found by deadlines (`_fair_order`).
- Two deadlines can be equal. Were it left to the order in which the sources are given, options in another
  order would read other windows. So ties go to the source of which more was read in the stages before, and
  among equals by what the sources hold. Names, which may be paths of folders, decide nothing.
- Two sources hold the same if their identities are equal. Shards of the same tokens in files of another size
  have another one (see `windows`), and are neither found to be given twice nor recognised in a decay.
"""

import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

from jaxtyping import Int
from torch import Tensor

from .windows import Windows

__all__ = ["MixtureWindows", "going_on", "noted_tokenizers", "require_one_tokenizer"]

_LONGEST_PERIOD = 100_000


@dataclass(frozen=True, eq=False)
class MixtureWindows:
    """Several sequences of windows, drawn from in exact proportions that change from stage to stage.

    After any number of windows of a stage, the count of each source is less than 1 away from its weight times
    that number. Each source is read in its own order, without a gap or a repeat, also from one stage to the
    next. Any index is found by a look-up, so a resumed run replays nothing. What is read does not depend on
    the names of the sources, nor on the order in which they are given.

    Attributes:
        sources: a name for each sequence; all of one window length.
        stages: the index of a stage's first window, and the weights of its sources by name. The first stage
            begins at 0. Weights are relative numbers or fractions; sources that are left out have weight 0.
            Decimal numbers are taken as they are written: 0.1 is a tenth.

    Raises:
        ValueError: no source, sources of different window length or cut with different tokenizers, two that
            hold the same windows, be it in a mixture of their own, no stage, stages out of order, a weight
            that is negative, not finite or of an unknown source, no positive weight, or weights so odd that
            they repeat only after more than 100,000 windows.

    >>> import torch
    >>> from minicpm_lite.data.windows import TokenWindows
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
    stages: Iterable[tuple[int, Mapping]]

    def __post_init__(self) -> None:
        object.__setattr__(self, "sources", dict(self.sources))
        object.__setattr__(self, "stages", tuple(self.stages))
        if not self.sources:
            raise ValueError("The mixture has no source; give at least one sequence of windows with a name.")
        lengths = {name: source.length for name, source in self.sources.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(
                f"The sources have windows of different length ({lengths}); cut all of them to one length."
            )
        gone = {name for name, source in self.sources.items() if isinstance(source, _Gone)}
        read = {"sources": [self.sources[name].identity() for name in gone]}
        given = {name: self.sources[name].identity() for name in self.sources if name not in gone}
        require_one_tokenizer(given | {"what was read before": read})
        names: dict[str, str] = {}
        for name in (*gone, *given):
            for content in map(_content, _innermost(self.sources[name].identity())):
                other = names.setdefault(content, name)
                if other in gone and name not in gone:
                    raise ValueError(
                        f"The source {name!r} holds windows that were read before in another place, by "
                        "themselves or in another mixture, and would read them again. Give them as they were "
                        "given there."
                    )
                if other != name:
                    raise ValueError(
                        f"The sources {other!r} and {name!r} hold the same windows; give them once, with one "
                        "weight."
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
    def _contents(self) -> dict[str, str]:
        """What each source holds, as a text, so that it can be compared and sorted."""
        return {name: _content(source.identity()) for name, source in self.sources.items()}

    @cached_property
    def _by_content(self) -> list[str]:
        """The names of the sources in an order that does not depend on the names."""
        return sorted(self.sources, key=self._contents.__getitem__)

    @cached_property
    def _stages(self) -> list["_Stage"]:
        stages: list[_Stage] = []
        for start, weights in self.stages:
            before = stages[-1].counts(start) if stages else dict.fromkeys(self.sources, 0)
            whole = _whole_weights(weights, self.sources)
            first_in_ties = sorted(self._by_content, key=lambda name: -before[name])
            order = _fair_order({name: whole[name] for name in first_in_ties})
            stages.append(_Stage(start, before, whole, order))
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
        lows, highs = zip(*(source.id_range() for source in self.sources.values()), strict=True)
        return min(lows), max(highs)

    def identity(self) -> dict:
        """Identities of the sources, sorted, and for each stage its start and whole weights in that order."""
        return {
            "sources": [self.sources[name].identity() for name in self._by_content],
            "stages": [
                [stage.start, [stage.weights[name] for name in self._by_content]] for stage in self._stages
            ],
        }


def going_on(text: Mapping, start: int, sources: Mapping[str, Windows], weights: Mapping) -> MixtureWindows:
    """The mixture of a run that starts where another run stopped: each source goes on where that one left it.

    Sources are recognised by what they hold, whatever their names; a mixture as the whole that it is. One
    that was read and is not given any more is counted as read; one that is new begins at its first window.

    Args:
        text: identity of the other run's windows, of one sequence or of a mixture, as its checkpoint has it.
        start: windows that the other run had read; the index at which the new mixture begins.
        sources: a name for each sequence.
        weights: of the sources, from ``start`` on.

    Raises:
        ValueError: as `MixtureWindows`; or windows were read in one mixture and are given by themselves or
            in another one.

    >>> import torch
    >>> from minicpm_lite.data.windows import TokenWindows
    >>> novels = TokenWindows(torch.zeros(100).long(), length=4, seed=0)
    >>> chats = TokenWindows(torch.ones(100).long(), length=4, seed=0)
    >>> decay = going_on(novels.identity(), 6, {"old": novels, "new": chats}, {"old": 1, "new": 1})
    >>> [decay.locate(index) for index in range(6, 10)]
    [('old', 6), ('new', 0), ('old', 7), ('new', 1)]
    """
    names = {_content(source.identity()): name for name, source in sources.items()}
    taken_apart = "sources" in text and _content(text) not in names
    past, stages = (text["sources"], text["stages"]) if taken_apart else ([text], [(0, [1])])
    read = {names.get(_content(known), _content(known)): known for known in past}
    length = next(iter(sources.values())).length
    gone = {name: _Gone(known, length) for name, known in read.items() if name not in sources}
    before = [(begin, dict(zip(read, shares, strict=True))) for begin, shares in stages if begin < start]
    return MixtureWindows({**sources, **gone}, [*before, (start, weights)])


def require_one_tokenizer(identities: Mapping[str, Mapping]) -> None:
    """Refuse windows of tokens that different tokenizers made, where it was noted: one model knows one.

    Args:
        identities: of windows, or of mixtures of them, each with the name that the sentence gives it.

    Raises:
        ValueError: a sentence with the names.

    >>> require_one_tokenizer({"novels": {"tokenizer": 7}, "chats": {}, "tales": {"tokenizer": 8}})
    Traceback (most recent call last):
    ValueError: novels and tales were cut with different tokenizers; one model knows one.
    """
    names: dict[int, str] = {}
    for name, identity in identities.items():
        for tokenizer in noted_tokenizers(identity):
            names.setdefault(tokenizer, name)
    if len(names) > 1:
        raise ValueError(
            f"{' and '.join(names.values())} were cut with different tokenizers; one model knows one."
        )


def noted_tokenizers(identity: Mapping) -> list[int]:
    """The checksums of tokenizers that windows note, or the sources of a mixture, which may be mixtures."""
    if "sources" in identity:
        sources = [source for source in identity["sources"] if isinstance(source, Mapping)]
        return [tokenizer for source in sources for tokenizer in noted_tokenizers(source)]
    return [] if identity.get("tokenizer") is None else [identity["tokenizer"]]


@dataclass(frozen=True)
class _Gone:
    """Windows that an earlier run read and this one does not have: they count."""

    known: dict
    length: int

    def __getitem__(self, index: int) -> Int[Tensor, " window"]:
        raise ValueError(f"Window {index} of this source was read by an earlier run; it is not given here.")

    def id_range(self) -> tuple[int, int]:
        """None of its ids is read: a range that widens no other."""
        return sys.maxsize, -1

    def identity(self) -> dict:
        return self.known


def _innermost(identity: Mapping) -> Iterator[Mapping]:
    """What a mixture, or a mixture in it, is made of; anything else itself."""
    if {"sources", "stages"} <= identity.keys():
        for source in identity["sources"]:
            yield from _innermost(source)
    else:
        yield identity


def _content(identity: Mapping) -> str:
    return json.dumps(identity, sort_keys=True)


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


def _whole_weights(weights: Mapping, sources: Mapping[str, Windows]) -> dict[str, int]:
    """The smallest whole numbers in the given proportions, one for each source."""
    unknown = sorted(set(weights) - set(sources))
    if unknown:
        raise ValueError(f"There is no source {unknown[0]!r} to weigh; the sources are {sorted(sources)}.")
    for name, weight in weights.items():
        number = isinstance(weight, int | float | Fraction) and not isinstance(weight, bool)
        if not number or not 0 <= weight < math.inf:
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


def _fair_order(weights: Mapping[str, int]) -> list[str]:
    """An order of ``sum(weights)`` places that is within 1 of every share all along.

    Window number ``j`` of a source with share ``w`` may come once ``n w > j`` and must have come by
    ``n = ceil((j + 1) / w)``. Always taking the one that must come first keeps all of these bounds, and after
    a period every count is exact. Of several that must have come by the same place, the first in ``weights``
    is taken.
    """
    period, taken, order = sum(weights.values()), dict.fromkeys(weights, 0), []
    for place in range(period):
        ready = [name for name, weight in weights.items() if (place + 1) * weight > taken[name] * period]
        chosen = min(ready, key=lambda name: -(-(taken[name] + 1) * period // weights[name]))
        taken[chosen] += 1
        order.append(chosen)
    return order
