"""Results compared whatever holds them, and the mistakes that are made everywhere.

`same` lets right answers in other styles pass: tensors, arrays, lists and numbers, of any precision.
`mistakes` makes wrong answers of a right one, so that a check can be asked whether it would notice.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Number

import numpy as np
from torch import Tensor

__all__ = ["mistakes", "same"]


def same(got: object, expected: object, tolerance: float = 1e-5) -> bool:
    """Whether two results are the same: numbers but for rounding, of one shape, whatever holds them.

    Args:
        got: the answer's result.
        expected: a number, a text, None, or tensors, arrays, sequences and tables of such.
        tolerance: how far a number may be off, for each unit of its size, and for numbers below 1 in all.

    >>> import torch
    >>> same(torch.tensor([1.0, 2.0], dtype=torch.float64), [1, 2]), same((1, 2), [1, 2]), same([1], 1)
    (True, True, False)
    """
    if isinstance(expected, Mapping):
        return (
            isinstance(got, Mapping)
            and got.keys() == expected.keys()
            and all(same(got[key], expected[key], tolerance) for key in expected)
        )
    mine, theirs = _array(expected), _array(got)
    if mine is None or theirs is None:
        if _is_sequence(expected) and _is_sequence(got):
            return len(got) == len(expected) and all(
                same(one, other, tolerance) for one, other in zip(got, expected, strict=True)
            )
        return type(got) is type(expected) and got == expected
    one_kind = mine.dtype == theirs.dtype and mine.shape == theirs.shape  # complex is no right kind of real
    return one_kind and np.allclose(theirs, mine, tolerance, tolerance, equal_nan=True)


def mistakes(solution: object, unused: Sequence[str] = ()) -> Iterator[tuple[str, Callable]]:
    """Wrong answers made of a function that is right, each with the words for what is wrong in it.

    Args:
        solution: the function; of anything else nothing is made.
        unused: parameters that decide nothing.

    >>> def area(width, height): return width * height
    >>> for mistake, wrong in mistakes(area):
    ...     print(mistake, wrong(2, 3), wrong(4, 5))
    the first result each time 6 6
    width as it was first 6 10
    height as it was first 6 12
    one more 7 21
    """
    if not inspect.isfunction(solution):
        return
    yield "the first result each time", _frozen(solution, lambda first, arguments: first)
    for name in inspect.signature(solution).parameters:
        if name not in unused:
            yield (
                f"{name} as it was first",
                _frozen(solution, lambda first, arguments, name=name: arguments | {name: first[name]}),
            )
    yield "one more", _off_by_one(solution)


def _frozen(solution: Callable, chosen: Callable[[dict, dict], dict]) -> Callable:
    """The solution, called with arguments that are chosen from those of the first call and of this one."""
    signature, first = inspect.signature(solution), {}

    @functools.wraps(solution)
    def wrong(*args: object, **kwargs: object) -> object:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        if not first:
            first.update(copy.deepcopy(dict(given.arguments)))
        given.arguments = chosen(copy.deepcopy(first), dict(given.arguments))
        return solution(*given.args, **given.kwargs)

    return wrong


def _off_by_one(solution: Callable) -> Callable:
    @functools.wraps(solution)
    def wrong(*args: object, **kwargs: object) -> object:
        return _one_off(solution(*args, **kwargs))

    return wrong


def _one_off(result: object) -> object:
    match result:
        case bool():
            return not result
        case str():
            return result + "?"
        case Mapping():
            return {key: _one_off(value) for key, value in result.items()}
        case list() | tuple():
            return type(result)(result[1:]) if result else [None]
    return "?" if result is None else result + 1


def _array(value: object) -> np.ndarray | None:
    """The numbers of a value, in double precision; None if it holds anything else."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        return (value.cdouble() if value.is_complex() else value.double()).numpy()
    if isinstance(value, np.ndarray | np.generic):
        kind = value.dtype.kind
        return np.asarray(value, complex if kind == "c" else float) if kind in "biufc" else None
    if isinstance(value, Number):
        return np.asarray(value, complex if isinstance(value, complex) else float)
    if _is_sequence(value):
        parts = [_array(each) for each in value]
        if all(part is not None for part in parts) and len({part.shape for part in parts}) <= 1:
            return np.array(parts)
    return None


def _is_sequence(value: object) -> bool:
    return isinstance(value, list | tuple)
