"""A stamp notices what can change an output, and nothing else."""

import doctest
import inspect
import typing
from pathlib import Path

import pytest
from nbformat.v4 import new_output
from small_chapter import PICTURE, START, chapter

from minicpm_lite import config
from minicpm_lite.lab.press import stamps
from minicpm_lite.lab.press.notebook import KEY, Notebook
from minicpm_lite.lab.press.stamps import needed_files, stamp, why_stale

MODULES = {
    "__init__.py": "from .config import load_config\n",
    "config.py": "def load_config(name):\n    return open(name)\n\n\nload_rope_scaling = load_config\n",
    "configs/small.yaml": "model: 1",
    "configs/large.yaml": "model: 2",
    "data/__init__.py": "",
    "data/texts.py": "from pathlib import Path\nread = (Path(__file__).parent / 'assets' / 'novels').iterdir\n",
    "data/assets/novels/emma.txt": "Emma Woodhouse",
    "language/__init__.py": "",
    "language/decoder.py": (
        '"""What it is."""\nfrom . import rope\n\ndef decode():\n    """Decode."""\n    return rope.turn()\n'
    ),
    "language/rope.py": "def turn():\n    return 1  # radian\n",
    "training/__init__.py": "from .wsd import WSD\nfrom .trainer import train\n",
    "training/wsd.py": "class WSD: pass\n",
    "training/trainer.py": "def train():\n    from ..language.decoder import decode\n    decode()\n",
}
TRAINER = {"training/trainer.py", "language/decoder.py", "language/rope.py"}
CONFIGS = {"configs/small.yaml", "configs/large.yaml"}


@pytest.fixture
def library(tmp_path):
    """A library in small."""
    for name, source in MODULES.items():
        file = tmp_path / "minicpm_lite" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
    return tmp_path / "minicpm_lite"


@pytest.fixture
def notebook(tmp_path):
    """A notebook that imports from it."""

    def build(*sources: str) -> Notebook:
        nb = chapter()
        nb.cells[START].source, nb.cells[PICTURE].source = (
            "%matplotlib inline\n" + sources[0],
            "\n".join(sources[1:]),
        )
        return Notebook(tmp_path / "topic.ipynb", nb)

    return build


def changed(before: dict, after: dict) -> set[str]:
    return {part for part in before if before[part] != after[part]}


def test_code_and_tags_count_but_prose_and_outputs_do_not(notebook):
    topic = notebook("x = 1")
    before = stamp(topic)
    topic.nb.cells[0].source = "# Another title"
    topic.nb.cells[PICTURE].outputs = []
    assert stamp(topic) == before
    topic.nb.cells[START].metadata["mystnb"] = {"image": {"alt": "Another text."}}
    assert changed(before, stamp(topic)) == {"cells"}, "the stored plot carries its description"
    before = stamp(topic)
    topic.nb.cells[START].metadata["tags"] = ["hide-input"]
    assert changed(before, stamp(topic)) == {"cells"}
    topic.nb.cells[START].metadata["tags"] = []
    topic.nb.cells[START].source += "\n"  # an editor's last line is no change
    assert stamp(topic) == before
    topic.nb.cells[START].source += "y = 2"
    assert changed(before, stamp(topic)) == {"cells"}


@pytest.mark.parametrize(
    ("imports", "reached"),
    [
        ("import numpy", set()),
        ("import minicpm_lite.language.rope", {"language/rope.py"}),
        ("from minicpm_lite.language import rope", {"language/rope.py"}),
        ("from minicpm_lite.language.decoder import decode", {"language/decoder.py", "language/rope.py"}),
        ("from minicpm_lite import load_config", {"config.py"}),
        ("from minicpm_lite.training import WSD", {"training/wsd.py"}),
        ("from minicpm_lite.training import train as t", TRAINER),
        ("import minicpm_lite.training as t", TRAINER | {"training/wsd.py"}),
        ("import minicpm_lite\nminicpm_lite.load_config('small')", {"config.py", "configs/small.yaml"}),
        ("from minicpm_lite import load_config\nload_config(name)", {"config.py"} | CONFIGS),
        ("from minicpm_lite import load_config as lc\nlc('small')", {"config.py", "configs/small.yaml"}),
        ("from minicpm_lite import load_config as lc\nread = lc\nread('small')", {"config.py"} | CONFIGS),
        (
            "from minicpm_lite.config import load_rope_scaling\nload_rope_scaling('large')",
            {"config.py", "configs/large.yaml"},
        ),
        ("from minicpm_lite.data.texts import read", {"data/texts.py", "data/assets/novels/emma.txt"}),
    ],
)
def test_what_a_notebook_reaches_counts_and_the_rest_does_not(library, notebook, imports, reached):
    topic = notebook(imports)
    before = stamp(topic, library)
    for name in MODULES:
        file = library / name
        content = file.read_text()
        file.write_text(content + ("\nadded = 1\n" if name.endswith(".py") else "\nadded: 1\n"))
        expected = name in reached or (name.endswith("__init__.py") and _holds(name, reached))
        assert (stamp(topic, library) != before) == expected, name
        file.write_text(content)


