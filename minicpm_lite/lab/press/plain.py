"""The book's Markdown as plain Markdown, for a reader whom no Sphinx helps: Jupyter, Colab, VS Code, GitHub.

The book's own parser says where roles, directives, labels and links stand, so that code and mathematics are
never touched; the rest of a cell stays as its author wrote it. What becomes of each is written in `_Cell`:

- a citation gets names and year from the bibliography, and a link to the paper;
- a page of the book is a link if the site has an address (``baseurl`` in ``_config.yml``), else its title;
- equations, figures and exercises are numbered through the chapter, and references say the number;
- a box becomes a quotation with a title, a folded one ``<details>``; shown source becomes a code block; a
  figure gets its caption in a cell of its own, and a picture stands in the text itself.

What is not known is an error that names its cell: nothing is passed through raw.
"""

import mimetypes
import os
import re
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

import yaml

from ...optional import require
from .notebook import Notebook, nbformat

_BOOK = {"install": "minicpm_lite[book]", "purpose": "turn the book's Markdown into plain Markdown"}
_pybtex = require("pybtex.database", **_BOOK)
_richtext = require("pybtex.richtext", **_BOOK)
_markdown_it = require("markdown_it", **_BOOK)
_myst_config = require("myst_parser.config.main", **_BOOK)
_myst_mdit = require("myst_parser.parsers.mdit", **_BOOK)
_myst_directives = require("myst_parser.parsers.directives", **_BOOK)
_docutils = require("docutils.parsers.rst", **_BOOK)
_sphinx_code = require("sphinx.directives.code", **_BOOK)
_sphinx_config = require("sphinx.config", **_BOOK)

_EXTENSIONS = {"amsmath", "colon_fence", "deflist", "dollarmath", "substitution", "attrs_inline"}
# Blocks and pieces of text that any reader of Markdown shows.
_PLAIN_BLOCKS = {
    "inline", "paragraph", "heading", "blockquote", "bullet_list", "ordered_list", "list_item", "code_block",
    "hr", "html_block", "math_block", "table", "thead", "tbody", "tr", "th", "td", "dl",
}  # fmt: skip
_PLAIN_TEXT = {
    "text", "text_special", "softbreak", "hardbreak", "code_inline", "math_inline", "em", "strong", "link",
    "html_inline", "image", "span", "myst_role",
}  # fmt: skip
_BOXES = {
    "attention", "caution", "danger", "error", "hint", "important", "note", "seealso", "tip", "warning",
}  # fmt: skip
_ATTRIBUTES = re.compile(r"\{[.#:%][^{}\n]*\}")
_TITLED = re.compile(r"(?P<title>.+?)\s*<(?P<target>[^<>]+)>", re.DOTALL)
_CITED = re.compile(r"(?:\{(?P<before>[^{}]*)\})?(?P<key>[^{},\s]+)(?:\{(?P<after>[^{}]*)\})?\s*(?:,\s*|$)")
_LABEL = re.compile(r"^\((?P<label>[^()\n]+)\)=$(?:\n+#+ +(?P<title>.+))?", re.MULTILINE)
_ADDRESS = re.compile(r"(?:https?|mailto|data|attachment):")
_PICTURE_IN_HTML = "has a picture in HTML, whose file would stay behind: write ![what it shows](file)"
_LOCAL_IMAGE = re.compile(r"<img\b[^>]*\ssrc=[\"']?(?!data:|https?:)", re.IGNORECASE)


def plain_cells(notebook: Notebook) -> list[nbformat.NotebookNode]:
    """The notebook's cells with plain Markdown, and the captions of its figures.

    Raises:
        ValueError: a cell holds what cannot be said in plain Markdown, or refers to what is not there.
    """
    chapter = _Chapter.of(notebook)
    cells = []
    for number, cell in enumerate(notebook.nb.cells, start=1):
        with _named(notebook, number):
            if cell.cell_type != "markdown":
                cells.append(cell)
                cells += chapter.caption(cell)
            elif text := chapter.plain(cell.source):
                cells.append(nbformat.from_dict(cell | {"source": text}))
    return cells


