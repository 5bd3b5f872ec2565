"""Run notebooks in place, and keep only what is the same from run to run.

Those that are stale run side by side, one for each core, and each computes with one thread: two programs with
two threads each on two cores wait for each other more than they compute, and what one thread adds up comes
out alike on every machine. A notebook whose run fails is left as it was, and so is one that its author saved
in the meantime; where the library or a file that it uses changed meanwhile, its outputs are kept, as stale.
Outputs are normalised: no timings, no widget state, no progress bars, nothing from stderr, no addresses of
objects. All that a cell prints is kept together.
"""

import inspect
import math
import os
import re
import time
from collections.abc import Iterable
from concurrent.futures import as_completed
from pathlib import Path

from ... import __version__
from ...optional import require
from .. import machine
from ..machine import cores, device
from ..svg import describe
from ..workers import fresh_processes
from .notebook import KEY, MEASURED, Notebook, alt_text
from .stamps import stamp, why_stale

INSTALL = "minicpm_lite[notebooks]"
nbclient = require("nbclient", install=INSTALL, purpose="run notebooks")
nbformat = require("nbformat", install=INSTALL, purpose="run notebooks")
_manager = require("jupyter_client.manager", install=INSTALL, purpose="run notebooks")
_kernelspec = require("ipykernel.kernelspec", install=INSTALL, purpose="run notebooks")

# What tqdm writes: "40%|████      | 4/10 [00:01<00:01, 3.90it/s]", without a total "4it [00:01, 3.90it/s]".
# The unit, here "it", may be any word, or none.
PROGRESS_BAR = re.compile(
    r"""\d+%(?:\|.*\|)?\ *\S+/\S+\ \[[\d:]+<
      | \d[\d.]{0,20}[kMGTPEZY]?(?P<unit>[^\[\n]{0,30})\ \[[\d:]+,
        \ *(?:\?|\d[\d.]*[kMGTPEZY]?)(?:(?P=unit)/s|s/(?P=unit))""",
    re.VERBOSE,
)
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
_WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
_ADDRESS = re.compile(r"\bat 0x[0-9a-f]{6,16}")
_PEAK_MEMORY = f"{inspect.getsource(machine)}\nprint(peak_memory_mb())"  # an import would be of all of lab


class _ThisInterpreter(_manager.AsyncKernelManager):
    """Starts kernels with the Python that runs this, whatever kernel is installed as python3."""

    @property
    def kernel_spec(self):
        return _manager.kernelspec.KernelSpec(
            argv=_kernelspec.make_ipkernel_cmd(extra_arguments=["--log-level=ERROR"]),
            display_name="Python 3",
            language="python",
        )


def run(paths: Iterable[Path], force: bool = False) -> bool:
    """Run those notebooks that are stale, or all, side by side; tell of each when it ends.

    The longest begin first, by what their last runs took, so that no core is idle at the end.

    Returns:
        False if a run failed, or a notebook changed while it ran; that one is left as it is, and the others
        have run.
    """
    good, stale = True, []
    for path in paths:
        try:
            notebook = Notebook.read(path)
            reason = why_stale(notebook) or ("asked for" if force else None)
        except (OSError, ValueError) as error:
            good = False
            print(error, flush=True)
            continue
        if reason:
            stale.append((notebook.record.get("seconds", math.inf), path, reason))
        else:
            print(f"{path}: up to date", flush=True)
    if not stale:
        return good
    with fresh_processes(min(cores(), len(stale))) as pool:
        for future in as_completed([pool.submit(_run_one, *job[1:]) for job in sorted(stale, reverse=True)]):
            ran, told = future.result()
            good &= ran
            print(told, flush=True)
    return good


