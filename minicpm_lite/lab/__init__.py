"""What only the notebooks use: a common start, tables, explorable figures, exercises, quizzes, evidence.

A chapter begins with::

    from minicpm_lite import lab

    lab.start(library="0.1", seed=0)

and then has `say`, `table`, `Explorer`, `exercise`, `Quiz` and `Evidence`. Running, stamping and checking
whole notebooks is ``python -m minicpm_lite.lab`` (modules `execute`, `stamps`, `gates` and `student`).

Each piece leaves plain text beside what it shows, so that a stored output can be read and compared without a
browser. What it shows works in a live kernel and in a static page, offline, in light and in dark.
"""

import os

import minicpm_lite

from ..optional import require

# Threads that wait should spin briefly, then sleep. The matrices of a 135M model, on 2 cores: 24 ms when they
# spin on, 26 ms so, 36 ms when they sleep at once; and when another program wants a core 252, 60 and 47 ms.
# GNU OpenMP reads it when torch is imported, so it stands first.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")

INSTALL = "minicpm_lite[notebooks]"
for _module in ("IPython", "ipywidgets", "matplotlib"):
    require(_module, install=INSTALL, purpose="use the book's notebooks")

from .display import say, table  # noqa: E402  the packages they import were asked for above
from .evidence import Evidence  # noqa: E402
from .exercises import exercise  # noqa: E402
from .explorer import Explorer  # noqa: E402
from .machine import device  # noqa: E402
from .quiz import Quiz  # noqa: E402
from .style import use_book_style  # noqa: E402

__all__ = ["Evidence", "Explorer", "Quiz", "device", "exercise", "say", "start", "table"]


def start(library: str, seed: int) -> None:
    """Make a notebook begin the same way everywhere: right library, one seed, tuned processor, plot style.

    Args:
        library: the version of minicpm_lite the notebook was written for, e.g. ``"0.1"``. The first two
            numbers must agree with the installed version.
        seed: given to `minicpm_lite.runtime.seed_everything`.

    Raises:
        RuntimeError: another version is installed.
    """
    installed = minicpm_lite.__version__
    if installed.split(".")[:2] != library.split(".")[:2]:
        raise RuntimeError(
            f"This notebook was written for minicpm_lite {library}, but {installed} is installed: "
            f'install the matching one with pip install "minicpm_lite=={library}.*", '
            f"or take the notebook that came with {installed}."
        )
    from ..runtime import seed_everything, tune_cpu  # they import torch, which takes seconds

    seed_everything(seed)
    tune_cpu()
    use_book_style()
