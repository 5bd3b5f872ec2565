"""What a page's download button gives for a chapter: the student's copy, which runs alone."""

from pathlib import Path

from minicpm_lite.lab.press.notebook import Notebook
from minicpm_lite.lab.press.student import student_copy


def give_student_copies(app, error):
    """Put students' copies in the place of the notebooks that Sphinx copied beside the pages."""
    if error or app.builder.format != "html":
        return
    for page in Path(app.outdir, "_sources", "notebooks").rglob("*.ipynb"):
        original = Path(app.srcdir) / page.relative_to(Path(app.outdir, "_sources"))
        student_copy(Notebook.read(original), page).write()


def setup(app):
    app.connect("build-finished", give_student_copies)
