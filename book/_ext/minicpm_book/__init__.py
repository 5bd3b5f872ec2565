"""The book's own Sphinx extension: pages that need no network, and tables that build themselves.

Tables about chapters are read from the notebooks' stored outputs and metadata, the table of models from the
library, and the API reference from its modules. Nobody types those a second time.
"""

from . import api, chapters, markup, models, offline


def setup(app):
    for part in (offline, markup, chapters, models, api):
        part.setup(app)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
