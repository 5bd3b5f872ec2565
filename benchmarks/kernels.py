"""Linear layers for few rows beside PyTorch's, by themselves and in SmolLM2-135M.

What bounds them is the rate at which memory is read. Of each figure the aim stands beside it.
"""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from statistics import median

import torch
import torch.nn.functional as F

from minicpm_lite.data.packages import smollm2_file
from minicpm_lite.inference.engine import Request
from minicpm_lite.inference.llama_cpp import LlamaCpp
from minicpm_lite.inference.quantization import quantize
from minicpm_lite.kernels import find_format, linear
from minicpm_lite.language.context import KVCache
from minicpm_lite.language.fast_decoding import fast_decoding
from minicpm_lite.pretrained.checkpoints import load_pretrained

from .models import packed_copy
from .timing import reading_rate, take_turns

MATRICES = [
    (49_152, 576),
    (4_096, 4_096),
    (576, 1_536),
]  # SmolLM2's output, an 8B's attention, SmolLM2's down
TYPES = ["F32", "Q8_0", "Q4_0", "Q6_K", "Q4_K", "TQ2_0"]
ROWS = [1, 2, 4, 8, 16]
PROMPT = 32


def kernels() -> None:
    """Both, each beside the rate of reading at its time."""
    print("\nProducts with few rows, milliseconds")
    for shape in MATRICES:
        one_matrix(*shape)
    print(f"\nSmolLM2-135M, steps of k tokens after {PROMPT}, milliseconds")
    smollm2()


def one_matrix(outputs: int, features: int) -> None:
    types = [type for type in TYPES if features % find_format(type).block == 0]
    weight = torch.randn(outputs, features)
    weights = {type: weight if type == "F32" else quantize(weight, type).data for type in types}
    rate = reading_rate()
    print(f"  {outputs:,} x {features:,}; an array is summed at {rate / 1e9:.1f} GB/s")
    print("   rows    torch" + "".join(f"{type:>9}" for type in types) + "   F32 of that rate")
    for rows in ROWS:
        x = torch.randn(rows, features)
        works = [partial(F.linear, x, weight), *(partial(linear, x, weights[type], type) for type in types)]
        seconds = take_turns(30, *works)
        cells = "".join(f"{1000 * each:9.3f}" for each in seconds)
        print(f"  {rows:5}{cells}   {weight.nbytes / seconds[1] / rate:.0%}" + " (aim: 80%)" * (rows == 1))


@torch.no_grad()
def smollm2() -> None:
    plain = load_pretrained(smollm2_file()).eval()
    models = {"torch": plain, "F32": fast_decoding(plain)}
    models |= {type: packed_copy(plain, type) for type in ("Q8_0", "Q4_0")}
    rate, nbytes = reading_rate(), sum(parameter.nbytes for parameter in plain.parameters())
    read = f"{nbytes / 1e6:.0f} MB of float32 are read in {1000 * nbytes / rate:.1f} ms"
    print(f"  {read}, at {rate / 1e9:.1f} GB/s")
    print("      k" + "".join(f"{name:>9}" for name in models))
    steps = {}
    for k in ROWS:
        steps[k] = take_turns(20, *(make_step(model, k) for model in models.values()))
        print(f"  {k:5}" + "".join(f"{1000 * each:9.1f}" for each in steps[k]))
    torch_step, fast_step, _, packed_step = steps[1]
    print("  tokens/s" + "".join(f"{1 / each:9.1f}" for each in steps[1])[1:])
    print(f"  F32 reads at {nbytes / fast_step / rate:.0%} of the rate (aim: 80%)")
    for name, at in (("torch", 0), ("F32", 1)):
        print(f"  {name}: a step of 8 takes {steps[8][at] / steps[1][at]:.2f} x a step of one (aim: 1.3)")
    print(f"  Q4_0 is {torch_step / packed_step:.2f} x as fast as torch in float32 (aim: 2.5)")
    torch._dynamo.config.recompile_limit = 64  # of one function, which all the models have in common
    compiled = {name: torch.compile(model) for name, model in models.items()}
    one, eight = (take_turns(20, *(make_step(model, k) for model in compiled.values())) for k in (1, 8))
    one, eight = (dict(zip(compiled, seconds, strict=True)) for seconds in (one, eight))
    cells = ", ".join(f"{name} {1 / each:.1f}" for name, each in one.items())
    print(f"  compiled, tokens a second: {cells}")
    print(f"    Q4_0 is {one['torch'] / one['Q4_0']:.2f} x as fast as torch (aim: 2.5)")
    print(f"    F32 reads at {nbytes / one['F32'] / rate:.0%} of the rate (aim: 80%)")
    cells = ", ".join(f"{name} {eight[name] / one[name]:.2f}" for name in one)
    print(f"    a step of 8 takes so many times a step of one: {cells} (aim: 1.3)")
    if find_spec("xllamacpp") is None:
        print("    beside llama.cpp: pip install xllamacpp")
        return
    theirs = by_llama_cpp()
    print(f"    Q8_0 is {1 / one['Q8_0'] / theirs:.2f} x llama.cpp on the same file, {theirs:.1f} (aim: 0.7)")


def by_llama_cpp() -> float:
    """Its tokens a second for one text, from the file that SmolLM2 comes in, which is Q8_0."""
    server, speeds = LlamaCpp(smollm2_file(), 1, 128, torch.get_num_threads()), []
    for _ in range(5):
        answer = server.submit(Request((1,) * PROMPT, 64, stop_ids=()))
        server.run()
        speeds.append((len(answer.tokens) - 1) / (answer.last - answer.first))
    return median(speeds)


def make_step(model: Callable, tokens: int) -> Callable[[], None]:
    """Reads some tokens behind a prompt, then forgets them."""
    ids = torch.randint(49_152, (1, PROMPT + tokens), generator=torch.Generator().manual_seed(0))
    cache = KVCache(PROMPT + tokens)
    model(ids[:, :PROMPT], cache)

    def step() -> None:
        model(ids[:, PROMPT:], cache)
        cache.truncate(PROMPT)

    return step
