"""Assignments of nbgrader: its marks as its own format wants them, and tests that pass for right answers alone.

Tried with nbgrader 0.9.6 as well (generate_assignment, autograde): the answers below get the same points.
"""

import re

import nbformat
import pytest
from second_edition import SOLUTIONS, chapter
from small_chapter import sealed

from minicpm_lite.lab.press.__main__ import main
from minicpm_lite.lab.press.gates import student_problems

FIELDS = {"schema_version", "grade", "solution", "locked", "task", "grade_id"}


@pytest.fixture
def assignment(tmp_path):
    (tmp_path / "part").mkdir()
    path = sealed(chapter(), tmp_path / "part" / "topic.ipynb")
    assert main(["student", "--nbgrader", str(tmp_path / "source"), str(path)]) == 0
    return tmp_path / "source" / "part" / "topic.ipynb"


def test_it_is_a_students_copy(assignment):
    assert student_problems(assignment) == []


def test_every_exercise_is_an_answer_and_a_locked_test(assignment):
    cells = nbformat.read(assignment, as_version=4).cells
    marked = [cell for cell in cells if "nbgrader" in cell.metadata]
    assert len(marked) == 2 * len(SOLUTIONS)
    ids = [cell.metadata.nbgrader.grade_id for cell in marked]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"\S+", each) for each in ids)
    for answer, test in zip(marked[::2], marked[1::2], strict=True):
        assert answer.metadata.nbgrader.keys() == FIELDS
        assert test.metadata.nbgrader.keys() == FIELDS | {"points"}
        assert answer.metadata.nbgrader.solution and not answer.metadata.nbgrader.locked
        assert test.metadata.nbgrader.grade and test.metadata.nbgrader.locked
        assert answer.source.count("### BEGIN SOLUTION\n") == answer.source.count("### END SOLUTION") == 1
        assert "check" not in answer.source


@pytest.mark.parametrize(
    "answer",
    ["def twice(x):\n    return x + x if hasattr(x, 'real') else 1 / x", "def twice(x):\n    return x"],
)
def test_a_test_passes_for_a_right_answer_alone(assignment, answer):
    cells = nbformat.read(assignment, as_version=4).cells
    test = next(cell for cell in cells if cell.metadata.get("nbgrader", {}).get("grade_id") == "twice")
    names = {}
    exec(f"import small_exercises as check\n{answer}", names)
    if "+" in answer:
        exec(test.source, names)
    else:
        with pytest.raises(AssertionError, match="Twice 2 is"):
            exec(test.source, names)
