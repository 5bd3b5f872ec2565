"""Right answers in another style than the chapter's are accepted."""

import math

import numpy as np
import pytest
import torch

from minicpm_lite.exercises.language import decoder as check


def window_attention(query, key, value, window):
    """In double precision, with a mask that is added."""
    query, key, value = query.double(), key.double(), value.double()
    allowed = torch.ones(len(query), len(query)).tril().triu(1 - window)
    scores = torch.einsum("td,jd->tj", query, key) * query.shape[1] ** -0.5
    return torch.softmax(scores + torch.log(allowed), dim=-1) @ value


def turn_in_numpy(x, position, theta):
    half = len(x) // 2
    turned = (x[:half].numpy() + 1j * x[half:].numpy()) * np.exp(
        1j * position * theta ** (-2 * np.arange(half) / len(x))
    )
    return np.concatenate([turned.real, turned.imag])


def turn_in_double(x, position, theta):
    angles = position * theta ** (-torch.arange(0, len(x), 2, dtype=torch.float64) / len(x))
    first, second = x.clone().chunk(2)
    x = x.double()
    x[: len(x) // 2] = first * angles.cos() - second * angles.sin()
    x[len(x) // 2 :] = second * angles.cos() + first * angles.sin()
    return x


def previous_word_in_numpy(width, base):
    """The key is turned forwards, and points at random."""
    angles = base ** (-np.arange(width // 2) * 2 / width)
    first, second = 12 + np.random.default_rng(0).random((2, width // 2))
    ahead = [
        first * np.cos(angles) - second * np.sin(angles),
        second * np.cos(angles) + first * np.sin(angles),
    ]
    return [np.concatenate([first, second]), np.concatenate(ahead)]


def mended_in_steps(x, norm, attention, feed_forward, r):
    for part in (attention, feed_forward):
        x = torch.add(x, part(norm(x)), alpha=r)
    return x


def leaks_from_the_end(model, ids):
    """One token after the other is cut off; what stands before it must not notice."""
    whole = model(ids).double()
    while (shorter := ids[:, : ids.shape[1] - 1]).shape[1]:
        ids = shorter
        if not torch.allclose(model(ids).double(), whole[:, : ids.shape[1]], rtol=0, atol=1e-5):
            return torch.tensor(True)
    return False


def leaks_in_numpy(model, ids):
    rows = [model(ids[:, : t + 1])[0].numpy() for t in range(ids.shape[1])]
    return any(np.abs(rows[-1][: len(row)] - row).max() > 1e-5 for row in rows)


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        (check.brought, torch.tensor([-2.977, 0.0093])),
        (
            check.follow,
            lambda V: [40 * torch.eye(V, 2 * V), 10 * torch.eye(2 * V)[V:].numpy(), torch.eye(V, 2 * V)],
        ),
        (check.window_attention, window_attention),
        (check.share_keys, lambda key, heads: key[[h * len(key) // heads for h in range(heads)]]),
        (check.forecast, {"is": 0.425, "are": torch.tensor(0.427), "where": -1.3}),
        (check.forecast, {"where": torch.tensor(-1.305), "is": 0.43, "are": 0.43}),
        (check.mended_block, mended_in_steps),
        (check.turn, turn_in_numpy),
        (check.turn, turn_in_double),
        (check.previous_word, previous_word_in_numpy),
        (check.leaks, leaks_from_the_end),
        (check.leaks, leaks_in_numpy),
        (check.block_parameters, lambda d, ff, q, kv, h: d * (2 * h * q + 2 * h * kv + 3 * ff + 2)),
        (
            check.longest_text,
            lambda c, free: math.floor(free / c.num_hidden_layers / c.num_key_value_heads / c.head_dim / 4),
        ),
    ],
)
def test_other_styles(exercise, answer):
    verdict = exercise.judge(answer)
    assert verdict.state == "right", verdict.message


def test_a_table_with_dots_is_unfinished():
    verdict = check.forecast.judge({"is": 0.43, "are": 0.43, "where": ...})
    assert verdict.state == "unfinished"
