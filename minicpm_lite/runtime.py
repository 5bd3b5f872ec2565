"""Two things every run does first: one seed for everything, and a processor that is used well."""

import ctypes
import platform
import random

import numpy as np
import torch

__all__ = ["seed_everything", "tune_cpu"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # names of glibc's malloc.h
_LARGEST_KEPT_BLOCK = 1 << 30  # bytes


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's generators. The book seeds through this function alone.

    Raises:
        ValueError: the seed is negative or does not fit in 32 bits (NumPy's limit).
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"The seed is {seed}; give a whole number from 0 to {2**32 - 1}.")
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
