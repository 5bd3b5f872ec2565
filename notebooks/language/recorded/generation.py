"""The recorded runs of the generation chapter, about 8 minutes on one core.

Run them with `python notebooks/language/recorded/generation.py`.

The model is `lite-1m` with the weights that the decoder chapter recorded.

- Sampling: for each seed, the model continues 96 pieces of held-out text under many settings. Measured are
  what repeats, what the model itself makes of it, and how many words are invented; for the real text, too.
  Rules, fixed before these seeds ran: the likeliest text is not like human text if, for every seed, greedy
  has less than 0.75 of the real text's nats and more than 10 times its repetition; cutting the tail helps if
  top-p 0.9 invents fewer words than plain sampling for every seed, and the mean gap exceeds two standard
  errors; a nucleus beats a temperature by the same rule, at equal nats on the curve of temperatures.
- Speed: greedy text from this library and from transformers on the same weights, each with and without
  torch.compile, in rounds that take turns.

Results go to `generation.json` beside this file after each job; a stopped script goes on where it was.
"""

import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from minicpm_lite import load_config
from minicpm_lite.data.corpora import load_corpus
from minicpm_lite.lab.recorded import run_jobs
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.language.generation import generate
from minicpm_lite.language.sampling import Sampling
from minicpm_lite.pretrained.checkpoints import save_pretrained
from minicpm_lite.runtime import tune_cpu
from minicpm_lite.training.checkpoint import load_checkpoint

SEEDS = (20, 21, 22, 23, 24)  # 0, 1 and 10 to 14 were used to try the measures and the rules out
TEXTS, PROMPT, NEW = 96, 32, 128  # texts of a seed; tokens
SETTINGS = (
    Sampling(), Sampling(0.3), Sampling(0.5), Sampling(0.7), Sampling(0.8), Sampling(0.9), Sampling(1.0),
    Sampling(1.2), Sampling(1.0, top_p=0.5), Sampling(1.0, top_p=0.8), Sampling(1.0, top_p=0.9),
    Sampling(1.0, top_p=0.95), Sampling(1.0, top_k=5), Sampling(1.0, top_k=10), Sampling(1.0, top_k=40),
    Sampling(repetition_penalty=1.1), Sampling(repetition_penalty=1.3), Sampling(repetition_penalty=2.0),
)  # fmt: skip
SPEED_PROMPT, SPEED_NEW, ROUNDS = 16, 128, 15
GRAM = 4


@dataclass(frozen=True)
class Job:
    """One process' worth of work; `name` is its key in the results."""

    kind: str  # "sampling" or "speed"
    number: int  # a seed, or how many threads

    @property
    def name(self) -> str:
        return f"{self.kind}/{self.number}"


def load_recorded_model() -> Decoder:
    """`lite-1m` as the decoder chapter left it."""
    weights, _ = load_checkpoint(Path(__file__).with_name("decoder.safetensors"))
    model = Decoder(load_config("lite-1m")).eval()
    model.load_state_dict({name: weight.float() for name, weight in weights.items()})
    return model


