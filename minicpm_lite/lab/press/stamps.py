"""Stamps: do a notebook's stored outputs still belong to its code, the library and its recorded runs?

A stamp holds three hashes, so that a stale one says why:

- ``cells``: source and tags of the code cells. Not the prose, not the outputs.
- ``library``: every module of minicpm_lite that the cells reach through imports, as syntax trees without
  docstrings and comments; the configs they load; and the folder ``assets`` beside a module that names it.
- ``recorded``: the recorded runs beside the notebook (``recorded/TOPIC*``), and others it names in its code.

Imports are followed by static analysis, and by name through a package's ``__init__``: ``from minicpm_lite
import load_config`` reaches ``minicpm_lite.config``, not everything the package offers. Modules imported by
computed names are not seen. A config counts if its name stands in a ``load_config("...")``; where the name is
computed, all count.
"""

import ast
import hashlib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from IPython.core.inputtransformer2 import TransformerManager

from .notebook import Notebook, tags

LIBRARY = Path(__file__).parents[2]
_READS_ONE_CONFIG = {"load_config", "load_recipe"}
_READS_CONFIGS = {*_READS_ONE_CONFIG, "list_configs"}


def stamp(notebook: Notebook, library: Path = LIBRARY) -> dict[str, str]:
    """The stamp that the notebook would get if it ran now."""
    cells = [(cell.source.rstrip(), sorted(tags(cell))) for _, cell in notebook.code]
    trees = _trees(notebook)
    modules = _reached(trees, library)
    code = {name: _meaning(path.read_bytes()) for name, path in sorted(modules.items())}
    readers = [
        _parse(path.read_bytes()) for name, path in modules.items() if name != f"{library.name}.config"
    ]
    files = {path.name: _hash(path.read_bytes()) for path in _configs([*trees, *readers], library)}
    files |= {str(path.relative_to(library)): _hash(path.read_bytes()) for path in _assets(modules.values())}
    recorded = {path.name: _hash(path.read_bytes()) for path in recorded_files(notebook)}
    return {
        "cells": _hash(repr(cells).encode()),
        "library": _hash(repr((code, files)).encode()),
        "recorded": _hash(repr(recorded).encode()),
    }


def why_stale(notebook: Notebook, library: Path = LIBRARY) -> str | None:
    """Why the outputs are older than what made them, or None if they are not."""
    stored = notebook.record.get("stamp")
    if not stored:
        return "it was never run to the end"
    now = stamp(notebook, library)
    reasons = {
        "cells": "its code cells changed",
        "library": "library modules or configs it uses changed",
        "recorded": "its recorded runs changed",
    }
    changed = [reason for part, reason in reasons.items() if stored.get(part) != now[part]]
    return ", and ".join(changed) or None


def recorded_files(notebook: Notebook) -> list[Path]:
    """The recorded runs a notebook reads: those of its own name, and those its code names ("…recorded/…")."""
    folder, topic = notebook.path.parent, notebook.path.stem
    named = [
        folder / node.value
        for tree in _trees(notebook)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "recorded/" in node.value
    ]
    return sorted({file for file in [*folder.glob(f"recorded/{topic}*"), *named] if file.is_file()})


def parse_cell(source: str) -> ast.Module | None:
    """The syntax tree of a cell, magics included; None if it is not Python."""
    try:
        return ast.parse(TransformerManager().transform_cell(source))
    except (SyntaxError, ValueError):  # the second for null bytes
        return None


def _trees(notebook: Notebook) -> list[ast.Module]:
    return [tree for _, cell in notebook.code if (tree := parse_cell(cell.source))]


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


@cache  # many notebooks reach the same modules
def _parse(source: bytes) -> ast.Module:
    return ast.parse(source)


@cache
def _meaning(source: bytes) -> str:
    """A hash of what a module does."""
    return _hash(repr(_skeleton(_parse(source))).encode())


