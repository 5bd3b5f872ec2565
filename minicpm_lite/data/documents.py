"""The documents of text files: a .txt file is one, a .jsonl file has one in each line; either may be gzipped.

`read_documents` reads them, `encoded` cuts them into tokens.
"""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer

__all__ = ["encoded", "read_documents", "require_texts"]

_KINDS = (".txt", ".jsonl")
_BATCH_CHARACTERS = 1 << 22  # of text that is cut at a time


def require_texts(paths: list[Path]) -> None:
    """Refuse what is no file of texts, before anything is begun.

    Raises:
        ValueError: a file of a kind whose documents cannot be told apart.
        FileNotFoundError: there is no such file.
    """
    for path in paths:
        if path.suffix == ".parquet":
            raise ValueError(
                f"{path} is a table, which is not read here. Write its rows as lines of JSON first, for "
                f"instance with pandas: read_parquet({path.name!r}).to_json('{path.stem}.jsonl', "
                "orient='records', lines=True)."
            )
        if _kind(path) not in _KINDS:
            raise ValueError(
                f"{path} is neither .txt nor .jsonl (nor one of them with .gz), so its documents cannot be "
                "told apart."
            )
        if not path.is_file():
            raise FileNotFoundError(f"There is no file {path}.")


def read_documents(path: Path, field: str) -> Iterator[str]:
    """The texts of a file; its byte order mark, and blank lines between the others, are none.

    Raises:
        ValueError: what is no UTF-8, no whole gzip file, or no JSON object with such a text; the sentence
            names line or byte (in a gzipped file, of what was zipped).
    """
    before = 0  # bytes
    for number, line in enumerate(_lines(path), start=1):
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path} is not UTF-8 text: byte {before + error.start} cannot be read."
            ) from None
        before += len(line)
        text = text.removeprefix("\ufeff") if number == 1 else text
        if _kind(path) == ".txt":
            yield text.replace("\r\n", "\n").replace("\r", "\n")
        elif text.strip():
            yield _text_in(text, field, f"Line {number} of {path}")


def encoded(texts: Iterable[str], tokenizer: Tokenizer, end: int | None) -> Iterator[list[int]]:
    """The token ids of each text, in order, with the id that ends a document, if any, behind them.

    Texts are cut some at a time, by the threads of the `tokenizers` package: as many as there are cores, or
    as the environment variable RAYON_NUM_THREADS says.
    """
    behind = [] if end is None else [end]
    for batch in _batches(texts):
        for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
            yield encoding.ids + behind


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch, held = [], 0
    for text in texts:
        batch.append(text)
        held += len(text) + 1
        if held >= _BATCH_CHARACTERS:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _kind(path: Path) -> str:
    return path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a file as bytes; of a .txt file, all of it at once."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield from [file.read()] if _kind(path) == ".txt" else file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(
            f"{path} is not a whole gzip file ({error}). It may be truncated; copy or write it again."
        ) from None


def _text_in(line: str, field: str, place: str) -> str:
    try:
        text = json.loads(line)[field]
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{place} holds half a character, U+{ord(text[error.start]):04X}, which no UTF-8 text can."
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{place} is no JSON object with a text under {field!r}.") from None
    return text
