"""``{minicpm-lite} train --help``: what a command prints. It is asked when the page is built."""

import os
from contextlib import redirect_stdout, suppress
from io import StringIO
from unittest.mock import patch

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

from minicpm_lite.cli import main

COLUMNS = 80  # click breaks its lines before, and a page on a laptop shows as many


def printed(arguments: list[str]) -> str:
    """What the command prints.

    Raises:
        ValueError: it ended with an error.

    >>> printed(["shards", "--help"]).splitlines()[0].split()[:3]
    ['Usage:', 'minicpm-lite', 'shards']
    """
    output, code = StringIO(), 0
    with patch.dict(os.environ, {"COLUMNS": str(COLUMNS)}), redirect_stdout(output), suppress(SystemExit):
        code = main(arguments)
    if code:
        raise ValueError(f"minicpm-lite {' '.join(arguments)} ended with code {code}.")
    return output.getvalue().rstrip()


class Command(SphinxDirective):
    """``{minicpm-lite} train --help``: the command line, and below it its output."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self):
        self.env.note_reread()
        try:
            output = printed(self.arguments[0].split())
        except ValueError as error:
            raise self.error(str(error)) from None
        text = f"$ minicpm-lite {self.arguments[0]}\n{output}"
        return [nodes.literal_block(text, text, language="text")]


def setup(app):
    app.add_directive("minicpm-lite", Command)
