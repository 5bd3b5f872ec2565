"""What the chapters say about themselves: what a run cost, which claims were tested, what became of them.

An executed notebook carries what its run cost in ``metadata.minicpm_lite`` (seconds, peak_memory_mb, device),
and each of its claims as an output of the type below. Both are read from the file; nothing is executed.
"""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

from minicpm_lite.lab.evidence import ICONS
from minicpm_lite.lab.evidence import MIME as EVIDENCE
from minicpm_lite.lab.press.notebook import cost

from .tables import parse, table

FIELDS = {
    "claim", "published", "source", "published_scale",
    "measured", "scale", "seeds", "device", "minutes", "verdict",
}  # fmt: skip
# The buttons hide and show the rows of a verdict; without a script all rows show, and no button does.
FILTER = """(() => {
const group = document.querySelector('.evidence-filter');
const rows = [...document.querySelectorAll('table.evidence tbody tr')];
group.hidden = false;
group.addEventListener('click', event => {
  const button = event.target.closest('button');
  if (!button) return;
  button.setAttribute('aria-pressed', button.getAttribute('aria-pressed') !== 'true');
  const shown = [...group.querySelectorAll('[aria-pressed=true]')].map(each => each.firstChild.data.trim());
  for (const row of rows)
    row.hidden = !shown.some(verdict => row.cells[0].textContent.trim().startsWith(verdict));
}); })()"""


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
        if record["verdict"] not in ICONS:
            raise ValueError(
                f"{docname}: evidence {number} has the verdict {record['verdict']!r}; "
                f"expected one of {', '.join(map(repr, ICONS))}."
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


class BookDirective(SphinxDirective):
    """A directive about other pages: its own page is read again in each build."""

    def chapters(self) -> list[Chapter]:
        self.env.note_reread()
        try:
            return read_chapters(self.env)
        except ValueError as error:
            raise self.error(str(error)) from error


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


def totals(records: list[dict]) -> str:
    """How many claims there are, and what became of them; identities are counted apart.

    >>> totals([{"verdict": v} for v in ("reproduced", "verified", "not told apart", "reproduced")])
    '**3 claims**: 2 reproduced, 1 not told apart. Beside them 1 identity or count, verified exactly.'
    """
    counts = Counter(record["verdict"] for record in records)
    verified = counts.pop("verified", 0)
    parts = ", ".join(f"{counts[verdict]} {verdict}" for verdict in ICONS if counts[verdict])
    identities = "identity or count" if verified == 1 else "identities and counts"
    return f"**{counts.total()} claims**: {parts}. Beside them {verified} {identities}, verified exactly."


class EvidenceTotals(BookDirective):
    """``{evidence-totals}``: one sentence, how many claims and which verdicts."""

    def run(self):
        return parse(self, totals([record for chapter in self.chapters() for record in chapter.evidence]))


class EvidenceTable(BookDirective):
    """``{evidence-table}``: every claim of the book, the published figure beside the measured one."""

    def run(self):
        rows, places, used = [], [], Counter()
        for chapter in self.chapters():
            topic = chapter.docname.rpartition("/")[2]
            for number, record in enumerate(chapter.evidence, start=1):
                published = f"{record['published_scale']}; {record['source']}"
                measured = f"{record['scale']}; {runs(record['seeds'])}, {record['device']}, "
                measured += f"{record['minutes']:g} min"
                rows.append(
                    [
                        f"{ICONS[record['verdict']]} {record['verdict']}",
                        f"{record['claim']}\n\n{{doc}}`/{chapter.docname}`",
                        f"**{record['published']}**\n\n{published}",
                        f"**{record['measured']}**\n\n{measured}",
                    ]
                )
                places.append(f"{topic.replace('_', '-')}-{number}")
                used[record["verdict"]] += 1
        if not rows:
            return parse(self, "No chapter has recorded evidence yet.")
        buttons = "".join(
            f'<button type="button" aria-pressed="true">{ICONS[verdict]} {verdict} '
            f"<span>{used[verdict]}</span></button>"
            for verdict in ICONS
            if used[verdict]
        )
        filters = f'<div class="evidence-filter" role="group" aria-label="Show rows" hidden>{buttons}</div>'
        headers = ["Verdict", "Claim", "Published", "Measured here"]
        return [
            nodes.raw("", filters, format="html"),
            table(self, headers, rows, name="evidence", places=places),
            nodes.raw("", f"<script>{FILTER}</script>", format="html"),
        ]


def setup(app):
    app.add_directive("chapters", Chapters)
    app.add_directive("evidence-totals", EvidenceTotals)
    app.add_directive("evidence-table", EvidenceTable)
