"""The recorded runs of the wind tunnel chapter, about 70 minutes on one core.

Run them with `python notebooks/training/recorded/wind_tunnel.py`.

All models learn Austen with a vocabulary of 1,024 tokens, without weight decay; width 24 is the base of µP.
Studies, in this order:

- "lr": loss against learning rate for widths 24 to 192, µP beside standard parametrisation. Both start from
  the same weights; standard has one rate for all and does not divide the logits. At width 24 they are equal,
  so that width is run once.
- "tune": the rate of the studies "surface" and "batch", on the base width and a seed of its own.
- "surface": for each of five sizes one stable run with four short decays. "prediction" then fits loss surface
  and sigmoid to them and writes down what a model four times as large will reach. Only after that is this
  model trained: "held out".
- "batch": loss curves of six batch sizes at a constant rate, for two sizes.
- "depth": loss against learning rate for depths 2, 4 and 16, residual scale 1.4/sqrt(L) beside 1.

The rules, fixed before the runs:

- "lr": the optimum of a width is the minimum of the parabola in the logarithm of the rate, mean over the
  seeds. The claim is refuted if the optimum of µP moves by more than a factor of 2 from the smallest to the
  largest width, or by no less than that of the standard side. "depth" is judged in the same way.
- "held out": the claim is refuted if the surface is further from the measured loss than the naive guess, the
  loss of the largest small model on as many tokens, or off by more than 2 %.
- "batch": the claim is refuted if the best batch does not grow as the loss falls.
- ScalingBench: the claim is refuted if the sigmoid of the small models misses the accuracy of the held-out
  model by more than twice the standard error of such an accuracy.

Results go to `wind_tunnel.json` beside this file after each job; a run that is stopped goes on where it was.
"""

from dataclasses import asdict, dataclass, replace
from functools import cache

import torch

from minicpm_lite.config import ModelConfig
from minicpm_lite.data.corpora import load_corpus
from minicpm_lite.lab.recorded import load_results, run_jobs, tune_rates
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.runtime import seed_everything, tune_cpu
from minicpm_lite.training.settings import TrainerConfig
from minicpm_lite.training.trainer import Trainer
from minicpm_lite.training.wind_tunnel import conditional_losses, fit_loss_surface, fit_sigmoid
from minicpm_lite.training.wsd import WSD, Schedule

BASE_WIDTH = 24
SEEDS = (0, 1, 2)
TUNING_SEED = 100  # not among the seeds that are compared
HELD_OUT = 20_000  # tokens on which the sweeps are judged

SWEEP_UPDATES, WARMUP = 150, 15  # of 1,536 tokens; the last tenth decays
WIDTHS = (24, 48, 96, 192)
SEEDS_AT_192 = (0,)
RATES = tuple(0.005 * 2**k for k in range(6))

DEPTHS = (2, 4, 16)
DEPTH_SEEDS = (0,)

SURFACE_WIDTHS, LARGER_WIDTH = (24, 36, 48, 72, 96), 192
BUDGETS = (150, 300, 600, 900)  # updates, the last tenth of each decays; 900 read the text once
SURFACE_SEEDS = (0,)
ITEMS, CONTEXT, ANSWER, CHOICES = 800, 32, 8, 4  # of the benchmark, lengths in tokens

BATCHES = (3, 6, 12, 24, 48, 96)  # windows of 128 tokens
BATCH_SEEDS = {24: (0, 1), 48: (0,)}
BIN = 96 * 128  # tokens; the loss curves are means over so many
BINS = {24: 60, 48: 40}

FACTS = {
    "base_width": BASE_WIDTH,
    "seeds": SEEDS,
    "seeds_at_192": SEEDS_AT_192,
    "tuning_seed": TUNING_SEED,
    "held_out_tokens": HELD_OUT,
    "sweep_updates": SWEEP_UPDATES,
    "budgets": BUDGETS,
    "batch_tokens": TrainerConfig().batch_tokens,
    "benchmark": {"items": ITEMS, "context": CONTEXT, "answer": ANSWER, "choices": CHOICES},
    "bin_tokens": BIN,
}


def shape(width: int, depth: int = 4, head_dim: int = 24) -> ModelConfig:
    return ModelConfig(
        hidden_size=width,
        intermediate_size=5 * width // 2,
        num_hidden_layers=depth,
        num_attention_heads=width // head_dim,
        vocab_size=1024,
        max_position_embeddings=512,
        scale_emb=12,
        scale_depth=1.4,
        dim_model_base=BASE_WIDTH,
        init_std=0.1,
    )


