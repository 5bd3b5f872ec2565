"""Two ways of doing something, compared seed by seed: how far apart, how surely, what could have been seen.

Runs of one seed share their data and their start, so that most of the noise cancels in their difference. The
interval is Student's, at 95 %: of true ties it calls one in twenty a difference, with few seeds or many. (A
rule of "more than one standard error" with three seeds calls 42 in a hundred so, one of two errors 18.)

Equality is a claim, too, and not the absence of a difference: it is told by a bound that was named before.
"""

import math
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from statistics import mean, stdev
from types import ModuleType
from typing import Literal

from ..config import require_positive_integer, require_positive_number
from ..optional import require

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

        Raises:
            ValueError: the bound is not a finite number above 0.
        """
        if bound is not None:
            require_positive_number("bound", bound)
        if bound is not None and -bound <= self.low and self.high <= bound:
            return "equal"
        if self.low <= 0 <= self.high:
            return "not told apart"
        return "lower" if self.mean < 0 else "higher"


def difference(values: Iterable[float], others: Iterable[float]) -> Difference:
    """The first minus the second, run by run of one seed.

    Raises:
        ValueError: fewer than two pairs, not as many of one as of the other, or a number that is not finite;
            or a text, a table or a set, of which nothing says which run belongs to which.
    """
    for runs in (values, others):
        if isinstance(runs, Mapping | Set | str):
            raise ValueError(
                f"Runs were given as a {type(runs).__name__}; expected a list of their numbers, in the order "
                "of their seeds."
            )
    values, others = list(values), list(others)
    if len(values) != len(others) or len(values) < 2:
        raise ValueError(
            f"{len(values)} runs and {len(others)} were given; expected as many of one as of the other, two "
            "at least, in the order of their seeds."
        )
    gaps = [float(value) - float(other) for value, other in zip(values, others, strict=True)]
    if not all(map(math.isfinite, gaps)):
        raise ValueError(f"The differences are {gaps}; a run that diverged has none. Report it apart.")
    half = _student_limit(len(gaps)) * stdev(gaps) / math.sqrt(len(gaps))
    return Difference(tuple(gaps), mean(gaps), mean(gaps) - half, mean(gaps) + half)


def power(effect: float, spread: float, seeds: int) -> float:
    """How probable it is that `difference` leaves out 0, if the true difference is ``effect``.

    It is the probability for each deviation that the runs may happen to show, averaged over these.

    Args:
        effect: the true mean difference.
        spread: standard deviation of the differences from seed to seed, known or guessed before.
        seeds: pairs of runs.

    Raises:
        ValueError: an effect that is not finite, a spread that is not above 0, or fewer than two seeds.
    """
    if not math.isfinite(effect):
        raise ValueError(f"effect is {effect!r}; expected a finite number.")
    require_positive_number("spread", spread)
    require_positive_integer("seeds", seeds)
    if seeds < 2:
        raise ValueError("seeds is 1; at least two pairs of runs are needed to tell a difference.")
    special, limit = _scipy("special"), _student_limit(seeds)
    shift = abs(effect) / (spread / math.sqrt(seeds))

    # Not by scipy's noncentral t, which gives nan for a large shift.
    def seen(above: float) -> float:
        """The probability under the deviation that runs exceed with this one."""
        half = limit * math.sqrt(2 * special.gammainccinv((seeds - 1) / 2, above) / (seeds - 1))
        return special.ndtr(shift - half) + special.ndtr(-shift - half)

    # a large effect is missed where the deviation is the rarest, in a corner that must be looked into
    return float(_scipy("integrate").quad(seen, 0, 1, points=(1e-9, 1e-6, 1e-3))[0])


def smallest_effect(spread: float, seeds: int, wanted: float = 0.8) -> float:
    """The smallest difference that so many seeds would show with a power of ``wanted``.

    Raises:
        ValueError: ``wanted`` is not a probability above the 5 % of true ties; or as `power` says.
    """
    if not 1 - _CONFIDENCE < wanted < 1:
        raise ValueError(
            f"wanted is {wanted!r}; expected a probability between {1 - _CONFIDENCE:.2f}, which a true tie "
            "has, and 1."
        )
    low, high = 0.0, spread
    while power(high, spread, seeds) < wanted:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if power(middle, spread, seeds) < wanted else (low, middle)
    return high


def _student_limit(seeds: int) -> float:
    """What Student's t of so many seeds exceeds, on either side, in one true tie of twenty."""
    return float(_scipy("special").stdtrit(seeds - 1, (1 + _CONFIDENCE) / 2))


def _scipy(module: str) -> ModuleType:
    """Imported at the first comparison, because every chapter imports lab, and few compare."""
    return require(f"scipy.{module}", install="minicpm_lite[notebooks]", purpose="compare runs")
