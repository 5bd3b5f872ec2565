"""``minicpm-lite chat``: questions and answers with a chat model."""

import sys
from typing import Annotated

import typer

from .generate import MaxNewTokens, Model, Seed, Temperature, TopK, TopP

__all__ = ["chat"]


def chat(
    model: Model,
    max_new_tokens: MaxNewTokens = 500,
    temperature: Temperature = 0.0,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = 0,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="what the model is told first")] = None,
    room: Annotated[int, typer.Option(min=2, metavar="TOKENS", help="for the whole conversation")] = 4096,
) -> None:
    """Talk with a chat model; an empty line or end of input ends it.

    Questions are asked in the model's own template, or else in ChatML. What you write is text, also where it
    spells a control token.

    \b
      minicpm-lite chat openbmb/MiniCPM4-0.5B
    """
    import torch

    from ..language.chat import Chat
    from ..language.sampling import Sampling
    from .model import open_model

    sampling = Sampling(temperature, top_k, top_p)
    opened, chance = open_model(model), torch.Generator().manual_seed(seed)
    talk = Chat(opened.decoder, opened.tokenizer, opened.template, sampling, room=room, generator=chance)
    if system is not None:
        talk.messages = [{"role": "system", "content": system}]
    while question := _asked():
        try:
            for piece in talk.answer(question, max_new_tokens):
                print(piece, end="", flush=True)
            print()
        except ValueError as error:  # no room for it, say; what was said before stands
            print(error, file=sys.stderr)


def _asked() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""
