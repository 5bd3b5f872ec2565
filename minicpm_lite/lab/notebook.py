"""Notebook files: find, read and write them, and what the other modules ask of their cells."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..optional import require
from . import INSTALL

nbformat = require("nbformat", install=INSTALL, purpose="read notebooks")

KEY = "minicpm_lite"  # in the notebook's metadata: stamp, version, seconds, peak_memory_mb, device


@dataclass(frozen=True)
class Notebook:
    """A notebook file and its content, ``nb``."""

    path: Path
    nb: "nbformat.NotebookNode"

    @classmethod
    def read(cls, path: Path) -> "Notebook":
        return cls(path, nbformat.read(path, as_version=4))

    def write(self) -> None:
        """Write beside, then rename, so that a notebook is never half written."""
        nbformat.validate(self.nb)
        beside = self.path.with_name(self.path.name + ".new")
        nbformat.write(self.nb, beside)
        os.replace(beside, self.path)

    @property
    def record(self) -> dict:
        """What the last run left in the metadata; empty if there was none."""
        return self.nb.metadata.get(KEY, {})

    @cached_property
    def code(self) -> list[tuple[int, "nbformat.NotebookNode"]]:
        """The code cells that hold anything, each with its place among all cells, counted from 1."""
        return [
            (number, cell)
            for number, cell in enumerate(self.nb.cells, start=1)
            if cell.cell_type == "code" and cell.source.strip()
        ]


def tags(cell: "nbformat.NotebookNode") -> set[str]:
    """The tags of a cell."""
    return set(cell.metadata.get("tags", []))


def find(places: Iterable[Path]) -> list[Path]:
    """The notebooks at some places, each a notebook or a folder of them, sorted.

    Raises:
        FileNotFoundError: there is nothing at a place.
    """
    found = []
    for place in places:
        if not place.exists():
            raise FileNotFoundError(f"There is no notebook and no folder at {place}.")
        within = place.rglob("*.ipynb") if place.is_dir() else [place]
        found += [path for path in within if ".ipynb_checkpoints" not in path.parts]
    return sorted(found)
