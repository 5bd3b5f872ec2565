"""Grade students' notebooks: the original checks on their answers, each in a process that is shut in.

From a student's notebook only the answers are taken: the cells of the exercises, found by their call of the
check (``check.decay_start(...)``) or by the name that they define, and what they use of the student's other
cells. Imports and definitions come from the original chapter, as far as an answer uses them; its experiments
are not run. The checks are those of the installed library. How a verdict is kept out of reach of the code
that it is about: `judge`.

What an answer uses is found by names, which tell of ``parts = []`` and not of ``parts.append(2)``. So one
that is found wrong is judged once more, behind all that its student wrote above it, as a notebook is run.

First the book's own solutions are judged in the same way. An exercise whose solution is not found right is
not graded, because then the fault is not the students'.
"""

import ast
import builtins
import csv
import json
import os
import re
import subprocess
import symtable
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from IPython.core.inputtransformer2 import TransformerManager

from ...files import written_whole
from ..display import plain_table
from .execute import ONE_THREAD
from .judge import read_message, write_message
from .notebook import Notebook, find, nbformat, tags
from .sandbox import Sandbox

SECONDS = 20
_IMPORTS = (ast.Import, ast.ImportFrom)
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_SIGNS = {"right": "✓", "wrong": "✗", "unfinished": "✎", "ungraded": "?"}
_WITH_PYTHON = re.compile(r"\A\s*%%(?=(time|capture|prun)\b)")  # magics of a cell that run it as it is
_PASSED_ON = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL")  # no tokens and no keys


@dataclass(frozen=True)
class Grade:
    """The verdict on one exercise of one submission: "right", "wrong", "unfinished" or "ungraded"."""

    submission: str
    chapter: str
    exercise: str
    verdict: str
    message: str

    @property
    def points(self) -> int:
        """One for a right answer."""
        return int(self.verdict == "right")


def grade(folder: Path, originals: Iterable[Path], seconds: int = SECONDS) -> list[Grade]:
    """Grade every notebook in a folder and the folders in it.

    Args:
        folder: the submissions, under any names.
        originals: the chapters that they may be of.
        seconds: for one answer with its check.

    Raises:
        OSError: there is nothing to grade, or this system cannot shut students' code in.
        ValueError: an original is no notebook, or its checks cannot be imported.
    """
    paths = find([folder])
    Sandbox(Path(tempfile.gettempdir()), [], seconds, 0).close()  # or say what is missing for one
    chapters = [chapter for path in originals if (chapter := _Chapter.of(Notebook.read(path)))]
    known = {chapter.checks: chapter for chapter in chapters}
    grades: list[Grade] = []
    handed_in: dict[str, dict[str, list[Cell]]] = {}
    for path in paths:
        name = path.relative_to(folder).as_posix() if path != folder else path.name
        try:
            cells = [Cell.read(cell) for _, cell in Notebook.read(path).code]
        except (OSError, ValueError) as error:
            grades.append(Grade(name, "", "", "ungraded", str(error).replace(str(path), path.name)))
            continue
        checks = _checks(cells)
        if checks in known:
            handed_in.setdefault(checks, {})[name] = cells
        else:
            why = f"It imports {checks or 'nothing'} as check, and the chapters import {', '.join(known)}."
            grades.append(Grade(name, "", "", "ungraded", why))
    for checks, submissions in handed_in.items():
        grades += known[checks].grades(submissions, seconds)
    return sorted(grades, key=lambda each: each.submission)


def write_csv(grades: Iterable[Grade], path: Path) -> None:
    """Write a row for each exercise of each submission.

    Raises:
        OSError: the file cannot be written.
    """
    with written_whole(path) as beside, beside.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["submission", "chapter", "exercise", "verdict", "points", "message"])
        for each in grades:
            texts = each.submission, each.chapter, each.exercise, each.verdict, each.points, each.message
            rows.writerow([_harmless(text) for text in texts])


def table(grades: Sequence[Grade]) -> str:
    """A line for each submission: its points, and the verdict on each exercise."""
    rows = []
    for name in dict.fromkeys(each.submission for each in grades):
        own = [each for each in grades if each.submission == name]
        signs = "  ".join(f"{_SIGNS[each.verdict]} {each.exercise or each.message}" for each in own)
        points = f"{sum(each.points for each in own)}/{len(own)}"
        rows.append([_harmless(name), own[0].chapter, points, _harmless(signs)])
    return plain_table(rows, ["submission", "chapter", "points", "exercises"], [False, False, True, False])