def _skeleton(node: object) -> object:
    """A syntax tree as nested tuples, without docstrings, positions and empty fields.

    `ast.dump` would do, but its text differs between Python versions, and a stamp must not.
    """
    if isinstance(node, list):
        return tuple(map(_skeleton, node))
    if not isinstance(node, ast.AST):
        return node
    fields = dict(ast.iter_fields(node))
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
        fields["body"] = fields["body"][1:]
    kept = {name: value for name, value in fields.items() if value is not None and value != []}
    return (type(node).__name__, *((name, _skeleton(value)) for name, value in kept.items()))


def _reached(trees: list[ast.Module], library: Path) -> dict[str, Path]:
    """Every module of the library that some code reaches through imports, with its file."""
    reached: dict[str, Path] = {}
    waiting = [target for tree in trees for target in _imports(tree, "", library)]
    followed = set()
    while waiting:
        module, name = waiting.pop()
        if (module, name) in followed or not (file := _file(module, library)):
            continue
        followed.add((module, name))
        for parent in _parents(module):  # importing a module runs the packages above it
            reached[parent] = _file(parent, library)
        reached[module] = file
        if name and _file(f"{module}.{name}", library):
            waiting.append((f"{module}.{name}", None))
            continue
        offered = _imports(_parse(file.read_bytes()), _package(module, file), library, bound=name)
        if name and not offered:  # the module defines the name itself
            offered = [(module, None)]
        waiting += offered
    return reached


def _imports(
    tree: ast.Module, package: str, library: Path, bound: str | None = None
) -> list[tuple[str, str | None]]:
    """What some code imports from the library, as (module, name in it or None for all of it).

    Args:
        package: what relative imports are relative to.
        bound: look only for the import that binds this name.
    """
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names if bound in (None, alias.asname, alias.name)]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                if bound in (None, alias.asname or alias.name) or alias.name == "*":
                    found.append((module, bound if alias.name == "*" else alias.name))
    return [(module, name) for module, name in found if module.split(".")[0] == library.name]


def _file(module: str, library: Path) -> Path | None:
    base = library.joinpath(*module.split(".")[1:])
    candidates = (base / "__init__.py", base.with_name(base.name + ".py"))
    return next((file for file in candidates if file.is_file()), None)


def _package(module: str, file: Path) -> str:
    return module if file.name == "__init__.py" else module.rpartition(".")[0]


def _parents(module: str) -> Iterator[str]:
    while module := module.rpartition(".")[0]:
        yield module


def _configs(trees: list[ast.Module], library: Path) -> list[Path]:
    """The YAML files that some code loads; all of them if it does not say which."""
    every = sorted((library / "configs").glob("*.yaml"))
    nodes = [node for tree in trees for node in ast.walk(tree)]  # a call comes before the name it calls
    imports = [alias for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names]
    renamed = {alias.asname: alias.name for alias in imports if alias.asname}
    named, known_calls = set(), set()
    for node in nodes:
        if isinstance(node, ast.Call) and _name(node.func, renamed) in _READS_ONE_CONFIG:
            if len(node.args) == 1 and isinstance(node.args[0], ast.Constant):
                named.add(node.args[0].value)
                known_calls.add(node.func)
        elif _name(node, renamed) in _READS_CONFIGS and node not in known_calls:
            return every
    return [path for path in every if path.stem in named]


def _assets(modules: Iterable[Path]) -> list[Path]:
    """The files in the folders ``assets`` that stand beside the modules which name such a folder."""
    naming = {
        module.parent / "assets"
        for module in modules
        for node in ast.walk(_parse(module.read_bytes()))
        if isinstance(node, ast.Constant) and node.value == "assets"
    }
    return sorted(path for folder in naming for path in folder.rglob("*") if path.is_file())


def _name(node: ast.AST, renamed: dict[str, str]) -> str | None:
    """The name that a node reads, as it is called where it comes from."""
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else None
    return renamed.get(name, name)
