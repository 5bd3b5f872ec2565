"""Students' copies: nothing of the solutions, complete in one file, and nobody's work is overwritten."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_markdown_cell, new_notebook
from second_edition import chapter
from small_chapter import code, sealed

from minicpm_lite import __version__, lab
from minicpm_lite.lab.press.__main__ import main
from minicpm_lite.lab.press.gates import student_problems
from minicpm_lite.lab.press.notebook import Notebook, find
from minicpm_lite.lab.press.stamps import parse_cell
from minicpm_lite.lab.press.student import student_copy, write_student_copies

ROOT = Path(__file__).parents[3]


@pytest.fixture
def part(tmp_path):
    """A folder of chapters."""
    (tmp_path / "part").mkdir()
    return tmp_path / "part"


@pytest.fixture
def copied(tmp_path):
    """Makes a student's copy of a notebook's content."""

    def copied(nb):
        return student_copy(Notebook(tmp_path / "topic.ipynb", nb), tmp_path / "copy.ipynb")

    return copied


def test_a_copy_has_exercises_and_hints_but_no_solutions(part, tmp_path, capsys):
    path = sealed(chapter(["twice", "by_pencil"]), part / "topic.ipynb")
    assert main(["student", str(tmp_path / "copies"), str(path)]) == 0
    copy = tmp_path / "copies" / "part" / "topic.ipynb"
    assert capsys.readouterr().out.strip() == str(copy)
    assert student_problems(copy) == []
    cells = nbformat.read(copy, as_version=4).cells
    ids = [cell.id for cell in cells]
    assert ids == ["install", *(f"cell-{place}" for place in (0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 14, 15))]
    assert cells[1].source == "# A topic\n\nWe double."
    exercise, blank = cells[7].source, cells[8].source
    assert exercise.startswith("**Exercise 1: Write twice (easy)**\n\nWrite `twice`.\n\n<details")
    assert exercise.count("<details") == exercise.count("</details>") == 2
    assert blank.endswith("check.twice(twice)")
    assert "secret" not in copy.read_text() and "_solution" not in copy.read_text()
    with pytest.raises(FileExistsError, match="exists already"):  # it may hold a student's work
        write_student_copies([path], tmp_path / "copies")


def test_a_solution_without_its_tag_stops_the_copy(copied):
    cells = [new_markdown_cell(":::{solution} ex-a\n:class: dropdown\n\nSecret.\n:::"), code("secret = 1")]
    with pytest.raises(ValueError, match="cell 1 holds ':::{solution} ex-a'"):
        copied(new_notebook(cells=cells))


def test_the_install_cell_leaves_an_installed_library_alone(copied):
    cell, _ = copied(new_notebook(cells=[code("1")])).nb.cells
    assert f'"minicpm_lite[notebooks]=={__version__}"' in cell.source
    asked = []
    shell = type("Shell", (), {"run_line_magic": lambda self, *line: asked.append(line)})()
    for version in (__version__, "0.1"):
        source = cell.source.replace(f'"{__version__}" not in', f'"{version}" not in')
        exec(compile(parse_cell(source), "cell", "exec"), {"get_ipython": lambda: shell})
    installed = {
        found.version
        for found in __import__("importlib.metadata").metadata.distributions(name="minicpm_lite")
    }
    assert asked == [("pip", f'install --quiet "minicpm_lite[notebooks]=={__version__}"')] * (
        1 + (__version__ not in installed)
    )


@pytest.mark.parametrize(
    ("cell", "says"),
    [
        (code("check.twice.accepts(lambda x: 2 * x)"), "accepts or rejects"),
        (code("twice = lambda x: 2 * x", tags=("solution",)), "tagged as a solution"),
        (new_markdown_cell("```{solution} ex-twice\n```"), "{solution} ex-twice', which only"),
        (new_markdown_cell("A {term}`word`."), "'{term}`word`', which only the book's site understands"),
        (code("def twice(x):\n    return 2 * x", tags=("exercise",)), "filled in"),
        (code("lab.Quiz([('Why?', ['a', 'b'], 0, 'So.')])"), "answers of a quiz"),
        (code('open("recorded/topic.json")'), "reads recorded/topic.json beside it"),
        (code("1 + 1", "2"), "output"),
    ],
)
def test_what_is_left_in_a_copy_is_found(copied, cell, says):
    copy = copied(chapter(["twice"]))
    copy.nb.cells.append(cell)
    copy.write()
    [problem] = student_problems(copy.path)
    assert says in problem


def test_a_copy_without_the_install_cell_is_found(copied):
    copy = copied(chapter(["twice"]))
    del copy.nb.cells[0]
    copy.write()
    assert "would not run alone" in student_problems(copy.path)[0]


def test_a_chapter_that_cannot_be_said_plainly_stops_all_copies(part, tmp_path):
    good = sealed(chapter(["twice"]), part / "good.ipynb")
    bad = sealed(new_notebook(cells=[new_markdown_cell("{unheard}`x`")]), part / "bad.ipynb")
    with pytest.raises(ValueError, match="bad.ipynb: cell 1 holds '{unheard}`x`'"):
        write_student_copies([good, bad], tmp_path / "copies")
    assert not (tmp_path / "copies").exists()


def test_what_a_student_wrote_beside_a_copy_is_not_overwritten(part, tmp_path):
    out = tmp_path / "copies"
    (part / "helper.py").write_text("x = 1\n")
    first, second, third = (
        sealed(new_notebook(cells=[code("import helper")]), part / f"{n}.ipynb") for n in "abc"
    )
    write_student_copies([first], out)
    assert write_student_copies([second], out) == [out / "part" / "b.ipynb"]  # the helper is as it was
    (out / "part" / "helper.py").write_text("x = 2  # mine\n")
    with pytest.raises(
        FileExistsError, match=r"helper\.py exists already; remove it, or give another folder"
    ):
        write_student_copies([third], out)
    assert (out / "part" / "helper.py").read_text() == "x = 2  # mine\n"
    assert not (out / "part" / "c.ipynb").exists()


@pytest.mark.parametrize("differ", ["topic.ipynb", "helper.py"])
def test_two_chapters_are_not_written_over_each_other(tmp_path, differ):
    """Their folders have one name, and they, or what stands beside them, are not the same."""
    paths = []
    for course in ("first", "second"):
        folder = tmp_path / course / "part"
        folder.mkdir(parents=True)
        kept = {"topic.ipynb": "x = 1", "helper.py": "x = 1\n", differ: f"{course} = 1"}
        nb = new_notebook(cells=[code("import helper"), code(kept["topic.ipynb"])])
        for number, cell in enumerate(nb.cells):
            cell.id = f"cell-{number}"
        paths.append(sealed(nb, folder / "topic.ipynb"))
        (folder / "helper.py").write_text(kept["helper.py"])
    out = tmp_path / "copies"
    with pytest.raises(
        FileExistsError, match=rf"second.*would both be written to .*part/{differ}; give each"
    ):
        write_student_copies(paths, out)
    assert not out.exists()
    assert write_student_copies([paths[0], paths[0]], out) == [out / "part" / "topic.ipynb"]


def test_recorded_data_come_with_the_library(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "runs" in lab.recorded_file("training/wsd.json").read_text()
    with pytest.raises(
        FileNotFoundError, match=r"'training/no.json'; there are data/filtering.json, .*moe.safe"
    ):
        lab.recorded_file("training/no.json")
    recorded = ROOT.glob("notebooks/*/recorded/*")
    for file in recorded:
        if file.suffix in (".json", ".safetensors"):
            assert lab.recorded_file(f"{file.parent.parent.name}/{file.name}").samefile(file)


@pytest.mark.slow  # reads every notebook and what it imports
def test_what_a_notebook_imports_is_installed_with_it():
    """The first cell asks for minicpm_lite[notebooks]; nothing else is needed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted, extras = list(project["dependencies"]), ["notebooks"]
    for extra in extras:
        for requirement in project["optional-dependencies"][extra]:
            own = re.fullmatch(r"minicpm_lite\[(.+)\]", requirement)
            (extras if own else wanted).extend(own[1].split(",") if own else [requirement])
    names = {re.match(r"[\w.-]+", requirement)[0].lower() for requirement in wanted}
    imported = {
        module.split(".")[0].lower()
        for path in find([ROOT / "notebooks"])
        for _, cell in Notebook.read(path).code
        for node in ast.walk(parse_cell(cell.source))
        for module in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported - sys.stdlib_module_names - {"minicpm_lite"} <= names
