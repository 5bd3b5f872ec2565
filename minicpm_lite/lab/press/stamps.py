"""Stamps: do a notebook's stored outputs still belong to its code, the library and the files it uses?

A stamp holds three hashes, so that a stale one says why:

- ``cells``: source and tags of the code cells, and the alt text that their plots carry. Not the prose, not
  the outputs.
- ``library``: every module of minicpm_lite that the code reaches through imports, as syntax trees without
  docstrings and comments; the configs it loads; and the folder ``assets`` beside a module that names it.
- ``recorded``: the files beside the notebook that its code uses. These are its recorded runs
  (``recorded/TOPIC*``), those it asks the library for (``lab.recorded_file("PART/FILE")``), the modules it
  imports from its folder, and the files it names.

The code is that of the cells and of the modules beside the notebook. It is read, not run. Imports are
followed by name through a package's ``__init__``: ``from minicpm_lite import load_config`` reaches
``minicpm_lite.config``, not everything the package offers. A config counts if its name stands in a
``load_config("...")``; where the name is computed, all count. A file counts if a string is its path, or fits
it where it is computed in part (``f"recorded/{name}.json"``); in a folder that is named as one
(``Path("pictures")`` or ``"pictures/"``) all files count. Names that are computed as a whole are not seen.

Code of the library that a chapter shows (`lab.source`) is compared word for word, docstrings and comments
too.
"""

import ast
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from functools import cache
from glob import glob
from pathlib import Path

from IPython.core.inputtransformer2 import TransformerManager

from .notebook import Notebook, alt_text, tags

LIBRARY = Path(__file__).parents[2]
_READS_ONE_CONFIG = {"load_config", "load_recipe", "load_rope_scaling", "load_sparse_config"}
_READS_CONFIGS = {*_READS_ONE_CONFIG, "list_configs"}
_SHOWN = re.compile(r"From `([\w.]+)`:\n\n```python\n(.*)\n```", re.DOTALL)  # an output of `lab.source`


def stamp(notebook: Notebook, library: Path = LIBRARY) -> dict[str, str]:
    """The stamp that the notebook would get if it ran now."""
    cells = [(cell.source.rstrip(), sorted(tags(cell)), alt_text(cell)) for _, cell in notebook.code]
    trees, beside = _code(notebook)
    modules = _reached(trees, library.parent, library.name)
    code = {name: _meaning(path.read_bytes()) for name, path in sorted(modules.items())}
    readers = [
        _parse(path.read_bytes()) for name, path in modules.items() if name != f"{library.name}.config"
    ]
    files = {path.name: _hash(path.read_bytes()) for path in _configs([*trees, *readers], library)}
    files |= {str(path.relative_to(library)): _hash(path.read_bytes()) for path in _assets(modules.values())}
    used = {
        os.path.relpath(path, notebook.path.parent / "recorded"): _hash(path.read_bytes())
        for path in _used(notebook, trees, beside)
    }
    return {
        "cells": _hash(repr(cells).encode()),
        "library": _hash(repr((code, files)).encode()),
        "recorded": _hash(repr(used).encode()),
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
        "recorded": "recorded runs or other files beside it that it uses changed",
    }
    changed = [reason for part, reason in reasons.items() if stored.get(part) != now[part]]
    if _shows_old_code(notebook, library):
        changed.append("code of the library that it shows changed")
    return ", and ".join(changed) or None


def needed_files(notebook: Notebook) -> list[Path]:
    """The files that must stand beside a notebook: modules it imports, and files it names by their paths."""
    return sorted(_needed(notebook, *_code(notebook)))


@cache  # each gate asks again
def parse_cell(source: str) -> ast.Module | None:
    """The syntax tree of a cell, magics included; None if it is not Python."""
    try:
        return ast.parse(TransformerManager().transform_cell(source))
    except (SyntaxError, ValueError):  # the second for null bytes
        return None


def _shows_old_code(notebook: Notebook, library: Path) -> bool:
    """Whether the library does not hold any more what an output of `lab.source` shows of it."""
    markdown = [
        output.data.get("text/markdown", "")
        for _, cell in notebook.code
        for output in cell.outputs
        if "data" in output
    ]
    for shown in filter(None, map(_SHOWN.fullmatch, markdown)):
        file = _file(shown[1], library.parent)
        if file is None or _lines(shown[2]) not in _lines(file.read_text("utf-8")):
            return True
    return False


def _lines(source: str) -> str:
    """Code without its indentation: what is shown of a class begins at the margin."""
    return "\n".join(line.strip() for line in source.splitlines())


def _code(notebook: Notebook) -> tuple[list[ast.Module], list[Path]]:
    """All code that is the notebook's own, as syntax trees, and the modules beside it that it imports."""
    cells = [tree for _, cell in notebook.code if (tree := parse_cell(cell.source))]
    reached = _reached(cells, notebook.path.parent)
    modules = sorted(path for name, path in reached.items() if name.split(".")[0] != LIBRARY.name)
    return [*cells, *(_parse(module.read_bytes()) for module in modules)], modules


def _needed(notebook: Notebook, trees: list[ast.Module], modules: list[Path]) -> set[Path]:
    folder = notebook.path.parent
    return {*modules} | {file for tree in trees for path in _paths(tree) for file in _matching(path, folder)}