def frames(source: str) -> Iterator[tuple[str, int, int]]:
    """The directives that stand in a Markdown source, not in another one: name, first line, line behind it.

    >>> list(frames("Text\\n\\n```{note}\\nA word.\\n```"))
    [('note', 2, 5)]
    """
    for token in _blocks(source):
        if name := _directive_name(token):
            yield name, *token.map


def cost(record: dict) -> tuple[str, str]:
    """Minutes and peak memory of a run as text.

    >>> cost({"seconds": 75, "peak_memory_mb": 1234.5})
    ('1.2 min', '1,234 MB')
    >>> cost({"seconds": 12, "peak_memory_mb": 99})
    ('12 s', '99 MB')
    """
    seconds = record["seconds"]
    time = f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"
    return time, f"{record['peak_memory_mb']:,.0f} MB"


def measured(record: dict) -> str:
    """What the last run of a notebook cost, from its record, as the card of a chapter says it.

    Raises:
        ValueError: it was not measured.

    >>> measured({"seconds": 75, "peak_memory_mb": 1234, "device": "CPU, 2 cores"})
    '**1.2 min** and **1,234 MB** of memory at its peak, measured on CPU, 2 cores.'
    """
    if not record.keys() >= {"seconds", "peak_memory_mb", "device"}:
        raise ValueError("shows what its run cost, but it was never run")
    time, memory = cost(record)
    return f"**{time}** and **{memory}** of memory at its peak, measured on {record['device']}."


