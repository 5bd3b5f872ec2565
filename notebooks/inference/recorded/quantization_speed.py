"""Speed and memory of SmolLM2-135M in several types, 6 minutes on 2 cores of a quiet machine.

Run it with `python notebooks/inference/recorded/quantization_speed.py prepare`, which packs the model into a
folder of temporary files (3 minutes), and then without `prepare`, which measures; or with "matrices",
"tokens", "parts", "builds" or "memory", which measures that alone. What is compared is measured in one run,
in turns, with two threads:

- one row times one matrix: PyTorch's ways, and the kernels in three builds (any processor, AVX2, this one);
- a token written by SmolLM2-135M, for each type, two of them compiled, too, beside llama.cpp with a file of
  the same bytes, if the package xllamacpp can be imported (it is named in the environment variable
  LLAMA_CPP_SITE otherwise);
- where the time of such a token goes: each part is timed where it stands, and the fastest of 400 counts;
- one row times the second matrix once more, every type in every build side by side, since the float32 kernel
  was mended for what has no AVX-512: the fastest of 400 each, in turns;
- what the process of a model takes in memory, each in a process of its own.

The rule, fixed before the run: Q4_0 writes at least 2.5 times as many tokens a second as PyTorch in float32,
and at least 70 % of llama.cpp's on the same bytes.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from unittest import mock

import gguf
import torch
import torch.nn.functional as F

from minicpm_lite.data.packages import smollm2_file
from minicpm_lite.inference.packed import PackedLinear, load_packed, quantize_model, save_packed
from minicpm_lite.inference.quantization import quantize
from minicpm_lite.kernels import FORMATS, linear, reference
from minicpm_lite.lab.recorded import run_jobs
from minicpm_lite.language import layers
from minicpm_lite.language.context import KVCache
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.language.fast_decoding import fast_decoding
from minicpm_lite.language.layers import RMSNorm
from minicpm_lite.pretrained.checkpoints import load_pretrained

FOLDER = Path(tempfile.gettempdir()) / "minicpm_lite_packed"
SAME_BYTES = FOLDER / "Q4_0 in all.gguf"  # for llama.cpp
MATRIX = FOLDER / "matrix.pt"  # of an 8B, in each type of the ladder
LADDER = ("Q8_0", "Q6_K", "Q4_K", "Q4_0")
TYPES = ("Q8_0", "Q6_K", "Q4_K_M", "Q4_0", "INT8", "INT4_G64", "Q4_0 in all")
MATRICES = {"SmolLM2's table": (49_152, 576), "a matrix of an 8B": (4_096, 4_096)}
BUILDS = {
    "any processor": "-march=x86-64 -DMINICPM_LITE_PORTABLE",
    "AVX2": "-march=x86-64-v3",
    "this one": "",
}
PROMPT, TOKENS, ROUNDS = 16, 32, 3
OFTEN = 400  # a part of a token, of which the fastest counts
THREADS = 2
FACTS = {"threads": THREADS, "prompt": PROMPT, "tokens": TOKENS, "rounds": ROUNDS, "matrices": MATRICES}


@dataclass(frozen=True)
class Job:
    """One of the measurements; `name` is its key in the results."""

    kind: str
    of: str = ""

    @property
    def name(self) -> str:
        return f"{self.kind}/{self.of}" if self.of else self.kind


def work(job: Job) -> dict:
    torch.set_num_threads(THREADS)
    with torch.no_grad():
        return {
            "matrices": matrices,
            "tokens": tokens,
            "parts": parts,
            "builds": builds,
            "memory": lambda: memory(job.of),
        }[job.kind]()


def take_turns(rounds: int, works: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each, after one round that does not count."""
    seconds = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, each in works.items():
            start = time.perf_counter()
            each()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return {name: median(found) for name, found in seconds.items()}


# ------------------------------------------------------------------------------------------- one matrix


