"""The data of the book: prose, classical Chinese, emoji, animation frames, and conversations.

All but the conversations, which a published package carries, ship with this one. Sources and licences stand
in the file NOTICE. Each loader reads its file once and remembers the result.
"""

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from PIL import Image

from .packages import chitchat_file

__all__ = [
    "Emoji",
    "load_austen",
    "load_chinese_classics",
    "load_conversations",
    "load_emoji",
    "load_kenney",
    "load_novels",
]

_HEADINGS = {
    "Emma": "EMMA\n",
    "Mansfield Park": "MANSFIELD PARK\n",
    "Northanger Abbey": "NORTHANGER ABBEY\n",
    "Persuasion": "Persuasion\n",
    "Pride and Prejudice": "PRIDE AND PREJUDICE\n",
    "Sense and Sensibility": "SENSE AND SENSIBILITY\n",
}
_ASSETS = Path(__file__).parent / "assets"
_EMOJI_SIZE, _EMOJI_COLUMNS = 48, 36


@dataclass(frozen=True)
class Emoji:
    """One of the Noto emoji: what it shows, in English and Chinese, and its picture of 48 by 48 pixels."""

    character: str
    english: str
    chinese: str
    english_tags: tuple[str, ...]
    chinese_tags: tuple[str, ...]
    category: str
    subcategory: str
    image: Image.Image


@cache
def load_austen() -> str:
    """Six novels by Jane Austen: 4.0 million characters of clean English prose.

    >>> load_austen()[:4]
    'EMMA'
    """
    return gzip.decompress(_read("austen.txt.gz")).decode("utf-8")


def load_novels() -> dict[str, str]:
    """The six novels of `load_austen` by their titles, each from its heading to the next one's."""
    text = load_austen()
    starts = [text.index(heading) for heading in _HEADINGS.values()]
    ends = [*starts[1:], len(text)]
    return {title: text[a:b] for title, a, b in zip(_HEADINGS, starts, ends, strict=True)}


@cache
def load_conversations() -> tuple[tuple[tuple[str, ...], ...], ...]:
    """7,168 conversations between two people, in English: each a row of turns, each turn a row of messages.

    Raises:
        ImportError: the package that carries them is missing; the message names the command to get it.
    """
    records = json.loads(chitchat_file().read_text(encoding="utf-8")).values()
    return tuple(
        tuple(tuple(message["text"] for message in turn) for turn in record["messages"]) for record in records
    )


@cache
def load_chinese_classics() -> str:
    """Classical Chinese prose and verse, one paragraph a line: 0.38 million characters."""
    books = json.loads(gzip.decompress(_read("zh_classics.json.gz")))
    return "\n".join(paragraph for book in books.values() for paragraph in _paragraphs(book))


def load_emoji() -> tuple[Emoji, ...]:
    """The 1,026 Noto emoji, in the order of the Unicode charts; the pictures are the caller's own."""
    return tuple(replace(each, image=each.image.copy()) for each in _load_emoji())


@cache
def _load_emoji() -> tuple[Emoji, ...]:
    with Image.open(_ASSETS / "noto48.png") as file:
        sheet = file.convert("RGBA")
    emoji = []
    for entry in json.loads(_read("noto48.json")):
        row, column = divmod(entry["i"], _EMOJI_COLUMNS)
        left, top = column * _EMOJI_SIZE, row * _EMOJI_SIZE
        emoji.append(
            Emoji(
                character="".join(chr(int(code, 16)) for code in entry["unified"].split("-")),
                english=entry["en"],
                chinese=entry["zh"],
                english_tags=tuple(entry["en_tags"]),
                chinese_tags=tuple(entry["zh_tags"]),
                category=entry["category"],
                subcategory=entry["sub"],
                image=sheet.crop((left, top, left + _EMOJI_SIZE, top + _EMOJI_SIZE)),
            )
        )
    return tuple(emoji)


def load_kenney() -> dict[str, dict[str, Image.Image]]:
    """Animation frames by Kenney: for each of six characters, its frames by name ("walk0", "jump", ...).

    Tables and pictures are the caller's own.
    """
    return {
        character: {frame: image.copy() for frame, image in frames.items()}
        for character, frames in _load_kenney().items()
    }


@cache
def _load_kenney() -> dict[str, dict[str, Image.Image]]:
    characters: dict[str, dict[str, Image.Image]] = {}
    for path in sorted((_ASSETS / "kenney").glob("*.png")):
        character, frame = path.stem.split("_")
        with Image.open(path) as file:
            characters.setdefault(character, {})[frame] = file.convert("RGBA")
    return characters


def _read(name: str) -> bytes:
    path = _ASSETS / name
    if not path.is_file():
        raise FileNotFoundError(f"The package lacks its data file {name}; install minicpm_lite again.")
    return path.read_bytes()


def _paragraphs(node: object) -> Iterator[str]:
    """The text of a book, whatever its nesting: every string under a key that holds text."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, list):
        for child in node:
            yield from _paragraphs(child)
    elif isinstance(node, dict):
        for key in ("paragraphs", "content", "lines"):
            if key in node:
                yield from _paragraphs(node[key])
