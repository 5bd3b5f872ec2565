"""A dirty pool with known labels: real text beside what a crawl really contains.

To judge a filter one must know what it should have done. So the pool is put together here: pieces of novels,
of conversations and of web pages, which are clean; code and Chinese, which are fine but not English prose;
and junk made from other pieces of the same sources, so that topics hardly give it away. (Names can: the
spoilt pieces of novels are all from one of them.)

Three sets share no document: the pool, which is filtered; the seeds, which say what good text is (Wikipedia,
another novel, other conversations); and the held-out texts, which judge a model in the end: a web source and
a novel that occur in neither.
"""

import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import accumulate
from string import ascii_lowercase, printable

from ..config import require_positive_integer
from ..runtime import require_seed
from .assets import load_chinese_classics, load_conversations, load_novels
from .packages import web_samples_file

__all__ = ["CLEAN", "Document", "Pool", "build_pool", "load_web_documents", "pieces_of"]

PIECE_CHARACTERS = 1500
SHORTEST_PIECE = 300
CLEAN = ("books", "chat", "web")
_SOURCES = {
    "Abirate/english_quotes": "quotes",
    "codeparrot/github-code": "code",
    "RandomCharAndNumberDataset": "random characters",
    "RandomWordsDataset": "random words",
}
_WEB_SOURCES = ("c4", "oscar", "code", "random words", "wikipedia", "openwebtext")
_SPOILT = (  # and its share of the spoilt characters
    ("shuffled words", 0.3),
    ("noisy letters", 0.25),
    ("keyword spam", 0.2),
    ("random words", 0.14),
    ("random characters", 0.05),
    ("half Chinese", 0.06),
)


@dataclass(frozen=True)
class Document:
    """A text and what it is known to be.

    Attributes:
        text: as found, not normalised.
        source: where it is from, or how it was spoilt: "books", "shuffled words", …
        original: the index in the pool of the document that this one is a copy of; None if it is no copy.
    """

    text: str
    source: str
    original: int | None = None

    @property
    def clean(self) -> bool:
        """English prose or conversation as people wrote it, and no copy of another document."""
        return self.source in CLEAN


@dataclass(frozen=True)
class Pool:
    """What `build_pool` makes.

    Attributes:
        documents: to be filtered, in random order.
        seeds: clean texts that show a filter what is wanted.
        held_out: texts to judge a trained model: "web" (OpenWebText) and "books" (another novel).
    """

    documents: tuple[Document, ...]
    seeds: tuple[Document, ...]
    held_out: dict[str, str]


@cache
def load_web_documents() -> tuple[Document, ...]:
    """400 whole documents, 50 each: quotes, c4, openwebtext, oscar, wikipedia, code, two kinds of noise.

    Raises:
        ImportError: the package that carries them is missing; the message names the command to get it.
    """
    lines = web_samples_file().read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines if line.strip()]
    return tuple(Document(row["text"], _SOURCES.get(row["type"], row["type"])) for row in rows)


def pieces_of(text: str, size: int = PIECE_CHARACTERS, shortest: int = SHORTEST_PIECE) -> Iterator[str]:
    """Pieces of at most ``size`` characters that end at a space; a rest below ``shortest`` is left out.

    >>> list(pieces_of("one two three four", size=9, shortest=3))
    ['one two', 'three', 'four']
    """
    require_positive_integer("size", size)
    require_positive_integer("shortest", shortest)
    start = 0
    while len(text) - start >= shortest:
        end = start + size
        if end < len(text):
            space = max(text.rfind(" ", start + 1, end + 1), text.rfind("\n", start + 1, end + 1))
            end = space if space > start else end
        if piece := text[start:end].strip():
            yield piece
        start = end


def build_pool(seed: int = 0, scale: float = 1.0) -> Pool:
    """The pool, the seeds and the held-out texts; the same for the same seed. Built once in a process.

    Args:
        seed: decides which documents are taken, which are spoilt and how, and the order.
        scale: 1 is about 7 million characters; a smaller pool has the same parts in the same shares.

    Raises:
        ImportError: a package that carries a source is missing; the message names the command to get it.
        ValueError: a scale outside 0 to 1.
    """
    require_seed(seed)
    if not 0 < scale <= 1:
        raise ValueError(f"The scale of the pool is {scale}; it must be more than 0 and at most 1.")
    pool = _build_pool(seed, scale)
    return replace(pool, held_out=dict(pool.held_out))  # what one caller changes is no one else's


