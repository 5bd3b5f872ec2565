"""Each check of the pages proved by a tiny page with the fault, and by a sound page that passes."""

import pytest
from page_checks import inspect

pytestmark = pytest.mark.pages

SOUND = """
<h1>Decay</h1><p id="start">Five dollars ($5) and a link <a href="#start">to the start</a>.</p>
<pre tabindex="0">$x^2$ and \\frac{1}{2} may stand in code</pre>
<img src="dot.svg" alt="a dot"><a href="other.html#there">another page</a>
<div class="cell_output">no trouble</div>
"""
FAULTS = {
    "raw TeX in dollars": ("<p>The rate is $x^2$ here.</p>", "raw markup on the page: '$x^2$'"),
    "raw TeX command": ("<p>The rate is \\eta here.</p>", "raw markup"),
    "raw role": ("<p>See {ref}<code>decoder</code>.</p>", "raw markup on the page: '{ref}'"),
    "formula with an error": ("<mjx-container><mjx-merror>x</mjx-merror></mjx-container>", "with an error"),
    "broken link": ('<a href="nowhere.html">there</a>', "broken link: nowhere.html"),
    "broken anchor": ('<a href="other.html#nowhere">there</a>', "no such place on the page"),
    "request that leaves": ('<img src="https://example.org/a" alt="a">', "asks the network for https"),
    "request by a script": ("<script>fetch('https://example.org').catch(() => 0)</script>", "asks the network"),
    "missing file": ('<script src="missing.js"></script>', "gets 404 for missing.js"),
    "script error": ("<script>undefinedName()</script>", "script error: undefinedName"),
    "console error": ("<script>console.error('went wrong')</script>", "console error: went wrong"),
    "traceback": (
        '<div class="cell_output"><pre tabindex="0">Traceback (most recent call last):\nKeyError</pre></div>',
        "an output holds a traceback",
    ),
    "picture that does not load": ('<img src="missing.png" alt="a picture">', "image does not load"),
    "no alt text": ('<img src="dot.svg">', "image without alt text"),
    "empty alt text": ('<img src="dot.svg" alt=" ">', "image without alt text"),
    "drawing without a name": ('<svg role="img" width="9" height="9"></svg>', "without alt text: a drawing"),
    "sideways scroll on a phone": (
        '<div style="width: 600px">wide</div>',
        "phone: the page scrolls sideways by",
    ),
    "printed output that is cut on a phone": (
        f"<div class='cell_output'><pre tabindex='0' style='overflow: auto'>{'a word ' * 12}</pre></div>",
        "phone: an output is cut at the right: 'a word",
    ),
    "sideways scroll on a desktop": (
        "<style>@media (min-width: 1000px) { div.x { width: 1600px } }</style><div class='x'>wide</div>",
        "desktop: the page scrolls sideways by",
    ),
    "low contrast on a desktop": (
        "<style>@media (min-width: 1000px) { p.x { color: #bbb } }</style><p class='x'>faint</p>",
        "desktop, light: accessibility, color-contrast",
    ),
    "low contrast": ('<p style="color: #bbb; background: #fff">faint</p>', "color-contrast"),
    "low contrast in code": (
        "<style>.e .k { background: #333 } .k { color: #222 }</style><pre tabindex='0'><span class='k'>a</span> "
        "<span class='k'>b</span> <span class='e'><span class='k'>faint</span> <span class='k'>c</span></span></pre>",
        "color-contrast",
    ),
    "low contrast of one word among its like": (
        "<p>one <em>two</em> <em>three</em></p><p>four <em>five</em> <em style='color: #bbb'>faint</em></p>",
        "color-contrast",
    ),
    "low contrast behind a box that lets light through": (
        "<p>one</p><div style='opacity: 0.4'><p>faint</p></div>",
        "color-contrast",
    ),
    "low contrast on another ground": (
        "<p>one</p><div style='background: #555'><div><p>faint</p></div></div>",
        "color-contrast",
    ),
    "low contrast of what is covered on a phone": (
        "<style>p { color: #bbb } b { position: absolute; inset: 0 50% 0 0; background: #fff }"
        "@media (min-width: 1000px) { b { display: none } }</style>"
        "<div style='position: relative'><p>faint</p><b></b></div>",
        "desktop, light: accessibility, color-contrast",
    ),
    "low contrast in the dark": (
        "<style>@media (prefers-color-scheme: dark) { p.x { color: #666; background: #333 } }</style>"
        '<p class="x">faint</p>',
        "dark: accessibility, color-contrast",
    ),
    "field without a name": ('<input type="range">', "accessibility, label"),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory, serve):
    """A served folder with the files that the pages point to."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "dot.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>')
    (folder / "other.html").write_text('<p id="there">there</p>')
    return folder, serve(folder)


def look(folder, tab, body: str) -> list[str]:
    """Inspect one page with this body."""
    path, base = folder
    name = (
        f"{len(list(path.iterdir()))}.html"  # a name of its own, because the browser keeps pages it has seen
    )
    (path / name).write_text(
        '<!doctype html><html lang="en"><head><title>Page</title><meta charset="utf-8">'
        '<link rel="icon" href="dot.svg"><meta name="viewport" content="width=device-width"></head>'
        f"<body><main><article>{body}</article></main></body></html>"
    )
    return inspect(tab, base, name, path)


def test_a_sound_page_passes(folder, tab):
    assert look(folder, tab, SOUND) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_page_is_caught(folder, tab, fault):
    body, expected = FAULTS[fault]
    problems = look(folder, tab, body)
    assert any(expected in problem for problem in problems), problems
