"""Every page of the built book, in a browser: desktop and phone, light and dark.

The book is built by `make book`; these tests open what it wrote into `_build/html`.
"""

from pathlib import Path

import pytest
from page_checks import broken_links, inspect

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.pages
SITE = ROOT / "_build" / "html"
SOURCES = [
    "_config.yml",
    "_toc.yml",
    "CHANGELOG.md",
    "book/**/*.*",
    "notebooks/**/*.ipynb",
    "minicpm_lite/**/*.py",
]

# Blocks of at most 79 columns that scroll sideways all the same.
CUT_CODE = r"""() => [...document.querySelectorAll('.bd-article pre')]
  .filter(block => Math.max(...block.textContent.split('\n').map(line => line.length)) <= 79)
  .filter(block => block.scrollWidth > block.clientWidth + 1)
  .map(block => block.textContent.slice(0, 80))"""


def built_pages() -> list[str]:
    """All pages of the site; those that only forward to another are left to ``test_front_door``.

    Of the pages with source code, which Sphinx makes of one template, the first few are enough.
    """
    pages = [page for page in sorted(SITE.rglob("*.html")) if not {"_static", "_modules"} & set(page.parts)]
    pages += sorted(SITE.glob("_modules/*.html")) + sorted(SITE.glob("_modules/minicpm_lite/*.html"))
    return [
        str(page.relative_to(SITE)) for page in pages if 'http-equiv="Refresh"' not in page.read_text("utf-8")
    ]


@pytest.fixture(scope="session")
def site(serve) -> str:
    built = SITE / "searchindex.js"
    if not built.exists():
        pytest.fail("There is no built book in _build/html: run `make book` first.", pytrace=False)
    newest = max(
        (path for pattern in SOURCES for path in ROOT.glob(pattern)), key=lambda path: path.stat().st_mtime
    )
    if newest.stat().st_mtime > built.stat().st_mtime:
        pytest.fail(
            f"{newest.relative_to(ROOT)} is newer than the built book: run `make book` first.", pytrace=False
        )
    return serve(SITE)


@pytest.mark.parametrize("path", built_pages() or ["book/intro.html"])
def test_page_is_sound(path, site, tab):
    problems = inspect(tab, site, path, SITE)
    assert not problems, f"{path}\n" + "\n".join(problems)


def test_front_door_leads_to_the_book(site, page):
    page.goto(site)
    page.wait_for_url("**/book/intro.html")


def test_search_finds_a_word(site, page):
    page.goto(site + "search.html?q=decay")
    page.wait_for_selector("#search-results li")
    links = page.eval_on_selector_all("#search-results li a", "links => links.map(link => link.href)")
    assert any("notebooks/training/wsd" in link for link in links)
    assert not broken_links([link.partition("?")[0] for link in links], site, SITE)


def test_a_solution_is_one_fold(site, page):
    """Its reasons and below them, in the same box, its code."""
    page.goto(site + "notebooks/training/wsd.html")
    solution = page.locator(".solution.dropdown").first
    parts = solution.locator("section"), solution.locator("div.cell.tag_solution pre").first
    assert not any(part.is_visible() for part in parts)
    solution.locator("button.toggle-button").click()
    assert all(part.is_visible() for part in parts)
    assert page.locator(":not(.solution) > div.cell.tag_solution").count() == 0


def test_a_laptop_shows_the_table_of_models_and_79_columns_of_code_whole(site, page):
    page.set_viewport_size({"width": 1280, "height": 900})
    page.goto(site + "book/family.html")
    box = page.locator("div:has(> table.models)")
    assert box.evaluate("box => box.scrollWidth <= box.clientWidth")
    for path in ("notebooks/training/wsd.html", "book/api/lab.html"):
        page.goto(site + path)
        assert page.evaluate(CUT_CODE) == []
