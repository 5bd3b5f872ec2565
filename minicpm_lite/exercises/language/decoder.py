"""Checks and quiz of the chapter on the decoder."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ...config import ModelConfig, load_config
from ...lab.exercises import exercise
from ...lab.mistakes import same
from ...lab.quiz import Quiz
from ...language.context import Context
from ...language.decoder import Block

_TWO_NOUNS = {"is": 0.426, "are": 0.426}
_WHERE_ENDS = -1.300  # the number of the lane after the block
_WHERE_OTHERWISE = (  # what it ends at with a step left out or another, and what is said of it
    (
        -1.276,
        "You have taken *verb* from the sentence of the page, 5.74. Here head 2 divides its weight by six.",
    ),
    (-1.565, "The second head brings something, too: *where*, of which half is written into *verb*."),
    (-1.383, "What attention found is added to the lane times 1.4."),
    (0.100, "What the rules write is added to the lane times 1.4."),
    (0.041, "Both results are added to the lane times 1.4."),
    (-1.467, "The gate is silu(z), a little less than z itself."),
    (-0.992, "Of head 2's *where* one half is written into *verb*."),
    (1.462, "The gate's weight of *verb* is 2."),
)


def _masked_attention(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor) -> Tensor:
    scores = query @ key.T / math.sqrt(query.shape[1])
    return scores.masked_fill(hidden, -math.inf).softmax(dim=1) @ value


def _steps_back(tokens: int) -> Tensor:
    position = torch.arange(tokens)
    return position[:, None] - position


def _window(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    back = _steps_back(len(query))
    return _masked_attention(query, key, value, (back < 0) | (back >= window))


def _window_and_one(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    return _window(query, key, value, window + 1)


def _window_less_one(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    return _window(query, key, value, max(window - 1, 1))


def _masked_by_a_number(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    back = _steps_back(len(query))
    scores = query @ key.T / math.sqrt(query.shape[1])
    return scores.masked_fill((back < 0) | (back >= window), -100.0).softmax(dim=1) @ value


def _both_ways(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    return _masked_attention(query, key, value, _steps_back(len(query)).abs() >= window)


def _whole_text(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    return _masked_attention(query, key, value, _steps_back(len(query)) < 0)


def _masked_late(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    back = _steps_back(len(query))
    weights = (query @ key.T / math.sqrt(query.shape[1])).softmax(dim=1)
    return weights.masked_fill((back < 0) | (back >= window), 0.0) @ value


def _over_askers(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    back = _steps_back(len(query))
    scores = query @ key.T / math.sqrt(query.shape[1])
    return scores.masked_fill((back < 0) | (back >= window), -math.inf).softmax(dim=0) @ value


def _without_itself(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    back = _steps_back(len(query))
    return _masked_attention(query, key, value, (back <= 0) | (back >= window))


def _zero_times_infinity(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    back = _steps_back(len(query))
    scores = query @ key.T / math.sqrt(query.shape[1])
    hidden = (back < 0) | (back >= window)
    return (scores + hidden.float() * -math.inf).softmax(dim=1) @ value


def _undivided(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    return _window(query * math.sqrt(query.shape[1]), key, value, window)


@exercise(
    "one cat",
    wrong=(
        (2.98, 0.01),  # of the cats
        (-3.0, 0.0),  # the value, not its share
        (-2.97, 0.01),  # a weight of 0.99
        (0.0, 0.01),
        (-2.98, 2.98),
        (-0.3, 0.0),  # the table's row
        (-2.98, 0.0),  # nothing of the others
        (-4.17, 0.01),  # times r
    ),
)
def brought(answer):
    """The same key is found, and it hands over the other number."""
    assert isinstance(answer, tuple | list | Tensor) and len(answer) == 2, (
        "Expected a pair of numbers, (many, where)."
    )
    assert ... not in tuple(answer), "Put your two numbers where the dots stand."
    assert not any(isinstance(number, str) for number in answer), "Give numbers, without quotes."
    many, where = (float(number) for number in answer)
    assert not same([many, where], [0.01, -2.98]), "First *many*, then *where*."
    assert many < 0, "The `many` of `cat` is below zero. What becomes of its value?"
    assert not same([many, where], [-3.0, 0.0]), (
        "That is the value of `cat` itself. The lane gets a share of it, and small shares of the others."
    )
    assert abs(many + 4.17) > 0.02, (
        "You have gone one step further: -4.17 is 1.4 times what the head brings. Asked is what it brings."
    )
    assert not 0.006 <= abs(many + 2.98) < 0.03, (
        "Nearly. Two digits after the point are asked for, so carry three digits of the weights."
    )
    assert abs(many + 2.98) < 0.006, (
        "A weight or a value is another one. Keys and queries of this head do not read `many`, so the "
        "weights are those of the text above. The value of `cat` is 2.5 times its *many* after the norm, and "
        "counts with its weight."
    )
    assert where != 0, (
        "Nearly nothing, but not nothing: what do 0.003 of `over` and 0.004 of `there` bring of *where*?"
    )
    assert abs(where - 0.01) < 0.006, (
        "The second number comes from `over` and `there`, which are as they were."
    )


@exercise(
    "attention with a window",
    wrong=(
        _window_and_one,
        _window_less_one,
        _both_ways,
        _whole_text,
        _masked_late,
        _undivided,
        _masked_by_a_number,
        _over_askers,
        _without_itself,
        _zero_times_infinity,
    ),
    without=("a loop", "scaled_dot_product_attention", "dense_attention"),
)
def window_attention(answer):
    """Two masks in one: nothing from the future, and nothing from too far back."""
    zeros, value = torch.zeros(4, 2), torch.tensor([[8.0], [4.0], [6.0], [2.0]])
    got = answer(zeros, zeros, value, 4)
    assert got is not None, "Return the new values, one row for each token; yours returns nothing."
    assert not same(got[1:], _without_itself(zeros, zeros, value, 4)[1:]), (
        "Yours leaves the token itself out. It sees itself, and counts in the window."
    )
    assert not torch.as_tensor(got).isnan().any(), (
        "Yours is not a number (NaN) in places: a row in which every score is minus infinity has no softmax, "
        "and 0 times infinity is no number either. Put minus infinity only where it must be."
    )
    assert not same(got, _masked_late(zeros, zeros, value, 4)), (
        "Your weights no longer add up to 1: they are taken away after the softmax, which has counted them."
    )
    assert not same(got, _both_ways(zeros, zeros, value, 4)), "Yours looks forward as well as back."
    assert not same(got, _over_askers(zeros, zeros, value, 4)), (
        "Your softmax runs over those who ask. Each row belongs to one asker, and its weights add up to 1."
    )
    assert not same(got, _window(zeros, zeros, value, 3)), (
        "With a window of 4 the last of four tokens sees all four, itself included; yours sees one too few."
    )
    assert same(got, [[8.0], [6.0], [6.0], [5.0]]), (
        "Queries of zero, values 8, 4, 6, 2 and a window of 4: all scores are equal, so each token takes the "
        "plain average of what it may see, 8, then (8 + 4) / 2, and so on. Does yours see the future, do its "
        "weights no longer add up to 1, or does it pass over the `window` that is given?"
    )
    late = _masked_late(zeros, zeros, value, 2)
    assert not same(answer(zeros, zeros, value, 2), late), (
        "Your weights do not add up to 1: mask the scores, before the softmax."
    )
    assert same(answer(zeros, zeros, value, 2), [[8.0], [6.0], [5.0], [4.0]]), (
        "Queries of zero, values 8, 4, 6, 2 and a window of 2: the last token sees 6 and 2, itself included, "
        "and their average is 4."
    )
    assert same(answer(zeros, zeros, value, 1), value), "With a window of 1 each token sees only itself."
    away = torch.tensor([[20.0, 0.0]] * 4)
    assert same(answer(away, -away, value, 2), [[8.0], [6.0], [5.0], [4.0]]), (
        "Scores may be as low as −283. A token that must not be seen needs one that is lower than any: minus "
        "infinity."
    )
    generator = torch.Generator().manual_seed(0)
    for tokens, width, window in ((6, 8, 3), (5, 4, 9)):
        query, key = torch.randn(2, tokens, width, generator=generator)
        value = torch.randn(tokens, 3, generator=generator)
        got = answer(query.clone(), key.clone(), value.clone(), window)
        assert not same(got, _undivided(query, key, value, window)), (
            "Yours takes the scores as they are. They are divided by the root of the width of a query."
        )
        assert same(got, _window(query, key, value, window)), (
            f"{tokens} tokens of width {width} with random queries and a window of {window}: the scores are "
            "products of query and key, divided by the root of *their* width; values may have another one."
        )


@exercise(
    "share keys",
    wrong=(
        lambda key, heads: key.repeat(heads // key.shape[0], 1, 1),
        lambda key, heads: key.repeat_interleave(2, 0),
        lambda key, heads: key.repeat_interleave(heads, 0),
        lambda key, heads: key,
        lambda key, heads: key.repeat_interleave(heads // len(key), 1).reshape(heads, *key.shape[1:]),
        lambda key, heads: key.repeat_interleave(heads // len(key), 0).flip(1),
        lambda key, heads: (
            key.repeat_interleave(heads // len(key), 0).mean(1, keepdim=True).expand(-1, 2, -1)
        ),
    ),
)
def share_keys(answer):
    """Neighbouring query heads share a key head."""
    for kept, heads in ((2, 4), (2, 6), (3, 3), (1, 4)):
        key = torch.arange(6.0 * kept).view(kept, 2, 3)
        got = answer(key, heads)
        assert isinstance(got, Tensor), f"Return a tensor; yours is a {type(got).__name__}."
        assert same(tuple(got.shape), (heads, 2, 3)), (
            f"{heads} query heads, 2 tokens, width 3 need keys of shape ({heads}, 2, 3); yours have "
            f"{tuple(got.shape)}."
        )
        expected = torch.stack([key[head * kept // heads] for head in range(heads)])
        assert same(got[:, 0, 0], expected[:, 0, 0]), (
            f"{heads} query heads share {kept} key heads: how many form a group, and do its members stand "
            "side by side?"
        )
        assert same(got, expected), (
            "Each head comes as it is: its tokens in their order, its features in theirs."
        )


@exercise(
    "forecast",
    wrong=(
        {"is": 0.956, "are": 0.001, "where": -1.3},
        {"is": 0.001, "are": 0.956, "where": -1.3},
        {"is": 0.5, "are": 0.5, "where": -1.3},
        {"is": 0.15, "are": 0.85, "where": -1.3},
        {"is": 0.05, "are": 0.05, "where": -1.3},
        {"is": 0.45, "are": 0.41, "where": -1.3},
        {"is": 0.436, "are": 0.416, "where": -1.3},
        {"is": 0.42, "are": 0.42, "where": 0.0},
        {"is": 0.42, "are": 0.42, "where": 0.14},
        {"is": 0.42, "are": 0.42, "where": 3.6},
        {"is": 0.42, "are": 0.42, "where": 0.1},
        {"is": 0.42, "are": 0.42, "where": 1.3},
        *({"is": 0.426, "are": 0.426, "where": where} for where, _ in _WHERE_OTHERWISE),
    ),
)
def forecast(answer):
    """Equal keys share the weight, opposite values cancel; *there* has the verb, too, and takes the rest."""
    assert isinstance(answer, dict) and set(answer) == {"is", "are", "where"}, (
        "Expected a dictionary with two probabilities and the last number of the lane for *where*, "
        '{"is": ..., "are": ..., "where": ...}.'
    )
    assert ... not in answer.values(), "Put your three numbers where the dots stand."
    assert not any(isinstance(number, str) for number in answer.values()), "Give numbers, without quotes."
    chances = [answer[word] for word in _TWO_NOUNS]
    assert all(0 <= float(chance) <= 1 for chance in chances), "Probabilities lie between 0 and 1."
    off = max(abs(answer[word] - chance) for word, chance in _TWO_NOUNS.items())
    assert not 0.005 < abs(answer["is"] - answer["are"]) < 0.03, (
        "That is nearly equal. If you expect that both are equally likely, give the same number twice."
    )
    assert abs(answer["is"] - answer["are"]) <= 0.005, (
        "One noun is singular and one plural. Both have the same key: what are their weights, and what is "
        "the sum of their values?"
    )
    assert abs(answer["where"] + _WHERE_ENDS) > 0.016, (
        "The size of *where* is right. Check its sign: more is taken away than the lane held."
    )
    for where, says in _WHERE_OTHERWISE:
        assert abs(answer["where"] - where) > 0.006, says
    assert abs(answer["where"] - _WHERE_ENDS) < 0.0105, (
        "The verbs are equal. But *where* ends elsewhere: with nothing in *many*, what does the norm leave "
        "of *where* and of *verb*? The gate times that *where*, times 1.4, is taken away."
    )
    assert answer["is"] + answer["are"] < 0.99, (
        "They are equal, but a third word takes a part: which one has the *verb* number, too?"
    )
    assert not 0.022 <= off < 0.05, "They are equal, and you are near. How much is left over for *there*?"
    assert off < 0.022, (
        f"They are equal, and leave {1 - answer['is'] - answer['are']:.2f} to others. The third word has the "
        "same *verb* number, but *where* was cleared to below zero: "
        "it gets less than a third, and more than nothing."
    )


@exercise(
    "mended block",
    wrong=(
        lambda x, norm, attention, feed_forward, r: _broken_block(x, norm, attention, feed_forward, r),
        lambda x, norm, attention, feed_forward, r: _post_norm(x, norm, attention, feed_forward, r),
        lambda x, norm, attention, feed_forward, r: _side_by_side(x, norm, attention, feed_forward, r),
        lambda x, norm, attention, feed_forward, r: _unscaled(x, norm, attention, feed_forward, r),
        lambda x, norm, attention, feed_forward, r: _first_only(x, norm, attention, feed_forward, r),
        lambda x, norm, attention, feed_forward, r: _second_unscaled(x, norm, attention, feed_forward, r),
        lambda x, norm, attention, feed_forward, r: _mended_in_place(x, norm, attention, feed_forward, r),
    ),
)
def mended_block(answer):
    """The parts read a normed copy; the stream itself is only added to."""
    x = torch.tensor([[3.0, -6.0], [40.0, 30.0]])

    def sign(x: Tensor) -> Tensor:
        return x.sign()

    def nothing(x: Tensor) -> Tensor:
        return 0 * x

    given = x.clone()
    got = answer(given, sign, lambda n: n + 1, nothing, 0.5)
    assert same(given, x), (
        "Your block has overwritten the stream that it was given, as `x += …` does. Whoever gave it may "
        "still need it, and a gradient its old numbers. Make a new one: `x = x + …`."
    )
    got = answer(x.clone(), sign, nothing, nothing, 0.5)
    assert same(got, x), (
        "If both parts find nothing, the stream must leave the block as it came, whatever its size."
    )
    got = answer(x.clone(), sign, lambda n: 10 * n, nothing, 0.5)
    assert not same(got, x + 10 * x.sign()), "What attention found is added times `r`, 0.5 here."
    assert not same(got, 6 * x), "Attention reads a normed copy, and yours has read the stream as it is."
    assert same(got, x + 5 * x.sign()), (
        "With a norm that leaves only signs, an attention that multiplies by 10 and r = 0.5, the stream "
        "gains 5 times its signs."
    )
    got = answer(x.clone(), sign, nothing, lambda n: 10 * n, 0.25)
    assert not same(got, x + 10 * x.sign()), "What the feed-forward network found is added times `r` as well."
    assert not same(got, 3.5 * x), "The feed-forward network reads a normed copy, too; yours read the stream."
    assert same(got, x + 2.5 * x.sign()), (
        "The feed-forward network reads a normed copy, and is scaled by `r`, too."
    )
    got = answer(x.clone(), sign, lambda n: -10 * n, lambda n: n + 1, 1.0)
    expected = x - 10 * x.sign()
    assert same(got, expected + expected.sign() + 1), (
        "The feed-forward network reads the stream *after* attention has been added to it."
    )
    assert same(answer(x / 10, torch.tanh, torch.exp, torch.cos, 1.4), _mended_block(x / 10)), (
        "With other functions for the norm and the parts the result is another one: use those that are "
        "given, and let the feed-forward network read the stream that attention, *times* `r`, was added to."
    )


def _mended_block(x: Tensor) -> Tensor:
    x = x + 1.4 * x.tanh().exp()
    return x + 1.4 * x.tanh().cos()


def _broken_block(x, norm, attention, feed_forward, r):
    x = norm(x)
    x = x + r * attention(x)
    x = norm(x)
    return x + r * feed_forward(x)


def _post_norm(x, norm, attention, feed_forward, r):
    x = norm(x + r * attention(x))
    return norm(x + r * feed_forward(x))


def _side_by_side(x, norm, attention, feed_forward, r):
    return x + r * attention(norm(x)) + r * feed_forward(norm(x))


def _unscaled(x, norm, attention, feed_forward, r):
    x = x + attention(norm(x))
    return x + feed_forward(norm(x))


def _second_unscaled(x, norm, attention, feed_forward, r):
    x = x + r * attention(norm(x))
    return x + feed_forward(norm(x))


def _mended_in_place(x, norm, attention, feed_forward, r):
    x += r * attention(norm(x))
    x += r * feed_forward(norm(x))
    return x


def _first_only(x, norm, attention, feed_forward, r):
    x = x + r * attention(norm(x))
    return x + r * feed_forward(x)


def _turned(x: Tensor, position, base, sign=1, exponent=2, interleaved=False, first=0) -> Tensor:
    half = len(x) // 2
    angles = position * base ** (-torch.arange(first, half + first) * exponent / len(x))
    a, b = (x[0::2], x[1::2]) if interleaved else (x[:half], x[half:])
    a, b = (
        a * angles.cos() - sign * b * angles.sin(),
        b * angles.cos() + sign * a * angles.sin(),
    )
    return torch.stack([a, b], 1).flatten() if interleaved else torch.cat([a, b])


def _overwritten(x: Tensor, position, base) -> Tensor:
    half = len(x) // 2
    angles = position * base ** (-torch.arange(half) * 2 / len(x))
    a = x[:half] * angles.cos() - x[half:] * angles.sin()
    return torch.cat([a, x[half:] * angles.cos() + a * angles.sin()])


@exercise(
    "turn",
    wrong=(
        lambda x, position, base: _turned(x, position, base, interleaved=True),
        lambda x, position, base: _turned(x, position, base, sign=-1),
        lambda x, position, base: _turned(x, position, base, exponent=1),
        lambda x, position, base: _turned(x, position, 10_000.0),
        lambda x, position, base: _turned(x, position, base, first=1),
        lambda x, position, base: x.copy_(_turned(x, position, base)),  # in place
        _overwritten,
    ),
    without=("a loop", "naive_rotary", "apply_rotary"),
)
def turn(answer):
    """Half-split pairs, the right speeds, the right direction."""
    assert same(answer(torch.tensor([1.0, 2.0, 3.0, 4.0]), 0, 10_000.0), [1, 2, 3, 4]), (
        "Position 0 turns nothing."
    )
    got = answer(torch.tensor([1.0, 0.0]), 1, 10_000.0)
    assert not same(got, _turned(torch.tensor([1.0, 0.0]), 1, 10_000.0, first=1)), (
        "Pairs are counted from 0: the first turns by one radian a token, and yours is slower."
    )
    assert not same(got, [math.cos(1), -math.sin(1)]), "Yours turns the other way: check the two signs."
    assert not same(got, [math.cos(1), math.cos(1) * math.sin(1)]), (
        "Your second half is made from the *new* first half. Both need the old ones."
    )
    assert same(got, [math.cos(1), math.sin(1)]), (
        "One pair turns by one radian for each position, from (1, 0) towards (0, 1). Check the signs, and "
        "that the second line still sees the old first half."
    )
    assert same(answer(torch.tensor([1.0, 0.0, 0.0, 0.0]), 1, 10_000.0)[1], 0.0), (
        "With four entries, entry 0 turns with entry 2, not with entry 1: the pairs are half a head apart."
    )
    assert same(answer(torch.tensor([0.0, 1.0, 0.0, 0.0]), 1, 10_000.0)[3], math.sin(0.01)), (
        "With four entries and base 10,000, pair 1 turns by 10000 ** (-2/4) = 0.01 radians at position 1."
    )
    x = torch.tensor([1.0, -2.0, 3.0, 0.5, -1.5, 2.5, 0.25, -3.0])
    given = x.clone()
    answer(given, 3, 10_000.0)
    assert same(given, x), "Your function has overwritten the vector that it was given. Return a new one."
    for position, base in ((5, 500.0), (40, 10_000.0)):
        assert base == 10_000.0 or not same(
            answer(x.clone(), position, base), _turned(x, position, 10_000.0)
        ), "With a base of 500 your speeds are still powers of 10,000. The base is an argument."
        assert same(answer(x.clone(), position, base), _turned(x, position, base)), (
            f"Eight entries at position {position} with base {base:,.0f}: does your answer use all three "
            "arguments, and does each new half come from the two *old* ones?"
        )


def _looking_back(width: int, base: float, by: float = -1, size: float = 10.0, pairs: int | None = None):
    key = torch.zeros(2, width // 2)
    key[:, :pairs] = size
    return _turned(key.flatten(), by, base), key.flatten()


@exercise(
    "one word back",
    wrong=(
        lambda width, base: _looking_back(width, base, by=0),
        lambda width, base: _looking_back(width, base, by=1),
        lambda width, base: _looking_back(width, base, by=-2),
        lambda width, base: _looking_back(width, base, size=0.5),
        lambda width, base: _looking_back(width, base, pairs=1),
        lambda width, base: _looking_back(width, base, pairs=1, size=100.0),
        lambda width, base: _looking_back(width, 10_000.0),
        lambda width, base: _looking_back(width, base)[::-1],
    ),
)
def previous_word(answer):
    """At each position the query is what the key was one position before."""
    for width, base in ((8, 10_000.0), (16, 10_000.0), (8, 2.0), (16, 2.0)):
        got = answer(width, base)
        assert isinstance(got, tuple | list) and len(got) == 2, "Return two vectors, the query and the key."
        query, key = (torch.as_tensor(each, dtype=torch.float32) for each in got)
        assert query.shape == key.shape == (width,), (
            f"Query and key of a head {width} wide have {width} numbers each; yours have shapes "
            f"{tuple(query.shape)} and {tuple(key.shape)}."
        )
        rows = [torch.stack([_turned(each, t, base) for t in range(48)]) for each in (query, key)]
        weights = _masked_attention(*rows, torch.eye(48), _steps_back(48) < 0)
        before = weights.diagonal(-1)
        worst = 1 + before.argmin().item()
        found = weights[worst].argmax().item()
        everywhere = _masked_attention(*rows, torch.eye(48), torch.zeros(48, 48, dtype=torch.bool))
        assert everywhere.diagonal(1).min() < 0.5, (
            "At each position your query points at the token *after* it, which is hidden. Turn the other way."
        )
        for name, vector in (("query", query), ("key", key)):
            assert vector.abs().max() <= 20, (
                f"Your {name} has a number of {vector.abs().max():.1f}; none may be above 20 or below -20. "
                "With longer vectors one pair alone could do it."
            )
        said = (
            f"In a head {width} wide with base {base:,.0f}, token {worst} of 48 gives {before.min():.2f} of "
            "its weight to the one before it"
        )
        assert before.min() > 0.5 or found != worst - 1, (
            f"{said}: the right place, and too little weight. What makes a softmax sharper, and do all pairs "
            "help?"
        )
        assert before.min() > 0.5, (
            f"{said}, and {weights[worst, found]:.2f} to token {found}. When do the turned vectors point the "
            "same way, in every pair?"
        )


def _halves(first: str, second: str, third: str, size: float = 50.0):
    """Matrices that read the word of a lane ("this") or its note of the word before ("before")."""

    def follow(V: int):
        halves = {"this": torch.eye(V, 2 * V), "before": torch.eye(2 * V)[V:]}
        return size * halves[first], halves[second], halves[third]

    return follow


def _of_eight(V: int):
    this, before = torch.eye(8, 16), torch.eye(16)[8:]
    return 50 * this, before, this


@exercise(
    "who came after",
    wrong=(
        _halves("this", "this", "this"),  # finds itself
        _halves("before", "this", "this"),
        _halves("before", "before", "this"),
        _halves("this", "before", "before"),  # fetches the note
        _halves("this", "before", "this", size=1.0),  # hardly chooses
        _halves("this", "before", "this"),  # enough for a small vocabulary alone
        _halves("this", "before", "this", size=1000.0),
        _of_eight,
    ),
)
def follow(answer):
    """The query is a word, the key is a note of a word, the value is a word again."""
    for V, text in (
        (8, [3, 1, 4, 0, 3]),
        (8, [5, 6, 2, 5]),
        (30, [*range(20, 30), *range(12), 25]),
        (1000, [*range(400, 499), 450]),
    ):
        matrices = answer(V)
        assert isinstance(matrices, tuple | list) and len(matrices) == 3, (
            "Return three matrices, W_q, W_k, W_v."
        )
        W_q, W_k, W_v = (torch.as_tensor(each, dtype=torch.float32) for each in matrices)
        for name, W in (("W_q", W_q), ("W_k", W_k), ("W_v", W_v)):
            assert W.shape == (V, 2 * V), (
                f"With a vocabulary of {V}, {name} has shape ({V}, {2 * V}); yours has {tuple(W.shape)}."
            )
            assert W.abs().max() <= 50, f"{name} has a number beyond 50."
        ids = torch.tensor(text)
        words = torch.eye(V)[ids]
        lanes = torch.cat([words, torch.cat([torch.zeros(1, V), words[:-1]])], dim=1)
        scores = lanes @ W_q.T @ (lanes @ W_k.T).T / math.sqrt(V)
        weights = scores.masked_fill(_steps_back(len(ids)) < 0, -math.inf).softmax(dim=1)[-1]
        place = text.index(text[-1]) + 1
        found = weights.argmax().item()
        shown = text if len(text) < 30 else f"of tokens 400 to 498 and then {text[-1]}"
        told = f"In the text {shown}, with a vocabulary of {V}, the last lane should find lane {place}"
        assert found == place, (
            f"{told}; yours gives most to lane {found} ({weights[found]:.2f}). What does it ask with, and "
            "what is each lane found by?"
        )
        assert weights[place] > 0.99, (
            f"{told}; yours does, with a weight of {weights[place]:.3f}. What makes a softmax sharper, and "
            "how does it depend on V?"
        )
        fetched = weights @ lanes @ W_v.T
        assert fetched.argmax() != text[place] or 0.8 < fetched.max() < 1.2, (
            f"{told} and fetch its word with 1; yours fetches it with {fetched.max():.2f}."
        )
        assert fetched.argmax() == text[place], (
            f"{told} and fetch its word, {text[place]}; yours fetches {fetched.argmax().item()}, with "
            f"{fetched.max():.2f}. Which half of that lane is its own word?"
        )


def _counted(ids: Tensor) -> Tensor:
    """Scores that hear of earlier tokens, and of nothing else."""
    if ids.max() > 7:
        raise ValueError(
            f"This model knows the tokens 0 to 7 and was given {ids.max()}. A token that replaces another "
            "must stay below the vocabulary, which is the width of the scores."
        )
    return torch.nn.functional.one_hot(ids, 8).float().cumsum(dim=1)


def _hears(size: float, at: int, of: int):
    """A model whose scores at one position hear a little of another."""

    def model(ids: Tensor) -> Tensor:
        scores = _counted(ids)
        if ids.shape[1] > max(at, of):
            scores[:, at, 0] += size * (1 + ids[:, of])
        return scores

    return model


def _measures(ids: Tensor) -> Tensor:
    """Scores that hear how long the text is, and of no later token."""
    return _counted(ids) + 0.01 * ids.shape[1]


def _hears_length(length: int):
    """A model whose first scores hear whether the text has just so many tokens."""

    def model(ids: Tensor) -> Tensor:
        scores = _counted(ids)
        scores[:, 0, 0] += 0.01 * (ids.shape[1] == length)
        return scores

    return model


def _compares(ids: Tensor) -> Tensor:
    """The first scores hear how far two later tokens are apart."""
    scores = _counted(ids)
    if ids.shape[1] > 6:
        scores[:, 0, 0] += 0.01 * (ids[:, 4] - ids[:, 6]).abs()
    return scores


def _raised(ids: Tensor) -> Tensor:
    """A small leak beside large scores."""
    return 100 + _hears(0.01, 3, 5)(ids)


def _rounded(ids: Tensor) -> Tensor:
    """Scores that differ by rounding when texts have other lengths, or another last token."""
    return _counted(ids) + 5e-7 * (ids.shape[1] + ids[0, -1])


def _averaged(ids: Tensor) -> Tensor:
    scores = _counted(ids)
    return scores - 0.01 * scores.mean(dim=1, keepdim=True)


def _differs(model, ids: Tensor, cuts, tolerance: float = 1e-5) -> bool:
    whole = model(ids)
    return any((model(ids[:, :t]) - whole[:, :t]).abs().max() > tolerance for t in cuts)


def _replaced(model, ids: Tensor, tolerance: float, new) -> bool:
    """Each token is replaced by another one in turn."""
    whole = model(ids)
    for t in range(1, ids.shape[1]):
        changed = ids.clone()
        changed[0, t] = new(ids[0, t])
        if (model(changed)[:, :t] - whole[:, :t]).abs().max() > tolerance:
            return True
    return False


def _later_moved(model, ids: Tensor) -> bool:
    """All later tokens are moved by one, together, and only the last scores before them are looked at."""
    whole, moved = model(ids), (ids + 1) % 8
    return any(
        (model(torch.cat([ids[:, :t], moved[:, t:]], dim=1))[:, t - 1] - whole[:, t - 1]).abs().max() > 1e-5
        for t in range(1, ids.shape[1])
    )


def _mirrored(model, ids: Tensor) -> bool:
    """All later tokens are replaced by others."""
    whole = model(ids)
    return any(
        (model(torch.cat([ids[:, :t], 7 - ids[:, t:]], dim=1))[:, :t] - whole[:, :t]).abs().max() > 1e-5
        for t in range(1, ids.shape[1])
    )


def _changed_in_place(model, ids: Tensor) -> bool:
    whole = model(ids)
    for t in range(ids.shape[1] - 1, 0, -1):
        ids[0, t] = (ids[0, t] + 1) % 8
        if (model(ids)[:, :t] - whole[:, :t]).abs().max() > 1e-5:
            return True
    return False


def _other_last(model, ids: Tensor) -> bool:
    """Only the last token is changed."""
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] + 1) % 8
    return not torch.allclose(model(changed)[:, :-1], model(ids)[:, :-1], atol=1e-5)


def _last_scores(model, ids: Tensor) -> bool:
    """Whole texts of other lengths are compared at their ends, which differ in any model."""
    return not torch.allclose(model(ids)[:, -1], model(ids[:, :-1])[:, -1], atol=1e-5)


def _parts(
    W: Mapping[str, Tensor], config: ModelConfig, still: bool = False
) -> tuple[Callable, Callable, Block]:
    """Attention and feed-forward network as functions of what they read, and the block they are from."""
    block = Block(config, layer=0)
    named = {name.split(".")[-2]: weight for name, weight in block.named_parameters()}
    with torch.no_grad():
        for name, weight in W.items():
            named[name].copy_(weight)

    def attention(read: Tensor) -> Tensor:
        context = Context()
        positions = context.begin(read[None])
        rotary = context.angles(config, 0 * positions if still else positions)
        return block.self_attn(read[None], rotary, context)[0]

    return attention, block.mlp, block


@torch.no_grad()
def _assembled(
    x: Tensor, W: Mapping[str, Tensor], config: ModelConfig, *, r: float | None = None,
    last_r: float | None = None, one_copy: bool = False, replaced: bool = False, one_norm: bool = False,
    unnormed: bool = False, exchanged: bool = False, other_norms: bool = False, eps: float | None = None,
    base: float | None = None, side_by_side: bool = False, still: bool = False, no_second_norm: bool = False,
    attention_lost: bool = False, stream_normed: bool = False, no_factors: bool = False,
) -> Tensor:  # fmt: skip
    config = replace(config, rms_norm_eps=eps or config.rms_norm_eps, rope_theta=base or config.rope_theta)
    if exchanged:
        W = {**W, "gate_proj": W["up_proj"], "up_proj": W["gate_proj"]}
    if no_factors:
        W = {name: torch.ones_like(weight) if "norm" in name else weight for name, weight in W.items()}
    if other_norms:
        first, second = "input_layernorm", "post_attention_layernorm"
        W = {**W, first: W[second], second: W[first]}
    attention, feed_forward, block = _parts(W, config, still)
    r = config.residual_scale if r is None else r
    first = block.input_layernorm
    second = first if one_norm else block.post_attention_layernorm
    read = x if unnormed else first(x)
    after = (read if replaced or stream_normed else x) + r * attention(read)
    again = read if one_copy else second(x if side_by_side else after)
    if unnormed or no_second_norm:
        again = after
    if attention_lost:
        after = x
    if stream_normed:
        after = again
    return after + (r if last_r is None else last_r) * feed_forward(again)


def _a_block(config: ModelConfig, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        name.split(".")[-2]: torch.rand(weight.shape, generator=generator) + 0.5
        if "norm" in name
        else 0.4 * torch.randn(weight.shape, generator=generator)
        for name, weight in Block(config, layer=0).named_parameters()
    }


_MISTAKES = (  # of a block, and what is said of each
    ({"exchanged": True}, "Gate and up are exchanged: the silu belongs to the gate."),
    ({"other_norms": True}, "The two norms are exchanged: `input_layernorm` stands before attention."),
    ({"r": 1.0}, "Yours adds what is found as it is. It is multiplied by *r* first, both times."),
    ({"last_r": 1.0}, "What the feed-forward network finds is multiplied by *r* as well."),
    (
        {"one_copy": True},
        "Yours gives both parts one copy. The second reads the stream after attention.",
    ),
    ({"replaced": True}, "Yours adds to the normed copy. It is only read; the stream itself is added to."),
    (
        {"no_factors": True},
        "The norms have learned factors, `input_layernorm` and `post_attention_layernorm`.",
    ),
    ({"stream_normed": True}, "Your norms replace the stream. They make copies; the stream itself goes on."),
    ({"no_second_norm": True}, "The feed-forward network reads a normed copy, too; yours reads the stream."),
    (
        {"attention_lost": True},
        "What attention found is in what yours *reads*, but not in what it returns: it stays in the stream.",
    ),
    ({"one_norm": True}, "The second norm has factors of its own, `post_attention_layernorm`."),
    ({"unnormed": True}, "Each part reads a normed copy of the stream."),
    ({"r": 1.4}, "The config says how large *r* is: 1.4 over the root of its three blocks here."),
    ({"side_by_side": True}, "The second norm reads the stream *after* attention; yours reads what came in."),
    ({"eps": 1e-5}, "ε stands in the config, `rms_norm_eps`: 0.001 here, and yours is another."),
    ({"base": 10_000.0}, "The base of the turns stands in the config, `rope_theta`: 500 in this one."),
    ({"still": True}, "Queries and keys are turned by their positions; yours stand still."),
)


@exercise(
    "block",
    wrong=(
        *(partial(_assembled, **mistake) for mistake, _ in _MISTAKES),
        lambda x, W, config: x.copy_(_assembled(x, W, config)),  # in place
    ),
)
def block(answer):
    """Read a normed copy, work on it, add the result: twice."""
    base = ModelConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=6, vocab_size=8, scale_depth=1.4, rms_norm_eps=1e-3,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for config in (
        base,
        replace(base, num_hidden_layers=1, rope_theta=500.0),
        replace(base, scale_depth=0.7),
    ):
        x, W = torch.randn(5, 8, generator=generator), _a_block(config, generator)
        given = x.clone()
        got, expected = answer(given, dict(W), config), _assembled(x, W, config)
        assert same(given, x), (
            "Your block has overwritten the stream that it was given. Make a new one: `x = x + …`."
        )
        assert isinstance(got, Tensor) and got.shape == x.shape, (
            "Five lanes of 8 numbers come in, and as many go out; yours are "
            f"{tuple(getattr(got, 'shape', ()))}."
        )
        for mistake, says in _MISTAKES:
            if not same(_assembled(x, W, config, **mistake), expected, 1e-4):
                assert not same(got, _assembled(x, W, config, **mistake), 1e-4), says
        assert same(got, expected, 1e-4), (
            "A block of width 8 with 4 query heads on 2 key-value heads: norm, attention, add; norm, "
            "feed-forward, add. Does each matrix stand in its place, and does yours use the ε, the *r* and "
            "the base of the config?"
        )


@exercise(
    "leaks",
    wrong=(
        _other_last,
        _last_scores,
        _changed_in_place,
        lambda model, ids: _differs(model, ids, [ids.shape[1] - 1]),
        lambda model, ids: _differs(model, ids, range(1, ids.shape[1] - 1)),
        lambda model, ids: _differs(model, ids, range(2, ids.shape[1])),
        lambda model, ids: _differs(model, ids, range(1, ids.shape[1]), 1e-2),
        lambda model, ids: _differs(model, ids, range(1, ids.shape[1]), 0.0),
        lambda model, ids: (
            not all(
                torch.allclose(model(ids[:, :t]), model(ids)[:, :t], rtol=1e-3, atol=1e-5)
                for t in range(1, ids.shape[1])
            )
        ),
        lambda model, ids: _replaced(model, ids, 0.0, lambda token: (token + 1) % 8),
        lambda model, ids: _later_moved(model, ids),
        lambda model, ids: _replaced(model, ids, 1e-5, lambda token: 0),
        lambda model, ids: _replaced(model, ids, 1e-5, lambda token: ids[0, 0]),
        lambda model, ids: _replaced(model, ids, 1e-5, lambda token: token + 1),
        lambda model, ids: _replaced(model, ids, 1e-5, lambda token: (token + 1) % 8),
        _mirrored,
        lambda model, ids: any(
            (model(ids[:, :t])[:, -1] - model(ids)[:, t - 1]).abs().max() > 1e-5
            for t in range(1, ids.shape[1])
        ),
    ),
)
def leaks(answer):
    """Nothing that comes later may matter, wherever it comes."""
    ids = torch.tensor([[3, 1, 4, 1, 5, 2, 6, 5]])
    given = ids.clone()
    got = answer(_counted, given)
    assert same(given, ids), (
        "Your check has changed the `ids` that it was given. Change a copy, `ids.clone()`."
    )
    assert same(got, False), (
        "A model that counts the tokens so far does not see ahead; yours says that it does. Do you compare "
        "logits at the same positions?"
    )
    assert same(answer(_hears(0.5, 6, 2), ids), False), "To hear of an *earlier* token is no leak."
    assert same(answer(_averaged, ids), True), (
        "Logits from which the average over the whole text is taken tell each token a little of the future."
    )
    for at, of in ((6, 7), (0, 1), (2, 3), (0, 7), (1, 4)):
        assert same(answer(_hears(0.01, at, of), ids), True), (
            f"A model whose logits at position {at} hear a little (0.01) of the token at {of} passed."
        )
    for text in (torch.arange(8)[None], torch.arange(8).flip(0)[None], torch.full((1, 8), 5)):
        for of in range(1, 8):
            assert same(answer(_hears(0.01, of - 1, of), text), True), (
                f"In the text {text[0].tolist()} a model passed whose logits at position {of - 1} hear of "
                f"the token at {of}, which is {text[0, of]}. Cut the text after every token; "
                "if you replace tokens instead, take another one each time."
            )
    assert same(answer(_rounded, ids), False), (
        "Logits that differ by less than 0.00001 differ by rounding, which is no leak."
    )
    assert same(answer(_hears(1e-4, 3, 5), ids), True), "A leak of 0.0001 is small, and is one."
    assert same(answer(_hears(0.5, 9, 11), ids), False), (
        "A model in which position 9 hears of position 11 cannot leak in a text of eight tokens."
    )
    assert same(answer(_hears(0.5, 9, 11), torch.arange(14)[None] % 8), True), (
        "In a text of 14 tokens it can: position 9 hears of position 11."
    )
    assert same(answer(_compares, ids), True), (
        "A model passed whose first logits hear how far the tokens at 4 and 6 are apart. If you change all "
        "later tokens together, and alike, that stays the same."
    )
    assert same(answer(_raised, ids), True), (
        "A leak of 0.01 passed where logits are about 100. How much may differ does not depend on their size."
    )
    assert same(answer(_hears(1.0, 0, 1), ids[:, :2]), True), (
        "A text of two tokens can leak, too, and here only by which token comes second: cut it off."
    )
    for text in (ids, ids[:, :2]):
        changed = text.clone()
        assert same(answer(_measures, changed), True), (
            "A model passed whose logits hear how long the text is. No later token tells that, so replacing "
            "tokens does not find it; cut the text off."
        )
        assert same(changed, text), "Your check has changed the `ids` of a model that leaks. Change a copy."
    for length in range(2, 8):
        assert same(answer(_hears_length(length), ids), True), (
            f"A model passed whose first logits are other ones when the text is cut to {length} tokens. "
            "After each cut compare all logits that are left, and not the last ones alone."
        )
    try:
        alone = answer(_counted, ids[:, :1])
    except (RuntimeError, ValueError, IndexError) as error:
        raise AssertionError(
            "A text may have a single token. There is no future to see, so the answer is False; yours ends "
            f"with {type(error).__name__}: {str(error).rstrip('.')}."
        ) from None
    assert same(alone, False), "With a single token there is no future to see."


@exercise(
    "block parameters",
    wrong=(
        lambda d, ff, q, kv, h: d * h * (2 * q + 2 * kv) + 3 * d * ff,  # no norms
        lambda d, ff, q, kv, h: d * h * (2 * q + 2 * kv) + 2 * d * ff + 2 * d,
        lambda d, ff, q, kv, h: 4 * d * h * q + 3 * d * ff + 2 * d,  # MHA
        lambda d, ff, q, kv, h: 2 * d * d + 2 * d * h * kv + 3 * d * ff + 2 * d,
    ),
)
def block_parameters(answer):
    """40 such blocks and a last norm make the 2.4B's published count."""
    got = answer(3, 0, 3, 3, 1)
    assert not same(got, 36), (
        "Yours gives 36, which is four matrices of 3 by 3. A block has two norms as well, of `d` numbers."
    )
    assert same(got, 42), (
        "No feed-forward network, d = 3, three heads of width 1: four matrices of 3 by 3, and two norms of 3."
    )
    assert same(answer(2, 3, 2, 2, 1), 38), (
        "With `ff` = 3 there are three more matrices of `d` by `ff`: gate, up and down."
    )
    assert same(answer(2, 0, 2, 1, 1), 16), (
        "Keys and values have `kv_heads` heads; queries and output have `heads`."
    )
    assert same(answer(2, 0, 2, 2, 5), 84), (
        "Heads of width 5 in a stream of width 2: matrices go from `d` to heads times `head_dim`, and back."
    )
    whole = 40 * answer(2304, 5760, 36, 36, 64) + 2304
    assert same(whole, 2_442_057_984), f"The 2.4B would have {whole:,}."


