"""Checks and quiz of the chapter on long contexts."""

import math
from statistics import mean

from ...lab.exercises import exercise
from ...lab.mistakes import same
from ...lab.quiz import Quiz
from ...language.rotary import rotary_frequencies


def _finished(head_dim, theta, context, turn=2 * math.pi):
    return int((context * rotary_frequencies(head_dim, theta) >= turn).sum())


@exercise(
    "first slow pair",
    wrong=(
        lambda head_dim, theta, context: _finished(head_dim, theta, context, turn=1),
        lambda head_dim, theta, context: head_dim // 2 - _finished(head_dim, theta, context),
        lambda head_dim, theta, context: _finished(head_dim, 10_000.0, context),
        lambda head_dim, theta, context: min(_finished(head_dim, theta, context), head_dim // 2 - 1),
        lambda head_dim, theta, context: 2 * _finished(head_dim, theta, context),
    ),
)
def first_slow_pair(answer):
    """A turn is 2π radians, and the frequencies fall with the index."""
    got = answer(8, 10_000.0, 640)
    assert not same(got, 1), "One pair is unfinished there. What is its index?"
    assert same(got, 3), (
        "A head of 8 features, theta 10,000, 640 tokens: the frequencies are 1, 0.1, 0.01 and 0.001, and a "
        "whole turn is 2π radians, not 1."
    )
    assert same(answer(128, 10_000.0, 65_536), 64), (
        "In 65,536 tokens all 64 pairs of a head of 128 features complete a turn. What is to be given then?"
    )
    assert same(answer(128, 10_000.0, 4096), 46), (
        "In 4,096 tokens 18 of the 64 pairs of a head of 128 features are unfinished. Is your index that of "
        "a pair, or of a feature?"
    )
    assert same(answer(64, 500_000.0, 4096), 16), "Another theta gives other frequencies: use the argument."
    assert same(answer(64, 10_000.0, 6), 0), "In 6 tokens not even the fastest pair, 1 radian each, is round."


def _ramp(frequency, context, factor, slow=1.0, fast=4.0, shape=lambda kept: kept):
    kept = shape(min(1.0, max(0.0, (context * frequency / (2 * math.pi) - slow) / (fast - slow))))
    return kept * frequency + (1 - kept) * frequency / factor


def _ends_late(frequency, context, factor):
    """The ramp goes on beyond 4 turns, up to 8."""
    turns = context * frequency / (2 * math.pi)
    if turns >= 8:
        return frequency
    return frequency / factor + max(0.0, turns - 1) / 3 * (frequency - frequency / factor)


def _in_wavelengths(frequency, context, factor):
    kept = min(1.0, max(0.0, (context * frequency / (2 * math.pi) - 1) / 3))
    return 1 / (kept / frequency + (1 - kept) * factor / frequency)


@exercise(
    "ramp of Llama 3",
    wrong=(
        lambda frequency, context, factor: _ramp(frequency, context, factor, shape=lambda kept: 1 - kept),
        lambda frequency, context, factor: _ramp(frequency, context, factor, shape=round),
        lambda frequency, context, factor: _ramp(
            frequency, context, factor, shape=lambda kept: kept if kept in (0, 1) else 0.5
        ),
        lambda frequency, context, factor: _ramp(frequency, context, factor, fast=32.0),
        _ends_late,
        lambda frequency, context, factor: _ramp(frequency, context, 8.0),
        lambda frequency, context, factor: _ramp(frequency, context, factor, slow=0.0),
        lambda frequency, context, factor: _ramp(2 * math.pi * frequency, context, factor) / 2 / math.pi,
        lambda frequency, context, factor: frequency / factor,
        _in_wavelengths,
    ),
)
def llama3_frequency(answer):
    """Fast pairs stay, slow ones are divided, and the ramp meets both."""
    for context, factor in ((1000, 8.0), (8192, 3.0)):
        turn = 2 * math.pi / context
        for turns in (50, 4.5, 4):
            assert same(answer(turns * turn, context, factor) / turn, turns), (
                f"A pair that turns {turns} times in `context` is fast: it stays as it is. A turn is 2π "
                "radians."
            )
        for turns in (1, 0.9, 0.5):
            assert same(answer(turns * turn, context, factor) / turn, turns / factor), (
                f"A pair that turns {turns} times is slow: divide it by the factor, here {factor:g}."
            )
        middle = answer(2.5 * turn, context, factor) / turn
        assert same(middle, 2.5 * (0.5 + 0.5 / factor)), (
            "2.5 turns lie half-way between 1 and 4: half of the frequency is kept, half is divided. Mix "
            "frequencies, not wavelengths."
        )
        for turns, kept in ((1.3, 0.1), (2, 1 / 3), (3.7, 0.9)):
            assert same(answer(turns * turn, context, factor) / turn, turns * (kept + (1 - kept) / factor)), (
                f"The kept part grows evenly from 1 turn to 4. At {turns} turns it is {kept:.2f}."
            )


def _room(prompt, new_tokens):
    return prompt + new_tokens - 1


@exercise(
    "which list",
    wrong=(
        lambda prompt, new_tokens, original: "long" if prompt > original else "short",
        lambda prompt, new_tokens, original: "long" if original else "short",
        lambda prompt, new_tokens, original: "long" if _room(prompt, new_tokens) >= original else "short",
        lambda prompt, new_tokens, original: "long" if prompt + new_tokens > original else "short",
        lambda prompt, new_tokens, original: "long" if max(prompt, new_tokens) > original else "short",
        lambda prompt, new_tokens, original: "long" if _room(prompt, new_tokens) > 100 else "short",
    ),
)
def which_list(answer):
    """Decided once, by all the tokens that can get a key."""
    for original in (100, 4096):
        assert answer(10, 10, original) == "short", (
            f"10 tokens and 10 more fit into {original:,}: the short list is to be used where it can be."
        )
        assert answer(original + 50, 1, original) == "long", "The prompt alone is too long."
        assert answer(original - 10, 30, original) == "long", (
            "The prompt fits, but the text grows beyond the original context. If the list changed there, the "
            "keys before it would be wrong."
        )
        assert answer(original, 1, original) == "short" == answer(original - 10, 11, original), (
            f"Exactly {original:,} tokens are read there, and they still take the short list. The last token "
            "that is written is not read again, so it gets no key."
        )
        assert answer(original, 2, original) == "long" == answer(original - 10, 12, original), (
            f"Of these tokens the model reads {original + 1:,}: one more than the original context."
        )


def _base(theta, factor, pair, head_dim):
    return theta * factor ** (head_dim / (2 * pair))


@exercise(
    "base for a pair",
    wrong=(
        lambda theta, factor, pair, head_dim: theta * factor,
        lambda theta, factor, pair, head_dim: theta * factor ** (head_dim / (head_dim - 2)),
        lambda theta, factor, pair, head_dim: theta * factor ** (head_dim / pair),
        lambda theta, factor, pair, head_dim: theta * factor ** (2 * pair / head_dim),
        lambda theta, factor, pair, head_dim: theta * factor ** (head_dim / (2 * (pair + 1))),
        lambda theta, factor, pair, head_dim: theta / factor ** (head_dim / (2 * pair)),
        lambda theta, factor, pair, head_dim: round(_base(theta, factor, pair, head_dim)),
    ),
)
def base_for(answer):
    """NTK's base is this for the slowest pair."""

    def frequency(theta, pair, head_dim):
        return float(theta) ** (-2 * pair / head_dim)

    assert same(answer(1e4, 1.0, 31, 64) / 1e4, 1), "Factor 1 changes nothing."
    for theta, factor, pair, head_dim in (
        (1e4, 8.0, 31, 64),
        (500.0, 3.0, 1, 8),
        (5e5, 4.0, 20, 128),
        (10.0, 1.3, 3, 8),
    ):
        base = answer(theta, factor, pair, head_dim)
        slower = frequency(theta, pair, head_dim) / frequency(base, pair, head_dim)
        assert same(slower, factor), (
            f"With your base pair {pair} of a head of {head_dim} features turns {slower:.3f} times slower; "
            f"{factor:g} times was asked for. Its frequency is the base to the power of "
            f"-2 · {pair} / {head_dim}, and need not be whole."
        )


_FAMILIES = [  # candidates of three methods
    [[4.0, 4.0], [8.0, 8.0]],
    [[1.0, 4.0], [1.0, 8.0], [1.0, 12.0]],
    [[2.0, 2.0]],
]


def _tuned(rivals, tuning):
    return min((each for family in rivals for each in family), key=tuning)


@exercise(
    "fair gap",
    wrong=(
        lambda mine, rivals, tuning, held_out: held_out(mine) - min(held_out(c) for r in rivals for c in r),
        lambda mine, rivals, tuning, held_out: held_out(mine) - held_out(rivals[0][0]),
        lambda mine, rivals, tuning, held_out: held_out(mine) - held_out(min(rivals[0], key=tuning)),
        lambda mine, rivals, tuning, held_out: held_out(mine) - min(held_out(r[0]) for r in rivals),
        lambda mine, rivals, tuning, held_out: held_out(mine) - mean(held_out(c) for r in rivals for c in r),
        lambda mine, rivals, tuning, held_out: held_out(mine) - held_out(_tuned(rivals[:2], tuning)),
        lambda mine, rivals, tuning, held_out: held_out(mine) - held_out(_tuned(rivals[1:], tuning)),
        lambda mine, rivals, tuning, held_out: tuning(mine) - tuning(_tuned(rivals, tuning)),
        lambda mine, rivals, tuning, held_out: held_out(_tuned(rivals, tuning)) - held_out(mine),
        lambda mine, rivals, tuning, held_out: held_out(mine) - tuning(_tuned(rivals, tuning)),
    ),
)
def fair_gap(answer):
    """Everyone tunes on one text, and all are judged on another."""

    def loss(best, shift=0.0):
        """Low where a list is near the best one; the held-out text prefers a slightly different list."""
        return lambda factors: shift + sum(abs(a - b) for a, b in zip(factors, best, strict=True))

    def judged(mine, rivals, tuning, held_out):
        asked = []

        def watched(factors):
            asked.append(list(factors))
            return held_out(factors)

        gap = answer(mine, rivals, tuning, watched)
        assert all(each in (list(mine), list(_tuned(rivals, tuning))) for each in asked), (
            "Your code asked for the held-out loss of more candidates than the one chosen. Whoever chooses "
            "there has tuned on the text that judges."
        )
        return gap

    mine = [1.5, 9.0]
    assert same(judged(mine, _FAMILIES, loss([1, 8]), loss([1, 9], 3.0)), 0.5 - 1.0), (
        "The best candidate on the tuning text is the second of the second method. On held-out text its loss "
        "is 4 and that of the searched list 3.5, so the gap is -0.5. Below zero: the searched list is better."
    )
    assert same(judged(mine, _FAMILIES, loss([1, 12]), loss([1, 4], 2.0)), 5.5 - 8.0), (
        "On this tuning text the last candidate is best. That it does badly on held-out text was not to be "
        "known, so it stays the rival."
    )
    assert same(judged([4.0, 6.0], _FAMILIES, loss([4, 4]), loss([4, 4])), 2.0), (
        "Here a candidate of the first method is best, and better than the searched list: the gap is above "
        "zero."
    )
    assert same(judged(mine, _FAMILIES, loss([2, 2]), loss([2, 3])), 6.5 - 1.0), (
        "Here the only candidate of the third method is best. Are all methods looked at?"
    )
    assert same(judged([2.0], [[[3.0], [5.0]]], loss([5]), loss([4])), 1.0), (
        "One method alone, with lists of one factor."
    )


quiz = Quiz(
    [
        (
            "A model reads twice the length it was trained for, plain. Which pairs meet angles they have "
            "never met?",
            ["The fast ones", "The slow ones", "All"],
            1,
            "A fast pair has been round many times: it knows every angle.",
        ),
        (
            "Position interpolation hurts short text at once. Why?",
            [
                "The cache becomes larger",
                "It slows the fast pairs too, which tell neighbours apart",
                "It changes the weights",
            ],
            1,
            "All distances look shorter by the factor, also those that were learned best.",
        ),
        (
            "YaRN multiplies cosine and sine by 1.14. The scores grow by about",
            ["1.14", "1.30", "2.28"],
            1,
            "Query and key are both multiplied: 1.14 squared.",
        ),
        (
            "Extending MiniCPM4.1-8B to 131,072 tokens changes",
            ["64 numbers in its config", "all weights", "the tokenizer"],
            0,
            "One factor for each pair of a head of width 128.",
        ),
        (
            "A needle test at 128K gives 100 %. That shows",
            [
                "the model understands long texts",
                "the model can find one sentence",
                "the model was trained at 128K",
            ],
            1,
            "Finding is necessary for understanding, and far from enough.",
        ),
    ]
)
