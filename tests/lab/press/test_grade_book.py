"""Grading the book's own chapters: every solution is found right, every ban holds as in a notebook."""

import ast
import importlib
from itertools import cycle
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
from nbformat.v4 import new_notebook
from small_chapter import code
from spellings import SPELLINGS

from minicpm_lite.lab.press.grade import grade
from minicpm_lite.lab.press.notebook import Notebook, tags
from minicpm_lite.lab.press.stamps import parse_cell
from minicpm_lite.lab.press.student import student_copy

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.slow  # each chapter is graded in processes of its own

_SECONDS = 120  # by the clock, which goes on while a busy machine gives a judge no time
CHAPTERS = sorted((ROOT / "notebooks").glob("*/*.ipynb"))


def checks_of(path: Path) -> ModuleType:
    return importlib.import_module(f"minicpm_lite.exercises.{path.parent.name}.{path.stem}")


def bans_of(path: Path) -> dict[str, tuple[str, ...]]:
    """What the exercises of a chapter ban."""
    return {
        name: each.without for name, each in vars(checks_of(path)).items() if getattr(each, "without", ())
    }


@pytest.fixture(scope="module")
def graded(request, tmp_path_factory):
    """The grades of a chapter, by submission and exercise, and the verdicts of a notebook on all but the copy.

    All are graded together, since a chapter is read once for all of its submissions.
    """
    path, folder = request.param, tmp_path_factory.mktemp("in")
    student_copy(Notebook.read(path), folder / "copy.ipynb").write()
    verdicts = hand_in_what_is_banned(path, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        return {
            (each.submission, each.exercise): each for each in grade(folder, [path], seconds=_SECONDS)
        }, verdicts


def hand_in_what_is_banned(path, folder):
    """The book's solutions, with what is banned beside them and without, each in other words."""
    spellings, verdicts, names = cycle(SPELLINGS.values()), {}, {"__name__": "__main__"}
    checks, bans = checks_of(path), bans_of(path)
    if not bans:
        return {}
    cells = [(parse_cell(cell.source).body, cell) for _, cell in Notebook.read(path).code]
    lessons = [body for body, cell in cells if not {"exercise", "solution"} & tags(cell)]
    definitions = ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef
    exec(
        "\n".join(ast.unparse(each) for body in lessons for each in body if isinstance(each, definitions)),
        names,
    )
    for check, banned in bans.items():
        call = f"check.{check}.accepts("
        solution, _, rest = next(cell.source for _, cell in cells if call in cell.source).partition(call)
        for ban in (None, *banned):
            beside = "for _ in (): pass" if ban == "a loop" else f"lambda: {ban}"
            before, given = next(spellings)
            answer = (
                f"def f(*args, **kwargs):\n    {beside}\n    return {rest.partition(')')[0]}(*args, **kwargs)"
            )
            source, own = f"{solution}\n{answer}\n{before}", dict(names)
            exec(source, own)
            verdict = verdicts[f"{check} {ban}.ipynb", check] = getattr(checks, check).judge(eval(given, own))
            assert verdict.state == ("wrong" if ban else "right")
            imported = next(cell for _, cell in cells if " as check" in cell.source)
            nb = new_notebook(cells=[imported, code(f"{source}\n\n\ncheck.{check}({given})")])
            nbformat.write(nb, folder / f"{check} {ban}.ipynb")
    return verdicts


def of_chapters(paths):
    return pytest.mark.parametrize("graded", paths, indirect=True, ids=lambda path: path.stem)


@of_chapters(CHAPTERS)
def test_every_solution_of_the_book_is_found_right(graded):
    """Or its exercise would be graded for no one."""
    grades, _ = graded
    found = [
        (each.exercise, each.verdict, each.message)
        for (name, _), each in grades.items()
        if name == "copy.ipynb"
    ]
    assert found and all(verdict == "unfinished" for _, verdict, _ in found), found


@of_chapters([path for path in CHAPTERS if bans_of(path)])
def test_every_ban_of_the_book_holds_as_in_a_notebook(graded):
    grades, verdicts = graded
    assert {key: (grades[key].verdict, grades[key].message) for key in verdicts} == {
        key: (verdict.state, verdict.message) for key, verdict in verdicts.items()
    }
