"""The download button of a chapter gives the student's copy."""

from types import SimpleNamespace

import nbformat
from minicpm_book.downloads import give_student_copies
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook


def test_downloads_are_students_copies(tmp_path):
    cells = [
        new_markdown_cell("# A {term}`topic`"),
        new_code_cell("secret = 1", metadata={"tags": ["solution"]}),
        new_code_cell("1 + 1", outputs=[nbformat.v4.new_output("stream", text="2")]),
    ]
    original = tmp_path / "notebooks" / "part" / "topic.ipynb"
    download = tmp_path / "html" / "_sources" / "notebooks" / "part" / "topic.ipynb"
    for path in (original, download):
        path.parent.mkdir(parents=True)
        nbformat.write(new_notebook(cells=cells), path)
    app = SimpleNamespace(outdir=tmp_path / "html", srcdir=tmp_path, builder=SimpleNamespace(format="html"))
    give_student_copies(app, ValueError("the build failed"))
    assert download.read_bytes() == original.read_bytes()
    give_student_copies(app, None)
    install, title, lesson = nbformat.read(download, as_version=4).cells
    assert "%pip install" in install.source and title.source == "# A topic"
    assert lesson.source == "1 + 1" and not lesson.outputs
    assert nbformat.read(original, as_version=4).cells[1].source == "secret = 1"
