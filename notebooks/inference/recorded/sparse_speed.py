"""The recorded timings of the chapter on sparse attention, three minutes on a quiet machine.

Run them with `python notebooks/inference/recorded/sparse_speed.py`, with nothing else running.

One layer's attention at the sizes of MiniCPM4-8B (32 query heads, 2 key-value heads, 128 wide) in float32,
with random numbers: PyTorch's dense attention with the group folded into the query axis, the dense attention
of our kernel, sparse attention, and sparse attention in two levels (`coarse_topk` 128).

- "token": one query behind a text, by one thread and by two. Several layers take turns, so that keys and
  values come from memory and not from a cache that the turn before has filled.
- "piece": the last 256 queries of a text, by two threads: what a prompt costs at that length.

The rule, fixed before the runs, for one token: sparse is faster than PyTorch's dense from 16K on, at least 15
times as fast at 128K, and beside our own dense kernel it has at least 70 % of the ratio that the bytes allow.
Times are the median of the turns; they are kept with their quartiles. Power: quartiles within a tenth of the
median tell ratios apart that differ by a quarter.
"""

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from minicpm_lite.config import load_sparse_config
from minicpm_lite.inference.block_choice import levels, window_means
from minicpm_lite.inference.sparse_attention import attend_text
from minicpm_lite.lab.recorded import run_jobs
from minicpm_lite.language.context import dense_attention
from minicpm_lite.runtime import seed_everything

LENGTHS = (4096, 8192, 16_384, 32_768, 65_536, 131_072)
HEADS, KV_HEADS, HEAD_DIM, PIECE = 32, 2, 128, 256
NAMES = ("torch", "own dense", "sparse", "two levels")
FACTS = {"lengths": LENGTHS, "heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "piece": PIECE}


@dataclass(frozen=True)
class Job:
    """One length; `name` is its key in the results."""

    kind: str
    length: int
    threads: int

    @property
    def name(self) -> str:
        return f"{self.kind}/{self.length}/{self.threads}"


def works(length: int, queries: int, layers: int) -> dict[str, Callable[[], object]]:
    """Each kind of attention, on one layer after the other."""
    config = load_sparse_config("minicpm4-8b")
    two_levels = replace(config, coarse_topk=2 * config.topk)
    everything = replace(config, dense_len=length + 1)
    starts = torch.zeros(1, dtype=torch.long)
    texts = []
    for _ in range(layers):
        query = torch.randn(1, HEADS, queries, HEAD_DIM)
        key, value = torch.randn(2, 1, KV_HEADS, length, HEAD_DIM)
        texts.append((query, key, value, [window_means(key, *level) for level in levels(two_levels)]))

    def turn(work: Callable, first: int) -> Callable[[], object]:
        order = itertools.cycle(texts[first % layers :] + texts[: first % layers])
        return lambda: work(*next(order))

    found = (
        lambda q, k, v, means: dense_attention(q, k, v),
        lambda q, k, v, means: attend_text(q, k, v, means[:1], starts, everything),
        lambda q, k, v, means: attend_text(q, k, v, means[:1], starts, config),
        lambda q, k, v, means: attend_text(q, k, v, means, starts, two_levels),
    )
    return {name: turn(work, place) for place, (name, work) in enumerate(zip(NAMES, found, strict=True))}


def work(job: Job) -> dict:
    seed_everything(0)
    torch.set_num_threads(job.threads)
    token = job.kind == "token"
    layers = max(3, 2**18 // job.length) if token else 1
    turns = 15 if token else 3
    todo = works(job.length, 1 if token else PIECE, layers)
    if not token and job.length > 32_768:  # minutes
        todo = {name: todo[name] for name in NAMES if name not in ("torch", "own dense")}
    seconds = {name: [] for name in todo}
    with torch.no_grad():
        for each in todo.values():
            each()
        for _ in range(turns):
            for name, each in todo.items():
                start = time.perf_counter()
                each()
                seconds[name].append(time.perf_counter() - start)
    return {
        name: dict(
            zip(("low", "ms", "high"), (1e3 * q for q in statistics.quantiles(taken, n=4)), strict=True)
        )
        for name, taken in seconds.items()
    }


if __name__ == "__main__":
    jobs = [Job("token", length, threads) for threads in (1, 2) for length in LENGTHS]
    jobs += [Job("piece", length, 2) for length in LENGTHS]
    run_jobs(__file__, jobs, work, FACTS, workers=1)
