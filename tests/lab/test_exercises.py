"""Unfinished, wrong and right answers, told apart; the check itself never raises.

PYTEST_DONT_REWRITE: pytest would add to the hints of the checks.
"""

import builtins
import collections
import functools
import itertools
import operator
import subprocess
import sys
import types
import unittest.mock

import numpy as np
import pytest
import torch
from IPython.core.autocall import ZMQExitAutocall

from minicpm_lite.lab import exercises
from minicpm_lite.lab.exercises import exercise


@exercise("twice")
def check_twice(answer):
    """Twice is `x + x`."""
    assert answer(2) == 4, "Twice 2 is `4`."
    try:
        answer(-1)
    except ValueError:
        pass
    else:
        raise AssertionError("A negative number must be refused.")


@exercise("bytes")
def check_bytes(answer):
    assert answer % 2 == 0, "It is even."
    if answer != 10:
        raise AssertionError


def twice(x):
    if x < 0:
        raise ValueError("negative")
    return 2 * x


def not_implemented(x):
    raise NotImplementedError


def divides(x):
    return x / 0


def nothing_for_negatives(x):
    return 2 * x if x > 0 else None


def only_a_docstring(x):
    """Twice x."""


def passes(x):
    pass


@pytest.mark.parametrize(
    "answer",
    [
        ...,
        None,
        lambda x: ...,
        lambda x: None,
        not_implemented,
        only_a_docstring,
        passes,
        lambda x: (1, ...),
        (1, ...),
    ],
)
def test_unfinished(answer):
    verdict = check_twice.judge(answer)
    assert verdict.state == "unfinished" and "`...`" in verdict.message


@exercise("in place")
def check_in_place(answer):
    """The list itself is changed; nothing is returned."""
    for numbers in ([1, 2], [5]):
        doubled = [2 * number for number in numbers]
        assert answer(numbers) is None and numbers == doubled, "Change the list itself."


def doubles_in_place(numbers):
    numbers[:] = [2 * number for number in numbers]


def test_an_answer_may_rightly_be_none():
    assert check_in_place.judge(doubles_in_place).state == "right"
    assert exercise("a value")(lambda answer: None).judge(None).state == "right"
    assert check_in_place.judge(lambda numbers: ...).state == "unfinished"


def slope_at(answer, x):
    """What a check of a derivative asks for where no tensor with a way back can be given to it."""
    y = answer(x)
    return torch.autograd.grad(y, x)[0] if isinstance(y, torch.Tensor) and y.requires_grad else None


@exercise("slope", ask=slope_at)
def check_slope(answer):
    """The slope of a square is twice its side."""
    for x in (1.0, -3.0):
        assert answer(torch.tensor(x, requires_grad=True)) == 2 * x, "Not the slope of the square."


def test_a_check_asks_where_the_answer_lives():
    assert check_slope.judge(lambda x: x * x).state == "right"
    for wrong in (lambda x: x, lambda x: (x * x).detach(), lambda x: 3):
        assert check_slope.judge(wrong).message.startswith("Not the slope of the square.")
    assert check_slope.judge(lambda x: x / "2").message.startswith("Your code raised TypeError")
    assert check_slope.judge(lambda x: ...).state == "unfinished"
    look = check_slope.look(lambda x: x * x)
    assert check_slope.judge(lambda x: torch.tensor(2.0) * x.item(), look).state == "right", (
        "Who stands in for a function of another process has been asked there."
    )


def test_a_forgotten_return_is_named():
    verdict = check_twice.judge(doubles_in_place)
    assert verdict.state == "wrong"  # it raises
    verdict = check_twice.judge(lambda x: print(end=str(x)[:0]))
    assert verdict == exercises.Verdict(
        "wrong", "Twice 2 is `4`. It returned `None` each time: is the `return` missing?"
    )
    assert check_twice.judge(nothing_for_negatives).message == "A negative number must be refused."


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda x: x, "Twice 2 is `4`."),
        (lambda x: 2 * x, "A negative number must be refused."),
        (divides, "Your code raised ZeroDivisionError: division by zero (line "),
        (lambda: 4, "Your code raised TypeError"),
        (4, "The check could not use your answer, perhaps it is of the wrong type. TypeError"),
    ],
)
def test_wrong_function(answer, hint):
    verdict = check_twice.judge(answer)
    assert verdict.state == "wrong" and hint in verdict.message


