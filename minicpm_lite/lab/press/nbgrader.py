"""A chapter as an assignment of nbgrader, the grading system of Jupyter: a student's copy with its marks.

nbgrader asks for nothing but metadata, so the copy is made without it. A course takes it as it is::

    python -m minicpm_lite.lab.press student --nbgrader course/source notebooks/training
    cd course
    nbgrader generate_assignment training
    nbgrader autograde training

An exercise becomes two cells: the answer, in which the blank is the part that nbgrader clears, and a locked
test worth one point, which shows what the check says and fails unless the answer is right. nbgrader runs
whole notebooks, with the rights of whoever grades; `grade` runs answers alone, and shut in.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from .grade import Cell
from .notebook import Notebook, nbformat, tags
from .student import student_copy

_BLANK = re.compile(r"^(?P<margin> *)(?P<blank>.*\.\.\..*)$", re.MULTILINE)
_TEST = """\
check.{name}({answer})
verdict = check.{name}.judge({answer})
assert verdict.state == "right", verdict.message"""


def nbgrader_copy(notebook: Notebook, path: Path) -> Notebook:
    """A student's copy with nbgrader's marks, to be written to `path`.

    Raises:
        ValueError: a cell holds what cannot be said in plain Markdown.
    """
    copy = student_copy(notebook, path)
    copy.nb.cells = [part for cell in copy.nb.cells for part in _marked(cell)]
    return copy


def _marked(cell: nbformat.NotebookNode) -> Iterator[nbformat.NotebookNode]:
    answers = Cell.read(cell).answers() if "exercise" in tags(cell) else []
    if not answers:
        yield cell
        return
    name, answer, source = answers[0].check, answers[0].answer, answers[0].source
    cleared = r"\g<margin>### BEGIN SOLUTION\n\g<margin>\g<blank>\n\g<margin>### END SOLUTION"
    marks = {"schema_version": 3, "grade": False, "solution": False, "locked": False, "task": False}
    asked = {"nbgrader": marks | {"grade_id": f"{name}-answer", "solution": True}}
    text = _BLANK.sub(cleared, source)
    yield nbformat.from_dict(cell | {"source": text, "metadata": cell.metadata | asked})
    yield nbformat.v4.new_code_cell(
        _TEST.format(name=name, answer=answer),
        id=f"{cell.id[:50]}-test",
        metadata={"nbgrader": marks | {"grade_id": name, "grade": True, "locked": True, "points": 1}},
    )
