"""What chapters show: words, tables, explorable figures, quizzes, evidence; and how they start."""

import doctest
import importlib
import inspect
import json
import re
import sys
from textwrap import indent

import matplotlib.pyplot as plt
import numpy as np
import pytest

import minicpm_lite
from minicpm_lite import lab
from minicpm_lite.lab import display, evidence
from minicpm_lite.lab.quiz import Quiz
from minicpm_lite.training.wsd import WSD


@pytest.fixture
def shown(monkeypatch):
    """What was displayed, as a list of mime bundles."""
    outputs = []
    monkeypatch.setattr(display, "display", lambda data, raw: outputs.append(data))
    return outputs


@pytest.mark.parametrize("name", ["display", "machine", "quiz"])
def test_examples(name):
    assert doctest.testmod(importlib.import_module(f"minicpm_lite.lab.{name}")).failed == 0


def test_start_seeds_and_sets_the_style():
    import torch

    lab.start(library="0.2", seed=3)
    first = torch.rand(1)
    lab.start(library="0.2.9", seed=3)
    assert torch.equal(torch.rand(1), first)
    assert plt.rcParams["figure.constrained_layout.use"]


def test_start_refuses_another_library(monkeypatch):
    monkeypatch.setattr(lab, "version", lambda package: "0.3.0")
    with pytest.raises(
        RuntimeError, match=r"written for minicpm_lite 0\.2, but 0\.3\.0 is installed: install"
    ):
        lab.start(library="0.2", seed=0)


@pytest.mark.parametrize("package", ["matplotlib", "ipywidgets"])
def test_a_missing_package_is_one_sentence(monkeypatch, package):
    for module in list(sys.modules):
        if module.startswith("minicpm_lite.lab"):
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(minicpm_lite, "lab", lab)  # importing anew would leave another module there
    monkeypatch.setattr("sys.meta_path", [_Without(package), *sys.meta_path])
    for module in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(ImportError, match=rf'{package}.*pip install "minicpm_lite\[notebooks\]"'):
        importlib.import_module("minicpm_lite.lab")


class _Without:
    def __init__(self, package):
        self.package = package

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_say_and_table(shown):
    lab.say("The cache holds **9,216 bytes**.")
    lab.table([["WSD", 12000, 2.71828], ["a|b", 7, 3.0]], ["schedule", "steps", "loss"], "Loss in nats.")
    assert shown[0] == {name: "The cache holds **9,216 bytes**." for name in ("text/plain", "text/markdown")}
    assert shown[1]["text/markdown"].splitlines() == [
        "*Loss in nats.*", "", "| schedule | steps | loss |", "| :--- | ---: | ---: |",
        "| WSD | 12,000 | 2.718 |", r"| a\|b | 7 | 3 |",
    ]  # fmt: skip
    lab.table([[np.int64(12000), np.float32(2.71828), True]], ["steps", "loss", "done"], "Of NumPy.")
    assert shown[2]["text/markdown"].splitlines()[-1] == "| 12,000 | 2.718 | True |"
    assert "WSD       12,000  2.718" in shown[1]["text/plain"]
    with pytest.raises(ValueError, match="Row 1 has 1 cells; expected 2"):
        lab.table([["WSD"]], ["schedule", "steps"], "Loss.")


def test_source_shows_the_library_as_it_is_written(shown):
    lab.source(WSD.__call__)
    plain = shown[0]["text/plain"]
    assert plain.startswith('def __call__(self, step: float) -> float:\n    """Learning rate at a step;')
    assert indent(plain, "    ") in inspect.getsource(WSD)
    assert shown[0]["text/markdown"] == f"From `minicpm_lite.training.wsd`:\n\n```python\n{plain}\n```"


def test_source_shows_a_part(shown):
    lab.source(display.plain_table, start="widths = ", stop="for line in")
    assert shown[0]["text/plain"].startswith("widths = ") and shown[0]["text/plain"].endswith(".rstrip()")
    with pytest.raises(ValueError, match="No line of plain_table holds 'no such words'"):
        lab.source(display.plain_table, start="no such words")


