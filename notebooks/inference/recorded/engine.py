"""An engine's stack, one part switched on after the other, and engines under load; two hours on 2 cores.

Run it with `python notebooks/inference/recorded/engine.py`; or with "identity", "machine", "stack",
"together", "load", "alone", "rows", "lengths", "queue", "bus" or "server", which does that alone, and a
number behind it: so many jobs, of two minutes at most each. What was done is not done again. All but
"identity" and "alone" take times, so nothing else may run beside them. "server" needs xllamacpp.

The model is SmolLM2-135M-Instruct with every matrix rounded to Q4_0, in float32 or packed, so all that is
compared multiplies by the same weights. All is greedy, and nothing ends a text early. A text stands behind
256 or 2,048 tokens of Austen, whose last line asks for them again ("text with copying") or does not
("prose"), and has 48 new tokens. The stages: PyTorch's linear layers; these compiled, whose times begin when
code is made; our kernels for float32; these with
guesses looked up in the prompt; packed weights; these with sparse attention (24 blocks of 16 tokens); that
with guesses; and packed weights with guesses.

- "identity": what each stage writes, each call that may guess guessing.
- "machine": how fast memory is read and how fast float32 matrices are multiplied, by two threads; and what
  all matrices of the model times one row take, one after the other, without anything between them.
- "stack": one text at a time, with two threads and guesses by `Adaptive`: the time to the first token, the
  tokens a second behind it, in how many calls and with how many tokens read; the memory of weights and texts.
- "together": packed weights and sparse attention, each alone and both, behind 2,048 tokens of prose: the
  tokens a second of one text. The four take turns in who begins.
- "load": 16 requests of 16 to 128 tokens that want 8 to 64, all at once, or one each second on average, at
  times that are drawn; eight rows, two threads. Our engine with packed weights, with and without guesses;
  the same engine with batches that stay (nobody begins before the last of the batch is done); transformers
  with batches that stay (those that wait when the last batch is done, padded, written until the longest has
  enough), in float32. Kept are the tokens a second that were asked for, and the times from each request to
  its first and to its last token, in the order of requests.
- "server": the same requests, packed weights: our engine, and llama.cpp's server on a file of the same bytes.
- "alone": the same sixteen requests of "at once", with packed and with float32 weights, each in an engine
  that has no other text; kept are its tokens.
- "rows": the seconds of a call that writes for 1 to 8 texts of some 150 tokens, and of prompts of 16, 72 and
  128 tokens, read one by one; packed weights and our kernels for float32.
- "lengths": the shortest of ten calls that write for 1 to 16 texts of 64, 500 or 1,000 tokens, our kernels
  for float32; for an exercise. Nothing is expected.
- "queue": 64 requests, drawn as those of "load", all at once in eight rows: our engine, and with batches that
  stay; packed and float32 weights.
- "bus": the requests of "load" at once and of "queue": our engine, and batches in which a row that has enough
  is computed on until all of its batch have; packed and float32 weights.

The rule, fixed before the runs. A unit is a prompt (five of each length and kind), or a drawn set of requests
(three at first: a quiet machine is rare, and what is expected are factors). A part of the stack makes faster,
or slower, if the 95 % interval of the logarithm of the ratio to the stage without it, unit by unit, leaves
out 0; and so for engines under load. Expected: packed weights are at least 1.5 times as fast as our float32;
guesses at least 1.3 times where text is copied, and never below 0.95; our engine writes at least 1.5 times as
much as transformers when all come at once, and has the first token of most requests sooner. Sparse attention
brings nothing at 256 tokens, of which it reads all but a few, and little at 2,048, where weights are most of
what is read. What llama.cpp does is measured, and nothing is expected: one token at a time we had 60 % of its
speed.

Added before the first run of "stack" and "load": "machine", the calls, the compiled stage, of which nothing
is expected, and our engine with batches that stay.
It differs from our engine in who may begin when, and from transformers in all the rest; so it tells what
batching brings from what kernels and packed weights bring. Expected: when all come at once, our engine writes
at least 1.1 times as much as with batches that stay.

Added after "load" had been run with packed weights: there our engine wrote hardly more than with batches that
stay, 1.02 times, and the expectation was refuted. A packed step of eight rows takes several times as long as
one of one row, so that rows which stay empty cost little. Where a step hardly grows with its rows, continuous
batching should gain; so both are run once more with float32 weights, all at once. Expected as before: at
least 1.1 times.

Added after that: with guesses the engine had written 0.75 times as much as without when all came at once.
There were two causes. Each text reckoned with what guesses cost a text alone, though eight shared each call;
and a text without guesses was filled up to the one with most. With the first alone mended it was 0.82 times
(three sets). Both are mended: `Adaptive` is told how many share a call, and the tokens of a call stand in one
row. So all of "load" was run anew, with six sets in place of three (the first three are the same draws),
between which ratios had spread by 2 to 10 %, so that six give intervals of 3 to 11 % to either side; all
clocks start when a request comes (ours and llama.cpp's had started when it was taken, at most a step later).
Expected: with guesses at least 0.95 times as much as without, whenever requests come. A request may lose two
steps, of some 36, to find out whether guesses pay; so much is allowed.

Once more after that: llama.cpp's server had run in our process, where its threads and PyTorch's stand in each
other's way; with one request a second a token took it 62 ms, and 22 in a process of its own. So it runs in
one now, and "server" is its run, with our engine beside it. As before nothing is expected.
And "alone". Each of these requests has the tokens that it has in "load", whose eight rows it shared.
And "rows" and "queue", since nothing had been measured of what was said about why continuous batching brings
so little in "load". Sixteen requests in eight rows are two batches, whose end, with few rows at work, weighs
as much as the rest; with 64 the gain should be larger. And from the seconds of "rows" alone, the schedule of
each engine and the lengths of its requests, the ratio of the two can be foretold. Expected: the foretold
ratio is within 0.05 of the measured mean, for 16 requests and for 64, packed and float32; with 64 the gain is
larger than with 16. The unit is a drawn set, four of them.

Added when a reader had found that our batches that stay are not those that books describe: a row that has
enough leaves at once there, and is not computed any more; only nobody may join. So "bus". By the seconds of
"rows" the engine should write 1.24 times as much with 16 requests packed and 1.22 in float32, and 1.32 and
1.38 with 64. Expected: the measured mean is within 0.1 of that (it reckons with computing, not with the other
things that a step does), and the 95 % interval lies above 1. (A first run of "bus" let each row write as much
as the longest wants, so that batches went on behind their last, by as many steps as there are prompts to
read. It was thrown away; the engine had written 1.26, 1.25, 1.32 and 1.40 times as much.)
And "together", since what the chapter is about, that savings of two terms of a sum give more together than
the product of what they give alone, had not been measured: there was no sparse stage in float32. Expected:
the factor of both is larger than the product of the two, by the 95 % interval over five passages; and not by
as much as bytes say (1.45 times), since choosing blocks is no byte. Power: ratios of stages spread by 5 %
from passage to passage, a ratio of such ratios by some 7 %, so that 1.1 is told from 1 and 1.05 is not.

Identity. Kernels and compiled code write PyTorch's tokens, unless there is a tie: where two answers part, the
gap between the two best scores is at most twice the noise, by which the scores of the same text differ when
it is read at once and when its last token is read alone. With float32 that noise is some 1e-5. Guesses change
no token at all, with float32 as with packed weights: what reads them gives a token the same bits in any
company, so no tie is an excuse. How many tokens of packed weights agree with float32, and with sparse
attention, is said, no more.

That rule is the second one. The first allowed ties to guesses, too: the keys of a call were copied together,
and PyTorch's attention adds up several tokens in another order than one. Packed weights round their inputs to
8 bits, where a last bit can become a whole step, so that their noise was some tenths and many gaps were ties.
Under it none of 20 texts parted by guesses with float32, 11 with packed weights, and 14 with these and sparse
attention; at three places the gap was larger than the noise that was measured there. Since then a kernel
reads the pages where they are, and all was run anew.

Power: the times of a stage differ by some 5 % between prompts on a quiet machine, so five tell ratios apart
that differ by 10 %, and three by 15 %. That a guess costs 5 % is not told from that it costs nothing.
"""

