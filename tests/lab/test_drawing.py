"""Drawings: what they hold, that they can be read, and what they refuse."""

import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextToPath

from minicpm_lite import lab
from minicpm_lite.lab import style
from minicpm_lite.lab.places import Grid, Place, facing, text_width


@pytest.fixture
def drawing():
    return lab.Drawing("Ids become vectors.")


def parsed(drawing):
    return ElementTree.fromstring(drawing.svg())


def words(drawing):
    return ["".join(text.itertext()) for text in parsed(drawing).iterfind(".//{*}text")]


def test_a_drawing_shows_itself_and_says_what_it_shows(drawing):
    table = drawing.box(100, 10, 110, 40, "embedding", note="8 × 64", tone="blue")
    drawing.arrow(drawing.box(4, 15, 60, 30, "ids"), table)
    assert repr(drawing) == "Drawing: Ids become vectors."
    page = drawing._repr_html_()
    assert 'alt="Ids become vectors."' in page and "<script>" in page and page == drawing._repr_html_()
    assert words(drawing) == ["embedding", "8 × 64", "ids"]
    assert parsed(drawing).get("viewBox") == "0 0 360 54", "it is as high as its parts reach"
    assert style.css_color("blue") in drawing.svg() and "currentColor" in drawing.svg()


def test_a_wide_drawing_scrolls_in_its_own_box_and_can_be_reached_by_keyboard():
    wide = lab.Drawing("Wide.", width=600)
    wide.box(500, 4, 96, 20, "far")
    page = wide._repr_html_()
    assert (
        'tabindex="0" style="overflow-x:auto' in page and "width='600'" in page and "max-width:none" in page
    )


@pytest.mark.parametrize(
    ("draw", "says"),
    [
        (lambda d: lab.Drawing(" "), "alt is ' '; expected a sentence"),
        (lambda d: lab.Drawing("Wide.", width=800), "800 units wide; expected at most 720"),
        (lambda d: d.text(50, 50, "tiny", size=9), "'tiny' has size 9; expected at least 11"),
        (lambda d: d.box(0, 0, 40, 20, "a long label"), r"'a long label' is about \d+ units wide; its box has 40"),
        (lambda d: d.box(0, 0, 40, 20, "a", note="a long note"), "'a long note' is about"),
        (lambda d: d.box(330, 0, 40, 20, "out"), "The box 'out' covers 330 to 370 across"),
        (lambda d: d.text(2, 50, "cut off"), "The text 'cut off' covers"),
        (lambda d: d.line([(0, 0), (400, 0)]), "The line covers 0 to 400"),
        (lambda d: d.arrow((10, 10), (10, 90), bend=-40), "The arrow covers -30"),
        (lambda d: d.box(0, 0, 40, 20, "a", tone="red"), "tone is 'red'; expected one of blue, orange"),
        (lambda d: d.matrix(0, 0, [[1, 2], [3]]), r"The rows have \[2, 1\] cells"),
        (lambda d: d.matrix(0, 0, [[1, 2]], marked=[(0, 0), (1, 0)]), r"The cell is \(1, 0\); expected a row from 0 to 0"),
        (lambda d: d.matrix(0, 0, [[1, 2]], marked=[(0, 2)]), r"\(0, 2\); .* a column from 0 to 1"),
        (lambda d: d.matrix(0, 0, [[1, 2]], marked=[(0, -1)]), r"The cell is \(0, -1\)"),
        (lambda d: d.matrix(0, 0, [[1, 2]], marked=[(0, 0.5)]), r"The cell is \(0, 0.5\)"),
        (lambda d: d.matrix(30, 0, [[1, 2]], rows=["a", "b"]), r"The cell is \(1, 0\)"),
        (lambda d: d.matrix(0, 0, [[0.123]], cell=20), "'0.12' is about .* its cell has 20"),
    ],
)  # fmt: skip
def test_what_could_not_be_read_is_refused(drawing, draw, says):
    with pytest.raises(ValueError, match=says):
        draw(drawing)


