"""Seeds and optional packages."""

import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from minicpm_lite.optional import require
from minicpm_lite.runtime import seed_everything


def draw():
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_one_seed_for_all_generators():
    seed_everything(3)
    first = draw()
    assert draw() != first
    seed_everything(3)
    assert draw() == first


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_impossible_seed(seed):
    with pytest.raises(ValueError, match="give a whole number from 0"):
        seed_everything(seed)


def test_tuning_makes_denormals_zero_on_every_thread():
    """In a process of its own: threads that run already keep their setting."""
    script = (
        "import torch; from minicpm_lite.runtime import tune_cpu; "
        "print(bool(torch.tensor(1e-30) * 1e-10)); tune_cpu(); "
        "print(int((torch.full((1_000_000,), 1e-30) * 1e-10).count_nonzero()))"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["True", "0"]


def test_a_missing_package_is_one_sentence():
    with pytest.raises(ImportError) as error:
        require("no_such_package", install="minicpm_lite[parity]", purpose="compare with it")
    assert str(error.value) == (
        "The package 'no_such_package' is needed to compare with it. "
        'Install it with: pip install "minicpm_lite[parity]"'
    )
    assert require("json", install="json", purpose="test").dumps(1) == "1"


def test_a_fault_inside_a_package_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "broken_package.py").write_text("import not_there_at_all")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="not_there_at_all"):
        require("broken_package", install="x", purpose="test")


def test_importing_the_package_costs_little():
    """No torch, no optional package: names and configs are there at once."""
    script = (
        "import sys, minicpm_lite; minicpm_lite.load_config('minicpm-1.2b'); "
        "print([m for m in ('torch', 'numpy', 'transformers', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