import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from statistics import median

import torch
import transformers
from quantization_speed import FOLDER, SAME_BYTES, write_gguf

from minicpm_lite.config import SparseConfig
from minicpm_lite.data.assets import load_austen
from minicpm_lite.data.packages import smollm2_file
from minicpm_lite.inference.drafts import PromptLookup
from minicpm_lite.inference.engine import Answer, Engine, Request
from minicpm_lite.inference.executors import CompiledExecutor, PagedExecutor
from minicpm_lite.inference.llama_cpp import LlamaCpp
from minicpm_lite.inference.packed import load_packed, quantize_model, save_packed, true_bits, unpack_model
from minicpm_lite.inference.speculative import Draft
from minicpm_lite.inference.speculative_costs import Adaptive, Costs
from minicpm_lite.lab.recorded import load_results, run_jobs
from minicpm_lite.language.context import KVCache, Tree
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.language.fast_decoding import fast_decoding
from minicpm_lite.optional import require
from minicpm_lite.pretrained.checkpoints import load_pretrained, load_tokenizer, save_pretrained
from minicpm_lite.runtime import seed_everything

THREADS, ROWS = 2, 8
LENGTHS, PROMPTS, NEW = (256, 2048), 5, 48
SPARSE = SparseConfig(
    kernel_size=8, kernel_stride=4, block_size=16, window_size=128, topk=16, init_blocks=1, dense_len=0
)
GUESSES = 6
REQUESTS, SETS = 16, 6
QUEUE, QUEUE_SETS = 64, 4
EVERY = {"at once": 0.0, "one a second": 1.0, "at once, float32": 0.0}  # seconds between requests, on average
AT_ONCE = ("at once", "at once, float32")
QUEUES = ("64 at once", "64 at once, float32")
FACTS = {
    "model": "SmolLM2-135M-Instruct, every matrix Q4_0", "threads": THREADS, "rows": ROWS,
    "lengths": LENGTHS, "new": NEW, "sparse": vars(SPARSE), "guesses": GUESSES, "requests": REQUESTS,
    "queue": QUEUE,
}  # fmt: skip
PRODUCTS = ("PyTorch", "kernels", "packed")
ASK = "\nRepeat the text above from its first word on:\n"