def test_marks_of_a_text_are_set_below_and_above_and_the_rest_is_escaped(drawing):
    drawing.text(100, 20, "W_{q} < x^{2}\nnext")
    assert words(drawing) == ["Wq < x2", "next"]
    low, line, high = parsed(drawing).findall(".//{*}tspan")
    assert float(low.get("dy")) > 0 and float(line.get("dy")) < 0 and float(high.get("dy")) < 0
    assert line.get("font-size") is None and low.get("font-size") == high.get("font-size") == "9.4"


@pytest.mark.parametrize(
    "label",
    [
        "query",
        "residual stream",
        "RMSNorm",
        "4 heads of 16",
        "−0.68",
        "1,000",
        "ATTENTION",
        "8 tokens × 64",
        "illicit",
    ],
)
def test_the_width_of_a_text_is_not_taken_for_less_than_that_of_a_wide_font(label):
    real, _, _ = TextToPath().get_text_width_height_descent(
        label, FontProperties(family="DejaVu Sans", size=12), False
    )
    assert 0.97 * real <= text_width(label, 12) <= 1.15 * real


def test_a_matrix_takes_tensors_masks_and_words(drawing):
    grid = drawing.matrix(
        50, 30, torch.tensor([[1.0, -0.5], [0.25, 2.0]]), cell=36, rows=["a", "b"], columns=["c", "d"]
    )
    assert grid == Grid(50, 30, 72, 72, 2, 2) and grid.cell(1, 0) == Place(50, 66, 36, 36)
    assert grid.row(1) == Place(50, 66, 72, 36) and grid.column(1) == Place(86, 30, 36, 72)
    assert words(drawing) == ["1.00", "−0.50", "0.25", "2.00", "a", "b", "c", "d"]
    assert drawing.svg().count(f"fill='{style.css_color('orange')}'") == 1, (
        "the number below zero, which has its sign"
    )
    masked = lab.Drawing("A mask.")
    masked.matrix(0, 0, [[1, None, -math.inf], ["x", 3, math.nan]], marked=[(1, 1)])
    assert words(masked) == ["1", "x", "3", "nan"]
    assert masked.svg().count("<path") == 2, "what is masked is struck out"
    assert masked.svg().count("stroke-width='2.2'") == 1
    causal = lab.Drawing("A causal mask.")
    causal.matrix(0, 0, torch.ones(3, 3).tril().bool())
    assert words(causal) == [] and causal.svg().count("<path") == 3


@pytest.mark.parametrize("values", [
    [[-1.5, 0.25], [0.5, -math.inf]], [[True, False], [True, True]], [[3, -2], [0, 1]],
])  # fmt: skip
@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_a_matrix_is_the_same_in_whatever_its_numbers_are(values, kind):
    whole = kind(values)
    drawn = set()
    for given in (values, whole, list(whole), [list(row) for row in whole], (row for row in whole)):
        drawing = lab.Drawing("A matrix.")
        drawing.matrix(0, 0, given, cell=60)
        drawn.add(drawing.svg())
    assert len(drawn) == 1


def test_a_dial_turns_against_the_clock_and_tints_what_it_swept(drawing):
    drawing.dial(50, 50, 20, math.pi / 2, "m = 1")
    assert "M50 50L62 50A12 12 0 0 0 50 38z" in drawing.svg() and "M50 50 50 30" in drawing.svg()
    more = lab.Drawing("More than a turn.")
    more.dial(50, 50, 20, math.tau + math.pi / 2)
    assert "A12 12 0 0 0 50 38z" in more.svg()


