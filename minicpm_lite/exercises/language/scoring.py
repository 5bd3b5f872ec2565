"""Checks and quiz of the chapter on how a decoder learns."""

import math
from collections import Counter
from fractions import Fraction
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ...lab.exercises import exercise
from ...lab.mistakes import same
from ...lab.quiz import Quiz


def _lane_losses(logits: Tensor, ids: Tensor) -> Tensor:
    """The loss of each token but the first."""
    chances = torch.as_tensor(logits).log_softmax(dim=-1)[:-1]
    return -chances.gather(1, ids[1:, None]).squeeze(1)


@exercise(
    "answer loss",
    wrong=(
        lambda logits, ids, start: _lane_losses(logits, ids)[start:].mean(),  # the answer's own lanes
        lambda logits, ids, start: _lane_losses(logits, ids).mean(),  # the question counts, too
        lambda logits, ids, start: _lane_losses(logits, ids)[2:].mean(),
        lambda logits, ids, start: _lane_losses(logits, ids)[max(start - 1, 0) :].sum(),
        lambda logits, ids, start: _lane_losses(logits, ids)[max(start - 1, 0) :].mean() / math.log(2),
        lambda logits, ids, start: _lane_losses(logits, ids)[start - 1 :].mean(),  # -1 is the last
        lambda logits, ids, start: (
            _lane_losses(logits, ids)[max(start - 1, 0) :].sum() / (len(ids) - max(start - 1, 0))
        ),
        lambda logits, ids, start: -logits.log_softmax(-1)[range(len(ids)), ids][start:].mean(),  # no shift
        lambda logits, ids, start: -_lane_losses(logits, ids)[max(start - 1, 0) :].mean(),
        lambda logits, ids, start: (
            -logits.softmax(-1)[range(len(ids) - 1), ids[1:]][max(start - 1, 0) :].log().mean()  # underflows
        ),
        lambda logits, ids, start: (
            -logits.softmax(-1)[range(len(ids) - 1), ids[1:]][max(start - 1, 0) :].mean()
        ),
        lambda logits, ids, start: (
            -logits.log_softmax(0)[range(len(ids) - 1), ids[1:]][max(start - 1, 0) :].mean()
        ),
    ),
    without=("cross_entropy", "CrossEntropyLoss", "nll_loss", "NLLLoss", "next_token_loss", "token_losses"),
)
def answer_loss(answer):
    """The token at a position is predicted by the lane before it."""
    halves = torch.tensor([[0.0, 0.0], [0.0, math.log(3)], [0.0, math.log(7)], [9.0, 0.0]])
    got = answer(halves, torch.tensor([1, 0, 1, 1]), 2)
    assert not same(got, math.log(8 / 7)), (
        "Yours counts the token at 3 alone, which lane 2 was asked for. Who was asked for the token at 2?"
    )
    assert not same(got, (math.log(8 / 7) + math.log(1 + math.exp(9))) / 2), (
        "Yours asks each lane for its own token. It was asked for the next one."
    )
    right = (math.log(4 / 3) + math.log(8 / 7)) / 2
    assert not same(got, -right), (
        "Yours is below zero. Logarithms of probabilities are; the loss is *minus* them."
    )
    assert not same(got, 2 * right), "Yours is a sum over the answer. The loss is its average."
    assert not same(got, right / math.log(2)), "Yours is in bits. Nats have the natural logarithm."
    assert not same(got, -(3 / 4 + 7 / 8) / 2), "Yours averages the probabilities. Where is their logarithm?"
    assert not same(got, (math.log(2) + math.log(4 / 3) + math.log(8 / 7)) / 3), (
        "Yours takes the whole text. Only tokens from `start` on count."
    )
    assert same(got, right), (
        "Four tokens, and the answer starts at 2. Lane 1 gives the token at 2 a probability of 3/4, lane 2 "
        "gives the token at 3 one of 7/8: the loss is the average of ln(4/3) and ln(8/7), 0.211 nats. Lane 3 "
        "was asked for a token that nobody knows."
    )
    everything = (math.log(2) + math.log(4 / 3) + math.log(8 / 7)) / 3
    try:
        answer(halves, torch.tensor([1, 0, 1, 1]), 0)
    except (IndexError, RuntimeError, ValueError):
        raise AssertionError(
            "With `start` = 0 yours asks for a lane before the first. Nobody was asked for the first token, "
            "so there the answer begins with the token at 1."
        ) from None
    for start in (1, 0):
        assert same(answer(halves, torch.tensor([1, 0, 1, 1]), start), everything), (
            f"With `start` = {start} all tokens count but the first, which no lane was asked for: three of "
            "four." + (" (A lane of `start - 1` is the last one here.)" if start == 0 else "")
        )
    assert same(answer(halves, torch.tensor([1, 0, 1, 1]), 3), math.log(8 / 7)), (
        "With `start` = 3 one token counts, the last, and lane 2 was asked for it."
    )
    large = torch.tensor([[1000.0, 0.0], [0.0, 0.0]])
    uneven = torch.tensor([[1000.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    assert same(
        answer(uneven, torch.tensor([1, 0, 2]), 1), _lane_losses(uneven, torch.tensor([1, 0, 2])).mean()
    ), (
        "One row has a logit of 1000, whose exponential is infinite, and the next one has none. Before you "
        "take exponentials, take away the largest logit, and in each row its own; or let PyTorch take the "
        "logarithm of a softmax at once."
    )
    assert same(answer(large, torch.tensor([0, 1]), 1), 1000.0), (
        "With logits of 1000 and 0, the token that got 0 costs 1000 nats. An exponential of 1000 is "
        "infinite, and one of −1000 is 0. Let PyTorch take the logarithm of a softmax at once."
    )
    generator = torch.Generator().manual_seed(0)
    for tokens, vocabulary, start in ((7, 5, 4), (9, 12, 2)):
        logits = 3 * torch.randn(tokens, vocabulary, generator=generator)
        ids = torch.randint(vocabulary, (tokens,), generator=generator)
        expected = _lane_losses(logits, ids)[start - 1 :].mean()
        assert same(answer(logits, ids, start), expected), (
            f"{tokens} tokens of a vocabulary of {vocabulary}, the answer from {start} on: a probability is "
            "the exponential of a logit divided by the sum over the *vocabulary*, and the logarithm is the "
            "natural one."
        )


def _updated(
    table: Tensor, ids: Tensor, rate: float, *, average: bool = True, uphill: bool = False,
    lost: bool = False, shift: int = 1, dim: int = 1, right: float = 1.0, of_all: bool = False,
    last: bool = False, in_turn: bool = False,
) -> Tensor:  # fmt: skip
    rows, answers = (ids[:-1], ids[1:]) if shift else (ids, ids)
    if in_turn:  # a later lane asks the table that an earlier one has moved
        table = table.clone()
        for row, answer in zip(rows, answers, strict=True):
            table[row] -= rate / len(rows) * (table[row].softmax(dim=0) - F.one_hot(answer, len(table)))
        return table
    if last:  # the last token asks as well, for the first
        rows, answers = ids, ids.roll(-1)
    slope = table.softmax(dim=dim)[rows]
    slope[range(len(rows)), answers] -= right
    if average:
        slope = slope / (len(ids) if of_all else len(rows))
    slopes = torch.zeros_like(table)
    if lost:
        slopes[rows] += slope
    else:
        slopes.index_add_(0, rows, slope)
    return table + (rate if uphill else -rate) * slopes


_STEP_MISTAKES = (  # of a step of training, and what is said of each
    ({"uphill": True}, "Yours goes up: the loss grows. Numbers move *against* their slopes."),
    (
        {"lost": True},
        "A row that is asked twice gets both slopes. Yours keeps one of them, as `slopes[rows] += …` does.",
    ),
    ({"average": False}, "Yours is a step on the sum of the losses. The loss is their average."),
    ({"of_all": True}, "The average is over lanes that have an answer, one less than there are tokens."),
    ({"shift": 0}, "Yours asks each lane for its own token. It is asked for the next one."),
    ({"last": True}, "The last lane has no answer, and asks nothing."),
    ({"right": 0.0}, "Yours takes *p* for the slope. Which logit should have had everything?"),
    ({"dim": 0}, "A softmax runs over the words that may follow, along a row of the table."),
    (
        {"in_turn": True},
        "Yours moves the table lane by lane, so that a row that is asked twice has moved when it is asked "
        "again. One step takes all slopes from the table as it was given.",
    ),
)


@exercise(
    "one step of training",
    wrong=(
        *(partial(_updated, **mistake) for mistake, _ in _STEP_MISTAKES),
        lambda table, ids, rate: table,
        lambda table, ids, rate: table.copy_(_updated(table, ids, rate)),  # in place
        lambda table, ids, rate: _updated(table, ids, rate) - table,  # the step alone
        lambda table, ids, rate: _updated(table, ids, rate) - rate * table.softmax(1) / 1000,  # unasked rows
    ),
    without=(
        "backward", "autograd", "requires_grad_", "jacobian", "cross_entropy", "CrossEntropyLoss", "nll_loss",
        "NLLLoss",
    ),
)  # fmt: skip
def one_update(answer):
    """What the model said minus what it should have said, added up in the row that was asked."""
    table = torch.tensor([[0.0, math.log(3)], [0.0, 0.0]])
    got = answer(table.clone(), torch.tensor([0, 0]), 1.0)
    assert isinstance(got, Tensor | list | tuple) or hasattr(got, "shape"), "Return the new table."
    right = [[0.75, math.log(3) - 0.75], [0.0, 0.0]]
    assert not same(got, [[-0.75, math.log(3) + 0.75], [0.0, 0.0]]), _STEP_MISTAKES[0][1]
    assert same(got, right), (
        "Two words, a text of two tokens, 0 and 0, and a rate of 1. Row 0 gave a quarter to word 0, which "
        "came, and three quarters to word 1. So p − y is (−0.75, 0.75), and the row moves against it; row 1 "
        "was not asked."
    )
    generator = torch.Generator().manual_seed(0)
    for vocabulary, text, rate in (
        (3, [0, 1, 0, 2, 0, 1], 0.5),
        (6, [4, 4, 4, 1, 2, 4], 2.0),
        (4, [3, 1], 0.1),
    ):
        table = torch.randn(vocabulary, vocabulary, generator=generator)
        ids, given = torch.tensor(text), table.clone()
        got = answer(given, ids.clone(), rate)
        assert same(given, table), "Your step has overwritten the table that it was given. Return a new one."
        expected = _updated(table, ids, rate)
        for mistake, says in _STEP_MISTAKES:
            wrong = _updated(table, ids, rate, **mistake)
            if not same(wrong, expected, 1e-4):
                assert not same(got, wrong, 1e-4), says
        assert not same(got, expected - table, 1e-4), "That is the step alone. Return the table after it."
        assert same(got, expected, 1e-4), (
            f"With {vocabulary} words, the text {text} and a rate of {rate}, the table is another one. For "
            "each lane but the last: p − y at the row of its token, over the number of these lanes."
        )


_FLOOR = {"best": 0.2637, "blind": 0.3365, "is": 0.6667}
_FIVE = "Yours is an average over five tokens. A text of five words asks four questions."
_BITS = "That is in bits. The loss is in nats: take the natural logarithm."
_ALL_IN_ONE = "That is what one text costs in all. The loss is the average over its four answers."
_COIN = "The noun is no fair coin here. `cat` comes three times in five, which costs less than ln 2."
_FLOORS_OTHERWISE = (  # what one of the losses is by another count, and what is said of it
    ("best", 0.2110, _FIVE),
    ("blind", 0.2692, _FIVE),
    ("best", 0.3805, _BITS),
    ("blind", 0.4855, _BITS),
    ("best", 1.0549, _ALL_IN_ONE),
    ("blind", 1.3460, _ALL_IN_ONE),
    ("best", 0.2688, _COIN),
    ("blind", 0.3408, "Neither the noun nor the verb is a fair coin here: both come two to three."),
    (
        "best",
        0.1733,
        "So it was for the two sentences of the page. Here `cat` comes oftener, and one verb is wrong.",
    ),
    (
        "blind",
        0.3466,
        "So it was for the two sentences of the page. Here the words are not equally frequent.",
    ),
    ("best", 0.1683, "After `the cat over there` even the best model cannot be sure: the lesson says both."),
    ("best", 0.0955, "After `the` nobody can know which noun will come. That costs something, too."),
    (
        "best",
        0.3274,
        "Of five texts, only three have `cat`: what is unsure there counts three times in five.",
    ),
)


@exercise(
    "floor",
    wrong=(
        {"best": 0.173, "blind": 0.347, "is": 0.667},  # of the page's lesson
        {"best": 0.0, "blind": 0.337, "is": 0.667},
        {"best": 0.264, "blind": 0.337, "is": 1.0},
        {"best": 0.264, "blind": 0.337, "is": 0.4},
        {"best": 0.264, "blind": 0.337, "is": 0.5},
        {"best": 0.337, "blind": 0.264, "is": 0.667},
        {"best": 0.211, "blind": 0.269, "is": 0.667},
        {"best": 0.381, "blind": 0.486, "is": 0.667},
        {"best": 1.055, "blind": 1.346, "is": 0.667},
        {"best": 0.168, "blind": 0.337, "is": 0.667},
        {"best": 0.264, "blind": 0.347, "is": 0.667},
        {"best": 0.269, "blind": 0.337, "is": 0.667},
        {"best": 0.26, "blind": 0.34, "is": 0.67},
    ),
)
def floor(answer):
    """What the text leaves open costs every model the same; the rest is what there is to learn."""
    assert isinstance(answer, dict) and set(answer) == set(_FLOOR), (
        'Expected a dictionary of three numbers, {"best": ..., "blind": ..., "is": ...}.'
    )
    assert ... not in answer.values(), "Put your three numbers where the dots stand."
    assert not any(isinstance(number, str) for number in answer.values()), "Give numbers, without quotes."
    best, blind, chance = (float(answer[name]) for name in _FLOOR)
    assert abs(chance - 0.4) > 0.02, (
        "That is how often `is` ends any text. Asked is how often it follows `the cat over there`."
    )
    assert abs(chance - _FLOOR["is"]) < 0.01, (
        "The best model says what is true of the lesson. Of the three texts with `cat`, how many end in `is`?"
    )
    assert best > 0, "After `the` nobody can know which noun will come, so the loss cannot be 0."
    assert best < blind, "Who looks at the noun predicts better than who does not: `best` is the lower one."
    for name, number in (("best", best), ("blind", blind)):
        if abs(number - _FLOOR[name]) >= 0.003:
            assert abs(number - round(_FLOOR[name], 2)) > 1e-6, (
                f"`{name}`: right as far as it goes. Give three digits after the point."
            )
            for asked, otherwise, says in _FLOORS_OTHERWISE:
                assert asked != name or abs(number - otherwise) >= 0.0015, f"`{name}`: {says}"
    assert abs(blind - _FLOOR["blind"]) < 0.003, (
        "`blind`: two of the four answers are sure. The noun, after `the`, and the verb, after `there`, are "
        "not: with which chances does each come? A question whose answers have the chances p and 1 - p costs "
        "-p ln p - (1 - p) ln (1 - p) on average."
    )
    assert abs(best - _FLOOR["best"]) < 0.003, (
        "`best`: the noun costs what it costs the other model. The verb costs nothing in the two texts with "
        "`cats`; in the three with `cat` it is *is* twice and *are* once."
    )


def _trained(
    table: Tensor, texts, steps: int, rate: float, *, twice: bool = False, kept: bool = False,
    kept_within: bool = False, at_once: bool = False, one_round: bool = False, uphill: bool = False,
    backwards: bool = False, summed: bool = False, own: bool = False,
) -> Tensor:  # fmt: skip
    table, slopes = table.clone(), torch.zeros_like(table)
    for _ in range(1 if one_round else steps):
        if kept_within or at_once:
            slopes = torch.zeros_like(table)
        for ids in texts[::-1] if backwards else texts:
            if not (kept or kept_within or at_once):
                slopes = torch.zeros_like(table)
            rows, answers = ids[:-1], ids[:-1] if own else ids[1:]
            p = table[rows].softmax(dim=1)
            y = F.one_hot(answers, len(table)).to(p.dtype)
            if twice:  # the way back through a softmax that was taken once too often
                again = p.softmax(dim=1) - y
                slope = p * (again - (p * again).sum(dim=1, keepdim=True))
            else:
                slope = p - y
            slopes = slopes.index_add(0, rows, slope / (1 if summed else len(rows)))
            if not at_once:
                table = table + (rate if uphill else -rate) * slopes
        if at_once:
            table = table - rate * slopes / len(texts)
    return table


_TRAINING_MISTAKES = (  # and what is said of each
    ({"twice": True, "kept": True}, "That is what the broken one gives."),
    (
        {"kept": True},
        "One of two is mended. But the slopes of earlier steps are still in yours: `backward` *adds* to what "
        "is there.",
    ),
    (
        {"twice": True},
        "One of two is mended. But what does `cross_entropy` expect: logits, or probabilities?",
    ),
    ({"kept_within": True}, "Yours forgets the slopes once a round. Forget them in each step, at each text."),
    ({"at_once": True}, "Yours makes one step with all texts together. Each text makes a step of its own."),
    ({"one_round": True}, "Yours goes through the texts once. They come round `steps` times."),
    ({"uphill": True}, "Yours goes uphill. Numbers move *against* their slopes."),
    ({"backwards": True}, "Yours reads the texts in another order."),
    ({"summed": True}, "Yours takes the sum over the lanes. The loss is their average."),
    ({"own": True}, "Yours asks each lane for its own token. It is asked for the next one."),
)


@exercise(
    "mended training",
    wrong=(
        *(partial(_trained, **mistake) for mistake, _ in _TRAINING_MISTAKES),
        lambda table, texts, steps, rate: table.copy_(_trained(table, texts, steps, rate)),  # in place
        lambda table, texts, steps, rate: table,
    ),
)
def mended_training(answer):
    """Logits go into the cross-entropy, and each step forgets the slopes of the step before."""
    generator = torch.Generator().manual_seed(0)
    for vocabulary, texts, steps, rate in (
        (3, [[0, 1, 2, 0]], 2, 1.0),  # in a single step all slopes are new, and one of the bugs is none
        (4, [[0, 1, 2, 3, 0, 2], [3, 3, 1]], 3, 0.5),
        (6, [[5, 0, 1], [2, 4, 3, 5, 0], [1, 1]], 2, 2.0),
    ):
        table = torch.randn(vocabulary, vocabulary, generator=generator)
        texts, given = [torch.tensor(text) for text in texts], table.clone()
        got = answer(given, [text.clone() for text in texts], steps, rate)
        assert same(given.detach(), table), (
            "Your training has overwritten the table that it was given. Work on a copy, and return that."
        )
        got = got.detach() if isinstance(got, Tensor) else got
        expected = _trained(table, texts, steps, rate)
        for mistake, says in _TRAINING_MISTAKES:
            wrong = _trained(table, texts, steps, rate, **mistake)
            if not same(wrong, expected, 1e-4):
                assert not same(got, wrong, 1e-4), says
        assert same(got, expected, 1e-4), (
            f"{vocabulary} words, texts of {' and '.join(str(len(text)) for text in texts)} tokens, rounds: "
            f"{steps}, rate {rate}: the table is another one. Each text, in its order and in each round, "
            "makes one step on the average loss of its lanes."
        )


def _shares(rows: Tensor) -> dict[tuple, Fraction]:
    """How often each row comes, as its share of all."""
    counts = Counter(map(tuple, rows.tolist()))
    return {row: Fraction(count, len(rows)) for row, count in counts.items()}


def _crossed(lesson: Tensor, ends: Tensor) -> Tensor:
    """Each beginning with each of some last words."""
    starts = lesson[:, :-1].repeat_interleave(len(ends), dim=0)
    return torch.cat([starts, ends.repeat(len(lesson))[:, None]], dim=1)


def _ending_in(lesson: Tensor, ends: Tensor) -> Tensor:
    return torch.cat([lesson[:, :-1], ends[:, None]], dim=1)


@exercise(
    "control",
    wrong=(
        lambda lesson: lesson,
        lambda lesson: _ending_in(lesson, lesson[:, -1].roll(1)),  # as easy to learn, turned round
        lambda lesson: _ending_in(lesson, lesson[:, -1].flip(0)),
        lambda lesson: _ending_in(lesson, lesson[0, -1].expand(len(lesson))),  # one verb for all
        lambda lesson: _ending_in(lesson, lesson[torch.randperm(len(lesson)), -1]),  # by chance
        lambda lesson: _ending_in(lesson, torch.randint(7, (len(lesson),))),
        lambda lesson: _crossed(lesson, lesson[:, -1].unique()),  # frequencies are lost
        lambda lesson: _crossed(lesson, torch.arange(7)),
        lambda lesson: _crossed(lesson.unique(dim=0), lesson[:, -1]),
        lambda lesson: lesson[:, torch.randperm(lesson.shape[1])],
        lambda lesson: _crossed(lesson, lesson[:, -1])[:, 1:],
        lambda lesson: torch.cat([_crossed(lesson, lesson[:, -1]), lesson]),  # some of it is left
        lambda lesson: _ending_in(
            _crossed(lesson, lesson[:, -1]), lesson[:, -1].repeat_interleave(len(lesson))
        ),
    ),
)
def control(answer):
    """All is as frequent as before, and the last word can no longer be known."""
    for texts in (
        [[0, 2, 3, 4, 6], [0, 1, 3, 4, 5]],
        [[0, 2, 3, 4, 6], [0, 1, 3, 4, 5], [0, 1, 3, 4, 5]],
        [[4, 1, 6], [4, 1, 6], [2, 2, 5], [3, 1, 6]],
        [[1, 2], [2, 3], [3, 1]],
    ):
        lesson = torch.tensor(texts)
        given = lesson.clone()
        got = answer(given)
        assert same(given, lesson), "Your control has changed the lesson that it was given. Make a new one."
        assert hasattr(got, "shape") and len(got.shape) == 2 and got.shape[1] == lesson.shape[1], (
            "Return ids of shape (texts, words): as many words in a text as before, and any number of texts."
        )
        got = torch.as_tensor(got).long()
        told = f"For the lesson {texts}"
        starts, ends = _shares(lesson[:, :-1]), _shares(lesson[:, -1:])
        assert _shares(got[:, :-1]).keys() == starts.keys(), (
            f"{told}, the beginnings are no longer the same. Only what follows them should change."
        )
        assert _shares(got[:, -1:]).keys() == ends.keys(), (
            f"{told}, the last words are no longer the same: none may be new, and none may be lost."
        )
        assert _shares(got[:, :-1]) == starts, (
            f"{told}, some beginnings have become more frequent than others. A model would learn that, too."
        )
        assert _shares(got[:, -1:]) == ends, (
            f"{told}, some last words have become more or less frequent. Then a change of the loss could "
            "come of that alone."
        )
        expected = {(*start, *end): a * b for start, a in starts.items() for end, b in ends.items()}
        assert _shares(got) == expected, (
            f"{told}, the last word can still be guessed from what stands before it, if only a little. To "
            "exchange the words is not enough: that is another rule, and as easy to learn. Chance makes some "
            "rule, too. Which texts must there be, so that no beginning says anything?"
        )


quiz = Quiz(
    [
        (
            "The mask is forgotten in training. What becomes of the loss, and of what the model writes?",
            [
                "The loss stays high, the text is good",
                "The loss falls below what is possible, the text is bad",
                "Both are as before",
            ],
            1,
            "Each lane can read its answer in the next one, and has no reason to learn anything else. In "
            "writing there is no next one.",
        ),
        (
            "In one lane the model gave the right word a probability of 0.9. What is the slope of the loss "
            "at the logit of that word?",
            ["0.9", "−0.1", "−0.9"],
            1,
            "p − y is 0.9 − 1. A larger logit would make the loss smaller, but not by much any more.",
        ),
        (
            "The loss of a model on our two sentences has come to 0.17 and stays there. What would lower it?",
            ["A larger model", "More steps", "Nothing"],
            2,
            "It is what `the` leaves open: whether `cat` or `cats` comes is decided by a coin.",
        ),
        (
            "How many slopes does one walk back through a model of eight billion numbers give?",
            ["One", "One for each token", "Eight billion"],
            2,
            "One for each number, for about the price of two more walks forwards.",
        ),
    ]
)
