"""A student's copy of a notebook: the same chapter without solutions and outputs, complete in one file.

It is plain Markdown, installs the library where that is missing, and finds recorded data in the library, so
that it runs alone in an empty folder.
"""

import os
import shutil
from collections.abc import Callable, Iterable
from filecmp import cmp
from pathlib import Path

from ... import __version__
from ...optional import require
from .notebook import KEY, Notebook, nbformat, tags
from .plain import plain_cells
from .stamps import needed_files

_nbconvert = require(
    "nbconvert.preprocessors", install="minicpm_lite[notebooks]", purpose="make a student's copy"
)

_INSTALL = f"""\
# Where the book's library is missing, as on Colab, this installs it.
from importlib.metadata import distributions

if "{__version__}" not in [found.version for found in distributions(name="minicpm_lite")]:
    %pip install --quiet "minicpm_lite[notebooks]=={__version__}"
"""


def student_copy(notebook: Notebook, path: Path) -> Notebook:
    """The copy, to be written to `path`.

    Raises:
        ValueError: a cell holds what cannot be said in plain Markdown.
    """
    nb = nbformat.from_dict(notebook.nb)
    nb.cells = [cell for cell in nb.cells if "solution" not in tags(cell)]
    nb.cells = plain_cells(Notebook(notebook.path, nb))
    nb, _ = _nbconvert.ClearOutputPreprocessor().preprocess(nb, {})
    nb.cells.insert(0, nbformat.v4.new_code_cell(_INSTALL.strip(), id="install"))
    nb.metadata.pop(KEY, None)
    return Notebook(path, nb)


def write_student_copies(
    paths: Iterable[Path], out: Path, made: Callable[[Notebook, Path], Notebook] = student_copy
) -> list[Path]:
    """Write copies of notebooks, and of the files beside them that they name, to folders in `out`.

    Args:
        made: makes a copy of a notebook, to be written to a path.

    Raises:
        FileExistsError: a copy would overwrite a file, perhaps a student's work, or another copy; nothing was
            written.
        OSError, ValueError: something cannot be read or is no notebook; nothing was written.
    """
    copies: dict[Path, Notebook] = {}
    beside: dict[Path, Path] = {}
    sources: dict[Path, Path] = {}
    for path in paths:
        notebook, folder = Notebook.read(path), out / path.resolve().parent.name
        copies[folder / path.name] = made(notebook, folder / path.name)
        own = {
            Path(os.path.normpath(folder / os.path.relpath(file, path.parent))): file
            for file in needed_files(notebook)
        }
        beside |= own
        for target, file in [(folder / path.name, path), *own.items()]:
            if not cmp(file, other := sources.setdefault(target, file), shallow=False):
                raise FileExistsError(
                    f"{other} and {file} would both be written to {target}; give each a folder of its own."
                )
    taken = [target for target in copies if target.exists()]
    taken += [  # a file that was handed out with another chapter may stand there as it was
        target for target, file in beside.items() if target.exists() and not cmp(target, file, shallow=False)
    ]
    if taken:
        raise FileExistsError(f"{taken[0]} exists already; remove it, or give another folder.")
    for target, copy in copies.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        copy.write()
    for target, file in beside.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, target)
    return list(copies)
