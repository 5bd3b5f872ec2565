"""What the chapters say about themselves: how long they take, which claims were tested, what became of them.

An executed notebook carries what its run cost in ``metadata.minicpm_lite`` (seconds, peak_memory_mb, device),
and each of its claims as an output of the type below. Its summary is the paragraph below its title, and the
time for reading follows from its words, lines and pictures. All are read from the file; nothing is executed.
"""

import json
import math
import re
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
WORDS_A_MINUTE = 200
LINES_A_MINUTE = 20  # of code that stands open on the page
FOLDED = {"hide-input", "hide-cell", "remove-input", "remove-cell", "solution"}
SUMMARY = re.compile(r"^# .+\n+(.+(?:\n.+)*)", re.MULTILINE)
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
    """One executed notebook: its place in the book, what it is about, what it costs, and its evidence."""

    docname: str
    summary: str
    reading: int  # minutes
    run: dict
    evidence: list[dict]

    @property
    def run_cost(self) -> tuple[str, str]:
        """Time and memory of the run; a dash each where the notebook was not run."""
        return cost(self.run) if self.run.keys() >= {"seconds", "peak_memory_mb"} else ("–", "–")


def reading_minutes(cells: list[dict]) -> int:
    """How long a chapter takes to read without its exercises, to the next five.

    Counted are the words and the lines of code that stand open on the page, and a minute for each picture.

    >>> text = {"cell_type": "markdown", "metadata": {}, "source": "word " * 2_000}
    >>> code = {"cell_type": "code", "metadata": {}, "source": "x = 1\\n" * 100}
    >>> folded = {"cell_type": "code", "metadata": {"tags": ["solution"]}, "source": "x = 1\\n" * 400}
    >>> asked = {"cell_type": "markdown", "metadata": {}, "source": "```{exercise-start} " + "word " * 2_000}
    >>> drawn = {"cell_type": "code", "metadata": {"mystnb": {"figure": {}}}, "source": ""}
    >>> reading_minutes([text]), reading_minutes([text, code]), reading_minutes([text, folded, asked])
    (10, 15, 10)
    >>> reading_minutes([text, *[drawn] * 10])
    20
    """
    words = lines = pictures = 0
    for cell in cells:
        source = "".join(cell["source"])
        pictures += "figure" in cell["metadata"].get("mystnb", {})
        if is_exercise(cell) or not FOLDED.isdisjoint(cell["metadata"].get("tags", [])):
            continue
        if cell["cell_type"] == "markdown":
            words += len(source.split())
        else:
            lines += sum(1 for line in source.splitlines() if line.strip())
    return max(5, 5 * round((words / WORDS_A_MINUTE + lines / LINES_A_MINUTE + pictures) / 5))


def is_exercise(cell: dict) -> bool:
    """Whether a cell is the text of an exercise, with its hints."""
    return cell["cell_type"] == "markdown" and "{exercise-start}" in "".join(cell["source"])


def duration(minutes: int) -> str:
    """Minutes as text, with hours where there are many.

    >>> duration(45), duration(442), duration(60)
    ('45 min', '7 h 22 min', '1 h')
    """
    hours, minutes = divmod(minutes, 60)
    return " ".join([f"{hours} h"] * bool(hours) + [f"{minutes} min"] * bool(minutes))


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
    opening = SUMMARY.search("".join(notebook["cells"][0]["source"]))
    return Chapter(
        docname,
        summary=opening[1] if opening else "",
        reading=reading_minutes(notebook["cells"]),
        run=notebook["metadata"].get("minicpm_lite", {}),
        evidence=records,
    )


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
    """``{chapters} [part]``: the chapters of one part, or of the book, and how long they take."""

    optional_arguments = 1

    def run(self):
        folder = f"notebooks/{self.arguments[0]}/" if self.arguments else "notebooks/"
        chapters = [chapter for chapter in self.chapters() if chapter.docname.startswith(folder)]
        rows = [[f"{{doc}}`/{c.docname}`", duration(c.reading), *c.run_cost] for c in chapters]
        if not self.arguments:
            seconds = sum(chapter.run.get("seconds", 0) for chapter in chapters)
            reading = sum(chapter.reading for chapter in chapters)
            rows.append(["**All together**", duration(reading), f"{seconds / 60:.1f} min", ""])
        return [table(self, ["Chapter", "Reading", "Run time", "Peak memory"], rows, numeric={1, 2, 3})]


class Cards(BookDirective):
    """``{chapter-cards}``: a card for each chapter, its summary, and how long reading and running take."""

    def run(self):
        cards = [
            f"::::{{grid-item-card}} {number}. {{doc}}`/{chapter.docname}`\n{chapter.summary}\n\n"
            ":::{card-footer}\n"
            f"Reading {duration(chapter.reading)} · running {chapter.run_cost[0]}\n:::\n::::"
            for number, chapter in enumerate(self.chapters(), start=1)
        ]
        return parse(self, "\n".join([":::::{grid} 1 1 2 2", ":gutter: 3", "", *cards, ":::::"]))


def add_reading_time(app, doctree):
    """Say below a chapter's summary how long reading takes. What running takes stands in its box."""
    env = app.env
    if not env.docname.startswith("notebooks/"):
        return
    section = next(doctree.findall(nodes.section), None)
    summary = section and next(section.findall(nodes.paragraph), None)
    if summary:
        chapter = read_chapter(Path(env.doc2path(env.docname)), env.docname)
        known, new = duration(chapter.reading), duration(5 * math.ceil(1.5 * chapter.reading / 5))
        line = nodes.paragraph(
            text=f"Reading: about {known} if you know the subject, {new} if it is new; without the exercises",
            classes=["reading-time"],
        )
        summary.parent.insert(summary.parent.index(summary) + 1, line)


def totals(records: list[dict]) -> str:
    """How many claims there are, and what became of them; identities, if there are any, are counted apart.

    >>> totals([{"verdict": v} for v in ("reproduced", "verified", "not told apart", "reproduced")])
    '**3 claims**: 2 reproduced, 1 not told apart. Beside them 1 identity or count, verified exactly.'
    """
    counts = Counter(record["verdict"] for record in records)
    verified = counts.pop("verified", 0)
    parts = ", ".join(f"{counts[verdict]} {verdict}" for verdict in ICONS if counts[verdict])
    identities = "identity or count" if verified == 1 else "identities and counts"
    beside = f" Beside them {verified} {identities}, verified exactly." if verified else ""
    return f"**{counts.total()} claims**: {parts}.{beside}"


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
    app.connect("doctree-read", add_reading_time)
    app.add_directive("chapters", Chapters)
    app.add_directive("chapter-cards", Cards)
    app.add_directive("evidence-totals", EvidenceTotals)
    app.add_directive("evidence-table", EvidenceTable)
