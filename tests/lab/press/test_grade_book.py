"""Grading the book's own chapters: every solution is found right, every ban holds as in a notebook."""

import ast
import importlib
from itertools import cycle
from pathlib import Path

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

CHAPTERS = sorted((ROOT / "notebooks").glob("*/*.ipynb"))


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_every_solution_of_the_book_is_found_right(path, tmp_path, monkeypatch):
    """Or its exercise would be graded for no one."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    student_copy(Notebook.read(path), tmp_path / path.name).write()
    found = {each.exercise: (each.verdict, each.message) for each in grade(tmp_path, [path])}
    assert found and all(verdict == "unfinished" for verdict, _ in found.values()), found


def banned_chapters():
    """The chapters of which an exercise bans anything."""
    for path in CHAPTERS:
        checks = importlib.import_module(f"minicpm_lite.exercises.{path.parent.name}.{path.stem}")
        bans = {name: each.without for name, each in vars(checks).items() if getattr(each, "without", ())}
        if bans:
            yield pytest.param(path, checks, bans, id=path.stem)


@pytest.mark.parametrize(("path", "checks", "bans"), [*banned_chapters()])
def test_every_ban_of_the_book_holds_as_in_a_notebook(path, checks, bans, tmp_path, monkeypatch):
    """The book's solutions, with what is banned beside them and without, each in other words."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    spellings, verdicts, names = cycle(SPELLINGS.values()), {}, {"__name__": "__main__"}
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
            nbformat.write(nb, tmp_path / f"{check} {ban}.ipynb")
    found = {(each.submission, each.exercise): each for each in grade(tmp_path, [path])}
    assert {key: (found[key].verdict, found[key].message) for key in verdicts} == {
        key: (verdict.state, verdict.message) for key, verdict in verdicts.items()
    }
