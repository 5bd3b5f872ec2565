"""Each gate refuses the notebook it is there for, and no other gate does; the clean chapter passes all."""

import contextlib
import copy
import json
import logging
import random

import nbformat
import pytest
from nbformat.v4 import new_output
from small_chapter import (
    BLANK,
    PICTURE,
    PROMPT,
    REASONING,
    SOLUTION,
    START,
    chapter,
    code,
    sealed,
    shown,
)

from minicpm_lite.lab import svg
from minicpm_lite.lab.press.__main__ import main
from minicpm_lite.lab.press.gates import FILE_BYTES, GATES, _pictures_are_svg, problems
from minicpm_lite.lab.press.notebook import KEY, Notebook
from minicpm_lite.lab.svg import UNDESCRIBED


def test_the_clean_chapter_passes(write, capsys):
    path = write(chapter())
    assert problems(path) == []
    assert main(["check", str(path)]) == 0
    assert "No problems in 1 notebook." in capsys.readouterr().out


def no_seed(nb):
    nb.cells[START].source = 'from minicpm_lite import lab\n\nlab.start(library="0.2")'


def no_start(nb):
    nb.cells[START].source = "from minicpm_lite import lab"


def start_comes_late(nb):
    nb.cells.insert(START, code("1 + 1", "2"))


def traceback_shown(nb):
    nb.cells[PICTURE].outputs += [new_output("error", ename="ValueError", evalue="no", traceback=["no"])]


def no_alt_text(nb):
    del nb.cells[PICTURE].metadata["mystnb"]
    nb.cells[PICTURE].outputs = [shown(UNDESCRIBED)]


def stored_image_without_alt_text(nb):
    del nb.cells[PICTURE].metadata["mystnb"]
    nb.cells[PICTURE].metadata[KEY] = {"raster": "a photograph"}
    nb.cells[PICTURE].outputs = [new_output("display_data", {"image/png": "aGk="})]


def picture_of_pixels(nb):
    nb.cells[PICTURE].outputs[0].data["image/png"] = "aGk="


def markdown_image_without_alt_text(nb):
    nb.cells[0].source += "\n\n![](grid.png)"


def html_image_without_alt_text(nb):
    nb.cells[PICTURE].outputs = [new_output("display_data", {"text/html": '<p><img src="grid.png"></p>'})]


def no_cost_told(nb):
    nb.cells[0].source = "# A topic"


def cost_told_twice(nb):
    nb.cells[0].source += "\n\n" + nb.cells[0].source.splitlines()[-1]


def holds(markup):
    def spoil(nb):
        nb.cells[0].source += f"\n\n{markup}"

    return spoil


def hint_holds(markup):
    def spoil(nb):
        nb.cells[PROMPT].source = nb.cells[PROMPT].source.replace("At the plus sign.", markup)

    return spoil


def citation_in_an_output(nb):
    nb.cells[PICTURE].outputs += [
        new_output("display_data", {"text/markdown": "See {cite:p}`hu2024minicpm`."})
    ]


def cdn_in_output(nb):
    html = '<script src="https://cdn.jsdelivr.net/npm/vega"></script>'
    nb.cells[PICTURE].outputs += [new_output("display_data", {"text/html": html})]


def cdn_in_code(nb):
    nb.cells[PICTURE].source += '\nload("https://unpkg.com/three")'


def remote_image(nb):
    nb.cells[0].source += "\n\n![A grid](https://example.org/grid.png)"


def remote_style(nb):
    html = "<style>@import url(//example.org/a.css)</style>"
    nb.cells[PICTURE].outputs += [new_output("display_data", {"text/html": html})]


def progress_bar(nb):
    nb.cells[PICTURE].outputs += [
        new_output("stream", text=" 40%|████      | 4/10 [00:01<00:01,  3.9it/s]\n")
    ]


def path_of_the_machine(nb):
    nb.cells[PICTURE].outputs += [new_output("stream", text="saved to /home/someone/run.safetensors\n")]


def redefines_function(nb):
    nb.cells[PICTURE].source += "\n\n\ndef load_config(name):\n    return name"


def redefines_by_assignment(nb):
    nb.cells[PICTURE].source += "\n\nWSD, step = 1, 2"


def binds_an_answer(nb):
    nb.cells[PICTURE].source += "\n\ntwice, thrice = {}, {}"


def no_check(nb):
    nb.cells[BLANK].source = "def twice(x):\n    ..."


def no_frame(nb):
    nb.cells[PROMPT].source = (
        nb.cells[PROMPT].source.split("```\n", 1)[1].replace("```{exercise-end}\n```", "")
    )


