"""Judge answers in a process of its own: ``python -P -m minicpm_lite.lab.press.judge``, which `grade` starts.

A check and a student's code never share a process, so nothing that the code does to Python can reach the
check or its verdict:

    starter     has read the chapter's definitions and its checks; it runs none of a student's code
      judge     forked for one exercise of one student; runs the check, and writes the verdict
        answer  forked each time the check calls the student's function; shut in (`sandbox`) before it reads
                the first line of the student's code; sends back what the function returned, and ends

What comes back is data, read by PyTorch's loader of weights, which makes numbers, texts, tensors and
containers of them, and nothing that could act; what is of a class of the student's comes as a subclass of the
same built-in type. Arguments need no copy, because a fork inherits them; what the function changed in them is
sent back too. A function that the check hands over is called in the judge.

So an answer's process can only say what its function returned and, before it is called, what a look at it
shows: an empty body, and what the exercise bans. The function itself is nowhere else, and only a look at it
is a notebook's look. The process knows the check, though, as every student does who reads the library; an
answer that looks its results up there is right without being an answer, and one that hides what it uses, in a
text for ``exec`` or from the look, breaks a ban unseen, here as in a notebook.

Each call is the first of its process, so that an answer which counts its calls is judged as if it had never
been called. What a check asks of a class that the student wrote, beyond its built-in type, is not there.
"""

import builtins
import inspect
import io
import json
import os
import re
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import types
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import is_dataclass
from decimal import Decimal
from fractions import Fraction
from importlib import import_module
from numbers import Complex, Integral, Number, Real
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ...runtime import seed_everything
from ..exercises import Exercise, Look, Verdict
from .sandbox import Sandbox, limit_memory, python_itself

MEMORY_MB = 2048
_MOST_BYTES = 256 * 2**20  # of one message
_CHAPTER_SECONDS = 180
_MOST_LETTERS = 500  # of a message
_MOST_TIMES = 10  # the time of an answer, if its cell has to run for each of its calls
_GRACE = 5.0  # seconds between the end of an answer's time and that of its judge
_CHAPTER, _CELL = "the chapter", "the cell of an exercise"
_SAME, _TENSOR, _LIKE = "\0same", "\0tensor", "\0like"  # marks in what is sent
_NUMPY = [
    np.ndarray,
    np.dtype,
    *(getattr(np.dtypes, name) for name in np.dtypes.__all__),
    np.ones(1).__reduce__()[0],  # the functions that make an array and a number again
    np.float64(1).__reduce__()[0],
]
_DATA = [*_NUMPY, (Ellipsis, "builtins.Ellipsis"), Decimal, Fraction, bytes, range, slice, frozenset]
_AS_THEY_ARE = (bool, np.generic, torch.Size, Counter, OrderedDict, Fraction)  # some are subclasses, too
_PLAIN = (dict, list, tuple, set, frozenset, int, float, complex, str, bytes)
_VIEWS = {type(view({})): view for view in (dict.keys, dict.values, dict.items)}
_MADE = (  # how a judge makes what is like plain data
    {base.__name__: type(base.__name__, (base,), {}) for base in _PLAIN}
    | {kind.__name__: view for kind, view in _VIEWS.items()}
    | {"mapping": types.MappingProxyType, "iterator": iter, "deque": deque}
)


class _NoShell:
    """Stands in for IPython: what a cell asks of it, as in ``files = !ls``, is not done."""

    def __getattr__(self, name: str) -> Callable:
        return lambda *args, **kwargs: None


class _Over(BaseException):
    """An answer's process ended without an answer; the text says why."""