def _run_one(path: Path, reason: str) -> tuple[bool, str]:
    """Whether the run went well, and a line that tells of it."""
    before = path.read_bytes()
    notebook = Notebook.read(path)
    try:
        execute(notebook)
    except (nbclient.exceptions.CellControlSignal, nbclient.exceptions.DeadKernelError) as error:
        return False, f"{path}: ran, because {reason}, FAILED, and is left as it was.\n{error}"
    if not path.is_file() or path.read_bytes() != before:
        return False, f"{path}: ran, because {reason}, but was CHANGED meanwhile, and is left as it is now."
    notebook.write()
    used = f"{notebook.record['seconds']} s, {notebook.record['peak_memory_mb']:,} MB"
    meanwhile = why_stale(notebook)
    again = f"; STALE again, because meanwhile {meanwhile}" if meanwhile else ""
    return True, f"{path}: ran, because {reason}: {used}{again}"


def execute(notebook: Notebook) -> None:
    """Run all cells in a fresh kernel of one thread, in the notebook's folder; normalise the outputs; stamp.

    The stamp is that of what stood there when the run began. The card, ``**One run of this
    notebook takes** …``, is told what the run took.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised; the message shows the cell and the error.
        nbclient.exceptions.CellTimeoutError: a cell took longer than ten minutes.
        nbclient.exceptions.DeadKernelError: the kernel died, for example for want of memory.
    """
    nb, earlier = notebook.nb, notebook.record
    begun = stamp(notebook)  # of what changes from now on the outputs may know nothing
    nb.cells.append(nbformat.v4.new_code_cell(_PEAK_MEMORY))
    start = time.perf_counter()
    nbclient.NotebookClient(
        nb,
        kernel_manager_class=_ThisInterpreter,
        resources={"metadata": {"path": str(notebook.path.parent)}},
        timeout=600,
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,
    ).execute(env=os.environ | ONE_THREAD)
    seconds = round(time.perf_counter() - start)
    peak = int(nb.cells.pop().outputs[0].text)
    normalise(nb)
    nb.metadata[KEY] = {
        "stamp": begun,
        "version": __version__,
        "seconds": _settled(seconds, earlier.get("seconds"), slack=5),
        "peak_memory_mb": _settled(peak, earlier.get("peak_memory_mb"), slack=100),
        "device": device(),
    }
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = MEASURED.sub(notebook.measured, cell.source)


def normalise(nb: "nbformat.NotebookNode") -> None:
    """Drop from a notebook that has just run what would differ in the next run, and describe its plots."""
    nb.metadata.pop("widgets", None)
    nb.metadata["language_info"] = {"name": "python"}
    nb.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    for cell in nb.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in map(_normal, cell.outputs) if output]
            for output in cell.outputs:
                if "text/html" in output.get("data", {}) and alt_text(cell):
                    output.data["text/html"] = describe(output.data["text/html"], alt_text(cell))


def _normal(output: "nbformat.NotebookNode") -> "nbformat.NotebookNode | None":
    if output.output_type == "stream":
        lines = [line for line in output.text.splitlines(keepends=True) if not _is_bar(line)]
        output.text = _ADDRESS.sub("at 0x...", "".join(lines))
        return output if output.name == "stdout" and output.text else None
    data = output.get("data", {})
    if "text/html" in data:
        data.pop(_WIDGET_VIEW, None)  # the static form stands beside it, and needs no widget scripts
    if "text/plain" in data:
        data["text/plain"] = _ADDRESS.sub("at 0x...", data["text/plain"])
    return None if PROGRESS_BAR.search(data.get("text/plain", "")) else output


def _is_bar(line: str) -> bool:
    """Whether a line is a progress bar, or the blanks that wiped one out."""
    return bool(PROGRESS_BAR.search(line)) or (line.isspace() and line.endswith("\r"))


def _settled(measured: int, earlier: int | None, slack: int) -> int:
    """The earlier figure while the new one is about the same, so that a second run leaves the file alone."""
    if earlier is not None and abs(measured - earlier) <= max(slack, 0.25 * earlier):
        return earlier
    return measured
