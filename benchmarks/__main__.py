"""Training and cached decoding beside transformers and beside what the machine can do, in one run.

    python -m benchmarks               everything, about twelve minutes on 2 cores
    python -m benchmarks decode        one part: settings, profile, decode, decode-135m, kernels, sparse,
                                       serving or train

Each figure is the median over rounds in which all take turns, so that a busy machine slows all of them. The
physical limit of training is the rate at which the machine multiplies two large matrices; that of decoding,
which reads every weight for each token, the rate at which it reads an array from memory.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from minicpm_lite import ModelConfig, load_config
from minicpm_lite.data.packages import smollm2_file
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.language.generation import generate
from minicpm_lite.pretrained.checkpoints import load_pretrained
from minicpm_lite.runtime import seed_everything, tune_cpu
from minicpm_lite.training.settings import TrainerConfig
from minicpm_lite.training.trainer import Trainer
from minicpm_lite.training.wsd import WSD

from .kernels import kernels
from .models import transformers_twin
from .serving import serving
from .sparse import sparse
from .timing import reading_rate, take_turns

SHAPES = {
    "lite-1m": load_config("lite-1m"),
    "8M": replace(load_config("lite-1m"), hidden_size=320, intermediate_size=800, num_attention_heads=10,
                  num_key_value_heads=5, num_hidden_layers=8, vocab_size=4096),
}  # fmt: skip


def make_run(config: ModelConfig, compiled: bool = False) -> Trainer:
    seed_everything(0)
    tokens = torch.randint(config.vocab_size, (100_000,))
    return Trainer(Decoder(config), tokens, WSD(1e-3, 10, 10_000, 0), TrainerConfig(compile=compiled))


def twin_step(run: Trainer) -> Callable[[], None]:
    """One update of the twin, written as its documentation shows, with the optimiser a user gets today."""
    twin = transformers_twin(run.model).train()
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step() -> None:
        window = run.batches[0]
        logits = twin(input_ids=window[:, :-1]).logits
        nn.functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def train() -> None:
    print("\nTraining, batches of 12 x 128 tokens, float32")
    square = torch.randn(1024, 1024)
    for name, config in SHAPES.items():
        run, compiled = make_run(config), make_run(config, compiled=True)
        with FlopCounterMode(display=False) as counter:
            run.train(1, progress=False)
        *seconds, multiplying = take_turns(
            12,
            lambda run=run: run.train(run.step + 1, progress=False),
            lambda run=compiled: run.train(run.step + 1, progress=False),
            twin_step(run),
            lambda: square @ square,
        )
        tokens, possible = run.config.batch_tokens, 2 * 1024**3 / multiplying
        for version, mine in zip(("minicpm_lite", "    compiled", "transformers"), seconds, strict=True):
            share = counter.get_total_flops() / mine / possible
            print(
                f"  {name:8} {version} {tokens / mine:7,.0f} tokens/s = {seconds[-1] / mine:.2f} x "
                f"transformers, {share:.0%} of {possible / 1e9:.0f} GFLOP/s"
            )


def decode(new_tokens: int = 96) -> None:
    print(f"\nGreedy decoding with a cache, batch 1, {new_tokens} tokens after a prompt of 32, one thread")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # waiting for each other costs threads more than such small matrices do
    for name, config in SHAPES.items():
        seed_everything(0)
        model = Decoder(config).eval()
        print_bandwidth(model, compare_decoding(name, model, new_tokens, compiled=True))
    torch.set_num_threads(threads)


def decode_a_real_model(new_tokens: int = 48) -> None:
    """Decoding reads every weight once a token: how much of the bandwidth of the memory is used?"""
    print(f"\nGreedy decoding of SmolLM2-135M in float32, {new_tokens} tokens after a prompt of 32")
    model = load_pretrained(smollm2_file())
    print_bandwidth(model, compare_decoding("SmolLM2", model, new_tokens, compiled=False))


def print_bandwidth(model: Decoder, seconds: float) -> None:
    """Print which share of the memory's bandwidth the weights take, at so many seconds a token."""
    weights = sum(parameter.nbytes for parameter in model.parameters())
    used, possible = weights / seconds, reading_rate()
    print(
        f"  {weights / 1e6:.0f} MB of weights a token: {used / 1e9:.1f} GB/s = {used / possible:.0%} of the "
        f"{possible / 1e9:.1f} GB/s at which an array is summed"
    )