def main() -> None:
    """Serve judgements: a chapter first, then one exercise after the other, each as a length and JSON."""
    commands, verdicts = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    torch.set_num_threads(1)
    seed_everything(0)
    chapter = json.loads(read_message(commands))
    try:
        checks = import_module(chapter["checks"])
    except Exception as error:
        write_message(verdicts, f"{type(error).__name__}: {error}".encode())
        return
    names = _definitions(chapter["statements"])
    write_message(verdicts, b"")
    while os.read(commands, 1):  # the judge reads the rest: no student's code comes into this process
        judge = os.fork()
        if not judge:
            _judge_next(commands, verdicts, checks, names)
        _wait(judge, verdicts)


def _definitions(statements: list[str]) -> dict[str, object]:
    """The names that statements of the original chapter define.

    What fails, or comes after the time of a chapter, is left out: whoever does not use it shall not notice.
    """

    def out_of_time(*_: object) -> None:
        raise TimeoutError

    names: dict[str, object] = {"__name__": _CHAPTER, "get_ipython": _NoShell}
    signal.signal(signal.SIGALRM, out_of_time)
    signal.alarm(_CHAPTER_SECONDS)
    with suppress(TimeoutError):
        for statement in statements:
            try:
                exec(compile(statement, _CHAPTER, "exec"), names)
            except TimeoutError:
                raise
            except Exception as error:
                print(f"{statement.splitlines()[0]}: {type(error).__name__}: {error}", file=sys.stderr)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    return names


def _judge_next(commands: int, verdicts: int, checks: types.ModuleType, names: dict) -> None:
    """Judge the exercise that comes next, in a process that ends with it."""
    folder = Path(tempfile.mkdtemp(prefix="grading-"))
    try:
        task = json.loads(read_message(commands))
        tempfile.tempdir = str(folder)  # what a check writes for an answer to read
        limit_memory(2 * MEMORY_MB)
        verdict = _judge(getattr(checks, task["check"]), _Answer(task, names, folder))
    except BaseException as error:  # a fault of the check, or of this file: no student is to blame
        verdict = Verdict("ungraded", f"The check failed itself: {type(error).__name__}: {error}")
    shutil.rmtree(folder, ignore_errors=True)
    write_message(verdicts, json.dumps([verdict.state, verdict.message[:_MOST_LETTERS]]).encode())
    os._exit(0)


def _wait(judge: int, verdicts: int) -> None:
    """Wait for a judge to end, which has limits of its own; speak for one that could not."""
    _, status = os.waitpid(judge, 0)
    if status:
        why = "Your code brought its judge down: its result was too large, or it did not end."
        write_message(verdicts, json.dumps(["wrong", why]).encode())


def _judge(exercise: Exercise, answer: "_Answer") -> Verdict:
    signal.alarm(
        round(_MOST_TIMES * answer.seconds + _GRACE)
    )  # the end of this process, if the check itself never ends
    try:
        verdict = exercise.judge(*answer.given(exercise))
    except BaseException as error:  # of the cell itself; a check's own verdict is never raised
        if not answer.over:
            where = f" (line {answer.line} of its cell)" if answer.line else ""
            return Verdict("wrong", f"Your code raised {type(error).__name__}: {error}{where}.")
    if answer.over:
        return Verdict("wrong", answer.over)
    if answer.line and verdict.message.startswith("Your code raised"):
        message = re.sub(r"line \d+ of its cell", f"line {answer.line} of its cell", verdict.message)
        return Verdict(verdict.state, message)
    return verdict


