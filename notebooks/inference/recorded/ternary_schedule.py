"""A control of the share of ternary tokens: ternary throughout, with the rate of the runs that turn late.

Run it with `python notebooks/inference/recorded/ternary_schedule.py`, after `ternary_seeds.py`.

A run that turns ternary at 60 or 80 % of its way differs in two things from one that is ternary throughout:
it begins in full precision, and its rate falls to nothing at that update, rises again in 8, and goes on
lower. The second may be a gain by itself. So here runs that are ternary from the first update get it, too.
Widths, seeds and tokens are those of `ternary_seeds.py`; so are the rates before the fall. The rate after it
is tuned for these runs themselves, as it was for the late ones, on the seed that is not compared. Ternary
throughout without a fall is made again beside them, since ternary runs differ from processor to processor.

On one shared core there was time for width 16, where each weight has read the most, and for ten of the
sixteen seeds. Nine of these were done when it was seen that without a fall the loss is some 0.01 nats lower
than in `ternary_seeds.json`, which is of another processor and another version of torch. So the runs that
turn ternary for the last 40 % were made again here, too, for eight of the ten, and only what was made here is
compared. The comparison across the two had been seen by then: 0.028 nats more for the last 40 %.

The rules, fixed before the run, differences seed by seed with 95 % intervals:

- The fall and rise of the rate helps ternary training at a width and a share if the interval of the loss with
  it, minus that without, lies below 0; it harms if it lies above.
- The share of 40 % is compared with the stronger of the two that are ternary throughout, which is the one of
  the lower mean. It suffices if the interval of its loss minus that one's ends below 0.02 nats, is too little
  if the interval begins above, and is undecided otherwise. (To pick the lower of two means favours ternary
  throughout a little, so the rule errs against the published answer.)

The power: differences vary by 0.014 nats from seed to seed at width 16 (`ternary_seeds.json`), so that 16
seeds show 0.010 in four cases of five, and eight 0.016.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache

import torch
from ternary import DECAY, STEPS, WARMUP, Rewarmed
from ternary_seeds import FIRST_RATES, RATES, SEEDS, SHARES, TUNING_SEED, begun

from minicpm_lite.data.corpora import load_corpus
from minicpm_lite.inference.ternary import make_ternary
from minicpm_lite.lab.recorded import run_jobs, tune_rates
from minicpm_lite.training.trainer import Trainer

WIDTH = 16
FACTS = {"steps": STEPS, "warmup": WARMUP, "decay": DECAY, "seeds": SEEDS, "tuning_seed": TUNING_SEED}


@dataclass(frozen=True)
class Job:
    """All runs of one seed at one width: ternary throughout, with a fall of the rate at each share or none.

    Attributes:
        late: the rate behind the fall, and its share of the updates, of each run that has one.
        plain: whether the run without a fall goes to its end, too.
    """

    width: int
    seed: int
    late: tuple[tuple[float, int], ...]
    plain: bool = True

    @property
    def name(self) -> str:
        rates = "".join(f"/{share} % at {rate:g}" for rate, share in self.late)
        return f"{self.width}/seed={self.seed}{'' if self.plain else rates}"


@dataclass(frozen=True)
class Late:
    """The run that turns ternary for its last 40 %, as in `ternary_seeds.py`."""

    width: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.width}/last 40 %/seed={self.seed}"


def loss_of(run: Trainer) -> float:
    run.train(progress=False)
    return run.evaluate(load_corpus().validation)


@lru_cache(maxsize=2)
def trunk(width: int, seed: int) -> dict[int, Trainer]:
    """A run that is ternary throughout, as it was where the rate may fall; 0: at the last of these."""
    run, left = begun(width, seed, RATES[width]["100 %"], ternary=True), {}
    for share in sorted(SHARES, reverse=True):
        run.train(STEPS * (100 - share) // 100, progress=False)
        left[share] = run.branch(run.schedule)
    return left | {0: run}


def work(job: Job | Late) -> dict:
    if isinstance(job, Late):
        rates, start = RATES[job.width], STEPS * 60 // 100
        run = begun(job.width, job.seed, rates["full precision"])
        run.train(start, progress=False)
        run = run.branch(Rewarmed(rates["40 %"], start))
        make_ternary(run.model)
        return asdict(job) | {"40 %": loss_of(run)}
    found = {}
    for rate, share in job.late:
        start = STEPS * (100 - share) // 100
        found[f"as {share} %"] = loss_of(trunk(job.width, job.seed)[share].branch(Rewarmed(rate, start)))
    if job.plain:
        run = trunk(job.width, job.seed)[0]
        found["100 %"] = loss_of(run.branch(run.schedule))
    return asdict(job) | found


def tuned(width: int) -> tuple[tuple[float, int], ...]:
    """The best rate behind the fall, of each share."""

    def losses_of(pairs: Iterable[tuple[int, float]]) -> dict[tuple[int, float], float]:
        jobs = {
            (share, rate): Job(width, TUNING_SEED, ((rate, share),), plain=False) for share, rate in pairs
        }
        runs = run_jobs(__file__, jobs.values(), work, FACTS, 1)
        return {(share, rate): runs[job.name][f"as {share} %"] for (share, rate), job in jobs.items()}

    best = tune_rates(SHARES, FIRST_RATES, losses_of)
    return tuple((best[share], share) for share in SHARES)


if __name__ == "__main__":
    torch.set_num_threads(1)
    late = tuned(WIDTH)
    throughout = [Job(WIDTH, seed, late) for seed in SEEDS[:10]]
    run_jobs(__file__, [*throughout, *(Late(WIDTH, seed) for seed in SEEDS[:8])], work, FACTS, 1)
