"""The book's Markdown in plain Markdown: every form it has, what must stay as it is, what must be refused."""

import doctest
import re
from pathlib import Path

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from minicpm_lite.lab.press import plain
from minicpm_lite.lab.press.notebook import Notebook, find, tags
from minicpm_lite.lab.press.student import student_copy

CHAPTERS = find([Path(__file__).parents[3] / "notebooks"])


def turned(*sources: str) -> str:
    """Markdown sources, each a cell, as plain ones."""
    nb = new_notebook(cells=[*map(new_markdown_cell, sources)])
    return "\n====\n".join(cell.source for cell in plain.plain_cells(Notebook(Path("topic.ipynb"), nb)))


FORMS = {
    "a {term}`cache`": "a cache",
    "{term}`Caches <cache>`": "Caches",
    "{class}`a.b.C` and {func}`a.f`, {meth}`b.C.d` of {mod}`a`": "`a.b.C` and `a.f`, `b.C.d` of `a`",
    "over two\n{term}`lines\nlong <line>` here": "over two\nlines\nlong here",
    "- in {term}`a` list\n  - and {term}`b`": "- in a list\n  - and b",
    "> quoted {term}`a`": "> quoted a",
    "| a | b |\n|---|---|\n| {term}`x \\| y` | \\| {term}`c` {term}`c` |": "| a | b |\n|---|---|\n| x \\| y | \\| c c |",
    "# A {term}`title`": "# A title",
    "*{term}`a` and **{term}`b`***": "*a and **b***",
    "`a` {term}`b` $c$ {term}`d` $$e$$ {term}`f` \\$ {term}`g` ``h ` i`` {term}`j`": "`a` b $c$ d $$e$$ f \\$ g ``h ` i`` j",
    "see [there](#part), please": "see there, please",
    "([the {term}`decoder`](../language/decoder.ipynb))": "(the decoder)",
    "([Hu et al., 2024](https://arxiv.org/abs/1))": "([Hu et al., 2024](https://arxiv.org/abs/1))",
    "(x-y)=\n\n# Title": "# Title",
    "*a*\n: means {term}`b`: c\n\n*d: e*\n: f": "*a*<br>\nmeans b: c\n\n*d: e*<br>\nf",
    "$$\na = b\n$$ (eq-a)\n\nBy {eq}`eq-a`": "$$\na = b\n\\tag{1}\n$$\n\nBy (1)",
    ":::{exercise-start} A {term}`title`\n:label: ex-a\n:::\nText\n\n```{exercise-end}\n```": "**Exercise 1: A title**\nText",
    ":::{admonition} At a {term}`glance`\n:class: note\n- one {term}`a`\n\ntwo\n:::": "> **At a glance**\n>\n> - one a\n>\n> two",
    "```{warning}\nBe careful.\n```\nOn.": "> **Warning**\n>\n> Be careful.\nOn.",
    "```{tip} Straight away\n```": "> **Tip**\n>\n> Straight away",
    ":::{admonition} More\n:class: dropdown\nText.\n:::": "<details><summary>More</summary>\n\nText.\n\n</details>",
    "::::{note}\n:::{important}\nInside.\n:::\n::::": "> **Note**\n>\n> > **Important**\n> >\n> > Inside.",
    "```{note}\n$$\na\n= b\n$$\n```": "> **Note**\n>\n> $$ a = b $$",
}


@pytest.mark.parametrize("source", FORMS)
def test_what_the_book_has(source):
    assert turned(source) == FORMS[source]


STAYS = [
    "`{term}` and ``{term}`a` `` and \\{term\\} and $x_{term}`$",
    "```python\nx = {term}`a`\n(label)=\n```",
    "    {term}`indented code`",
    "$$\n\\text{lr}(s) = \\begin{cases} a \\\\ b \\end{cases}\n$$",
    '<details class="hint"><summary>Hint: how</summary>\n\nUse `x`, *W*<sup>*K*</sup>.\n\n</details>',
    "1. one\n2. two\n\n---\n\n![a](https://example.org/a.png)",
    "A $\\{a\\}$ set {a} of (b)= things: 100 % of it",
]


@pytest.mark.parametrize("source", STAYS)
def test_what_is_plain_stays_as_it_is(source):
    assert turned(source) == source


