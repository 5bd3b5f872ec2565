"""The house: who may import whom, one topic in four places, and a README whose commands exist."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "minicpm_lite"
FLOORS = {
    "config": 1, "files": 1, "optional": 1, "runtime": 1,
    "language": 2,
    "data": 3, "pretrained": 3,
    "training": 4, "vision": 4,
    "inference": 5,
    "alignment": 6, "beyond": 6,
    "deployment": 7,
    "cli": 8,
    "lab": 9,
}  # fmt: skip
LATE = {"__init__.py", "cli.py"}  # what they import inside functions would make every command slow
NOTEBOOKS = sorted((ROOT / "notebooks").rglob("*.ipynb"))


def part_of(path: Path) -> str:
    return path.relative_to(LIBRARY).parts[0].removesuffix(".py")


def module_name(path: Path) -> str:
    parts = path.relative_to(LIBRARY.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, modules: set[str] = frozenset()) -> set[str]:
    """What a file imports of the library, wherever in the file: the modules, as far as they are known."""
    name = module_name(path)
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = [*above, *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                inner = ".".join([*module, alias.name])
                found.add(inner if inner in modules or not node.module else ".".join(module))
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {each for each in found if each.split(".")[0] == "minicpm_lite"}


def imported_parts(path: Path) -> set[str]:
    parts = {each.split(".")[1] for each in imports(path) if "." in each}
    return parts & (FLOORS.keys() | {p.stem for p in LIBRARY.iterdir()})


def wrong_imports(path: Path) -> list[str]:
    mine = part_of(path)
    return [part for part in imported_parts(path) if part != mine and FLOORS[part] >= FLOORS[mine]]


def circle(paths: list[Path]) -> list[str]:
    """Modules that import each other in a circle; empty if there is none."""
    modules = {module_name(path): path for path in paths}
    graph = {name: imports(path, set(modules)) & set(modules) - {name} for name, path in modules.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def imports_in_functions(path: Path) -> list[str]:
    functions = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)]
    return [
        f"{function.name} imports in line {node.lineno}"
        for function in functions
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]


@pytest.mark.parametrize("path", sorted(LIBRARY.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_floors(path):
    if path != LIBRARY / "__init__.py":
        assert part_of(path) in FLOORS, "give the new part a floor"
        assert wrong_imports(path) == []


def test_an_import_of_a_floor_above_is_seen(tmp_path, monkeypatch):
    library = tmp_path / "minicpm_lite"
    monkeypatch.setitem(globals(), "LIBRARY", library)
    (library / "language").mkdir(parents=True)
    path = library / "language" / "decoder.py"
    for text in (
        "from ..training.wsd import WSD",
        "def f():\n    import minicpm_lite.lab",
        "from .. import data",
    ):
        path.write_text(text)
        assert wrong_imports(path), text
    path.write_text("from ..config import ModelConfig\nfrom .moe import x")
    assert wrong_imports(path) == []


def test_no_module_imports_itself_in_a_circle():
    assert circle(sorted(LIBRARY.rglob("*.py"))) == []


@pytest.mark.parametrize("path", sorted(LIBRARY.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_stand_at_the_top(path):
    """Optional packages are asked for by a call, `optional.require`, and may be asked for anywhere."""
    assert str(path.relative_to(LIBRARY)) in LATE or imports_in_functions(path) == []


def test_circles_and_late_imports_are_seen(tmp_path, monkeypatch):
    library = tmp_path / "minicpm_lite"
    monkeypatch.setitem(globals(), "LIBRARY", library)
    (library / "language").mkdir(parents=True)
    one, other, third = (library / "language" / f"{name}.py" for name in ("one", "other", "third"))
    one.write_text("from .other import x")
    third.write_text("import minicpm_lite.language.one")
    for text in ("from .third import y", "from . import third", "def f():\n    from .one import y"):
        other.write_text(text)
        assert circle([one, other, third]), text
    assert imports_in_functions(other) == ["f imports in line 2"]
    other.write_text("from .fourth import y")
    assert circle([one, other, third]) == []


def test_every_part_has_its_tests():
    for part in (p for p in LIBRARY.iterdir() if (p / "__init__.py").exists()):
        for module in part.glob("*.py"):
            if part.name != "lab" and module.name != "__init__.py":
                test = ROOT / "tests" / part.name / f"test_{module.name}"
                covered = test.exists() or module.stem == "checkpoint"  # held by the trainer's tests
                assert covered, f"{module.relative_to(ROOT)} has no {test.relative_to(ROOT)}"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_one_topic_in_four_places(notebook):
    topic = notebook.relative_to(ROOT / "notebooks").with_suffix("")
    assert (LIBRARY / topic).with_suffix(".py").exists()
    assert (ROOT / "tests" / topic.parent / f"test_{topic.name}.py").exists()
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    chapters = [chapter["file"] for part in toc["parts"] for chapter in part["chapters"]]
    listed = str(notebook.relative_to(ROOT).with_suffix(""))
    assert listed in str(chapters) or listed in str(toc)


def test_the_readme_names_commands_that_exist():
    commands = set(re.findall(r"(?:^|`)make (\w+)", (ROOT / "README.md").read_text(), flags=re.MULTILINE))
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert {"book", "test", "lab", "run", "check"} <= commands <= targets


def test_the_notebooks_are_written_for_this_library():
    import minicpm_lite

    for notebook in NOTEBOOKS:
        assert f'library=\\"{".".join(minicpm_lite.__version__.split(".")[:2])}\\"' in notebook.read_text()
