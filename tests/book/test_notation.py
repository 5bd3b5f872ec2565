"""One letter, one meaning: the page of notation against itself, and against what the chapters say.

A chapter declares a letter in words: "$N$ are the parameters", "let $S$ be the squared length". Where the page
says that the letter holds everywhere, the two must have a word in common.
"""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECTION = re.compile(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
SYMBOL = re.compile(r"\$([^$=≈]+?)(?: (?:=|\\approx) [^$]+)?\$")
DECLARED = re.compile(
    r"(?<!\bof )\$([A-Za-z]|\\[a-z]+|\\mathcal\{L\})\$,? (?:is|are|be|stands for|counts) ((?:the|a|an|what|how) [^.;:$|(]+)"
)
SMALL = re.compile(
    r"\b(a|an|and|are|as|at|be|by|for|from|how|in|is|its?|many|number|of|on|one|or|so|that|the|to|what)\b"
)


def meanings(page: str) -> dict[str, list[tuple[str, str]]]:
    """The symbols of each section of the page, each with what it means."""
    found = {}
    for title, text in SECTION.findall(page):
        for line in text.splitlines():
            if line.startswith("| $"):
                symbols, _, meaning = (cell.strip() for cell in line.split("|")[1:-1])
                found.setdefault(title, []).extend((name, meaning) for name in SYMBOL.findall(symbols))
    return found


def double_meanings(page: str) -> list[str]:
    """Symbols that the page explains twice where one meaning is promised."""
    sections = meanings(page)
    everywhere = [symbol for title, rows in sections.items() if "Everywhere" in title for symbol in rows]
    problems = []
    for title, rows in sections.items():
        known = dict(everywhere) if "Everywhere" not in title else {}
        for symbol, meaning in rows:
            if known.get(symbol, meaning) != meaning:
                problems.append(f"{title}: ${symbol}$ is {meaning!r} and {known[symbol]!r}.")
            known[symbol] = meaning
    seen = dict(reversed(everywhere))
    problems += [f"${s}$ is {m!r} and {seen[s]!r}." for s, m in everywhere if seen[s] != m]
    return problems


def words(text: str) -> set[str]:
    """The words that carry the meaning, in the singular."""
    return {word.removesuffix("s") for word in re.findall(r"[a-z]+", SMALL.sub(" ", text.lower()))}


def contradictions(page: str, chapter: str) -> list[str]:
    """What a chapter's text says of letters that have another meaning everywhere, or two in this chapter."""
    known = {s: m for title, rows in meanings(page).items() if "Everywhere" in title for s, m in rows}
    problems = []
    for symbol, said in DECLARED.findall(chapter):
        if symbol in known and not words(said) & words(known[symbol]):
            problems.append(f"${symbol}$ is {said.strip()!r}, and {known[symbol]!r} before.")
        known.setdefault(symbol, said)
    return problems


def prose(path: Path) -> str:
    cells = json.loads(path.read_text("utf-8"))["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


PAGE = (ROOT / "book" / "notation.md").read_text("utf-8")


def test_the_page_is_read():
    sections = meanings(PAGE)
    assert ("N", "parameters without embeddings") in sections["Everywhere: training"]
    assert ("k", "steps since the decay began") in sections["WSD"]  # from "$k = s - T$"


def test_the_page_gives_one_meaning():
    assert not double_meanings(PAGE)


CHAPTERS = sorted((ROOT / "notebooks").glob("*/*.ipynb"))


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_chapters_keep_the_meaning(path):
    assert not contradictions(PAGE, prose(path))


TWO_TABLES = """
## Everywhere: shapes
| $n$ | `seq` | tokens in a sequence |
## Experts
| $K$ | | experts that a token visits |
"""


@pytest.mark.parametrize(
    "row, problem",
    [
        ("| $n$ | | neighbours |", "Experts: $n$ is 'neighbours' and 'tokens in a sequence'."),
        ("| $K$ | | keys |", "Experts: $K$ is 'keys' and 'experts that a token visits'."),
        ("| $J$, $K = 2$ | | keys |", "Experts: $K$ is 'keys' and 'experts that a token visits'."),
    ],
)
def test_a_symbol_with_two_meanings_on_the_page_is_found(row, problem):
    assert double_meanings(TWO_TABLES) == []
    assert double_meanings(TWO_TABLES + row) == [problem]


def test_a_symbol_with_two_meanings_in_everywhere_is_found():
    page = TWO_TABLES + "\n## Everywhere: training\n| $n$ | | steps |\n"
    assert double_meanings(page) == ["$n$ is 'steps' and 'tokens in a sequence'."]


@pytest.mark.parametrize(
    "text, problem",
    [
        ("Let $n$ be the number of documents.", "$n$ is 'the number of documents', and"),
        ("where $n$ is the depth", "$n$ is 'the depth', and 'tokens in a sequence' before."),
        (
            "$A$ is the set of answers. Let $A$ be the first document.",
            "$A$ is 'the first document', and 'the set",
        ),
    ],
)
def test_a_symbol_with_two_meanings_in_a_chapter_is_found(text, problem):
    [found] = contradictions(TWO_TABLES, text)
    assert found.startswith(problem)


def test_the_same_meaning_in_other_words_is_none():
    assert not contradictions(TWO_TABLES, "where $n$ is the number of tokens, and $n$ are the tokens read")
