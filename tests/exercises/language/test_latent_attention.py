"""Right answers in another style than the chapter's are accepted."""

import math

import numpy as np
import pytest
import torch

from minicpm_lite.exercises.language import latent_attention as check


def divides(config, free_bytes):
    """Floats, rounded down at the end."""
    latent = config.latent_attention
    width = latent.kv_lora_rank + latent.qk_rope_head_dim if latent else 0
    values = width or 2 * config.num_key_value_heads * config.head_dim
    return math.floor(free_bytes / 2 / config.num_hidden_layers / values)


def solved(sizes, keys):
    """The rule, solved for the queries."""
    left = 1 / keys + 2 / (sizes.qk_nope_head_dim + sizes.v_head_dim) - 1 / sizes.kv_lora_rank
    if left < 1 / keys:
        return keys
    return math.ceil(1 / left - 1e-9) - 1


def adds_up(matrix, share):
    squares = np.linalg.svd(matrix.numpy(), compute_uv=False).astype(float) ** 2
    rank, carried = 0, 0.0
    while carried < share * squares.sum() * (1 - 1e-6):
        carried += squares[rank]
        rank += 1
    return rank


def of_the_product(matrix, share):
    squares = torch.linalg.eigvalsh(matrix.double() @ matrix.double().T).flip(0)
    return torch.searchsorted(squares.cumsum(0) / squares.sum(), share - 1e-9) + 1


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        (check.tokens_that_fit, divides),
        (check.by_pencil, torch.tensor([-2.0, -2.0, -6.0])),
        (check.by_pencil, [-2.0, -2.0, -6.0]),
        (check.most_queries, solved),
        (check.rank_needed, adds_up),
        (check.rank_needed, of_the_product),
    ],
)
def test_other_styles(exercise, answer):
    verdict = exercise.judge(answer)
    assert verdict.state == "right", verdict.message
