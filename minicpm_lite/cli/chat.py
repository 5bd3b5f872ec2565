"""``minicpm-lite chat``: questions and answers with a chat model."""

import sys
from typing import Annotated

import typer

from .generate import Model, Seed, Stop, Temperature, TopK, TopP, sampling_of

__all__ = ["ChatTemplate", "chat"]

ChatTemplate = Annotated[
    str | None,
    typer.Option(metavar="NAME|FILE", help="chatml, minicpm or a file in Jinja; else the model's own"),
]


def chat(
    model: Model,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="tokens of an answer at most; else 500, or half of the room"),
    ] = None,
    temperature: Temperature = 0.0,
    top_k: TopK = None,
    top_p: TopP = None,
    stop: Stop = None,
    seed: Seed = 0,
    template: ChatTemplate = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="what the model is told first")] = None,
    room: Annotated[int, typer.Option(min=2, metavar="TOKENS", help="for the whole conversation")] = 4096,
) -> None:
    """Talk with a chat model; an empty line or end of input ends it.

    Questions are asked in the model's own template, or else in ChatML, and that is said. A run has a template
    of its own if its folder holds a chat_template.jinja. What you write is text, also where it spells a
    control token.

    \b
      minicpm-lite chat openbmb/MiniCPM4-0.5B
      minicpm-lite chat run --template minicpm
    """
    import torch

    from ..language.chat import Chat
    from .model import open_model

    sampling = sampling_of(temperature, top_k, top_p)
    opened, chance = open_model(model, template), torch.Generator().manual_seed(seed)
    if opened.template_source is None:
        print(
            "The model has no chat template, so it is asked in ChatML. Give the one it was trained with as "
            "--template.",
            file=sys.stderr,
        )
    talk = Chat(
        opened.decoder, opened.tokenizer, opened.template, sampling, stop or (), room=room, generator=chance
    )
    room = min(room, opened.decoder.config.max_position_embeddings)
    most = min(500, room // 2) if max_new_tokens is None else max_new_tokens
    if system is not None:
        talk.messages = [{"role": "system", "content": system}]
    while question := _asked():
        try:
            for piece in talk.answer(question, most):
                print(piece, end="", flush=True)
            print()
        except ValueError as error:  # no room for it, say; what was said before stands
            print(error, file=sys.stderr)


def _asked() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""