class _Answer:
    """What a student answered, run in processes of its own.

    Attributes:
        seconds: that its cell, and all its calls together, may take.
        over: why it will not answer any more, for the student to read.
        line: of the cell, that raised last.
    """

    def __init__(self, task: dict, names: dict, folder: Path) -> None:
        self.helpers, self.source, self.expression = task["helpers"], task["source"], task["answer"]
        self.seconds, self.names, self.folder = task["seconds"], names, folder
        self.deadline = time.monotonic() + self.seconds
        self.latest = time.monotonic() + _MOST_TIMES * self.seconds
        self.made_in = 0.0  # seconds that the cell itself takes, which is run anew for each call
        self.over, self.line = "", 0

    def given(self, exercise: Exercise) -> tuple[object, Look | None]:
        """The value that the cell gives to the check; of a function, one that asks it in another process."""

        def made(functions: list[Callable]) -> tuple[bool, object]:
            value = self._evaluated()
            return (True, tuple(vars(exercise.look(value)).values())) if callable(value) else (False, value)

        began = time.monotonic()
        is_function, said = self._asked(made, [])
        self.made_in = time.monotonic() - began
        if not is_function:
            return said, None

        def answer(*args: object, **kwargs: object) -> object:
            return self._called(exercise.ask, args, kwargs)

        return answer, Look(*said)

    def _evaluated(self) -> object:
        """The value, made in an answer's process by running the student's code."""
        names = dict(self.names)
        exec(compile(self.helpers, "other cells", "exec"), names)
        exec(compile(self.source, _CELL, "exec"), names)
        return eval(self.expression, names)

    def _called(self, ask: Callable | None, args: tuple, kwargs: dict) -> object:
        functions = [each for each in [*args, *kwargs.values()] if inspect.isroutine(each)]

        def call(asked: list[Callable]) -> tuple[object, list]:
            stand_in = {id(function): asked[number] for number, function in enumerate(functions)}
            positional = [stand_in.get(id(each), each) for each in args]
            named = {name: stand_in.get(id(each), each) for name, each in kwargs.items()}
            answer = self._evaluated()
            result = ask(answer, *positional, **named) if ask else answer(*positional, **named)
            return result, map(_content, [*args, *kwargs.values()])  # read last: an iterator may change them

        self.deadline = min(self.deadline + self.made_in, self.latest)
        result, contents = self._asked(call, functions)
        for value, content in zip([*args, *kwargs.values()], contents, strict=True):
            _renewed(value, content)
        return result

    def _asked(self, work: Callable[[list[Callable]], object], functions: list[Callable]) -> object:
        """What some work in an answer's process gives; its errors are raised here, as errors of Python's own.

        Args:
            work: gets stand-ins for the functions.
            functions: what the work may call, which happens here.
        """
        if self.over:
            raise _Over(self.over)
        self.line = 0
        left = self.deadline - time.monotonic()
        sandbox = Sandbox(self.folder, python_itself(), int(left) + 2, MEMORY_MB)
        here, there = os.pipe(), os.pipe()
        process = os.fork()
        if not process:
            _answer(sandbox, work, len(functions), here[0], there[1])
        sandbox.close()
        os.close(here[0])
        os.close(there[1])
        try:
            kind, *said = self._heard(functions, here[1], there[0])
        except TimeoutError:
            self.over = (
                f"Your code did not end within {self.seconds} seconds; perhaps a loop in it never ends."
            )
        except (EOFError, OSError):
            self.over = "Your code ended its process: it took too much memory, or left Python."
        except _NotData as error:
            self.over = f"Your code returned what is no data, and only data are taken: {error}."
        finally:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            os.close(here[1])
            os.close(there[0])
        if self.over:
            raise _Over(self.over)
        if kind == "raised":
            self.line = said[2]
            raise _error(*said[:2])
        return said[0]

    def _heard(self, functions: list[Callable], commands: int, results: int) -> tuple:
        """What an answer's process says in the end; until then it may ask for calls of functions."""
        while True:
            match said := _unpacked(read_message(results, self.deadline)):
                case ("call", int() as number, tuple() as args, dict() as kwargs):
                    write_message(commands, _packed(_outcome(functions[number], args, kwargs)))
                case ("returned", _) | ("raised", str(), str(), int()):
                    return said
                case ("odd", str() as what):
                    raise _NotData(what)
                case _:
                    raise _NotData("a message of another kind")


