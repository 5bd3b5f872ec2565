"""``minicpm-lite shards``: cut texts into tokens, the data of ``train``."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from .places import as_path

__all__ = ["shards"]

_USUAL_ENDS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")


def shards(
    texts: Annotated[
        list[Path],
        typer.Argument(
            parser=as_path, metavar="FILE...", help=".txt or .jsonl files, also with .gz; .parquet"
        ),
    ],
    tokenizer: Annotated[
        Path, typer.Option(parser=as_path, metavar="FILE|DIR", help="a tokenizer.json, or a model's folder")
    ],
    out: Annotated[Path, typer.Option(parser=as_path, metavar="DIR", help="a new folder")],
    field: Annotated[
        str, typer.Option(metavar="NAME", help="of the text in a .jsonl line or a table")
    ] = "text",
    end: Annotated[
        str | None, typer.Option(metavar="TOKEN", help="put this token behind each document, such as </s>")
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option(metavar="N", help="ids of the model, if it has more than the tokenizer")
    ] = None,
    shard_tokens: Annotated[int, typer.Option(metavar="N", help="tokens in a file")] = 1 << 28,
) -> None:
    """Cut texts into tokens and write them as shards, the data of `minicpm-lite train`.

    A .txt file is one document, and is held in memory. A .jsonl file has one in each line, and a .parquet
    file in each row, under "text" unless --field names another. The tokenizer is a tokenizer.json as
    published with the models, with the tokens that the files beside it add. Texts are read whole, whatever it
    says about cutting or padding them, behind its start token if it has one, and a control token that a text
    spells, such as </s>, is text. All cores cut; the environment variable RAYON_NUM_THREADS may say how many.

    \b
      minicpm-lite shards novel.txt --tokenizer tokenizer.json \\
          --end "<|endoftext|>" --out shards
    """
    from ..data.documents import encoded, read_documents, require_texts
    from ..data.shards import TOKENIZER, write_shards
    from ..pretrained.checkpoints import load_tokenizer, read_tokenizer

    require_texts(texts)
    if not tokenizer.exists():
        raise FileNotFoundError(f"There is no tokenizer at {tokenizer}.")
    folder = tokenizer if tokenizer.is_dir() else tokenizer.parent  # its files may add tokens
    of_folder = tokenizer in (folder, folder / TOKENIZER)
    cutter = load_tokenizer(folder) if of_folder else read_tokenizer(tokenizer)
    end_id = None if end is None else cutter.token_to_id(end)
    if end is not None and end_id is None:
        raise ValueError(f"The tokenizer has no token {end!r} to end a document with.")
    ids = encoded((text for path in texts for text in read_documents(path, field)), cutter, end_id)
    if vocab_size is None:
        vocab_size = max(cutter.get_vocab().values(), default=0) + 1  # there may be gaps
    written = write_shards(out, ids, vocab_size, cutter, shard_tokens, end_id)
    print(f"{out}: {len(written):,} tokens, vocabulary of {written.vocab_size:,}.")
    if end is None:
        known = [token for token in _USUAL_ENDS if cutter.token_to_id(token) is not None]
        hint = f' This tokenizer has a token for it: --end "{known[0]}".' if len(known) == 1 else ""
        print("Without --end nothing says where a document ends, and a model will not learn to stop." + hint,
              file=sys.stderr)  # fmt: skip
