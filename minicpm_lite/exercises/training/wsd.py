"""Checks and quiz of the chapter on WSD."""

import math

from ...lab.exercises import exercise
from ...lab.mistakes import same
from ...lab.quiz import Quiz


@exercise(
    "decay start",
    wrong=(
        lambda total, share: total * share,
        lambda total, share: total - 100,
        lambda total, share: int(total * (1 - share)),  # 100 * (1 - 0.9) is 9.99…
        lambda total, share: total - int(total * share),
        lambda total, share: total - math.ceil(total * share),
        lambda total, share: total * (1 - share),
    ),
)
def decay_start(answer):
    """The decay takes the last share, so it begins at the total minus that."""
    assert same(answer(1000, 0.1), 900), (
        "Of 1,000 updates the last 10 % decay. How many updates are that, and where do they begin?"
    )
    assert same(answer(1600, 0.025), 1560), (
        "Of 1,600 updates 2.5 % are 40. Which update is 40 before the end?"
    )
    assert same(answer(100, 0.9), 10), (
        "Of 100 updates 90 % are 90. A computer's 0.9 is a little off: round, do not cut off."
    )
    assert same(answer(1607, 0.1), 1446), (
        "A tenth of 1,607 updates is 160.7. A decay of whole updates nearest to that has 161."
    )
    assert same(answer(1604, 0.1), 1444), (
        "A tenth of 1,604 updates is 160.4. A decay of whole updates nearest to that has 160."
    )
    assert same(answer(50, 0.0), 50), "Without a decay the stable phase ends with the run."


@exercise(
    "half-life",
    wrong=(
        lambda decay_steps, ratio: decay_steps * ratio,
        lambda decay_steps, ratio: decay_steps / math.log(1 / ratio),
        lambda decay_steps, ratio: decay_steps * math.log2(1 / ratio),
        lambda decay_steps, ratio: round(decay_steps / math.log2(1 / ratio)),
        lambda decay_steps, ratio: decay_steps / math.log2(round(1 / ratio)),
    ),
)
def half_life_for(answer):
    """0.5 to the power of decay_steps / half_life is the ratio."""
    assert same(answer(100, 0.5), 100), "To end at a half after 100 updates, the rate halves once."
    assert same(answer(100, 0.25), 50), "To end at a quarter after 100 updates, the rate halves twice."
    assert same(answer(2, 0.1), 2 / math.log2(10)), "A half-life need not be whole: do not round it."
    assert same(answer(90, 0.3), 90 / math.log2(1 / 0.3)), (
        "To end at 0.3: neither 1 / 0.3 nor the number of halvings is whole, so round neither."
    )
    assert same(answer(16_610, 0.1), 16_610 / math.log2(10)), (
        "MiniCPM goes from the peak to a tenth in about 16,610 updates. How often does its rate halve?"
    )


def _half_cosine(s, peak, W, T, S):
    fallen = (1 - math.cos(math.pi * min(max(s - T, 0) / (S - T), 1))) / 2
    return peak * min(s / W, 1) * (1 - fallen)


def _exponential(s, peak, W, T, S):
    return peak * min(s / W, 1) * 0.1 ** (max(s - T, 0) / (S - T))


def _smooth_start(s, peak, W, T, S):
    start = (1 - math.cos(math.pi * min(s / W, 1))) / 2
    return peak * min(start, max(0, (S - s) / (S - T)))


def _below_zero(s, peak, W, T, S):
    return peak * min(s / W, 1, (S - s) / (S - T))


