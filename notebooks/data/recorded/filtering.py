"""The recorded runs of the chapter on filtering, about 20 minutes on one core.

Run them with `python notebooks/data/recorded/filtering.py`. Results go to `filtering.json` beside this file.

The labelled pool of `minicpm_lite.data.web_pool` is cut into two halves without a common document. Half A is
the default data: it trains the vocabulary, gives the classifier its bad examples, and feeds the stable run.
Half B is filtered. Candidates are made from it, all cut to the same number of tokens:

- kept: what language, duplicates and classifier leave;
- dropped: what they take away;
- raw: B as it is;
- perplexity: the same pipeline with a perplexity filter in the classifier's place, which keeps as many
  characters; the language model behind it learned from the classifier's good examples;
- chat: the conversations in B alone.

Each candidate is judged twice, with three seeds. By a training run from nothing. And by a short decay from a
stable run on A, in which 30 % of the windows are the candidate's. Judged on a web source and a novel that
are in neither half nor among the examples. One more kind of run from nothing says what repetition does: on a
quarter of what was kept.

The peak rate is tuned for the raw pool, on a seed that is not used again; so if it favours a side, it is the
unfiltered one.

The rule, fixed before the runs: of two candidates one is better if the mean over the seeds of their
difference in held-out bits per byte is further from zero than twice its standard error. Filtering is refuted
if kept is not better than raw on the web source; the short decay is refuted as a stand-in if it orders two
candidates the other way round than the runs from nothing do, where both tell them apart.
"""

import math
import random
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from minicpm_lite import load_config
from minicpm_lite.data.filtering import QualityClassifier, bits_per_byte, drop_reasons, normalise
from minicpm_lite.data.mixtures import MixtureWindows
from minicpm_lite.data.packages import smollm2_file
from minicpm_lite.data.web_pool import Document, build_pool, load_web_documents
from minicpm_lite.data.windows import TokenWindows
from minicpm_lite.lab.recorded import load_results, run_jobs, tune_rates
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.language.tokenizer import train_tokenizer
from minicpm_lite.pretrained.checkpoints import load_pretrained, load_tokenizer
from minicpm_lite.runtime import seed_everything
from minicpm_lite.training.settings import TrainerConfig
from minicpm_lite.training.trainer import Trainer
from minicpm_lite.training.wsd import WSD

SEEDS = (0, 1, 2)
TUNING_SEED = 100
FIRST_RATES = (0.005, 0.01, 0.02)
VOCAB_SIZE = 1024
WIDTH = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 2, "num_key_value_heads": 1}
WARMUP = 20
SCRATCH_STEPS = 300  # updates of 1,536 tokens; the last tenth is the decay
STABLE_STEPS = 400
ANNEAL_STEPS = 40
CANDIDATE_SHARE = 0.3
SEED_MODEL_STEPS = 200  # of the language model behind the perplexity filter
CANDIDATES = ("kept", "dropped", "raw", "perplexity", "chat")
REPETITION = ("kept, a quarter",)
CLASSIFIER = {"dim": 16, "lr": 0.5, "epochs": 25}
UNSEEN_KIND = "noisy letters"  # junk that the classifier is not shown


@dataclass(frozen=True)
class Job:
    """One row of the results.

    Attributes:
        name: the key of the results; its first word says what is done.
        data: what a run from nothing is trained on.
        seed: of weights and order of the data.
        rate: the peak learning rate.
    """

    name: str
    data: str = ""
    seed: int = 0
    rate: float = 0.0