@contextmanager
def _named(notebook: Notebook, number: int) -> Iterator[None]:
    """Say in errors which cell they are about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{notebook.path}: cell {number} {error}.") from None


@dataclass(frozen=True)
class _Book:
    """What a chapter may refer to: the pages of the book and its bibliography."""

    root: Path

    @classmethod
    def around(cls, path: Path) -> "_Book":
        """The book that a notebook belongs to; its own folder if there is none above it."""
        path = path.absolute()
        return cls(next((folder for folder in path.parents if (folder / "_toc.yml").exists()), path.parent))

    @cached_property
    def address(self) -> str | None:
        """Where the site is, with a slash at the end, if that was decided."""
        config = self.root / "_config.yml"
        values = yaml.safe_load(config.read_text("utf-8")) if config.exists() else {}
        address = values.get("html", {}).get("baseurl")
        return address and address.rstrip("/") + "/"

    @cached_property
    def bibliography(self) -> dict:
        file = self.root / "book" / "references.bib"
        return dict(_pybtex.parse_file(str(file)).entries) if file.exists() else {}

    @cached_property
    def labels(self) -> dict[str, tuple[str, str]]:
        """From a label anywhere in the book to its page and the words of the heading below it."""
        found = {}
        for page in [*self.root.glob("book/**/*.md"), *self.root.glob("notebooks/*/*.ipynb")]:
            name = page.relative_to(self.root).with_suffix("").as_posix()
            for match in _LABEL.finditer(_text_of(page)):
                found[match["label"]] = name, _words(match["title"] or "")
        return found

    def title(self, page: str) -> str:
        """The title of a page, given by its path from the root without an ending."""
        for file in (self.root / f"{page}.ipynb", self.root / f"{page}.md"):
            if file.exists():
                heading = re.search(r"^# +(.+)", _text_of(file), re.MULTILINE)
                return _words(heading[1] if heading else file.stem)
        raise ValueError(f"refers to the page {page}, which the book does not have")

    def link(self, words: str, page: str, anchor: str = "") -> str:
        """Words that lead to a page, where the site has an address; else words that name it."""
        if not self.address:
            return f"*{words}*"
        return f"[{words}]({self.address}{page}.html{anchor and '#' + anchor})"

    def cite(self, keys: str, textual: bool) -> str:
        """Citations, as names and years: "Hu et al. (2024, section 4)", or all of it in brackets."""
        cited = [self._cited(match, textual) for match in _CITED.finditer(keys)]
        return ", ".join(cited) if textual else f"({'; '.join(cited)})"

    def _cited(self, match: re.Match, textual: bool) -> str:
        if match["key"] not in self.bibliography:
            raise ValueError(f"cites {match['key']}, which is not in references.bib")
        entry = self.bibliography[match["key"]]
        people = entry.persons.get("author") or entry.persons.get("editor", [])
        latex = [" ".join([*each.prelast_names, *each.last_names]) for each in people]
        names = [str(_richtext.Text.from_latex(name)) for name in latex]
        if len(names) > 2 or "others" in names:
            names = [names[0], "et al."]
        elif len(names) == 2:
            names.insert(1, "and")
        who, year = " ".join(names), entry.fields["year"]
        before = f"{match['before']} " if match["before"] else ""
        after = f", {match['after']}" if match["after"] else ""
        url = entry.fields.get("url")
        linked = (lambda words: f"[{words}]({url})") if url else str
        if textual:
            return f"{before}{linked(who)} ({year}{after})"
        return f"{before}{linked(f'{who}, {year}')}{after}"


@dataclass
class _Chapter:
    """A notebook in its book, and the words for what its labels stand for."""

    notebook: Notebook
    book: _Book
    labels: dict[str, str] = field(default_factory=dict)  # "Figure 2", "Exercise 1", "(3)", a heading

    @classmethod
    def of(cls, notebook: Notebook) -> "_Chapter":
        chapter = cls(notebook, _Book.around(notebook.path))
        for number, cell in enumerate(notebook.nb.cells, start=1):
            if cell.cell_type == "markdown":
                with _named(notebook, number):
                    chapter._note_labels(cell.source)
            elif name := _figure(cell).get("name"):
                chapter._count("Figure", name)
        return chapter

    def plain(self, source: str) -> str:
        """A Markdown source in plain Markdown."""
        return _Cell(self, source).plain().strip("\n")

    def caption(self, cell: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
        """The caption of what a cell draws, as a cell, if it has one."""
        figure = _figure(cell)
        if "caption" not in figure:
            return []
        name = self.labels.get(figure.get("name"))
        text = f"**{name}.** " * bool(name) + self.plain(figure["caption"])
        return [nbformat.v4.new_markdown_cell(text, id=f"{cell.get('id', 'figure')[:50]}-caption")]

    def _note_labels(self, source: str) -> None:
        for match in _LABEL.finditer(source):
            self.labels[match["label"]] = _words(match["title"] or "")
        for token in _blocks(source):
            if token.type == "math_block_label":
                self._count_equation(token.info)
            elif name := _directive_name(token):
                parts = _Directive.read(name, token)
                label = parts.options.get("label") or parts.options.get("name")
                if name == "math" and label:
                    self._count_equation(label)
                elif name in ("exercise-start", "exercise"):
                    self._count("Exercise", label or f"exercise without a label {len(self.labels)}")
                elif name == "figure" and label:
                    self._count("Figure", label)
                elif name not in ("literalinclude", "math"):
                    self._note_labels("\n".join(parts.body))

    def _count(self, kind: str, label: str) -> None:
        number = 1 + sum(words.startswith(f"{kind} ") for words in self.labels.values())
        self.labels[label] = f"{kind} {number}"

    def _count_equation(self, label: str) -> None:
        self.labels[label] = f"({1 + sum(words[:1] == '(' for words in self.labels.values())})"


class _AnyDirective(_docutils.Directive):
    """What the book writes into a directive; another option is an error."""

    has_content, optional_arguments, final_argument_whitespace = True, 1, True
    option_spec = dict.fromkeys(
        ["align", "alt", "caption", "class", "emphasize-lines", "figwidth", "header-rows", "height", "hidden",
         "icon", "label", "language", "lineno-start", "linenos", "name", "nonumber", "open", "scale",
         "sorted", "width", "widths"],
        str,
    )  # fmt: skip


@dataclass(frozen=True)
class _Directive:
    """A directive: what stands behind its name, its options, and the lines below them."""

    argument: str
    options: dict
    body: list[str]

    @classmethod
    def read(cls, name: str, token: "_markdown_it.token.Token") -> "_Directive":
        kind = _sphinx_code.LiteralInclude if name == "literalinclude" else _AnyDirective
        first_line = token.info.strip().partition("}")[2].strip()
        try:
            parsed = _myst_directives.parse_directive_text(kind, first_line, token.content)
        except _docutils.states.MarkupError as error:
            raise ValueError(f"has a directive {{{name}}} that cannot be read: {error}") from None
        if parsed.warnings:
            raise ValueError(f"has a directive {{{name}}} that cannot be read: {parsed.warnings[0].msg}")
        return cls(" ".join(parsed.arguments), parsed.options, parsed.body)


class _Cell:
    """One Markdown source, read by the book's parser, and the changes that make it plain."""

    def __init__(self, chapter: _Chapter, source: str) -> None:
        self.chapter, self.book = chapter, chapter.book
        self.source = source.replace("\r\n", "\n")
        self.lines = self.source.split("\n")
        self.starts = [0]
        for line in self.lines:
            self.starts.append(self.starts[-1] + len(line) + 1)
        self.columns = [0] * len(self.lines)  # up to where a line of a table was read
        self.changes: list[tuple[int, int, str]] = []  # from and to where in the source, and by what

    def plain(self) -> str:
        for token in _blocks(self.source):
            self._block(token)
        text, done = "", 0
        for start, end, new in sorted(self.changes):
            text += self.source[done:start] + new
            done = end
        return text + self.source[done:]

    # Blocks

    def _block(self, token: "_markdown_it.token.Token") -> None:
        kind = token.type.removesuffix("_open").removesuffix("_close")
        if name := _directive_name(token):
            self._replace(token, self._directive(name, _Directive.read(name, token)))
        elif kind in ("fence", "colon_fence"):
            if token.info.strip().startswith("{") or kind == "colon_fence":
                raise ValueError(f"has a frame that is no directive: {token.info.strip() or ':::'}")
        elif kind in ("myst_target", "myst_line_comment", "myst_block_break"):
            self._replace(token, "")
        elif kind == "math_block_label":
            self._replace(token, self._equation(token.content, token.info))
        elif kind == "amsmath":
            self._replace(token, f"$$\n{token.content}\n$$")
        elif token.type == "dt_open":  # a word and, on the next line, what it means
            end = self.starts[token.map[0] + 1] - 1
            self.changes.append((end, end, "<br>"))
        elif token.type == "dd_open":
            colon = self.source.index(":", self.starts[token.map[0]])
            self.changes.append((colon, colon + 2, ""))
        elif kind == "html_block" and _LOCAL_IMAGE.search(token.content):
            raise ValueError(_PICTURE_IN_HTML)
        elif kind not in _PLAIN_BLOCKS and kind not in ("dt", "dd"):
            raise ValueError(f"holds a {kind.replace('_', ' ')}, which plain Markdown does not have")
        if token.type == "inline":
            self._text(token)

    def _replace(self, token: "_markdown_it.token.Token", new: str) -> None:
        """Put a text in the place of a block, in the list or quotation in which that stands."""
        first, last = token.map
        if token.type == "amsmath":  # whose last line the parser leaves out
            last = first + token.content.count("\n") + 1
        margin = re.match(r"[\s>]*(?:(?:[-*+]|\d+[.)])\s+)*[\s>]*", self.lines[first])[0]
        further = re.sub(r"[^\s>]", " ", margin)
        while last > first + 1 and not self.lines[last - 1].strip():
            last -= 1
        text = f"\n{further}".join(new.split("\n"))
        end = self.starts[last] - 1 if new else min(self.starts[last], len(self.source))
        self.changes.append((self.starts[first] + len(margin), end, text))

    def _directive(self, name: str, parts: _Directive) -> str:
        title, body = parts.argument, "\n".join(parts.body)
        if name not in _VERBATIM:
            title, body = self.chapter.plain(title), self.chapter.plain(body)
        folded = "dropdown" in parts.options.get("class", "")
        match name:
            case "exercise-start" | "exercise":
                number = self.chapter.labels.get(parts.options.get("label"), "Exercise")
                heading = f"**{number}: {title}**" if title else f"**{number}**"
                return f"{heading}\n\n{body}".rstrip()
            case "exercise-end":
                return ""
            case "admonition" | "dropdown" | "margin" | "sidebar" | "topic":
                return self._box(title, body, folded or name == "dropdown")
            case _ if name in _BOXES:
                named = "See also" if name == "seealso" else name.capitalize()
                return self._box(named, "\n\n".join(filter(None, [title, body])), folded)
            case "measured":
                return measured(self.chapter.notebook.record)
            case "literalinclude":
                return self._shown_source(parts)
            case "code-block" | "code" | "sourcecode":
                return _fenced(body, parts.argument)
            case "math":
                label = parts.options.get("label") or parts.options.get("name")
                return self._equation("\n".join(filter(None, [parts.argument, body])), label)
            case "figure" | "image":
                return self._picture(parts, body)
            case "list-table":
                return self._table(parts)
            case "table":
                return "\n\n".join(filter(None, [f"*{title}*" if title else "", body]))
            case "glossary":
                return self._glossary(parts.body)
        raise ValueError(f"has a directive {{{name}}}, of which no plain form is known")

    def _box(self, title: str, body: str, folded: bool) -> str:
        if folded:
            return f"<details><summary>{title}</summary>\n\n{body}\n\n</details>"
        for token in reversed(_blocks(body)):
            if token.type == "math_block":  # Jupyter would read the marks of the quotation as mathematics
                lines = body.split("\n")
                lines[slice(*token.map)] = [" ".join(lines[slice(*token.map)])]
                body = "\n".join(lines)
        return "\n".join(f"> {line}".rstrip() for line in f"**{title}**\n\n{body}".rstrip().split("\n"))

    def _shown_source(self, parts: _Directive) -> str:
        file = self._beside(parts.argument)
        reader = _sphinx_code.LiteralIncludeReader(str(file), parts.options, _sphinx_config.Config())
        try:
            text, _ = reader.read()
        except (OSError, ValueError) as error:
            raise ValueError(f"shows source that is not there: {error}") from None
        language = parts.options.get("language") or {".py": "python"}.get(file.suffix, "")
        return _fenced(text.strip("\n"), language)

    def _equation(self, content: str, label: str | None) -> str:
        tag = f"\n\\tag{{{self.chapter.labels[label].strip('()')}}}" if label else ""
        return f"$$\n{content.strip()}{tag}\n$$"

    def _picture(self, parts: _Directive, caption: str) -> str:
        image = f"![{parts.options.get('alt', '')}]({self._embedded(parts.argument)})"
        name = self.chapter.labels.get(parts.options.get("name") or parts.options.get("label"))
        text = " ".join(filter(None, [f"**{name}.**" if name else "", self.chapter.plain(caption)]))
        return f"{image}\n\n{text}".rstrip()

    def _table(self, parts: _Directive) -> str:
        """Rows are the items of a list, and cells the items of the lists in it."""
        rows: list[list[str]] = []
        for line in parts.body:
            if line.startswith(("* - ", "- - ", "- * ", "* * ")):
                rows.append([line[4:]])
            elif re.match(r"  [*-] ?", line):
                rows[-1].append(line[4:])
            elif line.strip():
                rows[-1][-1] += " " + line.strip()
        if not rows or len({len(row) for row in rows}) > 1:
            raise ValueError("has a {list-table} whose rows are not equally long")
        plain = [[self.chapter.plain(text.strip()).replace("\n", " ") for text in row] for row in rows]
        header = plain.pop(0) if parts.options.get("header-rows") else [""] * len(plain[0])
        table = [header, ["---"] * len(header), *plain]
        title = f"*{self.chapter.plain(parts.argument)}*\n\n" if parts.argument else ""
        return title + "\n".join(f"| {' | '.join(row)} |" for row in table)

    def _glossary(self, lines: Iterable[str]) -> str:
        words: list[list[str]] = []
        for line in filter(str.strip, lines):
            if line[0].isspace():
                words[-1].append(line.strip())
            else:
                words.append([line.strip()])
        return "\n".join(f"- **{word}**: {self.chapter.plain(' '.join(text))}" for word, *text in words)

    # Text

    def _text(self, inline: "_markdown_it.token.Token") -> None:
        content, children, spans = inline.content, [], []
        _parser().inline.parse(content, _parser(), {_SPANS: (children, spans)}, children)
        if content.startswith(("```{", ":::")):
            raise ValueError("has a frame that is not closed, or whose title holds a backtick")
        places = self._places(inline)
        for child in children:
            kind = child.type.removesuffix("_open").removesuffix("_close")
            if kind not in _PLAIN_TEXT:
                raise ValueError(f"holds a {kind.replace('_', ' ')}, which plain Markdown does not have")
            if kind == "html_inline" and _LOCAL_IMAGE.search(child.content):
                raise ValueError(_PICTURE_IN_HTML)
        if attributes := re.match(rf"{_ATTRIBUTES.pattern}(?:\n|$)", content):
            self._change(places, 0, attributes.end(), "")
        for kind, start, end, made, closing in spans:
            match kind:
                case "myst_role":
                    self._change(places, start, end, self._role(made.meta["name"], made.content))
                case "attr":
                    self._change(places, start, end, "")
                case "span":
                    self._change(places, start, start + 1, "")
                    self._change(places, closing, end, "")
                case "image":
                    source = made.attrs["src"]
                    if not _ADDRESS.match(source):
                        text = content[start:closing]
                        self._change(places, start, end, f"{text}]({self._embedded(source)})")
                case "link":
                    self._link(places, content, start, end, made.attrs["href"], closing)

    def _places(self, inline: "_markdown_it.token.Token") -> list[int]:
        """For each character of a text, and the place behind it, where it stands in the source."""
        places = []
        for number, line in enumerate(inline.content.split("\n"), start=inline.map[0]):
            begin = self.lines[number].find(line, self.columns[number])
            step = [1] * len(line)
            if begin < 0:  # in a table, where the parser takes the backslash from before a bar
                begin = self.lines[number].find(line.replace("|", r"\|"), self.columns[number])
                step = [2 if letter == "|" else 1 for letter in line]
            if begin < 0:
                raise ValueError(f"has a line whose text cannot be found again: {line!r}")
            place = self.starts[number] + begin
            for width in step:
                places.append(place)
                place += width
            places.append(place)  # the end of the line
            self.columns[number] = place - self.starts[number]
        return places

    def _change(self, places: list[int], start: int, end: int, new: str) -> None:
        self.changes.append((places[start], places[end - 1] + 1 if end > start else places[start], new))

    def _link(self, places: list[int], content: str, start: int, end: int, target: str, closing: int) -> None:
        words = content[start + 1 : closing]
        if _ADDRESS.match(target):
            return
        made = self._reference(target.removeprefix("#"), words)
        if words and not made.startswith("["):
            self._change(places, start, start + 1, "")
            self._change(places, closing, end, "")
        else:
            self._change(places, start, end, made)

    def _reference(self, target: str, words: str) -> str:
        """What a link says: to a label of the chapter or of another page, or to a page."""
        if target in self.chapter.labels:
            named = self.chapter.labels[target]
            if not (words or named):
                raise ValueError(f"refers to {target}, which names no heading, without words of its own")
            return words or (named if re.match(r"\(|(Figure|Exercise) \d", named) else f"*{named}*")
        if target in self.book.labels:
            page, title = self.book.labels[target]
            return self.book.link(words or title or self.book.title(page), page, target)
        page = self._page(re.sub(r"\.(ipynb|md)(#.*)?$", "", target))
        return self.book.link(words or self.book.title(page), page)

    def _page(self, target: str) -> str:
        """A page's path from the root, from one that begins there (``/book/x``) or beside the chapter."""
        here = self.chapter.notebook.path.absolute().parent
        place = self.book.root / target.lstrip("/") if target.startswith("/") else here / target
        page = os.path.relpath(place, self.book.root)
        self.book.title(page)  # refuses a page that is not there
        return page

    def _role(self, name: str, text: str) -> str:
        titled = _TITLED.fullmatch(text)
        title, target = (titled["title"], titled["target"]) if titled else ("", text)
        match name.removeprefix("py:"):
            case "term":
                slug = re.sub(r"[^a-zA-Z0-9]+", "-", target).strip("-")
                words = title or text
                return self.book.link(words, "book/glossary", f"term-{slug}") if self.book.address else words
            case "cite:p" | "cite":
                return self.book.cite(text, textual=False)
            case "cite:t":
                return self.book.cite(text, textual=True)
            case "doc":
                page = self._page(target)
                return self.book.link(title or self.book.title(page), page)
            case "ref" | "numref":
                named = self._reference(target, "" if name == "numref" else title)
                return (
                    re.sub(r"%s|\{number\}", named.split()[-1], title)
                    if name == "numref" and title
                    else named
                )
            case "eq":
                if target not in self.chapter.labels:
                    raise ValueError(f"refers to the equation {target}, which this chapter does not have")
                return self.chapter.labels[target]
            case "class" | "func" | "meth" | "mod" | "attr" | "data" | "exc" | "obj":
                short = target.split(".")[-1] if target.startswith("~") else target
                return f"`{title or short.removeprefix('~')}`"
            case "math":
                return f"${text}$"
            case "sub" | "sup" | "kbd":
                return f"<{name}>{text}</{name}>"
            case "abbr":
                return text
            case "code":
                return f"`{text}`"
        raise ValueError(f"has a role {{{name}}}, of which no plain form is known")

    # Files

    def _beside(self, name: str) -> Path:
        return Path(os.path.normpath(self.chapter.notebook.path.absolute().parent / name))

    def _embedded(self, name: str) -> str:
        """A picture beside the chapter as an address that holds it."""
        if _ADDRESS.match(name):
            return name
        file = self._beside(name)
        if not file.is_file():
            raise ValueError(f"shows the picture {name}, which is not there")
        kind = mimetypes.guess_type(file.name)[0] or "application/octet-stream"
        return f"data:{kind};base64,{b64encode(file.read_bytes()).decode()}"


