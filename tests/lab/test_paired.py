"""Intervals and powers against scipy's own test and against simulated runs."""

import numpy as np
import pytest
from hypothesis import given
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


def test_the_smallest_effect_has_the_power_that_was_wanted():
    for seeds in (3, 5, 8):
        for wanted in (0.5, 0.8):
            assert power(smallest_effect(0.02, seeds, wanted), 0.02, seeds) == pytest.approx(wanted)
    assert smallest_effect(0.02, 3) > smallest_effect(0.02, 5)


@pytest.mark.parametrize(
    ("values", "others", "says"),
    [
        ([1.0], [1.0], "two at least"),
        ([1.0, 2.0], [1.0], "2 runs and 1 were given"),
        ([1.0, float("nan")], [1.0, 2.0], "a run that diverged has none"),
    ],
)
def test_what_cannot_be_compared(values, others, says):
    with pytest.raises(ValueError, match=says):
        difference(values, others)


def test_it_reads_as_a_number_with_its_interval():
    assert str(Difference((0.1, 0.2), 0.15, -0.485, 0.785)) == "+0.150 [-0.485, +0.785]"
