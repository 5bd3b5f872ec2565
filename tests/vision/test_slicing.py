"""Slicing equals the released rule, for every size."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from minicpm_lite.vision.slicing import SlicePlan, plan_slices, slice_image

RELEASED = [  # max_slices, image; overview, grid, refined, slice: made by running the released functions
    (9, (1, 1), (448, 448), None, None, None),
    (9, (50, 1000), (98, 2002), None, None, None),
    (9, (300, 700), (294, 686), (1, 2), (420, 952), (420, 476)),
    (9, (448, 448), (448, 448), None, None, None),
    (9, (449, 448), (448, 448), (2, 1), (644, 630), (322, 630)),
    (9, (448, 449), (448, 448), (1, 2), (630, 644), (630, 322)),
    (9, (500, 375), (518, 392), None, None, None),
    (9, (512, 512), (448, 448), (1, 2), (630, 644), (630, 322)),
    (9, (640, 480), (518, 392), (2, 1), (728, 546), (364, 546)),
    (9, (480, 640), (392, 518), (1, 2), (546, 728), (546, 364)),
    (9, (633, 634), (448, 448), (1, 2), (630, 644), (630, 322)),
    (9, (634, 633), (448, 448), (2, 1), (644, 630), (322, 630)),
    (9, (634, 634), (448, 448), (2, 2), (896, 896), (448, 448)),
    (9, (800, 600), (518, 392), (2, 2), (1036, 784), (518, 392)),
    (9, (1000, 100), (1414, 140), None, None, None),
    (9, (1024, 768), (518, 392), (2, 2), (1036, 784), (518, 392)),
    (9, (1080, 1920), (336, 602), (2, 4), (952, 1680), (476, 420)),
    (9, (1098, 1098), (448, 448), (3, 2), (1092, 1092), (364, 546)),
    (9, (1185, 1185), (448, 448), (3, 2), (1092, 1092), (364, 546)),
    (9, (1200, 1200), (448, 448), (3, 3), (1344, 1344), (448, 448)),
    (9, (1280, 720), (602, 336), (3, 2), (1470, 812), (490, 406)),
    (9, (1344, 448), (770, 252), (3, 1), (1344, 448), (448, 448)),
    (9, (1344, 896), (546, 364), (3, 2), (1344, 896), (448, 448)),
    (9, (1344, 1344), (448, 448), (3, 3), (1344, 1344), (448, 448)),
    (9, (1920, 1080), (602, 336), (4, 2), (1680, 952), (420, 476)),
    (9, (2000, 500), (896, 224), (4, 1), (1792, 448), (448, 448)),
    (9, (2480, 3508), (378, 532), (2, 4), (1064, 1512), (532, 378)),
    (9, (4032, 448), (1344, 154), (9, 1), (4032, 448), (448, 448)),
    (9, (448, 4032), (154, 1344), (1, 9), (448, 4032), (448, 448)),
    (9, (4000, 3000), (518, 392), (3, 3), (1554, 1176), (518, 392)),
    (9, (3, 5000), (14, 18284), None, None, None),
    (9, (10000, 37), (7294, 28), (3, 1), (12684, 42), (4228, 42)),
    (1, (1344, 1344), (448, 448), None, None, None),
    (2, (1344, 1344), (448, 448), (1, 2), (630, 644), (630, 322)),
    (2, (900, 448), (630, 322), (2, 1), (896, 448), (448, 448)),
    (4, (1920, 1080), (602, 336), (3, 1), (1050, 588), (350, 588)),
    (6, (1344, 1344), (448, 448), (3, 2), (1092, 1092), (364, 546)),
]


def released_plan(processor, width: int, height: int, max_slices: int, side: int = 448) -> tuple:
    """What transformers' processor of MiniCPM-V 4.6 says, with the patches of the earlier releases.

    It takes height before width, and multiplies its patches by 4.
    """
    grid = processor.get_sliced_grid((height, width), max_slices, side)
    overview = processor.find_best_resize((height, width), side, 3.5, "16x", grid is None)
    if grid is None:
        return overview[::-1], None, None
    refined = processor.get_refine_size((height, width), grid, side, 3.5, "16x", True)
    return overview[::-1], tuple(grid[::-1]), refined[::-1]


@pytest.fixture(scope="module")
def processor():
    return pytest.importorskip("transformers").MiniCPMV4_6ImageProcessorPil()


@pytest.mark.parametrize(("max_slices", "image", "overview", "grid", "refined", "piece"), RELEASED)
def test_the_released_functions_give_the_same(max_slices, image, overview, grid, refined, piece):
    assert plan_slices(*image, max_slices) == SlicePlan(overview, grid, refined, piece)


def test_equal_to_the_released_rule_for_drawn_sizes(processor):
    draw = random.Random(0)
    cut = 0
    for _ in range(12_000):
        # spread evenly over the logarithm, so that thin and tiny pictures come as often as large ones
        width, height = (int(2 ** draw.uniform(0, 14)) for _ in range(2))
        max_slices = draw.choice((1, 2, 3, 4, 6, 9, 9, 9, 16, 36))
        plan = plan_slices(width, height, max_slices)
        assert (plan.overview, plan.grid, plan.refined) == released_plan(processor, width, height, max_slices)
        cut += plan.grid is not None
    assert cut > 2_000


def test_equal_to_the_released_rule_for_squares_and_thin_and_prime_sizes(processor):
    primes = [n for n in range(2, 3000) if all(n % d for d in range(2, math.isqrt(n) + 1))]
    sizes = [(side, side) for side in range(1, 2000, 7)]  # where every grid has a twin that ties
    sizes += [(side, side + off) for side in range(440, 1400, 23) for off in (-1, 1)]
    sizes += [(448 * m, 448 * n) for m in range(1, 10) for n in range(1, 10)]
    sizes += list(zip(primes, primes[::-1], strict=True))
    sizes += [(1, 5000), (5000, 1), (3, 5000), (20_000, 3), (3, 20_000), (300_000, 1), (1, 300_000)]
    for width, height in sizes:
        for max_slices in (9, 16):
            plan = plan_slices(width, height, max_slices)
            found = plan.overview, plan.grid, plan.refined
            assert found == released_plan(processor, width, height, max_slices), (width, height)


def naive_round_down(width, height, max_slices=9):
    return _variant(width, height, max_slices, snap=lambda x, step: max(int(x // step) * step, step))


def naive_differences(width, height, max_slices=9):
    return _variant(width, height, max_slices, log=lambda m, n: math.log(m) - math.log(n))


def naive_last_of_equals(width, height, max_slices=9):
    return _variant(width, height, max_slices, reverse=True)


def naive_width_first(width, height, max_slices=9):
    def fit(w, h, snap):
        wide = int(448 * math.sqrt(w / h))
        return snap(wide, 14), snap(int(wide * h / w), 14)

    return _variant(width, height, max_slices, fit=fit)


def naive_rows_first(width, height, max_slices=9):
    plan = _variant(height, width, max_slices)
    return plan[0][::-1], plan[1], plan[2] and plan[2][::-1]


def _variant(width, height, max_slices, snap=None, log=None, fit=None, reverse=False):
    """The rule in other words, with a place for each mistake."""
    snap = snap or (lambda x, step: max(round(x / step) * step, step))
    log = log or (lambda m, n: math.log(m / n))

    def right_fit(w, h, snap):
        high = int(448 / math.sqrt(w / h))
        return snap(int(high * (w / h)), 14), snap(high, 14)

    fit = fit or right_fit
    many = min(math.ceil(width * height / 448**2), max_slices)
    if many <= 1:
        return fit(width, height, snap), None, None
    best = None
    for k in (many - 1, many, many + 1):
        for m in range(1, k + 1):
            if k == 1 or k > max_slices or k % m:
                continue
            error = abs(math.log(width / height) - log(m, k // m))
            if best is None or error < best[0] or (reverse and error == best[0]):
                best = error, (m, k // m)
    m, n = best[1]
    piece = fit(snap(width, m) / m, snap(height, n) / n, snap)
    return fit(width, height, snap), (m, n), (piece[0] * m, piece[1] * n)


def test_the_rule_in_other_words_is_the_same():
    draw = random.Random(1)
    for _ in range(3000):
        width, height = draw.randint(1, 4000), draw.randint(1, 4000)
        plan = plan_slices(width, height)
        assert (plan.overview, plan.grid, plan.refined) == _variant(width, height, 9)


@pytest.mark.parametrize(
    "wrong",
    [naive_round_down, naive_differences, naive_last_of_equals, naive_width_first, naive_rows_first],
)
def test_common_mistakes_are_told_apart(wrong):
    """Each differs from the released vectors somewhere, so that the vectors would find it."""
    assert any(
        wrong(*image, max_slices) != (overview, grid, refined)
        for max_slices, image, overview, grid, refined, _ in RELEASED
    )


@given(
    st.integers(1, 20_000), st.integers(1, 20_000), st.integers(1, 12), st.sampled_from([(448, 14), (64, 8)])
)
def test_what_holds_for_every_plan(width, height, max_slices, scale):
    side, patch = scale
    plan = plan_slices(width, height, max_slices, side, patch)
    for size in (plan.overview, plan.refined, plan.slice):
        assert size is None or all(length >= patch and length % patch == 0 for length in size)
    assert len(plan.sizes) == 1 + math.prod(plan.grid or (0,)) <= 1 + max_slices
    covered = [
        (x, y)
        for left, top, right, bottom in plan.boxes()
        for x in (left, right - 1)
        for y in (top, bottom - 1)
    ]
    assert len(set(covered)) == len(covered)  # no two slices share a corner
    if plan.grid:
        columns, rows = plan.grid
        assert plan.refined == (columns * plan.slice[0], rows * plan.slice[1])
        assert plan.boxes()[0][:2] == (0, 0)
        assert plan.boxes()[-1][2:] == plan.refined
        assert sum((r - x) * (b - y) for x, y, r, b in plan.boxes()) == math.prod(plan.refined)


def test_slices_are_cut_row_by_row_from_the_refined_image():
    image = Image.effect_noise((1280, 720), 90).convert("RGB")
    plan = plan_slices(1280, 720)
    assert plan.grid == (3, 2)
    pieces = slice_image(image)
    assert [piece.size for piece in pieces] == plan.sizes
    refined = image.resize(plan.refined, Image.Resampling.BICUBIC)
    again = Image.new("RGB", plan.refined)
    for number, piece in enumerate(pieces[1:]):
        row, column = divmod(number, 3)
        again.paste(piece, (column * plan.slice[0], row * plan.slice[1]))
    assert again.tobytes() == refined.tobytes()
    assert pieces[0].tobytes() == image.resize(plan.overview, Image.Resampling.BICUBIC).tobytes()


def test_a_small_image_is_enlarged_and_not_cut():
    (only,) = slice_image(Image.new("RGB", (10, 20)))
    assert only.size == plan_slices(10, 20).overview == (322, 630)


@pytest.mark.parametrize("given", [(0, 5), (5, -1), (5, True), (5.0, 5), ("5", 5), (5, 2**40)])
def test_sizes_that_cannot_be_are_refused(given):
    with pytest.raises(ValueError, match=r"^(width|height) is .*(at least 1|possible here)\.$"):
        plan_slices(*given)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"max_slices": 0}, "max_slices is 0; expected a whole number of at least 1."),
        ({"max_slices": 2000}, "max_slices is 2,000; at most 1,024 is possible here."),
        ({"side": 8}, "patch is 14 and side 8; a slice holds at least one patch."),
    ],
)
def test_other_numbers_that_cannot_be_are_refused(more, sentence):
    with pytest.raises(ValueError) as caught:
        plan_slices(100, 100, **more)
    assert str(caught.value) == sentence


@pytest.mark.parametrize("image", [Image.new("L", (5, 5)), Image.new("RGBA", (5, 5)), "cat.png", None])
def test_what_is_no_image_in_rgb_is_refused(image):
    with pytest.raises(TypeError, match="expected an image in RGB: vision.images.read_image"):
        slice_image(image)
