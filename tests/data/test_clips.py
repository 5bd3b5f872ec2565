"""Clips: what moves, moves as it is said; one frame does not tell what takes two."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minicpm_lite.data.assets import load_kenney
from minicpm_lite.data.clips import (
    ACTIONS,
    CHARACTERS,
    Clip,
    Clips,
    Motion,
    describe_clip,
    read_description,
)

CLIPS = Clips(seed=0)
WALKS = [Motion("walk", way, speed) for way, speed in product(("left", "right"), ("slowly", "fast"))]
MOTIONS = [*WALKS, *(Motion(action) for action in ACTIONS if action != "walk")]


def figure(clip: Clip, second: float) -> np.ndarray:
    """Where the figure is: what differs from the picture without one."""
    pixels = np.array(clip.frame(second)).astype(int)
    ground = round(clip.start[1] * clip.side)
    empty = np.zeros_like(pixels) + (214, 232, 245)
    empty[ground:] = (176, 205, 150)
    return (abs(pixels - empty) > 12).any(2)


def place(clip: Clip, second: float) -> tuple[float, float]:
    """The middle of the figure, from the left, and its lowest pixel."""
    rows, columns = np.nonzero(figure(clip, second))
    return (columns.min() + columns.max()) / 2, rows.max()


@given(st.integers(0, 2**40), st.integers(0, 2**31), st.sampled_from([0.5, 2.0, 4.0, 4.5]))
def test_what_holds_for_every_clip(index, seed, seconds):
    clip = Clips(seed, 64, seconds)[index]
    assert clip == Clips(seed, 64, seconds)[index]
    assert 1 <= len(clip.motions) <= 2 and len({motion.action for motion in clip.motions}) == len(
        clip.motions
    )
    for part in (0, 0.31, 0.5, 0.77, 1):
        seen = figure(clip, part * seconds)
        assert seen.sum() > 100  # it is there, and whole:
        assert not seen[:, 0].any() and not seen[:, -1].any()


@pytest.mark.parametrize("motion", WALKS)
def test_a_walk_goes_its_way_at_its_speed(motion):
    start = (0.8, 0.9) if motion.way == "left" else (0.2, 0.9)
    clip = Clip("robot", (motion,), start, 4.0, 96)
    # the same picture of the walk, two seconds apart
    (before, ground), (after, still) = place(clip, 1.0), place(clip, 3.0)
    wanted = {"slowly": 0.05, "fast": 0.15}[motion.speed] * 96 * 2 * (1 if motion.way == "right" else -1)
    assert after - before == pytest.approx(wanted, abs=1.1)
    assert abs(ground - still) <= 1


def test_a_jump_ends_on_the_ground_and_a_climb_above_it():
    for seconds in (1.5, 2.0, 4.0):
        clip = Clip("malePerson", (Motion("jump"), Motion("stand")), (0.5, 0.9), seconds)
        _, ground = place(clip, seconds)
        heights = [ground - place(clip, seconds / 2 * part / 20)[1] for part in range(21)]
        assert max(heights) > 0.2 * 96 and heights[-1] <= 2
    clip = Clip("malePerson", (Motion("climb"), Motion("stand")), (0.5, 0.9), 4.0)
    assert place(clip, 0.0)[1] - place(clip, 4.0)[1] == pytest.approx(0.14 * 96, abs=2)


def test_one_frame_tells_neither_way_nor_speed_nor_order():
    """At the beginning all walks of a figure look the same; and a picture of one order is one of the other."""
    walks = [Clip("zombie", (motion,), (0.5, 0.9)) for motion in WALKS]
    first = [clip.frame(0.0).tobytes() for clip in walks]
    assert len(set(first)) == 1
    later = [clip.frame(2.0).tobytes() for clip in walks]
    assert len(set(later)) == 4
    one, other = (
        Clip("robot", (a, b), (0.5, 0.9))
        for a, b in ((Motion("stand"), Motion("jump")), (Motion("jump"), Motion("stand")))
    )
    seen = [{clip.frame(n / 8).tobytes() for n in range(33)} for clip in (one, other)]
    assert seen[0] == seen[1]


def test_frames_at_a_rate():
    clip = CLIPS[4]
    frames = clip.frames(3)
    assert len(frames) == 12 and frames[5].tobytes() == clip.frame(5 / 3).tobytes()
    assert len(clip.frames(0.1)) == 1


@pytest.mark.parametrize("language", ["en", "zh"])
def test_what_is_described_is_read(language):
    said = set()
    for who in CHARACTERS:
        for motions in [*((one,) for one in MOTIONS), *product(MOTIONS, repeat=2)]:
            if len({motion.action for motion in motions}) < len(motions):
                continue
            sentence = describe_clip(motions, who, language)
            assert read_description(sentence) == (who, motions)
            said.add(sentence)
    assert len(said) == 6 * (7 + 30)


def test_clips_differ_and_show_all_there_is():
    clips = [CLIPS[index] for index in range(600)]
    assert len(set(clips)) == 600
    assert {clip.character for clip in clips} == set(CHARACTERS)
    assert {motion for clip in clips for motion in clip.motions} == set(MOTIONS)
    assert set(load_kenney()) == set(CHARACTERS)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Motion("fly"), "action is 'fly'; expected one of walk, jump, climb, stand."),
        (lambda: Motion("walk"), "a walk has left or right and slowly or fast"),
        (lambda: Motion("walk", "left"), "a walk has left or right and slowly or fast"),
        (lambda: Motion("jump", "left"), "jump has the way 'left'"),
        (lambda: Clips(-1), "seed"),
        (lambda: Clips(0, side=8), "side is 8; a figure needs at least 16 pixels."),
        (lambda: Clips(0, seconds=9.0), "seconds is 9.0; expected 0.5 to 4.5"),
        (lambda: Clips(0, most=3), "most is 3; a figure does one thing or two."),
        (lambda: CLIPS[0].frame(5.0), "The second is 5.0; the clip lasts from 0 to 4."),
        (lambda: CLIPS[0].frames(0), "rate is 0"),
        (lambda: describe_clip([Motion("jump")], "robot", "de"), "expected one of en, zh"),
        (lambda: read_description("The robot flies."), "'The robot flies.' describes no clip"),
    ],
)
def test_what_cannot_be_is_refused(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


@pytest.mark.parametrize("index", [-1, True, 1.0])
def test_no_index(index):
    with pytest.raises(IndexError, match="clips are counted from 0"):
        CLIPS[index]
