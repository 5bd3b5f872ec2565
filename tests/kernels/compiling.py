"""Attention's kernels compiled for another processor or with a mistake, which their tests share."""

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch

from minicpm_lite.kernels import attention

SOURCE = Path(attention.__file__).with_name("attention.cpp")
OTHER_PROCESSORS = pytest.mark.parametrize(
    "flags", [["-march=x86-64"], ["-march=x86-64-v3"], ["-O0"]], ids=lambda flags: flags[0]
)


def for_another(flags: list[str]):
    """The operators for another processor."""
    if not Path("/proc/cpuinfo").read_text().count("avx2"):
        pytest.skip("this processor has no AVX2")
    return _compiled(SOURCE.read_text(), "-O1", *flags)


def mistaken(mistake: tuple[str, str]):
    """The operators with something wrong in the place of what is right."""
    text, (right, wrong) = SOURCE.read_text(), mistake
    assert text.count(right) == 1
    text = text.replace(right, wrong)
    for fewer in (4, 8, 16):  # one width does, and compiles in a quarter of the time
        assert text.count(f"act(Lanes<{fewer}>{{}})") == 1
        text = text.replace(f"act(Lanes<{fewer}>{{}})", "act(Lanes<32>{})")
    return _compiled(text, "-O0")


@contextmanager
def in_place_of_ours(operators) -> Iterator[None]:
    """The library calls these."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("sparse_attention", "paged_attention", "sparse_paged_attention"):
            patch.setattr(torch.ops.minicpm_lite, name, getattr(operators, name))
        yield


@cache  # a process cannot load the same operators twice
def _compiled(text: str, *flags: str):
    namespace = f"other_{abs(hash((text, flags)))}"
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, f"{namespace}.cpp"), Path(folder, f"{namespace}.so")
        source.write_text(text.replace("(minicpm_lite,", f"({namespace},"))
        torch_folder = Path(torch.__file__).parent
        command = ["c++", "-std=c++20", "-fPIC", "-shared", "-Wno-psabi", *flags, f"-I{torch_folder / 'include'}", str(source),
                   "-o", str(library), f"-L{torch_folder / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True, text=True)
        torch.ops.load_library(library)
    return getattr(torch.ops, namespace)
