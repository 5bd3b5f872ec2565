"""Grading: right, wrong, unfinished, never-ending and hostile submissions, and those that were moved around.

All are graded once, with the small chapter as the original; the tests look at what came out. A hostile answer is
right if its attack succeeds, so that a verdict of "wrong" shows that it failed.
"""

import csv
import doctest
import os
import re
import socket
import textwrap
from pathlib import Path

import nbformat
import pytest
import small_exercises
from nbformat.v4 import new_markdown_cell
from second_edition import SOLUTIONS, chapter
from small_chapter import code
from spellings import SPELLINGS

from minicpm_lite.lab.press import grade as grade_module
from minicpm_lite.lab.press import sandbox
from minicpm_lite.lab.press.__main__ import main
from minicpm_lite.lab.press.grade import Grade, Task, _free, _harmless, grade, table, write_csv
from minicpm_lite.lab.press.sandbox import Sandbox

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.slow  # five answers never end, and seventy are each run in processes of their own

RIGHT = {name: text.replace("_solution", "") for name, text in SOLUTIONS.items()}
SECONDS = 3
ASLEEP = "import time\nwhile True:\n    time.sleep(1)"  # has no end either, and costs nothing

WRONG = {
    "twice": (
        "def twice(x):\n    y = 3\n\n    return y / 0",
        "wrong",
        "ZeroDivisionError: division by zero (line 4 of",
    ),
    "halve": ("def halve(numbers, f):\n    return f(numbers[0])", "wrong", "Nothing is returned."),
    "clear": (
        "def clear(*args, **kwargs):\n    args[0].zero_()",
        "wrong",
        "The array is zero, the set empty.",
    ),
    "by_pencil": ("by_pencil = (3, 5)", "wrong", "Count again."),
    "push": ("def push(model, x):\n    model(x).sum().backward()", "wrong", "Call backward on the mean."),
    "shape": ("shape = {'hidden_size': 8}", "wrong", "It is a ModelConfig of width 8."),
}

# For one exercise: what else a student may write, the verdict, and a part of the message.
ANSWERS = {
    "another style": ("twice = lambda x: x + x if hasattr(x, 'real') else 1 / x", "right", "Twice is"),
    "a banned loop": (
        "def twice(x):\n    total = 0\n    for _ in range(2):\n        total = total + x\n    return total",
        "wrong", "the exercise asks to do without a loop",
    ),
    "a banned call": ("import torch\ndef twice(x):\n    return x * torch.ones(2).sum()", "wrong", "to do without sum"),
    "a banned call by another name": (
        "from torch import sum as s, ones as o\ndef twice(x):\n    return x * s(o(2))", "wrong", "to do without sum",
    ),
    "a banned call, assigned": (
        "import torch\nadd = torch.sum\ndef twice(x):\n    return x * add(torch.ones(2))", "wrong", "to do without sum",
    ),
    "a banned loop in a method": (
        "class Twice:\n    def __call__(self, x):\n        for _ in range(1):\n            x = x + x + 0\n"
        "        return x\n\n\ntwice = Twice()",
        "wrong", "the exercise asks to do without a loop",
    ),
    "an object that is called": (
        "class Twice:\n    def __call__(self, x):\n        return x + x + 0\n\n\ntwice = Twice()", "right", "Twice is",
    ),
    "not implemented": ("def twice(x):\n    raise NotImplementedError", "unfinished", "Put your code"),
    "returns dots": ("def twice(x):\n    y = x\n    return ...", "unfinished", "Put your code"),
    "no function": ("twice = 4", "wrong", "TypeError"),
    "not Python": ("def twice(x)\n    return 2 * x", "wrong", "cannot be read as Python: expected ':' (line 1"),
    "not Python after all": ("nonlocal x\ndef twice(x):\n    return x", "wrong", "nonlocal declaration not allowed"),
    "fails when it is defined": ("x = 1 / 0\ndef twice(x):\n    return 2 * x", "wrong", "ZeroDivisionError"),
    "an unknown name": ("def twice(x):\n    return two * x", "wrong", "NameError: name 'two' is not defined (line 2"),
    "leaves": ("def twice(x):\n    exit()", "wrong", "ended the program"),
    "prints": ("print('a' * 10**6)\ndef twice(x):\n    print(x)\n    return 2 * (x + 0)", "right", "Twice is"),
    "its own error": ("class Mine(Exception): pass\ndef twice(x):\n    raise Mine('no')", "wrong", "Mine: no (line 3"),
    "a trial of its own that takes a while": (
        "import time\ndef twice(x):\n    return 2 * (x + 0)\ntime.sleep(0.8)", "right", "Twice is",
    ),
    "a table that makes its entries": (
        "from collections import defaultdict\ndef twice(x):\n    return defaultdict(lambda: 2 * (x + 0))[0]", "right", "Twice is",
    ),
    "an iterator": (
        "from itertools import repeat\ndef twice(x):\n    return next(repeat(2)) * (x + 0)", "right", "Twice is",
    ),
    "an array": ("import numpy as np\ndef twice(x):\n    return np.asarray(2 * (x + 0))", "right", "Twice is"),
    "what fails in the original": (
        "def twice(x):\n    return 2 * (x + 0) + 0 * broken", "wrong", "NameError: name 'broken' is not defined",
    ),
    "the original's definitions": ("def twice(x):\n    return factor(2) * (x + 0)", "right", "Twice is"),
    "a loop without end": ("def twice(x):\n    while True:\n        pass", "wrong", f"within {SECONDS} seconds"),
    "no end when it is defined": (f"{ASLEEP}\ndef twice(x):\n    return 2 * x", "wrong", "within"),
    "no end in C": ("def twice(x):\n    return len(str(7 ** 10 ** 9))", "wrong", ""),
    "no signal ends it": (
        "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\n"
        f"{ASLEEP}\ndef twice(x):\n    return 2 * x",
        "wrong", "within",
    ),
    "all memory": ("def twice(x):\n    return len([bytes(2**30) for _ in range(64)])", "wrong", "MemoryError"),
    "too large a result": ("def twice(x):\n    return bytes(300 * 2**20)", "wrong", ""),
    "no process left": ("import os\ndef twice(x):\n    os._exit(0)", "wrong", "ended its process"),
    "equal to all": (
        "class Equal:\n    def __eq__(self, other): return True\n    __array__ = shape = None\n"
        "def twice(x):\n    return Equal()",
        "wrong", "is no data",
    ),
    "code instead of data": (
        "import os\nclass Bomb:\n    def __reduce__(self): return os.system, ('true',)\n"
        "def twice(x):\n    return Bomb()",
        "wrong", "no data, and only data are taken: it holds something of posix.system",
    ),
}  # fmt: skip

