"""A student's copy runs with the wheel alone: in an empty folder, without this repository."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import nbclient
import pytest
from second_edition import chapter
from small_chapter import code

from minicpm_lite.lab.press.execute import _ThisInterpreter
from minicpm_lite.lab.press.notebook import Notebook, tags
from minicpm_lite.lab.press.student import student_copy

ROOT = Path(__file__).parents[3]
# builds a wheel, installs it and starts a kernel: about fifteen seconds
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with nothing but what the wheel brings, built from a copy of what git knows."""
    source, wheels, target = (tmp_path_factory.mktemp(name) for name in ("source", "wheels", "target"))
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    for name in files.stdout.splitlines():
        if name.startswith(("minicpm_lite", "notebooks", "pyproject", "README", "LICENSE", "NOTICE")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name, follow_symlinks=False)
    quiet = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = [*quiet, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    [wheel] = wheels.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(target)
    return target


def test_the_wheel_brings_what_was_recorded_and_no_solutions(installed):
    recorded = {path.relative_to(ROOT / "notebooks") for path in ROOT.glob("notebooks/*/recorded/*")}
    data = {path for path in recorded if path.suffix in (".json", ".safetensors")}
    brought = {
        path.relative_to(installed / "minicpm_lite" / "recorded") for path in installed.rglob("recorded/*/*")
    }
    assert {Path(part, name) for part, _, name in (path.parts for path in data)} == brought
    assert not list(installed.rglob("*.ipynb"))


def test_a_copy_runs_in_an_empty_folder(installed, tmp_path):
    nb = chapter(["twice", "by_pencil"], module="small_exercises")
    nb.cells = [cell for cell in nb.cells if "slow" not in tags(cell)]
    nb.cells[2].source = f"import sys\nsys.path.append({str(Path(__file__).parent)!r})\n{nb.cells[2].source}"
    nb.cells.append(
        code(
            "import json\nruns = json.loads(lab.recorded_file('training/wsd.json').read_text())['runs']\n"
            "import minicpm_lite\nprint(len(runs) > 3, minicpm_lite.__file__)"
        )
    )
    copy = student_copy(Notebook(tmp_path / "topic.ipynb", nb), tmp_path / "empty" / "any name.ipynb")
    (tmp_path / "empty").mkdir()
    copy.write()
    nbclient.NotebookClient(
        copy.nb,
        kernel_manager_class=_ThisInterpreter,
        resources={"metadata": {"path": str(tmp_path / "empty")}},
        timeout=120,
    ).execute(env=os.environ | {"PYTHONPATH": str(installed)})
    outputs = [output for cell in copy.nb.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not any(output.output_type == "error" for output in outputs)
    assert outputs[-1].text.startswith("True ") and str(installed) in outputs[-1].text
    shown = [output.data["text/plain"] for output in outputs if "data" in output]
    assert [text.split(":")[0] for text in shown] == [
        "✎ Your turn (twice)",
        "✎ Your turn (by pencil)",
        "Quiz",
    ]
    assert [path.name for path in (tmp_path / "empty").iterdir()] == ["any name.ipynb"]
