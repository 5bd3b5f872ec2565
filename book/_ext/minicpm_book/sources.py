"""Citations in chapters: links to the publications, which in the book lead to the bibliography instead.

Every program that shows notebooks understands ``[Hu et al., 2024](https://arxiv.org/abs/2404.06395)``. Here a
link whose words hold a year is a citation. Its address must be that of an entry of the bibliography, and its
words must name the entry's first author and year; the entry has the title and all authors, without a network.
"""

import re

from docutils import nodes
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util import logging

YEAR = re.compile(r"\b(?:19|20)\d\d\b")
logger = logging.getLogger(__name__)


def first_author(entry) -> str:
    """The surname of the first author, or the name of the group.

    >>> from pybtex.database import parse_string
    >>> source = '@misc{a, author={van der Berg, Jan and Doe, Jane}} @misc{b, author={{MiniCPM Team}}}'
    >>> [first_author(entry) for entry in parse_string(source, "bibtex").entries.values()]
    ['van der Berg', 'MiniCPM Team']
    """
    person = entry.persons["author"][0]
    return " ".join(map(str, person.rich_prelast_names + person.rich_last_names))


class Citations(SphinxPostTransform):
    """Send every link that cites to the bibliography."""

    default_priority = 20

    def run(self):
        citations = self.env.get_domain("cite").citations
        by_address = {citation.entry.fields.get("url"): citation for citation in citations}
        for link in self.document.findall(nodes.reference):
            address, words = link.get("refuri", ""), link.astext()
            if not address.startswith("http") or words == address or not YEAR.search(words):
                continue
            citation = by_address.get(address)
            if citation is None:
                self.warn(
                    f"{words!r} cites {address}, which no entry of the bibliography has as its url.", link
                )
                continue
            author, year = first_author(citation.entry), citation.entry.fields["year"]
            if author not in words or year not in words:
                self.warn(f"{words!r} cites {citation.key}, which is by {author} and of {year}.", link)
            page = self.app.builder.get_relative_uri(self.env.docname, citation.bibliography_key.docname)
            link["refuri"] = f"{page}#{citation.citation_id}"
            link["internal"] = True
            link["reftitle"] = citation.entry.fields["title"].replace("{", "").replace("}", "")

    def warn(self, text: str, link: nodes.reference) -> None:
        logger.warning(text, location=link, type="minicpm_book", subtype="citation")


def setup(app):
    app.add_post_transform(Citations)