@pytest.mark.parametrize(
    ("start", "stop", "first", "last"),
    [
        ("", "class", "@dataclass(frozen=True)", "@dataclass(frozen=True)"),
        ("@dataclass", "class", "@dataclass(frozen=True)", "@dataclass(frozen=True)"),
        ("def decay_start", "def ", "def decay_start(self) -> int:", "@property"),
        ("def decay_start", "step", "def decay_start(self) -> int:", "def decay_start(self) -> int:"),
    ],
)
def test_source_stops_after_its_first_line(shown, start, stop, first, last):
    lab.source(WSD, start=start, stop=stop)
    lines = shown[0]["text/plain"].splitlines()
    assert (lines[0], lines[-1]) == (first, last)


def test_source_says_where_no_line_holds_the_words_to_stop_at():
    with pytest.raises(ValueError, match="No line of plain_table after 'widths = .*' holds 'widths ='"):
        lab.source(display.plain_table, start="widths =", stop="widths =")


def draw(height):
    figure, axes = plt.subplots(figsize=(2, 1))
    axes.plot([0, {"low": 1, "high": 2}.get(height, 1.0)])
    return figure


def test_an_explorer_has_two_lives():
    explorer = lab.Explorer(draw, ["low", "high"], "Height", lambda v: f"A {v} line <here>.", start=1)
    bundle = explorer._repr_mimebundle_()
    assert set(bundle) == {"text/plain", "text/html", "application/vnd.jupyter.widget-view+json"}
    assert bundle["text/plain"] == "Height: high (one of 2). A high line <here>."
    page = bundle["text/html"]
    assert page == explorer.html(), "the same content gives the same ids"
    assert (
        'alt="A high line &lt;here&gt;."' in page
        and 'aria-valuetext="high. A high line &lt;here&gt;."' in page
    )
    data = json.loads(re.search(r'json">(.*?)</script>', page)[1])
    assert [frame["alt"] for frame in data["frames"]] == ["A low line <here>.", "A high line <here>."]
    drawn = ["".join(data["parts"][part] for part in frame["parts"]) for frame in data["frames"]]
    assert drawn == explorer.frames and drawn[0] != drawn[1]
    assert len(data["parts"]) == len(set(data["parts"])) < len(data["frames"][0]["parts"]) + 5, "one of each"
    assert (
        set(re.findall(r"https?:[^'\"]*", page)) == {"http://www.w3.org/2000/svg"} and plt.get_fignums() == []
    )
    picture, slider = explorer.widget().children
    slider.value = 0
    assert picture.value.startswith('<svg aria-label="A low line &lt;here&gt;."')


def test_an_explorer_shows_drawings():
    def box(width):
        drawing = lab.Drawing("A box.")
        drawing.box(0, 0, width, 20)
        return drawing

    explorer = lab.Explorer(box, (20, 40), "Width", lambda width: f"A box {width} wide.")
    assert explorer.frames == [box(20).svg(), box(40).svg()]


def test_drawings_of_one_explorer_are_of_one_height():
    """Or the slider would move under the finger."""

    def box(height):
        drawing = lab.Drawing("A box.")
        drawing.box(10, 10, 40, height)
        return drawing

    explorer = lab.Explorer(box, (20, 60, 40), "Height", lambda height: f"A box {height} high.")
    heights = {re.search(r"viewBox='0 0 \S+ (\S+)'", frame)[1] for frame in explorer.frames}
    assert heights == {f"{box(60).height:g}"}


def test_a_film_is_played_in_a_kernel_too():
    film = lab.Explorer(draw, ["low", "high"], "Height", lambda v: f"A {v} line.", seconds=0.5)
    picture, controls = film.widget().children
    play, slider = controls.children
    assert (play.interval, play.min, play.max, slider.index) == (500, 0, 1, 0)
    slider.index = 1
    assert "A high line." in picture.value
    assert (
        'data-seconds="[0.5,0.5]"' in film.html()
        and "<button" not in lab.Explorer(draw, ["low", "high"], "Height", lambda v: f"A {v} line.").html()
    )