def one_hint(nb):
    nb.cells[PROMPT].source = nb.cells[PROMPT].source.replace('<details class="hint">', "<details>", 1)


def something_between(nb):
    nb.cells.insert(BLANK, code("1 + 1", "2"))


def no_solution(nb):
    del nb.cells[SOLUTION]


def other_solution(nb):
    nb.cells[SOLUTION].source = "check.thrice.accepts(lambda x: 3 * x)"


def no_reasoning(nb):
    nb.cells[REASONING].source = ":::{solution} ex-twice\n:class: dropdown\n\nHere it is.\n:::"


def blank_filled_in(nb):
    nb.cells[BLANK].source = "def twice(x):\n    return 2 * x\n\n\ncheck.twice(twice)"


def answer_shown(nb):
    nb.cells[BLANK].outputs = nb.cells[SOLUTION].outputs


def check_in_the_open(nb):
    source = '@lab.exercise("twice")\ndef check_twice(answer):\n    assert answer(2) == 4, "Twice 2 is 4."'
    nb.cells.insert(PROMPT, code(source))


def quiz_in_the_open(nb):
    nb.cells.append(code('Quiz([("What is twice 2?", ["3", "4"], 1, "Two twos.")])'))


def solution_without_tag(nb):
    nb.cells.append(code("check.twice.accepts(lambda x: 2 * x)"))


def reporting_shown(nb):
    nb.cells[PICTURE].source += '\nlab.say("It rises.")'


def reporting_folded_on_the_page_alone(nb):
    reporting_shown(nb)
    nb.cells[PICTURE].metadata["tags"] = ["hide-input"]


def solution_open_in_lab(nb):
    del nb.cells[SOLUTION].metadata["jupyter"]


def solution_open_on_the_page(nb):
    nb.cells[SOLUTION].metadata["tags"] = ["solution"]


def solution_without_prompt(nb):
    del nb.cells[SOLUTION].metadata["mystnb"]


def reasoning_open(nb):
    nb.cells[REASONING].source = nb.cells[REASONING].source.replace(":class: dropdown\n", "")


def reasoning_without_tag(nb):
    del nb.cells[REASONING].metadata["tags"]


def more_beside_the_reasoning(nb):
    nb.cells[REASONING].source += "\n\nAnd on we go."


def reasoning_elsewhere(nb):
    nb.cells.insert(SOLUTION, code("1 + 1", "2"))


def wide(nb):
    nb.cells[PICTURE].source += "\n# " + 78 * "-"


def too_large(nb):
    nb.cells[PICTURE].outputs[0].data["text/plain"] = "a" * (FILE_BYTES + 1)


def found_by_gates(path) -> dict[str, list[str]]:
    """The problems that each gate finds; those that find none are left out."""
    notebook = Notebook.read(path)
    found = {gate.__name__: list(gate(notebook)) for gate in GATES}
    return {gate: problems for gate, problems in found.items() if problems}


