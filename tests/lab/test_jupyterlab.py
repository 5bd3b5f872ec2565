"""A chapter in JupyterLab, in a real browser: it reads well before it runs, and its pieces work in a live kernel.

The server starts once, in a folder of its own that holds copies, since JupyterLab saves what it opens.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from playwright.sync_api import Browser, Locator, Page, expect

pytestmark = pytest.mark.slow  # JupyterLab, a browser and a kernel start
ROOT = Path(__file__).parents[2]
CHAPTER = ROOT / "notebooks" / "training" / "wsd.ipynb"
LIVE = [
    'from minicpm_lite import lab\n\nlab.start(library="0.2", seed=0)',
    "import matplotlib.pyplot as plt\n\n"
    "def draw(height):\n"
    "    figure, axes = plt.subplots()\n"
    "    axes.plot([0, height])\n"
    "    return figure\n\n"
    'lab.Explorer(draw, [1, 2, 3], "Height", lambda height: f"A line that rises to {height}.")',
    "from minicpm_lite.lab.quiz import Quiz\n\n"
    'Quiz([("What does `2 * 3` give?", ["five", "six"], 1, "Two threes.")])',
    'd = lab.Drawing("Two numbers of which one is made of the other.")\n'
    "sheet = lab.Sheet(d)\n"
    'sheet.part(d.box(4, 4, 60, 24, "2"), "given", "2")\n'
    'sheet.part(d.box(4, 1500, 60, 24, "4"), "double", "4 = 2 × 2", made_of=["given"])\n'
    "sheet",
]
EXERCISE = """```{exercise-start} Twice
:label: ex-twice
```
Write `twice`.

<details class="hint"><summary>Hint: how</summary>

Add *x*<sub>1</sub> to itself.

</details>

```{exercise-end}
```"""
SOLUTION = """:::{solution} ex-twice
:class: dropdown

As $2x = x + x$.
:::"""
FAULTS = """# Live

{.lead}
By {cite:p}`hu2024minicpm`.

```{measured}
```

<details><summary>Hint</summary>

At $W^K$.

</details>"""
# What no reader should see outside code: a role, a fence, an option of a directive, a label, a class, an error,
# a frame of which only one end is in the cell.
RAW = re.compile(
    r"\{[\w:.-]+\}`|^(?:`{3,}|:{3,})|^:[\w-]+:|\([\w-]+\)=|\{\.[\w-]+\}"
    r"|Unknown (?:Directive|Role)|</?details|(?:Start|End) of ",
    re.MULTILINE,
)
# A part says so until it is rendered.
ALL_RENDERED = """expected => {
  const parts = [...document.querySelectorAll('.jp-MarkdownCell .myst')].map(part => part.textContent);
  return parts.filter(text => text.trim() && text !== 'MyST Renderer!').length >= expected;
}"""
# What jupyterlab-myst has rendered, in cells and in outputs.
RENDERED = """() => {
  const parts = [...document.querySelectorAll('.jp-Notebook .myst')];
  const found = {text: '', code: '', links: [], errors: [], untypeset: []};
  for (const part of parts) {
    found.links.push(...[...part.querySelectorAll('a')].map(a => [a.textContent, a.getAttribute('href')]));
    found.errors.push(...[...part.querySelectorAll('[title$="Not Found"]')].map(e => e.textContent));
    const prose = part.cloneNode(true);
    found.untypeset.push(...[...part.querySelectorAll('.math-inline, .math-display')].map(e => e.textContent));
    for (const code of prose.querySelectorAll('pre, code, .katex')) {
      found.code += code.textContent + '\\n';
      code.remove();
    }
    found.text += prose.textContent + '\\n';
  }
  return found;
}"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The chapter, and a small one: markup that JupyterLab does not show, and cells that have not run."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copy(CHAPTER, folder)
    texts = [new_markdown_cell(text) for text in (FAULTS, EXERCISE, SOLUTION)]
    cells = [*texts, *map(new_code_cell, LIVE)]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), folder / "live.ipynb")
    return folder


