"""Right answers in every style are the same; every mistake is another answer."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minicpm_lite.lab.mistakes import mistakes, same

NUMBERS = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=6)
STYLES = [
    list,
    tuple,
    np.array,
    lambda numbers: np.array(numbers, np.float32),
    torch.tensor,
    lambda numbers: torch.tensor(numbers, dtype=torch.float64, requires_grad=True),
    lambda numbers: [torch.tensor(number) for number in numbers],
]


@pytest.mark.parametrize("one", STYLES)
@pytest.mark.parametrize("other", STYLES)
@settings(max_examples=20)  # of each of 49 pairs
@given(numbers=NUMBERS)
def test_numbers_are_the_same_whatever_holds_them(one, other, numbers):
    assert same(one(numbers), other(numbers))
    assert not same(one([*numbers, 0.0]), other(numbers))
    assert not same(one([number + 1 + abs(number) / 10 for number in numbers]), other(numbers))


@pytest.mark.parametrize(
    ("got", "expected", "is_same"),
    [
        (2, 2.0, True),
        (torch.tensor(2), 2, True),
        (torch.tensor([2]), 2, False),  # another shape
        (np.float32(0.1), 0.1, True),
        (0.1001, 0.1, False),
        (True, 1, True),
        (math.nan, math.nan, True),
        (math.inf, math.inf, True),
        (math.inf, -math.inf, False),
        (1e12 + 1, 1e12, True),
        ("ab", "ab", True),
        ("ab", "abc", False),
        (["a", 1.0], ("a", 1), True),
        (["a", 1.0], ("a", 2), False),
        (None, None, True),
        (None, 0, False),
        (0, None, False),
        ({"a": torch.ones(2)}, {"a": [1, 1]}, True),
        ({"a": [1, 1]}, {"b": [1, 1]}, False),
        ([[1, 2], [3]], [[1, 2], [3]], True),
        ([[1, 2], [3]], [[1, 2], [4]], False),
        ([], [], True),
        (torch.tensor([1 + 2j]), [1 + 2j], True),
        (np.array([1 + 2j], np.complex64), torch.tensor([1 + 2j]), True),
        (torch.tensor([1 + 2j]), torch.tensor([1 - 9j]), False),
        (Fraction(1, 4), 0.25, True),
        (np.bool_(True), True, True),
        ("1", 1, False),
        (torch.tensor([True, False]), [1, 0], True),
        (1 + 0j, 1, False),
    ],
)
def test_other_results(got, expected, is_same):
    assert same(got, expected) is is_same


def test_a_tolerance():
    assert same(1.05, 1, tolerance=0.1) and not same(1.05, 1)


RESULTS = st.one_of(
    st.integers(-9, 9), st.floats(-9, 9), st.booleans(), st.none(), st.text(max_size=3),
    st.lists(st.integers(0, 9), max_size=3), st.builds(lambda n: torch.arange(n), st.integers(1, 4)),
    st.dictionaries(st.text(max_size=1), st.integers(0, 9), min_size=1, max_size=2),
)  # fmt: skip


@given(result=RESULTS)
def test_one_more_is_another_result(result):
    wrong = dict(mistakes(lambda x: result))["one more"]
    assert not same(wrong(1), result)


def joined(parts, end="."):
    parts.append(end)  # an answer may change what it is given
    return "".join(parts)


def test_mistakes_are_made_of_one_argument_each():
    made = {mistake: (wrong(["a"]), wrong(["b"], end="!")) for mistake, wrong in mistakes(joined)}
    assert made == {
        "the first result each time": ("a.", "a."),
        "parts as it was first": ("a.", "a!"),
        "end as it was first": ("a.", "b."),
        "one more": ("a.?", "b!?"),
    }


def test_of_a_value_no_mistakes_are_made():
    assert list(mistakes(3)) == []


@pytest.mark.parametrize("nested", [lambda number: [[1.0], [1.0, number]], lambda number: [{"loss": number}]])
def test_the_tolerance_holds_in_every_level(nested):
    assert same(nested(2.05), nested(2.0), 0.1)
    assert not same(nested(2.000001), nested(2.0), 1e-9)