@dataclass(frozen=True)
class Job:
    """A text for the stack, a set of requests, or the machine; `name` is its key in the results."""

    kind: str
    of: str = ""
    number: int = 0
    length: int = 0

    @property
    def name(self) -> str:
        if not self.of:
            return self.kind
        return "/".join(map(str, (self.kind, self.of, *([self.length] if self.length else []), self.number)))


@torch.no_grad()
def work(job: Job) -> dict:
    seed_everything(job.number)
    if job.kind != "identity":
        torch.set_num_threads(THREADS)
    return KINDS[job.kind](job)


# ------------------------------------------------------------------------------------------- the model


@cache
def packed() -> Decoder:
    FOLDER.mkdir(exist_ok=True)
    file = FOLDER / "Q4_0 in all.safetensors"
    if not file.exists():
        model = load_pretrained(smollm2_file())
        types = {name: "Q4_0" for name, weight in model.named_parameters() if weight.ndim == 2}
        save_packed(quantize_model(model, types), file)
    return load_packed(file)


@cache
def plain() -> Decoder:
    return unpack_model(packed()).requires_grad_(False)


@cache
def kernels() -> Decoder:
    return fast_decoding(plain())


# ------------------------------------------------------------------------------------------- the stack


@dataclass(frozen=True)
class Stage:
    """A model, whether its attention is sparse, whether it guesses; and the stage whose tokens it writes."""

    model: Callable[[], Decoder]
    sparse: bool = False
    guesses: bool = False
    same_as: str | None = None
    compiled: bool = False

    def executor(self, pages: int) -> "Counted":
        if self.compiled:
            return compiled(pages)
        return Counted(self.model(), pages, 16, sparse=SPARSE if self.sparse else None)


class Counted(PagedExecutor):
    """Counts the calls behind a prompt, and the tokens that they read."""

    calls = read = 0

    def decode(self, texts, tokens, after=()):
        self.calls, self.read = self.calls + 1, self.read + len(texts)
        return super().decode(texts, tokens, after)

    def verify(self, texts, tokens, parents, after=()):
        self.calls, self.read = self.calls + 1, self.read + sum(map(len, tokens))
        return super().verify(texts, tokens, parents, after)


class CountedCompiled(Counted, CompiledExecutor):
    """A `CompiledExecutor` that counts."""


@cache
def compiled(pages: int) -> CountedCompiled:
    """One for all texts that need so many pages, since it takes a minute to make its code."""
    return CountedCompiled(plain(), pages, 16)


