"""Two things every run does first: one seed for everything, and a processor that is used well."""

import ctypes
import os
import random
import sys

import numpy as np
import torch


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


def tune_cpu(threads: int | None = None) -> None:
    """TODO"""