def compare_decoding(name: str, model: Decoder, new_tokens: int, compiled: bool) -> float:
    """Print tokens a second beside transformers', and return our seconds a token."""
    prompt = torch.randint(model.config.vocab_size, (1, 32))
    twin = transformers_twin(model).eval()
    versions = {"minicpm_lite": lambda: generate(model, prompt, new_tokens, stop_ids=())}
    if compiled:
        faster = torch.compile(model)
        versions["    compiled"] = lambda: generate(faster, prompt, new_tokens, stop_ids=())
    versions["transformers"] = lambda: twin.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new_tokens, do_sample=False
    )
    texts = [version() for version in versions.values()]
    assert all(torch.equal(text, texts[0]) for text in texts), "all must write the same tokens"
    seconds = take_turns(7, *versions.values())
    for version, mine in zip(versions, seconds, strict=True):
        print(
            f"  {name:8} {version} {new_tokens / mine:7,.0f} tokens/s = {seconds[-1] / mine:.2f} x generate()"
        )
    return seconds[0] / new_tokens


def where_the_time_goes(rows: int = 8) -> None:
    print("\nWhere the time of a training step goes (lite-1m)")
    run = make_run(SHAPES["lite-1m"])
    run.train(5, progress=False)
    with profile() as profiler:
        run.train(15, progress=False)
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    for event in events[:rows]:
        print(f"  {event.self_cpu_time_total / total:6.1%}  {event.key.removeprefix('aten::')}")
    print(f"  {sum(e.self_cpu_time_total for e in events[rows:]) / total:6.1%}  all others")


def settings() -> None:
    """Each setting in a process of its own, since an allocator is set once."""
    print("\nWhat settings bring (lite-1m, eager training)")
    for threads in sorted({1, torch.get_num_threads()}):
        for tuned in (False, True):
            command = [sys.executable, "-m", "benchmarks", "one-setting", "--threads", str(threads)]
            printed = subprocess.run(
                command + ["--tuned"] * tuned, check=True, capture_output=True, text=True
            )
            name = f"{threads} thread{'s' * (threads > 1)}, {'tune_cpu' if tuned else 'as it is'}"
            print(f"  {name:20} {printed.stdout.strip()}")


def one_setting(threads: int, tuned: bool) -> None:
    torch.set_num_threads(threads)
    if tuned:
        tune_cpu()
    run = make_run(SHAPES["lite-1m"])
    (seconds,) = take_turns(15, lambda: run.train(run.step + 1, progress=False))
    print(f"{run.config.batch_tokens / seconds:7,.0f} tokens/s")


def main() -> None:
    parts = {
        "settings": settings,
        "profile": where_the_time_goes,
        "decode": decode,
        "decode-135m": decode_a_real_model,
        "kernels": kernels,
        "sparse": sparse,
        "serving": serving,
        "train": train,
    }
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.split("\n\n")[0])
    parser.add_argument("part", nargs="?", choices=["all", *parts, "one-setting"], default="all")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument("--tuned", action="store_true", help="for one-setting: call tune_cpu first")
    arguments = parser.parse_args()
    if arguments.part == "one-setting":
        one_setting(arguments.threads, arguments.tuned)
        return
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name, part in parts.items():
        if arguments.part in ("all", name):
            if name != "settings":
                tune_cpu()
            part()


if __name__ == "__main__":
    main()
