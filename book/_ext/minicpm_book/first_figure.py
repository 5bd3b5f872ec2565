"""``{first-figure}``: the front page's picture, drawn from a chapter's recorded run as the page is built."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
from docutils import nodes
from matplotlib.ticker import NullFormatter
from sphinx.util.docutils import SphinxDirective

from minicpm_lite.lab.plots import plot_svg
from minicpm_lite.lab.style import PALETTE, use_book_style
from minicpm_lite.lab.svg import inline

from .tables import parse

RECORD = "notebooks/training/recorded/wsd.json"
FIRST_UPDATE = 150  # before it the loss falls so far that the decays would look small
ALT = (
    "Held-out loss against update on a logarithmic axis. A thin line at a constant learning rate falls "
    "slowly. From it branch {count} thick, steep drops, each a decay of the rate over a tenth of the updates "
    "so far. They end after {first:,} to {last:,} updates, {least:.2f} to {most:.2f} nats below their start."
)
CAPTION = (
    "One training run, recorded in {{doc}}`/notebooks/training/wsd`: a model of a million parameters reads "
    "English novels at a constant learning rate (thin). Each thick drop is a copy of it whose rate decays: "
    "in a tenth of the updates so far the loss falls by {least:.2f} to {most:.2f} nats a token. "
    "So one long run gives a finished model wherever you want one."
)


def read_study(path: Path) -> dict:
    """The study of seed 0 in the record of the chapter on the schedule.

    Raises:
        ValueError: the record holds no such run, or one without the curves that are drawn.
    """
    runs = json.loads(path.read_text("utf-8"))["runs"]
    study = next((run for name, run in runs.items() if name.endswith("seed=0/study")), {})
    if missing := {"trunk_curve", "decay_curves"} - study.keys():
        raise ValueError(
            f"{path.name}: no run named .../seed=0/study with {', '.join(sorted(missing))}. "
            "The front page draws these curves; name their new place in first_figure.py."
        )
    return study


def drops(study: dict) -> dict:
    """What the picture shows: how many decays, the least and the most that one brings, and when."""
    differences = [curve[0][1] - curve[-1][1] for curve in study["decay_curves"].values()]
    ends = [curve[-1][0] for curve in study["decay_curves"].values()]
    return {
        "count": len(ends), "least": min(differences), "most": max(differences),
        "first": min(ends), "last": max(ends),
    }  # fmt: skip


def draw(study: dict) -> str:
    """The curves as an SVG that takes the page's colours."""
    with plt.rc_context():
        use_book_style()
        figure, axis = plt.subplots(figsize=(5, 2.6))
        trunk = [point for point in study["trunk_curve"] if point[0] >= FIRST_UPDATE]
        axis.plot(*zip(*trunk, strict=True), color=PALETTE["grey"], lw=1.4, ls="-")
        style = {"color": PALETTE["orange"], "lw": 3, "ls": "-", "marker": "o", "markevery": [-1]}
        for curve in study["decay_curves"].values():
            axis.plot(*zip(*curve, strict=True), **style)
        ends = [curve[-1][0] for curve in study["decay_curves"].values()]
        axis.set_xscale("log")
        axis.set_xticks(ends, [f"{end:,}" for end in ends])
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel("updates")
        axis.set_ylabel("held-out loss, nats")
        svg = plot_svg(figure, prefix="first")
        plt.close(figure)
    return svg


class FirstFigure(SphinxDirective):
    """``{first-figure}``: loss of one long run, and the decays that branch off it."""

    def run(self):
        path = Path(self.env.srcdir, RECORD)
        self.env.note_dependency(str(path))
        try:
            study = read_study(path)
        except ValueError as error:
            raise self.error(str(error)) from None
        numbers = drops(study)
        drawing = nodes.raw("", inline(draw(study), ALT.format(**numbers)), format="html")
        caption = nodes.caption("", "", *parse(self, CAPTION.format(**numbers))[0].children)
        return [nodes.figure("", drawing, caption, classes=["first"])]


def setup(app):
    app.add_directive("first-figure", FirstFigure)
