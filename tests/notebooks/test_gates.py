"""Every notebook of the book passes every gate, and so does its student's copy; recorded runs are readable."""

from pathlib import Path

import pytest

from minicpm_lite.lab.press.gates import problems, student_problems
from minicpm_lite.lab.press.notebook import Notebook, find
from minicpm_lite.lab.press.student import student_copy
from minicpm_lite.lab.recorded import load_results

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
CHAPTERS = [pytest.param(path, id=str(path.relative_to(NOTEBOOKS))) for path in find([NOTEBOOKS])]


@pytest.mark.parametrize("path", CHAPTERS)
def test_no_problems(path):
    assert problems(path) == []


@pytest.mark.parametrize("path", CHAPTERS)
def test_no_problems_in_the_students_copy(path, tmp_path):
    copy = student_copy(Notebook.read(path), tmp_path / path.name)
    copy.write()
    assert student_problems(copy.path) == []


@pytest.mark.parametrize("script", sorted(NOTEBOOKS.glob("*/recorded/*.py")), ids=lambda path: path.stem)
def test_recorded_runs_are_readable(script):
    """Valid JSON that gives no name twice; each script has its results."""
    assert len(load_results(script)) > 1