def _answer(sandbox: Sandbox, work: Callable, functions: int, commands: int, results: int) -> None:
    """Work in a process that is shut in, send what came of it, and end."""
    with suppress(BaseException):
        sandbox.enter(keep=[commands, results])
        try:
            done = work([_stand_in(number, commands, results) for number in range(functions)])
            said = ("returned", _sendable(done))
        except BaseException as error:
            said = ("raised", type(error).__name__, str(error), _line(error))
        try:
            message = _packed(said)
        except Exception:
            message = _packed(("odd", f"it is or holds what cannot be sent ({type(said[1]).__name__})"))
        write_message(results, message)
    os._exit(0)


def _line(error: BaseException) -> int:
    """The last line of the exercise's cell on the way to an error; 0 if there is none."""
    if isinstance(error, SyntaxError) and error.filename == _CELL:
        return error.lineno or 0
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == _CELL]
    return (lines[-1] or 0) if lines else 0


def _stand_in(number: int, commands: int, results: int) -> Callable:
    """In an answer's process, a function of the check: it asks the judge to call it."""

    def asked(*args: object, **kwargs: object) -> object:
        write_message(results, _packed(_sendable(("call", number, args, kwargs))))
        kind, *said = torch.load(io.BytesIO(read_message(commands)), weights_only=False)  # from the judge
        if kind == "raised":
            raise _error(*said)
        return said[0]

    return asked


def _outcome(function: Callable, args: tuple, kwargs: dict) -> tuple:
    try:
        return "returned", function(*args, **kwargs)
    except Exception as error:
        return "raised", type(error).__name__, str(error)


def _error(name: str, message: str) -> BaseException:
    """An error by its name: one of Python's own, or else one of this name."""
    known = getattr(builtins, name, None)
    if not (isinstance(known, type) and issubclass(known, BaseException)):
        known = type(name, (Exception,), {})
    if issubclass(known, UnicodeError | OSError):  # whose arguments are not one text
        known = type(name, (known,), {"__init__": Exception.__init__, "__str__": lambda self: message})
    return known(message)


# What a function changed in its arguments: the judge changes its own in the same way


def _content(value: object) -> object:
    """What can be sent of an argument that a function may have changed, and a mark for what cannot be."""
    match value:
        case nn.Module():
            return [_content(tensor) for tensor in [*value.parameters(), *value.buffers()]]
        case Tensor():
            return {_TENSOR: value.detach(), "grad": value.grad if value.is_leaf else None}
        case list() | tuple():
            return type(value)(map(_content, value)) if type(value) in (list, tuple) else _SAME
        case dict():
            return {key: _content(each) for key, each in value.items()}
        case set() | bytearray() | np.ndarray() | Number() | str() | bytes() | None:
            return value
    return _SAME


def _renewed(value: object, content: object) -> object:
    """An argument with its content as it is now: changed in place where it can be, else what replaces it."""
    match value, content:
        case _, str() if content == _SAME:
            return value
        case nn.Module(), list():
            for tensor, new in zip([*value.parameters(), *value.buffers()], content, strict=True):
                _renewed(tensor, new)
        case Tensor(), {"\0tensor": Tensor() as data, "grad": grad}:
            if value.shape != data.shape:
                value.data = data
            elif not torch.equal(value, data):
                with torch.no_grad():
                    value.copy_(data)  # also where it is a part of another tensor
            if value.is_leaf:
                value.grad = grad
        case tuple(), tuple():
            for each, new in zip(value, content, strict=True):
                _renewed(each, new)
        case list(), list():
            old = [*value, *[None] * len(content)]
            value[:] = [_renewed(each, new) for each, new in zip(old, content, strict=False)]
        case dict(), dict():
            renewed = {key: _renewed(value.get(key), new) for key, new in content.items()}
            value.clear()
            value.update(renewed)
        case set(), set():
            value.clear()
            value.update(content)
        case bytearray(), bytearray():
            value[:] = content
        case np.ndarray(), np.ndarray():
            value[...] = content
        case _, {"\0tensor": Tensor() as data}:
            return data
        case _:
            return content
    return value