@pytest.mark.parametrize(
    ("answer", "hint"), [(3, "It is even."), (8, "not right yet"), ("ten", "wrong type")]
)
def test_wrong_value(answer, hint):
    verdict = check_bytes.judge(answer)
    assert verdict.state == "wrong" and hint in verdict.message


def ends_with(how):
    def answer(x):
        how()
        return 4

    return answer


def raises(error):
    raise error


class Shell:
    """What a kernel's shell has to do with exit()."""

    ended = False

    def ask_exit(self):
        self.ended = True


@pytest.mark.parametrize("as_method", [False, True])
@pytest.mark.parametrize(
    ("how", "hint"),
    [
        (lambda: builtins.exit(), "ended the program"),
        (lambda: builtins.quit(), "ended the program"),
        (lambda: sys.exit(3), "ended the program"),
        (lambda: raises(SystemExit), "ended the program"),
        (lambda: raises(KeyboardInterrupt), "was interrupted"),
        (lambda: raises(GeneratorExit), "GeneratorExit"),
    ],
)
def test_an_answer_that_ends_the_program_is_wrong(monkeypatch, how, hint, as_method):
    monkeypatch.setattr("sys.stdin", None)  # exit() closes it
    answer = (
        type("Answer", (), {"__call__": lambda self, x: ends_with(how)(x)})() if as_method else ends_with(how)
    )
    verdict = check_twice.judge(answer)
    assert verdict.state == "wrong" and hint in verdict.message


@pytest.mark.parametrize("shell", [Shell(), None])
def test_exit_in_a_notebook_leaves_the_kernel_alive(monkeypatch, shell):
    """There, exit() is IPython's: it raises nothing, and asks the kernel to end."""
    monkeypatch.setattr(exercises, "get_ipython", lambda: shell)
    leave = ZMQExitAutocall(shell) if shell else builtins.exit
    monkeypatch.setattr("sys.stdin", None)
    verdict = check_twice.judge(ends_with(leave))
    assert verdict.state == "wrong" and "as `exit()` does; let it return" in verdict.message
    if shell:
        assert not shell.ended
        leave()
        assert shell.ended, "outside of answers, exit() ends the kernel as before"


def test_right():
    assert check_twice.judge(twice) == exercises.Verdict("right", "Twice is `x + x`.")
    assert check_bytes.judge(10) == exercises.Verdict("right", "All checks passed.")


def test_boxes_differ_by_icon_and_word(monkeypatch):
    boxes = []
    monkeypatch.setattr(exercises, "show", lambda text, html: boxes.append((text, html)))
    for answer in (..., lambda x: x, twice):
        assert check_twice(answer) is None
    assert [text.split(":")[0] for text, _ in boxes] == [
        "✎ Your turn (twice)",
        "✗ Not yet (twice)",
        "✓ Right (twice)",
    ]
    assert "Twice 2 is <code>4</code>." in boxes[1][1]


@pytest.fixture
def shown(monkeypatch):
    shown = []
    monkeypatch.setattr(exercises, "show", lambda text, html: shown.append(text))
    return shown


def square(wrong, values=(2, 3)):
    """A check of x * x at some values, held to account with the solution."""

    @exercise("square", wrong=wrong)
    def check(answer):
        for value in values:
            assert answer(value) == value**2, "Times itself."

    check.accepts(lambda x: x**2)


def test_a_solution_is_accepted_when_the_check_refuses_what_is_wrong(shown):
    square(wrong=[lambda x: 2 * x])
    assert shown == ["✓ Right (square): All checks passed."]


@pytest.mark.parametrize(
    ("wrong", "values", "refusal"),
    [
        ([lambda x: 2 * x], [2], "calls a wrong answer right: the first result each time instead"),
        ([lambda x: 2 * x, lambda x: x * x], [2, 3], "calls a wrong answer right: number 2"),
        ([lambda x: None], [2, 3], "calls a wrong answer unfinished: number 1"),
        ([], [2, 3], "knows 3 wrong answers, 0 by hand; 4 are asked for"),
    ],
)
def test_a_check_that_is_lax_is_refused(shown, wrong, values, refusal):
    with pytest.raises(AssertionError, match=refusal):
        square(wrong, values)
    assert not shown


def test_a_solution_that_the_check_refuses():
    with pytest.raises(AssertionError, match="calls the solution wrong: Twice 2"):
        check_twice.accepts(lambda x: x)
    with pytest.raises(AssertionError, match="calls the solution unfinished"):
        check_twice.accepts(...)


