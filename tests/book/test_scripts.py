"""The two scripts of the pages, tried on a page as Sphinx writes it: boxes on links, and what the browser keeps."""

import shutil
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # in a real browser

STATIC = Path(__file__).parents[2] / "book" / "_static"
CONTENTS = '<nav class="bd-links"><a class="reference internal" href="{root}part/one.html">One</a></nav>'
CHAPTER = """
<div class="exercise" id="ex-a">A</div><div class="exercise" id="ex-b">B</div>
<fieldset data-right="1">
  <label><input type="radio" name="quiz-1" value="0">no</label>
  <label><input type="radio" name="quiz-1" value="1">yes</label><p role="status"></p>
</fieldset>
<script>document.querySelector('fieldset').addEventListener('change', event => {
  document.querySelector('[role=status]').textContent = event.target.value; });</script>
<p><a class="reference internal" href="#ex-a" title="What it means.">term</a></p>"""
PAGE = """<!doctype html><html data-content_root="{root}"><meta charset="utf-8"><title>t</title>
<script src="{root}tips.js"></script><script src="{root}progress.js"></script>
<body>{contents}<article class="bd-article">{text}</article></body></html>"""


@pytest.fixture
def book(tmp_path, serve) -> str:
    """A book of a front page and one chapter."""
    for script in ("tips.js", "progress.js"):
        shutil.copy(STATIC / script, tmp_path)
    for name, root, text in (("index.html", "./", ""), ("part/one.html", "../", CHAPTER)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        page = PAGE.format(root=root, contents=CONTENTS.format(root=root), text=text)
        (tmp_path / name).write_text(page, "utf-8")
    return serve(tmp_path)


def test_what_was_done_is_there_after_a_reload(book, page):
    page.goto(book + "part/one.html")
    page.locator("#ex-b input").check()
    page.locator("[name=quiz-1]").last.check()
    page.reload()
    assert page.locator("#ex-b input").is_checked() and not page.locator("#ex-a input").is_checked()
    assert page.locator("[role=status]").inner_text() == "1"  # the quiz answers, too


def test_the_contents_show_it_on_every_page(book, page):
    page.goto(book + "part/one.html")
    assert page.locator("nav").inner_text() == "One"
    page.locator("#ex-b input").check()
    page.goto(book + "index.html")
    assert page.locator("nav").inner_text() == "One 1 of 2"
    page.goto(book + "part/one.html")
    page.get_by_label("I have read this chapter").check()
    page.goto(book + "index.html")
    assert page.locator("nav").inner_text() == "One ✓ read"


@pytest.mark.parametrize("button", ["Forget those of this chapter", "Forget all of them"])
def test_it_can_be_forgotten(button, book, page):
    page.goto(book + "part/one.html")
    page.evaluate("localStorage.setItem('of another site', '1')")
    page.locator("#ex-b input").check()
    with page.expect_navigation():
        page.get_by_text(button).click()
    assert not page.locator("#ex-b input").is_checked() and page.locator("nav").inner_text() == "One"
    assert page.evaluate("Object.keys(localStorage)") == ["of another site"]


def test_a_page_without_exercises_asks_nothing(book, page):
    page.goto(book + "index.html")
    assert page.locator("input, button").count() == 0


def test_a_box_opens_for_pointer_and_keyboard_and_escape_closes_it(book, page):
    page.goto(book + "part/one.html")
    box, link = page.locator(".hover-note"), page.locator("a[title]")
    assert box.is_hidden()
    page.get_by_text("term").hover()
    assert box.inner_text() == "What it means."
    box.hover()  # the pointer may rest on it
    page.wait_for_timeout(400)
    assert box.is_visible() and link.get_attribute("title") == "What it means."  # for screen readers
    page.keyboard.press("Escape")
    assert box.is_hidden()
    page.mouse.move(0, 0)
    while page.evaluate("document.activeElement.className") != "reference internal" or box.is_hidden():
        page.keyboard.press("Tab")
    assert box.inner_text() == "What it means."
    page.keyboard.press("Shift+Tab")
    assert box.is_hidden()
