"""The documents of text files: a .txt file is one, a .jsonl file has one in each line."""

import json
from collections.abc import Iterator
from pathlib import Path

__all__ = ["documents", "require_texts"]

SUFFIXES = (".txt", ".jsonl")


def require_texts(paths: list[Path]) -> None:
    """Refuse what is no file of texts, before anything is begun.

    Raises:
        ValueError: a file of a kind whose documents cannot be told apart.
        FileNotFoundError: there is no such file.
    """
    for path in paths:
        if path.suffix not in SUFFIXES:
            raise ValueError(f"{path} is neither .txt nor .jsonl, so its documents cannot be told apart.")
        if not path.is_file():
            raise FileNotFoundError(f"There is no file {path}.")


def documents(path: Path, field: str) -> Iterator[str]:
    """The texts of a file; its byte order mark, and blank lines between the others, are none.

    Raises:
        ValueError: what is no UTF-8, or no JSON object with such a text; the sentence names line or byte.
    """
    before = 0  # bytes
    with path.open("rb") as file:
        for number, line in enumerate([file.read()] if path.suffix == ".txt" else file, start=1):
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path} is not UTF-8 text: byte {before + error.start} cannot be read."
                ) from None
            before += len(line)
            text = text.removeprefix("\ufeff") if number == 1 else text
            if path.suffix == ".txt":
                yield text.replace("\r\n", "\n").replace("\r", "\n")
            elif text.strip():
                yield _text_in(text, field, f"Line {number} of {path}")


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
