"""``minicpm-lite export``: write a model so that others can open it."""

from pathlib import Path
from typing import Annotated

import typer

from .chat import ChatTemplate
from .generate import Model
from .places import as_path

__all__ = ["export"]


def export(
    model: Model,
    out: Annotated[Path, typer.Option(parser=as_path, metavar="DIR", help="a new folder")],
    family: Annotated[
        str | None,
        typer.Option(help="whose code computes it: llama, granite, mixtral, minicpm3, minicpm, ..."),
    ] = None,
    template: ChatTemplate = None,
) -> None:
    """Write a model in the Hugging Face layout, with its tokenizer, and its chat template if it has one.

    Left out, --family is one that transformers opens without code from elsewhere, where there is one: llama,
    or granite where the model has MiniCPM's multipliers.

    \b
      minicpm-lite export run --out my-model
    """
    from ..pretrained.checkpoints import save_pretrained
    from .model import open_model

    opened = open_model(model, template)
    save_pretrained(
        opened.decoder,
        out,
        opened.tokenizer,
        chat_template=opened.template_source,
        special_tokens=opened.special_tokens,
        model_type=family,
    )
    files = "tokenizer.json" if opened.template_source is None else "tokenizer.json and chat_template.jinja"
    print(f"{out}: {opened.decoder.num_parameters(True):,} parameters, with {files}.")
