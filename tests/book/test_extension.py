"""The book's Sphinx extension, tried on a small book of three pages."""

import doctest
import json
import sys
from pathlib import Path
from types import ModuleType

import minicpm_book.api
import minicpm_book.chapters
import minicpm_book.commands
import pytest
from minicpm_book.chapters import EVIDENCE, cite, cost, read_chapter
from minicpm_book.commands import printed
from sphinx.application import Sphinx

RECORD = {
    "claim": "Decay lowers the loss", "published": "a drop", "source": "@key2024, section 4",
    "published_scale": "0.036B", "measured": "−0.12 nats", "scale": "0.8M", "seeds": [0, 1, 2],
    "device": "2 CPU cores", "minutes": 2.5, "verdict": "direction only",
}  # fmt: skip
RUN = {"seconds": 150.0, "peak_memory_mb": 812.4, "device": "2 CPU cores"}


def write_notebook(path: Path, *, title: str = "The schedule", records=(), run=None, text: str = "") -> Path:
    """Write an executed notebook with these records of evidence."""
    outputs = [
        {
            "output_type": "display_data",
            "metadata": {},
            "data": {EVIDENCE: record, "text/html": "<p>shown</p>"},
        }
        for record in records
    ]
    cells = [
        {"cell_type": "markdown", "id": "a", "metadata": {}, "source": f"# {title}\n\n{text}"},
        {
            "cell_type": "code",
            "id": "b",
            "metadata": {},
            "source": "1",
            "execution_count": 1,
            "outputs": outputs,
        },
    ]
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    metadata["language_info"] = {"name": "python"}
    if run is not None:
        metadata["minicpm_lite"] = run
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps({"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}), "utf-8"
    )
    return path


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A small book, built once: its output folder and what Sphinx warned about."""
    source = tmp_path_factory.mktemp("book")
    module = ModuleType("minicpm_lite.sample_part")
    exec(SAMPLE, module.__dict__)
    sys.modules[module.__name__] = module
    (source / "index.md").write_text(
        "# Book\n"
        + "".join(
            f"\n```{{{directive}}}\n```\n"
            for directive in ("evidence-totals", "evidence-table", "chapters", "model-table", "bibliography")
        )
        + "\n```{api} sample_part\n```\n"
        + "\n```{minicpm-lite} train --help\n```\n"
    )
    (source / "refs.bib").write_text("@misc{key2024, title={A title}, author={Doe, Jane}, year={2024}}")
    (source / "_toc.yml").write_text(
        "format: jb-book\nroot: index\nchapters:\n- file: notebooks/training/wsd\n- file: notebooks/training/bare\n"
    )
    write_notebook(
        source / "notebooks/training/wsd.ipynb", records=[RECORD], run=RUN, text="```{measured}\n```\n\n$x$"
    )
    write_notebook(source / "notebooks/training/bare.ipynb", title="No run", text="```{measured}\n```")
    warnings = (source / "warnings.txt").open("w+")
    app = Sphinx(
        source, None, source / "out", source / "doctrees", "html", status=None, warning=warnings,
        confoverrides={
            "extensions": ["myst_nb", "sphinx_external_toc", "sphinx.ext.autodoc", "sphinx.ext.napoleon",
                           "sphinx.ext.mathjax", "sphinxcontrib.bibtex", "minicpm_book"],
            "nb_execution_mode": "off", "myst_enable_extensions": ["dollarmath"], "project": "test",
            "bibtex_bibfiles": ["refs.bib"],
            "suppress_warnings": ["mystnb.unknown_mime_type"], "mathjax_path": "mathjax/tex-svg.js",
            "html_theme": "pydata_sphinx_theme", "autodoc_inherit_docstrings": False,
        },
    )  # fmt: skip
    app.build()
    warnings.seek(0)
    yield source / "out", warnings.read()
    del sys.modules[module.__name__]


SAMPLE = '''
"""A sample.

The code of the block:

    x = x + r * attention(x)

Done.
"""
__all__ = ["Zebra", "apple"]


class Zebra:
    """Comes first in the source."""

    @property
    def scale(self):
        """What is multiplied: 1 or less."""

    def forward(self):
        pass


def apple(x: "Float[Tensor, 'batch seq']") -> int:
    """Comes second."""


def not_exported():
    """Is left out."""


for thing in (Zebra, apple, not_exported):
    thing.__module__ = "minicpm_lite.sample_part"
'''


def html(built, page: str = "index") -> str:
    return (built[0] / f"{page}.html").read_text("utf-8")


def test_only_the_page_without_a_run_warns(built):
    warnings = [line for line in built[1].splitlines() if "WARNING" in line or "ERROR" in line]
    assert len(warnings) == 1 and "holds no measured run" in warnings[0] and "bare" in warnings[0], warnings


def test_evidence_table_shows_the_record_and_its_links(built):
    page = html(built)
    for text in ("Decay lowers the loss", "−0.12 nats", "3 seeds, 2 CPU cores, 2.5 min", "↗ direction only"):
        assert text in page
    assert 'href="notebooks/training/wsd.html"' in page
    assert 'id="wsd-1"' in page and 'href="#wsd-1"' in page
    assert "<strong>1 claims</strong>: 1 direction only. Beside them 0 identities" in page
    assert "Doe" in page and "@key2024" not in page


def test_chapters_lists_times_in_the_order_of_the_contents(built):
    page = html(built)
    assert "2.5 min" in page and "812 MB" in page
    assert page.index("The schedule") < page.index("No run")


def test_measured_prints_the_run_of_its_own_page(built):
    page = html(built, "notebooks/training/wsd")
    assert "<strong>2.5 min</strong>" in page and "<strong>812 MB</strong>" in page and "2 CPU cores" in page
    assert "Not measured yet" in html(built, "notebooks/training/bare")


def test_model_table_counts_the_published_parameters(built):
    page = html(built)
    assert "2,442,057,984" in page and "1,247,442,432" in page  # MiniCPM paper, Table 2
    assert "minicpm4-8b" in page and "lite-0" not in page and ">lite-" not in page


def test_a_command_shows_what_it_prints(built):
    page = html(built)
    assert "$ minicpm-lite train --help" in page and "Usage: minicpm-lite train" in page
    assert "--decay-from CHECKPOINT" in page


def test_a_command_that_fails_is_no_documentation():
    with pytest.raises(ValueError, match=r"minicpm-lite train --config nothing --dry-run ended with code 2"):
        printed(["train", "--config", "nothing", "--dry-run"])


def test_api_follows_the_source_and_the_export_list(built):
    page = html(built)
    assert page.index("Comes first") < page.index("Comes second")
    assert "Is left out" not in page
    assert "multiplied: 1 or less" in page  # napoleon would make a type of the words before the colon


def test_indented_block_of_a_module_is_code(built):
    page = html(built)
    assert "<pre>" in page and "<blockquote>" not in page


def test_mathematics_is_local_and_small(built):
    assert (built[0] / "_static/mathjax/tex-svg.js").stat().st_size > 1_000_000
    assert len(list((built[0] / "_static/mathjax").rglob("*"))) == 1
    page = html(built, "notebooks/training/wsd")
    assert "tex-svg.js" in page and "jsdelivr" not in page


def test_record_without_a_field_is_refused(tmp_path):
    record = {key: value for key, value in RECORD.items() if key != "seeds"}
    with pytest.raises(ValueError, match=r"evidence 1 lacks seeds\. Run the notebook again"):
        read_chapter(write_notebook(tmp_path / "a.ipynb", records=[record]), "a")


def test_unknown_verdict_is_refused(tmp_path):
    with pytest.raises(ValueError, match="verdict 'proved'; expected one of 'verified', 'reproduced'"):
        read_chapter(write_notebook(tmp_path / "a.ipynb", records=[RECORD | {"verdict": "proved"}]), "a")


def test_records_keep_their_order(tmp_path):
    second = RECORD | {"claim": "second"}
    chapter = read_chapter(write_notebook(tmp_path / "a.ipynb", records=[RECORD, second], run=RUN), "a")
    assert [record["claim"] for record in chapter.evidence] == ["Decay lowers the loss", "second"]
    assert chapter.run == RUN


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("@hu2024minicpm", "{cite:t}`hu2024minicpm`"),
        ("@a2024b, Table 3; @c-d_e.", "{cite:t}`a2024b`, Table 3; {cite:t}`c-d_e`."),
        ("no citation", "no citation"),
    ],
)
def test_cite(source, expected):
    assert cite(source) == expected


def test_cost_switches_to_minutes():
    assert cost({"seconds": 59.4, "peak_memory_mb": 10}) == ("59 s", "10 MB")
    assert cost({"seconds": 60, "peak_memory_mb": 2999.6}) == ("1.0 min", "3,000 MB")


@pytest.mark.parametrize("module", [minicpm_book.chapters, minicpm_book.api, minicpm_book.commands])
def test_docstring_examples(module):
    assert doctest.testmod(module).failed == 0