STAGES = {
    "PyTorch": Stage(plain),
    "compiled": Stage(plain, same_as="PyTorch", compiled=True),
    "kernels": Stage(kernels, same_as="PyTorch"),
    "kernels, guesses": Stage(kernels, guesses=True, same_as="kernels"),
    "packed": Stage(packed),
    "packed, sparse": Stage(packed, sparse=True),
    "packed, sparse, guesses": Stage(packed, sparse=True, guesses=True, same_as="packed, sparse"),
    "packed, guesses": Stage(packed, guesses=True, same_as="packed"),
}

TOGETHER = {
    "kernels": STAGES["kernels"],
    "kernels, sparse": Stage(kernels, sparse=True),
    "packed": STAGES["packed"],
    "packed, sparse": STAGES["packed, sparse"],
}


def identity(job: Job) -> dict:
    prompt, found = prompt_of(job), {}
    for name, stage in STAGES.items():
        draft = PromptLookup(GUESSES) if stage.guesses else None
        answer = run_one(stage.executor(pages_of(prompt)), prompt, NEW, draft)
        found[name] = {"tokens": answer.tokens}
        if stage.same_as:
            executors = [stage.executor(pages_of(prompt)) for _ in range(2)]
            before = found[stage.same_as]["tokens"]
            found[name]["part"] = where_they_part(*executors, prompt, before, answer.tokens)
    return found


def stack(job: Job) -> dict:
    prompt, found = prompt_of(job), {}
    for name, stage in STAGES.items():
        model, draft = stage.model(), None
        if stage.guesses:
            draft = Adaptive(PromptLookup(GUESSES), costs(model, job.length), GUESSES)
        for _ in range(2 if stage.compiled else 1):  # what is slow at first, with a text that shares nothing
            run_one(stage.executor(pages_of(prompt)), prompt[::-1], 8, draft)
        executor = stage.executor(pages_of(prompt))
        executor.calls = executor.read = 0
        answer = run_one(executor, prompt, NEW, draft)
        found[name] = {
            "first": answer.first - answer.submitted,
            "a second": (NEW - 1) / (answer.last - answer.first),
            "calls": executor.calls,
            "read": executor.read,
            "texts": executor.nbytes,
            "weights": true_bits(model).nbytes,
        }
    return found


def together(job: Job) -> dict:
    prompt, names = prompt_of(job), [*TOGETHER]
    speeds = {}
    for name in names[job.number % 4 :] + names[: job.number % 4]:
        stage = TOGETHER[name]
        run_one(stage.executor(pages_of(prompt)), prompt[::-1][:256], 8, None)
        answer = run_one(stage.executor(pages_of(prompt)), prompt, NEW, None)
        speeds[name] = (NEW - 1) / (answer.last - answer.first)
    return speeds


def machine(job: Job) -> dict:
    """The shortest of several: an array that no cache holds is summed, and two squares are multiplied."""
    array, square = torch.ones(128_000_000), torch.randn(2048, 2048)
    summing, multiplying = (shortest(work) for work in (array.sum, lambda: square @ square))
    return {
        "bytes a second": array.nbytes / summing,
        "operations a second": 2 * 2048**3 / multiplying,
        "products": {name: shortest(partial(multiply, STAGES[name].model())) for name in PRODUCTS},
    }


def multiply(model: Decoder) -> None:
    for layer in model.layers.modules():
        if hasattr(layer, "in_features"):
            layer(torch.ones(1, layer.in_features))
    model.logits(torch.ones(1, 1, model.config.hidden_size))


def shortest(work: Callable[[], object]) -> float:
    taken = []
    for _ in range(12):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return min(taken)


