"""The documents of files: of .txt one each, of .jsonl one in each line, of .parquet one in each row.

The first two may be gzipped. `read_documents` reads them, `encoded` cuts them into tokens.

Trap: the `tokenizers` package takes a hundred bytes and more for each letter of a text that it cuts. So a
long one is cut in pieces, where its tokens stay the same: each piece with some text in front, whose tokens
are dropped, since many tokenizers write a blank before whatever comes first.
"""

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from types import ModuleType

from tokenizers import Tokenizer

from ..language.tokenizer import (
    BytePairTokenizer,
    encode_whole,
    leaves_out,
    reading_all_as_text,
    require_several,
    require_text,
)
from ..optional import require

__all__ = ["encoded", "read_documents", "require_texts", "row_in"]

_KINDS = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz", ".parquet")
_ROWS = 1024  # of a table that are held at a time
_BATCH_CHARACTERS = 1 << 22  # of text that is cut at a time
_PIECE_CHARACTERS = 1 << 20  # of a text that is cut at once
_AROUND = 200  # letters on both sides of a place that decide whether a text may be parted there
_BETWEEN = re.compile(
    r"(?<=\w)(?= \w)|(?<=\S\n)(?=.|\n)|(?<=[。！？])(?=\w)"
)  # two words, lines or sentences
_TRIES = 20


def require_texts(paths: list[Path]) -> None:
    """Refuse what is no file of texts, before anything is begun.

    Raises:
        ValueError: a file of a kind whose documents cannot be told apart, or one that is given twice.
        FileNotFoundError: there is no such file.
        ImportError: a table needs a package that is not installed.
    """
    before: set[Path] = set()
    for path in paths:
        if (place := path.resolve()) in before:
            raise ValueError(f"{path} is given twice; its documents would count twice.")
        before.add(place)
        if not path.name.endswith(_KINDS):
            raise ValueError(
                f"{path} is neither .txt nor .jsonl (nor one of them with .gz) nor .parquet, so its "
                "documents cannot be told apart."
            )
        if path.suffix == ".parquet":
            _arrow("pyarrow")
        if not path.is_file():
            raise FileNotFoundError(f"There is no file {path}.")


def read_documents(path: Path, field: str) -> Iterator[str]:
    """The texts of a file; its byte order mark, and blank lines between the others, are none.

    Args:
        path: the file.
        field: of a .jsonl line, or the column of a table, that holds the text; where it stands twice in a
            line, the last one, as Python's JSON has it.

    Raises:
        ValueError: what is no UTF-8, no whole gzip or parquet file, or no JSON object or row with such a
            text; the sentence names line, row or byte (in a gzipped file, of what was zipped).
        ImportError: a table needs a package that is not installed.
    """
    return _rows(path, field) if path.suffix == ".parquet" else _written(path, field)


def _written(path: Path, field: str) -> Iterator[str]:
    """The texts of a .txt or .jsonl file."""
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
            yield row_in(text, field, f"Line {number} of {path}")[field]


def row_in(line: str, field: str, place: str) -> dict:
    """The JSON object of a line, which holds a text under ``field``.

    Raises:
        ValueError: the line is none, or half a character is in the text; the sentence begins with ``place``.
    """
    try:
        row = json.loads(line)
        row[field].encode()
    except UnicodeEncodeError as error:
        half = ord(error.object[error.start])
        raise ValueError(f"{place} holds half a character, U+{half:04X}, which no UTF-8 text can.") from None
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{place} is no JSON object with a text under {field!r}.") from None
    except ValueError as error:  # a whole number of thousands of digits
        raise ValueError(f"{place} cannot be read: {error}.") from None
    return row


