"""Guesses, and an engine, with SmolLM2-135M: each ratio beside its aim and what bounds it.

Guesses cannot make decoding faster than the tokens that a call writes; continuous batching cannot bring more
than it saves in steps, and packed weights no more than they save in bytes.
"""

import random
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from minicpm_lite.data.assets import load_austen
from minicpm_lite.data.packages import smollm2_file
from minicpm_lite.inference.drafts import PromptLookup
from minicpm_lite.inference.engine import Engine, Request
from minicpm_lite.inference.executors import PagedExecutor
from minicpm_lite.inference.packed import true_bits
from minicpm_lite.inference.speculative import speculative_generate
from minicpm_lite.inference.speculative_costs import Adaptive, Costs
from minicpm_lite.language.context import KVCache, Tree
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.language.fast_decoding import fast_decoding
from minicpm_lite.language.generation import generate
from minicpm_lite.pretrained.checkpoints import load_pretrained, load_tokenizer

from .models import packed_copy, transformers_twin
from .timing import take_turns

GUESSES, NEW = 6, 64
ROWS, REQUESTS = 8, 32


@torch.no_grad()
def serving() -> None:
    """Guesses in one text, then many requests."""
    plain = load_pretrained(smollm2_file()).eval()
    models = {"F32": fast_decoding(plain), "Q4_0": packed_copy(plain, "Q4_0")}
    guesses(models)
    requests(models, transformers_twin(plain).eval())


def guesses(models: dict[str, Decoder]) -> None:
    """Decoding with guesses looked up in the text, as many as pay, beside plain decoding."""
    print(f"\nGuesses in SmolLM2-135M, {NEW} tokens after 256; `Adaptive` over a lookup of up to {GUESSES}")
    novel = load_tokenizer(smollm2_file()).encode(load_austen()[50_000:52_000]).ids
    for text, prompt in (("copying", [*novel[:116], *novel[:116], *novel[:24]]), ("prose", novel[:256])):
        ids = torch.tensor([prompt])
        for name, model in models.items():
            draft = Adaptive(PromptLookup(GUESSES), costs_of(model, len(prompt)), GUESSES)
            _, stats = speculative_generate(model, draft, ids, NEW, stop_ids=())
            without, within = take_turns(
                3,
                partial(generate, model, ids, NEW, stop_ids=()),
                partial(speculative_generate, model, draft, ids, NEW, stop_ids=()),
            )
            aim = "2" if text == "copying" else "1, no slower"
            print(
                f"  {text:8} {name:5} {without / within:5.2f} x plain decoding (aim: {aim}), of "
                f"{stats.acceptance_length:.2f} tokens a call, which is the most that guesses can bring"
            )


def costs_of(model: Decoder, length: int) -> Costs:
    """Seconds of calls of one to some tokens behind a text."""
    cache, ids = KVCache(length + GUESSES + 1), torch.randint(49_152, (1, length + GUESSES + 1))
    model(ids[:, :length], cache)
    steps = [
        partial(model, ids[:, :tokens], Tree(cache, range(-1, tokens - 1)))
        for tokens in range(1, GUESSES + 2)
    ]
    return Costs(tuple(take_turns(7, *steps)), 0.0)


def requests(models: dict[str, Decoder], twin: nn.Module) -> None:
    """Many requests at once: the engine, the same with batches that stay, and transformers."""
    luck = random.Random(0)
    asked = [
        Request(tuple(luck.choices(range(1000), k=luck.randint(16, 128))), luck.randint(8, 64), stop_ids=())
        for _ in range(REQUESTS)
    ]
    wanted = [request.max_new_tokens for request in asked]
    print(
        f"\n{REQUESTS} requests at once in {ROWS} rows, SmolLM2-135M, {sum(wanted)} tokens; tokens a second"
    )
    seconds = {}
    for name, model in models.items():
        for way, batch in (("continuous", REQUESTS), ("batches that stay", ROWS)):
            seconds[name, way] = timed(partial(serve, model, asked, batch))
    seconds["transformers"] = timed(partial(serve_by, twin, asked))
    for which, taken in seconds.items():
        print(f"  {' '.join(which) if isinstance(which, tuple) else which:24} {sum(wanted) / taken:6.1f}")
    steps = steps_of_batches(wanted) / steps_of_a_lift(wanted)
    floats, packed = (models[name] for name in ("F32", "Q4_0"))
    light = true_bits(floats).nbytes / true_bits(packed).nbytes
    best = seconds["Q4_0", "continuous"]
    print(f"  Q4_0 continuous is {seconds['transformers'] / best:.2f} x transformers in float32 (aim: 1.5)")
    for name in models:
        ratio = seconds[name, "batches that stay"] / seconds[name, "continuous"]
        print(f"  {name} continuous is {ratio:.2f} x batches that stay (aim: 1.1), of {steps:.2f} x in steps")
    ratio = seconds["F32", "continuous"] / best
    print(f"  Q4_0 is {ratio:.2f} x F32 with all rows filled, of {light:.1f} x in bytes")


def timed(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def serve(model: Decoder, asked: Sequence[Request], batch: int) -> None:
    """So many at a time, the next when all of them are done."""
    engine = Engine(PagedExecutor(model, 256), ROWS)
    for first in range(0, len(asked), batch):
        for request in asked[first : first + batch]:
            engine.submit(request)
        engine.run()


def serve_by(twin: nn.Module, asked: Sequence[Request]) -> None:
    """Padded batches, each written until its longest has enough."""
    for first in range(0, len(asked), ROWS):
        batch = asked[first : first + ROWS]
        longest = max(len(request.prompt) for request in batch)
        empty = [longest - len(request.prompt) for request in batch]
        ids = torch.tensor([[0] * n + [*r.prompt] for n, r in zip(empty, batch, strict=True)])
        mask = torch.tensor([[0] * n + [1] * len(r.prompt) for n, r in zip(empty, batch, strict=True)])
        most = max(request.max_new_tokens for request in batch)
        twin.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=most)


def steps_of_batches(wanted: Sequence[int]) -> int:
    return sum(max(wanted[first : first + ROWS]) for first in range(0, len(wanted), ROWS))


def steps_of_a_lift(wanted: Sequence[int]) -> int:
    """Each row that is free takes the next one."""
    free = [0] * ROWS
    for tokens in wanted:
        free[free.index(min(free))] += tokens
    return max(free)