@dataclass(frozen=True)
class Cell:
    """A code cell, read and not run."""

    text: str
    statements: list[ast.stmt]
    marks: frozenset[str]
    unreadable: str = ""  # why it has no statements

    @classmethod
    def read(cls, cell: nbformat.NotebookNode) -> "Cell":
        text, marks = cell.source, frozenset(tags(cell))
        try:
            text = TransformerManager().transform_cell(_WITH_PYTHON.sub("# %%", text))
            return cls(text, ast.parse(text).body, marks)
        except SyntaxError as error:
            return cls(text, [], marks, f"{error.msg} (line {error.lineno} of its cell)")
        except Exception as error:  # null bytes, endless nesting, and whatever else a student hands in
            return cls(text, [], marks, f"{type(error).__name__}: {error}")

    def answers(self, method: str | None = None) -> list["Task"]:
        """What it gives to checks: in ``check.NAME(answer)``, or in ``check.NAME.method(answer)``."""
        calls = filter(None, map(_check_called, self.statements))
        return [Task(name, answer, self.source) for name, called, answer in calls if called == method]

    @property
    def source(self) -> str:
        """Its text without calls of checks and of IPython, whose lines stay empty."""
        lines = self.text.split("\n")
        for statement in self.statements:
            if _is_left_out(statement):
                for number in range(statement.lineno - 1, statement.end_lineno):
                    lines[number] = ""
        return "\n".join(lines).rstrip()

    @property
    def own_statements(self) -> list[ast.stmt]:
        """All but calls of checks and of IPython."""
        return [statement for statement in self.statements if not _is_left_out(statement)]

    @property
    def bound(self) -> set[str]:
        """The names that it binds."""
        return {name for each in self.own_statements for name in _bound(each)}


@dataclass(frozen=True)
class Task:
    """What a judge is asked: does this answer, made by this code, pass this check?"""

    check: str
    answer: str  # the expression that the cell gives to the check
    source: str  # the cell, without the call of the check
    helpers: str = ""  # what it uses of the student's other cells
    above: str = ""  # all that the student wrote in the cells above