def work(job: Job) -> dict:
    kind = job.name.split("/")[0]
    if kind == "perplexity":
        return perplexities(job)
    if kind == "smollm2":
        model, tokenizer = load_pretrained(smollm2_file()), load_tokenizer(smollm2_file())
        texts = [document.text for document in load_web_documents()]
        return {"web documents": clear_nan(bits_per_byte(model, tokenizer, texts, max_tokens=64))}
    if kind == "verify":
        return verify(job)
    tokens = candidates()[job.data]
    decay = SCRATCH_STEPS // 10
    schedule = WSD(job.rate, WARMUP, SCRATCH_STEPS - WARMUP - decay, decay)
    run = Trainer(new_model(job.seed), tokens, schedule, TrainerConfig(seed=job.seed, compile=True))
    run.train(progress=False)
    return {"tokens": len(tokens), "losses": run.losses[::10]} | evaluate(run.model)


def verify(job: Job) -> dict:
    """One stable run on the default data; from it a short decay with each candidate, and with none."""
    default = TokenWindows(tokens_of(halves()[0], shuffle=1), TrainerConfig().sequence_length, job.seed)
    config = TrainerConfig(seed=job.seed, compile=True)
    stable = Trainer(new_model(job.seed), default, WSD(job.rate, WARMUP, STABLE_STEPS - WARMUP, 0), config)
    stable.train(progress=False)
    result = {"stable": evaluate(stable.model)}
    schedule = WSD(job.rate, WARMUP, STABLE_STEPS - WARMUP, ANNEAL_STEPS)
    for name in ("none", *CANDIDATES):
        data = default
        if name != "none":
            data = MixtureWindows(
                {"default": default, "candidate": TokenWindows(candidates()[name], default.length, job.seed)},
                [
                    (0, {"default": 1}),
                    (STABLE_STEPS * config.batch_size,
                     {"default": 1 - CANDIDATE_SHARE, "candidate": CANDIDATE_SHARE}),
                ],
            )  # fmt: skip
        run = stable.branch(schedule, data)
        run.train(progress=False)
        result[name] = evaluate(run.model)
    return result


def perplexities(job: Job) -> dict:
    """Train a small language model on the classifier's good examples; score half B and the web documents."""
    tokens = tokens_of(build_pool().seeds, shuffle=2)
    schedule = WSD(job.rate, WARMUP, SEED_MODEL_STEPS - WARMUP - 40, 40)
    run = Trainer(new_model(job.seed), tokens, schedule, TrainerConfig(seed=job.seed, compile=True))
    run.train(progress=False)
    run.model.eval()

    def scores(documents: tuple[Document, ...]) -> list[float | None]:
        return clear_nan(bits_per_byte(run.model, tokenizer(), [document.text for document in documents]))

    return {"half B": scores(halves()[1]), "web documents": scores(load_web_documents())}


