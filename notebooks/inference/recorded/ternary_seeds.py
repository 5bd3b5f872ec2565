"""Sixteen seeds for the share of tokens that ternary weights need, at three widths: an hour of one core.

Run them with `python notebooks/inference/recorded/ternary_seeds.py`.

In `ternary.py` five seeds could not tell whether 40 % of the tokens come within 0.02 nats of 100 %, and its
models read six tokens for each weight, those of the published study 400. Here models that are 64, 32 and 16
wide (6, 25 and 100 tokens for each weight of the matrices) learn from the same 614,400 tokens, with seeds
that were not looked at before. The rates of width 64 are those of `ternary.json`, those of the others were
tuned here, on a seed of its own that is not compared (29 runs, 5 minutes on one core). A control
goes with each share: a run in full precision whose rate falls to nothing and rises again at the same update.

The rules, fixed before the runs, differences seed by seed with 95 % intervals:

- 40 % suffices at a width if the interval of its loss minus that of 100 % ends below 0.02 nats; it does not
  if the interval begins above; else it is undecided. The same for 20 %.
- More tokens for each weight narrow the gap if the gap at 40 % is smaller at 16 wide than at 64, by the whole
  interval.
- The rise of the rate is what costs, and not the rounding, if the control loses as much against full
  precision as 40 % does against 100 %.

The power: if differences vary by 0.02 nats from seed to seed, 16 show 0.015 in four cases of five.

On another processor runs in full precision come out alike to five digits, and ternary ones do not, by up to
some 0.02 nats: a sum that differs in its last bit flips a code early, and from there on it is another run.
Means are nearer, but not the same: ten runs at width 16 that were made again for `ternary_schedule.py` have a
mean that is 0.009 nats lower.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache

import torch
from ternary import DECAY, STEPS, WARMUP, Rewarmed

import minicpm_lite
from minicpm_lite.data.corpora import load_corpus
from minicpm_lite.inference.ternary import make_ternary
from minicpm_lite.lab.recorded import run_jobs, tune_rates
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.runtime import seed_everything
from minicpm_lite.training.settings import TrainerConfig
from minicpm_lite.training.trainer import Trainer
from minicpm_lite.training.wsd import WSD

WIDTHS, SEEDS, SHARES = (64, 32, 16), tuple(range(200, 216)), (20, 40)
TUNING_SEED, FIRST_RATES = 100, (0.01, 0.02, 0.04)  # extended by factors of 2 while the best lies at the edge
RATES = {
    64: {"full precision": 0.01, "100 %": 0.01, "40 %": 0.005, "20 %": 0.005},
    32: {"full precision": 0.02, "100 %": 0.02, "40 %": 0.01, "20 %": 0.01},
    16: {"full precision": 0.04, "100 %": 0.04, "40 %": 0.01, "20 %": 0.02},
}
FACTS = {"steps": STEPS, "seeds": SEEDS, "rates": {str(width): rates for width, rates in RATES.items()}}
_SHARES = [f"{share} %" for share in SHARES]


@dataclass(frozen=True)
class Job:
    """All runs of one seed at one width."""

    width: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.width}/seed={self.seed}"


@dataclass(frozen=True)
class Single:
    """One run, of those that tune a rate, or of those of one seed."""

    width: int
    arm: str
    peak_lr: float
    trunk_lr: float | None
    seed: int

    @property
    def name(self) -> str:
        before = "" if self.trunk_lr is None else f" after {self.trunk_lr:g}"
        return f"{self.width}/{self.arm}/lr={self.peak_lr:g}{before}/seed={self.seed}"


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


def single(job: Single) -> dict:
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


def work(job: Job | Single) -> dict[str, float]:
    """The held-out loss of each arm."""
    if isinstance(job, Single):
        return single(job)
    rates = RATES[job.width]
    full = rates["full precision"]
    found = {}
    for arm, rate in rates.items():
        trunk_lr = full if arm in _SHARES else None
        found[arm] = single(Single(job.width, arm, rate, trunk_lr, job.seed))["loss"]
    for share in SHARES:
        start = STEPS * (100 - share) // 100
        run = trunk(job.width, job.seed, full)[share].branch(Rewarmed(rates[f"{share} %"], start))
        run.train(progress=False)
        found[f"rate alone, {share} %"] = run.evaluate(load_corpus().validation)
    return found


def tuned(width: int, arms: Iterable[str], trunk_lr: float | None) -> dict[str, float]:
    def losses_of(pairs: list[tuple[str, float]]) -> dict[tuple[str, float], float]:
        jobs = {
            (arm, rate): Single(width, arm, rate, trunk_lr if arm in _SHARES else None, TUNING_SEED)
            for arm, rate in pairs
        }
        runs = run_jobs(__file__, jobs.values(), work, FACTS)
        return {pair: runs[job.name]["loss"] for pair, job in jobs.items()}

    return tune_rates(arms, FIRST_RATES, losses_of)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for width in WIDTHS[1:]:
        best = tuned(width, ["full precision"], None)
        best |= tuned(width, ["100 %", *_SHARES], best["full precision"])
        assert best == RATES[width], f"{width} wide, other rates are best: {best}"
    run_jobs(__file__, [Job(width, seed) for width in WIDTHS for seed in SEEDS], work, FACTS)
