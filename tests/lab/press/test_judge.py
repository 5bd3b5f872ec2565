"""What is sent of results: a check sees of them what it sees in a notebook, and nothing that could act."""

import types
from collections import ChainMap, Counter, OrderedDict, UserDict, defaultdict, deque, namedtuple
from decimal import Decimal
from enum import IntEnum
from fractions import Fraction

import numpy as np
import pytest
import sympy
import torch

from minicpm_lite import load_config
from minicpm_lite.lab.mistakes import same
from minicpm_lite.lab.press.judge import _content, _NotData, _packed, _renewed, _sendable, _unpacked

Pair = namedtuple("Pair", "a b")
Six = IntEnum("Six", {"SIX": 6})
OWN = {base: type("Own", (base,), {}) for base in (int, float, complex, str, bytes, list, tuple, dict, set)}


class OwnTensor(torch.Tensor):
    """Of a student's."""


def counts():
    yield 1
    yield 2


RESULTS = {
    "6": (6, True, 6.0, Decimal(6), Fraction(6), sympy.Integer(6), sympy.Float(6), np.float16(6), Six.SIX, OWN[int](6),
          OWN[float](6), 6 + 0j, OWN[complex](6), torch.tensor(6), torch.nn.Parameter(torch.tensor(6.0)),
          torch.tensor(6.0).as_subclass(OwnTensor), np.array(6), "6", None),
    "[1, 2]": ([1, 2], (1, 2), Pair(1, 2), OWN[list]([1, 2]), OWN[tuple]([1, 2]), [Decimal(1), OWN[float](2)],
               torch.Size([1, 2]), torch.tensor([1, 2]), np.array([1, 2]), np.ma.array([1, 2]), 
               deque([1, 2]), range(1, 3), {1: 0, 2: 0}.keys(), {0: 1, 1: 2}.values(), {1, 2}, OWN[set]([1, 2])),
    "{'a': [1, 2]}": (*(kind({"a": [1, 2]}) for kind in (dict, OWN[dict], OrderedDict, Counter, UserDict, ChainMap)),
                      types.MappingProxyType({"a": Pair(1, 2)}), defaultdict(lambda: 0, a=(1, 2)),
                      {"a": [1, 2]}.items()),
    "'text'": ("text", OWN[str]("text"), np.str_("text"), OWN[bytes](b"text"), b"text", ["text"]),
}  # fmt: skip
KINDS = (
    list,
    tuple,
    dict,
    set,
    int,
    float,
    str,
    bytes,
    deque,
    range,
    np.ndarray,
    torch.Tensor,
    type({}.keys()),
)


def sent(value):
    return _unpacked(_packed(_sendable(value)))


@pytest.mark.parametrize(
    ("expected", "value"),
    [
        pytest.param(eval(expected), value, id=f"{expected}-{type(value).__name__}-{number}")
        for expected, values in RESULTS.items()
        for number, value in enumerate(values)
    ],
)
def test_a_result_is_what_it_is_in_a_notebook(expected, value):
    got = sent(value)
    assert same(got, expected) == same(value, expected)
    if isinstance(value, sympy.Number | OwnTensor | np.ndarray):
        return  # of other packages' classes, and sent as Python's, PyTorch's and NumPy's own
    assert [isinstance(got, kind) for kind in KINDS] == [isinstance(value, kind) for kind in KINDS]
    assert (type(got) in KINDS) == (type(value) in KINDS)
    if not isinstance(value, torch.Tensor) and hasattr(value, "__len__"):
        assert len(got) == len(value) and list(map(str, got)) == list(map(str, value))


def test_an_iterator_is_read_once_and_no_list():
    for value in (counts(), map(int, "12"), iter([1, 2]), (each for each in (1, 2))):
        got = sent(value)
        assert not same(got, [1, 2]) and list(got) == [1, 2] and list(got) == []


def test_records_of_the_library_stay_what_they_are():
    config = load_config("lite-1m")
    assert sent([config]) == [config]


def test_what_a_function_writes_into_its_arguments_arrives():
    for new in ([Decimal(1), OWN[float](2)], [Fraction(1), Six.SIX], [np.float32(1), (2,)], [OWN[str]("a")]):
        argument = [0, 0]
        _renewed(argument, sent(_content([*new])))
        assert argument == new


class Equal:
    """Equal to all that it is compared with."""

    def __eq__(self, other):
        return True

    __hash__ = None


class EqualList(Equal, list):
    """The same, and a list."""


@pytest.mark.parametrize(
    "value", [Equal(), [Equal()], {"a": Equal()}, counts, Equal, {"\0like": "eval", "data": "1"}]
)
def test_what_could_act_is_no_data(value):
    with pytest.raises(_NotData, match="holds something of|damaged"):
        sent(value)


def test_an_equality_of_the_students_own_is_left_behind():
    assert EqualList([1]) == [2] and sent(EqualList([1])) != [2]