def matrices() -> dict:
    array = torch.ones(256_000_000 // 4)
    found = {"bytes a second": array.nbytes / take_turns(20, {"sum": array.sum})["sum"]}
    for name, shape in MATRICES.items():
        found[name] = one_matrix(*shape)
        for build, flags in BUILDS.items():
            environment = os.environ | {"CXXFLAGS": flags, "OMP_NUM_THREADS": str(THREADS)}
            command = [sys.executable, __file__, "kernels", *map(str, shape)]
            run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            found[name] |= {f"{type}, {build}": s for type, s in json.loads(run.stdout).items()}
    return found


def one_matrix(outputs: int, features: int) -> dict[str, float]:
    """Milliseconds of PyTorch's ways."""
    torch.manual_seed(0)
    weight, x = torch.randn(outputs, features), torch.randn(1, features)
    packed = quantize(weight, "Q4_0").data
    codes = (weight / weight.abs().amax(1, keepdim=True) * 127).round().to(torch.int8)
    scale = torch.ones(outputs, dtype=torch.bfloat16)
    layer = torch.nn.Linear(features, outputs, bias=False)
    layer.weight.data.copy_(weight)
    dynamic = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(layer), dtype=torch.qint8)
    half = weight.bfloat16()
    groups = torch.randint(0, 16, (outputs, features), dtype=torch.int32)
    int4 = torch.ops.aten._convert_weight_to_int4pack_for_cpu(groups, 2)
    scales = torch.ones(features // 64, outputs, 2, dtype=torch.bfloat16)
    row = x.bfloat16()
    works = {
        "unpack, then multiply": lambda: reference(x, packed, "Q4_0"),
        "torch float32": lambda: F.linear(x, weight),
        "torch bfloat16": lambda: F.linear(row, half),
        "torch dynamic int8": lambda: dynamic(x),
        "torch int8pack": lambda: torch.ops.aten._weight_int8pack_mm(row, codes, scale),
        "torch int4pack": lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(row, int4, 64, scales),
    }
    return {name: 1000 * seconds for name, seconds in take_turns(15, works).items()}


def kernels(outputs: int, features: int) -> dict[str, float]:
    """Milliseconds of the kernels as this process builds them."""
    torch.manual_seed(0)
    weight, x = torch.randn(outputs, features), torch.randn(1, features)
    fitting = [
        type for type in ("F32", "Q8_0", "Q4_0", "Q6_K", "Q4_K") if features % FORMATS[type].block == 0
    ]
    stored = {type: weight if type == "F32" else quantize(weight, type).data for type in fitting}
    works = {type: lambda type=type: linear(x, stored[type], type) for type in fitting}
    return {name: 1000 * seconds for name, seconds in take_turns(15, works).items()}


# ------------------------------------------------------------------------------------------- whole models


def tokens() -> dict:
    plain = load_pretrained(smollm2_file()).eval()
    models = {"torch float32": plain, "F32": fast_decoding(plain)}
    models |= {type: load_packed(FOLDER / f"{type}.safetensors") for type in TYPES}
    models |= {f"{name}, compiled": torch.compile(models[name]) for name in ("torch float32", "Q4_0 in all")}
    seconds = take_turns(ROUNDS, {name: writer(model) for name, model in models.items()})
    found = {name: TOKENS / each for name, each in seconds.items()}
    beside = llama_cpp()
    return {"per second": found | {name: rate for name, rate in beside.items() if name != "version"}} | {
        "xllamacpp": beside.get("version")
    }


def writer(model: Decoder) -> Callable[[], None]:
    """Writes some tokens behind a prompt that was read before."""
    ids = torch.randint(49_152, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    cache = KVCache(PROMPT + TOKENS)
    first = model(ids, cache)[:, -1:].argmax(-1)

    def write() -> None:
        cache.truncate(PROMPT)
        token = first
        for _ in range(TOKENS):
            token = model(token, cache)[:, -1:].argmax(-1)

    return write


def parts() -> dict:
    """Milliseconds of a token, call by call, of the model whose matrices are all Q4_0; and of calls alone.

    Of each call the fastest of many tokens counts, so that what else the machine does has little say.
    """
    model = load_packed(FOLDER / "Q4_0 in all.safetensors")
    ids = torch.randint(49_152, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    cache = KVCache(PROMPT + TOKENS)
    token = model(ids, cache)[:, -1:].argmax(-1)
    fastest, place = {}, Counter()

    def write() -> None:
        cache.truncate(PROMPT)
        place.clear()
        model(token, cache)[:, -1:].argmax(-1)

    whole = min(timed(write) for _ in range(OFTEN))

    def watched(part: str, function: Callable) -> Callable:
        def call(*given: object, **named: object) -> object:
            at = part, place[part]
            place[part] += 1
            start = time.perf_counter()
            found = function(*given, **named)
            fastest[at] = min(time.perf_counter() - start, fastest.get(at, math.inf))
            return found

        return call

    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            part = "output layer" if name == "lm_head" else "packed layers of the blocks"
            module.forward = watched(part, module.forward)
        elif isinstance(module, RMSNorm):
            module.forward = watched("norms", module.forward)
    with ExitStack() as changed:
        for name in ("keep", "attend"):
            method = watched("attention and its cache", getattr(KVCache, name))
            changed.enter_context(mock.patch.object(KVCache, name, method))
        several = staticmethod(watched("packed layers of the blocks", PackedLinear.side_by_side))
        changed.enter_context(mock.patch.object(PackedLinear, "side_by_side", several))
        turn = watched("positions", layers.apply_rotary)
        changed.enter_context(mock.patch.object(layers, "apply_rotary", turn))
        for _ in range(OFTEN):
            write()
    spent = Counter()
    for (part, _), seconds in fastest.items():
        spent[part] += 1000 * seconds
    calls = sum(part in ("output layer", "packed layers of the blocks") for part, _ in fastest)
    x, tiny = torch.ones(1, 1, 32), quantize(torch.ones(1, 32), "Q4_0").data
    call = min(timed(lambda: linear(x, tiny, "Q4_0")) for _ in range(OFTEN * 20))
    return {
        "token": 1000 * whole,
        "calls": calls,
        "calls alone": 1000 * calls * call,
        "parts": dict(spent),
    }


def builds() -> dict:
    """Milliseconds of one row times a matrix, each type in each build, and PyTorch's: the fastest of many."""
    if not MATRIX.exists():
        pack_matrix()
    weight = torch.load(MATRIX)["F32"]
    x = torch.randn(1, weight.shape[1])
    found = {"torch float32": 1000 * min(timed(lambda: F.linear(x, weight)) for _ in range(OFTEN))}
    for build, flags in BUILDS.items():
        environment = os.environ | {"CXXFLAGS": flags, "OMP_NUM_THREADS": str(THREADS)}
        command = [sys.executable, __file__, "one build"]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        found |= {f"{type}, {build}": milliseconds for type, milliseconds in json.loads(run.stdout).items()}
    return found


def one_build() -> dict[str, float]:
    stored = torch.load(MATRIX)
    x, fastest = torch.randn(1, stored["F32"].shape[1]), dict.fromkeys(stored, math.inf)
    works = {type: partial(linear, x, weight, type) for type, weight in stored.items()}
    for _ in range(OFTEN):
        for type, each in works.items():
            fastest[type] = min(fastest[type], 1000 * timed(each))
    return fastest


def pack_matrix() -> None:
    FOLDER.mkdir(exist_ok=True)
    weight = torch.randn(MATRICES["a matrix of an 8B"], generator=torch.Generator().manual_seed(0))
    torch.save({"F32": weight} | {type: quantize(weight, type).data for type in LADDER}, MATRIX)


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def llama_cpp() -> dict:
    """Tokens a second of llama.cpp, in a process of its own; nothing if it is not there."""
    environment = os.environ | {"PYTHONPATH": os.environ.get("LLAMA_CPP_SITE", "")}
    run = subprocess.run(
        [sys.executable, "-c", _LLAMA_CPP, str(SAME_BYTES), str(smollm2_file()), str(THREADS), str(TOKENS)],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if run.returncode:
        print(run.stderr[-500:], flush=True)
        return {}
    return json.loads(
        next(line for line in run.stdout.splitlines() if line.startswith("FOUND ")).removeprefix("FOUND ")
    )


_LLAMA_CPP = """
import importlib.metadata, json, statistics, sys
import xllamacpp
found = {}
for name, path in (("llama.cpp Q4_0 in all", sys.argv[1]), ("llama.cpp Q4_1 as shipped", sys.argv[2])):
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx, params.warmup = 512, True
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(sys.argv[3])
    server = xllamacpp.Server(params)
    rates = []
    for _ in range(4):
        answer = server.handle_completions({
            "prompt": "It is a truth universally acknowledged, that a single man in possession",
            "max_tokens": int(sys.argv[4]), "temperature": 0, "ignore_eos": True, "cache_prompt": False})
        rates.append(answer["timings"]["predicted_per_second"])
    found[name] = statistics.median(rates[1:])
print("FOUND " + json.dumps(found | {"version": importlib.metadata.version("xllamacpp")}), flush=True)
"""


def memory(type: str) -> dict:
    """What a process takes before it opens a model and after it has written, in MB."""
    run = subprocess.run(
        [sys.executable, __file__, "open", type], capture_output=True, text=True, check=True,
        env=os.environ | {"OMP_NUM_THREADS": str(THREADS)},
    )  # fmt: skip
    return json.loads(run.stdout.splitlines()[-1])


@torch.no_grad()
def open_model(type: str) -> dict:
    before = resident()
    file = FOLDER / f"{type}.safetensors"
    model = load_packed(file) if type in TYPES else load_pretrained(smollm2_file()).eval()
    writer(model)()
    return {"before": before, "after": resident()} | (
        {"file": file.stat().st_size / 1e6} if file.exists() else {}
    )


def resident() -> float:
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")
    )
    return int(line.split()[1]) * 1024 / 1e6


# ------------------------------------------------------------------------------------------- files


def prepare() -> None:
    """Pack the model in every type, for us and for llama.cpp; and one matrix."""
    pack_matrix()
    for type in TYPES:
        file = FOLDER / f"{type}.safetensors"
        if not file.exists():
            model = load_pretrained(smollm2_file())
            types = {name: "Q4_0" for name, weight in model.named_parameters() if weight.ndim == 2}
            save_packed(quantize_model(model, types if type == "Q4_0 in all" else type), file)
            print(type, flush=True)
    write_gguf()


def write_gguf() -> None:
    """The file of llama.cpp with its matrices in Q4_0: the very bytes of "Q4_0 in all"."""
    reader = gguf.GGUFReader(smollm2_file())
    writer = gguf.GGUFWriter(SAME_BYTES, "llama")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub)
    for tensor in reader.tensors:
        numbers = gguf.dequantize(tensor.data, tensor.tensor_type)
        if numbers.ndim == 2:
            packed = quantize(torch.tensor(numbers), "Q4_0").data.numpy()
            writer.add_tensor(tensor.name, packed, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
        else:
            writer.add_tensor(tensor.name, numbers.astype("float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["prepare"]:
            prepare()
        case ["kernels", outputs, features]:
            print(json.dumps(kernels(int(outputs), int(features))))
        case ["one build"]:
            print(json.dumps(one_build()))
        case ["open", type]:
            print(json.dumps(open_model(type)))
        case kinds:
            everything = [
                Job("matrices"),
                Job("tokens"),
                Job("parts"),
                Job("builds"),
                *(Job("memory", type) for type in ("float32", *TYPES)),
            ]
            wanted = [job for job in everything if not kinds or job.kind in kinds]
            run_jobs(__file__, wanted, work, FACTS, workers=1)