def held_out_windows(seed: int) -> Tensor:
    """Pieces of held-out text, (texts, tokens): a prompt and how it really goes on."""
    held_out, length = load_corpus().validation, PROMPT + NEW
    pick = torch.randperm(len(held_out) // length, generator=torch.Generator().manual_seed(seed))[:TEXTS]
    return torch.stack([held_out[i * length : (i + 1) * length] for i in pick.tolist()])


def words_in(tokenizer: Tokenizer, ids: Tensor) -> list[str]:
    return re.findall(r"[a-z]+", tokenizer.decode(ids.tolist()).lower())


@torch.no_grad()
def measure_texts(model: Decoder, texts: Tensor, known: set[str]) -> dict[str, float]:
    """What the parts after the prompts are like.

    repeated: four tokens in a row that stood in the same text before, in percent of all such rows.
    nats: cross entropy under the model itself, at temperature 1: how much the text surprises it.
    invented: words that the training text does not hold, in percent of all words.
    """
    repeated = []
    for row in texts[:, PROMPT:].tolist():
        grams = list(zip(*(row[start:] for start in range(GRAM)), strict=False))
        repeated.append(1 - len(set(grams)) / len(grams))
    logits = model(texts)[:, PROMPT - 1 : -1]
    words = [word for row in texts for word in words_in(load_corpus().tokenizer, row[PROMPT:])]
    return {
        "repeated": 100 * sum(repeated) / len(repeated),
        "nats": F.cross_entropy(logits.flatten(0, 1), texts[:, PROMPT:].flatten()).item(),
        "invented": 100 * sum(word not in known for word in words) / len(words),
    }


def run_setting(model: Decoder, windows: Tensor, sampling: Sampling, seed: int) -> Tensor:
    """The prompts of the windows, continued."""
    generator = torch.Generator().manual_seed(seed)
    return generate(model, windows[:, :PROMPT], NEW, **asdict(sampling), generator=generator)


def measure_sampling(seed: int) -> dict:
    model, windows, corpus = load_recorded_model(), held_out_windows(seed), load_corpus()
    known = set(words_in(corpus.tokenizer, corpus.train))
    settings = []
    for sampling in SETTINGS:
        texts = run_setting(model, windows, sampling, seed)
        measured = measure_texts(model, texts, known)
        settings.append({"sampling": asdict(sampling), **measured, "sample": texts[0].tolist()})
    return {"real": measure_texts(model, windows, known), "settings": settings}


def measure_speed(threads: int) -> dict:
    """Tokens a second by each way to the same tokens: median, slowest and fastest round."""
    from transformers import CompileConfig, GraniteForCausalLM

    torch.set_num_threads(threads)
    model, ids = load_recorded_model(), load_corpus().validation[None, :SPEED_PROMPT]
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, Path(folder) / "twin", model_type="granite")
        twin = GraniteForCausalLM.from_pretrained(Path(folder) / "twin").eval()
    compiled, for_cpu = torch.compile(model), CompileConfig(fullgraph=True, mode="default")
    for_cpu._compile_all_devices = True  # else transformers compiles on GPUs only

    def by_transformers(**more: object) -> Tensor:
        return twin.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=SPEED_NEW, do_sample=False,
            eos_token_id=None, pad_token_id=0, **more,
        )  # fmt: skip

    ways: dict[str, Callable[[], Tensor]] = {
        "transformers": by_transformers,
        "transformers, compiled": lambda: by_transformers(
            cache_implementation="static", compile_config=for_cpu
        ),
        "minicpm_lite": lambda: generate(model, ids, SPEED_NEW),
        "minicpm_lite, compiled": lambda: generate(compiled, ids, SPEED_NEW),
    }
    first, rates = {}, {way: [] for way in ways}
    expected = generate(model, ids, SPEED_NEW)
    for way, write in ways.items():
        start = time.perf_counter()
        same = torch.equal(write(), expected)
        first[way] = time.perf_counter() - start
        if not same:
            raise RuntimeError(f"{way} wrote other tokens.")
    for _ in range(ROUNDS):
        for way, write in ways.items():
            start = time.perf_counter()
            write()
            rates[way].append(SPEED_NEW / (time.perf_counter() - start))
    return {
        "tokens_per_second": {
            way: {"median": median(rate), "low": min(rate), "high": max(rate)} for way, rate in rates.items()
        },
        "first_call_seconds": first,
    }


def work(job: Job) -> dict:
    tune_cpu()
    return measure_sampling(job.number) if job.kind == "sampling" else measure_speed(job.number)


if __name__ == "__main__":
    facts = {
        "model": "lite-1m", "data": "austen", "seeds": SEEDS, "texts": TEXTS, "prompt_tokens": PROMPT,
        "new_tokens": NEW, "gram": GRAM, "speed_prompt": SPEED_PROMPT, "speed_new": SPEED_NEW,
        "rounds": ROUNDS,
    }  # fmt: skip
    jobs = [Job("speed", 1), Job("speed", 2), *(Job("sampling", seed) for seed in SEEDS)]
    run_jobs(__file__, jobs, work, facts, workers=1)
