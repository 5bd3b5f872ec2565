"""The recorded runs of the chapter on latent attention, 46 minutes on one core of a busy machine.

Run them with `python notebooks/language/recorded/latent_attention.py`.

Five small models that differ in their attention, with equal parameters without embeddings (what a smaller
attention saves goes into the feed-forward width), are trained on Austen. The peak learning rate of each is
tuned on a seed of its own; then three seeds are compared. Results go to `latent_attention.json` beside this
file after each job; a run that is stopped goes on where it was.

The rule, fixed before the runs: one model is better than another if its held-out loss is lower for every seed
and the mean gap is more than twice its standard error. The chapter asks it of MLA against MHA, and of MLA
against GQA and MQA at the same cache.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

import minicpm_lite
from minicpm_lite.config import LatentAttentionConfig, ModelConfig
from minicpm_lite.data.corpora import load_corpus
from minicpm_lite.lab.recorded import run_jobs, tune_rates
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.runtime import seed_everything
from minicpm_lite.training.settings import TrainerConfig
from minicpm_lite.training.trainer import Trainer
from minicpm_lite.training.wsd import WSD

WARMUP, STEPS = 40, 300  # updates of 1,536 tokens
SEEDS = (0, 1, 2)
TUNING_SEED = 100  # not among the seeds that are compared
FIRST_RATES = (0.0025, 0.005, 0.01)  # extended by factors of 2 while the best lies at the edge
WORKERS = 1

_BASE = replace(
    minicpm_lite.load_config("lite-1m"), num_attention_heads=8, head_dim=16, num_key_value_heads=8
)


def latent(rank: int, feed_forward: int) -> ModelConfig:
    """Proportions of MiniCPM3: values as wide as the unrotated part, the rotated one half as wide."""
    sizes = LatentAttentionConfig(
        q_lora_rank=40, kv_lora_rank=rank, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16
    )
    return replace(_BASE, latent_attention=sizes, intermediate_size=feed_forward)


MODELS: dict[str, ModelConfig] = {  # values cached a token and layer: 256, 64, 64, 32, 32
    "MHA": _BASE,
    "GQA": replace(_BASE, num_key_value_heads=2, intermediate_size=384),
    "MLA 64": latent(56, 356),
    "MQA": replace(_BASE, num_key_value_heads=1, intermediate_size=395),
    "MLA 32": latent(24, 388),
}
FACTS = {
    "models": {name: asdict(config) for name, config in MODELS.items()},
    "steps": STEPS,
    "batch_tokens": TrainerConfig().batch_tokens,
    "seeds": SEEDS,
    "tuning_seed": TUNING_SEED,
}


@dataclass(frozen=True)
class Job:
    """One model, trained once; `name` is its key in the results."""

    model: str
    peak_lr: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.model}/lr={self.peak_lr:g}/seed={self.seed}"


def work(job: Job) -> dict:
    seed_everything(job.seed)
    schedule = WSD(job.peak_lr, WARMUP, STEPS - STEPS // 10 - WARMUP, STEPS // 10)
    run = Trainer(
        Decoder(MODELS[job.model]), load_corpus().train, schedule, TrainerConfig(seed=job.seed, compile=True)
    )
    run.train(progress=False)
    return asdict(job) | {"loss": run.evaluate(load_corpus().validation)}


def run_all(jobs: Iterable[Job]) -> dict[str, dict]:
    return run_jobs(__file__, jobs, work, FACTS, WORKERS)


def losses_of(pairs: list[tuple[str, float]]) -> dict[tuple[str, float], float]:
    jobs = {(model, rate): Job(model, rate, TUNING_SEED) for model, rate in pairs}
    runs = run_all(jobs.values())
    return {pair: runs[job.name]["loss"] for pair, job in jobs.items()}


if __name__ == "__main__":
    best = tune_rates(MODELS, FIRST_RATES, losses_of)
    print(f"tuned: {best}", flush=True)
    run_all([Job(model, best[model], seed) for seed in SEEDS for model in MODELS])
