"""Right answers in another style than the chapter's are accepted, and known traps are explained."""

import math

import numpy as np
import pytest
import torch

from minicpm_lite.exercises.training import distributed as check
from minicpm_lite.language.scoring import next_token_loss, predicted


def by_logarithm(parameters, stage, room):
    whole = [16, 4, 2, 0][stage] * parameters
    if stage == 0:
        return int(whole <= room)
    if whole >= room:
        return 0
    return 2 ** max(0, math.ceil(math.log2((16 * parameters - whole) / (room - whole))))


def until_it_fits(parameters, stage, room):
    """Goes on for ever where no number is enough."""
    whole, gpus = [16, 4, 2, 0][stage] * parameters, 1
    while whole + (16 * parameters - whole) / gpus > room:
        gpus *= 2
    return gpus


def weighted_means(model, micro_batches):
    """Gradients of means, weighted, added up beside the model, and put into it at the end."""
    counts = [predicted(part).sum() for part in micro_batches]
    total = [torch.zeros_like(p) for p in model.parameters()]
    for part, count in zip(micro_batches, counts, strict=True):
        gradients = torch.autograd.grad(next_token_loss(model, part), list(model.parameters()))
        for kept, gradient in zip(total, gradients, strict=True):
            kept += count * gradient
    for parameter, kept in zip(model.parameters(), total, strict=True):
        parameter.grad = kept / sum(counts)
    return sum(counts)


def with_an_array(step, rank, world_size, changes):
    sizes = np.zeros(step + 1, int)
    for start, size in changes:
        sizes[start:] = size
    first = sizes[:-1].sum() + rank * (sizes[-1] // world_size)
    return first + torch.arange(sizes[-1] // world_size)


def on_a_grid(c, m):
    tau = torch.linspace(0, 4 * math.sqrt(c * m), 100_001, dtype=torch.float64)[1:]
    return tau[(c / tau + tau / (2 * m)).argmin()]


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        (check.gpus_needed, by_logarithm),
        (check.accumulated, weighted_means),
        (check.ramp_indices, with_an_array),
        (check.best_interval, on_a_grid),
    ],
)
def test_other_styles(exercise, answer):
    verdict = exercise.judge(answer)
    assert verdict.state == "right", verdict.message


def test_an_endless_search_is_explained():
    verdict = check.gpus_needed.judge(until_it_fits)
    assert verdict.state == "wrong" and "see first whether it can end" in verdict.message
