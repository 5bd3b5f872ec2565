"""The book's own Sphinx extension: pages that need no network, and tables that build themselves.

Tables about chapters are read from the notebooks' stored outputs and metadata, the table of models from the
library, the API reference from its modules, and what a command prints from the command. Nobody types those a
second time.
"""

from . import api, chapters, commands, downloads, first_figure, markup, models, offline, sources


def setup(app):
    for part in (offline, markup, sources, chapters, first_figure, models, commands, api, downloads):
        part.setup(app)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
