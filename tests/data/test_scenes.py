"""Scenes: a function of seed and index, drawn where they say, none over another."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minicpm_lite.data.assets import load_emoji
from minicpm_lite.data.scenes import COLOURS, SCENE_KINDS, Scenes, Thing

SCENES = Scenes(seed=0)


def inside(box: tuple[int, int, int, int], other: tuple[int, int, int, int]) -> bool:
    return box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3]


def box_of(thing: Thing) -> tuple[int, int, int, int]:
    return thing.left, thing.top, thing.left + thing.side, thing.top + thing.side


@given(st.integers(0, 2**40), st.integers(0, 2**31), st.sampled_from([(192, 48), (96, 32), (128, 16)]))
def test_what_holds_for_every_scene(index, seed, sizes):
    side, cell = sizes
    scene = Scenes(seed, side, cell)[index]
    assert scene == Scenes(seed, side, cell)[index] and scene.side == side
    assert 1 <= len(scene.things) <= 6
    boxes = [box_of(thing) for thing in scene.things]
    if scene.text is not None:
        left, top, width, height = scene.sign
        boxes.append((left, top, left + width, top + height))
        assert 2 <= len(scene.text) <= 4 and scene.text.isascii() and scene.text.isalnum()
    assert all(min(box) >= 0 and max(box) <= side for box in boxes)
    assert not any(inside(one, other) for one, other in combinations(boxes, 2))
    for thing in scene.things:
        assert thing.colour in dict(SCENE_KINDS[thing.kind].pictures)


def test_scenes_are_those_they_were():
    """So that what was trained on them can be trained again."""
    assert SCENES[0].things[0] == Thing(**FIRST)
    assert [len(SCENES[index].things) for index in range(12)] == COUNTS


FIRST = {"kind": "ship", "colour": None, "left": 48, "top": 0, "side": 48}
COUNTS = [6, 4, 3, 2, 5, 4, 3, 2, 3, 2, 1, 5]


def test_scenes_differ():
    assert len({SCENES[index] for index in range(500)}) > 490  # one small thing may stand twice in one place
    assert Scenes(1)[0] != SCENES[0]
    signs = sum(SCENES[index].text is not None for index in range(2000)) / 2000
    assert 0.2 < signs < 0.3
    seen = {thing.kind for index in range(2000) for thing in SCENES[index].things}
    assert seen == set(SCENE_KINDS)


def test_every_kind_has_a_picture_and_names_of_its_own():
    captions = {each.english for each in load_emoji()}
    pictures = [name for kind in SCENE_KINDS.values() for _, name in kind.pictures]
    assert set(pictures) <= captions and len(set(pictures)) == len(pictures)
    for names in (
        [kind.chinese for kind in SCENE_KINDS.values()],
        [kind.plural for kind in SCENE_KINDS.values()],
    ):
        assert len(set(names)) == len(names)
    for kind in SCENE_KINDS.values():
        colours = [colour for colour, _ in kind.pictures]
        assert colours == [None] or (set(colours) <= set(COLOURS) and len(set(colours)) == len(colours))


def test_things_are_drawn_where_they_are():
    for index in range(20):
        scene = SCENES[index]
        pixels = np.array(scene.draw())
        assert pixels.shape == (192, 192, 3)
        painted = (pixels < 250).any(2)
        allowed = np.zeros_like(painted)
        for thing in scene.things:
            left, top, right, bottom = box_of(thing)
            allowed[top:bottom, left:right] = True
            assert painted[top:bottom, left:right].mean() > 0.1
        if scene.sign:
            left, top, width, height = scene.sign
            allowed[top : top + height, left : left + width] = True
            assert painted[top : top + height, left : left + width].mean() > 0.05
        assert not painted[~allowed].any()


def test_what_stands_on_a_sign_is_drawn():
    """Other letters are other pixels, and only those on the sign."""
    scene = next(SCENES[index] for index in range(100) if SCENES[index].text)
    other = type(scene)(scene.things, "WW", scene.sign, scene.side)
    differs = (np.array(scene.draw()) != np.array(other.draw())).any(2)
    left, top, width, height = scene.sign
    assert differs.any()
    differs[top : top + height, left : left + width] = False
    assert not differs.any()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (dict(seed=-1), "seed"),
        (dict(side=100), "side is 100 and cell 48; expected cells of at least 16 pixels"),
        (dict(side=24, cell=8), "side is 24 and cell 8; expected cells of at least 16 pixels"),
        (dict(side=96), "6 things and a sign need 8 cells; there are 4."),
        (dict(signs=1.5), "signs is 1.5; expected a share from 0 to 1."),
        (dict(kinds=["dog", "dragon"]), "There is no kind 'dragon'"),
        (dict(kinds=["dog"]), "There is only one kind"),
        (dict(most=0), "most is 0; expected a whole number of at least 1."),
    ],
)
def test_what_cannot_be_is_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        Scenes(**{"seed": 0, **settings})


@pytest.mark.parametrize("index", [-1, True, 1.0, "0"])
def test_no_index(index):
    with pytest.raises(IndexError, match="scenes are counted from 0"):
        SCENES[index]
