"""Checks and quiz of the chapter on two-stage pre-training."""

import math
from fractions import Fraction

from ...lab.exercises import exercise
from ...lab.mistakes import same
from ...lab.quiz import Quiz


def _read(row):
    return [max(token, ~token) for token in row[:-1]]


@exercise(
    "read and predicted",
    wrong=(
        lambda row: ([max(token, ~token) for token in row], [max(token, -1) for token in row]),
        lambda row: (
            [-token if token < 0 else token for token in row[:-1]],
            [max(token, -1) for token in row[1:]],
        ),
        lambda row: (_read(row), [max(token, -1) for token in row[:-1]]),
        lambda row: (_read(row), [token if token > 0 else -1 for token in row[1:]]),
        lambda row: (_read(row), list(row[1:])),
        lambda row: (_read(row[:4]), [max(token, -1) for token in row[1:4]]),
        lambda row: (list(row[:-1]), [max(token, -1) for token in row[1:]]),
    ),
)
def pairs(answer):
    """Tokens read, and tokens to predict with -1 for context."""
    result = answer([~3, ~4, 5, 6])
    assert len(result) == 2, "Return two lists: read, predicted."
    read, predicted = result
    assert len(read) == len(predicted) == 3, (
        "A window of 4 tokens has 3 places where something may be predicted."
    )
    assert same(read, [3, 4, 5]), "All tokens but the last are read, and as tokens: without a mark."
    assert same(predicted[0], -1), "At place 0 the next token is ~4, which is context: -1."
    assert same(predicted, [-1, 5, 6]), (
        "Whether something is predicted at a place is a matter of the token that comes next, not of the one "
        "that is read there."
    )
    read, predicted = answer([~0, 0, ~0, ~9])
    assert same(predicted, [0, -1, -1]), (
        "Token 0 can be predicted, and every context gives -1, whichever it is."
    )
    assert same(read, [0, 0, 0]), "The token under a mark is found by the complement; under ~0 it is 0."
    assert same(answer([1, ~2, 3, ~4, ~5, 6]), [[1, 2, 3, 4, 5], [-1, 3, -1, -1, 6]]), (
        "A window may have any length, here 6 tokens, and context in several places."
    )
    assert same(answer([7, 2]), [[7], [2]]), "Without a mark, each token is predicted from the one before it."


@exercise(
    "weight for a share",
    wrong=(
        lambda share, p: share / p,
        lambda share, p: share * p / (share * p + 1 - share),
        lambda share, p: min(1.0, share / p),
        lambda share, p: share / (share + 0.25 * (1 - share)),
        lambda share, p: share,
    ),
)
def weight_for(answer):
    """w p / (w p + 1 - w) = share, solved for w."""
    assert same(answer(0.5, 0.25), 0.8), (
        "With a quarter predicted, how many windows of questions predict as many tokens as one of prose?"
    )
    assert same(answer(0.5, 1.0), 0.5), "If all tokens are predicted, weight and share are the same."
    assert same(answer(0.2, 0.25), 0.5), "At weight one half, a quarter stands against a whole: a fifth."
    assert same(answer(0.1, 0.4), 5 / 23), (
        "Put your weight back into the formula: does it give a share of 0.1 when 0.4 are predicted?"
    )
    assert same(answer(1.0, 0.3), 1), "A share of 1 needs questions alone."
    assert same(answer(0.0, 0.3), 0), "A share of 0 needs no window of questions."


@exercise(
    "surely after",
    wrong=(
        lambda weight, count: math.floor(count / weight),
        lambda weight, count: math.ceil((count + 1) / weight),
        lambda weight, count: math.ceil((count - 1) / weight) + 1,
        lambda weight, count: math.ceil(count / float(weight)),
        lambda weight, count: math.ceil(Fraction(count) / weight) + 1,
        lambda weight, count: count * weight.denominator,
    ),
)
def surely_after(answer):
    """The count is above w m - 1: at least `count` once w m >= count."""
    assert answer(Fraction(1, 2), 1) == 2, (
        "At weight one half, after 1 window the count may be 0 or 1: both are less than 1 away from one "
        "half. And after 2?"
    )
    assert answer(Fraction(1, 3), 2) == 6, (
        "At a third, after 5 windows the share is 5/3, and a count of 1 is allowed. After 6 the share is 2, "
        "and a count of 1 is 1 away."
    )
    assert answer(Fraction(2, 5), 1) == 3, (
        "At two fifths: after 2 windows the share is 0.8, and a count of 0 is allowed. After 3 it is 1.2."
    )
    assert answer(Fraction(3, 4), 5) == 7, (
        "At three quarters, after 6 windows the share is 4.5, after 7 it is 5.25."
    )
    assert answer(Fraction(3, 10), 0) == 0, "Nothing has come at the start, and nothing must have."
    assert answer(Fraction(1, 3), 10**17 + 1) == 3 * 10**17 + 3, (
        "Large numbers: floating point is not exact here. Stay with fractions."
    )


