"""What CONTRIBUTING.md and CITATION.cff say is so: commands, paths, gates, figures and the version."""

import importlib.util
import re
import shlex
from pathlib import Path

import nbformat
import pytest
import yaml

import minicpm_lite
from minicpm_lite.lab.press import __main__ as press
from minicpm_lite.lab.press import gates
from minicpm_lite.lab.press.notebook import Notebook

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", GUIDE, flags=re.DOTALL)
INLINE = re.findall(r"`((?:make|\.venv/bin/)[^`]*)`", GUIDE)
COMMANDS = [shlex.split(line) for line in [*"".join(BLOCKS).splitlines(), *INLINE]]


def test_it_is_short():
    assert len(GUIDE.splitlines()) < 140


def test_make_knows_its_commands():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = {command[1] for command in COMMANDS if command[0] == "make" and len(command) > 1}
    assert named == {"book", "check", "lab", "run", "test"} and named <= targets


def test_each_path_exists():
    named = re.findall(r"`((?:[\w.]+/)+[\w.]*|\w+\.(?:md|yml))`", GUIDE)
    paths = {name for name in named if not re.search("PART|TOPIC|venv", name)}
    assert len(paths) > 8
    assert not [path for path in paths if not (ROOT / path).exists()]


@pytest.mark.parametrize("command", [c for c in COMMANDS if c[0].startswith(".venv")], ids=" ".join)
def test_each_command_would_run(command, monkeypatch, capsys):
    """In this process, and the long ones up to where they would begin."""
    _, program = command[0].rsplit("/", 1)
    if program == "ruff":
        assert importlib.util.find_spec("ruff") and command[1] in ("check", "format")
    elif command[1] == "-c":
        exec(command[2], {})
        assert minicpm_lite.__version__ in capsys.readouterr().out
    elif command[2] == "pytest":
        assert importlib.util.find_spec("nbval") or "--nbval" not in command
        (file,) = (word for word in command if "/" in word and word != command[0])
        assert (ROOT / file).is_file()
        if "-k" in command:
            assert re.search(rf"def test_\w*{command[-1]}", (ROOT / file).read_text())
    else:
        asked = []
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(press, "run", lambda paths, force: asked.append(paths) or True)
        monkeypatch.setattr(press, "problems", lambda path: asked.append([path]) or [])
        assert command[2] == "minicpm_lite.lab.press" and press.main(command[3:]) == 0
        assert asked == [[Path(command[-1])]]


def test_each_gate_is_explained_with_its_figures():
    explained = dict(re.findall(r"^\| `(_\w+)` \| (.*) \|$", GUIDE, flags=re.MULTILINE))
    assert list(explained) == [gate.__name__ for gate in gates.GATES]
    budget = f"{gates.SECONDS} s, {gates.PEAK_MEMORY_MB:,} MB of memory, and a file of {gates.FILE_BYTES // 10**6} MB"
    assert budget in explained["_within_budget"]
    assert f"{gates.COLUMNS} columns" in explained["_narrow"]


def test_the_first_cell_is_one_that_the_gate_wants():
    (source,) = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL)
    cells = [nbformat.v4.new_code_cell(source)]
    assert not list(gates._starts(Notebook(Path("topic.ipynb"), nbformat.v4.new_notebook(cells=cells))))
    exec(source, {})


def test_the_citation_is_that_of_this_version():
    """The keys are those that the schema of the Citation File Format 1.2 asks for, and some it allows."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation.keys() >= {"cff-version", "message", "title", "authors"}
    assert citation.keys() <= {
        "abstract", "authors", "cff-version", "keywords", "license", "message", "title", "type", "version",
    }  # fmt: skip
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert citation["authors"] == [{"name": "The minicpm_lite authors"}]
    assert citation["version"] == minicpm_lite.__version__ and citation["license"] == "Apache-2.0"
    assert all(isinstance(citation[key], str) for key in ("message", "title", "abstract", "version"))
    assert len(set(citation["keywords"])) == len(citation["keywords"]) > 0
