"""The process that holds llama.cpp's server says where it is, and ends with its input."""

import importlib.util
import json
import os
import subprocess
import sys
from urllib.request import Request, urlopen

import pytest
from llama_cpp_package import PACKAGE

COMMAND = [sys.executable, "-m", "minicpm_lite.inference.llama_cpp_server"]


def started(file, *paths) -> subprocess.Popen:
    asked = json.dumps({"file": str(file), "rows": 2, "room": 9, "threads": 1})
    return subprocess.Popen(
        [*COMMAND, asked], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [*paths, *filter(None, sys.path)]))},
    )  # fmt: skip


def test_it_says_where_it_is_and_ends_with_its_input(tmp_path):
    (tmp_path / "xllamacpp.py").write_text(PACKAGE)
    (tmp_path / "a.gguf").touch()
    server = started(tmp_path / "a.gguf", tmp_path)
    told = json.loads(server.stdout.readline())  # what the package prints is no answer
    asked = json.dumps({"prompt": [1], "n_predict": 2}).encode()
    with urlopen(Request(f"{told['address']}/completion", asked), timeout=30) as answer:
        assert answer.read().count(b"data: ") == 3
    assert json.loads((tmp_path / "asked").read_text().splitlines()[0]) == [2, 18, 1]
    rest, _ = server.communicate(timeout=30)
    assert rest == "" and server.returncode == 0


@pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is not None, reason="the package is there")
def test_a_missing_package_is_a_sentence(tmp_path):
    told, _ = started(tmp_path / "a.gguf").communicate(timeout=30)
    assert json.loads(told)["missing"].startswith("The package 'xllamacpp' is needed to run llama.cpp")