def _slope(f, h):
    return (f(h) - f(-h)) / (2 * h)


def _bend(f, h):
    return (f(h) - 2 * f(0) + f(-h)) / h**2


@exercise(
    "curvature from three values",
    wrong=(
        lambda f, h: _bend(f, h),
        lambda f, h: abs(_bend(f, h)),
        lambda f, h: _bend(f, h) / (1 + _slope(f, h) ** 2) ** 1.5,
        lambda f, h: abs(_bend(f, h)) / (1 + ((f(h) - f(0)) / h) ** 2) ** 1.5,
        lambda f, h: abs(_bend(f, h)) / (1 + abs(_slope(f, h))) ** 1.5,
        lambda f, h: abs(_bend(f, h)) / (1 + _slope(f, h) ** 2),
        lambda f, h: abs(_bend(f, 0.1)) / (1 + _slope(f, 0.1) ** 2) ** 1.5,
        lambda f, h: abs(_bend(f, h / 2)) / (1 + _slope(f, h / 2) ** 2) ** 1.5,
    ),
)
def curvature_of(answer):
    """Central differences for both derivatives."""

    def result(f, h):
        asked = []

        def noted(x):
            asked.append(float(x))
            return f(x)

        got = answer(noted, h)
        assert all(min(abs(x - each) for each in (-h, 0, h)) < 1e-9 for x in asked), (
            f"With h = {h:g} the function is to be asked at {-h:g}, 0 and {h:g} alone."
        )
        return got

    assert same(result(lambda x: x * x, 0.1), 2), "x² has second derivative 2, and slope 0 at 0."
    assert same(result(lambda x: 3 * x + 1, 0.1), 0), "A straight line does not bend."
    assert same(result(lambda x: -3 * x * x, 0.2), 6), (
        "The curvature here has no sign: bent down counts like bent up."
    )
    for slope in (1, -2, 0.5):
        assert same(result(lambda x, slope=slope: x * x + slope * x, 0.25), 2 / (1 + slope**2) ** 1.5), (
            f"On a slope of {slope:g} the same second derivative bends less. By which factor, in the formula "
            "of the text? And is your slope taken evenly from both sides?"
        )
    assert same(result(lambda x: x**4, 0.5), 0.5) and same(result(lambda x: x**4, 1.0), 2), (
        "For x⁴ the three values depend on h: at h = 0.5 they are 1/16, 0 and 1/16."
    )
    assert same(result(lambda x: x**3 + x * x, 2.0), 2 / 17**1.5), (
        "For x³ + x² at h = 2 the values are −4, 0 and 12. A slope between the outer two is 4."
    )


@exercise(
    "larger batch",
    wrong=(
        lambda c, k: k * c,
        lambda c, k: min(1.0, k * c),
        lambda c, k: min(1.0, c * math.sqrt(k)),
        lambda c, k: c / (c + (1 - c) * k),
        lambda c, k: c / (c + (1 - c) / math.sqrt(k)),
    ),
)
def larger_batch(answer):
    """The noise falls by k; solve for its part first."""
    assert same(answer(0.5, 3), 0.75), (
        "At 0.5 signal and noise are equal. What is left of the noise with three times the batch?"
    )
    assert same(answer(0.3, 1), 0.3), "k = 1 changes nothing."
    assert same(answer(0.1, 9), 0.5), "At 0.1 the noise is nine times the signal."
    assert same(answer(0.5, 0.5), 1 / 3), "Half the batch has twice the noise: `k` may be below 1."
    assert same(answer(1.0, 7), 1), "A gradient without noise agrees with itself, whatever the batch."
    assert same(answer(0.0, 7), 0), "Where nothing is signal, a larger batch finds none."
    assert answer(0.05, 10**9) <= 1, "A cosine is never above 1."


quiz = Quiz(
    [
        (
            "When does MiniCPM first see instruction data?",
            ["in the stable stage", "from the start of the decay", "in SFT"],
            1,
            "They are mixed into the decay, beside pre-training data; SFT then has more of them.",
        ),
        (
            "B-2 is in the paper's table because…",
            [
                "a mixed decay also means more instruction data in all, and B-2 has more of them without a "
                "mixed decay",
                "the smaller model needs a longer SFT",
                "twice the tokens give twice the score",
            ],
            0,
            "Without it, the gain of B-3 could come from the amount alone.",
        ),
        (
            "The weight of a source is one half. After 7 windows its count can be",
            ["only 3 or 4", "anything from 0 to 7", "2 to 5"],
            0,
            "The share is 3.5, and the count is less than 1 away from it.",
        ),
        (
            "In SFT, the question's tokens are",
            [
                "left out of the window",
                "read, but not in the loss",
                "read, and in the loss with half a weight",
            ],
            1,
            "The model must read the question to answer it.",
        ),
    ]
)
