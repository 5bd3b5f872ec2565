"""The recorded runs of the chapter on multipliers: what each is for, and how deep is best.

Run them with `python notebooks/language/recorded/multipliers.py`: ten minutes on an H200, a day on 2 cores.

All models learn Austen and chitchat (5.9M tokens to train on, cut with one vocabulary of 1,024), in batches
of 8,192 tokens, under WSD. They differ in width, number of blocks and multipliers, and in nothing else.

**Multipliers.** What is lost without each of MiniCPM's three multipliers, once the rate is tuned? Arms, all
with 16 blocks of width 48: MiniCPM; without each multiplier in turn; without all three; Llama, which has none
either and smaller weights at the start (0.02). All but Llama start from the same weights for each seed, and
these are as large as in the releases: 0.1 in the table, 1.6/sqrt(d) in the matrices.

- Measured: the held-out loss of five seeds, minus MiniCPM's, seed by seed, each arm at its own best rate; the
  rates within 0.02 nats of the best; how large the stream is behind each block and how large what each block
  adds to it, before and after training; what it costs to leave one block out of the trained model.
- Rule: an arm is *worse* if the 95 % interval lies above 0, *equal* if it lies within 0.02 nats. That the
  multipliers make a better model is refuted if no arm is worse than MiniCPM.

**Doses.** The scale of the stream is free, so `scale_emb` and `scale_depth` act by one number: what a block
is multiplied by, over what a row of the table is. The arms above have MiniCPM's (0.029) or more of it. Two
more models have a half and a quarter, by a `scale_emb` of 24 and of 48. Measured as the arms are, five seeds.
Rule: MiniCPM's dose is *too large* here if the interval of one of them lies below 0, *near the best* if none
does.

**Rate and depth.** Does 1.4/sqrt(L) keep the best rate where it is when blocks are added? MiniCPM and the arm
without that multiplier, width 48, with 4, 16 and 32 blocks.

- Measured: the best rate of each depth, and what 32 blocks lose at the best rate of 4. One seed.
- Forecast: a step of Adam moves each weight by about the rate, however small the gradient is. What L blocks
  move adds up, so with r = 1.4/sqrt(L) the stream moves by sqrt(L) times the rate: from 4 to 32 blocks the
  best rate should fall by a factor of 2.8. Without r it should fall by 2.8 (the stream grows by itself, and a
  norm divides by it) to 8 (it does not).
- Rule: "the rate stays" is refuted if the best rate moves by more than a factor of 2, or by no less than
  without the multiplier.

**Shapes.** Is deep and thin better than shallow and wide, at equal parameters without embeddings (0.38M) and
equal tokens? 2 to 16 blocks. Published, for 125M and 350M parameters: 30 blocks and more are better than 12.
Their widths are about 18 and 64 times their depths; here it is 64 for 2 blocks, 24 for 4, 8 for 8, 3 for 16.

- Measured: the held-out loss of five seeds, each shape at its own best rate, minus that of 2 blocks, seed by
  seed.
- Rule: the direction is confirmed if 4 blocks are better than 2, the interval below 0; *equal* is an interval
  within 0.02 nats; an interval above 0 refutes it at this scale. 8 and 16 blocks are thinner than what was
  published and show where the gain ends.
- Power: in earlier, shorter runs such differences varied by 0.02 nats from seed to seed. Five seeds then show
  a true difference of 0.035 nats in four of five cases.

Rates are tuned on one grid for all, extended where the best lies at its edge, on a seed that is not compared.
The best rate is where the parabola in its logarithm, through the best of the grid and its neighbours, is
lowest.
Results go to `multipliers.json` beside this file after each job; a run that is stopped goes on where it
was, on another device if need be: each result says on which it was made.
"""

import math
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from statistics import mean

import torch
from jaxtyping import Int
from torch import Tensor, nn