def test_numbers_run_through_the_chapter():
    start = "```{{exercise-start}} {0}\n:label: ex-{0}\n```"
    assert turned(
        "See {eq}`eq-c` and {eq}`eq-b`.",
        f"{start.format('a')}\n\n$$ a $$ (eq-a)",
        f"{start.format('b')}\n\n:::{{note}}\n$$\nb\n$$ (eq-b)\n:::",
        "$$\nc\n$$ (eq-c)",
    ).split("\n====\n") == [
        "See (3) and (2).",
        "**Exercise 1: a**\n\n$$ a\n\\tag{1}\n$$",
        "**Exercise 2: b**\n\n> **Note**\n>\n> $$ b \\tag{2} $$",
        "$$\nc\n\\tag{3}\n$$",
    ]


def test_figures_get_their_captions():
    figure = {"mystnb": {"figure": {"name": "fig-a", "caption": "The {term}`loss` falls."}}}
    cells = [new_code_cell("plot()", metadata=figure, id="drawn"), new_code_cell("1")]
    drawn, caption, code = plain.plain_cells(Notebook(Path("topic.ipynb"), new_notebook(cells=cells)))
    assert (drawn.source, caption.source, code.source) == ("plot()", "The loss falls.", "1")
    assert caption.id == "drawn-caption"


REFUSED = {
    "{unheard}`of`": "holds '{unheard}`of`', of which no plain form is known",
    "{cite:p}`hu2024`": "holds '{cite:p}`hu2024`'",
    "```{unheard} of\n```": "holds '{unheard} of'",
    "```{note}\n{unheard}`of`\n```": "holds '{unheard}`of`'",
    "- in a list\n\n  ```{note}\n  Text.\n  ```": "holds '{note}'",
    ":::{solution} ex-a\nText.\n:::": "holds ':::{solution} ex-a'",
    ":::\nframe\n:::": "holds ':::'",
    "{eq}`eq-nothing`": "refers to the equation eq-nothing, which this chapter does not have",
    "{.lead}\nText": "holds '{.lead}'",
    "[words]{.red}": "holds ']{.'",
    "A note[^1]": "holds '[^1]'",
    "{{ substituted }}": "holds '{{ substituted }}'",
    "% remark": "holds '% remark'",
    "+++": "holds '+++'",
}


@pytest.mark.parametrize("source", REFUSED)
def test_what_is_not_known_is_refused_with_its_cell(source):
    with pytest.raises(ValueError) as error:
        turned("Fine.", source)
    assert f"topic.ipynb: cell 2 {REFUSED[source]}" in str(error.value)


RAW = [
    "```{note}\n```", "x {term}`a`", "(label)=\n# Title", "{.lead}\nText", ":::{note}\n:::", "{{ x }}", "a[^1]",
    "- {term}`a`", "> | {term}`a` |\n> |---|", "$$\nx\n$$ (eq-a)", "[a]{.red}", "% remark", "a\n: b",
]  # fmt: skip


@pytest.mark.parametrize("source", RAW)
def test_what_is_raw_is_seen(source):
    assert list(plain.raw(source))


@pytest.mark.parametrize("source", STAYS)
def test_what_is_plain_is_let_pass(source):
    assert not list(plain.raw(source))


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_no_chapter_leaves_anything_raw(path, tmp_path):
    """And all lines that hold nothing of the book's own stay as they are."""
    notebook = Notebook.read(path)
    copy = student_copy(notebook, tmp_path / path.name)
    texts = [cell.source for cell in copy.nb.cells if cell.cell_type == "markdown"]
    assert [found for text in texts for found in plain.raw(text)] == []
    lines = {line.removeprefix("> ") for text in texts for line in text.split("\n")}
    own = re.compile(r"^[`:]{3}|^:|\{|\]\(|\)=$|^\$\$|^\*.*\*$")
    kept = [
        line
        for cell in notebook.nb.cells
        if cell.cell_type == "markdown" and "solution" not in tags(cell)
        for line in cell.source.split("\n")
        if not own.search(line)
    ]
    assert len(kept) > 100
    assert {line.rstrip().removeprefix("> ") for line in kept} <= {line.rstrip() for line in lines}


def test_the_examples_hold():
    assert doctest.testmod(plain).failed == 0
