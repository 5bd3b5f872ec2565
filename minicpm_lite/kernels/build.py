"""The compiled kernels: built at first use, kept, and missed with one sentence.

`built` compiles ``linear.cpp`` or ``attention.cpp`` once for each text, compiler, processor and version of
torch, and keeps the result in ``~/.cache/minicpm_lite`` (or under ``XDG_CACHE_HOME``). It takes seconds.

Choices, and the traps behind them:

- The source includes the stable interface of torch alone, whose few headers compile in a tenth of the time
  that ``torch/extension.h`` takes.
- The compiler is called here, not by ``torch.utils.cpp_extension.load``: that needs ninja, and a build of its
  that was killed leaves a lock for which every later one waits.
- A library takes its name when it is whole, so that a killed build leaves none. Two processes may build at
  once: each writes beside, in a folder of its own, and the second takes the place of the first, its equal.
  (`files.written_whole` is for one writer a path.)
- A home may be shared by machines that differ: what the compiler says of itself and the processor is part of
  the name.
"""

import hashlib
import os
import shlex
import subprocess
import tempfile
import threading
import warnings
from functools import cache
from pathlib import Path

import torch

__all__ = ["built"]

_FAKES = {  # what torch.compile needs to know of each operator of a source: the shape that comes out
    "linear": {
        "linear": lambda x, weights, type: x.new_empty(
            (*x.shape[:-1], sum(each.shape[0] for each in weights))
        ),
        "dequantize": lambda weight, type, features: weight.new_empty(
            (weight.shape[0], features), dtype=torch.float32
        ),
    },
    "attention": dict.fromkeys(
        ("sparse_attention", "paged_attention", "sparse_paged_attention"),
        lambda query, *rest: torch.empty_like(query, memory_format=torch.contiguous_format),
    ),
}
_FLAGS = ["-O3", "-std=c++20", "-march=native", "-fPIC", "-Wno-psabi"]
# Whether the compiler may make one step of a product and a sum. It does so here and there: in ``linear.cpp``,
# whose rows are to have the same bits in any company, the source says where.
_CONTRACTION = {"linear": "-ffp-contract=off", "attention": "-ffp-contract=fast"}
_ONE_AT_A_TIME = threading.Lock()


@torch.compiler.assume_constant_result
def built(source: str) -> bool:
    """Whether the compiled operators of a source are there; the first call builds or loads them.

    Args:
        source: "linear" or "attention".

    Warns:
        UserWarning: they cannot be had; the sentence says why. Then PyTorch computes.
    """
    with _ONE_AT_A_TIME:
        return _load(source)


@cache
def _load(source: str) -> bool:
    text = Path(__file__).with_name(f"{source}.cpp")
    try:
        library = _place(text)
        if not library.exists():
            _build(text, library)
        try:
            torch.ops.load_library(library)
        except OSError:  # written by a disk that was full or is damaged
            _build(text, library)
            torch.ops.load_library(library)
    except (OSError, _NotBuilt) as error:
        warnings.warn(
            f"The kernels of {text.name} could not be built, and PyTorch takes their place: {error}",
            stacklevel=4,
        )
        return False
    for name, shape in _FAKES[source].items():
        torch.library.register_fake(f"minicpm_lite::{name}", shape)
    return True


class _NotBuilt(Exception):
    """A sentence that says why not."""


def _place(source: Path) -> Path:
    """Where the library of this source, compiler, processor and torch is kept."""
    # All that the compiler would define by itself: its version, and what the processor can do.
    compiler = _run("-E", "-dM", "-x", "c++", os.devnull)
    text = "\0".join([source.read_text(), compiler, torch.__version__, _CONTRACTION[source.stem], *_flags()])
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    name = f"{source.stem}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.so"
    return Path(caches).expanduser() / "minicpm_lite" / name


def _build(source: Path, library: Path) -> None:
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent, prefix="building-") as folder:
            beside, torch_folder = Path(folder, library.name), Path(torch.__file__).parent
            _run(
                "-shared", _CONTRACTION[source.stem], f"-I{torch_folder / 'include'}", str(source),
                "-o", str(beside), f"-L{torch_folder / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10",
            )  # fmt: skip
            with beside.open("rb") as file:
                os.fsync(file.fileno())
            beside.replace(library)
    except OSError as error:
        raise _NotBuilt(
            f"{library.parent} cannot be written ({error.strerror}). Set XDG_CACHE_HOME to a folder that can."
        ) from None


def _flags() -> list[str]:
    """The options of the compiler; those of the user come last, and win."""
    return [*_FLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]


def _run(*arguments: str) -> str:
    """What the compiler prints."""
    compiler = os.environ.get("CXX") or "c++"
    command = [*shlex.split(compiler), *_flags(), *arguments]
    try:
        run = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise _NotBuilt(
            f"the compiler {compiler!r} cannot be run ({error.strerror}). Install g++ 12 or newer, or clang, "
            "or name another in the environment variable CXX."
        ) from None
    if run.returncode:
        lines = run.stderr.strip().splitlines() or [f"it ended with {run.returncode}"]
        first = next((line for line in lines if "error" in line), lines[-1])
        raise _NotBuilt(
            f"the compiler {compiler!r} says: {first.strip()}. g++ 12 or newer and clang are known."
        )
    return run.stdout