def _used(notebook: Notebook, trees: list[ast.Module], modules: list[Path]) -> list[Path]:
    folder = notebook.path.parent
    recorded = {file for file in folder.glob(f"recorded/{notebook.path.stem}*") if file.is_file()}
    asked = {file for tree in trees for path in _recorded(tree) for file in _matching(path, folder)}
    return sorted(recorded | asked | _needed(notebook, trees, modules))


def _recorded(tree: ast.Module) -> Iterator[str]:
    """The paths, from a notebook's folder, of what some code asks `lab.recorded_file` for.

    >>> list(_recorded(ast.parse('lab.recorded_file("training/wsd.json")')))
    ['../training/recorded/wsd.json']
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _name(node.func, {}) == "recorded_file" and node.args:
            part, _, file = (_path(node.args[0]) or "*/*").partition("/")
            yield f"../{part}/recorded/{file}"


def _paths(node: ast.AST) -> Iterator[str]:
    """Strings of some code that may be paths, with ``*`` for what is computed and ``/`` after ``Path(...)``.

    >>> list(_paths(ast.parse('open(f"runs/{name}.json"), Path("runs") / "a.txt", Path("runs").iterdir()')))
    ['runs/*.json', 'runs/a.txt', 'runs/']
    """
    path = _path(node)
    if path is not None:
        yield path + "/" * isinstance(node, ast.Call)
    for child in ast.iter_child_nodes(node):
        if path is None or _path(child) is None:  # else it is a part of the path
            yield from _paths(child)


def _path(node: ast.AST) -> str | None:
    """A string, an f-string, ``Path(...)`` or ``a / b``, as a path; None for other code."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_path(part) or "*" for part in node.values)
    if isinstance(node, ast.Call) and _name(node.func, {}) == "Path" and node.args:
        return "/".join(_path(part) or "*" for part in node.args)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
        left, right = _path(node.left), _path(node.right)
        return f"{left or '*'}/{right or '*'}" if left or right else None
    return None


def _matching(pattern: str, folder: Path) -> Iterator[Path]:
    """The files that a path leads to from a notebook's folder, or all in the folder that it leads to.

    Only those of the book's notebooks: in this folder, or in that of another part.
    """
    if os.path.isabs(pattern) or not pattern.isprintable() or not any(map(str.isalnum, pattern)):
        return
    for found in glob(pattern.rstrip("/"), root_dir=folder, recursive=True):
        place = Path(os.path.normpath(folder / found))
        for file in place.rglob("*") if place.is_dir() and "/" in pattern else [place]:
            ours = file.absolute().is_relative_to(folder.absolute().parent)
            if ours and file.is_file() and file.suffix != ".ipynb" and "__pycache__" not in file.parts:
                yield file


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


@cache  # many notebooks reach the same modules
def _parse(source: bytes) -> ast.Module:
    """The syntax tree of a module, without anything if it is not Python."""
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError):  # the second for null bytes
        return ast.Module([], [])


@cache
def _nodes(tree: ast.Module) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(tree))


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


def _reached(trees: list[ast.Module], home: Path, top: str | None = None) -> dict[str, Path]:
    """Every module in a folder that some code reaches through imports, with its file.

    Args:
        home: the folder, from which Python imports.
        top: the one package in it that counts; left out, all do.
    """
    reached: dict[str, Path] = {}
    waiting = [target for tree in trees for target in _imports(tree, "", top)]
    followed = set()
    while waiting:
        module, name = waiting.pop()
        if (module, name) in followed:
            continue
        followed.add((module, name))
        for parent in _parents(module):  # importing a module runs the packages above it
            if above := _file(parent, home):
                reached[parent] = above
        file = _file(module, home)
        if file:
            reached[module] = file
        if name and _file(f"{module}.{name}", home):
            waiting.append((f"{module}.{name}", None))
        elif file:
            offered = _imports(_parse(file.read_bytes()), _package(module, file), top, bound=name)
            # without an offer the module defines the name itself
            waiting += [(module, None)] if name and not offered else offered
    return reached


def _imports(
    tree: ast.Module, package: str, top: str | None, bound: str | None = None
) -> list[tuple[str, str | None]]:
    """What some code imports, as (module, name in it or None for all of it).

    Args:
        package: what relative imports are relative to.
        top: look only for modules of this package.
        bound: look only for the import that binds this name.
    """
    found = []
    for node in _nodes(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names if bound in (None, alias.asname, alias.name)]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                if bound in (None, alias.asname or alias.name) or alias.name == "*":
                    found.append((module, bound if alias.name == "*" else alias.name))
    return [(module, name) for module, name in found if top in (None, module.split(".")[0])]


def _file(module: str, home: Path) -> Path | None:
    base = home.joinpath(*module.split("."))
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
    nodes = [node for tree in trees for node in _nodes(tree)]  # a call comes before the name it calls
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
        for node in _nodes(_parse(module.read_bytes()))
        if isinstance(node, ast.Constant) and node.value == "assets"
    }
    return sorted(path for folder in naming for path in folder.rglob("*") if path.is_file())


def _name(node: ast.AST, renamed: dict[str, str]) -> str | None:
    """The name that a node reads, as it is called where it comes from."""
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else None
    return renamed.get(name, name)
