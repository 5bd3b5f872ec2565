"""A student's copy of a notebook: the same chapter without solutions, wrong answers and outputs."""

import os
import re
import shutil
from collections.abc import Iterable
from filecmp import cmp
from pathlib import Path

from ...optional import require
from .notebook import KEY, Notebook
from .stamps import used_files

_nbconvert = require(
    "nbconvert.preprocessors", install="minicpm_lite[notebooks]", purpose="make a student's copy"
)

SOLUTION_MARKER = re.compile(r"\{solution(-start|-end)?\}")
_EXERCISE_START = re.compile(r"```+\{exercise-start\}([^\n]*)\n(?::[^\n]*\n)*```+\n*")
_EXERCISE_END = re.compile(r"\n*```+\{exercise-end\}\s*```+")


def student_copy(notebook: Notebook, path: Path) -> Notebook:
    """The copy, to be written to `path`.

    The frames of the exercises become headings, because Jupyter does not know the book's directives.
    """
    nb, _ = _nbconvert.TagRemovePreprocessor(remove_cell_tags={"solution", "wrong"}).preprocess(
        notebook.nb, {}
    )
    nb, _ = _nbconvert.ClearOutputPreprocessor().preprocess(nb, {})
    nb.metadata.pop(KEY, None)
    nb.cells = [c for c in nb.cells if c.cell_type != "markdown" or not SOLUTION_MARKER.search(c.source)]
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            headed = _EXERCISE_START.sub(lambda start: f"**Exercise: {start[1].strip()}**\n\n", cell.source)
            cell.source = _EXERCISE_END.sub("", headed)
    return Notebook(path, nb)


def write_student_copies(paths: Iterable[Path], out: Path) -> list[Path]:
    """Write copies of notebooks, and of the files beside them that they use, to folders in `out`.

    Raises:
        FileExistsError: a copy would overwrite a file, perhaps a student's work; nothing was written.
        OSError, ValueError: something cannot be read or is no notebook; nothing was written.
    """
    copies: dict[Path, Notebook] = {}
    beside: dict[Path, Path] = {}
    for path in paths:
        notebook, folder = Notebook.read(path), out / path.resolve().parent.name
        copies[folder / path.name] = notebook
        for file in used_files(notebook):
            beside[Path(os.path.normpath(folder / os.path.relpath(file, path.parent)))] = file
    taken = [target for target in copies if target.exists()]
    taken += [  # a file that was handed out with another chapter may stand there as it was
        target for target, file in beside.items() if target.exists() and not cmp(target, file, shallow=False)
    ]
    if taken:
        raise FileExistsError(f"{taken[0]} exists already; remove it, or give another folder.")
    for target, notebook in copies.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        student_copy(notebook, target).write()
    for target, file in beside.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, target)
    return list(copies)