@exercise(
    "linear decay",
    wrong=(
        _half_cosine,
        _exponential,
        _smooth_start,
        _below_zero,
        lambda s, peak, W, T, S: peak * min((s + 1) / W, 1, max(0, (S - s) / (S - T))),
        lambda s, peak, W, T, S: peak * min(s / W, 1, max(0, (100 - s) / 20)),
    ),
)
def linear_wsd(answer):
    """Each edge is exact, and beyond the end the rate stays at zero."""
    for peak, W, T, S in ((0.01, 10, 80, 100), (3.0, 4, 20, 50)):
        assert all(same(answer(s, peak, W, T, S), peak * s / W) for s in range(W)), (
            "The warm-up climbs in a straight line from 0 at step 0 to the peak at step `W`: at half of `W` "
            "it is half the peak."
        )
        assert all(same(answer(s, peak, W, T, S), peak) for s in (W, (W + T) // 2, T - 1, T)), (
            "From `W` up to and including `T` the rate is the peak itself."
        )
        for part in (0.2, 0.5, 0.8):
            s = round(T + part * (S - T))
            assert same(answer(s, peak, W, T, S), peak * (S - s) / (S - T)), (
                f"At {part:.0%} of the way from `T` to `S` a straight line has fallen by {part:.0%}."
            )
        assert same(answer(S, peak, W, T, S), 0), "At `S` the rate is zero."
        assert same(answer(S + 50, peak, W, T, S), 0), (
            "After `S` the rate stays at zero; yours goes on falling or rises."
        )


@exercise(
    "saving",
    wrong=(
        lambda budgets, share: 1 - max(budgets) / sum(budgets),
        lambda budgets, share: 1 - share,
        lambda budgets, share: (max(budgets) * (1 - share) + share * sum(budgets)) / sum(budgets),
        lambda budgets, share: 1 - (budgets[-1] * (1 - share) + share * sum(budgets)) / sum(budgets),
    ),
)
def saved(answer):
    """One shared stable run, and one decay for each budget."""
    assert same(answer([1000], 0.1), 0), (
        "With a single budget nothing is shared, so nothing is saved. The stable run stops where the last "
        "decay begins."
    )
    assert answer([200, 400, 800, 1600], 0.1) <= 1, (
        "A part is a number from 0 to 1, not per cent and not a count."
    )
    assert same(answer([200, 400, 800, 1600], 0.1), 0.42), (
        "For this chapter's four budgets: 3,000 updates against a stable run of 1,440 and decays of "
        "20 + 40 + 80 + 160."
    )
    assert same(answer([1600, 200, 800, 400], 0.1), 0.42), (
        "The order of the budgets decides nothing: the stable run is as long as the largest needs it."
    )
    assert same(answer([200, 400, 800, 1600], 0.2), 28 / 75), (
        "With decays of 20 %: a stable run of 1,280, decays of 40 + 80 + 160 + 320. Does your answer use "
        "`share`?"
    )
    assert answer([100 * m for m in range(1, 21)], 0.1) > 0.8, (
        "Twenty budgets share one stable run: most of the work is saved."
    )


def _last_two(budgets, losses, new_budget):
    power = math.log(losses[-1] / losses[-2]) / math.log(budgets[-1] / budgets[-2])
    return losses[-1] * (new_budget / budgets[-1]) ** power


def _straight(budgets, losses, new_budget):
    slope = (losses[-1] - losses[-2]) / (budgets[-1] - budgets[-2])
    return losses[-1] + slope * (new_budget - budgets[-1])


@exercise("prediction", wrong=(_last_two, _straight, lambda budgets, losses, new_budget: losses[-1]))
def predict(answer):
    """A straight line in log budget and log loss, extended."""
    for budgets, scale, power in (([200, 400, 800], 5.0, 0.2), ([10, 30, 100, 500], 9.0, 0.05)):
        exact = [scale * budget**-power for budget in budgets]
        for new in (budgets[-1] * 2, budgets[-1] * 7):
            assert same(answer(budgets, exact, new), scale * new**-power), (
                f"Losses that follow {scale:g} b^-{power} exactly must be continued exactly. Do you fit in "
                "the logarithms of both?"
            )
    assert same(answer([200, 400, 800], [4.0, 3.5, 3.2], 1600), 2.84129, tolerance=1e-4), (
        "Three points that lie on no line: use all three, with equal weight, in a least-squares line through "
        "the logarithms."
    )


quiz = Quiz(
    [
        (
            "A cosine made for 1,000 updates is stopped at 500. Compared with a cosine made for 500, its "
            "loss is",
            ["the same", "higher", "lower"],
            1,
            "At half of a cosine the rate is still over half the peak: the model has not gone down yet.",
        ),
        (
            "More data arrives after your WSD run was finished. You resume from…",
            [
                "the checkpoint before the decay",
                "the finished checkpoint, since its loss is lower",
                "a new random start",
            ],
            0,
            "The stable checkpoint goes on as if the end had never been planned. That is the paper's advice; "
            "here it gained a little.",
        ),
        (
            "What must WSD know before it starts?",
            ["the last update", "nothing", "the peak rate and the warm-up"],
            2,
            "The end is chosen later, by starting a decay.",
        ),
        (
            "A seventh budget between two others costs, with WSD…",
            ["a whole run", "only its decay", "nothing"],
            1,
            "The stable run passes through its starting point anyway, if you kept a checkpoint there.",
        ),
    ]
)
