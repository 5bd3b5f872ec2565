"""Checks and quiz of the chapter on the decoder."""

import math

import torch
from torch import Tensor

from ...lab.exercises import exercise
from ...lab.mistakes import same


def _masked_attention(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor) -> Tensor:
    scores = query @ key.T / math.sqrt(query.shape[1])
    return scores.masked_fill(hidden, -math.inf).softmax(dim=1) @ value


def _steps_back(tokens: int) -> Tensor:
    place = torch.arange(tokens)
    return place[:, None] - place


def _window(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    back = _steps_back(len(query))
    return _masked_attention(query, key, value, (back < 0) | (back >= window))


def _window_and_one(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    return _window(query, key, value, window + 1)


def _both_ways(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    return _masked_attention(query, key, value, _steps_back(len(query)).abs() >= window)


def _whole_text(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    return _masked_attention(query, key, value, _steps_back(len(query)) < 0)


def _masked_late(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    back = _steps_back(len(query))
    weights = (query @ key.T / math.sqrt(query.shape[1])).softmax(dim=1)
    return weights.masked_fill((back < 0) | (back >= window), 0.0) @ value


def _undivided(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    return _window(query * math.sqrt(query.shape[1]), key, value, window)


@exercise(
    "attention with a window",
    wrong=(_window_and_one, _both_ways, _whole_text, _masked_late, _undivided),
    without=("a loop", "scaled_dot_product_attention", "dense_attention"),
)
def window_attention(answer):
    """Two masks in one: nothing from the future, and nothing from too far back."""
    zeros, value = torch.zeros(4, 2), torch.tensor([[8.0], [4.0], [6.0], [2.0]])
    got = answer(zeros, zeros, value, 4)
    assert same(got, [[8.0], [6.0], [6.0], [5.0]]), (
        "Queries of zero, values 8, 4, 6, 2 and a window of 4: all scores are equal, so each token takes the "
        "plain average of what it may see, 8, then (8 + 4) / 2, and so on. Does yours see the future, or do "
        "its weights no longer add up to 1?"
    )
    assert same(answer(zeros, zeros, value, 2), [[8.0], [6.0], [5.0], [4.0]]), (
        "The same with a window of 2: the last token sees 6 and 2, itself included, and their average is 4."
    )
    assert same(answer(zeros, zeros, value, 1), value), "With a window of 1 each token sees only itself."
    generator = torch.Generator().manual_seed(0)
    for tokens, width, window in ((6, 8, 3), (5, 4, 9)):
        query, key, value = torch.randn(3, tokens, width, generator=generator)
        assert same(answer(query, key, value, window), _window(query, key, value, window)), (
            f"{tokens} tokens of width {width} with random queries and a window of {window}: the scores are "
            "products of query and key, divided by the root of the width."
        )


@exercise(
    "share keys",
    wrong=(
        lambda key, heads: key.repeat(heads // key.shape[0], 1, 1),
        lambda key, heads: key.repeat_interleave(2, 0),
        lambda key, heads: key.repeat_interleave(heads, 0),
        lambda key, heads: key,
    ),
)
def share_keys(answer):
    """Neighbouring query heads share a key head."""
    for kept, heads in ((2, 4), (2, 6), (3, 3), (1, 4)):
        key = 10.0 * torch.arange(1, kept + 1)[:, None, None] * torch.ones(1, 2, 3)
        got = answer(key, heads)
        assert same(tuple(got.shape), (heads, 2, 3)), (
            f"{heads} query heads, 2 tokens, width 3 need keys of shape ({heads}, 2, 3); yours have "
            f"{tuple(got.shape)}."
        )
        expected = [10.0 * (1 + head * kept // heads) for head in range(heads)]
        assert same(got[:, 0, 0], expected), (
            f"{heads} query heads share {kept} key heads: how many form a group, and do its members stand "
            "side by side?"
        )
