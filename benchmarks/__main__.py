"""Training and cached decoding beside transformers, on the same weights and shapes, in one run.

    python -m benchmarks               everything, about five minutes on 2 cores
    python -m benchmarks decode        one part: train, decode, profile or settings

Each figure is the median over rounds in which the two take turns, so that a busy machine slows both.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.profiler import profile

from minicpm_lite import ModelConfig, load_config
from minicpm_lite.language.decoder import Decoder, KVCache
from minicpm_lite.optional import require
from minicpm_lite.runtime import seed_everything, tune_cpu
from minicpm_lite.training.trainer import Trainer, TrainerConfig
from minicpm_lite.training.wsd import WSD

SHAPES = {
    "lite-1m": load_config("lite-1m"),
    "8M": replace(load_config("lite-1m"), hidden_size=320, intermediate_size=800, num_attention_heads=10,
                  num_key_value_heads=5, num_hidden_layers=8, vocab_size=4096),
}  # fmt: skip


def transformers_twin(model: Decoder) -> nn.Module:
    """The same weights in transformers' Granite, whose graph has MiniCPM's multipliers."""
    transformers = require("transformers", install="minicpm_lite[parity]", purpose="compare with it")
    config = model.config
    twin = transformers.GraniteForCausalLM(
        transformers.GraniteConfig(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            vocab_size=config.vocab_size,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            embedding_multiplier=config.scale_emb,
            residual_multiplier=config.residual_scale,
            attention_multiplier=config.head_dim**-0.5,
            logits_scaling=config.width_ratio,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=config.tie_word_embeddings,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
    )
    weights = model.state_dict()
    twin.load_state_dict({n if n.startswith("lm_head") else f"model.{n}": w for n, w in weights.items()})
    return twin


def take_turns(rounds: int, *works: Callable[[], None]) -> list[float]:
    """Median seconds of each piece of work, after one round that does not count."""
    seconds = [[] for _ in works]
    for round_number in range(rounds + 1):
        for work, times in zip(works, seconds, strict=True):
            start = time.perf_counter()
            work()
            if round_number:
                times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in seconds]


def make_run(config: ModelConfig, compiled: bool = False) -> Trainer:
    seed_everything(0)
    tokens = torch.randint(config.vocab_size, (100_000,))
    return Trainer(Decoder(config), tokens, WSD(1e-3, 10, 10_000, 0), TrainerConfig(compile=compiled))


def twin_step(run: Trainer) -> Callable[[], None]:
    """One update of the twin, written as its documentation shows, with the optimiser a user gets today."""
    twin = transformers_twin(run.model).train()
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step() -> None:
        window = run.batches(0)
        logits = twin(input_ids=window[:, :-1]).logits
        nn.functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def train() -> None:
    print("\nTraining, batches of 12 x 128 tokens, float32")
    for name, config in SHAPES.items():
        run, compiled = make_run(config), make_run(config, compiled=True)
        ours, faster, theirs = take_turns(
            12,
            lambda run=run: run.train(run.step + 1, progress=False),
            lambda run=compiled: run.train(run.step + 1, progress=False),
            twin_step(run),
        )
        tokens = run.config.batch_tokens
        print(f"  {name:8} minicpm_lite {tokens / ours:7,.0f} tokens/s = {theirs / ours:.2f} x transformers")
        print(
            f"  {'':8}     compiled {tokens / faster:7,.0f} tokens/s = {theirs / faster:.2f} x transformers"
        )
        print(f"  {'':8} transformers {tokens / theirs:7,.0f} tokens/s")


@torch.no_grad()
def decode(new_tokens: int = 96) -> None:
    print(f"\nGreedy decoding with a cache, batch 1, {new_tokens} tokens after a prompt of 32")
    for name, config in SHAPES.items():
        seed_everything(0)
        model = Decoder(config).eval()
        twin = transformers_twin(model).eval()
        prompt = torch.randint(config.vocab_size, (1, 32))
        mine = greedy(model, prompt, new_tokens)
        theirs = twin.generate(prompt, max_new_tokens=new_tokens, do_sample=False)
        assert torch.equal(mine, theirs), "both must write the same tokens"
        ours, hugging_face = take_turns(
            5,
            lambda model=model, prompt=prompt: greedy(model, prompt, new_tokens),
            lambda twin=twin, prompt=prompt: twin.generate(
                prompt, max_new_tokens=new_tokens, do_sample=False
            ),
        )
        speed, reference = new_tokens / ours, new_tokens / hugging_face
        print(f"  {name:8} minicpm_lite {speed:7,.0f} tokens/s = {speed / reference:.2f} x generate()")
        print(f"  {'':8} transformers {reference:7,.0f} tokens/s")


def greedy(model: Decoder, ids: Tensor, new_tokens: int) -> Tensor:
    cache, newest = KVCache(ids.shape[1] + new_tokens), ids
    for _ in range(new_tokens):
        newest = model(newest, cache)[:, -1:].argmax(-1)
        ids = torch.cat([ids, newest], dim=1)
    return ids


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
    parts = {"settings": settings, "profile": where_the_time_goes, "decode": decode, "train": train}
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.split("\n\n")[0])
    parser.add_argument("part", nargs="?", choices=["all", *parts, "one-setting"], default="all")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="for one-setting")
    parser.add_argument("--tuned", action="store_true", help="for one-setting: call tune_cpu first")
    arguments = parser.parse_args()
    if arguments.part == "one-setting":
        one_setting(arguments.threads, arguments.tuned)
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name, part in parts.items():
        if arguments.part in ("all", name):
            if name != "settings":
                tune_cpu()
            part()


if __name__ == "__main__":
    main()
