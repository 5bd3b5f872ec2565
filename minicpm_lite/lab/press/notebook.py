"""Notebook files: find, read and write them, and what the other modules ask of their cells."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ...files import written_whole
from ...optional import require

nbformat = require("nbformat", install="minicpm_lite[notebooks]", purpose="read notebooks")
jsonschema = require("jsonschema", install="minicpm_lite[notebooks]", purpose="read notebooks")

KEY = "minicpm_lite"  # in the notebook's metadata: stamp, version, seconds, peak_memory_mb, device

# The metadata that the modules of press read, and that the format of notebooks leaves open.
_FIGURE, _TEXT = {"type": "integer"}, {"type": "string"}
_METADATA = {
    "properties": {
        "metadata": {
            "properties": {
                KEY: {
                    "type": "object",
                    "properties": {
                        "stamp": {"type": "object", "additionalProperties": _TEXT},
                        "seconds": _FIGURE,
                        "peak_memory_mb": _FIGURE,
                    },
                }
            }
        },
        "cells": {
            "items": {
                "properties": {
                    "metadata": {
                        "properties": {
                            "jupyter": {"type": "object"},
                            "mystnb": {
                                "type": "object",
                                "properties": {
                                    "image": {"type": "object", "properties": {"alt": _TEXT}},
                                },
                            },
                        }
                    }
                }
            }
        },
    }
}


@dataclass(frozen=True)
class Notebook:
    """A notebook file and its content, ``nb``."""

    path: Path
    nb: nbformat.NotebookNode

    @classmethod
    def read(cls, path: Path) -> "Notebook":
        """Read a file.

        Raises:
            OSError: it cannot be read.
            ValueError: it is no file, or holds no notebook, or one with metadata that we do not understand.
        """
        if not path.is_file():
            raise ValueError(
                f"{path} is not a notebook: it is a folder, a pipe, or a link that leads nowhere."
            )
        try:
            nb = nbformat.read(path, as_version=4)
            nbformat.validate(nb)
        except OSError:
            raise
        except Exception as error:  # nbformat lets through whatever its steps stumble over
            said = str(error).strip() or type(error).__name__
            raise ValueError(f"{path} is not a notebook: {said.splitlines()[0]}") from error
        try:
            jsonschema.validate(nb, _METADATA)
        except jsonschema.ValidationError as error:
            place = error.json_path.removeprefix("$.")
            raise ValueError(
                f"{path} has metadata of another kind than ours: {place}: {error.message}."
            ) from None
        return cls(path, nb)

    def write(self) -> None:
        """Write the file, whole or not at all.

        Raises:
            ValueError: a folder, a pipe or a device has this name.
            nbformat.ValidationError: the content is not a notebook.
        """
        nbformat.validate(self.nb)
        if self.path.exists() and not self.path.is_file():
            raise ValueError(f"{self.path} is a folder, a pipe or a device; a notebook would replace it.")
        with written_whole(self.path) as beside:
            nbformat.write(self.nb, beside)

    @property
    def record(self) -> dict:
        """What the last run left in the metadata; empty if there was none."""
        return self.nb.metadata.get(KEY, {})

    @cached_property
    def code(self) -> list[tuple[int, nbformat.NotebookNode]]:
        """The code cells that hold anything, each with its place among all cells, counted from 1."""
        return [
            (number, cell)
            for number, cell in enumerate(self.nb.cells, start=1)
            if cell.cell_type == "code" and cell.source.strip()
        ]


def tags(cell: nbformat.NotebookNode) -> set[str]:
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
