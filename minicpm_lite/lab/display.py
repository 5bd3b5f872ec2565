"""Words and small tables whose numbers come from the run, and the library's own code."""

import inspect
import re
from collections.abc import Callable, Sequence
from html import escape
from numbers import Integral, Real
from textwrap import dedent

from ..optional import require

display = require(
    "IPython.display", install="minicpm_lite[notebooks]", purpose="use the book's notebooks"
).display

_NUMBER = re.compile(r"[≈~<>≤≥±]?\s?[-+−]?\d")


def say(text: str) -> None:
    """Show Markdown, for prose with numbers: ``lab.say(f"The cache holds **{n:,} bytes**.")``."""
    show(text, markdown=text)


def table(rows: Sequence[Sequence[object]], headers: Sequence[str], caption: str) -> None:
    """Show a small table; columns of numbers are right-aligned.

    Args:
        rows: one sequence a row. Whole numbers get thousands separators, other numbers four significant
            digits; give a string where you want another form.
        headers: one for each column.
        caption: a sentence that says what the table holds, with units.

    Raises:
        ValueError: a row is not as long as the headers.
    """
    cells = [[_cell(value) for value in row] for row in rows]
    for number, row in enumerate(cells, start=1):
        if len(row) != len(headers):
            raise ValueError(
                f"Row {number} has {len(row)} cells; expected {len(headers)}, one for each header."
            )
    numeric = [all(_NUMBER.match(row[column]) for row in cells) for column in range(len(headers))]
    show(
        f"{caption}\n\n{plain_table(cells, headers, numeric)}",
        markdown=f"*{caption}*\n\n{pipe_table(cells, headers, numeric)}",
    )


def source(part: Callable, start: str = "", stop: str = "") -> None:
    """Show code of the library as it is written: ``lab.source(WSD.__call__)``.

    Args:
        part: a function, a method or a class.
        start: words of the first line to show; left out, all from the beginning.
        stop: words of the first line after it that is not shown any more; left out, all to the end.

    Raises:
        ValueError: no line holds these words.
    """
    lines = inspect.getsource(part).splitlines()
    first = _place(start, lines, part) if start else 0
    last = _place(stop, lines, part, after=first) if stop else len(lines)
    code = dedent("\n".join(lines[first:last])).rstrip()
    show(code, markdown=f"From `{part.__module__}`:\n\n```python\n{code}\n```")


def pipe_table(cells: Sequence[Sequence[str]], headers: Sequence[str], numeric: Sequence[bool]) -> str:
    """A Markdown table.

    >>> print(pipe_table([["a|b", "1"]], ["name", "n"], [False, True]))
    | name | n |
    | :--- | ---: |
    | a\\|b | 1 |
    """
    lines = [headers, ["---:" if right else ":---" for right in numeric], *cells]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


def plain_table(cells: Sequence[Sequence[str]], headers: Sequence[str], numeric: Sequence[bool]) -> str:
    """The same table in plain text, in columns.

    >>> print(plain_table([["a", "1"], ["b", "10"]], ["name", "n"], [False, True]))
    name   n
    a      1
    b     10
    """
    widths = [max(map(len, column)) for column in zip(headers, *cells, strict=True)]
    return "\n".join(
        "  ".join(
            f"{cell:>{width}}" if right else f"{cell:<{width}}"
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in [headers, *cells]
    )


def show(text: str, *, markdown: str | None = None, html: str | None = None) -> None:
    """Display one output with its plain text and a richer form."""
    forms = {"text/plain": text, "text/markdown": markdown, "text/html": html}
    display({mime: form for mime, form in forms.items() if form is not None}, raw=True)


def inline_html(text: str) -> str:
    """Plain text as HTML; `` `code` `` in backticks becomes code, a word between stars is stressed.

    >>> inline_html("`x < 1` fails *here*, 2 * 3 * 4")
    '<code>x &lt; 1</code> fails <em>here</em>, 2 * 3 * 4'
    """
    parts = re.split(r"`([^`]+)`", escape(text))
    parts[::2] = (re.sub(r"\*(\w[^*\n]*\w|\w)\*", r"<em>\1</em>", part) for part in parts[::2])
    parts[1::2] = (f"<code>{part}</code>" for part in parts[1::2])
    return "".join(parts)


def _place(words: str, lines: Sequence[str], part: Callable, after: int = -1) -> int:
    found = [number for number in range(after + 1, len(lines)) if words in lines[number]]
    if not found:
        where = f" after {lines[after].strip()!r}" if after >= 0 else ""
        raise ValueError(f"No line of {part.__qualname__}{where} holds {words!r}.")
    return found[0]


def _cell(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, Real):
        return str(value)
    return f"{value:,}" if isinstance(value, Integral) else f"{value:,.4g}"
