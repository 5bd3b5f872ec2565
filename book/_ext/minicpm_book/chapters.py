"""What the chapters say about themselves: ``{measured}``, ``{chapters}`` and ``{evidence-table}``.

An executed notebook carries what its run cost in ``metadata.minicpm_lite`` (seconds, peak_memory_mb, device),
and each of its claims as an output of the type below. Both are read from the file; nothing is executed.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

from minicpm_lite.lab.press.plain import cost, measured

from .tables import parse, table

EVIDENCE = "application/vnd.minicpm-lite.evidence+json"
FIELDS = {
    "claim", "published", "source", "published_scale",
    "measured", "scale", "seeds", "device", "minutes", "verdict",
}  # fmt: skip
# A sign beside the word, so that colour is never the only carrier.
VERDICTS = {
    "reproduced": "✔ reproduced",
    "direction only": "↗ direction only",
    "not at this scale": "○ not at this scale",
}
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chapter:
    """One executed notebook: its place in the book, what its run cost, and its evidence."""

    docname: str
    run: dict
    evidence: list[dict]


def read_chapter(path: Path, docname: str) -> Chapter:
    """Read a notebook's run and evidence from the file.

    Raises:
        ValueError: a record of evidence lacks a field or has a verdict that the book does not know.
    """
    notebook = json.loads(path.read_text("utf-8"))
    records = [
        output["data"][EVIDENCE]
        for cell in notebook["cells"]
        for output in cell.get("outputs", [])
        if EVIDENCE in output.get("data", {})
    ]
    for number, record in enumerate(records, 1):
        if missing := FIELDS - record.keys():
            raise ValueError(
                f"{docname}: evidence {number} lacks {', '.join(sorted(missing))}. Run the notebook again."
            )
        if record["verdict"] not in VERDICTS:
            raise ValueError(
                f"{docname}: evidence {number} has the verdict {record['verdict']!r}; "
                f"expected one of {', '.join(map(repr, VERDICTS))}."
            )
    return Chapter(docname, notebook.get("metadata", {}).get("minicpm_lite", {}), records)


def read_chapters(env) -> list[Chapter]:
    """Every notebook of the book, in the order of the table of contents."""
    paths = {docname: Path(env.doc2path(docname)) for docname in env.app.config.external_site_map}
    return [
        read_chapter(path, docname)
        for docname, path in paths.items()
        if docname.startswith("notebooks/") and path.suffix == ".ipynb"
    ]


def runs(seeds: list[int]) -> str:
    """How often an experiment was run.

    >>> runs([0, 1, 2]), runs([7]), runs([])
    ('3 seeds', 'seed 7', 'exact, no seed')
    """
    if not seeds:
        return "exact, no seed"
    return f"{len(seeds)} seeds" if len(seeds) > 1 else f"seed {seeds[0]}"


def cite(source: str) -> str:
    """Turn ``@key`` into a link to the bibliography.

    >>> cite("@hu2024minicpm, section 4.3")
    '{cite:t}`hu2024minicpm`, section 4.3'
    """
    return re.sub(r"@([A-Za-z][\w:-]*\w)", r"{cite:t}`\1`", source)


class BookDirective(SphinxDirective):
    """A directive about other pages: its own page is read again in each build."""

    def chapters(self) -> list[Chapter]:
        self.env.note_reread()
        try:
            return read_chapters(self.env)
        except ValueError as error:
            raise self.error(str(error)) from error


class Measured(SphinxDirective):
    """``{measured}`` in a chapter's card: what the run of this very notebook cost."""

    def run(self):
        path = Path(self.env.doc2path(self.env.docname))
        chapter = read_chapter(path, self.env.docname) if path.suffix == ".ipynb" else None
        if chapter is None or not chapter.run.keys() >= {"seconds", "peak_memory_mb", "device"}:
            logger.warning(
                "This page holds no measured run. Execute it: "
                f"python -m minicpm_lite.lab.press run {path.name}",
                location=self.get_location(),
                type="minicpm_book",
                subtype="measured",
            )
            return parse(self, "Not measured yet.")
        return parse(self, measured(chapter.run))


class Chapters(BookDirective):
    """``{chapters} [part]``: the chapters of one part, or of the book, with what their runs cost."""

    optional_arguments = 1

    def run(self):
        folder = f"notebooks/{self.arguments[0]}/" if self.arguments else "notebooks/"
        rows, seconds = [], 0.0
        for chapter in self.chapters():
            if chapter.docname.startswith(folder):
                known = chapter.run.keys() >= {"seconds", "peak_memory_mb"}
                seconds += chapter.run["seconds"] if known else 0
                time, memory = cost(chapter.run) if known else ("–", "–")
                rows.append([f"{{doc}}`/{chapter.docname}`", time, memory])
        if not self.arguments:
            rows.append(["**All together**", f"{seconds / 60:.1f} min", ""])
        return [table(self, ["Chapter", "Run time", "Peak memory"], rows, numeric={1, 2})]


class EvidenceTable(BookDirective):
    """``{evidence-table}``: every claim of the book, the published figure beside the measured one."""

    def run(self):
        rows = []
        for chapter in self.chapters():
            for record in chapter.evidence:
                published = f"{record['published_scale']}; {cite(record['source'])}"
                measured = f"{record['scale']}; {runs(record['seeds'])}, {record['device']}, "
                measured += f"{record['minutes']:g} min"
                rows.append(
                    [
                        f"{record['claim']}\n\n{{doc}}`/{chapter.docname}`",
                        f"**{record['published']}**\n\n{published}",
                        f"**{record['measured']}**\n\n{measured}",
                        VERDICTS[record["verdict"]],
                    ]
                )
        if not rows:
            return parse(self, "No chapter has recorded evidence yet.")
        return [table(self, ["Claim", "Published", "Measured here", "Verdict"], rows, name="evidence")]


def setup(app):
    app.add_directive("measured", Measured)
    app.add_directive("chapters", Chapters)
    app.add_directive("evidence-table", EvidenceTable)