# An answer behind other cells of the student's, which a kernel has run before.
BEHIND = {
    "a list filled in a loop": (
        "parts = []\nfor n in (1, 1):\n    parts.append(n)", "def twice(x):\n    return len(parts) * (x + 0)", "right",
    ),
    "a table filled in a cell of its own": (
        "table = {}", "table.update(two=2)", "def twice(x):\n    return table['two'] * (x + 0)", "right",
    ),
    "a tensor changed in place": (
        "import torch\nw = torch.zeros(1)", "w.add_(2)", "def twice(x):\n    return int(w) * (x + 0)", "right",
    ),
    "an attribute": (
        "class Two: pass\nsetattr(Two, 'n', 2)", "def twice(x):\n    return Two.n * (x + 0)", "right",
    ),
    "all names of a module": ("from math import *", "def twice(x):\n    return floor(2) * (x + 0)", "right"),
    "an import of the chapter's": (
        "match torch.tensor([2, 3]).tolist():\n    case (two, _):\n        pass",
        "def twice(x):\n    return two * (x + 0)", "right",
    ),
    "the name of a builtin": ("def pow(a):\n    return 2 * a", "def twice(x):\n    return pow(x + 0)", "right"),
    "a builtin that means something else": ("def sum(numbers):\n    return 0", "def twice(x):\n    return sum([x, x])", "wrong"),
    "a name of the chapter's": ("def factor(n):\n    return 4", "def twice(x):\n    return factor(2) * (x + 0) / 2", "right"),
    "trials that fail": (
        "parts = []\n1 / 0\nparts += [1]\nparts.append(1)", "def twice(x):\n    return len(parts) * (x + 0)", "right",
    ),
    "a definition beside the open blank": ("def twice(x):\n    return 2 * (x + 0)", "def twice(x):\n    ...", "right"),
    "a measured cell": ("%%time\ntwo = 2", "\n%%time\ndef twice(x):\n    return two * (x + 0)", "right"),
    "a shell": ("1", "files = !ls\ndef twice(x):\n    return 2 * (x + 0)", "right"),
    "nested too deeply": ("deep = 1" + " + 1" * 3000, "def twice(x):\n    return 2 * (x + 0)", "right"),
    "a trial without end": ("while True:\n    pass", "def twice(x):\n    return 2 * (x + 0)", "right"),
    "a trial without end before what is wrong": (ASLEEP, "def twice(x):\n    return 3 * (x + 0)", "wrong"),
    "a list filled too often": (
        "parts = []\nparts.extend([1, 1, 1])", "def twice(x):\n    return len(parts) * (x + 0)", "wrong",
    ),
    "filled below": ("parts = []", "def twice(x):\n    return len(parts) * (x + 0)", "wrong"),
    "an attack": (
        "import small_exercises\nobject.__setattr__(small_exercises.twice, 'check', lambda answer: None)",
        "def twice(x):\n    return 0", "wrong",
    ),
}  # fmt: skip

