"""Times of ternary products beside those of other weights, some seconds on two cores of a quiet machine.

Run them with `python notebooks/inference/recorded/ternary_speed.py`.

One row of input times a matrix of 1024 x 1024, which stays in the cache, and times all matrices of
BitCPM4-0.5B in turn, as one token needs them, which come from memory. Of float32 a quarter of the blocks is
measured, which no cache holds either, and its time taken four times. Beside them: the rate of summing an
array. Each time is the shortest of its rounds.

The rule, fixed before the run: bytes are all that costs if from memory the ternary matrices gain over those
of 4 bits what they are smaller by, 2.2 times, and in the cache less.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from minicpm_lite import kernels, load_config
from minicpm_lite.inference.quantization import quantize
from minicpm_lite.inference.ternary import ternarize, ternary_product
from minicpm_lite.lab.recorded import run_jobs
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.runtime import seed_everything

THREADS = 2
TYPES = ("F32", "Q8_0", "Q4_0", "TQ2_0")
PART = {"F32": 4}  # of the blocks one in four
MODEL = load_config("bitcpm4-0.5b")


@dataclass(frozen=True)
class Job:
    """All of it, since times that are compared belong to one run."""

    name: str = "times"


def stored(weight: Tensor, kind: str) -> Tensor:
    return weight if kind == "F32" else quantize(weight, kind).data


def shortest(work: Callable[[], object], rounds: int) -> float:
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)


def work(job: Job) -> dict:
    torch.set_num_threads(THREADS)
    seed_everything(0)
    codes, scale = ternarize(torch.randn(1024, 1024))
    vector = torch.randn(1, 1024)
    in_cache = {}
    for kind in TYPES:
        weight = stored(codes * scale, kind)
        in_cache[kind] = shortest(partial(kernels.linear, vector, weight, kind), 500)
    adding = shortest(lambda: ternary_product(vector, codes, scale), 3)
    with torch.device("meta"):
        block = Decoder(replace(MODEL, num_hidden_layers=1)).layers[0]
    shapes = [p.shape for p in block.parameters() if p.ndim == 2]
    inputs = {columns: torch.randn(1, columns) for _, columns in shapes}
    from_memory, nbytes = {}, {}
    for kind in TYPES:
        matrices = {}
        for shape in set(shapes):
            values, sizes = ternarize(torch.randn(shape))
            matrices[shape] = stored(values * sizes, kind)
        times = PART.get(kind, 1)
        blocks = MODEL.num_hidden_layers // times
        stack = [(matrices[shape].clone(), inputs[shape[1]]) for _ in range(blocks) for shape in shapes]

        def token(stack: list = stack, kind: str = kind) -> None:
            for weight, x in stack:
                kernels.linear(x, weight, kind)

        from_memory[kind] = shortest(token, 30) * times
        nbytes[kind] = sum(weight.nbytes for weight, _ in stack) * times
        del stack, token
    numbers = torch.ones(50_000_000)
    return {
        "microseconds_in_cache": {kind: 1e6 * each for kind, each in in_cache.items()},
        "microseconds_adding": 1e6 * adding,
        "milliseconds": {kind: 1e3 * each for kind, each in from_memory.items()},
        "nbytes": nbytes,
        "gigabytes_a_second": numbers.nbytes / shortest(numbers.sum, 20) / 1e9,
    }


if __name__ == "__main__":
    run_jobs(__file__, [Job()], work, {"threads": THREADS, "model": "bitcpm4-0.5b"}, 1)