# What an answer must do without


@exercise("sum", without=("a loop", "sum"))
def check_sum(answer):
    assert answer([1, 2, 3]) == 6 and answer([]) == 0, "The sum of all of them."


def adds(numbers):
    total = 0
    for number in numbers:
        total += number
    return total


def counts_down(numbers):
    total, left = 0, list(numbers)
    while left:
        total += left.pop()
    return total


plus = sum  # the same by another name


def by_a_helper(numbers):
    return adds(numbers)


class Adds:
    def __init__(self, how=None):
        self.how = how

    def __call__(self, numbers):
        return self.how(numbers) if self.how else self.added(numbers)

    def added(self, numbers):
        return adds(numbers)

    @staticmethod
    def reduce(numbers):
        return functools.reduce(int.__add__, numbers, 0)


class AddsToo(Adds):
    pass


class AddsInTurn:
    def __init__(self, **ways):
        self.ways = ways

    def __call__(self, numbers):
        return self.ways["first"](numbers)


cached = functools.cache(adds)
prepared, prepared_sum = functools.partial(adds), functools.partial(sum)


class Ways(list):
    def __call__(self, numbers):
        return self[0](numbers)

    def reduce(self, numbers):
        return adds(numbers)


softmax = functools.partial(torch.nn.functional.softmax, dim=0)
ways, table = [adds], {"a": {"row": (len, lambda numbers: sum(numbers))}}
ways.append(ways)  # a circle
namespace = types.SimpleNamespace(plus=sum)


def enclosing(how):
    return lambda numbers: how(numbers)


def given(numbers, how=adds):
    return how(numbers)


@pytest.mark.parametrize(
    ("answer", "banned"),
    [
        (Adds(), "a loop"),
        (AddsToo(), "a loop"),
        (Adds().added, "a loop"),
        (lambda numbers: Adds()(numbers), "a loop"),
        (functools.partial(Adds.added, None), "a loop"),
        (lambda numbers: cached(tuple(numbers)), "a loop"),
        (enclosing(adds), "a loop"),
        (enclosing(sum), "sum"),
        (given, "a loop"),
        (adds, "a loop"),
        (counts_down, "a loop"),
        (by_a_helper, "a loop"),
        (lambda numbers: int(np.add.reduce([*map(int, numbers)])), "a loop"),
        (lambda numbers: int([0, *itertools.accumulate(numbers)][-1]), "a loop"),
        (lambda numbers: [total := 0, *[total := total + number for number in numbers]][-1], "a loop"),
        (lambda numbers: sum(numbers), "sum"),
        (lambda numbers: np.sum(numbers), "sum"),
        (lambda numbers: plus(numbers), "sum"),
        (functools.partial(lambda numbers, how: how(numbers), how=sum), "sum"),
        (functools.partial(adds), "a loop"),
        (functools.partial(sum), "sum"),
        (lambda numbers: prepared(numbers), "a loop"),
        (lambda numbers: prepared_sum(numbers), "sum"),
        (sum, "sum"),
        (np.sum, "sum"),
        (functools.partial(operator.call, adds), "a loop"),
        (lambda numbers: ways[0](numbers), "a loop"),
        (lambda numbers: table["a"]["row"][1](numbers), "sum"),
        (lambda numbers: dict.fromkeys({adds}, 0).popitem()[0](numbers), "a loop"),
        (lambda numbers: namespace.plus(numbers), "sum"),
        (AddsInTurn(first=adds), "a loop"),
        (Ways([lambda numbers: np.add.reduce(numbers, dtype=int)]), "a loop"),
        (lambda numbers: AddsInTurn(first=sum)(numbers), "sum"),
        (enclosing(collections.deque([sum])[0]), "sum"),
        (functools.partial(AddsInTurn(first=adds)), "a loop"),
    ],
)
def test_what_an_answer_must_do_without(answer, banned):
    verdict = check_sum.judge(answer)
    assert verdict.state == "wrong" and verdict.message.endswith(f"the exercise asks to do without {banned}.")


def test_an_object_that_has_every_attribute_is_judged_in_the_end():
    verdict = check_sum.judge(unittest.mock.MagicMock(side_effect=adds))
    assert verdict.state == "wrong" and verdict.message.endswith("do without a loop.")


def reduce(numbers):
    return adds(numbers)


