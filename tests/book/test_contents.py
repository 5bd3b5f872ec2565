"""The table of contents, the pages and the notebooks name each other completely."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
TOC = yaml.safe_load((ROOT / "_toc.yml").read_text("utf-8"))


def listed(entry) -> list[str]:
    """All pages named anywhere below an entry of the table of contents."""
    if isinstance(entry, list):
        return [page for item in entry for page in listed(item)]
    if isinstance(entry, dict):
        return ([entry["file"]] if "file" in entry else []) + listed(list(entry.values()))
    return []


def test_every_page_and_every_chapter_is_listed_once():
    written = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "book").rglob("*.md")]
    written += [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "notebooks").glob("*/*.ipynb")]
    pages = [TOC["root"], *listed(TOC["parts"])]
    assert len(pages) == len(set(pages))
    assert {str(page) for page in written} <= set(pages)


def test_every_part_of_the_library_has_a_reference_page():
    parts = {path.parent.name for path in (ROOT / "minicpm_lite").glob("*/__init__.py")}
    parts -= {"exercises"}  # whoever reads about their checks reads the answers
    written = {page.stem for page in (ROOT / "book" / "api").glob("*.md")}
    written |= {page.stem for page in (ROOT / "book").glob("cli.md")}  # with what its commands print
    assert parts <= written, f"Add book/api/PART.md and its line in _toc.yml for: {sorted(parts - written)}"


@pytest.mark.parametrize("page", sorted((ROOT / "book").rglob("*.md")), ids=lambda page: page.stem)
def test_pages_name_no_remote_picture_and_no_placeholder(page):
    text = page.read_text("utf-8")
    assert not re.search(r"!\[[^]]*\]\(https?:|<img[^>]+src=.https?:|example\.(com|org)", text)


def test_every_reference_says_where_it_was_published():
    entries = re.split(r"\n(?=@)", (ROOT / "book" / "references.bib").read_text("utf-8"))
    for entry in entries:
        assert re.search(r"\b(booktitle|howpublished|journal|url) = ", entry), entry
        assert re.search(r"\byear = \{\d{4}\}", entry), entry