@dataclass(frozen=True)
class _Chapter:
    """An original chapter: its exercises with their solutions, and the statements of all its other cells.

    ``texts`` has all its statements, by which one knows what a student wrote.
    """

    name: str
    checks: str
    exercises: list[Task]
    solutions: list[Task]
    statements: list[ast.stmt]
    texts: frozenset[str]

    @classmethod
    def of(cls, notebook: Notebook) -> "_Chapter | None":
        """The chapter in a notebook; None if it imports no module of checks."""
        cells = [Cell.read(cell) for _, cell in notebook.code]
        checks = _checks(cells)
        if not checks:
            return None
        exercises = [task for cell in cells if "exercise" in cell.marks for task in cell.answers()]
        solved = [cell for cell in cells if "solution" in cell.marks]
        lessons = [cell for cell in cells if not cell.marks & {"exercise", "solution"}]
        statements = [statement for cell in lessons for statement in cell.own_statements]
        answers = [statement for cell in solved for statement in cell.own_statements]
        known = {name for each in statements for name in _bound(each)} | set(dir(builtins))
        solutions = [  # without what else their cells say and show
            replace(task, source="\n".join(_needed(answers, _read(task.answer), known - cell.bound)))
            for cell in solved
            for task in cell.answers("accepts")
        ]
        name = "/".join(notebook.path.absolute().with_suffix("").parts[-2:])
        texts = frozenset(ast.unparse(each) for cell in cells for each in cell.own_statements)
        return cls(name, checks, exercises, solutions, statements, texts)

    def grades(self, submissions: dict[str, list[Cell]], seconds: int) -> Iterator[Grade]:
        """Grade submissions of this chapter."""
        tasks = {
            name: [self._task(exercise, cells) for exercise in self.exercises]
            for name, cells in submissions.items()
        }
        answers = [task for own in tasks.values() for task in own if isinstance(task, Task)]
        used = {name for task in [*answers, *self.solutions] for name in _free(task)}
        used |= {name for each in self.statements if isinstance(each, _IMPORTS) for name in _bound(each)}
        with _Starter(self, _needed(self.statements, used), seconds) as judge:
            book = {solution.check: judge(solution) for solution in self.solutions}
            for name, own in tasks.items():
                for exercise, task in zip(self.exercises, own, strict=True):
                    state, why = book.get(exercise.check, ("missing", "there is none"))
                    if state != "right":
                        verdict = "ungraded", f"The book's own solution is not found right: {why}"
                    else:
                        verdict = judge(task) if isinstance(task, Task) else task
                        if verdict[0] == "wrong" and isinstance(task, Task) and task.above:
                            again = judge(replace(task, helpers=task.above))
                            verdict = again if again[0] == "right" else verdict
                    yield Grade(name, self.name, exercise.check, *verdict)

    def _task(self, exercise: Task, cells: list[Cell]) -> "Task | tuple[str, str]":
        """A student's answer to an exercise, or the verdict where there is nothing to judge."""
        try:
            return self._found(exercise, cells)
        except RecursionError:
            return "wrong", "What stands in the cell is nested too deeply."
        except SyntaxError as error:  # which Python finds only when it looks for names
            return (
                "wrong",
                f"The cell cannot be read as Python: {error.msg} (line {error.lineno} of its cell).",
            )

    def _found(self, exercise: Task, cells: list[Cell]) -> "Task | tuple[str, str]":
        asked, defined, left_open = [], [], []  # of each the last counts, of the first that there are
        for number, cell in enumerate(cells):
            called = [task for task in cell.answers() if task.check == exercise.check]
            if called:
                answered = called[-1].answer != exercise.answer or self._own(cell)
                (asked if answered else left_open).append((number, called[-1]))
            elif cell.unreadable and re.search(rf"\bcheck\.{exercise.check}\b", cell.text):
                asked.append((number, cell))
            elif exercise.answer in {name for each in self._own(cell) for name in _bound(each)}:
                defined.append((number, replace(exercise, source=cell.source)))
        match asked or defined or left_open:
            case []:
                return "unfinished", f"No cell calls check.{exercise.check} or defines {exercise.answer}."
            case [*_, (_, Cell(unreadable=why))]:
                return "wrong", f"The cell cannot be read as Python: {why}."
            case [*_, (number, answer)]:
                answer = replace(answer, above=self._written_in(cells[:number]))
        own = {name for each in ast.parse(answer.source).body for name in _bound(each)}
        shadowed = {name for cell in cells[:number] for each in self._own(cell) for name in _bound(each)}
        known = {name for each in self.statements for name in _bound(each)} | own
        known |= set(dir(builtins)) - shadowed
        others = [each for cell in cells for each in cell.own_statements]
        return replace(answer, helpers="\n".join(_needed(others, _free(answer) - known, known)))

    def _own(self, cell: Cell) -> list[ast.stmt]:
        """What a student wrote in a cell, and not the chapter."""
        return [each for each in cell.own_statements if ast.unparse(each) not in self.texts]

    def _written_in(self, cells: Iterable[Cell]) -> str:
        """All that a student wrote in some cells; a trial that fails does not end it."""
        passed_over = [ast.ExceptHandler(ast.Name("Exception"), None, [ast.Pass()])]
        try:
            return "\n".join(
                ast.unparse(each if isinstance(each, _DEFINITIONS) else ast.Try([each], passed_over, [], []))
                for cell in cells
                for each in self._own(cell)
            )
        except RecursionError:  # nested too deeply; the answer may do without
            return ""


class _Starter:
    """The process from which judges are forked, with a chapter's definitions read; call it with a task."""

    def __init__(self, chapter: _Chapter, statements: list[str], seconds: int) -> None:
        self.chapter, self.statements, self.seconds = chapter, statements, seconds

    def __enter__(self) -> "_Starter":
        self.folder = tempfile.TemporaryDirectory(prefix="grading-")
        environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "minicpm_lite.lab.press.judge"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=self.folder.name,
            env=environment | ONE_THREAD | {"HOME": self.folder.name, "TMPDIR": self.folder.name},
            bufsize=0,
        )
        chapter = {"checks": self.chapter.checks, "statements": self.statements}
        write_message(self.process.stdin.fileno(), json.dumps(chapter).encode())
        if problem := read_message(self.process.stdout.fileno()):
            self.__exit__()
            raise ValueError(f"The checks of {self.chapter.name} cannot be imported: {problem.decode()}")
        return self

    def __call__(self, task: Task) -> tuple[str, str]:
        asked = vars(task) | {"seconds": self.seconds}
        os.write(self.process.stdin.fileno(), b"+")
        write_message(self.process.stdin.fileno(), json.dumps(asked).encode())
        state, message = json.loads(read_message(self.process.stdout.fileno()))
        return state, message

    def __exit__(self, *error: object) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.folder.cleanup()


