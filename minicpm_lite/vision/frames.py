"""Which frames of a video are read, when they were taken, and how they are put into groups.

A group of frames becomes as many vectors as one picture (see `resampler`), so a long video is read more often
for the same price if its groups are larger:

    short   rate * int(seconds) <= 180 frames    a frame is a group
    longer  ceil(seconds * rate / 180) frames a group, at most 3
    beyond  540 frames, however long: 180 groups of 3

Source: the example code of MiniCPM-V 4.5. The paper (arXiv 2509.18154, section 2.1.1) trains with up to 6
frames a group, at most 1,080 in all and 10 a second.

Choices, and the traps behind them:

- Of as many equal stretches as frames are wanted, each gives the frame in its middle.
- A tick is a tenth of a second, the nearest one to the frame, and of two the earlier. Here it is computed in
  fractions. The example code divides by 0.1 and cuts off, which makes one tick in twenty too small by one.
- A rate above the video's own reads some frames twice, as the release does if the video is long.
"""

import math
from dataclasses import dataclass
from fractions import Fraction

from ..config import require_positive_integer, require_positive_number
from .resampler import TICKS_PER_SECOND

__all__ = ["FramePlan", "plan_frames"]

_MOST_GROUPS = 180
_LARGEST_GROUP = 6


@dataclass(frozen=True)
class FramePlan:
    """What is read of a video.

    Attributes:
        frames: the numbers of the frames, counted from 0, in order.
        ticks: when they were taken, in tenths of a second, group by group: what the resampler asks for.
    """

    frames: tuple[int, ...]
    ticks: tuple[tuple[int, ...], ...]


def plan_frames(
    num_frames: int,
    frames_per_second: float,
    rate: int = 3,
    group: int | None = None,
    largest_group: int = 3,
) -> FramePlan:
    """Choose frames of a video and put them into groups, as MiniCPM-V 4.5 does.

    Args:
        num_frames: of the video.
        frames_per_second: of the video.
        rate: frames to read in a second of it.
        group: frames in each group; left out, as few as the length allows.
        largest_group: to what groups grow where a video is long; it bounds ``group``, too. The example code
            has 3, training went up to 6.

    Raises:
        ValueError: a number that cannot be.

    >>> plan_frames(num_frames=60, frames_per_second=30.0, rate=2, group=2)
    FramePlan(frames=(7, 22, 37, 52), ticks=((2, 7), (12, 17)))
    """
    for name, value in (("num_frames", num_frames), ("rate", rate), ("largest_group", largest_group)):
        require_positive_integer(name, value)
    require_positive_number("frames_per_second", frames_per_second)
    if group is not None:
        require_positive_integer("group", group)
    if largest_group > _LARGEST_GROUP:
        raise ValueError(
            f"largest_group is {largest_group}; the model was trained with at most {_LARGEST_GROUP}."
        )
    speed = Fraction(frames_per_second)
    seconds = num_frames / speed
    if rate * int(seconds) <= _MOST_GROUPS:
        size = 1
        wanted = round(min(rate, round(speed)) * min(_MOST_GROUPS, seconds))
    else:
        size = min(math.ceil(seconds * rate / _MOST_GROUPS), largest_group)
        wanted = min(round(seconds * rate), _MOST_GROUPS * largest_group)
    wanted = max(wanted, 1)  # a video of less than half of a frame's time
    size = size if group is None else min(group, largest_group)
    # the middle of stretch i of n: (i + 1/2) frames / n, in whole numbers
    frames = tuple((2 * i + 1) * num_frames // (2 * wanted) for i in range(wanted))
    last = math.ceil(seconds * TICKS_PER_SECOND) - 1
    ticks = [min(_nearest(frame * TICKS_PER_SECOND / speed), last) for frame in frames]
    return FramePlan(frames, tuple(tuple(ticks[i : i + size]) for i in range(0, wanted, size)))


def _nearest(number: Fraction) -> int:
    """The nearest whole number; of two the smaller."""
    return math.ceil(number - Fraction(1, 2))
