"""Two ways of doing something, compared seed by seed: how far apart, how surely, what could have been seen.

Runs of one seed share their data and their start, so that most of the noise cancels in their difference. The
interval is Student's, at 95 %: of true ties it calls one in twenty a difference, with few seeds or many. (A
rule of "more than one standard error" with three seeds calls 42 in a hundred so, one of two errors 18.)

Equality is a claim, too, and not the absence of a difference: it is told by a bound that was named before.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Literal

from ..optional import require

stats = require("scipy.stats", install="minicpm_lite[notebooks]", purpose="compare runs")

__all__ = ["Difference", "difference", "power", "smallest_effect"]

_CONFIDENCE = 0.95

Told = Literal["lower", "higher", "equal", "not told apart"]


@dataclass(frozen=True)
class Difference:
    """The mean difference of paired runs, with the 95 % interval of what it would be over all seeds.

    >>> found = difference([3.1, 3.2, 3.0, 3.3], [3.0, 3.0, 2.9, 3.1])
    >>> print(found, found.tells())
    +0.150 [+0.058, +0.242] higher
    """

    values: tuple[float, ...]
    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"

    def tells(self, bound: float | None = None) -> Told:
        """What the interval tells.

        Args:
            bound: differences up to this count as none; named before the runs.

        Returns:
            "equal" if the whole interval lies within the bound; else "lower" or "higher" if it leaves out 0;
            else "not told apart".
        """
        if bound is not None and -bound <= self.low and self.high <= bound:
            return "equal"
        if self.low <= 0 <= self.high:
            return "not told apart"
        return "lower" if self.mean < 0 else "higher"


def difference(values: Iterable[float], others: Iterable[float]) -> Difference:
    """The first minus the second, run by run of one seed.

    Raises:
        ValueError: fewer than two pairs, not as many of one as of the other, or a number that is not finite.
    """
    values, others = list(values), list(others)
    if len(values) != len(others) or len(values) < 2:
        raise ValueError(
            f"{len(values)} runs and {len(others)} were given; expected as many of one as of the other, two "
            "at least, in the order of their seeds."
        )
    gaps = [value - other for value, other in zip(values, others, strict=True)]
    if not all(map(math.isfinite, gaps)):
        raise ValueError(f"The differences are {gaps}; a run that diverged has none. Report it apart.")
    half = float(stats.t.ppf((1 + _CONFIDENCE) / 2, len(gaps) - 1)) * stdev(gaps) / math.sqrt(len(gaps))
    return Difference(tuple(gaps), mean(gaps), mean(gaps) - half, mean(gaps) + half)


def power(effect: float, spread: float, seeds: int) -> float:
    """How probable it is that `difference` leaves out 0, if the true difference is ``effect``.

    Args:
        effect: the true mean difference.
        spread: standard deviation of the differences from seed to seed, known or guessed before.
        seeds: pairs of runs.
    """
    limit = stats.t.ppf((1 + _CONFIDENCE) / 2, seeds - 1)
    shift = effect / (spread / math.sqrt(seeds))
    return float(stats.nct.sf(limit, seeds - 1, shift) + stats.nct.cdf(-limit, seeds - 1, shift))


def smallest_effect(spread: float, seeds: int, wanted: float = 0.8) -> float:
    """The smallest difference that so many seeds would show with a power of ``wanted``."""
    low, high = 0.0, spread
    while power(high, spread, seeds) < wanted:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if power(middle, spread, seeds) < wanted else (low, middle)
    return high