def test_a_film_may_rest_where_there_is_more_to_read():
    film = lab.Explorer(
        draw, ["low", "high"], "Height", lambda v: f"A {v} line.", seconds={"low": 0.1, "high": 2}.get
    )
    play, slider = film.widget().children[1].children
    assert play.interval == 100
    play.value = 1
    assert play.interval == 2000
    assert 'data-seconds="[0.1,2]"' in film.html()


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"values": [1.0]}, ValueError, "at least two values"),
        ({"start": 2}, ValueError, "start is 2"),
        ({"seconds": 0}, ValueError, "seconds is 0; expected a number greater than 0"),
        ({"draw": lambda v: None}, TypeError, "return figure"),
        ({"alt": "A line."}, TypeError, "expected a function"),
        ({"alt": lambda v: ""}, TypeError, "one sentence"),
    ],
)
def test_an_explorer_refuses(arguments, error, says):
    usual = {"draw": draw, "values": [1.0, 2.0], "label": "Height", "alt": lambda v: f"Height {v}."}
    with pytest.raises(error, match=says):
        lab.Explorer(**usual | arguments)


def test_a_quiz_of_generators():
    questions = [("2 * 3?", ["5", "6"], 1, "Two threes."), ("1 + 1?", ["2", "3"], 0, "Two.")]
    generated = Quiz(
        (question, (option for option in options), *rest) for question, options, *rest in questions
    )
    assert repr(generated) == repr(Quiz(questions))
    assert generated._repr_html_() == Quiz(questions)._repr_html_()


@pytest.mark.parametrize("number", [2, 8, 9, 26, 27, 60])
def test_a_quiz_prints_all_its_options_with_a_letter_each(number):
    options = [f"option {index}" for index in range(number)]
    printed = [line.split(") ") for line in repr(Quiz([("?", options, 0, "")])).splitlines()[2:]]
    assert [option for _, option in printed] == options
    assert len({letter for letter, _ in printed}) == number and printed[0][0].strip() == "a"


def test_a_quiz():
    page = Quiz([("Is `1 < 2`?", ["yes", "no"], 0, 'It "is".')])._repr_html_()
    assert "<code>1 &lt; 2</code>" in page and 'data-right="0"' in page and "It &quot;is&quot;." in page
    for options, right, says in (
        (["a"], 0, "two or more"),
        (["a", "a"], 0, "all different"),
        (["a", "b"], 2, "0 to 1"),
    ):
        with pytest.raises(ValueError, match=says):
            Quiz([("?", options, right, "")])


EVIDENCE = {
    "claim": "WSD ends no higher than cosine.",
    "published": "equal loss",
    "source": "[Hu et al., 2024](https://arxiv.org/abs/2404.06395), section 4.3",
    "published_scale": "0.036 B",
    "measured": "2.31 ± 0.01 nats",
    "scale": "1 M",
    "seeds": (0, 1, 2),
    "device": "CPU, 2 cores",
    "minutes": 1.234,
    "verdict": "direction only",
}


def test_evidence_shows_a_table_and_carries_its_record():
    bundle = lab.Evidence(**EVIDENCE)._repr_mimebundle_()
    assert bundle[evidence.MIME] == EVIDENCE | {"seeds": [0, 1, 2], "minutes": 1.2}
    assert json.loads(json.dumps(bundle)) == bundle
    assert f"| From | {EVIDENCE['source']} | 3 seeds, CPU, 2 cores, 1.2 min |" in bundle["text/markdown"]
    assert "From      Hu et al., 2024, section 4.3  3 seeds" in bundle["text/plain"]
    assert "direction only" in bundle["text/plain"]
    assert "exact count" in lab.Evidence(**EVIDENCE | {"seeds": ()})._repr_mimebundle_()["text/plain"]


@pytest.mark.parametrize(
    ("field", "value"),
    [("verdict", "proved"), ("source", "Hu et al."), ("measured", " "), ("published", 0.5)],
)
def test_evidence_refuses(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value!r}; expected"):
        lab.Evidence(**EVIDENCE | {field: value})


@pytest.mark.parametrize("seeds", [3, "012", b"012", None, {0, 1}, iter([0])])
def test_evidence_refuses_seeds_that_are_no_list(seeds):
    with pytest.raises(ValueError, match=re.escape(f"seeds is {seeds!r}; expected a list of seeds")):
        lab.Evidence(**EVIDENCE | {"seeds": seeds})


@pytest.mark.parametrize("seed", ["0", 0.5, True, -1])
def test_evidence_refuses_what_is_no_seed(seed):
    with pytest.raises(ValueError, match=f"seed is {seed!r}; expected a whole number"):
        lab.Evidence(**EVIDENCE | {"seeds": [0, seed]})
