"""Right answers in another style than the chapter's are accepted."""

import math

import numpy as np
import pytest
import torch

from minicpm_lite.exercises.training import wind_tunnel as check
from minicpm_lite.training.wind_tunnel import fit_loss_surface


def compares_with_zero(surface, N, target):
    """No allowance for rounding; infinity of another library."""
    room = target - (surface.L0 + surface.C_N * N**-surface.alpha)
    return np.inf if room <= 0 else np.power(surface.C_D / room, 1 / surface.beta)


def lets_numpy_divide(surface, N, target):
    with np.errstate(divide="ignore"):
        room = np.maximum(np.float64(target) - surface.L0 - surface.C_N / N**surface.alpha, 0)
        return (surface.C_D / room) ** (1 / surface.beta)


def in_tensors(surface, flops, shrink):
    N, D = surface.optimal(flops)
    small = torch.tensor(N / shrink, dtype=torch.float64)
    room = torch.tensor(surface(N, D) - surface.L0) - surface.C_N / small**surface.alpha
    tokens = (surface.C_D / room.clamp(min=0)) ** (1 / surface.beta)
    return 6 * small * tokens / flops


def sorts_first(N, D, L):
    """Points as rows, and the errors as an array."""
    points = sorted(zip(N, D, L, strict=True))
    errors = []
    for size in np.unique(N)[3:]:
        surface = fit_loss_surface(*zip(*[point for point in points if point[0] < size], strict=True))
        errors.append(np.mean([surface(n, d) - loss for n, d, loss in points if n == size]))
    return np.array(errors)


def divides_by_zero(surface, N, target):
    return (surface.C_D / max(target - surface.L0 - surface.C_N / N**surface.alpha, 0)) ** (1 / surface.beta)


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        (check.loss_for, lambda batch: math.exp((math.log(1.2110e9) - math.log(batch)) / 6.2393)),
        (check.loss_for, lambda batch: torch.tensor(1.2110e9 / batch) ** (1 / 6.2393)),
        (check.attention_scale, lambda head_dim, base: base**-0.5 * base / head_dim),
        (check.attention_scale, lambda head_dim, base: torch.tensor(base).sqrt() / head_dim),
        (check.tokens_for, compares_with_zero),
        (check.tokens_for, lets_numpy_divide),
        (check.overtraining, in_tensors),
        (check.forward_errors, sorts_first),
    ],
)
def test_other_styles(exercise, answer):
    verdict = exercise.judge(answer)
    assert verdict.state == "right", verdict.message


def test_division_by_zero_is_explained():
    """The case in which nothing is left for the tokens is part of the exercise."""
    verdict = check.tokens_for.judge(divides_by_zero)
    assert verdict.state == "wrong" and "divides by zero" in verdict.message
    assert "ZeroDivisionError" not in verdict.message
