"""More tokens for each weight: ternary shares of narrow models, 13 minutes on one core of a busy machine.

Run them with `python notebooks/inference/recorded/ternary_narrow.py`.

The models of `ternary.py` read six tokens for each weight, those of the published study 400. Here the same
614,400 tokens go to models that are 32 and 16 wide: 25 and 100 tokens for each weight of the matrices. Shares
of 20 and 40 % are compared with 100 %, each at its own best peak rate, tuned on a seed of its own.

The rule, fixed before the runs: 40 % suffices if its loss is within 0.02 nats of that of 100 %, by the whole
95 % interval over five seeds, or lower; and too few tokens are the reason why it did not in the wide model if
the gap at 40 % falls with the tokens for each weight, from 6 to 25 to 100.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache

import torch

import minicpm_lite
from minicpm_lite.data.corpora import load_corpus
from minicpm_lite.inference.ternary import make_ternary
from minicpm_lite.lab.recorded import run_jobs, tune_rates
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.runtime import seed_everything
from minicpm_lite.training.settings import TrainerConfig
from minicpm_lite.training.trainer import Trainer
from minicpm_lite.training.wsd import WSD, Schedule

STEPS, WARMUP, DECAY, REWARM = 400, 20, 40, 8
WIDTHS = (32, 16)
SHARES = (20, 40)
SEEDS, TUNING_SEED = (0, 1, 2, 3, 4), 100
FIRST_RATES = (0.01, 0.02, 0.04)  # extended by factors of 2 while the best lies at the edge
FACTS = {"steps": STEPS, "widths": WIDTHS, "seeds": SEEDS, "tuning_seed": TUNING_SEED,
         "batch_tokens": TrainerConfig().batch_tokens}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One run, as in `ternary.py`, of a width."""

    width: int
    arm: str
    peak_lr: float
    trunk_lr: float | None
    seed: int

    @property
    def name(self) -> str:
        before = "" if self.trunk_lr is None else f" after {self.trunk_lr:g}"
        return f"{self.width}/{self.arm}/lr={self.peak_lr:g}{before}/seed={self.seed}"


@dataclass(frozen=True)
class Rewarmed(Schedule):
    """The end of a WSD run that begins at ``start`` with a short warm-up of its own."""

    peak_lr: float
    start: int
    total_steps: int = STEPS

    def __call__(self, step: float) -> float:
        rate = WSD(self.peak_lr, 0, STEPS - DECAY, DECAY)(step)
        return rate * min(1.0, max(step - self.start, 0) / REWARM)


def begun(width: int, seed: int, rate: float, ternary: bool = False) -> Trainer:
    config = replace(
        minicpm_lite.load_config("lite-1m"),
        hidden_size=width,
        num_hidden_layers=2,
        intermediate_size=3 * width,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=width // 4,
    )
    seed_everything(seed)
    model = Decoder(config)
    schedule = WSD(rate, WARMUP, STEPS - DECAY - WARMUP, DECAY)
    model = make_ternary(model) if ternary else model
    return Trainer(model, load_corpus().train, schedule, TrainerConfig(seed=seed))


@lru_cache(maxsize=4)
def trunk(width: int, seed: int, rate: float) -> dict[int, Trainer]:
    """A run in full precision, as it was where runs leave it, and at its end (share 0)."""
    run, left = begun(width, seed, rate), {}
    for share in sorted(SHARES, reverse=True):
        run.train(STEPS * (100 - share) // 100, progress=False)
        left[share] = run.branch(run.schedule)
    run.train(progress=False)
    return left | {0: run}


def work(job: Job) -> dict:
    if job.arm == "full precision":
        run = trunk(job.width, job.seed, job.peak_lr)[0]
    elif job.arm == "100 %":
        run = begun(job.width, job.seed, job.peak_lr, ternary=True)
        run.train(progress=False)
    else:
        share = int(job.arm.removesuffix(" %"))
        start = STEPS * (100 - share) // 100
        run = trunk(job.width, job.seed, job.trunk_lr)[share].branch(Rewarmed(job.peak_lr, start))
        make_ternary(run.model)
        run.train(progress=False)
    return asdict(job) | {
        "loss": run.evaluate(load_corpus().validation),
        "weights": run.model.num_parameters(),
    }


def run_all(jobs: Iterable[Job]) -> dict[str, dict]:
    return run_jobs(__file__, jobs, work, FACTS, 1)


def tuned(width: int, arms: Iterable[str], trunk_lr: float | None) -> dict[str, float]:
    def losses_of(pairs: list[tuple[str, float]]) -> dict[tuple[str, float], float]:
        jobs = {
            (arm, rate): Job(width, arm, rate, trunk_lr if arm in _SHARES else None, TUNING_SEED)
            for arm, rate in pairs
        }
        runs = run_all(jobs.values())
        return {pair: runs[job.name]["loss"] for pair, job in jobs.items()}

    return tune_rates(arms, FIRST_RATES, losses_of)


_SHARES = [f"{share} %" for share in SHARES]

if __name__ == "__main__":
    torch.set_num_threads(1)
    for width in WIDTHS:
        best = tuned(width, ["full precision"], None)
        full = best["full precision"]
        best |= tuned(width, ["100 %", *_SHARES], full)
        print(f"tuned: {best}", flush=True)
        run_all(
            Job(width, arm, rate, full if arm in _SHARES else None, seed)
            for seed in SEEDS
            for arm, rate in best.items()
        )
