"""The book's Markdown as plain Markdown, for a reader whom no Sphinx helps: Jupyter, Colab, VS Code, GitHub.

Chapters hold little MyST (the gate ``_reads_everywhere`` says what), and this becomes of it:

- a word of the glossary and a link into the book become words, a name of the library becomes code;
- equations and exercises are numbered through the chapter, and references to equations say the number;
- a box becomes a quotation with a title, a folded one ``<details>``; of an exercise's frame the title stays;
- the caption of a figure, which the book takes from the metadata, gets a cell of its own.

The book's own parser says which lines are text, so that code and mathematics are never touched. What is not
known stays as it is, and `raw` finds it: an error that names its cell.
"""

import re
from collections.abc import Iterator
from functools import cache
from itertools import pairwise

from ...optional import require
from .notebook import Notebook, nbformat

_BOOK = {"install": "minicpm_lite[book]", "purpose": "turn the book's Markdown into plain Markdown"}
_markdown_it = require("markdown_it", **_BOOK)
_myst_config = require("myst_parser.config.main", **_BOOK)
_myst_mdit = require("myst_parser.parsers.mdit", **_BOOK)

_NAMES = ("class", "func", "meth", "mod")
_BOXES = ("admonition", "note", "tip", "warning", "important")
_DIRECTIVE = re.compile(r"\{(?P<name>[\w-]+)\} *(?P<title>.*)")
_OPTION = re.compile(r":(?P<name>[\w-]+): *(?P<value>.*)\n")
_LABELLED = re.compile(r"\s*\$\$ *\([\w-]+\)\s*\Z")
_PIECE = re.compile(
    r"\\.|(?P<ticks>`+)(?!`).*?(?<!`)(?P=ticks)(?!`)|\$\$.+?\$\$|\$(?=\S)[^$]*?(?<=\S)\$"  # these stay
    r"|\{(?P<role>[\w:-]+)\}`(?P<text>[^`]+)`"
    r"|(?<!!)\[(?P<words>(?:[^][]|\[[^][]*\])+)\]\((?!https?:|mailto:)[^()\s]+\)",
    re.DOTALL,
)
_TARGET = re.compile(r"\s*<[^<>]*>\Z")
_RAW_LINE = re.compile(r"\([\w.:-]+\)=|\{[.#][^}]*\}|:{3,}.*|: .*|%.*|\+\+\+.*")
_RAW_ROLE = re.compile(r"\{[\w:-]+\}$")
_RAW_PIECE = re.compile(r"\]\{[.#]|\{\{.*\}\}|\[\^\w+\]|\$ *\([\w.:-]+\)$")


def plain_cells(notebook: Notebook) -> list[nbformat.NotebookNode]:
    """The notebook's cells with plain Markdown, and the captions of its figures.

    Raises:
        ValueError: a cell holds what cannot be said in plain Markdown, or refers to what is not there.
    """
    sources = [cell.source for cell in notebook.nb.cells if cell.cell_type == "markdown"]
    chapter = _Chapter([label for source in sources for label in _equations(source)])
    cells = []
    for number, cell in enumerate(notebook.nb.cells, start=1):
        try:
            if cell.cell_type == "markdown":
                if text := chapter.plain(cell.source):
                    cells.append(nbformat.from_dict(cell | {"source": text}))
                continue
            cells.append(cell)
            if caption := chapter.plain(cell.metadata.get("mystnb", {}).get("figure", {}).get("caption", "")):
                cells.append(nbformat.v4.new_markdown_cell(caption, id=f"{cell.id[:50]}-caption"))
        except ValueError as error:
            raise ValueError(f"{notebook.path}: cell {number} {error}.") from None
    return cells


def raw(source: str) -> Iterator[str]:
    """What plain Markdown would show as it is written: directives, roles, labels, attributes and the like.

    >>> list(raw("A {term}`word` of `{code}`."))
    ['{term}`word`']
    """
    for token in _markdown_it.MarkdownIt("commonmark").enable("table").parse(source):
        if token.type == "fence" and token.info.startswith("{"):
            yield token.info
        elif token.type == "inline":
            yield from (line for line in token.content.split("\n") if _RAW_LINE.fullmatch(line))
            for piece, following in pairwise([*token.children, None]):
                if piece.type == "text" and (found := _RAW_PIECE.search(piece.content)):
                    yield found[0]
                elif (
                    following
                    and following.type == "code_inline"
                    and (found := _RAW_ROLE.search(piece.content))
                ):
                    yield f"{found[0]}`{following.content}`"


