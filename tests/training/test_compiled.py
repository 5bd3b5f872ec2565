"""Compiled training computes what plain training does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # about 40 s: the compiler starts


@pytest.fixture(scope="module")
def found() -> dict:
    script = Path(__file__).with_name("compiled_training.py")
    # Without vector instructions: which of them the compiler knows is not tried first.
    environment = os.environ | {"TORCHINDUCTOR_VEC_ISA_OK": "0"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_whole_model(found):
    plain, compiled = found["dense"]
    assert compiled == pytest.approx(plain, abs=1e-4)


def test_a_model_in_bfloat16(found):
    plain, compiled = found["bfloat16"]
    assert compiled == pytest.approx(plain, abs=1e-6)


def test_a_mixture(found):
    plain, compiled = found["mixture"]
    assert compiled[0] == pytest.approx(plain[0], abs=1e-4)
    assert compiled[1] == pytest.approx(plain[1], rel=1e-3)


@pytest.mark.parametrize("layout", ["kept", "computed again"])
def test_blocks_of_a_model_that_is_cut(found, layout):
    losses, graphs = found["blocks"][layout]
    assert losses == pytest.approx(found["blocks"]["plain"], abs=1e-4)
    assert graphs > 0, "blocks were compiled, also where they are computed again"