@pytest.fixture(scope="module")
def address(folder, tmp_path_factory) -> Iterator[str]:
    """A server of its own: nobody's settings, no token, one free port of this machine."""
    home = tmp_path_factory.mktemp("home")
    settings = home / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text('{"fetchNews": "false"}')
    (settings / "themes.jupyterlab-settings").write_text('{"adaptive-theme": true}')
    places = {
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_DATA_DIR": "data",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
        "IPYTHONDIR": "ipython",
    }
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1"]
    command += [f"--port={port}", "--ServerApp.port_retries=0", "--IdentityProvider.token="]
    command += [f"--ServerApp.root_dir={folder}"]
    with (home / "log").open("w+") as log:
        server = subprocess.Popen(
            command,
            env=os.environ | {name: str(home / place) for name, place in places.items()},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            _wait(server, f"http://127.0.0.1:{port}/api", home / "log")
            yield f"http://127.0.0.1:{port}/"
        finally:
            server.terminate()
            server.wait(30)


def _wait(server: subprocess.Popen, address: str, log: Path) -> None:
    end = time.monotonic() + 120
    while server.poll() is None and time.monotonic() < end:
        try:
            urllib.request.urlopen(address).close()
            return
        except OSError:
            time.sleep(0.1)
    pytest.fail(f"JupyterLab does not answer:\n{log.read_text()}", pytrace=False)


@pytest.fixture(scope="module")
def page(address: str, browser: Browser) -> Iterator[Page]:
    """One tab, which must not ask any other machine for anything."""
    page = browser.new_page(service_workers="block", viewport={"width": 1280, "height": 900})
    page.set_default_timeout(120_000)  # a busy machine is slow, which is no fault of the page
    expect.set_options(timeout=120_000)
    elsewhere = []
    page.on("request", lambda request: elsewhere.append(request.url))
    yield page
    page.close()
    assert [url for url in elsewhere if not url.startswith((address, "data:", "blob:"))] == []


def open_notebook(page: Page, address: str, path: Path) -> list[nbformat.NotebookNode]:
    """Its cells, once all that is Markdown has been rendered."""
    cells = nbformat.read(path, as_version=4).cells
    page.goto(f"{address}lab/tree/{path.name}?reset")
    expect(page.locator(".jp-Notebook .jp-Cell")).to_have_count(len(cells))
    expect(page.locator(".jp-MarkdownCell .myst").first, "jupyterlab-myst is not active").to_be_visible()
    page.wait_for_function(ALL_RENDERED, arg=sum(cell.cell_type == "markdown" for cell in cells))
    return cells


def output(page: Page, number: int) -> Locator:
    """What a code cell shows."""
    return page.locator(".jp-CodeCell").nth(number).locator(".jp-OutputArea-output")


@pytest.fixture(scope="module")
def live(page, address, folder) -> Page:
    """The small chapter, after all its cells have run in a kernel."""
    open_notebook(page, address, folder / "live.ipynb")
    kernel = page.locator(".jp-Notebook-ExecutionIndicator")
    expect(kernel).to_have_attribute("data-status", "idle")  # before that there is none to run the cells
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    expect(output(page, len(LIVE) - 1)).to_be_visible()
    return page


def test_a_chapter_reads_well_before_it_runs(page, address, folder):
    cells = open_notebook(page, address, folder / CHAPTER.name)
    shown = page.evaluate(RENDERED)
    assert RAW.findall(shown["text"]) == []
    assert shown["errors"] == [], "references that JupyterLab does not find"
    assert shown["untypeset"] == [], "mathematics in <details>"

    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    words = [label for label, _ in shown["links"]]
    terms = re.findall(r"\{term\}`([^`<]+?)(?: <[^`]*>)?`", text)
    citations = re.findall(r"\[([^\]]*\d{4}[^\]]*)\]\((https?:[^)]*)\)", text)
    titles = re.findall(r"\{exercise-start\} (.*)", text)
    sources = [cell.outputs[0].data["text/plain"] for cell in cells if "lab.source(" in cell.source]
    assert terms and citations and titles and sources
    assert set(terms) <= set(words)
    assert {tuple(citation) for citation in citations} <= {tuple(link) for link in shown["links"]}
    assert [title for title in titles if title not in shown["text"]] == []
    assert [source for source in sources if source not in shown["code"]] == []
    expect(page.locator(".myst").get_by_text("At a glance")).to_be_visible()
    expect(page.locator(".myst").get_by_text("One run of this notebook takes")).to_be_visible()


def test_what_jupyterlab_does_not_show_is_seen(live):
    shown = live.evaluate(RENDERED)
    assert RAW.findall(shown["text"]) == ["{.lead}", "Unknown Directive"]
    assert shown["errors"] == ["hu2024minicpm"]
    assert shown["untypeset"] == ["W^K"]


def test_a_hint_has_a_triangle_and_a_solution_unfolds(live):
    markers = "elements => elements.map(element => getComputedStyle(element).listStyleType)"
    folds = live.locator(".jp-Notebook :is(.hint, .lab-piece details) > summary")
    assert folds.evaluate_all(markers) == ["disclosure-closed"] * 3  # a hint, an answer, all sums of a sheet
    reasoning = live.locator(".myst details", has_text="Solution to Exercise").locator(".katex")
    expect(reasoning).to_be_hidden()
    live.locator(".myst summary", has_text="Solution to Exercise").click(position={"x": 5, "y": 5})
    expect(reasoning).to_be_visible()


def test_the_slider_of_an_explorer_moves_the_picture(live):
    explorer = output(live, 1)
    expect(explorer.get_by_role("img", name="A line that rises to 1.")).to_be_visible()
    explorer.get_by_role("slider").focus()
    live.keyboard.press("ArrowRight")
    expect(explorer.get_by_role("img", name="A line that rises to 2.")).to_be_visible()
    live.keyboard.press("ArrowLeft")
    expect(explorer.get_by_role("img", name="A line that rises to 1.")).to_be_visible()


def test_a_quiz_tells_right_from_wrong(live):
    quiz = output(live, 2)
    quiz.get_by_label("five").check()
    expect(quiz.get_by_role("status")).to_contain_text("Not this one")
    quiz.get_by_label("six").check()
    expect(quiz.get_by_role("status")).to_contain_text("Right. Two threes.")


def test_a_number_of_a_sheet_answers_and_the_answer_stays_in_view(live):
    sheet = output(live, 3)
    sheet.get_by_role("option", name="given").click()
    expect(sheet.get_by_role("status")).to_contain_text("given")
    live.keyboard.press("ArrowDown")
    expect(sheet.get_by_role("status")).to_contain_text("4 = 2 × 2")
    expect(sheet.get_by_role("option", name="double")).to_be_in_viewport()
    expect(sheet.get_by_role("status")).to_be_in_viewport()
