"""Decoders compile: training to one graph, decoding without a break and without a graph for every length."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow  # traces nine decoders in a process of its own
def test_decoders_compile():
    script = Path(__file__).with_name("compiled_decoder.py")
    run = subprocess.run(
        [sys.executable, script],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("training is one graph") == 3
    assert run.stdout.count("has no break") == 6
