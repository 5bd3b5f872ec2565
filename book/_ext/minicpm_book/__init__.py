"""The book's own Sphinx extension: pages that need no network, and tables that build themselves.

Tables about chapters are read from the notebooks' stored outputs and metadata, the table of models from the
library, the API reference from its modules, and what a command prints from the command. Nobody types those a
second time.
"""

from . import (
    api,
    chapters,
    commands,
    downloads,
    exercise_titles,
    first_figure,
    glossary,
    markup,
    models,
    offline,
    solutions,
    sources,
    tips,
)

PARTS = (
    offline, markup, sources, glossary, tips, chapters, exercise_titles, solutions, first_figure, models,
    commands, api, downloads,
)  # fmt: skip


def setup(app):
    for part in PARTS:
        part.setup(app)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
