"""The house: who may import whom, one topic in four places, and a README whose commands exist."""

import ast
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "minicpm_lite"
FLOORS = {
    "config": 1, "runtime": 1, "optional": 1,
    "language": 2,
    "data": 3, "inference": 3,
    "vision": 4, "training": 4,
    "alignment": 5, "beyond": 5, "deployment": 5,
    "cli": 6,
    "lab": 7,
}  # fmt: skip
NOTEBOOKS = sorted((ROOT / "notebooks").rglob("*.ipynb"))


def part_of(path: Path) -> str:
    return path.relative_to(LIBRARY).parts[0].removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    """The parts of the library that a file imports, wherever in the file."""
    package = ["minicpm_lite", *path.relative_to(LIBRARY).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = [*above, *(node.module or "").split(".")]
            names = [[*module, alias.name] for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        else:
            continue
        found |= {
            name[1]
            for name in ([p for p in n if p] for n in names)
            if name[0] == "minicpm_lite" and len(name) > 1
        }
    return found & (FLOORS.keys() | {p.stem for p in LIBRARY.iterdir()})


def wrong_imports(path: Path) -> list[str]:
    mine = part_of(path)
    return [part for part in imported_parts(path) if part != mine and FLOORS[part] >= FLOORS[mine]]


@pytest.mark.parametrize("path", sorted(LIBRARY.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_floors(path):
    if path != LIBRARY / "__init__.py":
        assert part_of(path) in FLOORS, "give the new part a floor"
        assert wrong_imports(path) == []


def test_an_import_of_a_floor_above_is_seen(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "LIBRARY", tmp_path)
    (tmp_path / "language").mkdir()
    path = tmp_path / "language" / "decoder.py"
    for text in (
        "from ..training.wsd import WSD",
        "def f():\n    import minicpm_lite.lab",
        "from .. import data",
    ):
        path.write_text(text)
        assert wrong_imports(path), text
    path.write_text("from ..config import ModelConfig\nfrom .moe import x")
    assert wrong_imports(path) == []


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
