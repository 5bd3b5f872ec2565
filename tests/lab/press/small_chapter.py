"""A small chapter that passes every gate, made without a kernel, for the tests to spoil."""

from pathlib import Path

from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from minicpm_lite.lab import svg
from minicpm_lite.lab.press.notebook import KEY, Notebook
from minicpm_lite.lab.press.stamps import stamp


def code(source: str, text: str | None = None, tags: tuple[str, ...] = (), **metadata):
    """A code cell with a plain text output."""
    outputs = [new_output("display_data", {"text/plain": text})] if text else []
    metadata |= {"tags": list(tags)} if tags else {}
    return new_code_cell(source, outputs=outputs, metadata=metadata)


START, PICTURE, PROMPT, BLANK, REASONING, SOLUTION = range(1, 7)

PROMPT_TEXT = """```{exercise-start} Twice
:label: ex-twice
```
Write `twice`.

<details class="hint"><summary>Hint: where to look</summary>

At the plus sign.

</details>
<details class="hint"><summary>Hint: how</summary>

Add it to itself.

</details>

```{exercise-end}
```"""


TITLE_TEXT = """# A topic

See {term}`token`, [Hu et al., 2024](https://arxiv.org/abs/2404.06395) and [the decoder](decoder.ipynb).

**One run of this notebook takes** 10 s and 500 MB of memory, measured on CPU, 2 cores."""


def shown(alt: str):
    """The output of a plot."""
    html = svg.picture(svg.document(360, 200, "<path d='M0 200L360 0'/>"), alt)
    return new_output("display_data", {"text/html": html, "text/plain": "<Figure size 500x280 with 1 Axes>"})


def chapter():
    """The cells; the names above are their places."""
    picture = code(
        "import numpy as np\n\nplot(np.arange(3));",
        mystnb={"image": {"alt": "A line that rises from 0 to 2."}},
    )
    picture.outputs = [shown(picture.metadata["mystnb"]["image"]["alt"])]
    reasoning = "Twice a number is the number and as much again, so it is added to itself."
    cells = [
        new_markdown_cell(TITLE_TEXT),
        code('from minicpm_lite import lab\n\nlab.start(library="0.2", seed=0)'),
        picture,
        new_markdown_cell(PROMPT_TEXT),
        code(
            "def twice(x):\n    ...\n\n\ncheck.twice(twice)",
            "✎ Your turn (twice): Put your code where the `...` stands, and run this cell again.",
            ("exercise",),
        ),
        new_markdown_cell(
            f":::{{solution}} ex-twice\n:class: dropdown\n\n{reasoning}\n:::", metadata={"tags": ["solution"]}
        ),
        code(
            "check.twice.accepts(lambda x: x + x)",
            "✓ Right (twice): All checks passed.",
            ("hide-cell", "solution"),
            jupyter={"source_hidden": True},
            mystnb={"code_prompt_show": "Show the solution", "code_prompt_hide": "Hide the solution"},
        ),
    ]
    nb = new_notebook(cells=cells)
    for place, cell in enumerate(nb.cells):
        cell.id = f"cell-{place}"
    return nb


def sealed(nb, path: Path) -> Path:
    """Write a notebook as if it had just run."""
    count = 0
    for cell in nb.cells:
        if cell.cell_type == "code":
            count += 1
            cell.execution_count = count
    nb.metadata[KEY] = {
        "stamp": stamp(Notebook(path, nb)),
        "version": "0.2.0",
        "seconds": 10,
        "peak_memory_mb": 500,
        "device": "CPU, 2 cores",
    }
    Notebook(path, nb).write()
    return path