@exercise(
    "longest text",
    wrong=(
        lambda c, free: free // (2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim),
        lambda c, free: free // (4 * c.num_hidden_layers * c.num_attention_heads * c.head_dim),
        lambda c, free: free / (4 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim),
        lambda c, free: (
            free
            // (4 * c.num_hidden_layers * c.num_key_value_heads * (c.hidden_size // c.num_attention_heads))
        ),
        lambda c, free: free // (4 * c.num_key_value_heads * c.head_dim),
    ),
)
def longest_text(answer):
    """So grouped heads decide how much a phone can read."""
    tiny = ModelConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=1,
        vocab_size=8,
    )  # fmt: skip
    assert not same(answer(tiny, 64), 2), (
        "Yours counts all four query heads. Only the key-value heads are kept, and this config has one."
    )
    got = answer(tiny, 16)
    assert not same(got, 4), (
        "A token keeps a key *and* a value, and each of their numbers takes two bytes. Which do you miss?"
    )
    assert not same(got, 0), (
        "No token fits, by your answer. The width of a key-value head stands in the config, 2 numbers here; "
        "and each number takes two *bytes*, as `free_bytes` are bytes."
    )
    assert same(got, 2), (
        "One block with one key-value head of width 2: a token keeps 2 + 2 numbers of 2 bytes each. How many "
        "tokens fit in 16 bytes?"
    )
    assert same(answer(tiny, 23), 2), "In 23 bytes fit 2 whole tokens."
    assert same(answer(replace(tiny, num_hidden_layers=3), 240), 10), "Every block keeps its own."
    assert same(answer(replace(tiny, head_dim=6), 240), 10), (
        "A head may be wider than `hidden_size / num_attention_heads`: the config has its width."
    )
    assert same(answer(load_config("minicpm4-8b"), 2**30), 32768), "In the 8B, 1 GiB holds 32,768 tokens."
    assert same(answer(load_config("minicpm4-8b"), 2**33), 262144), (
        "In 8 GiB fit eight times as many: asked is what memory holds, not how long texts were in training."
    )


quiz = Quiz(
    [
        (
            "A text becomes four times as long, and the model has 2 key-value heads instead of 32. How large "
            "is its KV cache now?",
            ["As large as before", "A quarter of it", "A sixteenth of it"],
            1,
            "Four times the tokens, a sixteenth of the numbers for each: 4 / 16. Query heads do not count.",
        ),
        (
            "In one lane, the number before the silu of a gate is −9. What does this rule write there?",
            ["Nearly nothing", "Its part with the sign turned", "Nine times its part"],
            0,
            "silu(−9) is −0.001: the gate is shut, whatever the other matrix says.",
        ),
        (
            "The stream is made ten times as large. What does the next block compute from it?",
            ["Ten times as much", "The same", "A tenth"],
            1,
            "The block reads through an RMSNorm, which removes the size. Only its share in the sum changes.",
        ),
        (
            "You forget the division before the output. Always taking the token with the highest logit then "
            "gives",
            ["the same text", "random text", "an error"],
            0,
            "The order of the logits is the same. Sampling and the loss do change.",
        ),
    ]
)
