"""One update against the arithmetic of it: rates, shares, clipping, and what it refuses without a change."""

import math

import pytest
import torch
from torch import nn

from minicpm_lite.training.update import update
from minicpm_lite.training.wsd import WSD

SCHEDULE = WSD(0.1, 2, 4, 0)
ROWS = torch.arange(12.0).view(6, 2) / 10


def model() -> nn.Module:
    line = nn.Linear(2, 1, bias=False)
    nn.init.constant_(line.weight, 0.5)
    return line


def optimizer_of(line) -> torch.optim.Optimizer:
    groups = [{"params": [line.weight], "lr_ratio": 0.5}]
    return torch.optim.SGD(groups, lr=1.0)


def squares(line):
    """Mean square over a pass, and that is reported, too."""

    def loss(rows):
        mean = line(rows).square().mean() if len(rows) else line.weight.sum() * 0
        return mean, mean.detach()

    return loss


def cut(*sizes) -> list:
    return [(part, len(part)) for part in ROWS.split(sizes)]


def step(line, passes, number=2, schedule=SCHEDULE, limit=1e9, **how):
    return update(number, schedule, line, optimizer_of(line), limit, squares(line), passes, **how)


def expected():
    line = model()
    loss = line(ROWS).square().mean()
    (gradient,) = torch.autograd.grad(loss, [line.weight])
    return loss.item(), gradient


@pytest.mark.parametrize("sizes", [(6,), (3, 3), (1, 5), (4, 2, 0), (1, 1, 1, 1, 1, 1)])
def test_passes_are_the_whole(sizes):
    line, (loss, gradient) = model(), expected()
    found, norm = step(line, cut(*sizes))
    assert found == pytest.approx(loss) and norm == pytest.approx(gradient.norm().item())
    torch.testing.assert_close(line.weight.data, 0.5 - 0.1 * 0.5 * gradient)


def test_a_mean_of_means_is_another_number():
    means = [model()(part).square().mean().item() for part, _ in cut(1, 5)]
    assert abs(sum(means) / 2 - expected()[0]) > 0.1


def test_the_rate_is_the_schedule_s_by_the_group_s_ratio():
    for number, rate in ((1, 0.05), (2, 0.1)):
        line, (_, gradient) = model(), expected()
        step(line, cut(6), number)
        torch.testing.assert_close(line.weight.data, 0.5 - rate * 0.5 * gradient)


def test_shares_of_a_step_that_other_processes_have_a_part_of():
    """Two processes, one after another: their gradients and their losses add up to the whole."""
    (loss, gradient), found, summed = expected(), 0.0, torch.zeros(1, 2)
    for part in (cut(1, 5)[:1], cut(1, 5)[1:]):
        line = model()
        mine, _ = step(line, part, units=6)
        found, summed = found + mine, summed + line.weight.grad
    assert found == pytest.approx(loss)
    torch.testing.assert_close(summed, gradient)


def test_the_reported_loss_is_added_up_and_only_that():
    line = model()
    loss, _ = step(line, cut(6), add_up=lambda reported: reported + 100)
    assert loss == pytest.approx(expected()[0] + 100)


def test_gradients_are_clipped_and_the_norm_is_that_before():
    line, (_, gradient) = model(), expected()
    _, norm = step(line, cut(2, 4), limit=1e-3)
    assert norm == pytest.approx(gradient.norm().item())
    assert (line.weight.data - 0.5).norm().item() == pytest.approx(0.1 * 0.5 * 1e-3, rel=1e-2)


def test_gradients_of_the_step_before_are_forgotten():
    line, (_, gradient) = model(), expected()
    line.weight.grad = torch.full((1, 2), 1e6)
    _, norm = step(line, cut(6))
    assert norm == pytest.approx(gradient.norm().item())


def test_nothing_to_learn_from():
    line = model()
    with pytest.raises(ValueError, match="batch of step 3 holds nothing that is to be predicted"):
        step(line, [(ROWS[:0], 0)], number=3)
    assert torch.equal(line.weight.data, model().weight.data)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_is_refused_before_anything_moves(what):
    line = model()

    def loss(rows):
        finite = line(rows).square().mean()
        if what == "loss":
            return finite, finite.detach() * math.nan
        return finite + (line.weight[0, 0] - 0.5).abs().sqrt(), finite.detach()

    with pytest.raises(FloatingPointError, match="step 2 is not finite .*rate there is 0.1; a lower peak"):
        update(2, SCHEDULE, line, optimizer_of(line), 1.0, loss, cut(6))
    assert torch.equal(line.weight.data, model().weight.data)


@pytest.mark.parametrize("rate", [math.nan, math.inf, -0.1])
def test_what_is_no_rate_moves_nothing(rate):
    line = model()
    with pytest.raises(
        ValueError, match=f"The schedule gives the rate {rate:.3g} for step 2; expected a finite"
    ):
        step(line, cut(6), schedule=lambda step: rate)
    assert torch.equal(line.weight, model().weight)


@pytest.mark.parametrize("old", [3.0, math.nan])
def test_a_gradient_that_a_frozen_weight_still_holds_does_not_count(old):
    """Of an earlier stage, in which it was trained."""
    line, plain = nn.Linear(2, 1), model()
    nn.init.constant_(line.weight, 0.5), nn.init.zeros_(line.bias)
    line.bias.requires_grad_(False).grad = torch.full((1,), old)
    assert step(line, cut(6), limit=0.1) == step(plain, cut(6), limit=0.1)
    assert torch.equal(line.weight, plain.weight) and line.bias.grad is not None


def test_an_old_gradient_hides_no_loss_of_another_module():
    line, other = nn.Linear(2, 1), model()
    line.bias.requires_grad_(False).grad = torch.ones(1)
    with pytest.raises(ValueError, match="No weight of the Linear has a gradient in step 2"):
        update(2, SCHEDULE, line, optimizer_of(line), 1.0, lambda rows: squares(other)(rows), cut(6))