class _Chapter:
    """What is numbered through a chapter, and its Markdown with these numbers."""

    def __init__(self, equations: list[str]) -> None:
        self.equations = equations  # labels
        self.exercises = 0  # that were numbered so far

    def plain(self, source: str) -> str:
        """A Markdown source in plain Markdown."""
        text = self._blocks(source.replace("\r\n", "\n")).strip("\n")
        if found := next(raw(text), None):
            raise ValueError(f"holds {found!r}, of which no plain form is known")
        return text

    def _blocks(self, source: str) -> str:
        lines, made, done = source.split("\n"), [], 0
        for token in _parser().parse(source):
            first, last = token.map or (0, 0)
            own = "\n".join(lines[first:last])
            if first < done or (new := self._block(token, own)) is None:
                continue
            made += lines[done:first] + [new] * bool(new)
            done = last
        return "\n".join(made + lines[done:])

    def _block(self, token: "_markdown_it.token.Token", source: str) -> str | None:
        """What takes the place of the lines of a block; None leaves them to the blocks in it."""
        match token.type:
            case "inline":
                return self._text(source)
            case "dl_open":  # words and, on the line below each, what it means
                return re.sub(r"\n: +", "<br>\n", self._text(source))
            case "myst_target":
                return ""
            case "math_block_label":
                return _LABELLED.sub(rf"\n\\tag{{{self._number(token.info)}}}\n$$", source)
            case "fence" | "colon_fence" if source.startswith(token.markup):
                return self._directive(token, source)
        return None

    def _directive(self, token: "_markdown_it.token.Token", source: str) -> str:
        if not (opened := _DIRECTIVE.fullmatch(token.info)):
            return source
        options, content = {}, token.content
        while option := _OPTION.match(content):
            options[option["name"]] = option["value"]
            content = content[option.end() :]
        title, body = self._text(opened["title"]), self._blocks(content).strip("\n")
        match opened["name"]:
            case "exercise-start":
                self.exercises += 1
                return f"**Exercise {self.exercises}: {title}**"
            case "exercise-end":
                return ""
            case name if name in _BOXES:
                heading, lead = (title, "") if name == "admonition" else (name.capitalize(), title)
                body = "\n\n".join(filter(None, [lead, body]))
                if "dropdown" in options.get("class", ""):
                    return f"<details><summary>{heading}</summary>\n\n{body}\n\n</details>"
                return _quoted(f"**{heading}**\n\n{body}".rstrip())
        return source

    def _text(self, source: str) -> str:
        return _PIECE.sub(self._piece, source)

    def _piece(self, match: re.Match) -> str:
        if match["words"]:
            return self._text(match["words"])
        words = _TARGET.sub("", match["text"] or "")
        match match["role"]:
            case "term":
                return words
            case "eq":
                return f"({self._number(words)})"
            case name if name in _NAMES:
                return f"`{words}`"
        return match[0]

    def _number(self, label: str) -> int:
        if label not in self.equations:
            raise ValueError(f"refers to the equation {label}, which this chapter does not have")
        return 1 + self.equations.index(label)


def _equations(source: str) -> Iterator[str]:
    """The labels of equations."""
    for token in _parser().parse(source):
        if token.type == "math_block_label":
            yield token.info
        elif token.type in ("fence", "colon_fence") and _DIRECTIVE.fullmatch(token.info):
            yield from _equations(token.content)


def _quoted(text: str) -> str:
    # Jupyter would take the marks of the quotation for mathematics, so an equation stands in one line.
    text = re.sub(r"\$\$.+?\$\$", lambda equation: equation[0].replace("\n", " "), text, flags=re.DOTALL)
    return "\n".join(f"> {line}".rstrip() for line in text.split("\n"))


@cache
def _parser() -> "_markdown_it.MarkdownIt":
    """The book's parser, as far as it tells blocks apart."""
    config = _myst_config.MdParserConfig(enable_extensions={"colon_fence", "deflist", "dollarmath"})
    parser = _myst_mdit.create_md_parser(config, _markdown_it.renderer.RendererHTML)
    parser.core.ruler.enableOnly(["normalize", "block"])
    return parser