def pages_of(prompt: list[int]) -> int:
    return -(-(len(prompt) + NEW) // 16)


def prompt_of(job: Job) -> list[int]:
    """A piece of Austen, and what is asked behind it; or the piece alone."""
    text = load_austen()
    piece = len(text) // (PROMPTS + 1) * (job.number + 1)
    asked = ids_of(ASK) if job.of == "text with copying" else []
    return ids_of(text[piece : piece + 8 * job.length])[: job.length - len(asked)] + asked


def ids_of(text: str) -> list[int]:
    return load_tokenizer(smollm2_file()).encode(text, add_special_tokens=False).ids


def costs(model: Decoder, length: int, texts: int = 1) -> Costs:
    """What calls of one to seven tokens for each text take, behind one; a lookup takes next to nothing."""
    most = texts * (GUESSES + 1)
    cache = KVCache(length + most)
    ids = torch.randint(model.config.vocab_size, (1, length))
    for piece in ids.split(256, dim=1):
        model(piece, cache, last_only=True)
    seconds = []
    for tokens in range(1, most + 1):
        tree, taken = Tree(cache, range(-1, tokens - 1)), []
        for _ in range(4):
            start = time.perf_counter()
            model(ids[:, :tokens], tree)
            taken.append(time.perf_counter() - start)
        seconds.append(median(taken[1:]))
    return Costs(tuple(seconds), 0.0)


def run_one(executor: PagedExecutor, prompt: list[int], new: int, draft: Draft | None) -> Answer:
    engine = Engine(executor, rows=1, draft=draft)
    answer = engine.submit(Request(tuple(prompt), new, stop_ids=()))
    engine.run()
    return answer


def where_they_part(
    one: PagedExecutor, other: PagedExecutor, prompt: list[int], wanted: list[int], found: list[int]
) -> dict | None:
    """How near a tie is where two answers part; None if they do not."""
    places = [place for place, pair in enumerate(zip(wanted, found, strict=True)) if pair[0] != pair[1]]
    if not places:
        return None
    ids = [*prompt, *wanted[: places[0]]]
    at_once, _ = one.prefill(one.open(ids, len(ids)), ids)
    text = other.open(ids, len(ids))
    other.prefill(text, ids[:-1])
    alone, _ = other.prefill(text, ids[-1:])
    best, second = at_once.topk(2).values.tolist()
    noise = (at_once - alone).abs().max().item()
    return {"place": places[0], "gap": best - second, "noise": noise}


# ------------------------------------------------------------------------------------------- load


def load(job: Job) -> dict:
    model = model_of(job)
    if model is not packed():
        return queue(job)
    return in_turns(job, {
        "engine": partial(by_engine, model, None),
        "engine with guesses": lambda asked: by_engine(
            model, Adaptive(PromptLookup(GUESSES), costs(model, 128, ROWS), GUESSES), asked
        ),
        "engine, batches that stay": partial(by_batches, model),
        "transformers": by_transformers,
    })  # fmt: skip


def queue(job: Job) -> dict:
    model = model_of(job)
    return in_turns(job, {
        "engine": partial(by_engine, model, None), "engine, batches that stay": partial(by_batches, model),
    })  # fmt: skip


def bus(job: Job) -> dict:
    model = model_of(job)
    return in_turns(job, {"engine": partial(by_engine, model, None), "bus": partial(by_bus, model)})


def server(job: Job) -> dict:
    return in_turns(job, {"engine": partial(by_engine, packed(), None), "llama.cpp": by_llama_cpp})


def in_turns(job: Job, serve: dict[str, Callable[[list], list[Answer]]]) -> dict:
    """The same requests by all; each set begins with another engine."""
    asked, names, first = requests_of(job), [*serve], job.number % len(serve)
    return {"prompts": [len(request.prompt) for _, request in asked]} | {
        name: measured(serve[name](asked)) for name in names[first:] + names[:first]
    }


def requests_of(job: Job) -> list[tuple[float, Request]]:
    """When each comes, and what it asks for."""
    luck = random.Random(job.number)
    ids = ids_of(load_austen()[200_000:300_000])
    asked, at = [], 0.0
    for _ in range(QUEUE if job.kind == "queue" or job.of in QUEUES else REQUESTS):
        begin, length = luck.randrange(len(ids) - 128), luck.randint(16, 128)
        asked.append((at, Request(tuple(ids[begin : begin + length]), luck.randint(8, 64), stop_ids=())))
        at += luck.expovariate(1 / EVERY[job.of]) if EVERY.get(job.of) else 0.0
    return asked


def model_of(job: Job) -> Decoder:
    return kernels() if job.of.endswith("float32") else packed()


def alone(job: Job) -> dict:
    asked = [request for _, request in requests_of(job)]
    answers = [by_engine(model_of(job), None, [(0.0, request)])[0] for request in asked]
    return {"prompts": [len(r.prompt) for r in asked], "tokens": [answer.tokens for answer in answers]}


def rows(job: Job) -> dict:
    """Medians; sizes, lengths and models take turns."""
    found = {}
    for name, model in (("packed", packed()), ("kernels", kernels())):
        executor, luck = PagedExecutor(model, 200), random.Random(0)
        prompts = [luck.choices(range(1000), k=100) for _ in range(ROWS)]
        texts = [executor.open(prompt, 256, share=False) for prompt in prompts]
        for text, prompt in zip(texts, prompts, strict=True):
            executor.prefill(text, prompt)
        taken = {count: [] for count in range(1, ROWS + 1)}
        for count in [*taken] * 12:
            start = time.perf_counter()
            executor.decode(texts[:count], [7] * count)
            taken[count].append(time.perf_counter() - start)
        read = {length: [] for length in (16, 72, 128)}
        for length in [*read] * 7:
            text = executor.open(ids := luck.choices(range(1000), k=length), length, share=False)
            start = time.perf_counter()
            executor.prefill(text, ids)
            read[length].append(time.perf_counter() - start)
            executor.close(text)
        found[name] = {
            "decode": [median(each) for each in taken.values()],
            "prompt": {str(length): median(each) for length, each in read.items()},
        }
    return found


def lengths(job: Job) -> dict:
    """All sizes and lengths take turns."""
    executor, luck, texts = PagedExecutor(kernels(), 1800), random.Random(0), {}
    for length in (64, 500, 1000):
        texts[length] = []
        for _ in range(16):
            ids = luck.choices(range(1000), k=length)
            texts[length].append(executor.open(ids, length + 60, share=False))
            for start in range(0, length, 256):
                executor.prefill(texts[length][-1], ids[start : start + 256])
    cases = [(length, count) for length in texts for count in (1, 2, 4, 8, 16)]
    taken = {case: [] for case in cases}
    for length, count in cases * 10:
        start = time.perf_counter()
        executor.decode(texts[length][:count], [7] * count)
        taken[length, count].append(time.perf_counter() - start)
    return {f"{length}, {count}": min(each) for (length, count), each in taken.items()}


def measured(answers: list[Answer]) -> dict:
    tokens = sum(len(answer.tokens) for answer in answers)
    seconds = max(answer.last for answer in answers) - min(answer.submitted for answer in answers)
    first = [answer.first - answer.submitted for answer in answers]
    whole = [answer.last - answer.submitted for answer in answers]
    return {
        "a second": tokens / seconds,
        "first": first,
        "whole": whole,
        "tokens": [answer.tokens for answer in answers],
    }


def warm_engine(model: Decoder, draft: Adaptive | None = None) -> Engine:
    """One that has no text yet, of a model that has run."""
    warm = Engine(PagedExecutor(model, 64))
    warm.submit(Request((1, 2, 3), 4, stop_ids=()))
    warm.run()
    return Engine(PagedExecutor(model, 256), ROWS, draft=draft)


def by_engine(model: Decoder, draft: Adaptive | None, asked: list[tuple[float, Request]]) -> list[Answer]:
    engine, answers, start = warm_engine(model, draft), [], time.perf_counter()
    while len(answers) < len(asked) or not engine.idle:
        while len(answers) < len(asked) and asked[len(answers)][0] <= time.perf_counter() - start:
            at, request = asked[len(answers)]
            answers.append(engine.submit(request))
            answers[-1].submitted = start + at
        if engine.idle:
            time.sleep(0.001)
        else:
            engine.step()
    return answers


def by_batches(model: Decoder, asked: list[tuple[float, Request]]) -> list[Answer]:
    """Those that wait, up to the rows, as one batch; and again when all of it is done."""
    engine, answers, start = warm_engine(model), [], time.perf_counter()
    while len(answers) < len(asked):
        due = due_ones(asked, len(answers), start)
        batch = [engine.submit(request) for _, request in due]
        for (at, _), answer in zip(due, batch, strict=True):
            answer.submitted = start + at
        engine.run()
        answers += batch
    return answers


def by_bus(model: Decoder, asked: list[tuple[float, Request]]) -> list[Answer]:
    """As `by_batches`, but that each row is computed until the longest of its batch has enough."""
    engine, answers, start = warm_engine(model), [], time.perf_counter()
    while len(answers) < len(asked):
        due = due_ones(asked, len(answers), start)
        longest = max(request.max_new_tokens for _, request in due)
        rows = [engine.submit(replace(request, max_new_tokens=longest)) for _, request in due]
        batch = [Answer(request, submitted=start + at) for at, request in due]
        while any(len(answer.tokens) < answer.request.max_new_tokens for answer in batch):
            engine.step()
            now = time.perf_counter()
            for answer, row in zip(batch, rows, strict=True):
                if len(answer.tokens) < len(row.tokens) <= answer.request.max_new_tokens:
                    answer.tokens, answer.last = [*row.tokens], now
                    answer.first = answer.first or now
        for row in rows:  # the last of the batch has enough
            engine.cancel(row)
        engine.run()
        answers += batch
    return answers


def due_ones(asked: list[tuple[float, Request]], done: int, start: float) -> list[tuple[float, Request]]:
    """Wait until there are some, and take as many as there are rows."""
    time.sleep(max(0.0, start + asked[done][0] - time.perf_counter()))
    now = time.perf_counter() - start
    return [each for each in asked[done:] if each[0] <= now][:ROWS]


def by_llama_cpp(asked: list[tuple[float, Request]]) -> list[Answer]:
    if not SAME_BYTES.exists():
        packed()
        write_gguf()
    server, answers = LlamaCpp(SAME_BYTES, ROWS, 256, THREADS), []
    server.submit(Request((1, 2, 3), 4, stop_ids=()))
    server.run()
    start = time.perf_counter()
    for due, request in asked:
        time.sleep(max(0.0, start + due - time.perf_counter()))
        answers.append(server.submit(request))
        answers[-1].submitted = start + due
    server.run()
    return answers


class _Watching(transformers.StoppingCriteria):
    """Notes when each step of a batch is over, and ends when each of its requests has enough."""

    def __init__(self, answers: list[Answer], begin: int) -> None:
        self.answers, self.begin = answers, begin

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        now, written = time.perf_counter(), ids[:, self.begin :].tolist()
        for answer, row in zip(self.answers, written, strict=True):
            if len(row) <= answer.request.max_new_tokens:
                answer.tokens, answer.last = row, now
                answer.first = answer.first or now
        enough = all(len(written[0]) >= answer.request.max_new_tokens for answer in self.answers)
        return torch.full((len(ids),), enough)


def by_transformers(asked: list[tuple[float, Request]]) -> list[Answer]:
    """Those that wait, up to the rows, as one batch; and again when it is done."""
    model = twin()
    model.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=4, do_sample=False)
    answers, start = [], time.perf_counter()
    while len(answers) < len(asked):
        due = due_ones(asked, len(answers), start)
        batch = [Answer(request, submitted=start + at) for at, request in due]
        prompts, longest = [r.prompt for _, r in due], max(len(r.prompt) for _, r in due)
        ids = torch.tensor([[0] * (longest - len(prompt)) + [*prompt] for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=max(r.max_new_tokens for _, r in due),
            stopping_criteria=[_Watching(batch, longest)],
        )  # fmt: skip
        answers += batch
    return answers


@cache
def twin() -> transformers.PreTrainedModel:
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(plain(), Path(folder) / "twin", model_type="llama")
        found = transformers.LlamaForCausalLM.from_pretrained(f"{folder}/twin", dtype=torch.float32).eval()
    found.generation_config.eos_token_id = None
    return found


KINDS = {
    "identity": identity, "machine": machine, "stack": stack, "together": together, "load": load,
    "alone": alone, "rows": rows, "lengths": lengths, "queue": queue, "bus": bus, "server": server,
}  # fmt: skip

if __name__ == "__main__":
    kinds = ("text with copying", "prose")
    jobs = [
        Job(kind, text, number, length)
        for kind in ("identity", "stack")
        for length in LENGTHS
        for number in range(PROMPTS)
        for text in kinds
    ] + [
        Job(kind, arrivals, number)
        for kind, all_arrivals, sets in (
            ("load", EVERY, SETS),
            ("alone", AT_ONCE, SETS),
            ("queue", AT_ONCE, QUEUE_SETS),
            ("bus", AT_ONCE, SETS),
            ("bus", QUEUES, QUEUE_SETS),
            ("server", ("at once", "one a second"), SETS),
        )
        for number in range(sets)
        for arrivals in all_arrivals
    ]
    jobs += [Job("together", "prose", number, LENGTHS[-1]) for number in range(PROMPTS)]
    jobs[:0] = [Job("machine"), Job("rows"), Job("lengths")]
    wanted = sys.argv[1:2] or [*KINDS]
    if "server" in wanted:
        require("xllamacpp", install="minicpm_lite[llama_cpp]", purpose="compare with llama.cpp")
    done = load_results(__file__)["runs"]
    todo = [job for job in jobs if job.kind in wanted and job.name not in done]
    run_jobs(__file__, todo[: int(sys.argv[2])] if sys.argv[2:] else todo, work, FACTS, workers=1)
