"""Tables that a directive makes: every cell is MyST, the whole scrolls inside its own box."""

from docutils import nodes
from docutils.statemachine import StringList


def parse(directive, text: str) -> list[nodes.Node]:
    """The nodes of a piece of MyST, read as if it stood where the directive stands."""
    holder = nodes.Element()
    directive.state.nested_parse(StringList(text.splitlines(), "generated"), directive.content_offset, holder)
    return holder.children


def table(
    directive,
    headers: list[str],
    rows: list[list[str]],
    numeric: set[int] = frozenset(),
    name: str = "",
    places: list[str] | None = None,
) -> nodes.table:
    """Build a table from MyST cells.

    Args:
        directive: the directive that is running.
        headers: one short text for each column.
        rows: one list of cells for each row, as long as ``headers``.
        numeric: columns that are set to the right.
        name: a class for the style sheet.
        places: a name for each row, by which a link finds it; the row's first cell shows that link.
    """
    group = nodes.tgroup(cols=len(headers))
    group += [nodes.colspec(colwidth=1) for _ in headers]
    head, body = nodes.thead(), nodes.tbody()
    for section, cells in [(head, headers), *((body, row) for row in rows)]:
        row = nodes.row()
        for column, cell in enumerate(cells):
            entry = nodes.entry(classes=["text-right"] if column in numeric else [])
            entry += parse(directive, cell)
            row += entry
        section += row
    for row, place in zip(body, places or [], strict=False):
        row["ids"].append(place)
        link = f'<a class="headerlink" href="#{place}" aria-label="Link to this row">#</a>'
        row[0] += nodes.raw("", link, format="html")
    group += [head, body]
    return nodes.table("", group, classes=["generated", *([name] if name else [])])