def new_run(
    config: ModelConfig, schedule: Schedule, seed: int, arm: str = "mup", batch_size: int = 12
) -> Trainer:
    """A run from weights that follow from config and seed alone, whichever the arm. No weight decay."""
    seed_everything(seed)
    model = Decoder(config)
    if arm == "standard":
        weights = model.state_dict()
        model = Decoder(replace(config, dim_model_base=None))
        model.load_state_dict(weights)
    trainer = TrainerConfig(
        batch_size=batch_size, weight_decay=0, parametrization=arm, compile=True, seed=seed
    )
    return Trainer(model, load_corpus().train, schedule, trainer)


def finish(run: Trainer, tokens: int | None = HELD_OUT) -> float | None:
    """Train to the end of the schedule and return the held-out loss; None, if it diverged."""
    try:
        run.train(progress=False)
    except FloatingPointError:
        return None
    return run.evaluate(load_corpus().validation[:tokens])


def decayed(rate: float, updates: int) -> WSD:
    return WSD(rate, WARMUP, updates - WARMUP - updates // 10, updates // 10)


@dataclass(frozen=True)
class SweepJob:
    """Loss against learning rate, for one width, arm ("mup" or "standard") and seed."""

    width: int
    arm: str
    seed: int

    @property
    def name(self) -> str:
        return f"lr/{self.arm}/width={self.width}/seed={self.seed}"

    def run(self) -> dict:
        # lower for a wider standard model, as a pilot run on another seed suggested
        factor = 1.0 if self.arm == "mup" else BASE_WIDTH / self.width
        losses = {}
        for rate in (rate * factor for rate in RATES):
            run = new_run(shape(self.width), decayed(rate, SWEEP_UPDATES), self.seed, self.arm)
            losses[rate] = finish(run)
        return {"loss": losses}


@dataclass(frozen=True)
class DepthJob:
    """Loss against learning rate, for one depth and seed; residual scale 1.4/sqrt(L), or 1."""

    depth: int
    scaled: bool
    seed: int

    @property
    def name(self) -> str:
        return f"depth/{'scaled' if self.scaled else 'plain'}/depth={self.depth}/seed={self.seed}"

    def run(self) -> dict:
        config = shape(BASE_WIDTH, self.depth)
        if not self.scaled:
            config = replace(config, scale_depth=None)
        rates = RATES if self.scaled else [rate / 2 for rate in RATES]
        return {
            "loss": {rate: finish(new_run(config, decayed(rate, SWEEP_UPDATES), self.seed)) for rate in rates}
        }


@dataclass(frozen=True)
class TuneJob:
    """One rate at the base width, to the largest budget."""

    rate: float

    @property
    def name(self) -> str:
        return f"tune/lr={self.rate:g}"

    def run(self) -> dict:
        run = new_run(shape(BASE_WIDTH, head_dim=12), decayed(self.rate, BUDGETS[-1]), TUNING_SEED)
        return {"loss": finish(run, None)}


@dataclass(frozen=True)
class SurfaceJob:
    """One stable run of one size, and a copy of it that decays to the end of each budget."""

    width: int
    seed: int
    rate: float

    @property
    def name(self) -> str:
        kind = "held out" if self.width == LARGER_WIDTH else "surface"
        return f"{kind}/width={self.width}/seed={self.seed}"

    def run(self) -> dict:
        stable = new_run(shape(self.width, head_dim=12), WSD(self.rate, WARMUP, BUDGETS[-1], 0), self.seed)
        points = []
        for budget in BUDGETS:
            stable.train(budget - budget // 10, progress=False)
            branch = stable.branch(decayed(self.rate, budget))
            branch.train(progress=False)
            points.append(
                {"D": budget * branch.config.batch_tokens, "loss": branch.evaluate(load_corpus().validation)}
                | benchmark(branch.model)
            )
        return asdict(self) | {
            "N": stable.model.num_parameters(),
            "N_total": stable.model.num_parameters(embeddings=True),
            "points": points,
        }


@dataclass(frozen=True)
class PredictionJob:
    """What the small models of a seed say about the larger one; needs their results and nothing else."""

    seed: int

    @property
    def name(self) -> str:
        return f"prediction/seed={self.seed}"

    def run(self) -> dict:
        runs = load_results(__file__)["runs"]
        if f"held out/width={LARGER_WIDTH}/seed={self.seed}" in runs:
            raise RuntimeError("The larger model is trained already: what is written now is no prediction.")
        small = [runs[f"surface/width={width}/seed={self.seed}"] for width in SURFACE_WIDTHS]
        points = [(run["N"], point) for run in small for point in run["points"]]
        surface = fit_loss_surface(
            [N for N, _ in points],
            [point["D"] for _, point in points],
            [point["loss"] for _, point in points],
        )
        sigmoid = fit_sigmoid(
            [point["conditional_loss"] for _, point in points],
            [point["accuracy"] for _, point in points],
            chance=1 / CHOICES,
        )
        with torch.device("meta"):  # its shape alone
            N = Decoder(shape(LARGER_WIDTH, head_dim=12)).num_parameters()
        return {
            "surface": asdict(surface),
            "sigmoid": asdict(sigmoid),
            "N": N,
            "loss": [surface(N, point["D"]) for point in small[-1]["points"]],
            "naive_loss": [point["loss"] for point in small[-1]["points"]],
        }


@dataclass(frozen=True)
class BatchJob:
    """Loss curves of one size and batch size at a constant rate, for each seed."""

    width: int
    batch: int
    rate: float

    @property
    def name(self) -> str:
        return f"batch/width={self.width}/batch={self.batch}"

    def run(self) -> dict:
        a_bin = BIN // (self.batch * 128)  # updates
        # as many tokens of warm-up for each batch size
        bins = BINS[self.width]
        schedule = WSD(self.rate, 2 * a_bin, (bins - 2) * a_bin, 0)
        curves = {}
        for seed in BATCH_SEEDS[self.width]:
            run = new_run(shape(self.width), schedule, seed, batch_size=self.batch)
            run.train(progress=False)
            # no text is read twice, so the loss of an update is a held-out loss
            curves[seed] = torch.tensor(run.losses).view(bins, a_bin).mean(dim=1).tolist()
        return {"curves": curves}


@cache
def benchmark_items() -> tuple[torch.Tensor, torch.Tensor]:
    """Passages of held-out Austen: contexts, and the true continuation of each with those of three others."""
    text = load_corpus().validation
    starts = torch.arange(ITEMS) * (len(text) // ITEMS)
    contexts = torch.stack([text[start : start + CONTEXT] for start in starts])
    answers = torch.stack([text[start + CONTEXT : start + CONTEXT + ANSWER] for start in starts])
    generator = torch.Generator().manual_seed(0)
    others = [int(torch.randint(1, ITEMS, (1,), generator=generator)) for _ in range(CHOICES - 1)]
    return contexts, torch.stack([answers.roll(shift, 0) for shift in (0, *others)])


def benchmark(model: Decoder) -> dict:
    """Loss of the true continuations, and how often it is the smallest of four."""
    contexts, choices = benchmark_items()
    losses = torch.stack([conditional_losses(model, contexts, answers) for answers in choices])
    return {
        "conditional_loss": losses[0].mean().item(),
        "accuracy": (losses.argmin(0) == 0).float().mean().item(),
    }


def work(job) -> dict:
    tune_cpu()
    torch._dynamo.reset()  # each job compiles a shape of its own, and dynamo keeps only a few
    return job.run()


def run_all(jobs: list) -> dict[str, dict]:
    return run_jobs(__file__, jobs, work, FACTS, workers=1)


def tune() -> float:
    def losses_of(pairs: list[tuple[str, float]]) -> dict[tuple[str, float], float]:
        runs = run_all([TuneJob(rate) for _, rate in pairs])
        return {(case, rate): runs[TuneJob(rate).name]["loss"] for case, rate in pairs}

    return tune_rates(["base"], (0.01, 0.02), losses_of)["base"]


def predict_and_check(seed: int, rate: float) -> None:
    """Three calls, so that each finds the results of the one before it written."""
    run_all([SurfaceJob(width, seed, rate) for width in SURFACE_WIDTHS])
    run_all([PredictionJob(seed)])
    run_all([SurfaceJob(LARGER_WIDTH, seed, rate)])


if __name__ == "__main__":
    sweeps = [SweepJob(width, "mup", seed) for width in WIDTHS[:-1] for seed in SEEDS]
    sweeps += [SweepJob(width, "standard", seed) for width in WIDTHS[1:-1] for seed in SEEDS]
    sweeps += [SweepJob(WIDTHS[-1], arm, seed) for seed in SEEDS_AT_192 for arm in ("mup", "standard")]
    run_all(sweeps)
    rate = tune()
    for seed in SURFACE_SEEDS:
        predict_and_check(seed, rate)
    run_all([BatchJob(24, batch, rate) for batch in BATCHES])
    depths = [DepthJob(depth, False, seed) for depth in DEPTHS for seed in DEPTH_SEEDS]
    depths += [DepthJob(depth, True, seed) for depth in DEPTHS if depth != 4 for seed in DEPTH_SEEDS]
    run_all(depths)
    run_all([BatchJob(48, batch, rate) for batch in BATCHES])
