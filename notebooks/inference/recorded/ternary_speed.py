"""Times of ternary products beside those of other weights, under a minute on two cores of a quiet machine.

Run them with `python notebooks/inference/recorded/ternary_speed.py`.

One row of input times a matrix of 1024 x 1024, which stays in the cache, and times all matrices of
BitCPM4-0.5B in turn, as one token needs them, which come from memory. Of float32 a quarter of the blocks is
measured, which no cache holds either, and its time taken four times. Beside them: the rate of summing an
array. Each time is the shortest of its rounds. What a call costs by itself is the time of an empty one, by a
matrix of 1 x 256 of the same type: what is left of a call in the cache is the work on its weights. (An empty
call wakes no second thread and rounds a quarter of the inputs, so it is rather too little.)

Then a whole token behind 64 others, by a packed model of random weights whose table is in Q6_K: its time, and
those of its matrices and of its output layer by themselves. What is left is attention, norms, and Python.

The rules, fixed before the run: bytes are all that costs if from memory the ternary matrices gain over those
of 4 bits what they are smaller by, 2.2 times, and in the cache less. The time of a token is accounted for if
its matrices and its output layer, each measured by itself, are at least half of it; else it is named as not
accounted for. That of its matrices is accounted for if the calls and the longer of two, the work on all
weights and the reading of all bytes, are 80 to 110 % of it for both types.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from minicpm_lite import kernels, load_config
from minicpm_lite.inference.packed import PackedLinear, put_packed
from minicpm_lite.inference.quantization import quantize
from minicpm_lite.inference.ternary import ternarize, ternary_product
from minicpm_lite.lab.recorded import run_jobs
from minicpm_lite.language.context import KVCache
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.language.layers import replace_linears
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


def packed_model(kind: str) -> Decoder:
    """A packed BitCPM4-0.5B of random weights; those of one shape are equal, in bytes of their own."""
    seed_everything(0)
    with torch.device("meta"):
        model = Decoder(MODEL)
    made = {}

    def pack(name: str, linear: nn.Module) -> nn.Module:
        if name == "lm_head":
            return linear
        shape = linear.weight.shape
        if shape not in made:
            codes, scale = ternarize(torch.randn(shape))
            made[shape] = quantize(codes * scale, kind)
        return PackedLinear(replace(made[shape], data=made[shape].data.clone()))

    replace_linears(model, pack)
    table = quantize(torch.randn(1024, MODEL.hidden_size), "Q6_K")
    rows = table.data.repeat(-(-MODEL.vocab_size // 1024), 1)[: MODEL.vocab_size].contiguous()
    put_packed(model, "embed_tokens.weight", replace(table, data=rows))
    for part in model.modules():
        for name in part._parameters:
            part._parameters[name] = nn.Parameter(torch.ones(part._parameters[name].shape))
    return model.requires_grad_(False).eval()


@torch.no_grad()
def token_of(kind: str) -> dict[str, float]:
    """Milliseconds of one token, of its matrices, and of its output layer."""
    model = packed_model(kind)
    cache, ids = KVCache(80), torch.arange(64)[None]
    model(ids, cache)
    layers = [part for part in model.layers.modules() if isinstance(part, PackedLinear)]
    inputs = {part.in_features: torch.randn(1, 1, part.in_features) for part in layers}

    def token() -> None:
        model(ids[:, :1], cache)
        cache.truncate(64)

    def matrices() -> None:
        for part in layers:
            part(inputs[part.in_features])

    parts = {
        "token": token,
        "matrices": matrices,
        "output": lambda: model.lm_head(inputs[MODEL.hidden_size]),
    }
    return {name: 1e3 * shortest(each, 40) for name, each in parts.items()} | {
        "matrices_bytes": sum(part.packed.nbytes for part in layers),
        "output_bytes": model.lm_head.packed.nbytes,
    }


def work(job: Job) -> dict:
    torch.set_num_threads(THREADS)
    seed_everything(0)
    codes, scale = ternarize(torch.randn(1024, 1024))
    vector = torch.randn(1, 1024)
    in_cache = {}
    for kind in TYPES:
        weight = stored(codes * scale, kind)
        in_cache[kind] = shortest(partial(kernels.linear, vector, weight, kind), 500)
    in_cache["Q6_K"] = shortest(
        partial(kernels.linear, vector, stored(vector.expand(1024, -1), "Q6_K"), "Q6_K"), 500
    )
    empty = {}
    for kind in TYPES:
        weight = stored(codes[:1, :256] * scale[:1], kind)
        empty[kind] = shortest(partial(kernels.linear, vector[:, :256], weight, kind), 5000)
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
        "microseconds_empty": {kind: 1e6 * each for kind, each in empty.items()},
        "microseconds_adding": 1e6 * adding,
        "milliseconds": {kind: 1e3 * each for kind, each in from_memory.items()},
        "nbytes": nbytes,
        "whole": {kind: token_of(kind) for kind in ("Q4_0", "TQ2_0")},
        "gigabytes_a_second": numbers.nbytes / shortest(numbers.sum, 20) / 1e9,
    }


if __name__ == "__main__":
    run_jobs(__file__, [Job()], work, {"threads": THREADS, "model": "bitcpm4-0.5b"}, 1)
