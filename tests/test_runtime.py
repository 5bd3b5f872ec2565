"""Seeds, threads, and optional packages."""

import itertools
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch

from minicpm_lite import runtime
from minicpm_lite.config import ModelConfig
from minicpm_lite.data.conversations import ConversationWindows, EncodedExample
from minicpm_lite.data.dedup import MinHash
from minicpm_lite.data.filtering import QualityClassifier
from minicpm_lite.data.web_pool import build_pool
from minicpm_lite.data.windows import TokenWindows
from minicpm_lite.language import generation
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.language.long_context import search_factors
from minicpm_lite.optional import require
from minicpm_lite.runtime import calm_threads, seed_everything
from minicpm_lite.training import trainer
from minicpm_lite.training.settings import TrainerConfig
from minicpm_lite.training.wind_tunnel import fit_power_law
from minicpm_lite.training.wsd import WSD

WAITING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def draw():
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_one_seed_for_all_generators():
    seed_everything(3)
    first = draw()
    assert draw() != first
    seed_everything(3)
    assert draw() == first


@pytest.mark.parametrize("seed", [-1, 2**32, 2.7, "1", None, True])
@pytest.mark.parametrize(
    "make",
    [
        seed_everything,
        lambda seed: ConversationWindows([EncodedExample((1,), (2,))], 9, seed),
        lambda seed: TokenWindows(torch.arange(100), 8, seed),
        lambda seed: TrainerConfig(seed=seed),
        lambda seed: MinHash(seed=seed),
        lambda seed: QualityClassifier(seed=seed),
        lambda seed: fit_power_law([1, 2, 3], [1, 2, 3], seed=seed),
        lambda seed: search_factors(lambda factors: 1.0, [torch.ones(2)], 2.0, seed=seed),
        lambda seed: build_pool(seed),
    ],
    ids=[
        "everything",
        "conversations",
        "tokens",
        "trainer",
        "minhash",
        "classifier",
        "law",
        "factors",
        "pool",
    ],
)
def test_a_seed_is_a_whole_number_of_32_bits_everywhere(make, seed, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as it is for a reader
    with pytest.raises(ValueError, match="^seed is .*; expected a whole number from 0 to 4294967295"):
        make(seed)


@pytest.mark.slow  # starts a process
def test_tuning_makes_denormals_zero_on_every_thread():
    """In a process of its own: threads that run already keep their setting."""
    script = (
        "import torch; from minicpm_lite.runtime import tune_cpu; "
        "print(bool(torch.tensor(1e-30) * 1e-10)); tune_cpu(); "
        "print(int((torch.full((1_000_000,), 1e-30) * 1e-10).count_nonzero()))"
    )
    assert run_with_two_threads(script) == "True 0"


TIMES_ASLEEP = """
import resource, threading, time, torch
from minicpm_lite import runtime

numbers = torch.ones(200_000)

def times_asleep():
    "How often threads of the process went to sleep while 300 small pieces of work were shared out."
    before = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw
    for _ in range(300):
        numbers.add_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw - before
"""


@pytest.mark.slow  # processes whose threads wait for each other
@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="the guard is for Linux")
@pytest.mark.parametrize("begun_with", [2, 1])
def test_waiting_threads_sleep_while_the_cores_are_wanted(begun_with):
    """torch is imported first, as users do. It is told that the cores are crowded, then that they are not.

    A program that begins with one thread may ask for two while it is watched.
    """
    begin = f"""
threads = {begun_with}
torch.set_num_threads(threads)
"""
    script = """
crowd = 0  # threads that wait for a core all the time
runtime._waited_for_a_core, runtime._LOOK_EVERY = lambda: crowd * time.monotonic(), 0.02

def at_rest():  # when others wanted the cores least, for whose sake threads sleep, too
    return min(times_asleep() for _ in range(20))

def until(teams):
    end = time.monotonic() + 60
    while any(thread.name == "calm_threads team" for thread in threading.enumerate()) != teams:
        assert time.monotonic() < end
        time.sleep(0.01)
    time.sleep(0.5)  # a thread that has spun sleeps by now

quiet = at_rest()
runtime.calm_threads()
crowd = 2
if threads == 1:
    time.sleep(0.2)  # the watcher has asked, and found one thread
    torch.set_num_threads(2)
until(teams=True)
crowded = times_asleep()
crowd = 0
until(teams=False)
print(torch.get_num_threads(), crowded > 300, crowded > 3 * max(quiet, at_rest()), numbers[0].item())
"""
    assert run_with_two_threads(TIMES_ASLEEP + begin + script) == f"2 True True {1 + 41 * 300}.0"


@pytest.mark.parametrize("variable", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT"])
def test_who_has_decided_how_threads_wait_is_left_alone(monkeypatch, variable):
    monkeypatch.setenv(variable, "1000")
    before = threading.active_count()
    calm_threads.__wrapped__()
    assert threading.active_count() == before


@pytest.mark.parametrize("ends", [True, False])
def test_the_watcher_ends_silently_with_the_program(monkeypatch, ends):
    """Python refuses to start threads once the main one has ended; else such an error is a fault of ours."""

    def refuse():
        raise RuntimeError("can't create new thread at interpreter shutdown")

    waited = itertools.count()
    monkeypatch.setattr(runtime, "_waited_for_a_core", lambda: next(waited))
    monkeypatch.setattr(runtime, "_LOOK_EVERY", 0.01)
    monkeypatch.setattr(runtime, "_keep_teams_asleep", refuse)
    if ends:
        monkeypatch.setattr(threading, "main_thread", threading.Thread)  # one that does not run
        runtime._watch()
    else:
        with pytest.raises(RuntimeError, match="new thread"):
            runtime._watch()


def run_with_two_threads(script: str) -> str:
    """What a script prints in a process of its own that computes with two threads."""
    environment = {name: value for name, value in os.environ.items() if name not in WAITING}
    environment |= {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return " ".join(done.stdout.split())


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


def test_training_and_writing_share_the_cores(monkeypatch):
    """Whoever trains or writes with the library need not know of it."""
    called = []
    for module in (trainer, generation):
        monkeypatch.setattr(module, "calm_threads", lambda module=module: called.append(module))
    config = ModelConfig(8, 16, 1, 2, 10, max_position_embeddings=16)
    generation.generate(Decoder(config), torch.tensor([[1]]), 2)
    run = trainer.Trainer(Decoder(config), torch.arange(100) % 10, WSD(1e-2, 1, 1, 0), TrainerConfig(2, 8))
    run.train(progress=False)
    assert called == [generation, trainer]
