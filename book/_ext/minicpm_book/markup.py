"""Mend markup of Sphinx and the theme that a screen reader would stumble over."""

REPLACEMENTS = {
    # A list must contain list items; bibtex's entries are none.
    '<div role="list" class="citation-list">': '<div class="citation-list">',
    # The arguments of a signature stand in a definition list that defines nothing.
    "<dl>\n<dd>": '<dl role="none">\n<dd role="none">',
    '<dd><em class="sig-param">': '<dd role="none"><em class="sig-param">',
    '<dd><span class="': '<dd role="none"><span class="',
}


def mend(app, pagename, templatename, context, doctree):
    """Repair the page's body, and give the arrows of the navigation a name."""
    for old, new in REPLACEMENTS.items():
        context["body"] = context.get("body", "").replace(old, new)
    if pagename == "_modules/index":  # viewcode's lists stand in lists, outside their items: make them one
        start, _, items = context["body"].partition("<ul>")
        context["body"] = f"{start}<ul>{items.replace('<ul>', '').replace('</ul>', '')}</ul>"
    generate = context.get("generate_toctree_html")
    if generate:

        def named(*args, **kwargs):
            tree = str(generate(*args, **kwargs))
            return tree.replace("<summary>", '<summary aria-label="Pages of this chapter">')

        context["generate_toctree_html"] = named


def setup(app):
    app.connect("html-page-context", mend, priority=950)
