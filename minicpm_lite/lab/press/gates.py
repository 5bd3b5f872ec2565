"""What must hold for a committed notebook: each gate is a function that yields its problems as sentences."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

from ..svg import UNDESCRIBED
from .execute import PROGRESS_BAR
from .notebook import KEY, MEASURED, Notebook, alt_text, tags
from .plain import raw
from .stamps import LIBRARY, parse_cell, why_stale

SECONDS = 180
PEAK_MEMORY_MB = 3_000
FILE_BYTES = 3_000_000
COLUMNS = 79

_HINTS = 2
_REASONING_WORDS = 12
_SOLUTION = re.compile(r":::\{solution\} [\w-]+\n:class: dropdown\n\n(?P<reasoning>.+)\n:::\s*", re.DOTALL)
_SOLUTION_PROMPTS = {"code_prompt_show": "Show the solution", "code_prompt_hide": "Hide the solution"}
_REPORTING = ("say", "table", "source", "Evidence", "subplots")
# What jupyterlab-myst shows as the book does. It knows one notebook and no project, so that citations, other
# pages and files to include would be errors there, and raw markup in other programs.
_SHOWN_ROLES = {"term", "eq", "class", "func", "meth", "mod"}
_SHOWN_DIRECTIVES = {
    "admonition", "note", "tip", "warning", "important", "exercise-start", "exercise-end", "solution",
}  # fmt: skip
_ROLE = re.compile(r"\{(?P<name>[\w:.-]+)\}`(?P<text>[^`]*)`")
_DIRECTIVE = re.compile(r"^[ >]*(?:`{3,}|:{3,})\{(?P<name>[\w:.-]+)\}", re.MULTILINE)
_ATTRIBUTES = re.compile(r"^\{[.#][^}\n]*\}$", re.MULTILINE)
_WORDLESS_LINK = re.compile(r"(?<!!)\[\]\([^)]*\)")
_FOLDED_TEXT = re.compile(r"<details.*?</details>", re.DOTALL)
_MATHEMATICS = re.compile(r"(?<!\\)\$[^$]+\$")
_BARE_LABEL = re.compile(r"(?<=\]\()[\w-]+(?=\))")
_INSTEAD = {
    "cite": "cite with a link: [Hu et al., 2024, section 4](https://arxiv.org/abs/2404.06395)",
    "doc": "link to the file with words of your own: [the decoder](../language/decoder.ipynb)",
    "ref": "link to the label with words of your own: [the two misprints](#wsd-misprints)",
    "numref": "say which figure it is, such as the one above",
    "literalinclude": "show the code in a folded cell of its own: lab.source(WSD.__call__)",
}
_LOADED = {"script", "img", "link", "iframe", "source", "video", "audio", "embed", "object"}
_REMOTE = re.compile(r"(https?:)?//")
_REMOTE_STYLE = re.compile(r"""(?:url\(|@import)\s*["']?(?:https?:)?//""")
_CDN = re.compile(r"https?://[\w.-]*(?:\bcdn|cdnjs|jsdelivr|unpkg|googleapis|gstatic)[\w./-]*")
_MARKDOWN_IMAGE = re.compile(r"!\[(?P<alt>[^\]]*)\]\((?P<source>[^)\s]*)")
_DATA_URI = re.compile(r"data:(image/[\w.+-]+)")
_MACHINE_PATH = re.compile(
    r"/(?:home|Users|root|tmp|var/folders)/[\w./-]+|(?<![\w./-])[\w./-]*/site-packages/"
)


def problems(path: Path) -> list[str]:
    """Everything that keeps a notebook from being committed, a sentence each; empty if nothing does."""
    try:
        notebook = Notebook.read(path)
        return [problem for gate in GATES for problem in gate(notebook)]
    except (OSError, ValueError) as error:
        return [str(error)]


def student_problems(path: Path) -> list[str]:
    """What a student's copy must not hold, or lacks, a sentence each."""
    found = []
    cells = Notebook.read(path).nb.cells
    if not cells or "%pip install" not in cells[0].source:
        found.append("The first cell does not install the library; the copy would not run alone.")
    for number, cell in enumerate(cells, start=1):
        if "solution" in tags(cell):
            found.append(f"Cell {number} is tagged as a solution; a student must not get it.")
        elif cell.cell_type == "markdown":
            found += [
                f"Cell {number} holds {markup!r}, which only the book's site understands."
                for markup in raw(cell.source)
            ]
        elif cell.cell_type == "code":
            found += [f"Cell {number} {problem}" for problem in _student_code_problems(cell)]
    return found


def _student_code_problems(cell) -> Iterator[str]:
    if _calls(cell.source, "accepts", "rejects"):
        yield "calls accepts or rejects, which belong to solutions and wrong answers."
    if _calls(cell.source, "Quiz"):
        yield "holds the answers of a quiz; they belong into minicpm_lite.exercises."
    for node in _walk(cell.source):
        if isinstance(node, ast.Constant) and str(node.value).startswith("recorded/"):
            yield f"reads {node.value} beside it, and a copy stands alone; say lab.recorded_file(...)."
    if "exercise" in tags(cell) and not _has_blank(cell.source):
        yield "is an exercise without a blank (`...`): its answer is filled in."
    if cell.get("outputs"):
        yield "has an output; a student's copy starts without any."


def _fresh(notebook: Notebook) -> Iterator[str]:
    if reason := why_stale(notebook):
        yield f"The outputs are stale: {reason}. Run `python -m minicpm_lite.lab.press run {notebook.path}`."


def _executed(notebook: Notebook) -> Iterator[str]:
    for expected, (number, cell) in enumerate(notebook.code, start=1):
        if cell.execution_count is None:
            yield f"Cell {number} was not run."
        elif cell.execution_count != expected:
            yield f"Cell {number} ran as number {cell.execution_count}, not {expected}: run all in order."
        if any(output.output_type == "error" for output in cell.outputs):
            yield f"Cell {number} shows a traceback. Catch the error and print its message instead."


def _starts(notebook: Notebook) -> Iterator[str]:
    first = notebook.code[0][1].source if notebook.code else ""
    if not any({"library", "seed"} <= {key.arg for key in call.keywords} for call in _calls(first, "start")):
        yield 'The first code cell does not call lab.start(library="…", seed=…).'


def _within_budget(notebook: Notebook) -> Iterator[str]:
    for figure, limit, unit in (("seconds", SECONDS, "s"), ("peak_memory_mb", PEAK_MEMORY_MB, "MB")):
        if (used := notebook.record.get(figure, 0)) > limit:
            yield f"The run took {used:,} {unit}; the budget is {limit:,} {unit}."
    if (size := notebook.path.stat().st_size) > FILE_BYTES:
        yield f"The file has {size / 1e6:.1f} MB; the budget is {FILE_BYTES / 1e6:g} MB. Shrink pictures."


def _measured(notebook: Notebook) -> Iterator[str]:
    """The card tells what the last run took."""
    if notebook.record.keys() >= {"seconds", "peak_memory_mb", "device"}:
        texts = [cell.source for cell in notebook.nb.cells if cell.cell_type == "markdown"]
        if [line for text in texts for line in MEASURED.findall(text)] != [notebook.measured]:
            yield f"The card does not hold this line, once, as the last run left it: {notebook.measured}"


def _reads_everywhere(notebook: Notebook) -> Iterator[str]:
    """No markup that only the book understands: chapters are read in JupyterLab too."""
    for number, text in _markdown(notebook):
        held = [role["name"] for role in _ROLE.finditer(text) if role["name"] not in _SHOWN_ROLES]
        held += [mark["name"] for mark in _DIRECTIVE.finditer(text) if mark["name"] not in _SHOWN_DIRECTIVES]
        for name in dict.fromkeys(held):
            instead = _INSTEAD.get(name.partition(":")[0], "write it in plain Markdown")
            yield f"Cell {number} holds {{{name}}}, which JupyterLab does not show; {instead}."
        for role in _ROLE.finditer(text):
            if role["name"] in _SHOWN_ROLES - {"term"} and role["text"].startswith("~"):
                yield f"Cell {number}: JupyterLab shows {role['text']} as it is; write the name without ~."
        for mark in (*_ATTRIBUTES.findall(text), *_WORDLESS_LINK.findall(text)):
            yield f"Cell {number} holds {mark}, which JupyterLab shows as it is."
        for folded in _FOLDED_TEXT.findall(text):
            for mark in (*_MATHEMATICS.findall(folded), *(role[0] for role in _ROLE.finditer(folded))):
                yield (
                    f"Cell {number} holds {mark} in <details>, where JupyterLab shows it as it is; write "
                    "letters and signs there, such as *W*<sup>*K*</sup>."
                )
        for label in _BARE_LABEL.findall(text):
            yield f"Cell {number} links to {label}, which JupyterLab takes for a file; write #{label}."


def _described(notebook: Notebook) -> Iterator[str]:
    for number, cell in notebook.code:
        images = any(mime.startswith("image/") for data in _data(cell) for mime in data)
        if (
            images
            and not alt_text(cell)
            or any(UNDESCRIBED in data.get("text/html", "") for data in _data(cell))
        ):
            yield f"Cell {number} shows a picture without alt text (`mystnb: {{image: {{alt: …}}}}`)."
    for number, text in _pages(notebook):
        undescribed = [image for image in _MARKDOWN_IMAGE.finditer(text) if not image["alt"].strip()]
        undescribed += [1 for tag, values in _elements(text) if tag == "img" and not values.get("alt")]
        if undescribed:
            yield f"Cell {number} holds an image without alt text."


def _pictures_are_svg(notebook: Notebook) -> Iterator[str]:
    for number, cell in notebook.code:
        if cell.metadata.get(KEY, {}).get("raster", "").strip():
            continue
        kinds = [mime for data in _data(cell) for mime in data if mime.startswith("image/")]
        for data in _data(cell):
            sources = [
                values.get("src") or ""
                for tag, values in _elements(data.get("text/html", ""))
                if tag == "img"
            ]
            kinds += [kind[1] for source in sources if (kind := _DATA_URI.match(source))]
        if rasters := sorted({kind for kind in kinds if kind != "image/svg+xml"}):
            yield (
                f"Cell {number} shows a picture that is no SVG ({', '.join(rasters)}). A plot is one after "
                "lab.start, a mechanism is a lab.Drawing; a photograph says in the metadata why it is none "
                f"(`{KEY}: {{raster: …}}`)."
            )


def _offline(notebook: Notebook) -> Iterator[str]:
    for number, text in _pages(notebook):
        remote = [image["source"] for image in _MARKDOWN_IMAGE.finditer(text)]
        for tag, values in _elements(text):
            remote += [values.get(key) or "" for key in ("src", "href", "data") if tag in _LOADED]
        remote = [address for address in remote if _REMOTE.match(address)]
        remote += _REMOTE_STYLE.findall(text) + _CDN.findall(text)
        if remote:
            yield f"Cell {number} loads from the network ({remote[0][:60]}); the book works offline."
    for number, cell in notebook.code:
        if address := _CDN.search(cell.source):
            yield f"Cell {number} names a CDN ({address[0][:60]}); the book works offline."


def _clean(notebook: Notebook) -> Iterator[str]:
    for number, cell in notebook.code:
        texts = [
            *(output.get("text", "") for output in cell.outputs),
            *(d.get("text/plain", "") for d in _data(cell)),
        ]
        if any(map(PROGRESS_BAR.search, texts)):
            yield f"Cell {number} has a progress bar in its output."
        for text in texts:
            if path := _MACHINE_PATH.search(text):
                yield f"Cell {number} shows a path of the machine it ran on ({path[0]})."


def _keeps_names(notebook: Notebook) -> Iterator[str]:
    public = _public_names(LIBRARY)
    for number, cell in notebook.code:
        for name in sorted(_bound(parse_cell(cell.source)) & public.keys()):
            yield (
                f"Cell {number} redefines {name}, a public name of {public[name]}. "
                f"Give it a name of its own, such as naive_{name}."
            )


def _keeps_answers(notebook: Notebook) -> Iterator[str]:
    """What a reader answered stays: a test at the end of the notebook asks for it once more."""
    exercises = [cell.source for _, cell in notebook.code if "exercise" in tags(cell)]
    answers = {name for source in exercises for name in _answered(source)}
    for number, cell in notebook.code:
        if not {"exercise", "solution"} & set(tags(cell)):
            for name in sorted(_bound(parse_cell(cell.source)) & answers):
                yield f"Cell {number} binds {name}, the answer to an exercise, once more. Take another name."


def _exercises_complete(notebook: Notebook) -> Iterator[str]:
    """Frame with two hints, blank, check; then a solution that reasons, and that the same check accepts."""
    open_check, frame = None, ""
    for number, cell in enumerate(notebook.nb.cells, start=1):
        if cell.cell_type == "markdown":
            frame += cell.source
        elif "exercise" in tags(cell):
            if open_check:
                yield f"The exercise in cell {open_check[0]} has no solution that its check accepts."
            yield from _exercise_problems(number, cell, frame)
            open_check, frame = (number, _checked(cell.source)), ""
        elif "solution" in tags(cell):
            accepted = [ast.unparse(call.func.value) for call in _calls(cell.source, "accepts")]
            if open_check and open_check[1] in accepted:
                reasoning = _SOLUTION.fullmatch(frame)
                if reasoning and len(reasoning["reasoning"].split()) < _REASONING_WORDS:
                    yield f"The solution in cell {number} does not reason: say why in two or three sentences."
                open_check = None
            frame = ""
        elif cell.source.strip():
            frame = ""
    if open_check:
        yield f"The exercise in cell {open_check[0]} has no solution that its check accepts."


def _exercise_problems(number: int, cell, frame: str) -> Iterator[str]:
    if "{exercise-start}" not in frame:
        yield f"The exercise in cell {number} does not stand right behind its text ({{exercise-start}})."
    if frame.count('<details class="hint">') < _HINTS:
        yield f"The exercise in cell {number} has fewer than {_HINTS} folded hints: where to look, then how."
    if not _has_blank(cell.source):
        yield f"The exercise in cell {number} has no blank (`...`): its answer is filled in."
    if _checked(cell.source) is None:
        yield f"The last line of the exercise in cell {number} does not call its check, `check.…(answer)`."
    elif not any("Your turn" in data.get("text/plain", "") for data in _data(cell)):
        yield f"The exercise in cell {number} is not shown as unfinished: leave its blank empty."


def _checked(source: str) -> str | None:
    """The check that the last line of a cell calls."""
    tree = parse_cell(source)
    match tree.body[-1] if tree and tree.body else None:
        case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(id="check")) as called)):
            return ast.unparse(called)
    return None