from minicpm_lite.config import ModelConfig
from minicpm_lite.data.assets import load_austen, load_conversations
from minicpm_lite.data.corpora import load_corpus
from minicpm_lite.lab.recorded import run_jobs, tune_rates
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.runtime import seed_everything
from minicpm_lite.training.checkpoint import load_checkpoint, save_checkpoint
from minicpm_lite.training.settings import TrainerConfig
from minicpm_lite.training.trainer import Trainer
from minicpm_lite.training.wsd import WSD

TOKENS = Path(tempfile.gettempdir()) / "minicpm-lite-austen-chitchat-1024.safetensors"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WORKERS = 16 if DEVICE == "cuda" else None  # a small model leaves a GPU idle most of the time

BATCH, LENGTH = 64, 128
WARMUP, STABLE, DECAY = 40, 310, 90  # updates
SEEDS = (0, 1, 2, 3, 4)
TUNING_SEED = 100  # not among the seeds that are compared
FIRST_RATES = (0.0025, 0.005, 0.01, 0.02, 0.04)  # extended by factors of 2 while the best lies at the edge
PROBE = 64 * LENGTH  # held-out tokens on which the stream and the models without a block are measured

RELEASED_BASE = 256  # of the standard deviation 0.1/sqrt(d/256) that matrices start with
MINICPM = ModelConfig(  # four times as wide as its base, as MiniCPM4-0.5B is
    hidden_size=48,
    intermediate_size=100,
    num_hidden_layers=16,
    num_attention_heads=3,
    vocab_size=1024,
    max_position_embeddings=512,
    scale_emb=12,
    scale_depth=1.4,
    dim_model_base=12,
    init_std=0.1,
)


def shape(layers: int, width: int, feed_forward: int) -> ModelConfig:
    """Heads are 16 wide in all of them."""
    return replace(
        MINICPM,
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=feed_forward,
        num_attention_heads=width // 16,
        num_key_value_heads=width // 16,
    )


SHAPES = {  # equal parameters without embeddings, to within 0.5 %
    "2 x 128": shape(2, 128, 320),
    "4 x 96": shape(4, 96, 200),
    "8 x 64": shape(8, 64, 160),
    "16 x 48": MINICPM,
}
NONE = {"scale_emb": 1.0, "scale_depth": None, "dim_model_base": None}
ARMS = {
    "16 x 48, no scale_depth": replace(MINICPM, scale_depth=None),
    "16 x 48, no scale_emb": replace(MINICPM, scale_emb=1.0),
    "16 x 48, no division": replace(MINICPM, dim_model_base=None),
    "16 x 48, none of the three": replace(MINICPM, **NONE),
    "16 x 48, Llama": replace(MINICPM, init_std=0.02, **NONE),
}
DOSES = {
    "16 x 48, scale_emb 24": replace(MINICPM, scale_emb=24.0),
    "16 x 48, scale_emb 48": replace(MINICPM, scale_emb=48.0),
}
DEPTHS = {
    "4 x 48": shape(4, 48, 100),
    "4 x 48, no scale_depth": replace(shape(4, 48, 100), scale_depth=None),
    "32 x 48": shape(32, 48, 100),
    "32 x 48, no scale_depth": replace(shape(32, 48, 100), scale_depth=None),
}
MODELS: dict[str, ModelConfig] = SHAPES | ARMS | DOSES | DEPTHS