def halves() -> tuple[tuple[Document, ...], tuple[Document, ...]]:
    documents = build_pool().documents
    return documents[: len(documents) // 2], documents[len(documents) // 2 :]


@cache
def tokenizer():
    return train_tokenizer("\n\n".join(document.text for document in halves()[0]), VOCAB_SIZE)


def tokens_of(documents, shuffle: int) -> Int[Tensor, " tokens"]:
    texts = [document.text for document in documents]
    random.Random(shuffle).shuffle(texts)
    return torch.tensor(tokenizer().encode("\n\n".join(texts)).ids)


def trained_classifier() -> QualityClassifier:
    """Good: the seeds. Bad: as many documents of half A that are labelled junk, but of one kind none."""
    good = [normalise(document.text) for document in build_pool().seeds]
    bad = [
        normalise(document.text)
        for document in halves()[0]
        if not document.clean and document.original is None and document.source != UNSEEN_KIND
    ]
    return QualityClassifier(**CLASSIFIER).fit(good, random.Random(0).sample(bad, len(good)))


@cache
def candidates() -> dict[str, Int[Tensor, " tokens"]]:
    half = halves()[1]
    reasons = drop_reasons([document.text for document in half], trained_classifier())
    kept = [document for document, reason in zip(half, reasons, strict=True) if reason is None]
    characters = sum(len(document.text) for document in kept)
    parts = {
        "kept": kept,
        "dropped": [document for document, reason in zip(half, reasons, strict=True) if reason],
        "raw": half,
        "chat": [document for document in half if document.source == "chat"],
    }
    perplexity = load_results(__file__)["runs"].get("perplexity")
    if perplexity:
        judged = [
            (bits, document)
            for bits, document, reason in zip(perplexity["half B"], half, reasons, strict=True)
            if reason in (None, "quality")
        ]
        parts["perplexity"] = best_by_perplexity(judged, characters)
    streams = {name: tokens_of(part, shuffle=3) for name, part in parts.items()}
    shortest = min(map(len, streams.values()))
    cut = {name: stream[:shortest] for name, stream in streams.items()}
    return cut | {"kept, a quarter": cut["kept"][: shortest // 4]}


def best_by_perplexity(judged: list[tuple[float, Document]], characters: int) -> list[Document]:
    chosen, size = [], 0
    for _, document in sorted(judged, key=lambda pair: pair[0]):
        if size >= characters:
            break
        chosen.append(document)
        size += len(document.text)
    return chosen


def new_model(seed: int) -> Decoder:
    seed_everything(seed)
    return Decoder(replace(load_config("lite-1m"), **WIDTH))


@torch.no_grad()
def evaluate(model: Decoder) -> dict:
    """Bits per byte and next-token accuracy on both held-out texts."""
    result = {}
    for name, text in build_pool().held_out.items():
        ids = torch.tensor(tokenizer().encode(text).ids)
        length = TrainerConfig().sequence_length
        windows = ids[: len(ids) // (length + 1) * (length + 1)].view(-1, length + 1)
        loss = right = 0.0
        for part in windows.split(32):
            logits, targets = model(part[:, :-1]), part[:, 1:]
            loss += torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(),
                                                      reduction="sum").item()  # fmt: skip
            right += (logits.argmax(-1) == targets).sum().item()
        predicted = windows[:, 1:].numel()
        bytes_per_token = len(text.encode()) / len(ids)
        result[name] = {
            "bits_per_byte": loss / predicted / math.log(2) / bytes_per_token,
            "accuracy": right / predicted,
        }
    return result


def clear_nan(values: np.ndarray) -> list[float | None]:
    return [None if math.isnan(value) else round(float(value), 4) for value in values]


def tuned_rate(facts: dict) -> float:
    def losses_of(pairs):
        jobs = {
            pair: Job(f"tune/{pair[0]}/rate={pair[1]:g}", pair[0], TUNING_SEED, pair[1]) for pair in pairs
        }
        runs = run_jobs(__file__, jobs.values(), work, facts, workers=1)
        return {pair: runs[job.name]["web"]["bits_per_byte"] for pair, job in jobs.items()}

    return tune_rates(["raw"], FIRST_RATES, losses_of)["raw"]


if __name__ == "__main__":
    facts = {
        "data": "the labelled pool of minicpm_lite.data.web_pool",
        "batch_tokens": TrainerConfig().batch_tokens,
        "seeds": SEEDS,
        "tuning_seed": TUNING_SEED,
        "scratch_steps": SCRATCH_STEPS,
        "stable_steps": STABLE_STEPS,
        "anneal_steps": ANNEAL_STEPS,
        "candidate_share": CANDIDATE_SHARE,
        "classifier": CLASSIFIER,
        "unseen_kind": UNSEEN_KIND,
    }
    run_jobs(__file__, [Job("perplexity", rate=0.01)], work, facts, workers=1)
    rate = tuned_rate(facts)
    jobs = [Job(f"verify/seed={seed}", seed=seed, rate=rate) for seed in SEEDS]
    for name in (*CANDIDATES, *REPETITION):
        jobs += [Job(f"scratch/{name}/seed={seed}", name, seed, rate) for seed in SEEDS]
    run_jobs(__file__, [*jobs, Job("smollm2")], work, facts | {"peak_lr": rate}, workers=1)
