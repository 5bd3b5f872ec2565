"""``minicpm-lite generate``: go on with a text."""

import json
import sys
from itertools import chain
from typing import TYPE_CHECKING, Annotated

import typer

from .places import as_place

if TYPE_CHECKING:
    from ..language.sampling import Sampling

__all__ = ["generate", "sampling_of"]

Model = Annotated[
    str,
    typer.Argument(
        parser=as_place, metavar="MODEL", help="a run, a checkpoint, a folder, a .gguf file, owner/name"
    ),
]
MaxNewTokens = Annotated[int, typer.Option(min=1, metavar="N", help="tokens at most")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 takes the best token each time")]
TopK = Annotated[int | None, typer.Option(min=1, metavar="N", help="choose among the N best tokens")]
TopP = Annotated[float | None, typer.Option(metavar="P", help="choose among the best that make up P")]
Stop = Annotated[list[str] | None, typer.Option(metavar="TEXT", help="end before this; may be given again")]
Seed = Annotated[int, typer.Option(min=0, max=(1 << 63) - 1, help="of chance")]


def generate(
    model: Model,
    prompt: Annotated[
        str, typer.Argument(metavar="TEXT", help="its beginning; a single - reads it from standard input")
    ],
    max_new_tokens: MaxNewTokens = 100,
    temperature: Temperature = 0.0,
    top_k: TopK = None,
    top_p: TopP = None,
    stop: Stop = None,
    seed: Seed = 0,
    as_json: Annotated[bool, typer.Option("--json", help="for programs: one object")] = False,
) -> None:
    """Go on with a text, as it is; a chat model answers in `chat`.

    \b
      minicpm-lite generate run "It was" --temperature 0.8
    """
    import torch

    from ..language.writing import stream_text
    from .model import open_model

    sampling = sampling_of(temperature, top_k, top_p)
    text = sys.stdin.read() if prompt == "-" else prompt
    opened = open_model(model)
    pieces = stream_text(
        opened.decoder, opened.tokenizer, text, max_new_tokens, sampling, stop or (),
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    if as_json:
        print(json.dumps({"prompt": text, "text": "".join(pieces)}, ensure_ascii=False))
        return
    first = next(pieces, "")  # before the prompt is shown, so that a refusal stands alone
    for piece in chain((text, first), pieces):
        print(piece, end="", flush=True)
    print()


def sampling_of(temperature: float, top_k: int | None, top_p: float | None) -> "Sampling":
    """How a token is chosen, by the options of a command.

    Raises:
        ValueError: an option is out of its range, or asks for a choice where the temperature leaves none.
    """
    from ..language.sampling import Sampling

    sampling = Sampling(temperature, top_k, top_p)
    if temperature == 0 and (top_k, top_p) != (None, None):
        raise ValueError(
            "--top-k and --top-p say among which tokens chance chooses, and at a temperature of 0 it has no "
            "choice. Give a --temperature, such as 0.8."
        )
    return sampling