def encoded(
    texts: Iterable[str], tokenizer: Tokenizer | BytePairTokenizer, end: int | None
) -> Iterator[list[int]]:
    """The token ids of each text, in order, with the id that ends a document, if any, behind them.

    Those of a long text come in several lists, of which the last has the end.
    A start token stands before them where the tokenizer puts one, as it stands before a prompt.
    What a text spells like one of the tokenizer's `control_tokens` is text, so none of them stands in it. An
    end that is none of them must not stand in a text either, which would be two documents to whoever reads.
    Texts are cut some at a time, by the threads of the `tokenizers` package: as many as there are cores, or
    as the environment variable RAYON_NUM_THREADS says.

    Raises:
        TypeError: one string in place of several, or something that is none.
        ValueError: half a character in a text, the end, or something that the vocabulary has no token for.
    """
    require_several(texts)
    tokenizer, behind = reading_all_as_text(tokenizer), [] if end is None else [end]
    for batch in _batches(_pieces(texts, tokenizer)):
        pieces = [piece for piece, _, _ in batch]
        for encoding, (piece, in_front, last) in zip(tokenizer.encode_batch_fast(pieces), batch, strict=True):
            ids = encoding.ids[in_front:]
            if leaves_out(tokenizer, ids):
                encode_whole(tokenizer, piece)  # which says what
            if end in ids and (end, 0) in zip(ids, encoding.special_tokens_mask[in_front:], strict=True):
                raise ValueError(
                    f"A text holds the token that is to end documents, {tokenizer.id_to_token(end)!r}, so it "
                    "would be read as two. Take a token that no text holds, such as </s>."
                )
            yield ids + behind if last else ids


def _pieces(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[tuple[str, int, bool]]:
    """The pieces of each text: with text in front, the tokens in front, and whether it is the last."""
    for text in texts:
        require_text(text)
        begin = front = in_front = 0
        while len(text) - begin > _PIECE_CHARACTERS and (place := _parting(text, begin, tokenizer)):
            yield text[front:place], in_front, False
            begin, front = place, max(place - _AROUND, 0)
            in_front = len(tokenizer.encode(text[front:begin]).ids)
        yield text[front:], in_front, True


def _parting(text: str, begin: int, tokenizer: Tokenizer) -> int | None:
    """A place, a piece behind ``begin`` or a little more, where no token of the text goes across."""
    for found in islice(_BETWEEN.finditer(text, begin + _PIECE_CHARACTERS), _TRIES):
        place = found.end()
        before = text[max(place - _AROUND, 0) : place]
        ids, both = (tokenizer.encode(each).ids for each in (before, before + text[place : place + _AROUND]))
        if both[: len(ids)] == ids:
            return place
    return None


def _batches(pieces: Iterable[tuple[str, int, bool]]) -> Iterator[list[tuple[str, int, bool]]]:
    batch, held = [], 0
    for piece in pieces:
        batch.append(piece)
        held += len(piece[0]) + 1
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
        if (
            path.suffix == ".gz" and not path.stat().st_size
        ):  # which Python takes for a whole one without text
            raise EOFError("it is empty")
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield from [file.read()] if _kind(path) == ".txt" else file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(
            f"{path} is not a whole gzip file ({error}). It may be truncated; copy or write it again."
        ) from None


def _rows(path: Path, field: str) -> Iterator[str]:
    """The texts of a table, some rows at a time."""
    number = 0
    try:
        with _arrow("pyarrow.parquet").ParquetFile(path) as table:
            if field not in (columns := table.schema_arrow.names):
                raise ValueError(f"{path} has no column {field!r}; it has {', '.join(columns)}.")
            if columns.count(field) > 1:
                raise ValueError(f"{path} has {columns.count(field)} columns {field!r}; one holds the texts.")
            for batch in table.iter_batches(_ROWS, columns=[field]):
                for text in batch[field].to_pylist():
                    number += 1
                    if not isinstance(text, str):
                        raise ValueError(f"Row {number} of {path} has no text under {field!r}.")
                    yield text
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text in one of the rows behind row {number}.") from None
    except (_arrow("pyarrow").ArrowException, OSError) as error:
        raise ValueError(
            f"{path} is not a whole parquet file ({' '.join(str(error).split())}). It may be truncated; copy "
            "or write it again."
        ) from None


def _arrow(module: str) -> ModuleType:
    return require(module, install="minicpm_lite[parquet]", purpose="read parquet files")
