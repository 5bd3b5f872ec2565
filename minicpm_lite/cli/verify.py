"""``minicpm-lite verify``: read shards whole."""

from pathlib import Path
from typing import Annotated

import typer

from .places import as_path

__all__ = ["verify"]


def verify(
    folders: Annotated[list[Path], typer.Argument(parser=as_path, metavar="DIR", help="shards")],
) -> None:
    """Read shards whole, with their index and tokenizer, and compare checksums, after a copy for instance.

    Training checks them, too, but only what it reads.

    \b
      minicpm-lite verify shards
    """
    from ..data.shards import Shards

    for folder in folders:
        shards = Shards(folder)
        shards.verify()
        print(f"{folder}: {len(shards):,} tokens, all as they were written.")