def _answered(source: str) -> list[str]:
    """The names that the last line of a cell gives to a check."""
    tree = parse_cell(source)
    match tree.body[-1] if tree and tree.body else None:
        case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(id="check")), args=arguments)):
            return [each.id for each in arguments if isinstance(each, ast.Name)]
    return []


def _no_answers(notebook: Notebook) -> Iterator[str]:
    """What a reader shall find out cannot be read in the notebook."""
    for number, cell in notebook.code:
        if "solution" in tags(cell):
            continue
        if _calls(cell.source, "exercise", "Quiz"):
            yield (
                f"Cell {number} holds a check or a quiz, so its answers can be read; put it into the "
                "chapter's module of minicpm_lite.exercises."
            )
        if _calls(cell.source, "accepts"):
            yield f"Cell {number} accepts a solution, but has no tag solution: it would not be folded."


def _reporting_folded(notebook: Notebook) -> Iterator[str]:
    """The reader sees the lesson; how its figures and tables are set is folded, on the page and in Lab."""
    for number, cell in notebook.code:
        folded = cell.metadata.get("jupyter", {}).get("source_hidden") and "hide-input" in tags(cell)
        reports = _calls(cell.source, *_REPORTING)
        if reports and not folded and "solution" not in tags(cell):
            name = ast.unparse(reports[0].func)
            yield (
                f"Cell {number} shows code that only reports ({name}); put it into a cell of its own, tagged "
                "hide-input and with source_hidden."
            )