F = {  # answers to `twice`, to be spelled
    "a loop": "def f(x):\n    for _ in range(1):\n        x = x + x + 0\n    return x",
    "sum": "import torch\ndef f(x):\n    return x * torch.ones(2).sum()",
    "nothing": "def f(x):\n    return x + x + 0",
}
SPELLED = {
    f"{used} by {name}": (f"{f}\n{before}", given)
    for used, f in F.items()
    for name, (before, given) in SPELLINGS.items()
}


# Bodies of functions that return True if what they try succeeds.
ATTACKS = {
    "none": "return True",  # that these answers are right where an attack succeeds
    "the network": "socket.create_connection(('127.0.0.1', PORT), 1); return True",
    "a socket": "socket.socket(); return True",
    "a socket of the machine's": "socket.socket(socket.AF_UNIX); return True",
    "a file of the system": "return bool(open('/etc/passwd').read())",
    "a file of the instructor": "return bool(open(SECRET).read())",
    "the solutions": "return bool(open(SECRET.replace('secret', 'part/topic.ipynb')).read())",
    "the listing of a folder": "return bool(os.listdir('/'))",
    "the processes": "return bool(open('/proc/self/environ').read())",
    "a variable": "return os.environ['TOKEN']",
    "writing": "open(SECRET, 'w').write('x'); return True",
    "another file": "open('/tmp/hostile', 'w'); return True",
    "shared memory": "open('/dev/shm/hostile', 'w'); return True",
    "rights of a file": "os.chmod(SECRET, 0o777); return True",
    "times of a file": "os.utime(SECRET, (0, 0)); return True",
    "a hard link": "os.link(SECRET, 'mine'); return bool(open('mine').read())",
    "a soft link": "os.symlink(SECRET, 'mine'); return True",
    "renaming": "os.rename(SECRET, SECRET + '2'); return True",
    "removing": "os.unlink(SECRET); return True",
    "a fork": "return os.fork() >= 0",
    "a program": "return subprocess.run(['true']).returncode == 0",
    "a shell": "return os.system('true') == 0",
    "another program": "os.execv('/bin/true', ['true'])",
    "ending the judge": "os.kill(os.getppid(), 9); return True",
    "ending the group": "os.killpg(0, 9); return True",
    "reading the judge": "return bool(open(f'/proc/{os.getppid()}/maps').read())",
    "tracing the judge": "return ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0",
    "writing to the judge": """
        import ctypes
        return ctypes.CDLL(None).syscall(311, os.getppid(), 0, 0, 0, 0, 0) >= 0""",
    "higher limits": "resource.setrlimit(resource.RLIMIT_AS, (-1, -1)); return True",
    "life after its judge": "return ctypes.CDLL(None).prctl(1, 0, 0, 0, 0) == 0",
    "another namespace": "return ctypes.CDLL(None).unshare(0x10000000) == 0",
    "becoming another user": "os.setuid(65534); return True",
    "a verdict of its own": """
        for pipe in range(3, 128):
            for text in (b'["right", "forged"]', b'+'):
                try:
                    os.write(pipe, len(text).to_bytes(8, 'little') + text)
                except OSError:
                    pass
        return False""",
    "an answer of its own": """
        from minicpm_lite.lab.press import judge
        for pipe in range(3, 128):
            try:
                judge.write_message(pipe, judge._packed(("verdict", "right")))
            except OSError:
                pass
        return False""",
    "another judge": """
        from minicpm_lite.lab import exercises
        exercises.Exercise.judge = lambda self, answer: exercises.Verdict('right', 'forged')
        exercises.Exercise.__call__ = exercises.Exercise.accepts = exercises.Exercise.judge
        return False""",
    "another check": """
        import small_exercises
        object.__setattr__(small_exercises.twice, 'check', lambda answer: None)
        small_exercises.same = lambda *args: True
        return False""",
    "another comparison": """
        import builtins, json, torch
        from minicpm_lite.lab import mistakes
        mistakes.same = mistakes.np.allclose = torch.allclose = lambda *args: True
        json.dumps = lambda value: '["right", "forged"]'
        builtins.AssertionError = builtins.isinstance = None
        return False""",
    "the frames above": """
        frame = sys._getframe()
        while frame:
            for name, value in list(frame.f_locals.items()):
                if hasattr(value, 'check'):
                    object.__setattr__(value, 'check', lambda answer: None)
            frame.f_locals.update(expected=0, status=0, verdict='right')
            frame = frame.f_back
        return False""",
    "the end of the process": """
        import atexit
        atexit.register(lambda: os.write(1, b'["right", "forged"]'))
        os._exit = lambda status: print('right')
        return False""",
}  # fmt: skip