@lru_cache(maxsize=4)
def _build_pool(seed: int, scale: float) -> Pool:
    rng = random.Random(seed)
    web = {source: [d.text for d in load_web_documents() if d.source == source] for source in _WEB_SOURCES}
    novels, conversations = load_novels(), load_conversations()
    chats = ["\n".join(message for turn in turns for message in turn) for turns in conversations]
    chats = [text for text in chats if len(text) >= SHORTEST_PIECE]
    rng.shuffle(chats)
    seed_chats, clean_chats, spoilt_chats = chats[:400], chats[400:2200], chats[2200:]

    def take(texts: Iterable[str], characters: int) -> list[str]:
        pieces = [piece for text in texts for piece in pieces_of(text)]
        rng.shuffle(pieces)
        lengths = accumulate(map(len, pieces), initial=0)
        return [piece for piece, before in zip(pieces, lengths, strict=False) if before < characters * scale]

    documents = [
        Document(text, source)
        for source, texts, characters in (
            ("books", [novels["Emma"], novels["Mansfield Park"]], 1_500_000),
            ("chat", clean_chats, 1_900_000),
            ("web", web["c4"] + web["oscar"], 200_000),
            ("code", web["code"], 150_000),
            ("Chinese", [load_chinese_classics()], 70_000),
        )
        for text in take(texts, characters)
    ]
    clean = [document.text for document in documents if document.clean]
    dictionary = sorted({word for text in web["random words"] for word in text.split()})
    printed_together = novels["Northanger Abbey"] + novels["Persuasion"]  # in 1818
    to_spoil = take([printed_together, *spoilt_chats], 3_300_000)
    for source, share in _SPOILT:
        part, to_spoil = _cut(to_spoil, share * 3_300_000 * scale)
        documents += [Document(_spoil(source, text, dictionary, rng), source) for text in part]
    for source, characters in (("exact copy", 250_000), ("near copy", 400_000)):
        for text in take(clean, characters):
            copy = text if source == "exact copy" else _edit_words(text, rng)
            documents.append(Document(copy, source, clean.index(text)))
    return Pool(
        documents=_shuffled(documents, rng),
        seeds=tuple(
            Document(text, source)
            for source, texts in (
                ("wikipedia", web["wikipedia"]),
                ("books", [novels["Pride and Prejudice"]]),
                ("chat", seed_chats),
            )
            for text in take(texts, 200_000)
        ),
        held_out={
            "web": "\n\n".join(web["openwebtext"]),
            "books": novels["Sense and Sensibility"][:150_000],
        },
    )


def _shuffled(documents: list[Document], rng: random.Random) -> tuple[Document, ...]:
    order = list(range(len(documents)))
    rng.shuffle(order)
    place = {old: new for new, old in enumerate(order)}
    return tuple(
        document if document.original is None else replace(document, original=place[document.original])
        for document in (documents[old] for old in order)
    )


def _cut(texts: list[str], characters: float) -> tuple[list[str], list[str]]:
    """The texts up to so many characters, and the rest."""
    ends = list(accumulate(map(len, texts)))
    count = sum(end <= characters for end in ends)
    return texts[:count], texts[count:]


def _spoil(source: str, text: str, dictionary: list[str], rng: random.Random) -> str:
    words = text.split()
    if source == "shuffled words":
        return " ".join(rng.sample(words, len(words)))
    if source == "noisy letters":  # every seventh letter or so is another one, as in a bad scan
        return "".join(
            rng.choice(ascii_lowercase) if char.isalpha() and rng.random() < 0.15 else char for char in text
        )
    if source == "keyword spam":  # a few phrases again and again
        phrases = [" ".join(words[i : i + 3]) for i in rng.choices(range(max(len(words) - 2, 1)), k=5)]
        return ", ".join(rng.choice(phrases) for _ in range(len(words) // 3))
    if source == "random words":
        return " ".join(rng.choice(dictionary) for _ in range(len(text) // 10))
    if source == "random characters":
        return "".join(rng.choice(printable[:95]) for _ in text)
    chinese = load_chinese_classics()  # half Chinese: a line of each in turn
    lines = [" ".join(words[i : i + 8]) for i in range(0, len(words), 8)]
    starts = [rng.randrange(len(chinese) - 16) for _ in lines]
    return "\n".join(f"{line} {chinese[i : i + 16]}" for line, i in zip(lines, starts, strict=True))


def _edit_words(text: str, rng: random.Random) -> str:
    """A copy in which 1 to 5 words of 100 are replaced by others of the same text."""
    words = text.split(" ")
    share = rng.uniform(0.01, 0.05)
    return " ".join(rng.choice(words) if rng.random() < share else word for word in words)