# What is of a class that a judge does not know goes there as plain data, and a mark for what these are like


def _sendable(value: object) -> object:
    """A result, or what holds results, as data and marks; anything else as it is."""
    kind = type(value)
    if isinstance(value, _AS_THEY_ARE) or kind.__module__.startswith("minicpm_lite."):
        return value
    if kind in _VIEWS:
        return _like(kind.__name__, _sendable(dict(value.mapping)))
    base = next((each for each in _PLAIN if isinstance(value, each)), None)
    match value:
        case dict():
            plain = {key: _sendable(each) for key, each in value.items()}
        case list() | tuple():
            plain = base(map(_sendable, value))
        case Mapping():
            return _like("mapping", {key: _sendable(value[key]) for key in value})
        case Iterator() | deque():
            return _like("deque" if isinstance(value, deque) else "iterator", [*map(_sendable, value)])
        case np.ndarray():
            return np.asarray(value)
        case Tensor() if kind is not nn.Parameter:
            return value.as_subclass(Tensor)
        case _ if base:
            plain = base(value)
        case Integral():
            return int(value)
        case Real():
            return float(value)
        case Complex():
            return complex(value)
        case _:
            return value
    return plain if kind is base else _like(base.__name__, plain)


def _like(name: str, data: object) -> dict:
    return {_LIKE: name, "data": data}


def _received(value: object) -> object:
    """Data with what their marks ask for, in a judge."""
    match value:
        case {"\0like": str(name), "data": data}:
            return _MADE[name](_received(data))
        case dict() if type(value) is dict:
            return {key: _received(each) for key, each in value.items()}
        case list() | tuple() if type(value) in _PLAIN:
            return type(value)(map(_received, value))
    return value


# Messages: a length and bytes, and in the bytes data


class _NotData(Exception):
    """What was sent holds something that is no data; the text names it."""


def _packed(value: object) -> bytes:
    packed = io.BytesIO()
    torch.save(value, packed)
    return packed.getvalue()


def _unpacked(message: bytes) -> object:
    """What a message holds, if that is data: nothing that it names is imported, and nothing in it is run.

    Raises:
        _NotData: it holds something else.
    """
    packed, named = io.BytesIO(message), []
    try:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(packed)
        packed.seek(0)
        with torch.serialization.safe_globals([*_DATA, *filter(None, map(_record, named))]):
            return _received(torch.load(packed, weights_only=True))
    except Exception:
        raise _NotData(f"it holds something of {', '.join(named)}" if named else "it is damaged") from None


def _record(name: str) -> type | None:
    """A class of the library's that only holds fields, such as ModelConfig, if it is loaded here."""
    module, _, attribute = name.rpartition(".")
    found = vars(sys.modules.get(module, types)).get(attribute)
    ours = module.startswith("minicpm_lite.") and isinstance(found, type)
    return found if ours and (is_dataclass(found) or issubclass(found, tuple)) else None


def read_message(source: int, deadline: float | None = None) -> bytes:
    """Read a message.

    Raises:
        EOFError: there is none, or half of one.
        TimeoutError: it did not come until the deadline.
    """
    (length,) = struct.unpack("<q", _read(source, 8, deadline))
    if not 0 <= length <= _MOST_BYTES:
        raise EOFError
    return _read(source, length, deadline)


def _read(source: int, length: int, deadline: float | None) -> bytes:
    parts = bytearray()
    while len(parts) < length:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        if not select.select([source], [], [], left)[0]:
            raise TimeoutError
        part = os.read(source, min(length - len(parts), 2**20))
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)


def write_message(target: int, message: bytes) -> None:
    rest = memoryview(struct.pack("<q", len(message)) + message)
    while rest:
        rest = rest[os.write(target, rest) :]


if __name__ == "__main__":
    main()
