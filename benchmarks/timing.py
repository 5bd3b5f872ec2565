"""Seconds of pieces of work that take turns, and the rate at which memory is read."""

import statistics
import time
from collections.abc import Callable

import torch

__all__ = ["reading_rate", "take_turns"]


def take_turns(rounds: int, *works: Callable[[], object]) -> list[float]:
    """Median seconds of each piece of work, after one round that does not count."""
    seconds = [[] for _ in works]
    for round_number in range(rounds + 1):
        for work, times in zip(works, seconds, strict=True):
            start = time.perf_counter()
            work()
            if round_number:
                times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in seconds]


def reading_rate() -> float:
    """Bytes a second at which an array that no cache holds is summed; some servers' caches have 480 MB."""
    array = torch.ones(2_000_000_000 // 4)
    (seconds,) = take_turns(10, array.sum)
    return array.nbytes / seconds