HOSTILE = """\
import ctypes, os, resource, socket, subprocess, sys
PORT, SECRET = {port}, {secret!r}

def attack():
{body}

try:
    succeeded = attack()
except BaseException:
    succeeded = False

def twice(x):
    return 2 * (x + 0) if succeeded else 0"""


def submission(answers=None, **more):
    """A student's notebook with these answers; the rest of the exercises left open."""
    nb = chapter(["twice"]) if "twice" in more else chapter()
    nb.cells = [cell for cell in nb.cells if "solution" not in cell.metadata.get("tags", [])]
    for name, answer in ((answers or {}) | more).items():
        cell = next(each for each in nb.cells if f"check.{name}(" in each.source)
        cell.source = f"{answer}\n\n\ncheck.{name}({name})"
    return nb


def behind(*cells):
    """A student's notebook in which an answer stands behind these cells."""
    nb = submission(twice=cells[-1])
    place = next(number for number, cell in enumerate(nb.cells) if "check.twice(" in cell.source)
    nb.cells[place:place] = [code(cell) for cell in cells[:-1]]
    nb.cells.append(code("parts.extend([1, 1])"))
    return nb


def moved():
    """Right answers, in another order, with cells added, split and without tags; the notebook of a busy student."""
    nb = submission(RIGHT)
    for cell in nb.cells:
        cell.metadata = nbformat.NotebookNode()
        cell.id = "x" + cell.id
    cells = {name: next(c for c in nb.cells if f"check.{name}(" in c.source) for name in RIGHT}
    cells["twice"].source = "check.twice(my_own)"
    cells["halve"].source = (
        "factor = None  # no definition of the book's survives this\n\n" + cells["halve"].source
    )
    cells["push"].source = "%matplotlib inline\n" + cells["push"].source.replace("check.push(push)", "")
    nb.cells.reverse()
    nb.cells[0:0] = [
        new_markdown_cell("My notes"),
        code("def factor(n):\n    return 0"),
        code("import math\nTWO = math.sqrt(4)\ndef helper(x):\n    return x * TWO"),
        code("def my_own(x):\n    return helper(x + 0)"),
        code("raise RuntimeError('my own trials are not run')"),
        code("!rm -rf nothing\nwhile True: break"),
    ]
    nb.cells.append(next(c for c in chapter().cells if "import small_exercises" in c.source))
    return nb


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    """All grades, by submission and exercise, and what was tried to reach."""
    folder = tmp_path_factory.mktemp("course")
    secret = folder / "secret"
    secret.write_text("untouched")
    (folder / "part").mkdir()
    later = code("halve = {}")  # no answer, though it has the name of one
    original, right = chapter(), submission(RIGHT)
    for nb in (original, right):
        nb.cells.append(later)
    right.cells.append(code("for push in range(3):\n    print(push)"))  # a trial that uses up another's
    nbformat.write(original, folder / "part" / "topic.ipynb")
    handed_in = {
        "empty": submission(),
        "right": right,
        "wrong": submission({name: answer for name, (answer, _, _) in WRONG.items()}),
        "moved": moved(),
        "no chapter": nbformat.v4.new_notebook(cells=[code("1 + 1")]),
        "another chapter": nbformat.v4.new_notebook(cells=[code("import json as check")]),
    }
    handed_in |= {name: submission(twice=answer) for name, (answer, _, _) in ANSWERS.items()}
    for name, (source, given) in SPELLED.items():
        handed_in[name] = submission(twice=source)
        cell = next(cell for cell in handed_in[name].cells if "check.twice(" in cell.source)
        cell.source = cell.source.replace("check.twice(twice)", f"check.twice({given})")
    handed_in |= {name: behind(*cells) for name, (*cells, _) in BEHIND.items()}
    with socket.create_server(("127.0.0.1", 0)) as server:
        where = {"port": server.getsockname()[1], "secret": str(secret)}
        for name, body in ATTACKS.items():
            body = textwrap.indent(textwrap.dedent(body).strip(), "    ")
            handed_in[f"attack: {name}"] = submission(twice=HOSTILE.format(body=body, **where))
        for number, (name, nb) in enumerate(handed_in.items()):
            place = folder / "in" / name.replace("/", "-") / f"copy ({number}).ipynb"
            place.parent.mkdir(parents=True)
            nbformat.write(nb, place)
        (folder / "in" / "broken.ipynb").write_text("")
        (folder / "in" / "deep.ipynb").write_text(
            nbformat.writes(submission(twice=f"twice = {'(' * 500}1{')' * 500}"))
        )
        (folder / "in" / "long.ipynb").write_text(
            nbformat.writes(submission(twice="twice = 1" + "+ 1" * 3000))
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{Path(__file__).parent}")
            patch.setenv("TOKEN", "secret")
            grades = grade(folder / "in", [folder / "part" / "topic.ipynb"], SECONDS)
    found = {(each.submission.split("/")[0], each.exercise): each for each in grades}
    return found, folder, grades


def test_right_answers(graded):
    assert [graded[0]["right", name].verdict for name in RIGHT] == ["right"] * 6
    assert graded[0]["right", "twice"].message == "Twice is `x + x`."


def test_an_empty_submission_is_unfinished(graded):
    assert [graded[0]["empty", name].verdict for name in RIGHT] == ["unfinished"] * 6


@pytest.mark.parametrize("name", WRONG)
def test_wrong_answers(graded, name):
    _, verdict, message = WRONG[name]
    assert graded[0]["wrong", name].verdict == verdict
    assert message in graded[0]["wrong", name].message


@pytest.mark.parametrize("name", ANSWERS)
def test_answers_of_other_kinds(graded, name):
    _, verdict, message = ANSWERS[name]
    got = graded[0][name, "twice"]
    assert (got.verdict, message in got.message) == (verdict, True), got


@pytest.mark.parametrize("name", SPELLED)
def test_bans_hold_as_in_a_notebook_in_whatever_words(graded, name):
    names = {"__name__": "__main__"}
    exec(SPELLED[name][0], names)
    verdict = small_exercises.twice.judge(eval(SPELLED[name][1], names))
    got = graded[0][name, "twice"]
    assert (got.verdict, got.message) == (verdict.state, verdict.message)
    assert got.verdict == ("right" if name.startswith("nothing") else "wrong")


@pytest.mark.parametrize("name", BEHIND)
def test_answers_behind_other_cells_are_judged_as_a_kernel_has_run_them(graded, name):
    got = graded[0][name, "twice"]
    assert got.verdict == BEHIND[name][-1], got
    assert got.message == ("Twice is `x + x`." if got.verdict == "right" else "Twice 2 is `4`."), got


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_fail(graded, name):
    assert graded[0][f"attack: {name}", "twice"].verdict == ("right" if name == "none" else "wrong")


def test_nothing_outside_was_touched(graded):
    secret = graded[1] / "secret"
    assert secret.read_text() == "untouched" and not secret.stat().st_mode & 0o002
    assert not Path("/tmp/hostile").exists() and not Path("/dev/shm/hostile").exists()
    assert sorted(path.name for path in graded[1].iterdir()) == ["in", "part", "secret"]


def test_cells_are_found_wherever_they_stand(graded):
    assert {name: graded[0]["moved", name].verdict for name in RIGHT} == dict.fromkeys(RIGHT, "right")


@pytest.mark.parametrize(
    ("name", "exercise", "verdict", "says"),
    [
        ("no chapter", "", "ungraded", "imports nothing as check, and the chapters import small_exercises"),
        ("another chapter", "", "ungraded", "imports json as check"),
        ("broken.ipynb", "", "ungraded", "broken.ipynb is not a notebook"),
        ("deep.ipynb", "twice", "wrong", "cannot be read as Python: too many nested parentheses"),
        ("long.ipynb", "twice", "wrong", ""),
    ],
)
def test_what_cannot_be_graded_is_said(graded, name, exercise, verdict, says):
    got = graded[0][name, exercise]
    assert got.verdict == verdict and says in got.message


def test_every_exercise_of_every_submission_has_a_row(graded, tmp_path):
    write_csv(graded[2], tmp_path / "grades.csv")
    rows = list(csv.DictReader((tmp_path / "grades.csv").open(encoding="utf-8")))
    assert len(rows) == len(graded[2])
    right = [row for row in rows if row["submission"].startswith("right/")]
    assert [row["points"] for row in right] == ["1"] * 6 and right[0]["chapter"] == "part/topic"
    lines = table(graded[2]).splitlines()
    assert re.search(
        r"right/copy.*part/topic +6/6 +✓ twice  ✓ halve  ✓ clear  ✓ by_pencil  ✓ push  ✓ shape",
        "\n".join(lines),
    )
    assert lines[0].split() == ["submission", "chapter", "points", "exercises"]


def test_the_command(tmp_path, monkeypatch, capsys):
    """And: an exercise whose own solution is not found right is graded for nobody."""
    nb = chapter(["by_pencil", "shape"])
    for cell in nb.cells:
        cell.source = cell.source.replace("by_pencil_solution = (3, 4)", "by_pencil_solution = (3, 5)")
    (tmp_path / "notebooks" / "part").mkdir(parents=True)
    (tmp_path / "in").mkdir()
    nbformat.write(nb, tmp_path / "notebooks" / "part" / "topic.ipynb")
    nbformat.write(nb, tmp_path / "in" / "=cmd.ipynb")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{Path(__file__).parent}")
    monkeypatch.chdir(tmp_path)
    assert main(["grade", "in", "--csv", "grades.csv", "--seconds", "5"]) == 0
    assert "? by_pencil  ✎ shape" in capsys.readouterr().out
    text = (tmp_path / "grades.csv").read_text()
    assert "ungraded,0,The book's own solution is not found right: Count again." in text
    assert "\n'=cmd.ipynb," in text
    assert main(["grade", "nowhere"]) == 2
    assert "There is no notebook and no folder at nowhere" in capsys.readouterr().err
    assert main(["grade", "in", "--csv", "in"]) == 2, "before anything is graded"
    assert "--csv is in, a folder; give the name of a file" in capsys.readouterr().err


def test_what_an_answer_makes_itself_is_not_asked_of_the_chapter():
    """A chapter that has a loop over ``block`` is not run for an answer that defines ``block``."""
    source = "x = x + one\nx[0] = two\ndef block(n):\n    return n * block(x) * y\nimport z\nz += y"
    assert _free(Task("block", "block(z)", source, helpers="def y(): pass")) == {"x", "one", "two"}


def test_the_example_holds():
    assert doctest.testmod(grade_module).failed == 0


def test_checks_that_cannot_be_imported_are_named(tmp_path):
    nb = chapter(["twice"], module="not_installed")
    nbformat.write(nb, tmp_path / "topic.ipynb")
    with pytest.raises(ValueError, match="The checks of .*/topic cannot be imported: ModuleNotFoundError"):
        grade(tmp_path, [tmp_path / "topic.ipynb"])


def test_a_system_that_cannot_shut_code_in_is_refused(tmp_path, monkeypatch, capsys):
    nbformat.write(chapter(), tmp_path / "topic.ipynb")
    monkeypatch.setattr(sandbox.sys, "platform", "darwin")
    assert main(["grade", str(tmp_path), str(tmp_path)]) == 2
    assert "cannot shut it in: Landlock is missing" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(sandbox.ctypes.util, "find_library", lambda name: "libnothing.so")
    with pytest.raises(OSError, match="libseccomp is missing. Install it"):
        Sandbox(tmp_path, [], 1, 1)


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@x"])
def test_a_spreadsheet_is_given_no_formulas(text):
    assert _harmless(text) == f"'{text}" and _harmless(f"a{text}") == f"a{text}"


def test_a_terminal_is_given_no_commands():
    row = Grade("a\x1b[2Jb\n", "", "", "ungraded", "bell\a")
    assert "\x1b" not in table([row]) and "\a" not in table([row])
