"""Checks and quiz of the chapter on filtering."""

import math
from collections import defaultdict
from itertools import combinations

import numpy as np

from ...data.filtering import area_under_roc
from ...lab.exercises import exercise
from ...lab.mistakes import same
from ...lab.quiz import Quiz


def _share_of_band(signatures, bands, agree):
    """The pairs (i < j) for which `agree` says so of their bands."""
    rows = len(signatures[0]) // bands
    cut = [[tuple(s[at : at + rows]) for at in range(0, len(s), rows)] for s in signatures]
    return {(i, j) for i, j in combinations(range(len(cut)), 2) if agree(cut[i], cut[j])}


def _same_band(one, other):
    return any(mine == theirs for mine, theirs in zip(one, other, strict=True))


def _any_band(one, other):
    return bool(set(one) & set(other))


def _enough_places(signatures, bands):
    rows = len(signatures[0]) // bands
    return {
        (i, j)
        for i, j in combinations(range(len(signatures)), 2)
        if sum(a == b for a, b in zip(signatures[i], signatures[j], strict=True)) >= rows
    }


def _first_of_bucket(signatures, bands):
    rows, found = len(signatures[0]) // bands, set()
    for at in range(0, bands * rows, rows):
        buckets = defaultdict(list)
        for i, signature in enumerate(signatures):
            buckets[tuple(signature[at : at + rows])].append(i)
        found |= {(members[0], other) for members in buckets.values() for other in members[1:]}
    return found


_SIX = [
    [1, 2, 3, 4],
    [1, 2, 9, 9],
    [1, 8, 3, 7],
    [7, 7, 1, 2],
    [1, 2, 5, 5],
    [6, 6, 5, 5],
]


