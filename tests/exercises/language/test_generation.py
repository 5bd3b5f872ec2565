"""Right answers in another style than the chapter's are accepted, and the bans of a text are kept."""

import numpy as np
import pytest
import torch

from minicpm_lite.exercises.language import generation as check
from minicpm_lite.language.generation import generate


def cache_bytes_in_steps(config, tokens, batch, bytes_per_number):
    """As a tensor, changed in place."""
    size = torch.tensor(config.num_hidden_layers, dtype=torch.float64)
    if config.latent_attention:
        size *= config.latent_attention.kv_lora_rank + config.latent_attention.qk_rope_head_dim
    else:
        size *= config.num_key_value_heads * (config.head_dim + config.head_dim)
    for factor in (tokens, batch, bytes_per_number):
        size *= factor
    return size


def one_after_the_other(model, prompts, new_tokens):
    """No padding at all, and lists."""
    rows = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        for _ in range(new_tokens):
            ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], dim=1)
        rows.append(ids[0, len(prompt) :].tolist())
    return rows


def by_calling_generate(model, prompts, new_tokens):
    return torch.cat(
        [generate(model, torch.tensor([p]), new_tokens, stop_ids=())[:, len(p) :] for p in prompts]
    )


def from_the_right(text, stops):
    end = min([text.index(stop) for stop in stops if stop in text], default=len(text))
    held = 0
    for stop in stops:
        for size in range(1, len(stop)):
            if text.endswith(stop[:size]):
                held = max(held, size)
    return end if end < len(text) else len(text) - held


def min_p_in_place(probabilities, min_p):
    best, _ = probabilities.max(dim=1)
    probabilities[probabilities < min_p * best[:, None]] = 0
    probabilities /= probabilities.sum(1)[:, None]
    return probabilities


def min_p_row_by_row(probabilities, min_p):
    rows = [torch.where(row >= min_p * row.max(), row, 0.0) for row in probabilities]
    return torch.stack([row / row.sum() for row in rows])


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        (check.cache_bytes, cache_bytes_in_steps),
        (check.nucleus_by_hand, (0, 2 / 3, 0, 1 / 3)),
        (check.nucleus_by_hand, torch.tensor([0, 0.5, 0, 0.25]) / 0.75),
        (check.nucleus_by_hand, np.array([0, 0.667, 0, 0.333])),
        (check.batch_greedy, one_after_the_other),
        (check.safe_length, from_the_right),
        (check.min_p_filter, min_p_in_place),
        (check.min_p_filter, min_p_row_by_row),
    ],
)
def test_other_styles(exercise, answer):
    verdict = exercise.judge(answer)
    assert verdict.state == "right", verdict.message


def test_bans():
    verdict = check.batch_greedy.judge(by_calling_generate)
    assert verdict.state == "wrong" and "do without generate" in verdict.message