FACTS = {
    "data": "austen and chitchat",
    "batch_tokens": BATCH * LENGTH,
    "updates": {"warmup": WARMUP, "stable": STABLE, "decay": DECAY},
    "seeds": SEEDS,
    "tuning_seed": TUNING_SEED,
    "probe_tokens": PROBE,
    "models": {name: asdict(config) for name, config in MODELS.items()},
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


def save_tokens() -> None:
    """Cut the text into tokens, once for all workers. A conversation that was recorded twice counts once."""
    texts = ["\n".join(message for turn in turns for message in turn) for turns in load_conversations()]
    corpus = load_corpus(text=load_austen() + "\n\n".join(dict.fromkeys(texts)))
    save_checkpoint(
        TOKENS,
        {"training": corpus.train.short(), "held out": corpus.validation.short()},
        {"bytes_per_token": corpus.bytes_per_token},
    )


@cache
def tokens() -> dict[str, Int[Tensor, " tokens"]]:
    return load_checkpoint(TOKENS)[0]


def new_model(config: ModelConfig, seed: int) -> Decoder:
    """A model whose first weights do not depend on its multipliers; the division would else scale them."""
    seed_everything(seed)
    if config.init_std != MINICPM.init_std:  # Llama
        return Decoder(config)
    start = Decoder(replace(config, dim_model_base=RELEASED_BASE))
    model = Decoder(config)
    model.load_state_dict(start.state_dict())
    return model


def new_run(job: Job) -> Trainer:
    return Trainer(
        new_model(MODELS[job.model], job.seed).to(DEVICE),
        tokens()["training"],
        WSD(job.peak_lr, WARMUP, STABLE, DECAY),
        TrainerConfig(BATCH, LENGTH, seed=job.seed),
    )


@torch.no_grad()
def stream(model: Decoder) -> dict[str, list[float]]:
    """Root mean squares: of the stream before the first block and behind each; of what each adds to it."""
    windows = tokens()["held out"][:PROBE].view(-1, LENGTH).long().to(DEVICE)
    states = model.states(model.embed(windows), after=range(len(model.layers)))
    added = [after - before for before, after in pairwise(states)]
    return {
        name: [x.square().mean().sqrt().item() for x in each]
        for name, each in (("stream", states), ("added", added))
    }


def losses_without_a_block(run: Trainer) -> list[float]:
    """Of the trained model as it is, and then with each of its blocks left out."""
    blocks, losses = list(run.model.layers), []
    for kept in [blocks, *(blocks[:left_out] + blocks[left_out + 1 :] for left_out in range(len(blocks)))]:
        run.model.layers = nn.ModuleList(kept)
        losses.append(run.evaluate(tokens()["held out"][: PROBE + 1], PROBE // LENGTH))
    run.model.layers = nn.ModuleList(blocks)
    return losses


def work(job: Job) -> dict:
    torch.backends.cuda.matmul.fp32_precision = "tf32"  # on a GPU, products of 11 significant bits
    run = new_run(job)
    on = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    result = asdict(job) | {"on": on, "start": stream(run.model)}
    try:
        run.train(progress=False)
    except FloatingPointError:
        return result | {"loss": None}  # it diverged
    return result | {
        "loss": run.evaluate(tokens()["held out"], BATCH),
        "train_losses": [mean(run.losses[step : step + 10]) for step in range(0, len(run.losses), 10)],
        "end": stream(run.model),
        "losses_without_a_block": losses_without_a_block(run),
    }


def run_all(jobs: Iterable[Job]) -> dict[str, dict]:
    in_turn = sorted(jobs, key=lambda job: (job.seed, -MODELS[job.model].num_hidden_layers))
    return run_jobs(__file__, in_turn, work, FACTS, WORKERS)


def losses_of(pairs: list[tuple[str, float]]) -> dict[tuple[str, float], float]:
    jobs = {(model, rate): Job(model, rate, TUNING_SEED) for model, rate in pairs}
    runs = run_all(jobs.values())
    losses = {pair: runs[job.name]["loss"] for pair, job in jobs.items()}
    return {pair: math.inf if loss is None else loss for pair, loss in losses.items()}


def between(model: str, rate: float) -> float:
    """Where the parabola through the losses at half the best rate of the grid, it and twice it is lowest."""
    left, middle, right = losses_of([(model, rate * step) for step in (0.5, 1, 2)]).values()
    return float(f"{rate * 2 ** ((left - right) / (2 * (left - 2 * middle + right))):.2g}")


if __name__ == "__main__":
    if not TOKENS.exists():
        save_tokens()
    on_grid = tune_rates(MODELS, FIRST_RATES, losses_of)
    best_rates = {model: between(model, on_grid[model]) for model in SHAPES | ARMS | DOSES}
    print(f"tuned: {best_rates}", flush=True)
    run_all(Job(model, rate, seed) for seed in SEEDS for model, rate in best_rates.items())