_VERBATIM = {
    "literalinclude",
    "code-block",
    "code",
    "sourcecode",
    "math",
    "list-table",
    "glossary",
    "figure",
    "image",
}
_SPANS = "where the pieces stand"  # in the parser's environment: the tokens of a text, and its spans


@cache
def _parser() -> "_markdown_it.MarkdownIt":
    """The book's parser, which also notes where roles, links, images and attributes begin and end."""
    config = _myst_config.MdParserConfig(enable_extensions=_EXTENSIONS)
    parser = _myst_mdit.create_md_parser(config, _markdown_it.renderer.RendererHTML)
    parser.core.ruler.enableOnly(["normalize", "block"])
    rules = zip(parser.get_active_rules()["inline"], parser.inline.ruler.getRules(""), strict=True)
    for name, rule in list(rules):
        if name in ("myst_role", "link", "image", "attr", "span"):
            parser.inline.ruler.at(name, _noting(name, rule))
    return parser


def _noting(name: str, rule: Callable) -> Callable:
    """A rule of the parser that notes where it applied: kind, start, end, token, where its label ends."""

    def noting(state, silent: bool) -> bool:
        start, before = state.pos, len(state.tokens)
        label = {"link": start, "span": start, "image": start + 1}.get(name)
        closing = state.md.helpers.parseLinkLabel(state, label) if label is not None else -1
        applied = rule(state, silent)
        tokens, spans = state.env.get(_SPANS, (None, None))
        if applied and not silent and state.tokens is tokens:
            made = next((token for token in tokens[before:] if token.type in (name, f"{name}_open")), None)
            spans.append((name, start, state.pos, made, closing))
        return applied

    return noting


def _blocks(source: str) -> list["_markdown_it.token.Token"]:
    return _parser().parse(source)


def _directive_name(token: "_markdown_it.token.Token") -> str | None:
    named = re.match(r"\{([\w:-]+)\}", token.info.strip()) if token.type in ("fence", "colon_fence") else None
    return named[1] if named else None


def _figure(cell: nbformat.NotebookNode) -> dict:
    return cell.metadata.get("mystnb", {}).get("figure", {})


def _fenced(text: str, language: str) -> str:
    fence = "`" * max(3, 1 + max(map(len, re.findall(r"`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


@cache
def _text_of(page: Path) -> str:
    """The Markdown of a page of the book."""
    if page.suffix == ".md":
        return page.read_text("utf-8")
    cells = nbformat.read(page, as_version=4).cells
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def _words(heading: str) -> str:
    """A heading without its markup.

    >>> _words("A {term}`cache <key-value cache>` of *keys*")
    'A cache of keys'
    """
    heading = re.sub(r"\{[\w:-]+\}`([^`<]*?)\s*(?:<[^`]*>)?`", r"\1", heading)
    return re.sub(r"[*_`]+(\S(?:.*?\S)?)[*_`]+", r"\1", heading).strip()
