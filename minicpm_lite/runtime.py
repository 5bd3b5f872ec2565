"""What every run does first: one seed for everything, and a processor that is used well, and shared well."""

import ctypes
import math
import os
import platform
import random
import threading
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
import torch

__all__ = ["calm_threads", "require_seed", "seed_everything", "tune_cpu"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # names of glibc's malloc.h
_LARGEST_KEPT_BLOCK = 1 << 30  # bytes
_LOOK_EVERY = 0.5  # seconds
_CROWDED = 0.25  # seconds that threads wait for a core, all together, in each second


def require_seed(seed: object) -> None:
    """Refuse what is no whole number of 32 bits, which every generator takes; wherever a seed is given.

    Raises:
        ValueError: a sentence that says what was given.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 32:
        raise ValueError(f"seed is {seed!r}; expected a whole number from 0 to {(1 << 32) - 1}.")


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's generators. The book seeds through this function alone.

    Raises:
        ValueError: the seed is no whole number, negative, or does not fit in 32 bits (NumPy's limit).
    """
    require_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def tune_cpu() -> None:
    """Set what makes small models slow on a CPU when left alone.

    Call it before the first tensor operation: threads that have already started keep their own setting.

    - Numbers below 1.2e-38 become 0: Adam's second moments decay into them, where arithmetic is far slower.
    - With glibc, freed memory stays with the process. Else every large tensor is mapped and returned anew,
      and on some machines the page faults cost more than the arithmetic.

    `python -m benchmarks settings` measures what each of them brings on the machine at hand.
    """
    torch.set_flush_denormal(True)
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT_BLOCK)
        libc.mallopt(_M_TRIM_THRESHOLD, _LARGEST_KEPT_BLOCK)


@cache  # one watcher does for a process
def calm_threads() -> None:
    """Share the cores with other programs: while they are wanted, threads that wait for work sleep at once.

    GNU OpenMP, PyTorch's on Linux, lets a thread that waits spin for milliseconds before it sleeps. On a
    quiet machine that is right. Where another program wants the core, the thread that has the work waits
    behind one that spins: of 50 training steps of ``lite-1m`` with two threads on two busy cores, 116 and
    168 s became 30 and 34 s. The number of threads stays, and with it every result.

    A watcher asks the system twice a second how long the threads of this process waited for a core. While
    that is much, it keeps more teams of threads, asleep: where libgomp manages more threads than there are
    cores, it spins 100 times and not 300,000 (``do_spin`` in its ``wait.h``). The environment variable
    ``GOMP_SPINCOUNT`` is no substitute: it is read when torch is imported, often before this library, and
    costs time on a quiet machine too: at 5,000 a training step took 84 ms instead of 75, and at 100 it would
    take 107. Who sets it, or ``OMP_WAIT_POLICY``, has decided; then, and on other systems, nothing is done.
    """
    decided = os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}
    if not decided and Path("/proc/self/schedstat").exists():
        threading.Thread(target=_watch, name="calm_threads", daemon=True).start()


def _watch() -> None:
    waited, wake = _waited_for_a_core(), None
    while True:
        time.sleep(_LOOK_EVERY)
        before, waited = waited, _waited_for_a_core()
        crowded = waited - before > _CROWDED * _LOOK_EVERY
        if crowded and wake is None:
            try:
                wake = _keep_teams_asleep()
            except RuntimeError:
                if threading.main_thread().is_alive():
                    raise
                return  # the program ends, and Python starts no thread any more
        elif not crowded and wake is not None:
            wake.set()
            wake = None


def _waited_for_a_core() -> float:
    """Seconds that the threads of this process, those that run now, were ready and had no core."""
    nanoseconds = 0
    for thread in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # it ended meanwhile
            nanoseconds += int((thread / "schedstat").read_text().split()[1])
    return nanoseconds / 1e9


def _keep_teams_asleep() -> threading.Event | None:
    """Start so many teams of threads that libgomp counts more threads than cores; they end with the event.

    None where PyTorch computes with one thread: a team of one waits for nobody.
    """
    threads = []
    fresh = threading.Thread(target=lambda: threads.append(torch.get_num_threads()), daemon=True)
    fresh.start()  # a thread that has asked before gets the answer of then
    fresh.join()
    helpers = threads[0] - 1  # each team adds as many
    if not helpers:
        return None
    wake = threading.Event()

    def sleep() -> None:
        torch.ones(1 << 20)  # so large that a team fills it, which stays with the thread that asked for it
        wake.wait()

    for _ in range(math.ceil(len(os.sched_getaffinity(0)) / helpers)):
        threading.Thread(target=sleep, name="calm_threads team", daemon=True).start()
    return wake