@pytest.mark.parametrize(
    ("spoil", "gate", "says"),
    [
        (no_seed, "_starts", "lab.start"),
        (no_start, "_starts", "lab.start"),
        (start_comes_late, "_starts", "lab.start"),
        (traceback_shown, "_executed", "traceback"),
        (too_large, "_within_budget", "3.0 MB; the budget is 3 MB"),
        (no_cost_told, "_measured", "10 s and 500 MB of memory"),
        (cost_told_twice, "_measured", "once"),
        (holds("By {cite:t}`hu2024minicpm{section 4}`."), "_reads_everywhere", "cite with a link"),
        (citation_in_an_output, "_reads_everywhere", "cite with a link"),
        (holds("After {doc}`/notebooks/language/decoder`."), "_reads_everywhere", "link to the file"),
        (holds("See {numref}`fig-loss`."), "_reads_everywhere", "say which figure"),
        (holds("```{literalinclude} ../a.py\n:pyobject: f\n```"), "_reads_everywhere", "lab.source"),
        (holds(":::{grid} 2\n:::"), "_reads_everywhere", "plain Markdown"),
        (holds("A {class}`~minicpm_lite.training.wsd.WSD`."), "_reads_everywhere", "without ~"),
        (holds("{.lead}\nThe first sentence."), "_reads_everywhere", "{.lead}"),
        (hint_holds("At $W^K$."), "_reads_everywhere", "$W^K$ in <details>"),
        (hint_holds("At a {term}`token`."), "_reads_everywhere", "{term}`token` in <details>"),
        (holds("```{math}\na = b\n```"), "_reads_everywhere", "plain Markdown"),
        (holds("See [](#ex-twice)."), "_reads_everywhere", "[](#ex-twice)"),
        (holds("See [the exercise](ex-twice)."), "_reads_everywhere", "write #ex-twice"),
        (no_alt_text, "_described", "without alt text"),
        (stored_image_without_alt_text, "_described", "without alt text"),
        (picture_of_pixels, "_pictures_are_svg", "no SVG (image/png)"),
        (markdown_image_without_alt_text, "_described", "without alt text"),
        (html_image_without_alt_text, "_described", "without alt text"),
        (cdn_in_output, "_offline", "network"),
        (cdn_in_code, "_offline", "CDN"),
        (remote_image, "_offline", "network"),
        (remote_style, "_offline", "network"),
        (progress_bar, "_clean", "progress bar"),
        (path_of_the_machine, "_clean", "/home/someone"),
        (redefines_function, "_keeps_names", "redefines load_config"),
        (
            redefines_by_assignment,
            "_keeps_names",
            "redefines WSD, a public name of minicpm_lite.training.wsd",
        ),
        (binds_an_answer, "_keeps_answers", "binds twice, the answer to an exercise, once more"),
        (no_check, "_exercises_complete", "does not call its check"),
        (no_frame, "_exercises_complete", "right behind its text"),
        (one_hint, "_exercises_complete", "fewer than 2 folded hints"),
        (something_between, "_exercises_complete", "right behind its text"),
        (no_solution, "_exercises_complete", "no solution that its check accepts"),
        (other_solution, "_exercises_complete", "no solution that its check accepts"),
        (no_reasoning, "_exercises_complete", "does not reason"),
        (blank_filled_in, "_exercises_complete", "no blank"),
        (answer_shown, "_exercises_complete", "not shown as unfinished"),
        (check_in_the_open, "_no_answers", "answers can be read"),
        (quiz_in_the_open, "_no_answers", "answers can be read"),
        (solution_without_tag, "_no_answers", "no tag solution"),
        (reporting_shown, "_reporting_folded", "only reports (lab.say)"),
        (reporting_folded_on_the_page_alone, "_reporting_folded", "only reports"),
        (wide, "_narrow", "a line of 80 columns; the page shows 79"),
        (solution_open_in_lab, "_solutions_folded", "open in JupyterLab"),
        (solution_open_on_the_page, "_solutions_folded", "open on the page"),
        (solution_without_prompt, "_solutions_folded", "Show the solution"),
        (reasoning_open, "_solutions_folded", "hold nothing but"),
        (reasoning_without_tag, "_solutions_folded", "tag it solution"),
        (more_beside_the_reasoning, "_solutions_folded", "hold nothing but"),
        (reasoning_elsewhere, "_solutions_folded", "right behind its reasoning"),
    ],
)
def test_a_spoilt_chapter_fails_one_gate(write, spoil, gate, says):
    nb = chapter()
    spoil(nb)
    path = write(nb)
    found = found_by_gates(path)
    assert list(found) == [gate]
    assert any(says in problem for problem in found[gate])


def edited_after_the_run(nb):
    nb.cells[PICTURE].source += "\n1 + 1"


def never_run(nb):
    del nb.metadata[KEY]


def one_cell_not_run(nb):
    nb.cells[PICTURE].execution_count = None


def run_out_of_order(nb):
    nb.cells[PICTURE].execution_count = 7


def another_cost_told(nb):
    nb.cells[0].source = nb.cells[0].source.replace("10 s", "9 s")


def too_slow(nb):
    nb.cells[0].source = nb.cells[0].source.replace("10 s", "3.0 min")
    nb.metadata[KEY]["seconds"] = 181


def too_much_memory(nb):
    nb.cells[0].source = nb.cells[0].source.replace("500 MB", "3,001 MB")
    nb.metadata[KEY]["peak_memory_mb"] = 3001


@pytest.mark.parametrize(
    ("spoil", "gate", "says"),
    [
        (edited_after_the_run, "_fresh", "stale: its code cells changed"),
        (never_run, "_fresh", "never run"),
        (one_cell_not_run, "_executed", "not run"),
        (run_out_of_order, "_executed", "in order"),
        (another_cost_told, "_measured", "as the last run left it"),
        (too_slow, "_within_budget", "181 s; the budget is 180 s"),
        (too_much_memory, "_within_budget", "3,001 MB; the budget is 3,000 MB"),
    ],
)
def test_a_chapter_spoilt_after_its_run_fails_one_gate(write, spoil, gate, says):
    path = write(chapter())
    nb = nbformat.read(path, as_version=4)
    spoil(nb)
    nbformat.write(nb, path)
    found = found_by_gates(path)
    assert list(found) == [gate]
    assert any(says in problem for problem in found[gate])


