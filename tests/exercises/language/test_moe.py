"""Right answers in another style than the chapter's are accepted, and the bans of a text are kept."""

import math

import pytest
import torch
import torch.nn.functional as F

from minicpm_lite.exercises.language import moe as check
from minicpm_lite.language.moe import load_balance_loss


def route_in_tensors(scores, visits):
    """Keys and weights are tensors, of double precision."""
    weights, chosen = torch.tensor(scores, dtype=torch.float64).softmax(0).topk(visits)
    return dict(zip(chosen, weights / weights.sum(), strict=True))


def push_in_arrays(p, visits):
    shares = F.one_hot(p.double().topk(visits).indices, p.shape[1]).sum(1).double().mean(0)
    return (shares * p.shape[1] / len(p)).repeat(len(p), 1).numpy()


def push_by_autograd(p, visits):
    p = p.detach().requires_grad_()
    load_balance_loss(p, p.topk(visits).indices).backward()
    return p.grad


def fooled_in_doubles(tokens):
    first = torch.tensor([[0.01, 0.49, 0.01, 0.49]], dtype=torch.float64).expand(tokens, 4)
    return [first, first.roll(1, dims=1)]


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        (check.route, route_in_tensors),
        (check.active, lambda shared, d, d_ff, L, M, K: shared + L * d * (M + 3 * K * d_ff)),
        (
            check.active,
            lambda *sizes: torch.tensor(
                sizes[0] + sizes[3] * sizes[1] * (sizes[4] + 3 * sizes[5] * sizes[2])
            ),
        ),
        (check.expected_touched, lambda n, M, K: M - M * (math.comb(M - 1, K) / math.comb(M, K)) ** n),
        (check.push, push_in_arrays),
        (check.fooled, fooled_in_doubles),
    ],
)
def test_other_styles(exercise, answer):
    verdict = exercise.judge(answer)
    assert verdict.state == "right", verdict.message


def test_bans():
    verdict = check.push.judge(push_by_autograd)
    assert verdict.state == "wrong" and "do without" in verdict.message
