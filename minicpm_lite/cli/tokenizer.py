"""``minicpm-lite tokenizer``: learn a vocabulary from texts."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from .places import as_path

__all__ = ["tokenizer"]


def tokenizer(
    texts: Annotated[
        list[Path],
        typer.Argument(parser=as_path, metavar="FILE", help=".txt or .jsonl files, also with .gz; .parquet"),
    ],
    out: Annotated[
        Path, typer.Option(parser=as_path, metavar="FILE", help="where to write it, such as tokenizer.json")
    ],
    vocab_size: Annotated[
        int,
        typer.Option(min=257, max=1 << 24, metavar="N", help="ids: the bytes, the end, what is learned"),
    ] = 1024,
    end: Annotated[str, typer.Option(metavar="TOKEN", help="a token that ends a document")] = "<|endoftext|>",
    field: Annotated[
        str, typer.Option(metavar="NAME", help="of the text in a .jsonl line or a table")
    ] = "text",
) -> None:
    """Learn a vocabulary from texts: byte-level BPE, in which any text can be written.

    The vocabulary of a model's config must have as many ids; `lite-1m` has 1,024.

    \b
      minicpm-lite tokenizer novel.txt --out tokenizer.json
    """
    from ..data.documents import read_documents, require_texts
    from ..files import written_whole
    from ..language.tokenizer import train_tokenizer

    if len(end.strip()) < 2:
        raise ValueError(f'--end is {end!r}. Give a token of several letters, such as "<|endoftext|>".')
    require_texts(texts)
    if out.exists():
        raise FileExistsError(f"{out} exists; nothing is overwritten. Give another place, or remove it.")
    read = "\n".join(text for path in texts for text in read_documents(path, field))
    if not read.strip():
        raise ValueError(f"{' and '.join(map(str, texts))} holds no text to learn from.")
    learned = train_tokenizer(read, vocab_size - 1)
    if learned.token_to_id(end) is not None:
        raise ValueError(
            f"--end is {end!r}, which texts hold, too. Give a token that no text holds, such as "
            '"<|endoftext|>".'
        )
    learned.add_special_tokens([end])
    with written_whole(out) as beside:
        beside.write_text(learned.to_str(), encoding="utf-8")
    print(f"{out}: {learned.get_vocab_size():,} ids, {end} among them, from {len(read):,} characters.")
    if learned.get_vocab_size() < vocab_size:
        print(
            f"The text gives no more than these. For a model of {vocab_size:,} ids, give `minicpm-lite "
            f"shards` --vocab-size {vocab_size}.",
            file=sys.stderr,
        )
