"""Runs in real kernels: stale notebooks only, side by side, twice the same; a failure leaves the file alone."""

import io
import json
import os
import re
import sys

import nbformat
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nbformat.v4 import new_markdown_cell, new_notebook, new_output
from small_chapter import code
from tqdm import tqdm

from minicpm_lite.lab.press import execute
from minicpm_lite.lab.press.__main__ import main
from minicpm_lite.lab.press.notebook import KEY, Notebook
from minicpm_lite.lab.press.stamps import why_stale

CELLS = [
    "import sys\nfrom tqdm.auto import tqdm\n\nprint('first')\nprint('noise', file=sys.stderr)",
    "for _ in tqdm(range(3)):\n    pass\nfor _ in tqdm(range(3), file=sys.stdout):\n    pass\nobject()",
    "import ipywidgets\nfrom IPython.display import display\n\n"
    "display(ipywidgets.IntSlider()._repr_mimebundle_() | {'text/html': '<b>1</b>'}, raw=True)",
    "import torch\n\nmemory = bytearray(200_000_000)\n"
    f"print(sys.executable == {sys.executable!r}, torch.get_num_threads())",
    "from minicpm_lite.lab.exercises import exercise\n\n"
    "print(exercise('exits')(lambda answer: answer()).judge(lambda: exit()).state)",
]


def notebook(path, *sources):
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [code(source) for source in sources]
    for place, cell in enumerate(cells):
        cell.id = f"cell-{place}"
    nbformat.write(new_notebook(cells=cells), path)
    return path


MEET = """
import pathlib, time

pathlib.Path("{me} is here").touch()
end = time.monotonic() + 120
while not pathlib.Path("{other} is here").exists():
    assert time.monotonic() < end
    time.sleep(0.05)
"""


@pytest.fixture(scope="module")
def after_a_run(tmp_path_factory):
    """A notebook that has run, beside two that run side by side: each waits for the other."""
    folder = tmp_path_factory.mktemp("run")
    path = notebook(folder / "topic.ipynb", *CELLS)
    nb = nbformat.read(path, as_version=4)
    nb.cells.append(new_markdown_cell("**One run of this notebook takes** a while.\n\nMore.", id="card"))
    nbformat.write(nb, path)
    both = [notebook(folder / f"{me}.ipynb", MEET.format(me=me, other=other)) for me, other in ("ab", "ba")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execute, "cores", lambda: 2)
        assert execute.run([path, *both])
    for other in both:
        other.unlink()
    return path


@pytest.mark.slow  # a kernel starts, in a process that starts
def test_a_run_keeps_what_is_the_same_and_drops_the_rest(after_a_run):
    nb = nbformat.read(after_a_run, as_version=4)
    card = nb.cells.pop().source
    outputs = [cell.outputs for cell in nb.cells]
    assert [output.text for output in outputs[0]] == ["first\n"]
    assert [output.data["text/plain"] for output in outputs[1]] == ["<object at 0x...>"]
    assert [output.data for output in outputs[2]] == [
        {"text/html": "<b>1</b>", "text/plain": "IntSlider(value=0)"}
    ]
    assert [output.text for output in outputs[3]] == ["True 1\n"], "this interpreter, one thread"
    assert [output.text for output in outputs[4]] == ["wrong\n"], "an answer that calls exit() ends nothing"
    assert [cell.execution_count for cell in nb.cells] == [1, 2, 3, 4, 5]
    assert set(nb.metadata) == {"kernelspec", "language_info", KEY}
    record = nb.metadata[KEY]
    assert set(record) == {"stamp", "version", "seconds", "peak_memory_mb", "device"}
    told = f"takes** {record['seconds']} s and {record['peak_memory_mb']} MB of memory, measured on {record['device']}."
    assert card.endswith(f"{told}\n\nMore.")
    assert 200 < record["peak_memory_mb"] < 900, "the kernel's own memory, not that of the process above it"


@pytest.mark.slow  # kernels start, in processes that start
def test_only_stale_notebooks_run_and_twice_gives_the_same_bytes(after_a_run, capsys):
    first = after_a_run.read_bytes()
    stale = notebook(after_a_run.with_name("stale.ipynb"), "1 + 1")
    assert main(["run", str(after_a_run.parent)]) == 0
    fresh_line, *stale_line = sorted(capsys.readouterr().out.splitlines(), reverse=True)
    assert fresh_line == f"{after_a_run}: up to date"
    assert f"{stale}: ran, because it was never run to the end: " in stale_line[0]
    assert after_a_run.read_bytes() == first
    assert nbformat.read(stale, as_version=4).cells[0].outputs[0].data["text/plain"] == "2"
    assert main(["run", "--force", str(after_a_run)]) == 0
    without_seconds = [
        re.sub(rb'"seconds": \d+|\d+ s and', b"", run) for run in (first, after_a_run.read_bytes())
    ]
    assert without_seconds[0] == without_seconds[1]  # a busy machine takes longer


