"""``{letters}``: a line of letters over a glossary, each leading to its first term."""

from docutils import nodes
from sphinx.util.docutils import SphinxDirective


def initial(term: str) -> str:
    """The letter under which a reader looks for a term.

    >>> initial("attention"), initial("µP"), initial("4-bit")
    ('A', 'M', '0–9')
    """
    first = term[0].replace("µ", "m").upper()
    return "0–9" if first.isdigit() else first


class letters(nodes.General, nodes.Element):
    """Where the line will stand; the terms are read after it."""


class Letters(SphinxDirective):
    """``{letters}``, without arguments."""

    def run(self):
        return [letters()]


def fill(app, doctree):
    """Put the line where it was asked for."""
    for place in list(doctree.findall(letters)):
        first = {}
        for term in doctree.findall(nodes.term):
            first.setdefault(initial(term.astext()), term["ids"][0])
        line = nodes.paragraph(classes=["letters"])
        for letter, term in sorted(first.items()):
            line += [nodes.reference("", letter, refid=term, internal=True), nodes.Text(" ")]
        place.replace_self(line)


def setup(app):
    app.add_node(letters)
    app.add_directive("letters", Letters)
    app.connect("doctree-read", fill)