def _checks(cells: Iterable[Cell]) -> str | None:
    """The module that some cells import as ``check``."""
    for statement in (each for cell in cells for each in cell.statements):
        match statement:
            case ast.Import([ast.alias(module, "check")]):
                return module
            case ast.ImportFrom(package, [ast.alias(module, "check")], 0):
                return f"{package}.{module}"
    return None


def _check_called(statement: ast.stmt) -> tuple[str, str | None, str] | None:
    """The name, method and answer of ``check.NAME(answer)`` or ``check.NAME.method(answer)``."""
    match statement:
        case ast.Expr(ast.Call(ast.Attribute(ast.Name("check"), name), [answer], [])):
            return name, None, ast.unparse(answer)
        case ast.Expr(ast.Call(ast.Attribute(ast.Attribute(ast.Name("check"), name), called), [answer], [])):
            return name, called, ast.unparse(answer)
    return None


def _is_left_out(statement: ast.stmt) -> bool:
    names = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
    return isinstance(statement, ast.Expr) and bool(names & {"check", "get_ipython"})


def _free(task: Task) -> set[str]:
    """The names that an answer reads, but for those that its own lines have made before."""
    names, made = set(), set()
    for statement in ast.parse("\n".join([task.helpers, task.source, task.answer])).body:
        if isinstance(statement, _DEFINITIONS):  # a function is called when it has its name
            made |= _bound(statement)
        names |= _read(ast.unparse(statement)) - made
        if isinstance(statement, (*_IMPORTS, ast.Assign)):
            made |= _bound(statement)
    return names


def _read(source: str) -> set[str]:
    """The global names that some code reads.

    >>> sorted(_read("def area(x):\\n    y = x\\n    return y * z\\n\\narea(a)"))
    ['a', 'area', 'z']
    """
    tables, names = [symtable.symtable(source, "a cell", "exec")], set()
    for table in tables:
        at_top = table.get_type() == "module"
        names |= {
            symbol.get_name()
            for symbol in table.get_symbols()
            if symbol.is_referenced() and (at_top or symbol.is_global())
        }
        tables += table.get_children()
    return names


def _bound(statement: ast.stmt) -> set[str]:
    """The names that a statement binds at the top level, or changes, as ``x.y = 1`` changes x."""
    if isinstance(statement, _DEFINITIONS):
        return {statement.name}
    nodes, names = list(ast.walk(statement)), set()
    inner = {
        id(name) for each in nodes if isinstance(each, ast.comprehension) for name in ast.walk(each.target)
    }
    for node in [each for each in nodes if id(each) not in inner]:
        if isinstance(node, _IMPORTS):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name | ast.Attribute | ast.Subscript) and isinstance(node.ctx, ast.Store):
            while isinstance(node, ast.Attribute | ast.Subscript):
                node = node.value
            names |= {node.id} if isinstance(node, ast.Name) else set()
    return names


def _needed(statements: Sequence[ast.stmt], names: set[str], known: Iterable[str] = ()) -> list[str]:
    """Those of some statements that bind these names, and the names that they themselves read, and so on."""
    wanted, chosen = set(names), set()
    while True:
        more = {
            number for number, each in enumerate(statements) if number not in chosen and _bound(each) & wanted
        }
        if not more:
            return [ast.unparse(statements[number]) for number in sorted(chosen)]
        chosen |= more
        wanted |= {name for number in more for name in _read(ast.unparse(statements[number]))} - set(known)


def _harmless(value: object) -> object:
    """A text that no spreadsheet takes for a formula and no terminal for a command."""
    if not isinstance(value, str):
        return value
    text = "".join(letter if letter.isprintable() else " " for letter in value)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text