def _solutions_folded(notebook: Notebook) -> Iterator[str]:
    """The reasoning in a folded box, behind it the code in a folded cell; copies leave out what is tagged."""
    reasoned = False
    for number, cell in enumerate(notebook.nb.cells, start=1):
        tagged = "solution" in tags(cell)
        if cell.cell_type == "markdown":
            boxed = "solution" in [mark["name"] for mark in _DIRECTIVE.finditer(cell.source)]
            reasoned = bool(_SOLUTION.fullmatch(cell.source))
            if (boxed or tagged) and not (reasoned and tagged):
                yield (
                    f"Cell {number} reasons for a solution: tag it solution, and let it hold nothing but "
                    "`:::{solution} ex-…`, `:class: dropdown`, an empty line, the text and `:::`."
                )
        elif tagged:
            if not reasoned:
                yield f"The solution in cell {number} does not stand right behind its reasoning."
            prompts = cell.metadata.get("mystnb", {}).items() >= _SOLUTION_PROMPTS.items()
            if not (prompts and "hide-cell" in tags(cell)):
                yield (
                    f"The solution in cell {number} is open on the page: tag it hide-cell, with the prompts "
                    f"`mystnb: {_SOLUTION_PROMPTS}`."
                )
            if not cell.metadata.get("jupyter", {}).get("source_hidden"):
                yield f"The solution in cell {number} is open in JupyterLab: set source_hidden."
        else:
            reasoned = False