PNG = "data:image/png;base64,aGk="


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        ({"image/png": "aGk="}, "image/png"),
        ({"image/jpeg": "aGk=", "text/html": "<p>A photograph</p>"}, "image/jpeg"),
        ({"text/html": f'<p><img alt="A line." src="{PNG}"></p>'}, "image/png"),
        (shown("A line.").data | {"image/png": "aGk="}, "image/png"),
    ],
)
def test_a_picture_that_is_no_svg_needs_a_reason(write, data, kind):
    nb = chapter()
    nb.cells[PICTURE].outputs = [new_output("display_data", data)]
    [problem] = _pictures_are_svg(Notebook.read(write(nb)))
    assert f"Cell {PICTURE + 1} shows a picture that is no SVG ({kind})" in problem
    nb.cells[PICTURE].metadata[KEY] = {"raster": " "}
    assert len(list(_pictures_are_svg(Notebook.read(write(nb))))) == 1, "a blank is no reason"
    nb.cells[PICTURE].metadata[KEY] = {"raster": "A photograph has no lines to draw."}
    assert list(_pictures_are_svg(Notebook.read(write(nb)))) == []


@pytest.mark.parametrize("body", ["<path d='M0 0'/>", f"<image href='{PNG}' width='4' height='4'/>"])
def test_an_svg_needs_no_reason_not_even_with_a_matrix_of_pixels(write, body):
    nb = chapter()
    html = svg.picture(svg.document(360, 200, body), "A line.")
    nb.cells[PICTURE].outputs = [new_output("display_data", {"text/html": html})]
    assert list(_pictures_are_svg(Notebook.read(write(nb)))) == []


def test_check_tells_and_fails(write, capsys):
    nb = chapter()
    no_seed(nb)
    path = write(nb)
    assert main(["check", str(path)]) == 1
    assert f"{path}: The first code cell does not call lab.start" in capsys.readouterr().out


def test_every_gate_has_a_fixture():
    fixtures = [
        *test_a_spoilt_chapter_fails_one_gate.pytestmark,
        *test_a_chapter_spoilt_after_its_run_fails_one_gate.pytestmark,
    ]
    assert {gate for mark in fixtures for _, gate, _ in mark.args[1]} == {gate.__name__ for gate in GATES}


def test_imports_and_names_of_its_own_redefine_nothing(write):
    nb = chapter()
    nb.cells[PICTURE].source += "\nfrom minicpm_lite import load_config\n\nnaive_WSD = load_config"
    assert problems(write(nb)) == []


ODD = (
    None,
    True,
    7,
    -1.5,
    float("nan"),
    "x",
    "",
    [],
    ["x"],
    {},
    {"x": 1},
    [[1]],
    "<![x[ <img",
    "\ud800",
    "\0",
    "import (",
)


@pytest.mark.slow  # looks at a chapter in many ways
def test_no_value_in_a_notebook_ends_a_check(tmp_path, monkeypatch):
    """Any one or two values of the file are replaced by odd ones; problems are sentences, never errors."""
    # nbformat logs what it finds, half a character too, which a worker could not send on
    monkeypatch.setattr(logging.getLogger("traitlets"), "disabled", True)
    spoiled = chapter()
    spoiled.cells[0].metadata["mystnb"] = {"image": {"alt": "x"}}
    path = sealed(spoiled, tmp_path / "topic.ipynb")
    good, chance = json.loads(path.read_text()), random.Random(0)
    places = [place for place in _places(good) if place]
    for _ in range(150):
        content = copy.deepcopy(good)
        for place in chance.sample(places, chance.choice([1, 2])):
            *above, last = place
            holder = content
            with contextlib.suppress(TypeError, LookupError):  # the first value may have held the second
                for key in above:
                    holder = holder[key]
                holder[last] = chance.choice(ODD)
        path.unlink()  # where a file is cut and written again, some systems wait for the disk
        path.write_text(json.dumps(content))
        assert all(isinstance(problem, str) for problem in problems(path))


def _places(value, place=()):
    yield place
    for key, inside in (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    ):
        yield from _places(inside, (*place, key))


def test_names_of_commands_may_be_used(write):
    """`minicpm_lite.cli.tokenizer` is a command, which no chapter imports."""
    nb = chapter()
    nb.cells[PICTURE].source += "\ntokenizer = models = shards = 1"
    assert problems(write(nb)) == []
