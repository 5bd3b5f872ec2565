"""A small chapter of the second edition, with its exercises in a module, made without a kernel."""

from nbformat.v4 import new_markdown_cell, new_notebook, new_output
from small_chapter import code

SOLUTIONS = {
    "twice": "def twice_solution(x):\n    return factor(2) * (x + 0)",
    "halve": "def halve_solution(numbers, f):\n    numbers[:] = [f(number) for number in numbers]",
    "clear": "def clear_solution(part, array, table, *, names, several):\n"
    "    part.zero_(), array.fill(0), table['a'].mul_(0), table['b'].clear(), names.clear()\n"
    "    several[0].zero_(), several[1][0].zero_()",
    "by_pencil": "by_pencil_solution = (3, 4)",
    "push": "def push_solution(model, x):\n    model(x).mean().backward()",
    "shape": "shape_solution = load_config('lite-1m')\nshape_solution = replace(shape_solution, hidden_size=5 + by_pencil_solution[0])",
}
BLANKS = {
    "twice": "def twice(x):\n    ...  # your code",
    "halve": "def halve(numbers, f):\n    ...",
    "clear": "def clear(part, array, table, *, names, several):\n    ...",
    "by_pencil": "by_pencil = ...  # two numbers",
    "push": "def push(model, x):\n    ...",
    "shape": "shape = ...",
}
HINTS = (
    '\n\n<details class="hint"><summary>Hint: where to look</summary>\n\nUse `factor`.\n\n</details>'
    '\n\n<details class="hint"><summary>Hint: how</summary>\n\nMultiply.\n\n</details>'
)


def chapter(names=tuple(SOLUTIONS), module="small_exercises"):
    """The chapter, with some of its exercises."""
    parts = module.rpartition(".")
    imported = f"from {parts[0]} import {parts[2]} as check" if parts[0] else f"import {module} as check"
    cells = [
        new_markdown_cell("(topic)=\n# A topic\n\nWe double."),
        code('from minicpm_lite import lab\n\nlab.start(library="0.2", seed=0)'),
        code(
            f"from dataclasses import replace\n\nimport torch\nfrom minicpm_lite import load_config\n{imported}"
        ),
        code(
            "def factor(n):\n    return n * ONE\n\n\nprint('a lesson')\ntorch.manual_seed(3)\nONE = 1",
            "a lesson",
        ),
        code("raise RuntimeError('what no exercise needs is not run when it is graded')", tags=("slow",)),
        code("broken = 1 / 0", tags=("slow",)),
    ]
    for name in names:
        frame = f"```{{exercise-start}} Write {name} (easy)\n:label: ex-{name}\n```\n\nWrite `{name}`.{HINTS}"
        cells += [
            new_markdown_cell(f"{frame}\n\n```{{exercise-end}}\n```"),
            code(f"{BLANKS[name]}\n\n\ncheck.{name}({name})", "✎ Your turn", ("exercise",)),
            new_markdown_cell(
                f":::{{solution}} ex-{name}\n:class: dropdown\n\nThe secret of {name}.\n:::",
                metadata={"tags": ["solution"]},
            ),
            code(f"{SOLUTIONS[name]}\n\n\ncheck.{name}.accepts({name}_solution)", tags=("solution",)),
        ]
    cells += [code("check.quiz", "Quiz: 1 question"), new_markdown_cell("## Takeaways")]
    for place, cell in enumerate(cells):
        cell.id = f"cell-{place}"
        if cell.cell_type == "code":
            cell.outputs = cell.outputs or [new_output("stream", text="x")]
    return new_notebook(cells=cells)
