"""The schedule is exact at every phase edge, for every form of decay; its misprinted variants are told apart."""

import math
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minicpm_lite.config import load_recipe
from minicpm_lite.training.wsd import WSD, Cosine, DecayForm

FORMS = get_args(DecayForm)


@pytest.mark.parametrize("form", FORMS)
def test_exact_at_every_edge(form):
    schedule = WSD(peak_lr=0.01, warmup_steps=100, stable_steps=800, decay_steps=100, form=form)
    assert schedule.decay_start == 900 and schedule.total_steps == 1000
    assert schedule(0) == 0
    assert schedule(1) == 0.01 / 100
    assert schedule(99) == pytest.approx(0.0099, rel=1e-12)
    assert schedule(100) == schedule(500) == schedule(900) == 0.01
    assert schedule(901) < 0.01
    assert schedule(1000) == pytest.approx(0.001, rel=1e-12)
    assert schedule(5000) == schedule(1000)


@pytest.mark.parametrize(
    ("form", "quarter", "half"),
    [
        ("exponential", 0.1**0.25, 0.1**0.5),
        ("linear", 1 - 0.9 * 0.25, 0.55),
        ("cosine", 1 - 0.9 * (1 - math.sqrt(0.5)) / 2, 0.55),
        ("sqrt", 0.55, 1 - 0.9 * math.sqrt(0.5)),
    ],
)
def test_the_decay_has_its_form(form, quarter, half):
    schedule = WSD(1.0, 0, 100, 40, form)
    assert schedule(110) == pytest.approx(quarter, rel=1e-12)
    assert schedule(120) == pytest.approx(half, rel=1e-12)


def test_the_half_life_halves():
    schedule = WSD(0.01, 0, 1000, 300, half_life=100)
    assert [schedule(1000 + k) / 0.01 for k in (0, 100, 200, 300)] == pytest.approx([1, 0.5, 0.25, 0.125])
    assert schedule.final_ratio == 0.125


def test_the_published_decay_of_minicpm():
    """From 0.01 to the 0.001 of fine-tuning in about 16,600 steps with a half-life of 5,000."""
    recipe = load_recipe("minicpm-2.4b")
    schedule = WSD(recipe.peak_learning_rate, 0, 263_000, 16_610, half_life=recipe.decay_half_life_steps)
    assert schedule(schedule.total_steps) == pytest.approx(1e-3, rel=1e-3)
    assert recipe.decay_half_life_steps * recipe.batch_tokens == pytest.approx(20e9, rel=0.02)


def test_no_decay_yet():
    schedule = WSD(0.01, 10, 90, 0)
    assert schedule(100) == schedule(1000) == 0.01


def test_cosine_is_exact():
    schedule = Cosine(peak_lr=0.01, warmup_steps=100, total_steps=1100)
    assert schedule(0) == 0 and schedule(50) == 0.005 and schedule(100) == 0.01
    assert schedule(600) == pytest.approx(0.0055, rel=1e-12)
    assert schedule(1100) == schedule(9999) == pytest.approx(0.001, rel=1e-12)


# The two misprints of the paper, as printed.


def decay_as_printed(step, stable_end, end):
    return 0.5 ** ((step - end) / stable_end)


def cosine_as_printed(step, total):
    return 0.9 * math.cos(math.pi * step / total) + 0.1


def test_the_printed_decay_starts_above_the_peak():
    """With S and T as defined beside it, the factor jumps up at the start of the decay and barely falls."""
    assert decay_as_printed(900, stable_end=900, end=1000) > 1.07
    assert decay_as_printed(1000, stable_end=900, end=1000) == 1
    schedule = WSD(1.0, 0, 900, 100)
    assert abs(decay_as_printed(1000, 900, 1000) - schedule(1000)) > 0.5


def test_the_printed_cosine_turns_negative():
    assert cosine_as_printed(1000, 1000) == pytest.approx(-0.8)
    assert Cosine(1.0, 0, 1000)(1000) == pytest.approx(0.1)


