"""``minicpm-lite models``: every model that `load_config` knows, with its sizes."""

import json
from typing import Annotated

import typer

from ..config import ModelConfig, list_configs, load_config
from ..parameters import count_parameters

__all__ = ["models"]

_COLUMNS = {
    "name": "model",
    "parameters": "parameters",
    "parameters_without_tables": "without tables",
    "parameters_of_a_token": "a token uses",
    "layers": "layers",
    "width": "width",
    "vocabulary": "ids",
    "context": "context",
}


def models(
    as_json: Annotated[bool, typer.Option("--json", help="For programs: a list of objects.")] = False,
) -> None:
    """List the models and their sizes.

    Parameters are counted three times: all of them; without the tables, which turn ids into vectors and
    vectors into scores of ids; and, of a mixture of experts, those that one token uses.

    \b
      minicpm-lite models
    """
    rows = [_row(name, load_config(name)) for name in list_configs()]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
    for key, head in _COLUMNS.items():
        table.add_column(head, justify="left" if key == "name" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(each if isinstance(each, str) else f"{each:,}" for each in row.values()))
    Console(width=max(Console().width, 110)).print(table)  # a narrow terminal breaks lines, and loses nothing


def _row(name: str, config: ModelConfig) -> dict[str, str | int]:
    count = count_parameters(config)
    numbers = (
        config.num_hidden_layers,
        config.hidden_size,
        config.vocab_size,
        config.max_position_embeddings,
    )
    return dict(zip(_COLUMNS, (name, count.total, count.others, count.active, *numbers), strict=True))
