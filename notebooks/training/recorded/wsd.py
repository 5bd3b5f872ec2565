"""The recorded runs of the WSD chapter, about an hour on 2 cores: python notebooks/training/recorded/wsd.py

Workers with one thread each train the model `lite-1m` on Austen. Every job is one stable run with its
decays, or one cosine run. Results go to `wsd.json` beside this file after each job; a run that is stopped
goes on where it was. Learning rates are tuned on a seed of their own, for each schedule and budget.
"""

from dataclasses import asdict, dataclass
from statistics import mean

import minicpm_lite
from minicpm_lite.data.corpora import load_corpus
from minicpm_lite.lab.recorded import run_jobs, tune_rates
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.runtime import seed_everything
from minicpm_lite.training.settings import TrainerConfig
from minicpm_lite.training.trainer import Trainer
from minicpm_lite.training.wsd import WSD, Cosine, Schedule

BUDGETS = (200, 400, 800, 1600)  # updates; 1,536 tokens each
WARMUP = 40
SEEDS = (0, 1, 2)
TUNING_SEED = 100  # not among the seeds that are compared
FIRST_RATES = (0.005, 0.01, 0.02)  # extended by factors of 2 while the best lies at the edge
FACTS = {
    "model": "lite-1m",
    "batch_tokens": TrainerConfig().batch_tokens,
    "warmup": WARMUP,
    "budgets": BUDGETS,
    "seeds": SEEDS,
    "tuning_seed": TUNING_SEED,
}


@dataclass(frozen=True)
class Job:
    """One process' worth of work; `name` is its key in the results."""

    schedule: str  # "cosine" or "wsd"
    peak_lr: float
    seed: int
    budget: int | None = None  # of a cosine run
    study: bool = False  # a stable run that also tries fractions, forms and resuming

    @property
    def name(self) -> str:
        parts = [self.schedule, f"lr={self.peak_lr:g}", f"seed={self.seed}"]
        return "/".join(parts + ([f"budget={self.budget}"] if self.budget else []) + ["study"] * self.study)


def new_run(seed: int, schedule: Schedule) -> Trainer:
    seed_everything(seed)
    model = Decoder(minicpm_lite.load_config("lite-1m"))
    return Trainer(model, load_corpus().train, schedule, TrainerConfig(seed=seed, compile=True))


def wsd(peak_lr: float, total: int, decay: int, form: str = "exponential", final_ratio: float = 0.1) -> WSD:
    return WSD(peak_lr, WARMUP, total - decay - WARMUP, decay, form, final_ratio)


def train_and_evaluate(run: Trainer, until: int, curve: list | None = None) -> float:
    """Train to a step; on the way note (step, loss on an eighth of the held-out text) every 50 steps."""
    held_out = load_corpus().validation
    if curve is not None:
        for step in range((run.step // 50 + 1) * 50, until, 50):
            run.train(step, progress=False)
            curve.append((step, run.evaluate(held_out[: len(held_out) // 8])))
    run.train(until, progress=False)
    if curve is not None:
        curve.append((until, run.evaluate(held_out[: len(held_out) // 8])))
    return run.evaluate(held_out)


def run_cosine(job: Job) -> dict:
    run, curve = new_run(job.seed, Cosine(job.peak_lr, WARMUP, job.budget)), []
    at = {budget: train_and_evaluate(run, budget, curve) for budget in BUDGETS if budget <= job.budget}
    return {"loss": at, "curve": curve, "updates": job.budget, "train_losses": run.losses}


def run_wsd(job: Job) -> dict:
    """One stable run. At 90 % of each budget a copy decays to the budget's end."""
    last = BUDGETS[-1]
    branch_points = {budget - budget // 10: budget for budget in BUDGETS}
    if job.study:
        branch_points |= {last - round(last * part): last for part in (0.025, 0.05, 0.2)}
    trunk, trunk_curve = new_run(job.seed, wsd(job.peak_lr, last, 0)), []
    result = {"loss": {}, "stable_loss": {}, "decay_curves": {}, "fractions": {}, "forms": {}, "updates": 0}
    for start, budget in sorted(branch_points.items()):
        result["stable_loss"][start] = train_and_evaluate(trunk, start, trunk_curve)
        branch = trunk.branch(wsd(job.peak_lr, budget, budget - start))
        curve = [trunk_curve[-1]]
        loss = train_and_evaluate(branch, budget, curve)
        result["updates"] += budget - start
        if budget - start == budget // 10:
            result["loss"][budget] = loss
            result["decay_curves"][budget] = curve
            if budget == last:
                result["train_losses"], result["grad_norms"] = branch.losses, branch.grad_norms
        if budget == last:
            result["fractions"][(budget - start) / budget] = loss
        if job.study and start == last - last // 10:
            for form, final_ratio in (("linear", 0.1), ("cosine", 0.1), ("sqrt", 0.1), ("linear", 0.0)):
                other = trunk.branch(wsd(job.peak_lr, last, budget - start, form, final_ratio))
                result["forms"][f"{form} to {final_ratio:g}"] = train_and_evaluate(other, last)
        if job.study and budget == last // 2:
            # After the decay to half the budget: back to the full rate, and the usual decay at the end.
            resumed = branch.branch(wsd(job.peak_lr, last, last // 10))
            result["resumed_post_decay_curve"] = resume_curve = [curve[-1]]
            result["resumed_post_decay"] = train_and_evaluate(resumed, last, resume_curve)
            # Or on at the low rate the decay ended with, which is what a finished cosine offers.
            low = branch.branch(WSD(job.peak_lr / 10, 0, last, 0))
            result["continued_at_low_rate"] = train_and_evaluate(low, last)
    result["forms"]["exponential to 0.1"] = result["loss"][last]
    result["updates"] += trunk.step
    result["trunk_curve"] = trunk_curve
    return result


def work(job: Job) -> dict:
    result = run_cosine(job) if job.schedule == "cosine" else run_wsd(job)
    facts = asdict(job)
    del facts["study"]
    return facts | result


def run_all(jobs: list[Job]) -> dict[str, dict]:
    return run_jobs(__file__, jobs, work, FACTS)


def losses_of(pairs: list) -> dict:
    """WSD's one rate is judged by its mean over all budgets, a cosine's by the loss at its own."""
    jobs = {
        ((schedule, budget), rate): Job(schedule, rate, TUNING_SEED, budget)
        for (schedule, budget), rate in pairs
    }
    runs = run_all(sorted(jobs.values(), key=lambda job: job.schedule, reverse=True))
    losses = {pair: runs[job.name]["loss"] for pair, job in jobs.items()}
    return {
        ((schedule, budget), rate): loss[str(budget)] if budget else mean(loss.values())
        for ((schedule, budget), rate), loss in losses.items()
    }


def tune() -> tuple[float, dict[int, float]]:
    """On the tuning seed: WSD's best peak rate, one for all budgets, and each cosine budget's best."""
    cases = [("wsd", None)] + [("cosine", budget) for budget in BUDGETS]
    best = tune_rates(cases, FIRST_RATES, losses_of)
    return best["wsd", None], {budget: best["cosine", budget] for budget in BUDGETS}


if __name__ == "__main__":
    wsd_rate, cosine_rates = tune()
    print(f"tuned: WSD {wsd_rate:g}, cosine {cosine_rates}", flush=True)
    jobs = [Job("wsd", wsd_rate, seed, study=True) for seed in SEEDS]
    jobs += [
        Job("cosine", cosine_rates[budget], seed, budget) for budget in reversed(BUDGETS) for seed in SEEDS
    ]
    run_all(jobs)