@exercise(
    "candidates",
    wrong=(
        _enough_places,
        _first_of_bucket,
        lambda signatures, bands: _share_of_band(signatures, bands, _any_band),
        lambda signatures, bands: _share_of_band(signatures, len(signatures[0]) // bands, _same_band),
        lambda signatures, bands: _share_of_band(signatures, bands, lambda one, other: one[0] == other[0]),
        lambda signatures, bands: {(j, i) for i, j in _share_of_band(signatures, bands, _same_band)},
    ),
    without=("candidate_pairs",),
)
def candidates(answer):
    """A bucket for each band and each content; who meets in one is a pair."""

    def pairs(signatures, bands):
        got = [tuple(int(index) for index in pair) for pair in answer(signatures, bands)]
        assert all(len(pair) == 2 and pair[0] < pair[1] for pair in got), (
            "A pair is two indices of documents, the smaller one first."
        )
        return set(got)

    got = pairs(_SIX, 2)
    assert {(0, 1), (4, 5)} <= got, (
        "Documents 0 and 1 agree in the first of two bands, 4 and 5 in the second. Is every band looked at?"
    )
    assert (0, 2) not in got, (
        "Documents 0 and 2 agree in two places, but these do not make up a band. A band agrees whole, or not "
        "at all."
    )
    assert (0, 3) not in got, (
        "The first band of document 0 and the second one of document 3 hold the same numbers. They come of "
        "different orders, so this is chance: only the same band is compared."
    )
    assert (1, 4) in got, "Documents 0, 1 and 4 share a bucket. That makes three pairs, not two."
    assert got == {(0, 1), (0, 4), (1, 4), (4, 5)}, "Two bands of two places: some pairs are too many."
    rng = np.random.default_rng(0)
    for documents, places, bands in ((6, 4, 4), (6, 4, 1), (12, 6, 2), (12, 6, 3), (30, 12, 4), (1, 4, 2)):
        signatures = rng.integers(0, 3, (documents, places)).tolist()
        signatures[-1] = list(signatures[0])
        assert pairs(signatures, bands) == _share_of_band(signatures, bands, _same_band), (
            f"{documents} documents with {places} places in {bands} bands. How many places has a band then?"
        )


@exercise(
    "what an edit costs",
    wrong=(
        lambda n, k, e: (n - k + 1 - k * e) / (n - k + 1),
        lambda n, k, e: (n - e) / (n + e),
        lambda n, k, e: (n - 4 - 5 * e) / (n - 4 + 5 * e),
        lambda n, k, e: (n - k * e) / (n + k * e),
        lambda n, k, e: (n - k + 1 - e) / (n - k + 1 + e),
    ),
)
def after_edits(answer):
    """Each edit spoils k shingles, on both sides of the union."""
    assert same(answer(104, 5, 4), 80 / 120), (
        "104 words have 100 shingles of 5. How many of them does one edit spoil, how many are then still "
        "common to both, and how many are in the union?"
    )
    assert same(answer(104, 5, 0), 1), "Without an edit the two texts are the same."
    assert same(answer(60, 1, 6), 54 / 66), (
        "A shingle of one word is a word, so an edit spoils one. Does your answer use `k`?"
    )
    assert same(answer(51, 2, 10), 30 / 70), "51 words have 50 shingles of 2; each edit spoils 2 of them."
    assert same(answer(24, 5, 4), 0), "Here all 20 shingles are spoilt: nothing is common."


def _nearest(choices, threshold, target):
    return min(choices, key=lambda b: abs(threshold(b) - target))


def _divisors(n):
    return [b for b in range(1, n + 1) if n % b == 0]


@exercise(
    "choose the bands",
    wrong=(
        lambda n, target: _nearest(
            [2**k for k in range(8) if n % 2**k == 0], lambda b: (1 / b) ** (b / n), target
        ),
        lambda n, target: max(b for b in _divisors(n) if (1 / b) ** (b / n) >= target),
        lambda n, target: _nearest(range(1, n + 1), lambda b: (1 / b) ** (b / n), target),
        lambda n, target: _nearest(_divisors(n), lambda b: (b / n) ** (1 / b), target),
        lambda n, target: n // _nearest(_divisors(n), lambda b: (1 / b) ** (b / n), target),
    ),
)
def choose_bands(answer):
    """All divisors, the nearest threshold."""
    assert same(answer(128, 0.7), 16), (
        "Of 128 places: 8 bands of 16 rise near 0.88, 16 of 8 near 0.71, 32 of 4 near 0.42."
    )
    assert same(answer(128, 0.9), 8), "A higher target wants longer bands, so fewer of them."
    assert same(answer(100, 0.5), 20), (
        "20 bands of 5 rise at 0.549, 25 of 4 at 0.447. Nearest counts on both sides, and a number of bands "
        "need not be a power of two, but it divides `n`."
    )
    assert same(answer(90, 0.56), 18), "18 bands of 5 rise at 0.561, 15 of 6 at 0.637."
    assert same(answer(7, 0.3), 7) and same(answer(7, 0.7), 1), (
        "Seven places can be cut into one band or into seven, in no other way. One band of all places rises "
        "at 1, seven bands of one at 1/7."
    )


@exercise(
    "when the short decay pays",
    wrong=(
        lambda scratch, stable, decay: math.ceil(stable / (scratch - decay)) if scratch > decay else "never",
        lambda scratch, stable, decay: 1 if decay < scratch else "never",
        lambda scratch, stable, decay: next(
            (m for m in range(1, 1000) if stable + m * decay < m * scratch), "never"
        ),
        lambda scratch, stable, decay: stable // (scratch - decay) + 1 if scratch > decay else 0,
        lambda scratch, stable, decay: stable // scratch + 1 if scratch > decay else "never",
        lambda scratch, stable, decay: round(stable / (scratch - decay)) + 1 if scratch > decay else "never",
    ),
)
def break_even(answer):
    """stable + m decay < m scratch."""
    assert same(answer(1200, 12_000, 110), 12), (
        "11 candidates: 12,000 + 1,210 against 13,200. Not yet cheaper."
    )
    assert same(answer(10, 0, 5), 1), "With a stable run for free, the first candidate is cheaper at once."
    assert same(answer(10, 100, 5), 21), "20 candidates cost the same both ways; cheaper needs one more."
    assert same(answer(10, 39, 5), 8), (
        "Seven candidates cost 39 + 35 against 70; eight cost 39 + 40 against 80."
    )
    assert same(answer(1.5, 3.5, 0.5), 4), "Costs need not be whole: 3.5 + 4 · 0.5 is below 4 · 1.5."
    assert same(answer(10, 100_000, 5), 20_001), (
        "With a dear stable run 20,000 candidates cost the same both ways. Does your search stop too early?"
    )
    assert answer(10, 5, 12) == "never", (
        "A decay that costs more than a whole run never pays: the word is never."
    )
    for stable in (5, 0):
        try:
            word = answer(10, stable, 10)
        except ZeroDivisionError:
            raise AssertionError(
                "A decay that costs just as much as the whole run: your code divides by zero. What does each "
                "candidate save?"
            ) from None
        assert word == "never", (
            "A decay that costs just as much as the whole run saves nothing, so it is never cheaper."
        )


def _rank(values):
    return np.argsort(np.argsort(values)) / max(len(values) - 1, 1)


def _unit(values):
    return (values - values.min()) / (values.max() - values.min())


@exercise(
    "two filters in one",
    wrong=(
        lambda quality, surprise: quality,
        lambda quality, surprise: _rank(quality),
        lambda quality, surprise: _rank(-surprise),
        lambda quality, surprise: (_rank(quality) + _rank(surprise)) / 2,
        lambda quality, surprise: quality - surprise,
        lambda quality, surprise: _unit(quality - surprise),
        lambda quality, surprise: 1 / (1 + np.exp(-np.clip(quality - 0.2 * surprise, -500, 500))),
        lambda quality, surprise: _rank(quality) - _rank(surprise),
    ),
)
def combine(answer):
    """Better than either alone, whatever units the two come in."""
    for clean, spam, noise, per_quality, per_bit in (
        (200, 150, 100, 1, 1),
        (150, 60, 150, 100, 1),
        (250, 120, 80, 1, 800),
    ):
        rng = np.random.default_rng(clean)
        quality = rng.normal(np.repeat([0.7, 0.3, 0.68], [clean, spam, noise]), 0.08) * per_quality
        surprise = rng.normal(np.repeat([1.5, 1.5, 2.4], [clean, spam, noise]), 0.2) * per_bit
        good = np.arange(len(quality)) < clean
        joined = np.asarray(answer(quality.copy(), surprise.copy()), float)
        assert joined.shape == quality.shape, "One number for each document is expected."
        assert np.isfinite(joined).all() and joined.min() >= 0 and joined.max() <= 1, (
            f"Scores from 0 to 1 are asked for; yours lie between {joined.min():.3g} and {joined.max():.3g}."
        )
        both = area_under_roc(joined[good], joined[~good])
        alone = max(area_under_roc(s[good], s[~good]) for s in (quality, -surprise))
        assert both > alone + 0.03, (
            f"Qualities go up to {quality.max():.2g}, bits up to {surprise.max():.2g}, the area under the "
            f"curve is {both:.3f}; the better one alone has {alone:.3f}. Are both brought to one scale, "
            "whatever their units, and does a high number of bits lower the score?"
        )


quiz = Quiz(
    [
        (
            "Two documents agree in 96 of 128 places of their signatures. Their Jaccard index is about",
            ["0.75", "0.96", "0.56"],
            0,
            "The share of agreements estimates it: 96/128, give or take 0.04.",
        ),
        (
            "You use more bands of fewer places. Pairs that are looked at become",
            ["fewer", "more, also among the dissimilar", "the same"],
            1,
            "The curve moves to the left: less is missed, more is looked at in vain.",
        ),
        (
            "The candidate's share in the short decay is 30 %, not 100 %, because",
            [
                "all data must stay in the mixture that the model will really see",
                "it is cheaper",
                "the classifier needs it",
            ],
            0,
            "The question is what the candidate adds to the default data. The price is a smaller difference.",
        ),
        (
            "A classifier keeps 75 % of a kind of junk. Most likely",
            [
                "the threshold is wrong",
                "that kind was not among its bad examples",
                "the documents are too long",
            ],
            1,
            "It knows only what it was shown.",
        ),
    ]
)
