"""Right answers in another style than the chapter's are accepted."""

import math

import pytest
import torch

from minicpm_lite.exercises.training import wsd as check


def accelerated(s, peak, W, T, S):
    """In tensors, of double precision."""
    s = torch.tensor(s, dtype=torch.float64)
    return peak * torch.minimum(s / W, ((S - s) / (S - T)).clamp(0, 1)).clamp(max=1)


def lstsq(budgets, losses, new_budget):
    x = torch.tensor(budgets, dtype=torch.float64).log()
    terms = torch.stack([x, torch.ones_like(x)], dim=1)
    line = torch.linalg.lstsq(terms, torch.tensor(losses, dtype=torch.float64).log()[:, None]).solution
    return math.exp(line[0] * math.log(new_budget) + line[1])


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        (check.decay_start, lambda total, share: round(total * (1 - share))),
        (check.decay_start, lambda total, share: torch.tensor(total - total * share).round()),
        (check.half_life_for, lambda steps, ratio: -steps * math.log(2) / math.log(ratio)),
        (check.half_life_for, lambda steps, ratio: steps / -torch.log2(torch.tensor(ratio))),
        (check.linear_wsd, accelerated),
        (check.saved, lambda budgets, share: (1 - share) * (1 - max(budgets) / sum(budgets))),
        (check.predict, lstsq),
    ],
)
def test_other_styles(exercise, answer):
    verdict = exercise.judge(answer)
    assert verdict.state == "right", verdict.message