class Multiplies:
    """Of a method, the name says nothing; and a loop that is not here is not."""

    def sum(self, numbers):
        return np.asarray(numbers, int) @ np.ones(len(numbers), int)

    __call__ = sum


def test_other_ways_are_right():
    assert check_sum.judge(lambda numbers: functools.reduce(int.__add__, numbers, 0)).state == "right", (
        "a method is not the helper of its name"
    )
    assert check_sum.judge(Multiplies()).state == "right"
    assert (
        check_sum.judge(lambda numbers: np.asarray(numbers, int) @ np.ones(len(numbers), int)).state
        == "right"
    )


def twice_over(function):
    @functools.wraps(function)
    def wrapper(numbers):
        for _ in range(2):
            result = function(numbers)
        return result

    return wrapper


@pytest.mark.parametrize("wrap", [torch.no_grad(), functools.partial(torch.compile, backend="eager")])
def test_the_wrapper_of_a_library_is_no_part_of_an_answer(wrap):
    """It may loop, as that of `torch.compile` does. What it wraps may not, nor a wrapper of the student's."""
    assert check_sum.judge(wrap(lambda numbers: functools.reduce(int.__add__, numbers, 0))).state == "right"
    for loops in (adds, by_a_helper, twice_over(lambda numbers: functools.reduce(int.__add__, numbers, 0))):
        verdict = check_sum.judge(wrap(loops))
        assert verdict.state == "wrong" and verdict.message.endswith("asks to do without a loop.")


def test_what_a_library_does_within_is_not_the_answers():
    """A prepared call of it neither; its module has loops."""
    within = functools.partial(np.add.reduce, dtype=int)
    assert check_sum.judge(lambda numbers: within([*numbers, *softmax(torch.ones(2)).int()])).state == "right"


def test_objects_that_are_called_are_told_apart_like_functions():
    for how, state, says in (
        (lambda x: ..., "unfinished", "..."),
        (divides, "wrong", "Your code raised Zero"),
    ):
        answer = type("Answer", (), {"__call__": lambda self, x, how=how: how(x)})()
        verdict = check_twice.judge(answer)
        assert verdict.state == state and says in verdict.message


def test_a_wrong_result_is_said_before_a_ban():
    assert check_sum.judge(lambda numbers: sum(numbers) + 1).message == "The sum of all of them."


# What an error shows


def test_no_dump_of_tensors_and_no_second_line():
    @exercise("tensors")
    def check(answer):
        torch.testing.assert_close(answer(torch.ones(3)), torch.zeros(3))

    assert check.judge(lambda x: x).message == "The answer is not right yet."
    verdict = check.judge(lambda x: x @ torch.ones(4))
    assert verdict.message.startswith("Your code raised RuntimeError: ") and "\n" not in verdict.message


# Mistakes that a check must notice


def area(width, height=2):
    return width * height


TRIANGLE = [lambda width, height=2: width * height / 2]


@pytest.mark.parametrize(
    ("pairs", "mistake"),
    [
        ([(2, 3)], "the first result each time"),
        ([(2, 3), (2, 5)], "width as it was first"),
        ([(2, 3), (4, 3)], "height as it was first"),
    ],
)
def test_a_check_that_tries_too_little_is_refused(pairs, mistake):
    @exercise("area", wrong=TRIANGLE)
    def check(answer):
        assert all(answer(width, height) == width * height for width, height in pairs)

    with pytest.raises(AssertionError, match=f"'area' calls a wrong answer right: {mistake}"):
        check.accepts(area)


def test_one_more_is_refused_too():
    @exercise("area", wrong=TRIANGLE)
    def check(answer):
        assert (answer(2, 3) // 4, answer(8, 5) // 4, answer(8, 9) // 4) == (1, 10, 18)

    with pytest.raises(AssertionError, match="one more"):
        check.accepts(area)


def test_what_decides_nothing_is_left_alone(shown):
    @exercise("area", wrong=[*TRIANGLE, lambda width, height=2: width**2], unused=("height",))
    def check(answer):
        assert answer(2) == 4 and answer(5) == 10

    check.accepts(area)


@pytest.mark.slow  # starts a Python without asserts
def test_no_check_without_asserts():
    """Every answer would be right."""
    done = subprocess.run(
        [sys.executable, "-O", "-c", "import minicpm_lite.exercises.training.wsd"],
        capture_output=True,
        text=True,
    )
    assert "ImportError: Checks are made of asserts, which Python leaves out" in done.stderr
