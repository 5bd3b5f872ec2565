"""What only the notebooks use: a start, tables, drawings, explorable figures, comparisons, evidence.

A chapter begins with::

    from minicpm_lite import lab

    lab.start(library="0.2", seed=0)

and then has `say`, `table`, `source`, `Drawing`, `Sheet`, `Explorer`, `Heads`, `difference`, `Evidence` and
`recorded_file`. The checks of its exercises and its quiz stand in `minicpm_lite.exercises`. Running, stamping
and checking whole notebooks is ``python -m minicpm_lite.lab.press``.

Each piece leaves plain text beside what it shows, so that a stored output can be read and compared without a
browser. What it shows works in a live kernel and in a static page, offline, in light and in dark.
"""

from importlib.metadata import version
from pathlib import Path

from ..runtime import calm_threads, seed_everything, tune_cpu
from .display import say, source, table
from .drawing import Drawing
from .evidence import Evidence
from .explorer import Explorer
from .heads import Heads
from .machine import device
from .paired import difference, power, smallest_effect
from .plots import show_plots_as_svg
from .sheet import Sheet
from .style import use_book_style

__all__ = [
    "Drawing", "Evidence", "Explorer", "Heads", "Sheet", "device", "difference", "power", "recorded_file",
    "say", "smallest_effect", "source", "start", "table",
]  # fmt: skip


def start(library: str, seed: int) -> None:
    """Make every notebook begin alike: right library, one seed, a processor tuned and shared, the plot style.

    Args:
        library: the version of minicpm_lite the notebook was written for, e.g. ``"0.2"``. The first two
            numbers must agree with the installed version.
        seed: given to `minicpm_lite.runtime.seed_everything`.

    Raises:
        RuntimeError: another version is installed.
    """
    installed = version("minicpm_lite")  # asked for here: the stamp of a chapter follows what lab imports
    if installed.split(".")[:2] != library.split(".")[:2]:
        raise RuntimeError(
            f"This notebook was written for minicpm_lite {library}, but {installed} is installed: "
            f'install the matching one with pip install "minicpm_lite=={library}.*", '
            f"or take the notebook that came with {installed}."
        )
    seed_everything(seed)
    tune_cpu()
    calm_threads()
    use_book_style()
    show_plots_as_svg()


def recorded_file(name: str) -> Path:
    """A file of a recorded run, ``lab.recorded_file("training/wsd.json")``; it comes with the library.

    So a notebook finds it from any folder. The file itself is ``notebooks/training/recorded/wsd.json``.

    Raises:
        FileNotFoundError: there is none of this name.
    """
    folder = Path(__file__).parents[1] / "recorded"
    if not (folder / name).is_file():
        files = [path for path in folder.glob("*/*.*") if path.suffix != ".py"]
        known = sorted(path.relative_to(folder).as_posix() for path in files)
        raise FileNotFoundError(f"No recorded run has the file {name!r}; there are {', '.join(known)}.")
    return folder / name
