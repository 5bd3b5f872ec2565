"""Each chapter's solutions are accepted, and its checks refuse what they must, without running the chapter."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from minicpm_lite.lab.press.notebook import Notebook, tags

ROOT = Path(__file__).parents[2]
EXERCISES = ROOT / "minicpm_lite" / "exercises"
CHAPTERS = sorted(path.relative_to(EXERCISES).with_suffix("") for path in EXERCISES.glob("*/[!_]*.py"))
DEFINITIONS = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)


def statements(chapter: Path) -> Iterator[ast.stmt]:
    """What a chapter imports and defines, and its solutions, each up to the call of `accepts`."""
    for _, cell in Notebook.read(ROOT / "notebooks" / chapter.with_suffix(".ipynb")).code:
        body = ast.parse(cell.source).body
        if "solution" in tags(cell):
            accepted = [
                place for place, statement in enumerate(body) if ".accepts(" in ast.unparse(statement)
            ]
            yield from body[: accepted[-1] + 1]
        elif "exercise" not in tags(cell):
            yield from (statement for statement in body if isinstance(statement, DEFINITIONS))


@pytest.mark.parametrize("chapter", CHAPTERS, ids=str)
def test_solutions(chapter: Path):
    program = ast.Module(list(statements(chapter)), [])
    exec(compile(program, str(chapter), "exec"), {"__name__": "__main__"})
