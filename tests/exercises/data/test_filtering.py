"""Right answers in another style than the chapter's are accepted, and known traps are explained."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from minicpm_lite.data.dedup import lsh_threshold
from minicpm_lite.exercises.data import filtering as check


def with_arrays(signatures, bands):
    """Rows of an array as pairs, some of them twice."""
    cut = np.array(signatures).reshape(len(signatures), bands, -1)
    agree = (cut[:, None] == cut[None]).all(-1).any(-1)
    return np.argwhere(np.triu(agree, 1))


def standard_scores(quality, surprise):
    def standard(values):
        values = torch.tensor(values, dtype=torch.float64)
        return (values - values.mean()) / values.std()

    return torch.sigmoid(standard(quality) - standard(surprise))


def in_place(quality, surprise):
    quality -= quality.min()
    quality /= quality.max()
    surprise -= surprise.min()
    surprise /= surprise.max()
    return (quality + 1 - surprise) / 2


def counts_up(scratch, stable, decay):
    if decay >= scratch:
        return "never"
    count = 1
    while stable + count * decay >= count * scratch:
        count += 1
    return torch.tensor(count)


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        (check.candidates, with_arrays),
        (check.after_edits, lambda n, k, e: 2 / (1 + k * e / (n - k + 1)) - 1),
        (check.after_edits, lambda n, k, e: Fraction(n - k + 1 - k * e, n - k + 1 + k * e)),
        (
            check.choose_bands,
            lambda n, target: min(
                (b for b in range(1, n + 1) if n % b == 0),
                key=lambda b: abs(lsh_threshold(b, n // b) - target),
            ),
        ),
        (check.break_even, counts_up),
        (check.combine, standard_scores),
        (check.combine, in_place),
    ],
)
def test_other_styles(exercise, answer):
    verdict = exercise.judge(answer)
    assert verdict.state == "right", verdict.message


def test_division_by_zero_is_explained():
    """The decay that costs as much as the whole run is part of the exercise."""
    verdict = check.break_even.judge(
        lambda scratch, stable, decay: "never" if decay > scratch else stable // (scratch - decay) + 1
    )
    assert verdict.state == "wrong" and "divides by zero" in verdict.message
    assert "ZeroDivisionError" not in verdict.message