def _holds(package: str, reached: set[str]) -> bool:
    return any(
        file.endswith(".py") and file.startswith(package.removesuffix("__init__.py")) for file in reached
    )


def test_docstrings_and_comments_of_the_library_do_not_count(library, notebook):
    topic = notebook("from minicpm_lite.language.decoder import decode")
    before = stamp(topic, library)
    decoder, rope = library / "language" / "decoder.py", library / "language" / "rope.py"
    decoder.write_text(decoder.read_text().replace("What it is", "Another").replace("Decode", "Decodes"))
    rope.write_text("# new\n\n" + rope.read_text().replace("radian", "rad"))
    assert stamp(topic, library) == before
    rope.write_text(rope.read_text().replace("1", "2"))
    assert changed(before, stamp(topic, library)) == {"library"}


def test_code_that_is_shown_counts_with_its_docstring(library, notebook):
    topic = notebook("from minicpm_lite.language.decoder import decode", "lab.source(decode)")
    decoder = library / "language" / "decoder.py"
    code = decoder.read_text().partition("\n\n")[2].rstrip()
    markdown = f"From `minicpm_lite.language.decoder`:\n\n```python\n{code}\n```"
    topic.nb.cells[PICTURE].outputs = [new_output("display_data", {"text/markdown": markdown})]
    topic.nb.metadata[KEY] = {"stamp": stamp(topic, library)}
    assert why_stale(topic, library) is None
    decoder.write_text(decoder.read_text().replace('"""Decode."""', '"""Decodes."""'))
    assert why_stale(topic, library) == "code of the library that it shows changed"
    decoder.unlink()
    assert "code of the library that it shows changed" in why_stale(topic, library)


def test_recorded_runs_count(notebook, tmp_path):
    (tmp_path / "recorded").mkdir()
    (tmp_path / "other" / "recorded").mkdir(parents=True)
    for file in ("recorded/topic.json", "recorded/stranger.json", "other/recorded/model.json"):
        (tmp_path / file).write_text("[1]")
    topic = notebook("x = 1", 'open("other/recorded/model.json")')
    assert [file.name for file in needed_files(topic)] == [
        "model.json"
    ]  # of the others the library has copies
    before = stamp(topic)
    (tmp_path / "recorded" / "stranger.json").write_text("[2]")
    assert stamp(topic) == before
    for file in ("recorded/topic.json", "other/recorded/model.json"):
        (tmp_path / file).write_text("[2]")
        assert changed(before, stamp(topic)) == {"recorded"}
        (tmp_path / file).write_text("[1]")


@pytest.mark.parametrize(
    "asked", ["'training/wsd.json'", "f'training/{name}.json'", "f'{part}/wsd.json'", "name"]
)
def test_recorded_runs_that_come_with_the_library_count(notebook, tmp_path, asked):
    here = tmp_path / "book" / "part"
    file = tmp_path / "book" / "training" / "recorded" / "wsd.json"
    for folder in (here, file.parent):
        folder.mkdir(parents=True)
    file.write_text("[1]")
    topic = Notebook(here / "topic.ipynb", notebook(f"lab.recorded_file({asked})").nb)
    assert needed_files(topic) == []
    before = stamp(topic)
    file.write_text("[2]")
    assert changed(before, stamp(topic)) == {"recorded"}


def test_a_stale_notebook_says_why(write, tmp_path):
    topic = Notebook.read(write(chapter()))
    assert why_stale(topic) is None
    (tmp_path / "recorded").mkdir()
    (tmp_path / "recorded" / "topic.json").write_text("[]")
    topic.nb.cells[START].source += "\n1"
    assert why_stale(topic) == (
        "its code cells changed, and recorded runs or other files beside it that it uses changed"
    )


def test_the_example_holds():
    assert doctest.testmod(stamps).failed == 0