def test_axes_place_values(drawing):
    axes = drawing.axes(
        40, 20, 100, 60, xs=(-4, 4), ys=(-1, 5), x_ticks=[-4, 4], y_ticks={5: "five"}, x_label="g"
    )
    assert axes.point(-4, 5) == (40, 20) and axes.point(0, -1) == (90, 80) and axes.point(4, 2) == (140, 50)
    assert words(drawing) == ["−4", "4", "five", "g"]


def test_a_timeline_has_lanes_with_spans(drawing):
    lanes = {"network": [(0, 2, "send", "purple")], "compute": [(2, 8, "block", "blue")]}
    axes = drawing.timeline(70, 10, 280, lanes, end=8, ticks=[0, 8], label="ms")
    assert axes.point(2, 0)[0] == 140
    assert words(drawing) == ["0", "8", "network", "send", "compute", "block", "ms"]


def test_a_tree_joins_pairs_from_the_leaves_upwards(drawing):
    root = drawing.tree(8, 8, 340, ((("l", "o", "first"), "w"), "er"))
    assert words(drawing) == ["l", "o", "lo", "first", "w", "low", "er", "lower"]
    assert root.y == 8 and drawing.svg().count("<path") == 6, "two lines to each of three pairs"


def test_rows_and_piles(drawing):
    assert drawing.row(10, 20, 30, 20, ["a", "b"]) == [Place(10, 20, 30, 20), Place(44, 20, 30, 20)]
    assert drawing.box(200, 20, 30, 20, "e", pile=3) == Place(200, 20, 30, 20)
    assert "rect x='208' y='12'" in drawing.svg() and words(drawing) == list("abe")
    grounds = drawing.svg().count("fill='var(--ground)'")
    drawing.box(200, 60, 30, 20, "f", solid=True)
    assert drawing.svg().count("fill='var(--ground)'") == grounds + 1
    with pytest.raises(ValueError, match="The pile covers 338 to 368"):
        drawing.box(330, 20, 30, 20, "e", pile=3)


def test_what_is_to_come_is_pale(drawing):
    with drawing.faded():
        drawing.box(0, 0, 40, 20, "later")
    with drawing.faded(False):
        drawing.box(50, 0, 40, 20, "now")
    groups = re.findall(r"<g[^>]*>(?:(?!</g>).)*</g>", drawing.svg())
    assert [("opacity" in group.split(">")[0], "later" in group) for group in groups] == [
        (True, True),
        (False, False),
    ]


def test_a_group_holds_its_places(drawing):
    boxes = drawing.row(60, 30, 30, 20, ["a", "b"])
    frame = drawing.group(*boxes, text="twice", pad=10)
    assert frame == Place(50, 4, 84, 56) and "stroke-dasharray" in drawing.svg()


@pytest.mark.parametrize(
    ("start", "end", "ends"),
    [
        (Place(0, 0, 40, 20), Place(100, 0, 40, 20), ((40, 10), (100, 10), True)),
        (Place(100, 0, 40, 20), Place(0, 30, 40, 20), ((100, 10), (40, 40), True)),
        (Place(0, 0, 100, 20), Place(10, 50, 20, 20), ((20, 20), (20, 50), False)),
        (Place(10, 50, 20, 20), Place(0, 0, 100, 20), ((20, 50), (20, 20), False)),
        (Place(0, 0, 20, 20), Place(30, 90, 20, 20), ((10, 20), (40, 90), False)),
    ],
)
def test_arrows_run_between_sides_that_face_each_other(start, end, ends):
    assert facing(start, end) == ends


def test_an_arrow_goes_around(drawing):
    drawing.arrow((100, 10), (100, 90), "again", bend=-60)
    assert "M100 10L48 10Q40 10 40 18L40 82Q40 90 48 90L94 90" in drawing.svg()
    assert words(drawing) == ["again"]


def test_a_brace_says_what_it_holds(drawing):
    for side in ("top", "bottom", "left", "right"):
        drawing.bracket(Place(100, 60, 80, 40), side, side=side)
    assert words(drawing) == ["top", "bottom", "left", "right"]
