"""Exercises that check themselves: unfinished, wrong and right answers each get their own message.

A check is a function of asserts, each with a hint for the student. It stands in `minicpm_lite.exercises`, so
that no chapter shows it, together with wrong answers that it must refuse::

    @exercise("decay start", wrong=(lambda total, share: total - 100,), without=("a loop",))
    def decay_start(answer):
        \"\"\"The decay takes the last tenth of the steps.\"\"\"                      # shown to who is right
        assert same(answer(1000, 0.1), 900), "1,000 steps, 10 % decay: it starts at step 900."
        assert same(answer(50, 0.5), 25), "The share is an argument; half of 50 steps is 25."

A chapter then needs two lines::

    check.decay_start(decay_start)         # below the student's code: shows one of three boxes, never raises
    check.decay_start.accepts(solution)    # below the solution: raises if the check is wrong or lax

A check that tries one value lets answers pass that hold for this value alone. So `accepts` also makes wrong
answers of the solution, by the mistakes that are made everywhere (`mistakes`); the check must refuse each.
"""

import dis
import functools
import inspect
import traceback
import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass

from ..optional import require
from .display import inline_html, show
from .mistakes import mistakes
from .style import THEME

if not __debug__:  # every answer would be right
    raise ImportError(
        "Checks are made of asserts, which Python leaves out with -O or PYTHONOPTIMIZE; start it without."
    )

get_ipython = require(
    "IPython", install="minicpm_lite[notebooks]", purpose="use the book's notebooks"
).get_ipython

_LOOKS = {  # icon, heading, and colour as red, green, blue
    "unfinished": ("✎", "Your turn", "92,92,92"),
    "wrong": ("✗", "Not yet", "207,34,46"),
    "right": ("✓", "Right", "26,127,55"),
}
_UNFINISHED = "Put your code where the `...` stands, and run this cell again."
_LOOP = "a loop"
_LOOPS_IN_CALLS = {"map", "starmap", "accumulate", "vectorize"}  # a loop by another name
_WRONG_ANSWERS = 4  # that a check must refuse
_CONTAINERS = Mapping | list | tuple | Set | deque
_HOLDERS = functools.partial | types.SimpleNamespace | _CONTAINERS


@dataclass(frozen=True)
class Verdict:
    """What a check says about an answer: "unfinished", "wrong" or "right", and a message to the student."""

    state: str
    message: str


@dataclass(frozen=True)
class Look:
    """What is seen of an answer before it is called: whether its body is empty, and what is banned in it."""

    is_blank: bool
    banned: tuple[str, ...]


def exercise(
    name: str,
    wrong: Sequence[object] = (),
    without: Sequence[str] = (),
    unused: Sequence[str] = (),
    ask: Callable | None = None,
) -> Callable[[Callable[[object], None]], "Exercise"]:
    """Make a function of asserts the check of an exercise. Its docstring is shown to who is right.

    Args:
        name: shown with the verdict.
        wrong: answers that the check must refuse, the usual misunderstanding among them.
        without: what the answer must do without, as the exercise says: "a loop", or names of functions.
        unused: parameters of the answer that decide nothing in it.
        ask: where the answer's results are no data but something that lives (a gradient's way back, a run, a
            generator that was drawn from): called with the answer and with what the check gives it, it
            returns what the check wants to know, as data. It raises nothing of its own.
    """
    return lambda check: Exercise(name, check, tuple(wrong), tuple(without), tuple(unused), ask)


