"""What a link to a term shows while it is pointed at: the glossary's definition.

A term's link gets its definition as ``title``, as citations have theirs. Browsers show it late and not to who
uses the keyboard, so a script (``_static/tips.js``) shows it as a box. Text and script are in the page: they
need no server and no network.
"""

import re
from functools import cache

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.environment import BuildEnvironment
from sphinx.transforms.post_transforms import SphinxPostTransform


@cache
def definitions(env: BuildEnvironment) -> dict[str, str]:
    """The definition of each term of the glossary as plain text, without its citations, by the term's id."""
    found = {}
    for docname in {docname for docname, _ in env.get_domain("std")._terms.values()}:
        for item in env.get_doctree(docname).findall(nodes.definition_list_item):
            definition = item[-1].deepcopy()
            for reference in list(definition.findall(pending_xref)):
                if reference["refdomain"] == "cite":
                    reference.parent.remove(reference)
            text = re.sub(r"\s+(?=[.,;:])", "", " ".join(definition.astext().split()))
            for term in item.findall(nodes.term):
                found |= dict.fromkeys(term["ids"], text)
    return found


class Terms(SphinxPostTransform):
    """Give every link to a term its definition; the links are resolved before, with the priority 10."""

    default_priority = 30

    def run(self):
        for words in self.document.findall(nodes.inline):
            if "std-term" in words["classes"] and isinstance(words.parent, nodes.reference):
                place = words.parent.get("refid") or words.parent["refuri"].partition("#")[2]
                words.parent["reftitle"] = definitions(self.env)[place]


def setup(app):
    app.add_post_transform(Terms)
