"""Intervals and powers against scipy's own test and against simulated runs."""

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import stats

from minicpm_lite.lab.paired import Difference, difference, power, smallest_effect

LOSS = st.floats(0, 9, allow_subnormal=False)  # which a process that trained may flush to zero
LOSSES = st.lists(st.tuples(LOSS, LOSS), min_size=2, max_size=9)


@given(pairs=LOSSES)
def test_the_interval_is_that_of_the_paired_t_test(pairs):
    values, others = zip(*pairs, strict=True)
    found = difference(values, others)
    if len(set(found.values)) > 1:
        expected = stats.ttest_rel(values, others).confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-6)
    assert found.low <= found.mean <= found.high


def told(gaps, bound=None):
    return difference(gaps, [0.0] * len(gaps)).tells(bound)


@pytest.mark.parametrize(
    ("gaps", "bound", "expected"),
    [
        ([0.10, 0.11, 0.12], None, "higher"),
        ([-0.10, -0.11, -0.12], None, "lower"),
        ([-0.10, 0.11, 0.02], None, "not told apart"),
        ([-0.10, 0.11, 0.02], 0.01, "not told apart"),
        ([-0.001, 0.001, 0.0005], 0.01, "equal"),
        ([0.004, 0.005, 0.0045], 0.01, "equal"),  # surely above 0, and surely below what was said to matter
        ([0.5, 0.5], None, "higher"),
        ([0.0, 0.0], None, "not told apart"),
    ],
)
def test_what_it_tells(gaps, bound, expected):
    assert told(gaps, bound) == expected


@pytest.mark.slow  # thousands of comparisons
@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
def test_of_true_ties_one_in_twenty_is_called_a_difference(seeds):
    chance = np.random.default_rng(seeds)
    wrong = np.mean([told(gaps) != "not told apart" for gaps in chance.normal(size=(2000, seeds))])
    assert wrong == pytest.approx(0.05, abs=0.015)


@pytest.mark.parametrize(("effect", "seeds"), [(1.0, 5), (2.0, 3), (-0.8, 10), (0.0, 4)])
def test_the_power_is_that_of_simulated_runs(effect, seeds):
    chance = np.random.default_rng(seeds)
    seen = np.mean([told(gaps) != "not told apart" for gaps in chance.normal(effect, size=(2000, seeds))])
    assert power(effect, 1.0, seeds) == pytest.approx(seen, abs=0.03)


@given(shift=st.floats(0.01, 30), seeds=st.integers(2, 200))
@example(shift=16.0, seeds=3)
def test_the_power_is_that_of_the_noncentral_f_distribution(shift, seeds):
    """Where scipy has a number for it: not for the smallest shifts, and not for large ones."""
    limit = stats.t.ppf(0.975, seeds - 1) ** 2
    missed = stats.ncf.cdf(limit, 1, seeds - 1, shift**2)
    found = power(shift / math.sqrt(seeds), 1.0, seeds)
    assert found == pytest.approx(1 - missed, abs=1e-6)
    assert found == power(-shift / math.sqrt(seeds), 1.0, seeds)


@pytest.mark.parametrize(
    ("effect", "seeds", "expected"),
    [(0.0, 2, 0.05), (3.0, 2, 0.2608), (11.55, 2, 0.8), (1e5, 2, 1.0), (10.0, 10, 1.0), (1.0, 100, 1.0)],
)
def test_the_power_of_few_seeds_and_of_large_effects(effect, seeds, expected):
    assert power(effect, 1.0, seeds) == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow  # thousands of comparisons
def test_the_smallest_effect_has_the_power_that_was_wanted():
    for seeds in (2, 5):
        for wanted in (0.06, 0.8, 0.99):
            assert power(smallest_effect(0.02, seeds, wanted), 0.02, seeds) == pytest.approx(wanted)
    assert smallest_effect(0.02, 3) > smallest_effect(0.02, 5)
    assert smallest_effect(0.1, 2) == pytest.approx(1.1550, abs=1e-4)


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (lambda: power(0.1, 0.0, 3), "spread is 0.0; expected a number greater than 0"),
        (lambda: power(0.1, 0.1, 1), "seeds is 1; at least two pairs"),
        (lambda: power(math.nan, 0.1, 3), "effect is nan; expected a finite number"),
        (lambda: smallest_effect(0.1, 1), "seeds is 1; at least two pairs"),
        (lambda: smallest_effect(0.1, 3, 80), "wanted is 80; expected a probability between 0.05"),
        (lambda: smallest_effect(0.1, 3, 0.05), "wanted is 0.05; expected a probability between 0.05"),
        (lambda: told([0.1, 0.2], math.nan), "bound is nan; expected a number greater than 0"),
        (lambda: told([0.1, 0.2], -1), "bound is -1; expected a number greater than 0"),
    ],
)
def test_what_no_power_and_no_bound_can_be(ask, says):
    with pytest.raises(ValueError, match=says):
        ask()


@pytest.mark.parametrize("dtype", [np.int64, np.float32])
def test_numbers_may_be_an_array(dtype):
    values, others = np.array([3, 5, 4], dtype), np.array([1, 2, 4], dtype)
    assert difference(values, others) == difference([3.0, 5.0, 4.0], [1.0, 2.0, 4.0])


@pytest.mark.parametrize(
    ("values", "others", "says"),
    [
        ([1.0], [1.0], "two at least"),
        ([1.0, 2.0], [1.0], "2 runs and 1 were given"),
        ([1.0, math.nan], [1.0, 2.0], "a run that diverged has none"),
        ({0: 3.1, 1: 3.2}, {0: 2.1, 1: 2.2}, "given as a dict; expected a list"),  # the seeds are no losses
        ([3.1, 3.2], {3.1, 3.0}, "given as a set; expected a list"),
    ],
)
def test_what_cannot_be_compared(values, others, says):
    with pytest.raises(ValueError, match=says):
        difference(values, others)


def test_it_reads_as_a_number_with_its_interval():
    assert str(Difference((0.1, 0.2), 0.15, -0.485, 0.785)) == "+0.150 [-0.485, +0.785]"