@dataclass(frozen=True)
class Exercise:
    """A check, ready to be called with a student's answer: a value, or a function that returns its result."""

    name: str
    check: Callable[[object], None]
    wrong: tuple[object, ...] = ()
    without: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    ask: Callable | None = None

    def __call__(self, answer: object) -> None:
        """Show what the check says about an answer. Never raises."""
        self._show(self.judge(answer))

    def accepts(self, solution: object) -> None:
        """Show that the solution is right, and hold the check to account.

        Raises:
            AssertionError: the check refuses the solution; it takes a wrong answer for right; or fewer than
                four wrong answers are known, those that are made of the solution counted.
        """
        verdict = self.judge(solution)
        if verdict.state != "right":
            raise AssertionError(
                f"The check {self.name!r} calls the solution {verdict.state}: {verdict.message}"
            )
        wrong = [(f"{mistake} instead", answer) for mistake, answer in mistakes(solution, self.unused)]
        wrong += [(f"number {number}", answer) for number, answer in enumerate(self.wrong, start=1)]
        for what, answer in wrong:
            if (state := self.judge(answer).state) != "wrong":
                raise AssertionError(f"The check {self.name!r} calls a wrong answer {state}: {what}.")
        if len(wrong) < _WRONG_ANSWERS or not self.wrong:
            raise AssertionError(
                f"The check {self.name!r} knows {len(wrong)} wrong answers, {len(self.wrong)} by hand; "
                f"{_WRONG_ANSWERS} are asked for, with the usual misunderstanding by hand."
            )
        self._show(verdict)

    def look(self, answer: Callable) -> Look:
        """What is seen of a function, or of an object that is called, before it is called."""
        used = _used(answer) if self.without else ()
        return Look(_does_nothing(answer), tuple(each for each in self.without if each in used))

    def judge(self, answer: object, look: Look | None = None) -> Verdict:
        """What the check says about an answer.

        Args:
            look: what was seen of the answer, if it stands in for a function of another process; it is
                asked there.
        """
        watched = _Watched(answer, look or self.look(answer)) if callable(answer) else None
        function = watched.function if watched else None
        if function and self.ask and not look:
            function = functools.partial(self.ask, function)
        try:
            with _no_exit():
                self.check(function or answer)
        except BaseException as error:  # whatever a student's code does, the notebook goes on
            if watched.is_blank if watched else answer is None or _has_blank(answer):
                return Verdict("unfinished", _UNFINISHED)
            return Verdict("wrong", self._explain(error, watched))
        if watched and watched.banned:
            why = f"The results are right, but the exercise asks to do without {watched.banned[0]}."
            return Verdict("wrong", why)
        return Verdict("right", inspect.getdoc(self.check) or "All checks passed.")

    def _explain(self, error: BaseException, watched: "_Watched | None") -> str:
        if isinstance(error, SystemExit):
            return "Your code ended the program, as `exit()` does; let it return its result instead."
        if isinstance(error, KeyboardInterrupt):
            return "Your code was interrupted before it gave a result; perhaps a loop in it never ends."
        first_line = next(iter(str(error).strip().splitlines()), "")
        said = f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__
        frames = traceback.extract_tb(error.__traceback__)
        if watched and error is watched.error:
            lines = [frame.lineno for frame in frames if frame.filename == watched.file]
            return f"Your code raised {said}" + (f" (line {lines[-1]} of its cell)." if lines else ".")
        forgot = " It returned `None` each time: is the `return` missing?" if _only_none(watched) else ""
        if isinstance(error, AssertionError):
            hint = str(error) if frames[-1].filename == self.check.__code__.co_filename else ""
            return (hint or "The answer is not right yet.") + forgot
        return f"The check could not use your answer, perhaps it is of the wrong type. {said}{forgot}"

    def _show(self, verdict: Verdict) -> None:
        icon, heading, color = _LOOKS[verdict.state]
        style = (
            f"border-left:5px solid rgb({color});background-color:rgba({color},0.12);"
            "border-radius:4px;padding:8px 16px;margin:8px 0"
        )
        show(
            f"{icon} {heading} ({self.name}): {verdict.message}",
            html=f'{THEME}<div class="lab-piece" style="{style}">'
            f"<strong>{icon} {heading}</strong> <small>{inline_html(self.name)}</small>"
            f'<div style="white-space:pre-wrap">{inline_html(verdict.message)}</div></div>',
        )


class _Watched:
    """A student's function, wrapped to note what it returned and raised."""

    def __init__(self, function: Callable, look: Look) -> None:
        self.file = code.co_filename if (code := _code(function)) else None
        self.is_blank, self.banned = look.is_blank, look.banned
        self.results: list[object] = []
        self.error: BaseException | None = None

        @functools.wraps(function)
        def watched(*args: object, **kwargs: object) -> object:
            try:
                result = function(*args, **kwargs)
            except BaseException as error:
                self.error = error
                self.is_blank |= isinstance(error, NotImplementedError)
                raise
            self.is_blank |= _has_blank(result)
            self.results.append(result)
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


