"""``minicpm-lite chat``: questions and answers with a chat model."""

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

    Each question is asked in ChatML, the template of MiniCPM3, 4 and 4.1.

    \b
      minicpm-lite chat openbmb/MiniCPM4-0.5B
    """
    from functools import partial

    import torch

    from ..language.chat import Chat, chatml
    from ..language.sampling import Sampling
    from .model import open_model

    sampling = Sampling(temperature, top_k, top_p)
    decoder, tokenizer = open_model(model)
    talk = Chat(
        decoder,
        tokenizer,
        partial(chatml, system=system),
        sampling,
        room=room,
        generator=torch.Generator().manual_seed(seed),
    )
    while question := _asked():
        for piece in talk.answer(question, max_new_tokens):
            print(piece, end="", flush=True)
        print()


def _asked() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""
