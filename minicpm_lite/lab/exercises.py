"""Exercises that check themselves: unfinished, wrong and right answers each get their own message.

The check is a function of asserts, written in the notebook beside the exercise::

    @lab.exercise("wsd-decay-start")
    def check_decay_start(answer):
        \"\"\"The decay takes the last tenth of the steps.\"\"\"          # shown to who is right
        assert answer(1000, 0.1) == 900, "1,000 steps with 10 % decay: the decay starts at step 900."

    check_decay_start(decay_start)               # never raises; shows one of three boxes
    check_decay_start.accepts(solution)          # raises if the check refuses the solution
    check_decay_start.rejects(wrong_1, wrong_2)  # raises if the check lets one of them pass
"""

import functools
import inspect
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ..optional import require
from .display import inline_html, show
from .style import THEME

get_ipython = require(
    "IPython", install="minicpm_lite[notebooks]", purpose="use the book's notebooks"
).get_ipython

_LOOKS = {  # icon, and colour as red, green, blue
    "unfinished": ("✎", "154,103,0"),
    "wrong": ("✗", "207,34,46"),
    "right": ("✓", "26,127,55"),
}
_UNFINISHED = "There is no answer yet. Put your code where the `...` stands."
_RETURNED_NOTHING = (
    "Your function returned nothing yet. Put your code where the `...` stands, and end it with `return`."
)


@dataclass(frozen=True)
class Verdict:
    """What a check says about an answer: "unfinished", "wrong" or "right", and a message to the student."""

    state: str
    message: str


def exercise(name: str) -> Callable[[Callable[[object], None]], "Exercise"]:
    """Make a function of asserts the check of an exercise. Its docstring is shown to who is right."""
    return lambda check: Exercise(name, check)


class Exercise:
    """A check, ready to be called with a student's answer: a value, or a function that returns its result."""

    def __init__(self, name: str, check: Callable[[object], None]) -> None:
        self.name, self._check = name, check

    def __call__(self, answer: object) -> None:
        """Show what the check says about an answer. Never raises."""
        self._show(self.judge(answer))

    def accepts(self, solution: object) -> None:
        """Show that the solution is right.

        Raises:
            AssertionError: the check refuses it.
        """
        verdict = self.judge(solution)
        if verdict.state != "right":
            raise AssertionError(
                f"The check {self.name!r} calls the solution {verdict.state}: {verdict.message}"
            )
        self._show(verdict)

    def rejects(self, *wrong_answers: object) -> None:
        """Print the hint that each wrong answer gets.

        Raises:
            AssertionError: the check takes one of them for right or unfinished, so it checks too little.
        """
        for number, answer in enumerate(wrong_answers, start=1):
            verdict = self.judge(answer)
            if verdict.state != "wrong":
                raise AssertionError(f"The check {self.name!r} calls wrong answer {number} {verdict.state}.")
            print(f"wrong answer {number}: {verdict.message}")

    def judge(self, answer: object) -> Verdict:
        """What the check says about an answer."""
        if _is_blank(answer):
            return Verdict("unfinished", _UNFINISHED)
        watched = _Watched(answer) if inspect.isroutine(answer) else None
        try:
            with _no_exit():
                self._check(watched.function if watched else answer)
        except BaseException as error:  # whatever a student's code does, the notebook goes on
            verdict = Verdict("wrong", _explain(error, watched))
        else:
            verdict = Verdict("right", inspect.getdoc(self._check) or "All checks passed.")
        if watched and watched.returned_nothing:  # it decides, whatever the check made of it
            return Verdict("unfinished", _RETURNED_NOTHING)
        return verdict

    def _show(self, verdict: Verdict) -> None:
        icon, color = _LOOKS[verdict.state]
        heading = f"{icon} {verdict.state.capitalize()}"
        style = (
            f"border-left:5px solid rgb({color});background-color:rgba({color},0.12);"
            "border-radius:4px;padding:8px 16px;margin:8px 0"
        )
        show(
            f"{heading} ({self.name}): {verdict.message}",
            html=f'{THEME}<div class="lab-piece" style="{style}">'
            f"<strong>{heading}</strong> <small>{inline_html(self.name)}</small>"
            f'<div style="white-space:pre-wrap">{inline_html(verdict.message)}</div></div>',
        )


class _Watched:
    """A student's function, wrapped to notice that it returned nothing or raised an error."""

    def __init__(self, function: Callable) -> None:
        self.file = function.__code__.co_filename if hasattr(function, "__code__") else None
        self.returned_nothing = False
        self.error: BaseException | None = None

        @functools.wraps(function)
        def watched(*args: object, **kwargs: object) -> object:
            try:
                result = function(*args, **kwargs)
            except BaseException as error:
                self.error = error
                self.returned_nothing |= isinstance(error, NotImplementedError)
                raise
            self.returned_nothing |= _is_blank(result)
            return result

        self.function = watched


@contextmanager
def _no_exit() -> Iterator[None]:
    """Let ``exit()`` and ``quit()`` raise SystemExit, where IPython's own would end the kernel."""

    def ask_exit() -> None:
        raise SystemExit

    shell = get_ipython()
    if shell is None:
        yield
        return
    shell.ask_exit = ask_exit
    try:
        yield
    finally:
        del shell.ask_exit


def _is_blank(answer: object) -> bool:
    parts = answer if isinstance(answer, tuple | list) else [answer]
    return answer is None or any(part is ... for part in parts)


def _explain(error: BaseException, watched: _Watched | None) -> str:
    if isinstance(error, SystemExit):
        return "Your code ended the program, as `exit()` does; let it return its result instead."
    if isinstance(error, KeyboardInterrupt):
        return "Your code was interrupted before it gave a result; perhaps a loop in it never ends."
    said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if watched and error is watched.error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == watched.file]
        return f"Your code raised {said}" + (f" (line {lines[-1]} of its cell)." if lines else ".")
    if isinstance(error, AssertionError):
        return str(error) or "The answer is not right yet."
    return f"The check could not use your answer, perhaps it is of the wrong type. {said}"
