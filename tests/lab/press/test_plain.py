"""The book's Markdown in plain Markdown: every form it has, what must stay as it is, what must be refused."""

import doctest
import re
from pathlib import Path

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from minicpm_lite.lab.press import plain
from minicpm_lite.lab.press.gates import _raw
from minicpm_lite.lab.press.notebook import KEY, Notebook, find
from minicpm_lite.lab.press.student import _without_solutions, student_copy

CHAPTERS = find([Path(__file__).parents[3] / "notebooks"])
BIBLIOGRAPHY = r"""
@misc{hu2024, title={A}, author={Hu, Shengding and Tu, Yuge and others}, year={2024}, url={https://arxiv.org/abs/1}}
@misc{hagele2024, title={B}, author={H{\"a}gele, Alexander and van den Berg, Jan}, year={2024}}
@misc{team2025, title={C}, author={{The Team}}, year={2025}}
"""


@pytest.fixture
def book(tmp_path) -> Path:
    """A small book; returns the place of a chapter in it."""
    for name, text in {
        "_toc.yml": "",
        "_config.yml": "title: small",
        "book/references.bib": BIBLIOGRAPHY,
        "book/glossary.md": "# Glossary\n",
        "book/part.md": "(part)=\n# The {term}`first` *part*\n",
        "library/code.py": "import math\n\n\nclass A:\n    def double(self):\n        return 2\n",
        "notebooks/part/picture.svg": "<svg/>",
        "notebooks/part/helper.py": "",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path / "notebooks" / "part" / "topic.ipynb"


@pytest.fixture
def turned(book):
    """Turns Markdown sources, each a cell, into plain ones."""

    def turned(*sources, code=()):
        cells = [*map(new_code_cell, code), *map(new_markdown_cell, sources)]
        record = {"seconds": 75, "peak_memory_mb": 1234, "device": "CPU, 2 cores"}
        nb = new_notebook(cells=cells, metadata={KEY: record})
        return "\n====\n".join(
            cell.source for cell in plain.plain_cells(Notebook(book, nb)) if cell.cell_type == "markdown"
        )

    return turned


ROLES = {
    "a {term}`cache`": "a cache",
    "{term}`Caches <cache>`": "Caches",
    "{cite:t}`hu2024` say": "[Hu et al.](https://arxiv.org/abs/1) (2024) say",
    "{cite:t}`hu2024{section 4}`": "[Hu et al.](https://arxiv.org/abs/1) (2024, section 4)",
    "{cite:p}`hu2024{section 4}`": "([Hu et al., 2024](https://arxiv.org/abs/1), section 4)",
    "{cite:p}`hagele2024, team2025`": "(Hägele and van den Berg, 2024; The Team, 2025)",
    "{cite:p}`{see}team2025{page 3}`": "(see The Team, 2025, page 3)",
    "{doc}`/book/part`": "*The first part*",
    "{doc}`../../book/glossary`": "*Glossary*",
    "{doc}`words <../../book/glossary>`": "*words*",
    "{class}`~a.b.C` and {func}`a.f`": "`C` and `a.f`",
    "{py:meth}`~a.B.c`": "`c`",
    "{ref}`part`": "*The first part*",
    "[](part)": "*The first part*",
    "see [there](part), please": "see there, please",
    "(here)=\n\nsee [there](#part) and [here](#here)": "see there and here",
    "[the {term}`glossary`](../../book/glossary.md)": "the glossary",
    "[](../../book/part.md)": "*The first part*",
    "[a paper](https://arxiv.org/abs/2) stays": "[a paper](https://arxiv.org/abs/2) stays",
    "<https://arxiv.org/abs/2>": "<https://arxiv.org/abs/2>",
    "{math}`x^2` and {sub}`2`": "$x^2$ and <sub>2</sub>",
    "over two\n{term}`lines\nlong <line>` here": "over two\nlines long here",
    "- in {term}`a` list\n  - and {term}`b`": "- in a list\n  - and b",
    "> quoted {term}`a`": "> quoted a",
    "| a | b |\n|---|---|\n| {term}`x \\| y` | \\| {term}`c` {term}`c` |": "| a | b |\n|---|---|\n| x | y | \\| c c |",
    "# A {term}`title`": "# A title",
    "*{term}`a` and **{term}`b`***": "*a and **b***",
    "{.lead}\nA first line.": "A first line.",
    "[words]{.red} and `code`{.python}": "words and `code`",
    "(x-y)=\n\nText": "Text",
    "% a remark\n\nText\n\n+++\n\nmore": "Text\n\n\nmore",
    "*a*\n: means {term}`b`\n\n*c*\n: d": "*a*<br>\nmeans b\n\n*c*<br>\nd",
}


@pytest.mark.parametrize("source", ROLES)
def test_text(turned, source):
    assert turned(source) == ROLES[source]


STAYS = [
    "`{term}` and ``{term}`a` `` and \\{term\\} and $x_{term}`$",
    "```python\nx = {term}`a`\n(label)=\n```",
    "    {cite:p}`indented code`",
    "$$\n\\text{lr}(s) = \\begin{cases} a \\\\ b \\end{cases}\n$$",
    '<details class="hint"><summary>Hint: how</summary>\n\nUse `x`.\n\n</details>',
    "1. one\n2. two\n\n---\n\n![a](https://example.org/a.png)",
    "A $\\{a\\}$ set {a} of (b)= things: 100 % of it",
]


@pytest.mark.parametrize("source", STAYS)
def test_what_is_plain_stays_as_it_is(turned, source):
    assert turned(source) == source


DIRECTIVES = {
    ":::{admonition} At a {term}`glance`\n:class: note\n- one {term}`a`\n\ntwo\n:::": "> **At a glance**\n>\n> - one a\n>\n> two",
    "```{warning}\nBe careful.\n```": "> **Warning**\n>\n> Be careful.",
    "```{tip} Straight away\n```": "> **Tip**\n>\n> Straight away",
    "```{dropdown} More\nText.\n```": "<details><summary>More</summary>\n\nText.\n\n</details>",
    "```{admonition} More\n:class: dropdown\nText.\n```": "<details><summary>More</summary>\n\nText.\n\n</details>",
    "::::{note}\n\n:::{measured}\n:::\n::::": "> **Note**\n>\n> **1.2 min** and **1,234 MB** of memory at its peak, measured on CPU, 2 cores.",
    "```{note}\n$$\na\n= b\n$$\n```": "> **Note**\n>\n> $$ a = b $$",
    "- item\n\n  ```{note}\n  Text.\n  ```\n": "- item\n\n  > **Note**\n  >\n  > Text.",
    ":::{exercise-start} A {term}`title`\n:label: ex-a\n:::\nText\n\n```{exercise-end}\n```": "**Exercise 1: A title**\nText",
    "```{literalinclude} ../../library/code.py\n:pyobject: A.double\n:dedent:\n```": "```python\ndef double(self):\n    return 2\n```",
    "```{literalinclude} ../../library/code.py\n:start-at: class\n:end-before: return\n```": "```python\nclass A:\n    def double(self):\n```",
    "```{code-block} python\n:linenos:\nx = `{a}`\n```": "```python\nx = `{a}`\n```",
    "```{math}\n:label: eq-a\na = b\n```\n\n{eq}`eq-a`": "$$\na = b\n\\tag{1}\n$$\n\n(1)",
    "```{list-table} Rows\n:header-rows: 1\n* - a\n  - b\n* - {term}`c`\n  - d\n    e\n```": "*Rows*\n\n| a | b |\n| --- | --- |\n| c | d e |",
    "```{glossary}\ncache\n  A {term}`store`.\n\nlog\n  A list.\n```": "- **cache**: A store.\n- **log**: A list.",
    "```{figure} picture.svg\n:alt: a square\n:name: fig-a\nThe {term}`square`.\n```\n\n{numref}`fig-a`, {numref}`picture %s <fig-a>`": "![a square](data:image/svg+xml;base64,PHN2Zy8+)\n\n**Figure 1.** The square.\n\nFigure 1, picture 1",
    "![a {term}`square`](picture.svg){.wide}": "![a {term}`square`](data:image/svg+xml;base64,PHN2Zy8+)",
    "\\begin{align}\na &= b\n\\end{align}": "$$\n\\begin{align}\na &= b\n\\end{align}\n$$",
}


@pytest.mark.parametrize("source", DIRECTIVES)
def test_directives(turned, source):
    assert turned(source) == DIRECTIVES[source]


def test_numbers_run_through_the_chapter(turned):
    start = "```{{exercise-start}} {0}\n:label: ex-{0}\n```"
    assert turned(
        "See {ref}`ex-b`, {eq}`eq-b` and [](later).",
        f"{start.format('a')}\n\n$$ a $$ (eq-a)",
        f"{start.format('b')}\n\n$$\nb\n$$ (eq-b)",
        "(later)=\n## A {term}`later` word",
    ).split("\n====\n") == [
        "See Exercise 2, (2) and *A later word*.",
        "**Exercise 1: a**\n\n$$\na\n\\tag{1}\n$$",
        "**Exercise 2: b**\n\n$$\nb\n\\tag{2}\n$$",
        "## A later word",
    ]


def test_figures_get_their_captions(book):
    figure = {"mystnb": {"figure": {"name": "fig-a", "caption": "It falls, says {cite:t}`team2025`."}}}
    cells = [
        new_markdown_cell("Look at {numref}`fig-a`."),
        new_code_cell("plot()", metadata=figure, id="drawn"),
    ]
    first, drawn, caption = plain.plain_cells(Notebook(book, new_notebook(cells=cells)))
    assert first.source == "Look at Figure 1." and drawn.source == "plot()"
    assert caption.source == "**Figure 1.** It falls, says The Team (2025)."
    assert caption.id == "drawn-caption"


def test_with_an_address_pages_and_words_are_links(turned, book):
    (book.parents[2] / "_config.yml").write_text("html:\n  baseurl: https://example.org/book")
    assert turned("{doc}`/book/part`, {term}`Caches <key cache>`, [there](part)") == (
        "[The first part](https://example.org/book/book/part.html), "
        "[Caches](https://example.org/book/book/glossary.html#term-key-cache), "
        "[there](https://example.org/book/book/part.html#part)"
    )


REFUSED = {
    "{unheard}`of`": "has a role {unheard}, of which no plain form is known",
    "```{unheard}\n```": "has a directive {unheard}, of which no plain form is known",
    "```{note}\n{unheard}`of`\n```": "has a role {unheard}",
    "```{note}\n:unheard: of\n```": "has a directive {note} that cannot be read: Unknown option keys",
    "{cite:p}`nobody2020`": "cites nobody2020, which is not in references.bib",
    "{doc}`/book/nothing`": "refers to the page book/nothing, which the book does not have",
    "[](nothing)": "refers to the page notebooks/part/nothing",
    "{eq}`eq-nothing`": "refers to the equation eq-nothing",
    "(bare)=\n\nText, and {ref}`bare`": "refers to bare, which names no heading",
    "![a](nothing.png)": "shows the picture nothing.png, which is not there",
    "<img src='picture.svg'>": "has a picture in HTML",
    "```{literalinclude} ../../library/none.py\n```": "shows source that is not there",
    "```{literalinclude} ../../library/code.py\n:pyobject: B\n```": "shows source that is not there",
    "A note[^1]\n\n[^1]: below": "holds a footnote",
    "{{ substituted }}": "holds a substitution",
    ":::\nframe\n:::": "has a frame that is no directive",
    "```{list-table}\n* - a\n  - b\n* - c\n```": "has a {list-table} whose rows are not equally long",
    "```{note} A `word`\nText\n```": "has a frame that is not closed, or whose title holds a backtick",
    "```{solution-start} ex-a\n```": "has a directive {solution-start}",
}


@pytest.mark.parametrize("source", REFUSED)
def test_what_is_not_known_is_refused_with_its_cell(turned, source):
    with pytest.raises(ValueError) as error:
        turned("Fine.", source)
    assert f"topic.ipynb: cell 2 {REFUSED[source]}" in str(error.value)


def test_a_card_without_a_run_is_refused(book):
    nb = new_notebook(cells=[new_markdown_cell("```{measured}\n```")])
    with pytest.raises(ValueError, match="cell 1 shows what its run cost, but it was never run"):
        plain.plain_cells(Notebook(book, nb))


RAW = [
    "```{note}\n```", "x {term}`a`", "(label)=\n# Title", "{.lead}\nText", ":::{note}\n:::", "{{ x }}", "a[^1]",
    "- {cite:p}`a`", "> | {term}`a` |\n> |---|", "$$\nx\n$$ (eq-a)", "[a]{.red}", "% remark",
]  # fmt: skip


@pytest.mark.parametrize("source", RAW)
def test_the_gate_sees_what_is_raw(source):
    assert list(_raw(source))


@pytest.mark.parametrize("source", STAYS)
def test_the_gate_lets_pass_what_is_plain(source):
    assert not list(_raw(source))


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_no_chapter_leaves_anything_raw(path, tmp_path):
    """And all lines that hold nothing of the book's own stay as they are."""
    notebook = Notebook.read(path)
    copy = student_copy(notebook, tmp_path / path.name)
    texts = [cell.source for cell in copy.nb.cells if cell.cell_type == "markdown"]
    assert [raw for text in texts for raw in _raw(text)] == []
    lines = {line.removeprefix("> ") for text in texts for line in text.split("\n")}
    own = re.compile(r"^[`:]{3}|^:|\{|\]\(|\)=$|^\$\$|^\*.*\*$")
    kept = [
        line
        for cell in _without_solutions(notebook.nb.cells)
        if cell.cell_type == "markdown"
        for line in cell.source.split("\n")
        if not own.search(line)
    ]
    assert len(kept) > 100 and {line.rstrip() for line in kept} <= {line.rstrip() for line in lines}


def test_the_examples_hold():
    assert doctest.testmod(plain).failed == 0
