"""The house: who may import whom, one topic in four places, and a README whose commands exist."""

import ast
import re
import sys
import tomllib
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "minicpm_lite"
FLOORS = {
    "config": 1, "files": 1, "optional": 1, "runtime": 1, "kernels": 1,
    "language": 2, "parameters": 2,
    "data": 3, "pretrained": 3,
    "training": 4, "vision": 4,
    "inference": 5,
    "alignment": 6, "beyond": 6,
    "deployment": 7,
    "__init__": 8,  # the package itself: it offers what stands further up
    "cli": 9,
    "lab": 10,
    "exercises": 11,
}  # fmt: skip
BY_NAME = {"import_module", "__import__", "require"}
OWN = re.compile(r"minicpm_lite(\.\w+)*|(\.\w*)+")  # a name of the library, whole or relative
LATE = {"__init__", "cli"}  # what they import inside functions would make every command slow
NOTEBOOKS = sorted((ROOT / "notebooks").rglob("*.ipynb"))
owners = cache(packages_distributions)


def part_of(path: Path) -> str:
    return path.relative_to(LIBRARY).parts[0].removesuffix(".py")


def module_name(path: Path) -> str:
    parts = path.relative_to(LIBRARY.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """What a file imports of the library, wherever in the file: modules, and names with their module."""
    name = module_name(path)
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = [*above, *(node.module.split(".") if node.module else [])]
            found |= {".".join([*module, alias.name]) for alias in node.names}
        elif isinstance(node, ast.Import):  # it gives the package's name, and with it all that it offers
            found |= {each for alias in node.names for each in (alias.name, alias.name.split(".")[0])}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in BY_NAME:
            arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
            names = [argument.value for argument in arguments if isinstance(argument, ast.Constant)]
            found |= {each for name in names if OWN.fullmatch(str(name)) for each in (name, "minicpm_lite")}
    return {each for each in found if each.split(".")[0] == "minicpm_lite"}


def imported_parts(path: Path) -> set[str]:
    """The parts that a file imports; what the package itself offers counts as a part, "__init__"."""
    below = {each.partition(".")[2].split(".")[0] for each in imports(path)}
    return {each if each in FLOORS else "__init__" for each in below}


def wrong_imports(path: Path) -> list[str]:
    mine = part_of(path)
    return [part for part in imported_parts(path) if part != mine and FLOORS[part] >= FLOORS[mine]]


def circle(paths: list[Path]) -> list[str]:
    """Modules that import each other in a circle; empty if there is none."""
    modules = {module_name(path): path for path in paths}

    def known(name: str) -> str:
        """The module of a name: a longest beginning that is one, or nothing."""
        while name and name not in modules:
            name = name.rpartition(".")[0]
        return name

    graph = {name: {known(each) for each in imports(path)} - {name, ""} for name, path in modules.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def late_imports(path: Path) -> list[str]:
    bodies = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    return [
        f"{body.name} imports in line {node.lineno}"
        for body in ast.walk(ast.parse(path.read_text()))
        if isinstance(body, bodies)
        for node in ast.walk(body)
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]


@pytest.mark.parametrize("path", sorted(LIBRARY.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_floors(path):
    assert part_of(path) in FLOORS, "give the new part a floor"
    assert wrong_imports(path) == []


@pytest.fixture
def language(tmp_path, monkeypatch) -> Path:
    """The folder of a part in another library, for what the gates must see."""
    monkeypatch.setitem(globals(), "LIBRARY", tmp_path / "minicpm_lite")
    folder = tmp_path / "minicpm_lite" / "language"
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize(
    "text",
    [
        "from ..training.wsd import WSD",
        "from .. import data",
        "from .. import config, data",
        "from minicpm_lite import lab",
        "from minicpm_lite.lab import quiz",
        "def f():\n    import minicpm_lite.lab",
        "async def f():\n    from .. import lab",
        "class C:\n    from ..data import windows",
        "import minicpm_lite",
        "import minicpm_lite as m",
        "import minicpm_lite.config",  # gives the name of the whole package
        "from minicpm_lite import load_pretrained",
        "from .. import load_pretrained",
        "from .. import ModelConfig",
        "from .. import *",
        "from importlib import import_module\nimport_module('minicpm_lite.lab')",
        "import importlib\nimportlib.import_module('minicpm_lite')",
        "import importlib\nimportlib.import_module('..lab', package=__package__)",
        "import importlib\nimportlib.import_module(name='minicpm_lite.config')",
        "__import__('minicpm_lite.lab')",
        "from ..optional import require\nrequire('minicpm_lite.lab', install='x', purpose='x')",
    ],
)
def test_an_import_of_a_floor_above_is_seen(language, text):
    (language / "decoder.py").write_text(text)
    assert wrong_imports(language / "decoder.py")


@pytest.mark.parametrize(
    "text",
    [
        "from ..config import ModelConfig\nfrom .moe import x",
        "from .. import config, kernels",
        "from minicpm_lite import optional",
        "from . import moe",
        "import importlib\nimportlib.import_module('torch')",
        "from ..optional import require\nrequire('gguf', install='minicpm_lite[pretrained]', purpose='x')",
    ],
)
def test_what_a_floor_may_import_passes(language, text):
    (language / "decoder.py").write_text(text)
    assert wrong_imports(language / "decoder.py") == []


def test_no_module_imports_itself_in_a_circle():
    assert circle(sorted(LIBRARY.rglob("*.py"))) == []


@pytest.mark.parametrize("path", sorted(LIBRARY.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_stand_at_the_top(path):
    """Optional packages are asked for by a call, `optional.require`, and may be asked for anywhere."""
    assert part_of(path) in LATE or late_imports(path) == []


def test_circles_are_seen(language):
    one, other, third = (language / f"{name}.py" for name in ("one", "other", "third"))
    one.write_text("from .other import x")
    third.write_text("import minicpm_lite.language.one")
    for text in ("from .third import y", "from . import third", "def f():\n    from .one import y"):
        other.write_text(text)
        assert circle([one, other, third]), text
    other.write_text("from .fourth import y")
    assert circle([one, other, third]) == []


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("def f():\n    from .one import y", ["f imports in line 2"]),
        ("async def f():\n    import json", ["f imports in line 2"]),
        ("class C:\n    import json", ["C imports in line 2"]),
        ("import json\ntry:\n    import torch\nexcept ImportError:\n    pass", []),
    ],
)
def test_late_imports_are_seen(language, text, seen):
    (language / "one.py").write_text(text)
    assert late_imports(language / "one.py") == seen


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WHO_IMPORTS = {"lab": {"notebooks", "book"}}  # a part's modules may import these extras at their top


def distributions(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w.-]+", each)[0].lower().replace("_", "-") for each in requirements}


def imported_packages(path: Path) -> dict[str, str | None]:
    """The packages from elsewhere that a file imports, each with the extra that it tells people to install."""
    tree, found = ast.parse(path.read_text()), {}
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                found |= dict.fromkeys(alias.name for alias in node.names)
            case ast.ImportFrom(level=0):
                found[node.module] = None
            case ast.Call(func=ast.Name(id="require"), args=[ast.Constant(name), *_]):
                install = next((k.value for k in node.keywords if k.arg == "install"), None)
                found[name] = install.value if isinstance(install, ast.Constant) else "another"
    return {name.split(".")[0]: extra for name, extra in found.items()
            if name.split(".")[0] not in sys.stdlib_module_names | {"minicpm_lite"}}  # fmt: skip


@pytest.mark.parametrize("path", sorted(LIBRARY.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_what_is_imported_is_installed_with_the_library(path):
    """By `pip install` of the library, or of the extra that the sentence about a missing package names."""
    always = distributions(PROJECT["dependencies"])
    for extra in WHO_IMPORTS.get(part_of(path), ()):
        always |= distributions(PROJECT["optional-dependencies"][extra])
    for name, install in imported_packages(path).items():
        owner = owners().get(name, [name])[0].lower().replace("_", "-")  # one that is not here has its name
        if install is None:
            assert owner in always, f"{name} is not in the dependencies"
        elif extra := re.fullmatch(r"minicpm_lite\[(\w+)\]", install):
            named = PROJECT["optional-dependencies"][extra[1]]
            assert owner in distributions(named), f"pip install {install} does not bring {name}"


def test_every_part_has_its_tests():
    for part in (p for p in LIBRARY.iterdir() if (p / "__init__.py").exists()):
        for module in part.glob("*.py"):
            if part.name != "lab" and not module.name.startswith("__"):
                test = ROOT / "tests" / part.name / f"test_{module.name}"
                assert test.exists(), f"{module.relative_to(ROOT)} has no {test.relative_to(ROOT)}"


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
