"""Sixteen more seeds for the share of tokens that ternary weights need, at three widths: an hour of one core.

Run them with `python notebooks/inference/recorded/ternary_seeds.py`.

In `ternary.py` and `ternary_narrow.py` five seeds each could not tell whether 40 % of the tokens come within
0.02 nats of 100 %, nor whether the gap falls with the tokens for each weight. Here the same models, 64, 32
and 16 wide (6, 25 and 100 tokens for each weight of the matrices), learn from the same 614,400 tokens with
seeds that were not looked at before. The rates are those that were tuned there. A control goes with each
share: a run in full precision whose rate falls to nothing and rises again at the same update.

The rules, fixed before the runs, differences seed by seed with 95 % intervals:

- 40 % suffices at a width if the interval of its loss minus that of 100 % ends below 0.02 nats; it does not
  if the interval begins above; else it is undecided. The same for 20 %.
- More tokens for each weight narrow the gap if the gap at 40 % is smaller at 16 wide than at 64, by the whole
  interval.
- The rise of the rate is what costs, and not the rounding, if the control loses as much against full
  precision as 40 % does against 100 %.

The power: if differences vary by 0.02 nats from seed to seed, 16 show 0.015 in four cases of five.
"""

from dataclasses import dataclass

import ternary_narrow as narrow
from ternary_narrow import STEPS, Rewarmed, trunk

from minicpm_lite.data.corpora import load_corpus
from minicpm_lite.lab.recorded import run_jobs

WIDTHS, SEEDS, SHARES = (64, 32, 16), tuple(range(200, 216)), (20, 40)
RATES = {  # of width 64 from `ternary.json`, of the others from `ternary_narrow.json`
    64: {"full precision": 0.01, "100 %": 0.01, "40 %": 0.005, "20 %": 0.005},
    32: {"full precision": 0.02, "100 %": 0.02, "40 %": 0.01, "20 %": 0.01},
    16: {"full precision": 0.04, "100 %": 0.04, "40 %": 0.01, "20 %": 0.02},
}
FACTS = {"steps": STEPS, "seeds": SEEDS, "rates": {str(width): rates for width, rates in RATES.items()}}


@dataclass(frozen=True)
class Job:
    """All runs of one seed at one width."""

    width: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.width}/seed={self.seed}"


def work(job: Job) -> dict[str, float]:
    """The held-out loss of each arm."""
    rates = RATES[job.width]
    full = rates["full precision"]
    found = {}
    for arm, rate in rates.items():
        trunk_lr = full if arm in ("20 %", "40 %") else None
        found[arm] = narrow.work(narrow.Job(job.width, arm, rate, trunk_lr, job.seed))["loss"]
    for share in SHARES:
        start = STEPS * (100 - share) // 100
        run = trunk(job.width, job.seed, full)[share].branch(Rewarmed(rates[f"{share} %"], start))
        run.train(progress=False)
        found[f"rate alone, {share} %"] = run.evaluate(load_corpus().validation)
    return found


if __name__ == "__main__":
    run_jobs(__file__, [Job(width, seed) for width in WIDTHS for seed in SEEDS], work, FACTS)
