"""The recorded runs of the wind tunnel chapter, about 70 minutes on one core.

Run them with `python notebooks/training/recorded/wind_tunnel.py`.

All models learn Austen with a vocabulary of 1,024 tokens; width 24 is the base of µP. Studies, in this order:

- "lr": loss against learning rate for widths 24 to 192, µP beside standard parametrisation. Both start from
  the same weights; standard has one rate for all and does not divide the logits. At width 24 they are equal,
  so that width is run once.

The rule for "lr", fixed before the runs: the optimum of a width is the minimum of the parabola in the
logarithm of the rate, mean over the seeds. The claim is refuted if the optimum of µP moves by more than a
factor of 2 from the smallest to the largest width, or by no less than that of the standard side.

Results go to `wind_tunnel.json` beside this file after each job; a run that is stopped goes on where it was.
"""

from dataclasses import dataclass, replace

import torch

from minicpm_lite.config import ModelConfig
from minicpm_lite.data.corpora import load_corpus
from minicpm_lite.lab.recorded import run_jobs
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.runtime import seed_everything, tune_cpu
from minicpm_lite.training.trainer import Trainer, TrainerConfig
from minicpm_lite.training.wsd import WSD, Schedule

BASE_WIDTH = 24
SEEDS = (0, 1, 2)
HELD_OUT = 20_000  # tokens on which the sweeps are judged
SWEEP_UPDATES, WARMUP = 150, 15  # of 1,536 tokens; the last tenth decays
WIDTHS = (24, 48, 96, 192)
SEEDS_AT_192 = (0, 1)
MUP_RATES = tuple(0.005 * 2**k for k in range(6))
FACTS = {
    "base_width": BASE_WIDTH,
    "seeds": SEEDS,
    "held_out_tokens": HELD_OUT,
    "sweep_updates": SWEEP_UPDATES,
}


def standard_rates(width: int) -> tuple[float, ...]:
    """Six rates a factor 2 apart, lower for a wider model, as a pilot run on another seed suggested."""
    return tuple(rate * BASE_WIDTH / width for rate in MUP_RATES)


@dataclass(frozen=True)
class SweepJob:
    """Loss against learning rate, for one model and seed."""

    width: int
    arm: str  # "mup" or "standard"
    seed: int

    @property
    def name(self) -> str:
        return f"lr/{self.arm}/width={self.width}/seed={self.seed}"

    def run(self) -> dict:
        rates = MUP_RATES if self.arm == "mup" else standard_rates(self.width)
        losses = {}
        for rate in rates:
            decay = SWEEP_UPDATES // 10
            schedule = WSD(rate, WARMUP, SWEEP_UPDATES - WARMUP - decay, decay)
            losses[rate] = finish(new_run(shape(self.width), schedule, self.seed, self.arm))
        return {"loss": losses}


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


def work(job) -> dict:
    tune_cpu()
    torch._dynamo.reset()  # each job compiles a shape of its own, and dynamo keeps only a few
    return job.run()


if __name__ == "__main__":
    sweeps = [SweepJob(width, "mup", seed) for width in WIDTHS[:3] for seed in SEEDS]
    sweeps += [SweepJob(width, "standard", seed) for width in WIDTHS[1:3] for seed in SEEDS]
    sweeps += [SweepJob(192, arm, seed) for seed in SEEDS_AT_192 for arm in ("mup", "standard")]
    run_jobs(__file__, sweeps, work, FACTS, workers=1)
