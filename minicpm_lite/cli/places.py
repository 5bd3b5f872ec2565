"""Places, as commands are told them: files, folders, models."""

import os
from pathlib import Path

import typer

__all__ = ["as_path", "as_place"]


def as_place(given: str) -> str:
    """A place as it was typed; a ``~`` that the shell left, as it does behind ``=``, is the home folder.

    Raises:
        typer.BadParameter: it is empty, as a variable of the shell that is not set; to Python that would be
            the working directory.
    """
    if not given:
        raise typer.BadParameter('it is empty; expected a place. The working directory is ".".')
    return os.path.expanduser(given)


def as_path(given: str) -> Path:
    """The same of what is a file or a folder."""
    return Path(as_place(given))