@pytest.mark.parametrize("change", ["saved", "removed"])
def test_what_its_author_did_during_a_run_stands(tmp_path, monkeypatch, change):
    path = notebook(tmp_path / "topic.ipynb", "1 + 1")

    def meanwhile(running):
        running.nb.metadata[KEY] = {"seconds": 1, "peak_memory_mb": 1}
        notebook(path, "1 + 1", "an_hour_of_writing()") if change == "saved" else path.unlink()

    monkeypatch.setattr(execute, "execute", meanwhile)
    ran, told = execute._run_one(path, "it was never run to the end")
    assert (
        not ran and "topic.ipynb: ran, because it was never run to the end, but was CHANGED meanwhile" in told
    )
    if change == "saved":
        assert [cell.source for cell in Notebook.read(path).nb.cells] == ["1 + 1", "an_hour_of_writing()"]
    else:
        assert not path.exists()


@pytest.mark.slow  # a kernel starts
@pytest.mark.parametrize("used", ["recorded/topic.json", "table.csv", "helper.py"])
def test_outputs_older_than_the_files_they_use_stay_stale(tmp_path, used):
    uses = {"helper.py": "import helper"}.get(used, f'text = open("{used}").read()')
    (tmp_path / "recorded").mkdir()
    (tmp_path / used).write_text("loss = 1")
    codes = list(map(ord, used))  # a name that stamps do not see
    changes = f'open("".join(map(chr, {codes})), "w").write("loss = 2")'
    path = notebook(tmp_path / "topic.ipynb", uses, changes)
    ran, told = execute._run_one(path, "it was never run to the end")
    changed = "recorded runs or other files beside it that it uses changed"
    assert ran and told.endswith(f"; STALE again, because meanwhile {changed}")
    assert why_stale(Notebook.read(path)) == changed
    ran, told = execute._run_one(path, changed)
    assert ran and "STALE" not in told and why_stale(Notebook.read(path)) is None