def _narrow(notebook: Notebook) -> Iterator[str]:
    for number, cell in notebook.code:
        widest = max(cell.source.splitlines(), key=len)
        if len(widest) > COLUMNS:
            yield f"Cell {number} has a line of {len(widest)} columns; the page shows {COLUMNS}."


GATES = (
    _fresh,
    _executed,
    _starts,
    _within_budget,
    _measured,
    _reads_everywhere,
    _described,
    _pictures_are_svg,
    _offline,
    _clean,
    _keeps_names,
    _keeps_answers,
    _exercises_complete,
    _no_answers,
    _reporting_folded,
    _solutions_folded,
    _narrow,
)


def _walk(source: str) -> list[ast.AST]:
    tree = parse_cell(source)
    return list(ast.walk(tree)) if tree else []


def _calls(source: str, *names: str) -> list[ast.Call]:
    """The calls in a cell of functions and methods that have one of these names."""
    calls = [node for node in _walk(source) if isinstance(node, ast.Call)]
    return [call for call in calls if getattr(call.func, "attr", getattr(call.func, "id", None)) in names]


def _has_blank(source: str) -> bool:
    return any(
        (isinstance(node, ast.Constant) and node.value is ...)
        or (isinstance(node, ast.Name) and node.id == "NotImplementedError")
        for node in _walk(source)
    )


