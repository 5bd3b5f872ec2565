"""Unfinished, wrong and right answers, told apart; the check itself never raises."""

import builtins
import sys

import pytest
from IPython.core.autocall import ZMQExitAutocall

from minicpm_lite.lab import exercise, exercises


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


@pytest.mark.parametrize(
    "answer", [..., None, lambda x: ..., lambda x: None, not_implemented, nothing_for_negatives, (1, ...)]
)
def test_unfinished(answer):
    verdict = check_twice.judge(answer)
    assert verdict.state == "unfinished" and "`...`" in verdict.message


def test_a_function_that_returns_nothing_is_unfinished_even_if_the_check_minds_nothing():
    assert exercise("lax")(lambda answer: answer(1)).judge(lambda x: None).state == "unfinished"


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
        "✎ Unfinished (twice)",
        "✗ Wrong (twice)",
        "✓ Right (twice)",
    ]
    assert "Twice 2 is <code>4</code>." in boxes[1][1]


def test_accepts_and_rejects_hold_the_check_to_account(capsys, monkeypatch):
    monkeypatch.setattr(exercises, "show", lambda text, html: None)
    check_twice.accepts(twice)
    check_twice.rejects(lambda x: x, divides)
    assert "wrong answer 1: Twice 2 is `4`." in capsys.readouterr().out
    with pytest.raises(AssertionError, match="calls the solution wrong: Twice 2"):
        check_twice.accepts(lambda x: x)
    with pytest.raises(AssertionError, match="calls wrong answer 2 right"):
        check_twice.rejects(lambda x: x, twice)
    with pytest.raises(AssertionError, match="calls wrong answer 1 unfinished"):
        check_twice.rejects(lambda x: None)