@pytest.mark.slow  # four kernels start
def test_the_longest_begin_and_what_fails_stops_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(execute, "cores", lambda: 1)
    for name, seconds in (("short", 3), ("long", 50), ("fails", 20)):
        fault = "raise ValueError('the loss is not a number')"
        path = notebook(tmp_path / f"{name}.ipynb", "x = 1", fault if name == "fails" else "1")
        seen = Notebook.read(path)
        seen.nb.metadata[KEY] = {"seconds": seconds}
        seen.write()
    notebook(tmp_path / "new.ipynb", "1")
    (tmp_path / "broken.ipynb").write_text("{")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert main(["run", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    told = re.findall(r"(\w+)\.ipynb(?:: ran|.* is not a notebook)", said)
    assert told == ["broken", "new", "long", "fails", "short"]
    assert "FAILED" in said and "the loss is not a number" in said and "raise ValueError" in said
    after = {path: path.read_bytes() for path in tmp_path.iterdir()}
    unchanged = {path.stem for path in after if after[path] == before.get(path)}
    assert after.keys() == before.keys() and unchanged == {"broken", "fails"}


UNITS = st.sampled_from(["it", "B", "step", " tokens", "s", "k", "", "Läufe"])
BAR = {
    "n": st.integers(0, 10**9) | st.floats(0.5, 1e9),
    "total": st.none() | st.integers(0, 10**9),
    "elapsed": st.just(0) | st.floats(1e-6, 1e6),
    "ncols": st.sampled_from([None, 0, 80, 120]),
    "prefix": st.sampled_from(["", "loss 2.31", "50%|", "[00:01"]),
    "ascii": st.sampled_from([False, True, " .oO0", " |"]),
    "unit": UNITS,
    "unit_scale": st.sampled_from([False, True]),
    "unit_divisor": st.sampled_from([1000, 1024]),
    "rate": st.none() | st.floats(1e-6, 1e9),
    "postfix": st.sampled_from([None, "loss=2.3", "[1, 2]"]),
    "colour": st.sampled_from([None, "green"]),
}


@given(st.fixed_dictionaries(BAR))
def test_whatever_tqdm_writes_is_found(settings):
    bar = tqdm.format_meter(**settings)
    assert execute.PROGRESS_BAR.search(bar), bar


@pytest.mark.parametrize(
    "options",
    [{}, {"total": 9_000_000, "unit_scale": True}, {"total": None, "unit": "step"}, {"leave": False}],
)
def test_a_bar_goes_and_what_is_printed_around_it_stays(options):
    written = io.StringIO("before\n")
    written.seek(0, io.SEEK_END)
    for _ in tqdm(iter(range(3)), file=written, desc="loss 2.31", **{"total": 3} | options):
        pass
    written.write("after\n")
    assert printed(written.getvalue()) == "before\nafter\n"


CELLS_OF_TABLES = st.sampled_from(
    ["web", "50%", "7%", "1/2", "3 steps", "[sic]", "[00:10]", "3.9it/s", "5it [sic]", "9,970 step/s", "████"]
)


@given(st.lists(st.lists(CELLS_OF_TABLES, min_size=2), min_size=1), st.sampled_from(["|", " | ", "| ", "  "]))
def test_tables_stay(rows, between):
    table = "".join(f"| {between.join(row)} |\n" for row in rows)
    assert printed(table) == table


def test_printed_lines_that_look_like_bars_stay():
    lines = ["| 50%| half of the steps |", "5it [sic]", "30%|70% split", "kept 50%| 1/2 of the pages", " "]
    assert printed("\n".join(lines)) == "\n".join(lines)


def printed(text):
    """What a notebook keeps of what a cell printed."""
    cell = code("x")
    cell.outputs = [new_output("stream", name="stdout", text=text)]
    execute.normalise(new_notebook(cells=[cell]))
    return "".join(output.text for output in cell.outputs)


def test_measured_figures_settle():
    assert execute._settled(12, None, slack=5) == 12
    assert execute._settled(12, 10, slack=5) == 10
    assert execute._settled(100, 90, slack=5) == 90
    assert execute._settled(190, 100, slack=5) == 190


def test_no_notebook_at_a_place(tmp_path, capsys):
    assert main(["check", str(tmp_path / "nothing.ipynb")]) == 2
    assert "There is no notebook and no folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "3", '{"nbformat": 4, "nbformat_minor": 5, "cells": 7}', '{"nbformat": 9}']
)
def test_a_broken_notebook_does_not_end_the_check_of_the_others(tmp_path, capsys, content):
    (tmp_path / "broken.ipynb").write_text(content)
    notebook(tmp_path / "topic.ipynb", "1")
    assert main(["check", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert f"{tmp_path / 'broken.ipynb'} is not a notebook: " in said
    assert f"{tmp_path / 'topic.ipynb'}: The outputs are stale" in said


@pytest.mark.parametrize("kind", ["link to nothing", "folder", "pipe"])
def test_what_is_no_file_does_not_end_the_check_of_the_others(tmp_path, capsys, kind):
    odd = tmp_path / "odd.ipynb"
    make = {
        "link to nothing": lambda: odd.symlink_to("nowhere"),
        "folder": odd.mkdir,
        "pipe": lambda: os.mkfifo(odd),
    }
    make[kind]()
    notebook(tmp_path / "topic.ipynb", "1")
    assert main(["check", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert f"{odd} is not a notebook: it is a folder, a pipe, or a link that leads nowhere." in said
    assert f"{tmp_path / 'topic.ipynb'}: The outputs are stale" in said


@pytest.mark.parametrize(
    ("where", "value", "says"),
    [
        ("metadata", {KEY: ["x"]}, "metadata.minicpm_lite: ['x'] is not of type 'object'"),
        (
            "metadata",
            {KEY: {"seconds": "many"}},
            "metadata.minicpm_lite.seconds: 'many' is not of type 'integer'",
        ),
        ("cell", {"mystnb": "x"}, "cells[0].metadata.mystnb: 'x' is not of type 'object'"),
        (
            "cell",
            {"mystnb": {"image": {"alt": 3}}},
            "cells[0].metadata.mystnb.image.alt: 3 is not of type 'string'",
        ),
    ],
)
def test_odd_metadata_is_named(tmp_path, where, value, says):
    content = json.loads(notebook(tmp_path / "topic.ipynb", "1").read_text())
    (content["cells"][0] if where == "cell" else content)["metadata"] = value
    (tmp_path / "topic.ipynb").write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=re.escape(f"topic.ipynb has metadata of another kind than ours: {says}.")
    ):
        Notebook.read(tmp_path / "topic.ipynb")


def test_students_get_all_copies_or_none(tmp_path, capsys):
    notebook(tmp_path / "book" / "a.ipynb", "import helper\nopen('data/x.csv')")
    (tmp_path / "book" / "helper.py").write_text("")
    (tmp_path / "book" / "data").mkdir()
    (tmp_path / "book" / "data" / "x.csv").write_text("")
    (tmp_path / "book" / "z.ipynb").write_text("{")
    command = ["student", str(tmp_path / "out"), str(tmp_path / "book")]
    assert main(command) == 2 and "z.ipynb is not a notebook" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    (tmp_path / "book" / "z.ipynb").unlink()
    assert main(command) == 0
    copied = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*")}
    assert copied == {"book/a.ipynb", "book/helper.py", "book/data/x.csv"}, "all that the copy runs with"


def test_checkpoints_are_not_notebooks(tmp_path, capsys):
    (tmp_path / ".ipynb_checkpoints").mkdir()
    notebook(tmp_path / ".ipynb_checkpoints" / "topic-checkpoint.ipynb", "1")
    assert main(["check", str(tmp_path)]) == 0
    assert "0 notebooks" in capsys.readouterr().out


def test_a_notebook_does_not_replace_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "topic.ipynb")
    with pytest.raises(ValueError, match="is a folder, a pipe or a device"):
        Notebook(tmp_path / "topic.ipynb", new_notebook()).write()
    assert (tmp_path / "topic.ipynb").is_fifo()


def test_a_notebook_is_written_whole_or_not_at_all(tmp_path):
    path = notebook(tmp_path / "topic.ipynb", "1")
    before = path.read_bytes()
    broken = Notebook.read(path)
    broken.nb.cells[0].cell_type = "nonsense"
    with pytest.raises(nbformat.ValidationError):
        broken.write()
    assert path.read_bytes() == before
    assert json.loads(before)["nbformat"] == 4