# Wrong schedules that people really write; the exact values above must reject each.


def off_by_one(schedule):
    return lambda step: schedule(step + 1)


def decay_from_the_whole_step(schedule):
    return lambda step: schedule(step) if step <= 900 else 0.01 * 0.1 ** (step / 1000)


def warmup_inside_the_decay(schedule):
    return lambda step: schedule(step - 100) if step > 900 else schedule(step)


@pytest.mark.parametrize("wrong", [off_by_one, decay_from_the_whole_step, warmup_inside_the_decay])
def test_wrong_schedules_miss_an_edge(wrong):
    schedule = WSD(0.01, 100, 800, 100)
    exact = {0: 0.0, 50: 0.005, 100: 0.01, 900: 0.01, 950: 0.01 * 0.1**0.5, 1000: 0.001}
    assert all(schedule(step) == pytest.approx(lr, rel=1e-9) for step, lr in exact.items())
    assert any(wrong(schedule)(step) != pytest.approx(lr, rel=1e-9) for step, lr in exact.items())


schedules = st.builds(
    WSD,
    peak_lr=st.floats(1e-6, 10),
    warmup_steps=st.integers(0, 50),
    stable_steps=st.integers(0, 50),
    decay_steps=st.integers(0, 50),
    form=st.sampled_from(FORMS),
    final_ratio=st.floats(0.01, 1),
)


@given(schedule=schedules)
def test_rises_stays_and_never_rises_again(schedule):
    rates = [schedule(step) for step in range(schedule.total_steps + 3)]
    warm, decayed = rates[: schedule.warmup_steps + 1], rates[schedule.decay_start :]
    assert warm == sorted(warm)
    assert set(rates[schedule.warmup_steps : schedule.decay_start + 1]) == {schedule.peak_lr}
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in zip(decayed, decayed[1:], strict=False))
    assert max(rates) <= schedule.peak_lr
    assert rates[-1] == pytest.approx(
        schedule.peak_lr * (schedule.final_ratio if schedule.decay_steps else 1)
    )


def test_as_a_torch_scheduler():
    """The k-th update uses lr(k), and groups keep the ratio of their rates."""
    schedule = WSD(0.01, 3, 4, 5)
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": weights[:1]}, {"params": weights[1:], "lr": 0.002}], lr=0.01)
    scheduler = schedule.scheduler(optimizer)
    used = []
    for _ in range(14):
        used.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    assert [first for first, _ in used] == pytest.approx([schedule(step) for step in range(1, 15)])
    assert [second for _, second in used] == pytest.approx([schedule(step) / 5 for step in range(1, 15)])


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: WSD(0, 1, 1, 1), "peak_lr is 0; expected a finite number greater than 0"),
        (lambda: Cosine(math.inf, 1, 2), "peak_lr is inf; expected a finite number"),
        (lambda: WSD(1.0, -1, 1, 1), "warmup_steps is -1"),
        (lambda: WSD(1.0, 1, 0.5, 1), "stable_steps is 0.5; expected a whole number"),
        (lambda: WSD(1.0, 1, 1, 1, form="quadratic"), "choose one of exponential, linear, cosine, sqrt"),
        (lambda: WSD(1.0, 1, 1, 1, final_ratio=0), "an exponential never reaches 0"),
        (lambda: WSD(1.0, 1, 1, 1, final_ratio=2, form="linear"), "final_ratio is 2"),
        (lambda: WSD(1.0, 1, 1, 1, form="linear", half_life=3), "half_life belongs to the exponential"),
        (lambda: WSD(1.0, 1, 1, 1, half_life=0), "half_life is 0"),
        (lambda: WSD(1.0, 1, 1, 1)(-1), "The step is -1"),
        (lambda: Cosine(1.0, 10, 10), "at least one step after the warm-up"),
    ],
)
def test_impossible_schedules_get_a_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


def test_linear_may_end_at_zero():
    assert WSD(1.0, 0, 10, 10, "linear", final_ratio=0.0)(20) == 0
