"""The recorded runs of the chapters on the decoder and on how it learns, about 15 minutes on 2 cores.

Run them with `python notebooks/language/recorded/decoder.py`.

Two workers with one thread each train on Austen:

- three shapes with equal parameters without embeddings, from deep and thin to shallow and wide. The peak
  learning rate of each shape is tuned on a seed of its own; then three seeds are compared;
- the model `lite-1m` for longer. Its weights go to `decoder.safetensors`, for these chapters and later ones.

At the end one worker alone measures the speed of each shape. Results go to `decoder.json` beside this file
after each job; a run that is stopped goes on where it was.
"""

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import torch

import minicpm_lite
from minicpm_lite.config import ModelConfig
from minicpm_lite.data.corpora import load_corpus
from minicpm_lite.lab.recorded import run_jobs, tune_rates
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.language.generation import generate
from minicpm_lite.runtime import seed_everything
from minicpm_lite.training.checkpoint import save_checkpoint
from minicpm_lite.training.settings import TrainerConfig
from minicpm_lite.training.trainer import Trainer
from minicpm_lite.training.wsd import WSD

WEIGHTS = Path(__file__).with_suffix(".safetensors")
WARMUP = 40
STEPS = 300  # updates of 1,536 tokens, for each shape
LONG_STEPS = 4000
LONG_PEAK_LR = 0.01
SEEDS = (0, 1, 2)
TUNING_SEED = 100  # not among the seeds that are compared
FIRST_RATES = (0.005, 0.01, 0.02)  # extended by factors of 2 while the best lies at the edge
SAMPLE_STEPS = (0, 100, 300, 1000, 3600, 4000)
PROMPT = "It is a truth"

_PROPORTIONS = minicpm_lite.load_config("lite-1m")
SHAPES: dict[str, ModelConfig] = {  # 4 query heads, 2 key-value heads; equal parameters to within 0.2 %
    f"{layers} x {width}": replace(
        _PROPORTIONS,
        num_hidden_layers=layers,
        hidden_size=width,
        head_dim=width // 4,
        intermediate_size=feed_forward,
    )
    for layers, width, feed_forward in ((8, 88, 238), (4, 128, 320), (2, 176, 476))
}


FACTS = {
    "data": "austen",
    "batch_tokens": TrainerConfig().batch_tokens,
    "warmup": WARMUP,
    "steps": STEPS,
    "seeds": SEEDS,
    "tuning_seed": TUNING_SEED,
    "shapes": {name: asdict(config) for name, config in SHAPES.items()},
}


@dataclass(frozen=True)
class Job:
    """One shape, trained once; `name` is its key in the results."""

    shape: str
    peak_lr: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.shape}/lr={self.peak_lr:g}/seed={self.seed}"


@dataclass(frozen=True)
class Single:
    """A run there is one of: "long" or "speed"."""

    name: str


def new_run(config: ModelConfig, seed: int, steps: int, peak_lr: float) -> Trainer:
    seed_everything(seed)
    schedule = WSD(peak_lr, WARMUP, steps - steps // 10 - WARMUP, steps // 10)
    return Trainer(Decoder(config), load_corpus().train, schedule, TrainerConfig(seed=seed, compile=True))


def train_shape(job: Job) -> dict:
    run = new_run(SHAPES[job.shape], job.seed, STEPS, job.peak_lr)
    run.train(progress=False)
    return asdict(job) | {"loss": run.evaluate(load_corpus().validation), "train_losses": run.losses}


def sample(model: Decoder, new_tokens: int, temperature: float) -> str:
    tokenizer = load_corpus().tokenizer
    ids = torch.tensor([tokenizer.encode(PROMPT).ids])
    generator = torch.Generator().manual_seed(0)
    return tokenizer.decode(generate(model, ids, new_tokens, temperature, generator=generator)[0].tolist())


def train_long() -> dict:
    """The model that later chapters use: its curve, samples on the way, and its weights as float16."""
    held_out = load_corpus().validation
    run = new_run(_PROPORTIONS, 0, LONG_STEPS, LONG_PEAK_LR)
    curve, samples = [], {}
    for step in sorted({*range(0, LONG_STEPS + 1, 100), *SAMPLE_STEPS}):
        run.train(step, progress=False)
        curve.append((step, run.evaluate(held_out[: len(held_out) // 8])))
        if step in SAMPLE_STEPS:
            samples[step] = sample(run.model, 60, temperature=0.8)
    weights = {name: parameter.half() for name, parameter in run.model.named_parameters()}  # tied table once
    save_checkpoint(WEIGHTS, weights, {"model": "lite-1m", "data": "austen", "steps": run.step, "seed": 0})
    return {
        "shape": "lite-1m",
        "peak_lr": LONG_PEAK_LR,
        "seed": 0,
        "updates": run.step,
        "loss": run.evaluate(held_out),
        "curve": curve,
        "samples": samples,
        "train_losses": run.losses,
    }


def measure_speed(rounds: int = 7, training_steps: int = 6, new_tokens: int = 64) -> dict:
    """Tokens per second on one thread, in training and in decoding with a cache; shapes take turns."""
    runs = {name: new_run(config, 0, 1000, 0.001) for name, config in SHAPES.items()}
    for run in runs.values():  # compile, and fill the caches
        run.train(5, progress=False)
    seconds: dict[str, dict[str, list[float]]] = {name: {"training": [], "decoding": []} for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            before = time.perf_counter()
            run.train(run.step + training_steps, progress=False)
            seconds[name]["training"].append(
                (time.perf_counter() - before) / training_steps / run.config.batch_tokens
            )
            before = time.perf_counter()
            sample(run.model, new_tokens, temperature=1.0)
            seconds[name]["decoding"].append((time.perf_counter() - before) / new_tokens)
    rates = {
        name: {
            kind: {"median": 1 / median(each), "low": 1 / max(each), "high": 1 / min(each)}
            for kind, each in kinds.items()
        }
        for name, kinds in seconds.items()
    }
    return {"tokens_per_second": rates}


def work(job: Job | Single) -> dict:
    if isinstance(job, Job):
        return train_shape(job)
    return {"long": train_long, "speed": measure_speed}[job.name]()


def run_all(jobs: list[Job | Single]) -> dict[str, dict]:
    return run_jobs(__file__, jobs, work, FACTS)


def losses_of(pairs: list[tuple[str, float]]) -> dict[tuple[str, float], float]:
    jobs = {(shape, rate): Job(shape, rate, TUNING_SEED) for shape, rate in pairs}
    runs = run_all([Single("long"), *jobs.values()])  # the long run begins first, beside them
    return {pair: runs[job.name]["loss"] for pair, job in jobs.items()}


if __name__ == "__main__":
    best_rates = tune_rates(SHAPES, FIRST_RATES, losses_of)
    print(f"tuned: {best_rates}", flush=True)
    run_all([Job(shape, best_rates[shape], seed) for shape in SHAPES for seed in SEEDS])
    run_all([Single("speed")])  # alone on the machine