def _has_blank(answer: object) -> bool:
    if isinstance(answer, Mapping):
        answer = [*answer.values()]
    parts = answer if isinstance(answer, tuple | list) else [answer]
    return any(part is ... for part in parts)


def _does_nothing(function: Callable) -> bool:
    """Whether its body is empty: ``...``, ``pass`` or a docstring."""
    code = _code(function)
    steps = {step.opname for step in dis.get_instructions(code)} if code else {"unknown"}
    return steps <= {"RESUME", "NOP", "LOAD_CONST", "RETURN_CONST", "RETURN_VALUE"} and not any(
        value is not None and not isinstance(value, str) for value in code.co_consts
    )


def _only_none(watched: _Watched | None) -> bool:
    return bool(watched and watched.results) and all(result is None for result in watched.results)


def _used(answer: Callable) -> set[str]:
    """Names that an answer and the helpers beside it read, and "a loop" if they have one.

    Of an object that is called, all methods of its class count; of lists, tables and prepared calls, all that
    they hold. Helpers are what comes from the module of the answer, or of what it is prepared of.
    """
    made_of = _beside(answer) if isinstance(answer, functools.partial) else [answer]
    home = {getattr(each, "__module__", None) for each in made_of} - {None, "builtins"}
    found, seen, todo = set(), {}, [made_of]
    while todo:
        part = _as_written(todo.pop())
        if id(part) in seen:
            continue
        seen[id(part)] = part  # kept, so that nothing else gets its id
        if code := _code(part):
            names, _, has_loop = _names_in(code)
            found |= names | ({_LOOP} if has_loop or names & _LOOPS_IN_CALLS else set())
        beside = _beside(part)
        own = [
            each for each in beside if isinstance(each, _HOLDERS) or getattr(each, "__module__", None) in home
        ]
        called = [each for each in beside if inspect.isroutine(each)]
        if isinstance(part, type):
            called = [each for each in called if each not in own]  # a method may have any name
        found |= {getattr(each, "__name__", "") for each in called}  # whatever it is called here
        found |= {type(each).__name__ for each in beside}  # a class that was called elsewhere
        todo += own
    return found


def _code(part: object) -> types.CodeType | None:
    """Of a function; some objects answer to every name, and hold no code under this one."""
    code = getattr(part, "__code__", None)
    return code if isinstance(code, types.CodeType) else None


def _as_written(part: object) -> object:
    """What a library has wrapped, as `torch.compile` does: of the wrapper's code no line is the answer's."""
    while "__wrapped__" in getattr(part, "__dict__", ()):  # its own; some objects answer to every name
        home = getattr(part, "__globals__", {}).get("__name__")
        if home == part.__module__:  # where what it wraps is from
            break
        part = part.__wrapped__
    return part


def _beside(part: object) -> list[object]:
    """What a part of an answer reads, holds, or is made of."""
    if isinstance(part, functools.partial):
        return [part.func, *part.args, *part.keywords.values()]
    if isinstance(part, type):
        return [*vars(part).values(), *part.__bases__]
    if inspect.ismethod(part):
        return [part.__func__, part.__self__]
    if code := _code(part):
        _, read, _ = _names_in(code)
        enclosed = [cell.cell_contents for cell in part.__closure__ or () if cell != types.CellType()]
        given = [*(part.__defaults__ or ()), *(part.__kwdefaults__ or {}).values()]
        return [*(part.__globals__.get(name) for name in read), *enclosed, *given]
    if inspect.isroutine(part):
        return []
    held = [*part] if isinstance(part, _CONTAINERS) else []
    held += part.values() if isinstance(part, Mapping) else []
    return [*held, type(part), *getattr(part, "__dict__", {}).values()]


def _names_in(code: types.CodeType) -> tuple[set[str], set[str], bool]:
    """Of a piece of code and what is nested in it: all names, the global ones, and whether it goes back."""
    steps = list(dis.get_instructions(code))
    names = set(code.co_names)
    read = {step.argval for step in steps if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    has_loop = any("FOR_ITER" in step.opname or "BACKWARD" in step.opname for step in steps)
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            inner_names, inner_read, inner_loop = _names_in(inner)
            names, read, has_loop = names | inner_names, read | inner_read, has_loop or inner_loop
    return names, read, has_loop
