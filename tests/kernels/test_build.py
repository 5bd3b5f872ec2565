"""The build: kept, never half taken, by two at once, and one sentence where it cannot be."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from packed import EXTREME, PACKED, make_case, make_packed

from minicpm_lite.kernels import build, dequantize, linear

COMPUTE = """
import sys, warnings
import numpy as np
import torch
from minicpm_lite.kernels import FORMATS, build, dequantize, linear, reference
from packed import EXTREME, make_case, make_packed

torch.set_num_threads(1)
found = {}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for type in FORMATS:
        for rows in (1, 3, 8, 17):
            weight, x = make_case(type, rows)
            found[f"{type} {rows}"] = linear(x, weight, type).numpy()
            alone = torch.cat([linear(row[None], weight, type) for row in x])
            assert not build.built("linear") or torch.equal(alone, linear(x, weight, type))
            expected = reference(x, weight, type)
            assert (linear(x, weight, type) - expected).abs().max() < 0.02 * expected.abs().max()
        if type != "F32":
            found[f"{type} weights"] = dequantize(make_packed(type, 9, 2, seed=9, scales=EXTREME), type).numpy()
np.savez(sys.argv[1], **found)
print(build.built("linear"))
for warning in caught:
    print(warning.message)
"""
PORTABLE = "-DMINICPM_LITE_PORTABLE"
# Of the instructions that this processor may use: those of 2003, and of 2013 (AVX2).
PATHS = ["-march=x86-64", "-march=x86-64-v3"] if os.uname().machine == "x86_64" else [PORTABLE]
FAST = {"CXXFLAGS": "-O0"}  # what is compiled only to be there


def start(folder: Path, **environment: str) -> subprocess.Popen:
    """Compute with the library of a folder, in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", COMPUTE, str(folder / "found.npz")],
        env=os.environ
        | {"XDG_CACHE_HOME": str(folder), "PYTHONPATH": os.pathsep.join(sys.path)}
        | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> list[str]:
    """What it printed: whether the kernels were there, and what was warned of."""
    out, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    return out.splitlines()


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "minicpm_lite").iterdir())


def compiler(folder: Path, body: str) -> dict[str, str]:
    """A compiler of our own, a shell script; in it ``$out`` is what is to be written, if it is to build."""
    script = folder / "compiler"
    script.write_text(
        "#!/bin/sh\n"
        'case " $* " in *" -shared "*) ;; *) exec c++ "$@" ;; esac\n'
        'out=; last=; for each; do test "$last" = -o && out="$each"; last="$each"; done\n' + body
    )
    script.chmod(0o755)
    return {"CXX": str(script)}


@pytest.mark.slow  # a process of its own
def test_without_a_compiler_pytorch_computes_and_one_sentence_says_why(tmp_path):
    # A path that is as good as empty: the compiler is not found, and nothing else is needed.
    (built, *warnings) = finish(start(tmp_path, PATH=str(tmp_path)))
    assert built == "False"
    (sentence,) = warnings
    assert (
        "could not be built, and PyTorch takes their place: the compiler 'c++' cannot be run (No such"
        in sentence
    )
    assert "Install g++ 12 or newer, or clang, or name another in the environment variable CXX." in sentence
    assert not (tmp_path / "minicpm_lite").exists()


def failed(sentence: str) -> None:
    """Another attempt in this process, which has the kernels already and may well lose this one."""
    with pytest.warns(UserWarning, match=sentence):
        assert build._load.__wrapped__("linear") is False


def test_a_compiler_that_fails_is_quoted(tmp_path, monkeypatch):
    fails = compiler(tmp_path, "echo 'linear.cpp:1:1: fatal error: no such header' >&2; exit 1")
    monkeypatch.setenv("CXX", fails["CXX"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    failed(r"says: linear.cpp:1:1: fatal error: no such header. g\+\+ 12 or newer and clang are known.")
    assert kept(tmp_path) == []
    monkeypatch.setenv("CXX", "false")
    failed("the compiler 'false' says: it ended with 1")
    monkeypatch.setenv("CXX", str(tmp_path))
    failed(r"cannot be run \(Permission denied\)")


@pytest.mark.parametrize("cache", ["/proc/nowhere", "a file"])
def test_a_cache_that_cannot_be_written_is_said(cache, tmp_path, monkeypatch):
    """/proc takes no files from anybody, root included."""
    if cache == "a file":
        (tmp_path / cache).touch()
        cache = str(tmp_path / cache)
    monkeypatch.setenv("XDG_CACHE_HOME", cache)
    failed(rf"{cache}/minicpm_lite cannot be written \(.*Set XDG_CACHE_HOME to a folder that can.")


@pytest.mark.slow  # compiles, twice
def test_two_processes_may_build_at_once_and_what_was_built_is_kept(tmp_path):
    both = [start(tmp_path, **FAST) for _ in "ab"]
    assert [finish(each) for each in both] == [["True"], ["True"]]
    (library,) = kept(tmp_path)  # and nothing beside it
    assert library.startswith("linear-") and library.endswith(".so")
    never = compiler(tmp_path, "exit 1")  # it is asked what it is, and not to build
    assert finish(start(tmp_path, **FAST, **never)) == ["True"]
    assert kept(tmp_path) == [library]


@pytest.mark.slow  # compiles, twice
def test_a_build_that_was_killed_is_not_taken_nor_one_that_was_damaged(tmp_path):
    killed = start(tmp_path, **FAST, **compiler(tmp_path, 'echo half > "$out"; kill -9 $PPID; exit 1'))
    killed.communicate()
    assert killed.returncode == -9
    (left,) = kept(tmp_path)
    assert left.startswith("building-")
    assert finish(start(tmp_path, **FAST)) == ["True"]
    (library,) = [name for name in kept(tmp_path) if name != left]
    path = tmp_path / "minicpm_lite" / library
    path.write_bytes(path.read_bytes()[:100])  # as a disk may leave it: that, too, is built anew
    assert finish(start(tmp_path, **FAST)) == ["True"]
    assert path.stat().st_size > 1000


@pytest.mark.slow  # compiles
@pytest.mark.parametrize("flags", PATHS)
def test_all_paths_compute_the_same(flags, tmp_path):
    """Sums of whole numbers are exact, and sums of floats have one order, so all paths give the same bits.

    But what has no instruction for it rounds each product before adding it; there, nearly the same.
    """
    assert finish(start(tmp_path, CXXFLAGS=flags)) == ["True"]
    found = {name: torch.from_numpy(array) for name, array in np.load(tmp_path / "found.npz").items()}
    assert len(found) == 4 + 5 * len(PACKED)
    for name, other in found.items():
        type, rows = name.split()
        if rows == "weights":
            here = dequantize(make_packed(type, 9, 2, seed=9, scales=EXTREME), type)
            assert torch.equal(other.view(torch.int32), here.view(torch.int32))
        else:
            here = linear(*make_case(type, int(rows))[::-1], type)
            allowed = 1e-5 * float(here.abs().max()) if flags != "-march=x86-64-v3" else 0
            torch.testing.assert_close(other, here, atol=allowed, rtol=0)
