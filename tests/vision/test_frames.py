"""The plan of a video's frames beside the released recipe, and what holds for every plan."""

import math
import random
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial import cKDTree

from minicpm_lite.vision.frames import FramePlan, plan_frames


def in_floats(num_frames: int, speed: float, rate: int, force: int | None = None) -> tuple:
    """The recipe as it is described, in floating-point numbers and with a search for the nearest tick."""
    seconds = num_frames / speed
    if rate * int(seconds) <= 180:
        size, wanted = 1, round(min(rate, round(speed)) * min(180, seconds))
    else:
        size = math.ceil(seconds * rate / 180)
        size, wanted = (size, round(seconds * rate)) if size <= 3 else (3, 540)
    gap = num_frames / wanted
    frames = np.array([int(i * gap + gap / 2) for i in range(wanted)])
    size = min(force, 3) if force else size
    _, ticks = cKDTree(np.arange(0, seconds, 0.1)[:, None]).query((frames / speed)[:, None])
    return frames.tolist(), [ticks[i : i + size].tolist() for i in range(0, wanted, size)]


def test_equal_to_the_recipe_in_floats():
    """Frames and ticks may differ by one only where the exact number lies on the border, which floats miss."""
    draw, compared, total, moved = random.Random(0), 0, 0, 0
    while compared < 10_000:
        speed = draw.choice([24, 25, 30, 60, 23.976, 29.97, 15, 10, draw.uniform(1, 120)])
        num_frames = max(1, int(2 ** draw.uniform(-2, 9) * speed))
        rate, force = draw.choice([1, 2, 3, 5, 10]), draw.choice([None, None, 1, 2, 3, 6])
        if num_frames / speed * rate < 0.51:
            continue  # the recipe finds no frame, and divides by 0
        frames, ticks = in_floats(num_frames, speed, rate, force)
        plan = plan_frames(num_frames, speed, rate, force)
        assert [len(group) for group in plan.ticks] == [len(group) for group in ticks]
        compared += 1
        total += len(frames)
        flat, ours = sum(ticks, []), sum(plan.ticks, ())
        for i in np.flatnonzero((np.array(frames) != plan.frames) | (np.array(flat) != ours)):
            moved += 1
            if frames[i] != plan.frames[i]:  # and so their ticks
                assert abs(frames[i] - plan.frames[i]) == 1
                assert (2 * int(i) + 1) * num_frames % (2 * len(frames)) == 0
            else:
                assert abs(flat[i] - ours[i]) == 1
                exact = Fraction(plan.frames[i]) * 10 / Fraction(speed)
                assert abs(exact % 1 - Fraction(1, 2)) < 1e-9
    assert moved < total / 100


@pytest.mark.parametrize(
    ("video", "settings", "count", "groups"),
    [
        ((180, 30.0), dict(rate=2), 12, [1] * 12),  # six seconds
        ((180, 30.0), dict(rate=2, group=6, largest_group=6), 12, [6, 6]),  # 128 vectors, as published
        ((180, 30.0), dict(rate=2, group=6), 12, [3] * 4),  # the example code has no larger ones
        ((60 * 30, 30.0), dict(), 180, [1] * 180),
        ((61 * 30, 30.0), dict(), 183, [2] * 91 + [1]),
        ((180 * 30, 30.0), dict(), 540, [3] * 180),
        ((3600 * 30, 30.0), dict(), 540, [3] * 180),  # an hour
        ((3600 * 30, 30.0), dict(largest_group=6), 1080, [6] * 180),
        ((100, 1.0), dict(rate=10), 540, [3] * 180),  # more than there are: some twice
        ((1, 30.0), dict(), 1, [1]),
    ],
)
def test_counts(video, settings, count, groups):
    plan = plan_frames(*video, **settings)
    assert len(plan.frames) == count
    assert [len(group) for group in plan.ticks] == groups


def test_the_middle_of_each_stretch():
    assert plan_frames(8, 4.0, rate=2) == FramePlan((1, 3, 5, 7), ((2,), (7,), (12,), (17,)))


@given(
    st.integers(1, 10**6),
    st.floats(0.1, 240.0),
    st.integers(1, 30),
    st.none() | st.integers(1, 8),
    st.integers(1, 6),
)
def test_what_holds_for_every_plan(num_frames, speed, rate, group, largest):
    plan = plan_frames(num_frames, speed, rate, group, largest)
    ticks = sum(plan.ticks, ())
    assert len(ticks) == len(plan.frames) <= 180 * largest
    assert all(
        0 <= a <= b < num_frames for a, b in zip(plan.frames, plan.frames[1:] + plan.frames[-1:], strict=True)
    )
    assert list(ticks) == sorted(ticks) and ticks[0] >= 0
    assert all(1 <= len(each) <= largest for each in plan.ticks)
    assert len({len(each) for each in plan.ticks[:-1]}) <= 1
    seconds = num_frames / speed
    for frame, tick in zip(plan.frames, ticks, strict=True):
        assert tick / 10 < seconds or tick == 0
        assert abs(frame / speed - tick / 10) <= 0.05 + 1e-9 or tick == math.ceil(seconds * 10) - 1


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (dict(num_frames=0), "num_frames is 0; expected a whole number of at least 1."),
        (dict(frames_per_second=0.0), "frames_per_second is 0.0"),
        (dict(frames_per_second=float("nan")), "frames_per_second is nan"),
        (dict(rate=1.5), "rate is 1.5; expected a whole number of at least 1."),
        (dict(group=0), "group is 0; expected a whole number of at least 1."),
        (dict(largest_group=7), "largest_group is 7; the model was trained with at most 6."),
    ],
)
def test_what_cannot_be_is_refused(given, sentence):
    with pytest.raises(ValueError, match=sentence):
        plan_frames(**{"num_frames": 90, "frames_per_second": 30.0, **given})
