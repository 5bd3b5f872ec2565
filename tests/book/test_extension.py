"""The book's Sphinx extension, tried on a small book of three pages."""

import doctest
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import minicpm_book.api
import minicpm_book.chapters
import minicpm_book.commands
import minicpm_book.exercise_titles
import minicpm_book.glossary
import minicpm_book.sources
import pytest
from minicpm_book.chapters import EVIDENCE, read_chapter
from minicpm_book.commands import printed
from minicpm_book.first_figure import read_study
from sphinx.application import Sphinx

RECORD = {
    "claim": "Decay lowers the loss", "published": "a drop", "source": "[Doe, 2024](https://example.org/title), section 4",
    "published_scale": "0.036B", "measured": "−0.12 nats", "scale": "0.8M", "seeds": [0, 1, 2],
    "device": "2 CPU cores", "minutes": 2.5, "verdict": "direction only",
}  # fmt: skip
CITED = "As [Doe (2024)](https://example.org/title) says; [the site](https://example.org/title)."
MISCITED = "By [Roe, 2024](https://example.org/title) and [Doe, 2023](https://example.org/other)."
GLOSSARY = """# Words

Of {term}`decay` and {term}`µP`.

````{exercise-start} Where does it begin? (easy)
:label: ex
````
Find it.
````{exercise-end}
````
````{solution-start} ex
````
There.
````{solution-end}
````

```{letters}
```

```{glossary}
decay
  The fall of the rate {cite:p}`key2024`.

µP
  Rules for a {term}`decay`.
```
"""
STUDY = {
    "trunk_curve": [[100, 4.0], [180, 3.5], [360, 3.0]],
    "decay_curves": {"200": [[180, 3.5], [200, 3.25]], "400": [[360, 3.0], [400, 2.5]]},
}
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
        {"cell_type": "markdown", "id": "a", "metadata": {}, "source": f"# {title}\n\nIn short.\n\n{text}"},
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
            for directive in (
                "evidence-totals",
                "evidence-table",
                "chapters",
                "chapter-cards",
                "first-figure",
                "model-table",
            )
        )
        + "\n```{bibliography}\n:all:\n```\n"
        + "\n```{api} sample_part\n```\n"
        + "\n```{minicpm-lite} train --help\n```\n"
    )
    (source / "words.md").write_text(GLOSSARY)
    (source / "refs.bib").write_text(
        "@misc{key2024, title={A title}, author={Doe, Jane}, year={2024}, url={https://example.org/title}}"
    )
    (source / "_toc.yml").write_text(
        "format: jb-book\nroot: index\nchapters:\n- file: notebooks/training/wsd\n- file: notebooks/training/bare\n"
        "- file: words\n"
    )
    write_notebook(source / "notebooks/training/wsd.ipynb", records=[RECORD], run=RUN, text=f"{CITED}\n\n$x$")
    write_notebook(source / "notebooks/training/bare.ipynb", title="No run", text=MISCITED)
    record = {"runs": {"wsd/seed=0/study": STUDY}}
    (source / "notebooks/training/recorded").mkdir()
    (source / "notebooks/training/recorded/wsd.json").write_text(json.dumps(record))
    warnings = (source / "warnings.txt").open("w+")
    app = Sphinx(
        source, None, source / "out", source / "doctrees", "html", status=None, warning=warnings,
        confoverrides={
            "extensions": ["myst_nb", "sphinx_design", "sphinx_exercise", "sphinx_external_toc", "sphinx.ext.autodoc", "sphinx.ext.napoleon",
                           "sphinx.ext.mathjax", "sphinxcontrib.bibtex", "minicpm_book"],
            "nb_execution_mode": "off", "myst_enable_extensions": ["dollarmath", "colon_fence"], "project": "test",
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


def test_only_wrong_citations_warn(built):
    warnings = [line for line in built[1].splitlines() if "WARNING" in line or "ERROR" in line]
    assert len(warnings) == 2 and all("bare" in warning for warning in warnings), warnings
    assert "'Roe, 2024' cites key2024, which is by Doe and of 2024." in warnings[0]
    assert "'Doe, 2023' cites https://example.org/other, which no entry" in warnings[1]


def test_a_citation_leads_to_the_bibliography(built):
    page = html(built, "notebooks/training/wsd")
    [(address, title)] = re.findall(r'href="([^"]*)" title="([^"]*)">Doe \(2024\)', page)
    assert title == "A title" and address.startswith("../../index.html#")
    assert f'id="{address.partition("#")[2]}"' in html(built)
    assert 'href="https://example.org/title">the site' in page


def test_evidence_table_shows_the_record_and_its_links(built):
    page = html(built)
    for text in ("Decay lowers the loss", "−0.12 nats", "3 seeds, 2 CPU cores, 2.5 min", "↗ direction only"):
        assert text in page
    assert 'href="notebooks/training/wsd.html"' in page
    assert 'id="wsd-1"' in page and 'href="#wsd-1"' in page
    assert "<strong>1 claims</strong>: 1 direction only.</p>" in page
    assert ">Doe, 2024</a>, section 4" in page


def test_chapters_lists_times_in_the_order_of_the_contents(built):
    page = html(built)
    assert "2.5 min" in page and "812 MB" in page
    assert page.index("The schedule") < page.index("No run")


def test_cards_tell_what_a_chapter_is_about_and_how_long_it_takes(built):
    page = html(built)
    [first, second] = page.split('class="sd-card-title')[1:]
    assert "1. <a" in first and "The schedule" in first and "In short." in first
    assert "Reading 5 min · running 2.5 min" in first
    assert "2. <a" in second and "Reading 5 min · running –" in second
    assert 'class="reading-time">Reading: about 5 min' in html(built, "notebooks/training/wsd")


def test_the_first_figure_shows_the_recorded_run(built):
    page = html(built)
    [alt] = re.findall(r'<svg aria-label="(Held-out loss[^"]*)"', page)
    assert "2 thick" in alt and "after 200 to 400 updates, 0.25 to 0.50 nats" in alt
    assert "by 0.25 to 0.50 nats a token" in page and "var(--fig-orange" in page


def test_a_record_without_the_curves_is_refused(tmp_path):
    (tmp_path / "wsd.json").write_text(json.dumps({"runs": {"a/seed=0/study": {"trunk_curve": []}}}))
    with pytest.raises(ValueError, match=r"wsd\.json: no run named \.\.\./seed=0/study with decay_curves"):
        read_study(tmp_path / "wsd.json")


def test_a_term_carries_its_definition_without_citations(built):
    page = html(built, "words")
    assert 'href="#term-decay" title="The fall of the rate."' in page
    assert 'title="Rules for a decay."' in page


def test_letters_lead_to_their_first_term(built):
    line = re.search(r'<p class="letters">(.*?)</p>', html(built, "words"), re.DOTALL)[1]
    assert re.findall(r'href="#([^"]+)">(\w)<', line) == [("term-decay", "D"), ("term-P", "M")]


def test_an_exercise_has_no_brackets_in_its_title(built):
    page = html(built, "words")
    assert 'Where does it begin?<span class="level">easy</span></p>' in page
    assert ": Where does it begin?</a>" in page and "begin? (easy)" not in page


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
    "module",
    [
        minicpm_book.chapters,
        minicpm_book.sources,
        minicpm_book.api,
        minicpm_book.commands,
        minicpm_book.exercise_titles,
        minicpm_book.glossary,
    ],
)
def test_docstring_examples(module):
    assert doctest.testmod(module).failed == 0
