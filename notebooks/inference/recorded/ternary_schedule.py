"""A control of the share of ternary tokens: ternary throughout, with the rate of the runs that turn late.

Run it with `python notebooks/inference/recorded/ternary_schedule.py`, after `ternary_seeds.py`.

A run that turns ternary at 60 or 80 % of its way differs in two things from one that is ternary throughout:
it begins in full precision, and its rate falls to nothing at that update, rises again in 8, and goes on
lower. The second may be a gain by itself. So here runs that are ternary from the first update get it, too.
Widths, seeds and tokens are those of `ternary_seeds.py`; so are the rates before the fall. The rate after it
is tuned for these runs themselves, as it was for the late ones, on the seed that is not compared. Ternary
throughout without a fall is made again beside them, since ternary runs differ from processor to processor.
The narrow models come first, where each weight has read the most.

The rules, fixed before the run, differences seed by seed with 95 % intervals:

- The fall and rise of the rate helps ternary training at a width and a share if the interval of the loss with
  it, minus that without, lies below 0; it harms if it lies above.
- A share is compared with the stronger of the two that are ternary throughout, which is the one of the lower
  mean. It suffices if the interval of its loss minus that one's ends below 0.02 nats, is too little if the
  interval begins above, and is undecided otherwise. (To pick the lower of two means favours ternary
  throughout a little, so the rule errs against the published answer.)

The power: differences vary by 0.014 nats from seed to seed at width 16 (`ternary_seeds.json`), so that 16
seeds show 0.010 in four cases of five.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache

import torch
from ternary import DECAY, STEPS, WARMUP, Rewarmed
from ternary_seeds import FIRST_RATES, RATES, SEEDS, SHARES, TUNING_SEED, begun

from minicpm_lite.data.corpora import load_corpus
from minicpm_lite.lab.recorded import run_jobs, tune_rates
from minicpm_lite.training.trainer import Trainer

WIDTHS = (16, 32, 64)
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


def work(job: Job) -> dict:
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
    for width in WIDTHS:
        late = tuned(width)
        run_jobs(__file__, [Job(width, seed, late) for seed in SEEDS], work, FACTS, 1)