def test_every_reader_of_configs_is_known():
    """Whatever takes the name of a config, or gives the names of all."""
    public = {
        name: function
        for name, function in vars(config).items()
        if inspect.isfunction(function) and function.__module__ == config.__name__ and name[0] != "_"
    }
    by_name = {
        name for name, function in public.items() if typing.get_type_hints(function).get("name") == str | Path
    }
    assert by_name == stamps._READS_ONE_CONFIG
    assert stamps._READS_CONFIGS - by_name == {"list_configs"}


BESIDE = {
    "helper.py": "import deeper\nx = 1\n",
    "deeper.py": "from minicpm_lite.language.rope import turn\nopen('numbers.csv')\n",
    "tools/__init__.py": "",
    "tools/draw.py": "from . import colors\n",
    "tools/colors.py": "red = 1\n",
    "recorded/shared.py": "x = 1\n",
    "numbers.csv": "1",
    "pictures/a.txt": "1",
    "pictures/deep/b.txt": "1",
    "recorded/other.json": "1",
    "recorded/another.json": "1",
    "broken.py": "import (",
}
NUMBERS = {"deeper.py", "numbers.csv", "language/rope.py"}


@pytest.mark.parametrize(
    ("source", "used"),
    [
        ("import numpy, json", set()),
        ("import helper", {"helper.py"} | NUMBERS),
        ("from helper import x as y", {"helper.py"} | NUMBERS),
        ("from tools.draw import *", {"tools/__init__.py", "tools/draw.py", "tools/colors.py"}),
        ("from tools import colors", {"tools/__init__.py", "tools/colors.py"}),
        ("from recorded.shared import x", {"recorded/shared.py"}),
        ("from recorded import shared", {"recorded/shared.py"}),
        ("import broken", {"broken.py"}),
        ("%run helper.py", {"helper.py"}),
        ("open('numbers.csv').read()", {"numbers.csv"}),
        ("open('./pictures/../numbers.csv')", {"numbers.csv"}),
        ("Path('pictures/a.txt').read_text()", {"pictures/a.txt"}),
        ("Path('pictures') / 'a.txt'", {"pictures/a.txt"}),
        ("Path('pictures', 'deep', name)", {"pictures/deep/b.txt"}),
        ("folder / 'a.txt'", {"pictures/a.txt"}),
        ("[*Path('pictures').rglob('*')]", {"pictures/a.txt", "pictures/deep/b.txt"}),
        ("open(f'pictures/{name}.txt')", {"pictures/a.txt"}),
        ("open(f'{folder}/other.json')", {"recorded/other.json"}),
        ("glob('recorded/*.json')", {"recorded/other.json", "recorded/another.json"}),
        ("say(f'{len(open(\"numbers.csv\").read()):,} bytes, {1 / 2} **x** {a}/{b} {c}')", {"numbers.csv"}),
        ("plot(label='recorded', title='pictures', unit='tokens/s', marker='*', path='/', up='..')", set()),
        ("say('Run recorded/shared.py, and look at\\nnumbers.csv')", set()),
    ],
)
def test_what_stands_beside_a_notebook_counts_if_it_is_used(library, notebook, tmp_path, source, used):
    here = tmp_path / "part"
    for name, content in BESIDE.items():
        file = here / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    (here / "topic.ipynb").write_text("{}")  # no notebook is a file that another one uses
    topic = Notebook(here / "topic.ipynb", notebook(source).nb)
    before = stamp(topic, library)
    for file in [*(here / name for name in BESIDE), library / "language" / "rope.py"]:
        content = file.read_text()
        file.write_text(content + "\nadded = 1\n")
        name = str(file.relative_to(library if file.is_relative_to(library) else here))
        part = "library" if name == "language/rope.py" else "recorded"
        assert changed(before, stamp(topic, library)) == ({part} if name in used else set()), name
        file.write_text(content)
    assert {str(file.relative_to(here)) for file in needed_files(topic)} == used - {"language/rope.py"}


def test_what_stands_outside_the_notebooks_is_no_file_of_theirs(notebook, tmp_path):
    outside = tmp_path / "secret.txt"
    outside.write_text("1")
    (tmp_path / "book" / "part").mkdir(parents=True)
    inside = tmp_path / "book" / "shared.txt"
    inside.write_text("1")
    sources = f"open({str(outside)!r}), open('../../secret.txt'), open('../shared.txt')"
    topic = Notebook(tmp_path / "book" / "part" / "topic.ipynb", notebook(sources).nb)
    assert needed_files(topic) == [inside]