def _bound(tree: ast.Module | None) -> set[str]:
    """The names that a cell defines at its top level. Importing a name is not defining it."""
    names = set()
    for statement in tree.body if tree else []:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(statement.name)
        elif isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            names |= {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}
    return names


@cache
def _public_names(library: Path) -> dict[str, str]:
    """Every name in an ``__all__`` of the library, with its module; not those of lab and of the commands."""
    public = {}
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library.parent).with_suffix("").parts
        if parts[1] in ("lab", "cli"):
            continue
        for node in ast.parse(path.read_bytes()).body:
            if isinstance(node, ast.Assign) and any(
                isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets
            ):
                module = ".".join(part for part in parts if part != "__init__")
                public |= {name: module for name in ast.literal_eval(node.value)}
    return public


def _data(cell) -> list[dict]:
    return [output.data for output in cell.outputs if "data" in output]


def _markdown(notebook: Notebook) -> Iterator[tuple[int, str]]:
    """All Markdown, in cells and in outputs, with its cell's number."""
    for number, cell in enumerate(notebook.nb.cells, start=1):
        if cell.cell_type == "markdown":
            yield number, cell.source
        elif cell.cell_type == "code":
            yield from ((number, data["text/markdown"]) for data in _data(cell) if "text/markdown" in data)


def _pages(notebook: Notebook) -> Iterator[tuple[int, str]]:
    """All text that a browser would render, in Markdown cells and in outputs, with its cell's number."""
    for number, cell in enumerate(notebook.nb.cells, start=1):
        if cell.cell_type == "markdown":
            yield number, cell.source
        elif cell.cell_type == "code":
            rendered = ("text/html", "text/markdown", "image/svg+xml", "application/javascript")
            yield from ((number, data[mime]) for data in _data(cell) for mime in rendered if mime in data)


class _Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def parse_marked_section(self, i: int, report: int = 1) -> int:
        return self.parse_bogus_comment(i, report)  # as browsers do; the method of the class may raise

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))


def _elements(text: str) -> list[tuple[str, dict[str, str | None]]]:
    parser = _Elements()
    parser.feed(text)
    return parser.found
